#include "space_map_metadata.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "error.h"

static const struct bm_validator index_validator = {"metadata index", INDEX_SALT, NULL};

static int check_size(uint64_t nr_blocks)
{
	if (nr_blocks == 0 || nr_blocks > METADATA_MAX_BLOCKS)
		return bs_fail(-EINVAL, "a metadata device of %" PRIu64 " blocks: 1 to %llu are possible",
			nr_blocks, (unsigned long long)METADATA_MAX_BLOCKS);
	return 0;
}

int sm_metadata_create(struct sm_metadata *sm, struct transaction_manager *tm, uint64_t nr_blocks)
{
	struct btree overflow = {.tm = tm, .value_size = 4};
	int r = check_size(nr_blocks);

	if (r == 0)
		r = ll_init(&sm->ll, tm, "metadata", nr_blocks);
	if (r < 0)
		return r;
	sm->index_root = 0;
	tm->sm = &sm->ll.sm;
	r = tm_inc(tm, 0);
	return r < 0 ? r : btree_create(&overflow, &sm->ll.overflow_root);
}

int sm_metadata_open(struct sm_metadata *sm, struct transaction_manager *tm, const struct disk_sm_root *root)
{
	struct bm_block *b;
	int r = check_size(le64_get(root->nr_blocks));

	if (r == 0)
		r = ll_init_committed(&sm->ll, tm, "metadata", le64_get(root->nr_blocks),
			le64_get(root->nr_allocated), le64_get(root->ref_count_root));
	if (r < 0)
		return r;
	tm->sm = &sm->ll.sm;
	sm->index_root = le64_get(root->bitmap_root);
	r = tm_read(tm, sm->index_root, &index_validator, &b);
	if (r < 0)
		return r;
	const struct disk_metadata_index *index = (const struct disk_metadata_index *)b->data;
	for (uint64_t i = 0; i < sm->ll.nr_bitmaps; i++) {
		const struct disk_index_entry *e = &index->entries[i];

		sm->ll.committed[i] = (struct ll_index_entry){
			.blocknr = le64_get(e->blocknr),
			.nr_free = le32_get(e->nr_free),
			.none_free_before = le32_get(e->none_free_before),
		};
	}
	return ll_opened(&sm->ll);
}

static void fill_index(struct sm_metadata *sm, struct disk_metadata_index *index)
{
	memset(index->entries, 0, sizeof(index->entries));
	for (uint64_t i = 0; i < sm->ll.nr_bitmaps; i++) {
		struct ll_index_entry *e = &sm->ll.working[i];

		index->entries[i].blocknr = le64_of(e->blocknr);
		index->entries[i].nr_free = le32_of(e->nr_free);
		index->entries[i].none_free_before = le32_of(e->none_free_before);
		e->changed = false;
	}
}

int sm_metadata_flush(struct sm_metadata *sm, struct disk_sm_root *ret)
{
	struct ll *ll = &sm->ll;
	struct bm_block *index;
	bool shared;
	/* First the index, since that changes counts; it is filled when they have come to rest. */
	int r = sm->index_root ? tm_shadow(ll->tm, sm->index_root, &index_validator, &index, &shared)
			       : tm_new(ll->tm, &index_validator, &index);

	if (r == 0)
		r = ll_flush(ll);
	if (r < 0)
		return r;
	sm->index_root = index->nr;
	fill_index(sm, (struct disk_metadata_index *)index->data);
	ret->nr_blocks = le64_of(ll->nr_blocks);
	ret->nr_allocated = le64_of(ll->nr_allocated);
	ret->bitmap_root = le64_of(sm->index_root);
	ret->ref_count_root = le64_of(ll->overflow_root);
	return 0;
}

int sm_metadata_extend(struct sm_metadata *sm, uint64_t nr_blocks)
{
	int r = check_size(nr_blocks);

	return r < 0 ? r : ll_extend(&sm->ll, nr_blocks);
}
