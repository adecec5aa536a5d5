/*
 * Filling an empty pool bottom up, for whoever knows a device's mappings in order before it writes them.
 *
 * Each call that makes a node gives its one reference to the caller, who passes it on: to a parent, to a device,
 * or back with thin_rebuild_drop. Every few thousand nodes what was written is committed, so memory is bounded;
 * until thin_rebuild_end the pool has needs_check set, and nobody takes half of it for a whole. After an error
 * only thin_metadata_close is left.
 */
#ifndef BS_THIN_REBUILD_H
#define BS_THIN_REBUILD_H

#include "disk_format.h"
#include "thin_metadata.h"

struct pool_facts {
	uint32_t data_block_sectors;
	uint64_t nr_data_blocks;
	uint32_t time;
	uint64_t transaction_id;
};

/* Format the io (-EEXIST unless its first block is zero) and open it. */
int thin_rebuild_begin(struct io *io, const struct pool_facts *facts, struct thin_metadata **ret);
/* A leaf of up to 252 ascending mappings; counts their data blocks. */
int thin_rebuild_leaf(
	struct thin_metadata *md, const uint64_t *keys, const uint64_t *packed, uint32_t nr, uint64_t *ret);
/* An internal node; takes over one reference to each child. */
int thin_rebuild_internal(
	struct thin_metadata *md, const uint64_t *keys, const uint64_t *children, uint32_t nr, uint64_t *ret);
/* One reference more. */
int thin_rebuild_share(struct thin_metadata *md, uint64_t block);
int thin_rebuild_drop(struct thin_metadata *md, uint64_t block);
/* Takes over one reference to the root of the mapping tree. */
int thin_rebuild_device(
	struct thin_metadata *md, uint64_t id, uint64_t root, const struct disk_device_details *details);
/* Clear needs_check and commit: the pool is whole. */
int thin_rebuild_end(struct thin_metadata *md);

#endif
