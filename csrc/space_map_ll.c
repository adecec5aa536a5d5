/*
 * Invariants:
 * 1. a pending entry holds the block's present count; blocks without one have their committed count;
 * 2. a block is handed out only if its committed count is 0, it has no pending entry and is not reserved;
 * 3. the committed bitmaps and overflow nodes are never written: the allocator and the counts read them at
 *    any moment of a transaction, also while ll_flush runs;
 * 4. nr_free is stored as 16320 minus the nonzero entries, in the last bitmap too; nr_free, none_free_before
 *    and nr_allocated of a foreign image are hints, recomputed where they do not agree with each other.
 */
#include "space_map_ll.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "seed_bug.h"

#define QUEUED 1u       /* pending entry is in the queue */
#define OVER_CHANGED 2u /* counted in nr_overflow_changes */
#define RELEASED 4u     /* its count went to 0 in this transaction */
#define EVEN_BITS 0x5555555555555555ull

static const struct bm_validator bitmap_validator = {"bitmap", BITMAP_SALT, NULL};

static struct ll *to_ll(struct space_map *sm)
{
	return (struct ll *)sm;
}

static struct btree overflow_tree(const struct ll *ll)
{
	return (struct btree){.tm = ll->tm, .value_size = 4};
}

static uint64_t bitmaps_for(uint64_t nr_blocks)
{
	return (nr_blocks + ENTRIES_PER_BITMAP - 1) / ENTRIES_PER_BITMAP;
}

/* Entries of bitmap i that stand for blocks of the device. */
static uint32_t entries_in(const struct ll *ll, uint64_t i)
{
	uint64_t rest = ll->nr_blocks - i * ENTRIES_PER_BITMAP;

	rest += BS_BUG(BLOCK_BEYOND_THE_END);
	return rest < ENTRIES_PER_BITMAP ? rest : ENTRIES_PER_BITMAP;
}

static int read_bitmap(const struct ll *ll, uint64_t nr, const struct disk_bitmap **ret)
{
	struct bm_block *b;
	int r = tm_read(ll->tm, nr, &bitmap_validator, &b);

	if (r == 0)
		*ret = (const struct disk_bitmap *)b->data;
	return r;
}

/* ---- counts ---- */

static int committed_count(const struct ll *ll, uint64_t block, uint32_t *ret)
{
	const struct ll_index_entry *e = &ll->committed[block / ENTRIES_PER_BITMAP];
	const struct disk_bitmap *bitmap = NULL;

	*ret = 0;
	if (block >= ll->committed_nr_blocks || !e->blocknr)
		return 0;
	int r = read_bitmap(ll, e->blocknr, &bitmap);
	if (r < 0)
		return r;
	*ret = bitmap_get(bitmap, block % ENTRIES_PER_BITMAP);
	if (*ret < 3)
		return 0;
	struct btree tree = overflow_tree(ll);
	struct le32 count;
	r = btree_lookup(&tree, ll->committed_overflow, block, &count);
	if (r < 0)
		return r;
	if (r == 0 || le32_get(count) < 3)
		return bs_fail(-EUCLEAN,
			"%s block %" PRIu64 " has no count in the overflow tree: run pool check", ll->name,
			block);
	*ret = le32_get(count);
	return 0;
}

static int out_of_range(const struct ll *ll, uint64_t block)
{
	return bs_fail(-EUCLEAN,
		"%s block %" PRIu64 " is outside the device of %" PRIu64 " blocks: run pool check", ll->name,
		block, ll->nr_blocks);
}

static int ll_committed_count(struct space_map *sm, uint64_t block, uint32_t *ret)
{
	struct ll *ll = to_ll(sm);

	return block >= ll->nr_blocks ? out_of_range(ll, block) : committed_count(ll, block, ret);
}

static int ll_count(struct space_map *sm, uint64_t block, uint32_t *ret)
{
	struct ll *ll = to_ll(sm);
	const struct count_entry *e = count_map_find(&ll->pending, block);

	if (block >= ll->nr_blocks)
		return out_of_range(ll, block);
	if (!e || BS_BUG(PENDING_COUNT_IGNORED))
		return committed_count(ll, block, ret);
	*ret = e->count;
	return 0;
}

