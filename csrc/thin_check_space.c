/*
 * Space maps: their own structures, then every recorded count against the recomputed one.
 *
 * A count that is too low lets the block be given away while it is in use: fatal. One that is too high only
 * wastes the block: a leak. Where damage hides pointers, counts that seem too high may be right and are told
 * once, as a warning. nr_free, none_free_before and nr_allocated are hints that writers are known to get
 * wrong: warnings.
 *
 * Words of 32 entries are compared first; single entries only where words differ or an overflow entry is
 * involved.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "crc32c.h"
#include "error.h"
#include "thin_check.h"

#define ENTRIES_PER_WORD 32u
#define LOW_BITS 0x5555555555555555ull

void space_map_deinit(struct space_map *map)
{
	free(map->index);
	free(map->overflow);
}

/* ---- structures */

static struct index_entry index_entry_of(uint64_t bitmap, const struct disk_index_entry *entry)
{
	return (struct index_entry){
		.bitmap = bitmap,
		.block = le64_get(entry->blocknr),
		.nr_free = le32_get(entry->nr_free),
		.none_free_before = le32_get(entry->none_free_before),
	};
}

static void add_index_entry(
	struct check *c, struct space_map *map, uint64_t bitmap, const struct disk_index_entry *entry)
{
	char path[96];

	if (!check_grow(c, (void **)&map->index, &map->index_capacity, map->index_used, sizeof(*map->index)))
		return;
	struct index_entry *added = &map->index[map->index_used];
	*added = index_entry_of(bitmap, entry);
	snprintf(path, sizeof(path), "%s space map, bitmap %" PRIu64, map->name, bitmap);
	/* A bitmap that cannot be read is passed over later; the entry itself is there. */
	if (!check_claim(c, path, added->block, map->bitmap_role))
		added->block = 0;
	map->index_used++;
}

static void index_leaf(struct tree_check *t, const struct disk_node *leaf, bool known)
{
	const struct disk_index_entry *entries = node_values(leaf);
	struct space_map *map = t->context;
	uint64_t nr_bitmaps = (map->nr_blocks + ENTRIES_PER_BITMAP - 1) / ENTRIES_PER_BITMAP;

	(void)known; /* nothing shares a space map's nodes */
	for (uint32_t i = 0; i < node_nr(leaf); i++) {
		uint64_t key = node_key(leaf, i);

		if (key >= nr_bitmaps)
			tree_finding(t, FATAL, "entry for bitmap %" PRIu64 ", the map has %" PRIu64, key,
				nr_bitmaps);
		else if (map->index_used > 0 && map->index[map->index_used - 1].bitmap >= key)
			tree_finding(
				t, FATAL, "entry for bitmap %" PRIu64 " comes twice or out of order", key);
		else
			add_index_entry(t->c, map, key, &entries[i]);
	}
}

static void overflow_leaf(struct tree_check *t, const struct disk_node *leaf, bool known)
{
	const struct le32 *counts = node_values(leaf);
	struct space_map *map = t->context;
	uint32_t outside = 0;

	(void)known;
	for (uint32_t i = 0; i < node_nr(leaf); i++) {
		uint64_t block = node_key(leaf, i);
		uint32_t count = le32_get(counts[i]);

		if (block >= map->nr_blocks)
			outside++;
		else if (map->overflow_used > 0 && map->overflow[map->overflow_used - 1].block >= block)
			tree_finding(t, FATAL, "count of %s block %" PRIu64 " comes twice or out of order",
				map->name, block);
		else if (check_grow(t->c, (void **)&map->overflow, &map->overflow_capacity,
				 map->overflow_used, sizeof(*map->overflow)))
			map->overflow[map->overflow_used++] = (struct overflow_entry){block, count};
		if (count < 3)
			tree_finding(t, FATAL,
				"count of %s block %" PRIu64 " is %u, overflow entries have 3 or more",
				map->name, block, count);
	}
	if (outside > 0)
		tree_finding(t, FATAL, "%u counts of %s blocks that the map of %" PRIu64 " does not have",
			outside, map->name, map->nr_blocks);
}

static const struct tree_kind data_index_kind = {
	.role = ROLE_DATA_INDEX,
	.value_size = sizeof(struct disk_index_entry),
	.keys = "bitmaps",
	.leaf = index_leaf,
};

static const struct tree_kind data_overflow_kind = {
	.role = ROLE_DATA_OVERFLOW,
	.value_size = sizeof(uint32_t),
	.keys = "data blocks",
	.leaf = overflow_leaf,
};

static const struct tree_kind metadata_overflow_kind = {
	.role = ROLE_METADATA_OVERFLOW,
	.value_size = sizeof(uint32_t),
	.keys = "metadata blocks",
	.leaf = overflow_leaf,
};

