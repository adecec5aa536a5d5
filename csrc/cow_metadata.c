/*
 * Metadata blocks that commits write, by position: which nodes a transaction changes first. A node is written once a
 * transaction however often it changes.
 *
 * The approximation: a mapping tree whose keys are dense and whose nodes are all filled by two thirds, as ascending
 * insertion leaves them, so that leaf n holds blocks 168 n to 168 n + 167; data blocks that lie in the order of
 * their thin blocks, so that the counts of a leaf's blocks stand in one bitmap, and new data blocks handed out in
 * sequence. A commit adds the superblock, one node of the tree of devices and one of their details, one of the index
 * of the data bitmaps, the metadata index and a bitmap of metadata blocks. Left out: splits of nodes, the overflow
 * tree of counts above two, and that with few mapped blocks a leaf spans more of the device.
 */
#include "cow_model.h"

#include <stdlib.h>
#include <string.h>

#include "disk_format.h"

#define FIXED_BLOCKS 6
#define LEAF (252 / 3 * 2) /* of btree_max_entries(8) */
#define MARKS 384
#define MANY_LEAVES 512

/* Which of 384 leaves of a level the running transaction, the stamp, changes. */
struct marks {
	struct cow_key key;
	uint64_t bits[MARKS / 64];
};

static uint64_t marks_index(int level, uint64_t leaf)
{
	return leaf / MARKS | (uint64_t)level << 48;
}

/* The transaction comes to these marks first: they are counted when it commits. */
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
		marks = cow_table_add(&m->marks, index, device, m->transaction);
	if (!marks)
		return NULL;
	*marks = (struct marks){.key = {index, device, m->transaction}};
	m->changed[m->nr_changed++] = marks->key;
	return marks;
}

static void mark(struct bs_cow_model *m, int level, uint32_t device, uint64_t leaf)
{
	uint64_t index = marks_index(level, leaf), at = leaf % MARKS;
	struct marks *marks = cow_table_find(&m->marks, sizeof(struct marks), index, device);

	if (!marks || marks->key.stamp != m->transaction) {
		marks = begin_marks(m, marks, index, device);
		if (!marks) {
			m->out_of_memory = true;
			return;
		}
	}
	marks->bits[at / 64] |= 1ull << (at % 64);
}

void cow_metadata_mark(struct bs_cow_model *m, int depth, uint64_t node, uint32_t device,
	struct cow_set changed, unsigned int levels)
{
	struct cow_marked *marked = &m->marked[depth];

	if (marked->node != node || marked->device != device)
		*marked = (struct cow_marked){node, device, 0};
	for (; levels; levels &= levels - 1) {
		int j = __builtin_ctz(levels), level = 6 * depth + j;
		uint64_t block = node << (6 - j), leaf = block / LEAF, last = (block + (63 >> j)) / LEAF;
		uint64_t bits = cow_level_bits(changed, j);

		if (bits && leaf == last) {
			mark(m, level, device, leaf);
			marked->levels |= 1u << j;
		} else if (bits) {
			mark(m, level, device, (block + __builtin_ctzll(bits)) / LEAF);
			mark(m, level, device, (block + 63 - __builtin_clzll(bits)) / LEAF);
		}
	}
}

void cow_metadata_unmap(struct bs_cow_model *m, int level, uint32_t device, uint64_t first, uint64_t last)
{
	first /= LEAF;
	last /= LEAF;
	/* The inside of a large range is no other change's business. */
	if (last - first > MANY_LEAVES) {
		m->levels[level].unmapped_leaves += last - first - 1;
		mark(m, level, device, first);
		first = last;
	}
	for (; first <= last; first++)
		mark(m, level, device, first);
}

void cow_metadata_grow(struct bs_cow_model *m, uint64_t bytes)
{
	m->grows_at = UINT64_MAX;
	for (int i = 0; i < m->nr_sizes; i++) {
		struct cow_level *l = &m->levels[m->sizes[i]];
		int shift = cow_shift(m, m->sizes[i]);
		uint64_t blocks = (bytes >> shift) + 1, capacity = LEAF;

		for (l->height = 1; blocks > capacity; l->height++)
			capacity *= LEAF;
		if (capacity <= UINT64_MAX >> shift)
			m->grows_at = cow_minimum(m->grows_at, capacity << shift);
	}
}

/* ---- what a commit writes ---- */

/* Returns whether a bitmap (height 0) or an inner node was not counted before. */
static bool count_once(struct bs_cow_model *m, int level, int height, uint32_t device, uint64_t place)
{
	uint64_t index = place | (uint64_t)level << 48 | (uint64_t)height << 56;
	struct cow_key *key = cow_table_find(&m->counted, sizeof(struct cow_key), index, device);

	if (!key)
		m->out_of_memory |= !cow_table_add(&m->counted, index, device, m->counting);
	else if (key->stamp == m->counting)
		return false;
	else
		key->stamp = m->counting;
	return true;
}