static int enqueue(struct ll *ll, struct count_entry *e)
{
	if (e->flags & QUEUED)
		return 0;
	if (ll->queue_nr == ll->queue_capacity) {
		size_t capacity = ll->queue_capacity ? ll->queue_capacity * 2 : 256;
		uint64_t *queue = realloc(ll->queue, capacity * sizeof(*queue));

		if (!queue)
			return bs_fail(-ENOMEM, "out of memory");
		ll->queue = queue;
		ll->queue_capacity = capacity;
	}
	ll->queue[ll->queue_nr++] = e->block;
	e->flags |= QUEUED;
	return 0;
}

static void touch(struct ll *ll, uint64_t block)
{
	uint64_t i = block / ENTRIES_PER_BITMAP;

	ll->nr_touched += !ll->touched[i];
	ll->touched[i] = 1;
}

/* The pending entry of a block, made from its committed count at the first touch. */
static int pending_entry(struct ll *ll, uint64_t block, struct count_entry **ret)
{
	bool added;
	uint32_t count;
	struct count_entry *e = count_map_find(&ll->pending, block);

	if (block >= ll->nr_blocks)
		return out_of_range(ll, block);
	if (!e) {
		int r = committed_count(ll, block, &count);

		if (r < 0)
			return r;
		e = count_map_add(&ll->pending, block, &added);
		if (!e)
			return bs_fail(-ENOMEM, "out of memory");
		e->count = count;
		ll->nr_taken += count == 0;
		touch(ll, block);
	}
	*ret = e;
	return enqueue(ll, e);
}

static void note_overflow(struct ll *ll, struct count_entry *e, uint32_t before)
{
	if ((before >= 3 || e->count >= 3) && !(e->flags & OVER_CHANGED)) {
		e->flags |= OVER_CHANGED;
		ll->nr_overflow_changes++;
	}
}

static int ll_inc(struct space_map *sm, uint64_t block)
{
	struct ll *ll = to_ll(sm);
	struct count_entry *e;
	int r = pending_entry(ll, block, &e);

	if (r < 0)
		return r;
	if (e->count == UINT32_MAX)
		return bs_fail(-EUCLEAN, "%s block %" PRIu64 ": count overflows", ll->name, block);
	if (e->count++ == 0) {
		ll->nr_allocated++;
		ll->nr_freed -= !!(e->flags & RELEASED);
		e->flags &= ~RELEASED;
	}
	note_overflow(ll, e, e->count - 1);
	return 0;
}

static int ll_dec(struct space_map *sm, uint64_t block, uint32_t *ret)
{
	struct ll *ll = to_ll(sm);
	struct count_entry *e;
	int r = pending_entry(ll, block, &e);

	if (r < 0)
		return r;
	if (e->count == 0)
		return bs_fail(-EUCLEAN,
			"%s block %" PRIu64 " is referred to but not counted: run pool check", ll->name,
			block);
	note_overflow(ll, e, e->count);
	if (--e->count == 0) {
		ll->nr_allocated--;
		ll->nr_freed++;
		e->flags |= RELEASED;
	}
	*ret = e->count;
	return 0;
}

/* ---- allocation ---- */

static int load_cursor(struct ll *ll)
{
	const struct ll_index_entry *e = &ll->committed[ll->cursor];
	const struct disk_bitmap *bitmap = NULL;
	uint32_t entries = entries_in(ll, ll->cursor);

	if (e->blocknr) {
		int r = read_bitmap(ll, e->blocknr, &bitmap);

		if (r < 0)
			return r;
	}
	for (uint32_t w = 0; w < 510; w++) {
		uint64_t raw = bitmap ? le64_get(bitmap->words[w]) : 0;
		uint32_t first = w * 32;

		ll->free_words[w] = ~(raw | raw >> 1) & EVEN_BITS;
		if (first >= entries)
			ll->free_words[w] = 0;
		else if (entries - first < 32)
			ll->free_words[w] &= (1ull << (entries - first) * 2) - 1;
	}
	ll->cursor_word = 0;
	ll->cursor_loaded = true;
	return 0;
}

