/*
 * Metadata blocks that commits write, by position: a node is written once a transaction however often it
 * changes.
 *
 * The approximation: a mapping tree whose keys are dense and whose nodes are all filled by two thirds, as
 * ascending insertion leaves them, so that leaf n holds the mappings 168 n to 168 n + 167; data blocks that
 * lie in the order of their thin blocks, so that the counts of a leaf's blocks stand in one bitmap; new
 * data blocks in sequence. A leaf that first changes in an epoch becomes a copy of the snapshot's, which
 * gives all its data blocks one more count: from the third copy on these stand in a leaf of the overflow
 * tree. A commit adds six blocks: the superblock, one node of the tree of devices, one of their details,
 * one of the index of the data bitmaps, the metadata index and a bitmap of metadata blocks. Fresh devices
 * have no more leaves than their mapped blocks fill, nor bitmaps than all data blocks. Left out: splits of
 * nodes, inner nodes of the overflow tree below its root, changes of high counts that are no copies of
 * leaves.
 */
#include "cow_model.h"

#include <stdlib.h>
#include <string.h>

#include "disk_format.h"

#define FIXED_BLOCKS 6
#define MANY_LEAVES 512

/* The leaves of 64 * COW_LEAF blocks of level 6d and those of the next five levels, laid out like a node's
 * sets: leaf n of a level lies where leaf n / 2 of the next one lies. */
struct marks {
	struct cow_key key;
	struct cow_set leaves;
	struct cow_set recent;      /* changed in epoch `epoch` */
	struct cow_set once, twice; /* changed in at least one, two, epochs before that */
	uint64_t transaction;       /* the one that `leaves` are of */
	uint32_t epoch;
};

/* The running transaction comes to these marks first: they are counted when it commits. NULL when out of
 * memory. */
static struct marks *begin_marks(struct bs_cow_model *m, struct marks *marks, uint64_t index, uint32_t device)
{
	if (m->nr_changed == m->changed_capacity) {
		size_t capacity = m->changed_capacity ? 2 * m->changed_capacity : 256;
		struct cow_key *changed = realloc(m->changed, capacity * sizeof(*changed));

		if (!changed)
			return NULL;
		m->changed = changed;
		m->changed_capacity = capacity;
	}
	if (!marks)
		marks = cow_table_add(&m->marks, index, device, 1);
	if (!marks)
		return NULL;
	marks->transaction = m->transaction;
	marks->leaves = (struct cow_set){0};
	m->changed[m->nr_changed++] = marks->key;
	return marks;
}

/* The marks for a leaf of level 6 * depth. */
static struct marks *get_marks(struct bs_cow_model *m, int depth, uint32_t device, uint64_t leaf)
{
	uint64_t index = cow_index(depth, leaf >> 6);
	struct marks *marks = cow_table_find(&m->marks, sizeof(struct marks), index, device);

	if (marks && marks->transaction == m->transaction)
		return marks;
	marks = begin_marks(m, marks, index, device);
	m->out_of_memory |= !marks;
	return marks;
}

void cow_metadata_mark(struct bs_cow_model *m, int depth, uint32_t device, uint64_t leaf, int levels)
{
	struct marks *marks = get_marks(m, depth, device, leaf);
	unsigned int place = leaf & 63;

	if (!marks)
		return;
	marks->leaves.w[0] |= 1ull << place;
	for (int j = 1; j < levels; j++)
		marks->leaves.w[1] |= 1ull << ((64 + place) >> j);
}

/* Of level 6 * depth + j. */
static void mark_leaf(struct marks *marks, int j, uint64_t leaf)
{
	marks->leaves.w[j > 0] |= 1ull << (j ? 64 >> j | (leaf & (63 >> j)) : leaf & 63);
}

static void mark_level(struct bs_cow_model *m, int level, uint32_t device, uint64_t leaf)
{
	int depth = level / 6, j = level % 6;
	struct marks *marks = get_marks(m, depth, device, leaf << j);

	if (marks)
		mark_leaf(marks, j, leaf);
}

void cow_metadata_mark_levels(
	struct bs_cow_model *m, int depth, uint64_t node, uint32_t device, struct cow_set changed)
{
	struct marks *marks = NULL;