static bool any_mark(const struct marks *marks, uint64_t begin, uint64_t end)
{
	for (uint64_t at = begin; at < end; at = (at | 63) + 1) {
		uint64_t bits = marks->bits[at / 64] >> (at % 64);

		if (end - at < 64)
			bits &= (1ull << (end - at)) - 1;
		if (bits)
			return true;
	}
	return false;
}

/* The bitmaps that stand for the data blocks of changed leaves. */
static uint64_t count_bitmaps(struct bs_cow_model *m, const struct marks *marks, int level, uint64_t first)
{
	uint64_t blocks = 0;

	for (uint64_t leaf = first, end; leaf < first + MARKS; leaf = end) {
		uint64_t bitmap = leaf * LEAF / ENTRIES_PER_BITMAP;

		end = cow_minimum(((bitmap + 1) * ENTRIES_PER_BITMAP + LEAF - 1) / LEAF, first + MARKS);
		if (any_mark(marks, leaf - first, end - first))
			blocks += count_once(m, level, 0, marks->key.device, bitmap);
	}
	return blocks;
}

/* The nodes of the mapping tree above changed leaves. */
static uint64_t count_inner(struct bs_cow_model *m, const struct marks *marks, int level, uint64_t first)
{
	uint64_t blocks = 0;

	for (uint64_t leaf = first, end; leaf < first + MARKS; leaf = end) {
		uint64_t place = leaf / LEAF;

		end = cow_minimum((place + 1) * LEAF, first + MARKS);
		if (!any_mark(marks, leaf - first, end - first))
			continue;
		for (int height = 1; height < m->levels[level].height; height++, place /= LEAF) {
			if (!count_once(m, level, height, marks->key.device, place))
				break;
			blocks++;
		}
	}
	return blocks;
}

static uint64_t count_leaves(const struct marks *marks)
{
	uint64_t leaves = 0;

	for (int i = 0; i < MARKS / 64; i++)
		leaves += __builtin_popcountll(marks->bits[i]);
	return leaves;
}

/* What does not hang on single marks. */
static uint64_t count_rest(const struct bs_cow_model *m, int level)
{
	const struct cow_level *l = &m->levels[level];
	uint64_t new = l->sums.allocated - l->allocated, leaves = l->unmapped_leaves;

	return FIXED_BLOCKS + leaves + leaves / LEAF + leaves * LEAF / ENTRIES_PER_BITMAP +
	       (new + ENTRIES_PER_BITMAP - 1) / ENTRIES_PER_BITMAP;
}

/* No stamp of the past may come up again. */
static void next_stamp(struct bs_cow_model *m, uint32_t *stamp, struct cow_table *table)
{
	if (++*stamp)
		return;
	size_t stride = table->stride;
	cow_table_deinit(table);
	m->out_of_memory |= cow_table_init(table, stride) < 0;
	*stamp = 1;
}

void cow_metadata_pending(struct bs_cow_model *m, uint64_t ret_blocks[COW_LEVELS])
{
	memset(ret_blocks, 0, COW_LEVELS * sizeof(*ret_blocks));
	for (size_t i = 0; i < m->nr_changed; i++) {
		const struct cow_key *key = &m->changed[i];
		const struct marks *marks =
			cow_table_find(&m->marks, sizeof(struct marks), key->index, key->device);
		int level = key->index >> 48;
		uint64_t first = (key->index & ((1ull << 48) - 1)) * MARKS;

		ret_blocks[level] += count_leaves(marks) + count_bitmaps(m, marks, level, first) +
				     count_inner(m, marks, level, first);
	}
	for (int i = 0; i < m->nr_sizes; i++)
		if (ret_blocks[m->sizes[i]])
			ret_blocks[m->sizes[i]] += count_rest(m, m->sizes[i]);
	next_stamp(m, &m->counting, &m->counted);
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
		l->allocated = l->sums.allocated;
	}
	for (int i = 0; i < COW_DEPTHS; i++)
		m->marked[i].levels = 0;
	m->nr_changed = 0;
	next_stamp(m, &m->transaction, &m->marks);
}

int cow_metadata_init(struct bs_cow_model *m)
{
	int r = cow_table_init(&m->marks, sizeof(struct marks));

	m->transaction = m->counting = 1;
	return r < 0 ? r : cow_table_init(&m->counted, sizeof(struct cow_key));
}

void cow_metadata_deinit(struct bs_cow_model *m)
{
	cow_table_deinit(&m->marks);
	cow_table_deinit(&m->counted);
	free(m->changed);
}