/* There are as many reservations as threads that provision: a list is enough. */
static bool is_reserved(const struct ll *ll, uint64_t block)
{
	for (uint64_t i = 0; i < ll->nr_reserved; i++)
		if (ll->reserved[i] == block)
			return !BS_BUG(RESERVED_BLOCK_GIVEN_AGAIN);
	return false;
}

/* The next free entry of the cursor's bitmap that nobody took: 1 found, 0 none. */
static int next_in_bitmap(struct ll *ll, uint64_t *ret)
{
	for (; ll->cursor_word < 510; ll->cursor_word++) {
		uint64_t *word = &ll->free_words[ll->cursor_word];

		while (*word) {
			uint64_t block = ll->cursor * ENTRIES_PER_BITMAP + ll->cursor_word * 32 +
					 __builtin_ctzll(*word) / 2;

			*word &= *word - 1;
			if (!count_map_find(&ll->pending, block) && !is_reserved(ll, block)) {
				*ret = block;
				return 1;
			}
		}
	}
	return 0;
}

static int no_space(const struct ll *ll)
{
	return bs_fail(-ENOSPC, "the %s device is full (%" PRIu64 " blocks): run pool extend", ll->name,
		ll->nr_blocks);
}

static bool find_freed(const struct ll *ll, uint64_t *ret)
{
	for (size_t i = 0; i < ll->pending.capacity; i++)
		if (ll->pending.slots[i].block != COUNT_MAP_EMPTY && ll->pending.slots[i].flags & RELEASED) {
			*ret = ll->pending.slots[i].block;
			return true;
		}
	return false;
}

/* Two rounds over all bitmaps: the second does not believe the index's nr_free. */
static int find_free(struct ll *ll, uint64_t *ret)
{
	if (BS_BUG(FREED_BLOCK_REUSED) && find_freed(ll, ret))
		return 0;
	if (ll_available(ll) == 0)
		return no_space(ll);
	for (uint64_t step = 0; step <= 2 * ll->nr_bitmaps; step++) {
		const struct ll_index_entry *e = &ll->committed[ll->cursor];
		bool skip = step > 0 && step < ll->nr_bitmaps && e->blocknr && e->nr_free == 0;

		if (!skip && !ll->cursor_loaded) {
			int r = load_cursor(ll);

			if (r < 0)
				return r;
		}
		if (!skip && next_in_bitmap(ll, ret))
			return 0;
		ll->cursor = (ll->cursor + 1) % ll->nr_bitmaps;
		ll->cursor_loaded = false;
	}
	return no_space(ll);
}

static int ll_new_block(struct space_map *sm, uint64_t *ret)
{
	int r = find_free(to_ll(sm), ret);

	return r < 0 ? r : ll_inc(sm, *ret);
}

static const struct space_map_ops ll_ops = {
	.count = ll_count,
	.committed_count = ll_committed_count,
	.inc = ll_inc,
	.dec = ll_dec,
	.new_block = ll_new_block,
};

int ll_reserve(struct ll *ll, uint64_t *ret)
{
	uint64_t *reserved = realloc(ll->reserved, (ll->nr_reserved + 1) * sizeof(*reserved));

	if (!reserved)
		return bs_fail(-ENOMEM, "out of memory");
	ll->reserved = reserved;
	int r = find_free(ll, ret);
	if (r == 0)
		reserved[ll->nr_reserved++] = *ret;
	return r;
}

void ll_unreserve(struct ll *ll, uint64_t block)
{
	for (uint64_t i = 0; i < ll->nr_reserved; i++)
		if (ll->reserved[i] == block) {
			ll->reserved[i] = ll->reserved[--ll->nr_reserved];
			return;
		}
}

int ll_take(struct ll *ll, uint64_t block)
{
	ll_unreserve(ll, block);
	return ll_inc(&ll->sm, block);
}