static bool run_tree(struct tree_check *t, const struct tree_kind *kind, const char *label, uint64_t root,
	struct space_map *map)
{
	tree_check_run(t, kind, label, root, map);
	bool damaged = t->damages > 0;
	tree_check_tell_damage(t, 0);
	return damaged;
}

/* The block checksum and number of an index or bitmap block: 0 or the error, with the finding's text set. */
static int check_block(const void *buffer, uint64_t block, uint32_t salt)
{
	const struct disk_bitmap *head = buffer; /* all blocks begin alike */
	uint32_t csum = block_checksum(buffer, salt);

	if (le32_get(head->csum) != csum)
		return bs_fail(-EILSEQ, "checksum of block %" PRIu64 " is 0x%08x, expected 0x%08x", block,
			le32_get(head->csum), csum);
	if (le64_get(head->blocknr) != block)
		return bs_fail(-ENOTBLK, "block %" PRIu64 " says that it is block %" PRIu64, block,
			le64_get(head->blocknr));
	return 0;
}

static bool all_zero(const void *data, size_t length)
{
	const unsigned char *p = data;

	return length == 0 || (p[0] == 0 && memcmp(p, p + 1, length - 1) == 0);
}

static void check_metadata_index(struct check *c, struct space_map *map, uint64_t block)
{
	struct disk_metadata_index index;
	char path[64];
	uint64_t nr_bitmaps = (map->nr_blocks + ENTRIES_PER_BITMAP - 1) / ENTRIES_PER_BITMAP;

	snprintf(path, sizeof(path), "metadata space map, index block %" PRIu64, block);
	map->index_damaged = true;
	if (!check_claim(c, path, block, ROLE_METADATA_INDEX))
		return;
	int err = metadata_read_block(&c->r, block, &index);
	if (!err)
		err = check_block(&index, block, INDEX_SALT);
	if (err) {
		check_finding(c, FATAL, "%s: %s", path, bs_last_error());
		c->metadata_incomplete = true;
		return;
	}
	map->index_damaged = false;
	if (le32_get(index.padding) != 0)
		check_finding(c, WARNING, "%s: padding is 0x%x, expected 0", path, le32_get(index.padding));
	for (uint64_t i = 0; i < nr_bitmaps; i++)
		add_index_entry(c, map, i, &index.entries[i]);
	if (!all_zero(
		    index.entries + nr_bitmaps, (MAX_METADATA_BITMAPS - nr_bitmaps) * sizeof(*index.entries)))
		check_finding(c, WARNING, "%s: entries behind the last bitmap are not zero", path);
}

void check_metadata_map(struct check *c, struct tree_check *t, struct space_map *map)
{
	const struct disk_sm_root *root = &c->r.superblock.metadata_sm_root;

	map->name = "metadata";
	map->bitmap_role = ROLE_METADATA_BITMAP;
	map->nr_blocks = c->r.nr_blocks;
	map->nr_allocated = le64_get(root->nr_allocated);
	check_metadata_index(c, map, le64_get(root->bitmap_root));
	map->overflow_damaged = run_tree(t, &metadata_overflow_kind, "metadata space map, overflow tree",
		le64_get(root->ref_count_root), map);
}

void check_data_map(struct check *c, struct tree_check *t, struct space_map *map)
{
	const struct disk_sm_root *root = &c->r.superblock.data_sm_root;

	map->name = "data";
	map->bitmap_role = ROLE_DATA_BITMAP;
	map->nr_blocks = c->data.nr;
	map->nr_allocated = le64_get(root->nr_allocated);
	map->index_damaged =
		run_tree(t, &data_index_kind, "data space map, index tree", le64_get(root->bitmap_root), map);
	map->overflow_damaged = run_tree(
		t, &data_overflow_kind, "data space map, overflow tree", le64_get(root->ref_count_root), map);
}

/* ---- comparison */

/* Consecutive blocks with the same wrong count: one finding. */
struct wrong_run {
	uint64_t begin, length;
	uint64_t recorded, expected;
};

struct comparison {
	struct check *c;
	struct space_map *map;
	bool incomplete;
	size_t overflow_next; /* entries before it are used up */
	uint64_t nonzero;
	uint64_t unexplained; /* blocks with a count too high, where damage may be the reason */
	bool all_read;
	struct wrong_run run;
	char path[96]; /* of the bitmap at hand */
};

static uint64_t expected_count(const struct comparison *cmp, uint64_t block)
{
	if (cmp->map->bitmap_role == ROLE_DATA_BITMAP)
		return data_cells_count(&cmp->c->data, block);
	return cmp->c->blocks[block].count;
}

