#include "space_map_disk.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "error.h"

#define SCAN 168 /* a leaf of the index tree */

static struct btree index_tree(const struct sm_disk *sm)
{
	return (struct btree){.tm = sm->ll.tm, .value_size = sizeof(struct disk_index_entry)};
}

static int check_size(uint64_t nr_blocks)
{
	if (nr_blocks == 0 || nr_blocks >= MAX_DATA_BLOCKS)
		return bs_fail(-EINVAL, "a data device of %" PRIu64 " blocks: 1 to 2^40 - 1 are possible",
			nr_blocks);
	return 0;
}

int sm_disk_create(struct sm_disk *sm, struct transaction_manager *tm, uint64_t nr_blocks)
{
	struct btree overflow = {.tm = tm, .value_size = 4};
	int r = check_size(nr_blocks);

	if (r == 0)
		r = ll_init(&sm->ll, tm, "data", nr_blocks);
	if (r < 0)
		return r;
	struct btree index = index_tree(sm);
	r = btree_create(&overflow, &sm->ll.overflow_root);
	return r < 0 ? r : btree_create(&index, &sm->index_root);
}

static int read_index(struct sm_disk *sm)
{
	struct btree tree = index_tree(sm);
	struct disk_index_entry entries[SCAN];
	uint64_t keys[SCAN], next = 0;

	while (next < sm->ll.nr_bitmaps) {
		int n = btree_scan(&tree, sm->index_root, next, sm->ll.nr_bitmaps - 1, keys, entries, SCAN);

		if (n < 0)
			return n;
		if (n == 0 || keys[0] != next)
			return bs_fail(-EUCLEAN,
				"data space map: bitmap %" PRIu64 " is not in the index: run pool check",
				next);
		for (int i = 0; i < n && keys[i] == next; i++, next++)
			sm->ll.committed[next] = (struct ll_index_entry){
				.blocknr = le64_get(entries[i].blocknr),
				.nr_free = le32_get(entries[i].nr_free),
				.none_free_before = le32_get(entries[i].none_free_before),
			};
		bm_trim(sm->ll.tm->bm);
	}
	return 0;
}

int sm_disk_open(struct sm_disk *sm, struct transaction_manager *tm, const struct disk_sm_root *root)
{
	uint64_t nr_blocks = le64_get(root->nr_blocks);
	int r = check_size(nr_blocks);

	if (r == 0)
		r = ll_init_committed(&sm->ll, tm, "data", nr_blocks, le64_get(root->nr_allocated),
			le64_get(root->ref_count_root));
	if (r < 0)
		return r;
	sm->index_root = le64_get(root->bitmap_root);
	r = read_index(sm);
	return r < 0 ? r : ll_opened(&sm->ll);
}

static int write_index(struct sm_disk *sm)
{
	struct btree tree = index_tree(sm);
	int r = 0;

	for (uint64_t i = 0; r == 0 && i < sm->ll.nr_bitmaps; i++) {
		struct ll_index_entry *e = &sm->ll.working[i];

		if (!e->changed)
			continue;
		struct disk_index_entry entry = {
			.blocknr = le64_of(e->blocknr),
			.nr_free = le32_of(e->nr_free),
			.none_free_before = le32_of(e->none_free_before),
		};
		r = btree_insert(&tree, &sm->index_root, i, &entry, NULL);
		e->changed = false;
	}
	return r;
}

int sm_disk_flush(struct sm_disk *sm, struct disk_sm_root *ret)
{
	int r = ll_flush(&sm->ll);

	if (r == 0)
		r = write_index(sm);
	if (r < 0)
		return r;
	ret->nr_blocks = le64_of(sm->ll.nr_blocks);
	ret->nr_allocated = le64_of(sm->ll.nr_allocated);
	ret->bitmap_root = le64_of(sm->index_root);
	ret->ref_count_root = le64_of(sm->ll.overflow_root);
	return 0;
}

int sm_disk_extend(struct sm_disk *sm, uint64_t nr_blocks)
{
	int r = check_size(nr_blocks);

	return r < 0 ? r : ll_extend(&sm->ll, nr_blocks);
}