uint64_t ll_available(const struct ll *ll)
{
	uint64_t used = ll->nr_taken + ll->nr_reserved;

	return ll->committed_free > used ? ll->committed_free - used : 0;
}

static uint64_t bitmaps_cost(const struct ll *ll)
{
	/* A bitmap and, at worst, an index leaf for each. */
	return ll->nr_touched * 2 + 16;
}

uint64_t ll_commit_cost(const struct ll *ll)
{
	/* Three overflow nodes for each changed large count. */
	return bitmaps_cost(ll) + ll->nr_overflow_changes * 3;
}

int ll_exact_commit_cost(struct ll *ll, uint64_t *ret)
{
	struct btree tree = overflow_tree(ll);

	if (!ll->overflow_nodes) {
		int r = btree_count_nodes(&tree, ll->committed_overflow, &ll->overflow_nodes);
		if (r < 0)
			return r;
	}
	/* Each node is shadowed once; a node splits once for what it held, and again for each half of its entries
	 * that come new. */
	uint64_t splits = ll->overflow_nodes + ll->nr_overflow_changes / (btree_max_entries(4) / 2);
	uint64_t overflow = ll->overflow_nodes + splits + BTREE_MAX_DEPTH;
	if (overflow > ll->nr_overflow_changes * 3)
		overflow = ll->nr_overflow_changes * 3;
	*ret = bitmaps_cost(ll) + overflow;
	return 0;
}

/* ---- set-up ---- */

static int init(struct ll *ll, struct transaction_manager *tm, const char *name, uint64_t nr_blocks)
{
	memset(ll, 0, sizeof(*ll));
	ll->sm.ops = &ll_ops;
	ll->tm = tm;
	ll->name = name;
	ll->nr_blocks = nr_blocks;
	ll->nr_bitmaps = bitmaps_for(nr_blocks);
	ll->committed = calloc(ll->nr_bitmaps + 1, sizeof(*ll->committed));
	ll->working = calloc(ll->nr_bitmaps + 1, sizeof(*ll->working));
	ll->touched = calloc(ll->nr_bitmaps + 1, 1);
	if (ll->committed && ll->working && ll->touched)
		return 0;
	ll_deinit(ll);
	return bs_fail(-ENOMEM, "out of memory");
}

int ll_init(struct ll *ll, struct transaction_manager *tm, const char *name, uint64_t nr_blocks)
{
	int r = init(ll, tm, name, nr_blocks);

	ll->committed_free = nr_blocks;
	return r;
}

int ll_init_committed(struct ll *ll, struct transaction_manager *tm, const char *name, uint64_t nr_blocks,
	uint64_t nr_allocated, uint64_t overflow_root)
{
	int r = init(ll, tm, name, nr_blocks);

	ll->committed_nr_blocks = nr_blocks;
	ll->nr_allocated = nr_allocated;
	ll->committed_overflow = ll->overflow_root = overflow_root;
	return r;
}

/* Free entries of a bitmap among all 16320, and the first of them. */
static void count_free(const struct disk_bitmap *bitmap, uint32_t *ret_free, uint32_t *ret_first)
{
	*ret_free = 0;
	*ret_first = ENTRIES_PER_BITMAP;
	for (uint32_t w = 0; w < 510; w++) {
		uint64_t raw = le64_get(bitmap->words[w]);
		uint64_t unused = ~(raw | raw >> 1) & EVEN_BITS;

		if (unused && *ret_first == ENTRIES_PER_BITMAP)
			*ret_first = w * 32 + __builtin_ctzll(unused) / 2;
		*ret_free += __builtin_popcountll(unused);
	}
}