	for (int j = 0; j < 6; j++) {
		uint64_t bits = cow_level_bits(changed, j), block = node << (6 - j);

		if (!bits)
			continue;
		uint64_t first = (block + __builtin_ctzll(bits)) / COW_LEAF;
		uint64_t last = (block + 63 - __builtin_clzll(bits)) / COW_LEAF;
		for (uint64_t leaf = first; leaf <= last; leaf++) {
			/* Mostly the same marks as for the level before. */
			if (!marks || marks->key.index != cow_index(depth, leaf << j >> 6))
				marks = get_marks(m, depth, device, leaf << j);
			if (marks)
				mark_leaf(marks, j, leaf);
		}
	}
}

void cow_metadata_unmap(struct bs_cow_model *m, int level, uint32_t device, uint64_t first, uint64_t last)
{
	first /= COW_LEAF;
	last /= COW_LEAF;
	/* The inside of a large range is no other change's business. */
	if (last - first > MANY_LEAVES) {
		m->levels[level].unmapped_leaves += last - first - 1;
		mark_level(m, level, device, first);
		first = last;
	}
	for (; first <= last; first++)
		mark_level(m, level, device, first);
}

void cow_metadata_grow(struct bs_cow_model *m, uint64_t bytes)
{
	m->grows_at = UINT64_MAX;
	for (int i = 0; i < m->nr_sizes; i++) {
		struct cow_level *l = &m->levels[m->sizes[i]];
		int shift = cow_shift(m, m->sizes[i]);
		uint64_t blocks = (bytes >> shift) + 1, capacity = COW_LEAF;

		for (l->height = 1; blocks > capacity; l->height++)
			capacity *= COW_LEAF;
		if (capacity <= UINT64_MAX >> shift)
			m->grows_at = cow_minimum(m->grows_at, capacity << shift);
	}
}

/* ---- what a commit writes ---- */

/* Returns how many of two bitmaps (height 0) or inner nodes, which are one or neighbours, were not counted before:
 * what is counted ascends. */
INLINE uint64_t count_new(struct cow_counted *counted, uint32_t device, uint64_t first, uint64_t last)
{
	uint64_t next = counted->device == device ? counted->next : 0;

	*counted = (struct cow_counted){device, last + 1};
	return (first >= next) + (last > first);
}

/* The nodes above two leaves. */
INLINE uint64_t count_inner(struct bs_cow_model *m, int level, uint32_t device, uint64_t first, uint64_t last)
{
	uint64_t blocks = 0;

	for (int height = 1; height < m->levels[level].height; height++) {
		first /= COW_LEAF;
		last /= COW_LEAF;
		uint64_t new = count_new(&m->counted[level][height], device, first, last);

		if (!new)
			break;
		blocks += new;
	}
	return blocks;
}

INLINE void end_epoch(struct marks *marks, uint32_t epoch)
{
	if (marks->epoch == epoch)
		return;
	for (int i = 0; i < 2; i++) {
		marks->twice.w[i] |= marks->once.w[i] & marks->recent.w[i];
		marks->once.w[i] |= marks->recent.w[i];
		marks->recent.w[i] = 0;
	}
	marks->epoch = epoch;
}

/* The marks of one level stand for at most 64 leaves, which lie below two nodes at most, and in two
 * bitmaps. */
INLINE void count_marks(struct bs_cow_model *m, int level, const struct marks *marks)
{
	struct cow_pending *p = &m->levels[level].pending;
	uint32_t device = marks->key.device;
	int j = level % 6;
	uint64_t bits = cow_level_bits(marks->leaves, j);
	uint64_t leaf = (marks->key.index & ((1ull << 60) - 1)) << (6 - j);
	bool fresh = m->options.flags & BS_COW_FRESH;

	if (!bits)
		return;
	uint64_t first = leaf + __builtin_ctzll(bits), last = leaf + 63 - __builtin_clzll(bits);
	p->leaves += __builtin_popcountll(bits);
	p->overflow += __builtin_popcountll(bits & cow_level_bits(fresh ? marks->twice : marks->once, j) &
					    ~cow_level_bits(marks->recent, j));
	p->bitmaps += count_new(&m->counted[level][0], device, first * COW_LEAF / ENTRIES_PER_BITMAP,
		last * COW_LEAF / ENTRIES_PER_BITMAP);
	p->inner += count_inner(m, level, device, first, last);
}

static uint64_t divide_up(uint64_t a, uint64_t b)
{
	return (a + b - 1) / b;
}