static void end_run(struct comparison *cmp)
{
	const struct wrong_run *run = &cmp->run;
	char blocks[64];

	if (run->length == 1)
		snprintf(blocks, sizeof(blocks), "block %" PRIu64, run->begin);
	else
		snprintf(blocks, sizeof(blocks), "blocks %" PRIu64 "..%" PRIu64, run->begin,
			run->begin + run->length - 1);
	if (run->length > 0 && run->recorded < run->expected)
		check_finding(cmp->c, FATAL, "%s: %s %s: count %" PRIu64 ", expected %" PRIu64, cmp->path,
			cmp->map->name, blocks, run->recorded, run->expected);
	if (run->length > 0 && run->recorded > run->expected) {
		check_finding(cmp->c, LEAK, "%s: %s %s: count %" PRIu64 ", expected %" PRIu64, cmp->path,
			cmp->map->name, blocks, run->recorded, run->expected);
		cmp->c->result.leaks += run->length - 1;
	}
	cmp->run.length = 0;
}

static void wrong_count(struct comparison *cmp, uint64_t block, uint64_t recorded, uint64_t expected)
{
	struct wrong_run *run = &cmp->run;

	if (recorded > expected && cmp->incomplete) {
		cmp->unexplained++;
		return;
	}
	if (run->length > 0 && run->begin + run->length == block && run->recorded == recorded &&
		run->expected == expected) {
		run->length++;
		return;
	}
	end_run(cmp);
	*run = (struct wrong_run){block, 1, recorded, expected};
}

/* Step to the overflow entry of a block; those passed belong to blocks that say they need none. */
static const struct overflow_entry *take_overflow(struct comparison *cmp, uint64_t block)
{
	struct space_map *map = cmp->map;

	while (cmp->overflow_next < map->overflow_used && map->overflow[cmp->overflow_next].block < block) {
		const struct overflow_entry *entry = &map->overflow[cmp->overflow_next++];

		if (cmp->all_read)
			check_finding(cmp->c, FATAL,
				"%s space map, overflow tree: %s block %" PRIu64
				" has count %u, its bitmap entry says less than 3",
				map->name, map->name, entry->block, entry->count);
	}
	if (cmp->overflow_next < map->overflow_used && map->overflow[cmp->overflow_next].block == block)
		return &map->overflow[cmp->overflow_next++];
	return NULL;
}

static void compare_entry(struct comparison *cmp, uint64_t block, uint32_t small)
{
	uint64_t expected = expected_count(cmp, block), recorded = small;

	if (small == 3) {
		const struct overflow_entry *entry = take_overflow(cmp, block);

		if (entry) {
			recorded = entry->count;
		} else if (cmp->map->overflow_damaged) {
			recorded = expected > 3 ? expected : 3;
		} else {
			check_finding(cmp->c, FATAL,
				"%s: %s block %" PRIu64 ": count 3 or more, but no overflow entry", cmp->path,
				cmp->map->name, block);
			return;
		}
	}
	if (recorded != expected)
		wrong_count(cmp, block, recorded, expected);
}

/* The 32 two-bit entries that the recomputed counts give from block on. */
static uint64_t expected_word(const struct comparison *cmp, uint64_t block, uint32_t nr)
{
	uint64_t word = 0;

	if (cmp->map->bitmap_role == ROLE_DATA_BITMAP) {
		const uint32_t *cells = cmp->c->data.cells + block;

		for (uint32_t i = 0; i < nr; i++) {
			uint32_t count = cells[i] & CELL_COUNT;

			word |= (uint64_t)bitmap_swap(count < 3 ? count : 3) << (2 * i);
		}
		return word;
	}
	const struct block_info *infos = cmp->c->blocks + block;
	for (uint32_t i = 0; i < nr; i++)
		word |= (uint64_t)bitmap_swap(infos[i].count < 3 ? infos[i].count : 3) << (2 * i);
	return word;
}

static void compare_word(struct comparison *cmp, uint64_t block, uint64_t word)
{
	uint64_t left = cmp->map->nr_blocks - block;
	uint32_t nr = left < ENTRIES_PER_WORD ? (uint32_t)left : ENTRIES_PER_WORD;
	bool has_overflow = (word & word >> 1 & LOW_BITS) != 0;

	if (!has_overflow && word == expected_word(cmp, block, nr))
		return;
	for (uint32_t i = 0; i < nr; i++)
		compare_entry(cmp, block + i, bitmap_swap(word >> (2 * i) & 3));
}

struct bitmap_facts {
	uint32_t nonzero;
	uint32_t first_free; /* ENTRIES_PER_BITMAP when none is */
	bool beyond;         /* entries behind the end of the map are not zero */
};

static struct bitmap_facts compare_words(
	struct comparison *cmp, const struct disk_bitmap *bitmap, uint64_t base)
{
	struct bitmap_facts facts = {.first_free = ENTRIES_PER_BITMAP};