int ll_opened(struct ll *ll)
{
	uint64_t allocated = 0;

	for (uint64_t i = 0; i < ll->nr_bitmaps; i++) {
		if (!ll->committed[i].blocknr)
			return bs_fail(-EUCLEAN,
				"%s space map: bitmap %" PRIu64 " is missing: run pool check", ll->name, i);
		allocated += ENTRIES_PER_BITMAP - ll->committed[i].nr_free;
	}
	if (allocated != ll->nr_allocated) {
		allocated = 0;
		for (uint64_t i = 0; i < ll->nr_bitmaps; i++) {
			const struct disk_bitmap *bitmap = NULL;
			int r = read_bitmap(ll, ll->committed[i].blocknr, &bitmap);

			if (r < 0)
				return r;
			count_free(bitmap, &ll->committed[i].nr_free, &ll->committed[i].none_free_before);
			allocated += ENTRIES_PER_BITMAP - ll->committed[i].nr_free;
			bm_trim(ll->tm->bm);
		}
	}
	if (allocated > ll->nr_blocks)
		return bs_fail(-EUCLEAN,
			"%s space map: %" PRIu64 " of %" PRIu64 " blocks in use: run pool check", ll->name,
			allocated, ll->nr_blocks);
	ll->nr_allocated = allocated;
	ll->committed_free = ll->nr_blocks - allocated;
	memcpy(ll->working, ll->committed, ll->nr_bitmaps * sizeof(*ll->working));
	return 0;
}

void ll_deinit(struct ll *ll)
{
	free(ll->committed);
	free(ll->working);
	free(ll->touched);
	free(ll->queue);
	count_map_deinit(&ll->pending);
	free(ll->reserved);
	memset(ll, 0, sizeof(*ll));
}

static void *grow_zeroed(void *array, uint64_t old_nr, uint64_t nr, size_t size)
{
	char *grown = realloc(array, (nr + 1) * size);

	if (grown)
		memset(grown + old_nr * size, 0, (nr + 1 - old_nr) * size);
	return grown;
}

int ll_extend(struct ll *ll, uint64_t nr_blocks)
{
	uint64_t old = ll->nr_bitmaps, nr = bitmaps_for(nr_blocks);
	void *committed = grow_zeroed(ll->committed, old, nr, sizeof(*ll->committed));

	if (committed)
		ll->committed = committed;
	void *working = grow_zeroed(ll->working, old, nr, sizeof(*ll->working));
	if (working)
		ll->working = working;
	void *touched = grow_zeroed(ll->touched, old, nr, 1);
	if (touched)
		ll->touched = touched;
	if (!committed || !working || !touched)
		return bs_fail(-ENOMEM, "out of memory");
	ll->committed_free += nr_blocks - ll->nr_blocks;
	ll->nr_touched += nr - old;
	memset(ll->touched + old, 1, nr - old);
	ll->nr_blocks = nr_blocks;
	ll->nr_bitmaps = nr;
	ll->cursor_loaded = false;
	return 0;
}

/* ---- commit ---- */

static int by_block(const void *a, const void *b)
{
	uint64_t l = *(const uint64_t *)a, r = *(const uint64_t *)b;

	return l < r ? -1 : l > r;
}

/* A changeable bitmap i. */
static int shadow_bitmap(struct ll *ll, uint64_t i, struct bm_block **ret)
{
	struct ll_index_entry *e = &ll->working[i];
	bool shared;
	int r = e->blocknr ? tm_shadow(ll->tm, e->blocknr, &bitmap_validator, ret, &shared)
			   : tm_new(ll->tm, &bitmap_validator, ret);

	if (r < 0)
		return r;
	e->blocknr = (*ret)->nr;
	e->changed = true;
	return 0;
}

static int write_overflow(struct ll *ll, uint64_t block, uint32_t before, uint32_t count)
{
	struct btree tree = overflow_tree(ll);

	if (count >= (BS_BUG(OVERFLOW_FROM_FOUR) ? 4u : 3u))
		return btree_insert(&tree, &ll->overflow_root, block, &(struct le32){htole32(count)}, NULL);
	if (before >= 3 && !BS_BUG(OVERFLOW_ENTRY_KEPT))
		return btree_remove(&tree, &ll->overflow_root, block);
	return 0;
}

