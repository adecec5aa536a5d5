/* The inside of thin_metadata.h: shared by thin_metadata.c (superblock, transactions) and thin_devices.c
 * (devices and their mappings), included by nobody else. */
#ifndef BS_THIN_STATE_H
#define BS_THIN_STATE_H

#include "btree.h"
#include "space_map_disk.h"
#include "space_map_metadata.h"
#include "thin_metadata.h"

struct thin_metadata {
	struct io *io;
	struct block_manager *bm;
	struct transaction_manager tm;
	struct sm_metadata metadata_sm;
	struct sm_disk data_sm;
	struct btree top, mappings, details;
	uint64_t top_root, details_root;
	uint64_t transaction_id;
	uint64_t held_root;
	uint32_t time;
	uint32_t data_block_sectors;
	uint32_t flags;
	bool changed;
	bool failed;
	uint64_t nodes_rebuilt; /* thin_rebuild.c */
	struct thin_device *devices;
	struct disk_superblock superblock;
};

/* thin_devices.c */
/* Fill a device from the trees; -ENODATA if it is not there. */
int thin_load_device(struct thin_metadata *md, struct thin_device *device);
int thin_write_details(struct thin_metadata *md, const struct thin_device *device);
int thin_write_root(struct thin_metadata *md, const struct thin_device *device);

#endif