	for (uint32_t i = 0; i < ENTRIES_PER_BITMAP / ENTRIES_PER_WORD; i++) {
		uint64_t block = base + (uint64_t)i * ENTRIES_PER_WORD, word = le64_get(bitmap->words[i]);
		uint64_t used = (word | word >> 1) & LOW_BITS, inside = LOW_BITS;

		if (block >= cmp->map->nr_blocks)
			inside = 0;
		else if (cmp->map->nr_blocks - block < ENTRIES_PER_WORD)
			inside &= (1ull << (2 * (cmp->map->nr_blocks - block))) - 1;
		facts.beyond |= (used & ~inside) != 0;
		facts.nonzero += (uint32_t)__builtin_popcountll(used & inside);
		if (facts.first_free == ENTRIES_PER_BITMAP && used != LOW_BITS)
			facts.first_free =
				i * ENTRIES_PER_WORD + (uint32_t)__builtin_ctzll(~used & LOW_BITS) / 2;
		if (inside)
			compare_word(cmp, block, word);
	}
	return facts;
}

static void check_hints(
	struct comparison *cmp, const struct index_entry *entry, const struct bitmap_facts *facts)
{
	uint32_t nr_free = ENTRIES_PER_BITMAP - facts->nonzero;
	uint32_t first_free = facts->first_free;

	if (facts->beyond)
		check_finding(cmp->c, WARNING, "%s: entries behind the last block are not zero", cmp->path);
	if (entry->nr_free != nr_free)
		check_finding(cmp->c, WARNING, "%s: nr_free is %u, expected %u", cmp->path, entry->nr_free,
			nr_free);
	if (entry->none_free_before > first_free)
		check_finding(cmp->c, WARNING, "%s: none_free_before is %u, but entry %u is free", cmp->path,
			entry->none_free_before, first_free);
}

static void compare_bitmap(struct comparison *cmp, const struct index_entry *entry)
{
	struct disk_bitmap bitmap;
	int err;

	snprintf(cmp->path, sizeof(cmp->path), "%s space map, bitmap %" PRIu64 ": node %" PRIu64,
		cmp->map->name, entry->bitmap, entry->block);
	err = metadata_read_block(&cmp->c->r, entry->block, &bitmap);
	if (!err)
		err = check_block(&bitmap, entry->block, BITMAP_SALT);
	if (err) {
		check_finding(cmp->c, FATAL, "%s: %s", cmp->path, bs_last_error());
		cmp->all_read = false;
		return;
	}
	if (le32_get(bitmap.unused) != 0)
		check_finding(cmp->c, WARNING, "%s: padding is 0x%x, expected 0", cmp->path,
			le32_get(bitmap.unused));
	struct bitmap_facts facts = compare_words(cmp, &bitmap, entry->bitmap * ENTRIES_PER_BITMAP);
	end_run(cmp);
	check_hints(cmp, entry, &facts);
	cmp->nonzero += facts.nonzero;
}

/* Bitmaps begin..end-1 have no index entry. */
static void missing_bitmaps(struct comparison *cmp, uint64_t begin, uint64_t end)
{
	if (begin == end)
		return;
	cmp->all_read = false;
	if (cmp->map->index_damaged)
		return;
	check_finding(cmp->c, FATAL, "%s space map, index: no entries for bitmaps %" PRIu64 "..%" PRIu64,
		cmp->map->name, begin, end - 1);
}

void check_counts(struct check *c, struct space_map *map)
{
	bool data = map->bitmap_role == ROLE_DATA_BITMAP;
	struct comparison cmp = {
		.c = c,
		.map = map,
		.incomplete = data ? c->data_incomplete : c->metadata_incomplete,
		.all_read = true,
	};
	uint64_t next = 0, nr_bitmaps = (map->nr_blocks + ENTRIES_PER_BITMAP - 1) / ENTRIES_PER_BITMAP;

	for (size_t i = 0; i < map->index_used && !c->out->error; i++) {
		missing_bitmaps(&cmp, next, map->index[i].bitmap);
		next = map->index[i].bitmap + 1;
		if (map->index[i].block == 0)
			cmp.all_read = false;
		else
			compare_bitmap(&cmp, &map->index[i]);
	}
	missing_bitmaps(&cmp, next, nr_bitmaps);
	take_overflow(&cmp, UINT64_MAX);
	if (cmp.unexplained > 0)
		check_finding(c, WARNING,
			"%s space map: %" PRIu64
			" blocks have a higher count than what could be read explains",
			map->name, cmp.unexplained);
	if (cmp.all_read && cmp.nonzero != map->nr_allocated)
		check_finding(c, WARNING, "%s space map: nr_allocated is %" PRIu64 ", expected %" PRIu64,
			map->name, map->nr_allocated, cmp.nonzero);
}