/* Write the pending counts of some blocks of one bitmap. */
static int flush_bitmap(struct ll *ll, uint64_t i, const uint64_t *blocks, size_t nr)
{
	struct bm_block *b;
	int r = shadow_bitmap(ll, i, &b);

	for (size_t k = 0; r >= 0 && k < nr; k++) {
		uint32_t entry = blocks[k] % ENTRIES_PER_BITMAP;
		uint32_t before = bitmap_get((struct disk_bitmap *)b->data, entry);
		uint32_t count = count_map_find(&ll->pending, blocks[k])->count;

		bitmap_set((struct disk_bitmap *)b->data, entry, count < 3 ? count : 3);
		r = write_overflow(ll, blocks[k], before, count);
	}
	if (r >= 0)
		count_free((struct disk_bitmap *)b->data, &ll->working[i].nr_free,
			&ll->working[i].none_free_before);
	if (BS_BUG(FREE_COUNT_CUT_SHORT))
		ll->working[i].nr_free -= ENTRIES_PER_BITMAP - entries_in(ll, i);
	return r < 0 ? r : 0;
}

static int flush_batch(struct ll *ll, uint64_t *blocks, size_t nr)
{
	qsort(blocks, nr, sizeof(*blocks), by_block);
	for (size_t i = 0; i < nr; i++)
		count_map_find(&ll->pending, blocks[i])->flags &= ~QUEUED;
	for (size_t i = 0; i < nr;) {
		uint64_t bitmap = blocks[i] / ENTRIES_PER_BITMAP;
		size_t end = i;

		while (end < nr && blocks[end] / ENTRIES_PER_BITMAP == bitmap)
			end++;
		int r = flush_bitmap(ll, bitmap, blocks + i, end - i);
		if (r < 0)
			return r;
		i = end;
	}
	return 0;
}

static int make_missing_bitmaps(struct ll *ll)
{
	uint64_t end = ll->nr_bitmaps - (BS_BUG(NEW_BITMAP_FORGOTTEN) && ll->committed_nr_blocks);

	for (uint64_t i = bitmaps_for(ll->committed_nr_blocks); i < end; i++) {
		struct bm_block *b;

		if (ll->working[i].blocknr)
			continue;
		int r = shadow_bitmap(ll, i, &b);
		if (r < 0)
			return r;
		ll->working[i].nr_free = ENTRIES_PER_BITMAP;
		ll->working[i].none_free_before = 0;
	}
	return 0;
}

int ll_flush(struct ll *ll)
{
	int r = make_missing_bitmaps(ll);

	while (r == 0 && ll->queue_nr) {
		uint64_t *blocks = ll->queue;
		size_t nr = ll->queue_nr;

		ll->queue = NULL;
		ll->queue_nr = ll->queue_capacity = 0;
		r = flush_batch(ll, blocks, nr);
		free(blocks);
	}
	return r;
}

int ll_committed(struct ll *ll)
{
	memcpy(ll->committed, ll->working, ll->nr_bitmaps * sizeof(*ll->committed));
	ll->committed_nr_blocks = ll->nr_blocks;
	ll->committed_overflow = ll->overflow_root;
	ll->committed_free = ll->nr_blocks - ll->nr_allocated;
	count_map_clear(&ll->pending);
	memset(ll->touched, 0, ll->nr_bitmaps);
	ll->nr_taken = ll->nr_freed = ll->nr_touched = ll->nr_overflow_changes = 0;
	ll->overflow_nodes = 0;
	ll->cursor_loaded = false;
	return 0;
}

int ll_freed_blocks(const struct ll *ll, uint64_t **ret_blocks, uint64_t *ret_nr)
{
	uint64_t n = 0;
	uint64_t *blocks = malloc((ll->nr_freed + 1) * sizeof(*blocks));

	if (!blocks)
		return bs_fail(-ENOMEM, "out of memory");
	for (size_t i = 0; i < ll->pending.capacity && n < ll->nr_freed; i++) {
		const struct count_entry *e = &ll->pending.slots[i];

		if (e->block != COUNT_MAP_EMPTY && e->flags & RELEASED)
			blocks[n++] = e->block;
	}
	qsort(blocks, n, sizeof(*blocks), by_block);
	*ret_blocks = blocks;
	*ret_nr = n;
	return 0;
}
