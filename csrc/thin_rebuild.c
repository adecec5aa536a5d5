#include "thin_rebuild.h"

#include "thin_state.h"

#define NODES_A_COMMIT 2048 /* 8 MiB, and half a million counts of data blocks */

int thin_rebuild_begin(struct io *io, const struct pool_facts *facts, struct thin_metadata **ret)
{
	int r = thin_metadata_format(io, facts->data_block_sectors, facts->nr_data_blocks);

	if (r == 0)
		r = thin_metadata_open(io, ret);
	if (r < 0)
		return r;
	(*ret)->time = facts->time;
	(*ret)->transaction_id = facts->transaction_id;
	(*ret)->flags = SUPERBLOCK_NEEDS_CHECK;
	(*ret)->changed = true;
	return 0;
}

/* A node was made: nothing refers to it yet, and the superblock need not for a commit. */
static int node_made(struct thin_metadata *md)
{
	md->changed = true;
	if (++md->nodes_rebuilt % NODES_A_COMMIT)
		return 0;
	return thin_metadata_commit(md);
}

int thin_rebuild_leaf(
	struct thin_metadata *md, const uint64_t *keys, const uint64_t *packed, uint32_t nr, uint64_t *ret)
{
	struct le64 values[METADATA_BLOCK_SIZE / 16];
	int r = 0;

	for (uint32_t i = 0; r == 0 && i < nr; i++) {
		values[i] = le64_of(packed[i]);
		r = sm_inc(&md->data_sm.ll.sm, mapping_block(packed[i]));
	}
	if (r == 0)
		r = btree_write_node(&md->mappings, true, keys, values, nr, ret);
	return r < 0 ? r : node_made(md);
}

int thin_rebuild_internal(
	struct thin_metadata *md, const uint64_t *keys, const uint64_t *children, uint32_t nr, uint64_t *ret)
{
	struct le64 values[METADATA_BLOCK_SIZE / 16];

	for (uint32_t i = 0; i < nr; i++)
		values[i] = le64_of(children[i]);
	int r = btree_write_node(&md->mappings, false, keys, values, nr, ret);
	return r < 0 ? r : node_made(md);
}

int thin_rebuild_share(struct thin_metadata *md, uint64_t block)
{
	md->changed = true;
	return tm_inc(&md->tm, block);
}

int thin_rebuild_drop(struct thin_metadata *md, uint64_t block)
{
	md->changed = true;
	return btree_delete(&md->mappings, block);
}

int thin_rebuild_device(
	struct thin_metadata *md, uint64_t id, uint64_t root, const struct disk_device_details *details)
{
	struct le64 value = le64_of(root);
	int r = btree_insert(&md->details, &md->details_root, id, details, NULL);

	if (r == 0)
		r = btree_insert(&md->top, &md->top_root, id, &value, NULL);
	return r < 0 ? r : node_made(md);
}

int thin_rebuild_end(struct thin_metadata *md)
{
	md->flags = 0;
	md->changed = true;
	return thin_metadata_commit(md);
}