/* What few mapped blocks of fresh devices can fill. */
static void limit_to_mapped(const struct bs_cow_model *m, int level, struct cow_pending *p)
{
	const struct cow_sums *sums = &m->sums[level / 6];
	int j = level % 6;
	uint64_t leaves = divide_up(sums->provisioned[j] - sums->discarded[j], COW_LEAF), inner = 0;

	for (uint64_t n = leaves; n > 1; inner += n)
		n = divide_up(n, COW_LEAF);
	p->leaves = cow_minimum(p->leaves, leaves);
	p->overflow = cow_minimum(p->overflow, leaves);
	p->inner = cow_minimum(p->inner, inner);
	p->bitmaps = cow_minimum(p->bitmaps, divide_up(sums->allocated[j], ENTRIES_PER_BITMAP));
}

static uint64_t blocks_of(const struct bs_cow_model *m, int level)
{
	const struct cow_level *l = &m->levels[level];
	struct cow_pending p = l->pending;
	uint64_t unmapped = l->unmapped_leaves;

	if (!p.leaves)
		return 0;
	if (m->options.flags & BS_COW_FRESH)
		limit_to_mapped(m, level, &p);
	return FIXED_BLOCKS + p.leaves + p.overflow + (p.overflow > 0) + p.inner + p.bitmaps + unmapped +
	       unmapped / COW_LEAF + unmapped * COW_LEAF / ENTRIES_PER_BITMAP +
	       divide_up(cow_allocated(m, level) - l->allocated, ENTRIES_PER_BITMAP);
}

/* By device, depth and place. */
static int compare_keys(const void *left, const void *right)
{
	const struct cow_key *a = left, *b = right;

	if (a->device != b->device)
		return a->device < b->device ? -1 : 1;
	return (a->index > b->index) - (a->index < b->index);
}

INLINE void count_changed(struct bs_cow_model *m)
{
	for (size_t i = 0; i < m->nr_changed; i++) {
		const struct cow_key *key = &m->changed[i];
		struct marks *marks = cow_table_find(&m->marks, sizeof(*marks), key->index, key->device);
		int depth = key->index >> 60;

		end_epoch(marks, m->epoch);
		for (int j = 0; j < 6; j++)
			if (m->wanted[depth] >> j & 1)
				count_marks(m, 6 * depth + j, marks);
	}
}

FAST static void count_changed_fast(struct bs_cow_model *m)
{
	count_changed(m);
}

void cow_metadata_pending(struct bs_cow_model *m, uint64_t ret_blocks[COW_LEVELS])
{
	for (int i = 0; i < m->nr_sizes; i++) {
		m->levels[m->sizes[i]].pending = (struct cow_pending){0};
		memset(m->counted[m->sizes[i]], 0, sizeof(m->counted[0]));
	}
	if (m->nr_changed > 1)
		qsort(m->changed, m->nr_changed, sizeof(*m->changed), compare_keys);
	if (m->fast)
		count_changed_fast(m);
	else
		count_changed(m);
	for (int i = 0; i < m->nr_sizes; i++)
		ret_blocks[m->sizes[i]] = blocks_of(m, m->sizes[i]);
}

static void settle_marks(struct bs_cow_model *m)
{
	for (size_t i = 0; i < m->nr_changed; i++) {
		const struct cow_key *key = &m->changed[i];
		struct marks *marks = cow_table_find(&m->marks, sizeof(*marks), key->index, key->device);

		for (int w = 0; w < 2; w++)
			marks->recent.w[w] |= marks->leaves.w[w];
	}
	m->nr_changed = 0;
	m->transaction++;
}

void cow_metadata_commit(struct bs_cow_model *m, bool snapshot)
{
	uint64_t blocks[COW_LEVELS];

	if (!m->nr_changed && !snapshot)
		return;
	cow_metadata_pending(m, blocks);
	for (int i = 0; i < m->nr_sizes; i++) {
		struct cow_level *l = &m->levels[m->sizes[i]];
		uint64_t written = blocks[m->sizes[i]];

		if (snapshot && !written)
			written = FIXED_BLOCKS;
		l->metadata_blocks += written;
		l->commits += written > 0;
		l->unmapped_leaves = 0;
		l->allocated = cow_allocated(m, m->sizes[i]);
	}
	settle_marks(m);
}

int cow_metadata_init(struct bs_cow_model *m)
{
	m->transaction = 1;
	return cow_table_init(&m->marks, sizeof(struct marks));
}

void cow_metadata_deinit(struct bs_cow_model *m)
{
	cow_table_deinit(&m->marks);
	free(m->changed);
}
