/*
 * The metadata of a thin pool: devices, mappings and counts, changed in transactions.
 *
 * Not thread-safe: the engine serialises. After an error of a changing call (other than -EEXIST, -ENODATA,
 * -EBUSY, -EINVAL, -EOVERFLOW and what thin_metadata_room refuses beforehand) the transaction is broken: call
 * thin_metadata_abort. Data must be flushed before thin_metadata_commit.
 */
#ifndef BS_THIN_METADATA_H
#define BS_THIN_METADATA_H

#include <stdbool.h>
#include <stdint.h>

#include "blocksnap.h"
#include "io.h"

struct thin_metadata;

/* A device of the pool while someone refers to it; fields are read by the holder, changed by thin_metadata.c.
 */
struct thin_device {
	uint32_t id;
	uint32_t creation_time;
	uint32_t snapshotted_time;
	uint64_t root;
	uint64_t mapped_blocks;
	uint64_t transaction_id;
	unsigned int references;
	bool changed;       /* details or root are to be written at commit */
	bool path_shadowed; /* the top-level path to it is this transaction's own */
	bool gone;          /* it did not exist any more after an abort */
	struct thin_device *next;
};

struct thin_metadata_status {
	uint64_t transaction_id;
	uint64_t data_block_sectors;
	uint64_t data_blocks, data_free;
	uint64_t metadata_blocks, metadata_free;
	uint64_t held_root;
	uint64_t freed_data_blocks; /* free after the next commit */
	uint32_t time;
	bool changed, needs_check, failed;
};

/* Write an empty pool over the device; -EEXIST unless its first block is zero. */
int thin_metadata_format(struct io *io, uint32_t data_block_sectors, uint64_t nr_data_blocks);
int thin_metadata_open(struct io *io, struct thin_metadata **ret);
/* Without commit. */
void thin_metadata_close(struct thin_metadata *md);

void thin_metadata_status(const struct thin_metadata *md, struct thin_metadata_status *ret);
/* -ENOSPC when the metadata device has no room for one more change and its commit. A reserve is kept for
 * changes that only give space back (releasing). */
int thin_metadata_room(struct thin_metadata *md, bool releasing);
int thin_metadata_commit(struct thin_metadata *md);
/* Back to the committed state, needs_check set there. Devices stay valid, those that are not there any more
 * are gone. After an error nothing can be changed any more, and, if that state could not be read, nothing looked
 * up. */
int thin_metadata_abort(struct thin_metadata *md);
/* Let a pool that was found clean be written to again: at once on disk. */
int thin_metadata_clear_needs_check(struct thin_metadata *md);
int thin_metadata_set_transaction_id(struct thin_metadata *md, uint64_t current, uint64_t id);
int thin_metadata_extend(struct thin_metadata *md, uint64_t nr_metadata_blocks, uint64_t nr_data_blocks);

int thin_create(struct thin_metadata *md, uint32_t id);
/* Cost independent of the origin's size. */
int thin_create_snapshot(struct thin_metadata *md, uint32_t id, uint32_t origin);
/* -EBUSY while referred to. */
int thin_delete(struct thin_metadata *md, uint32_t id);
/* Devices by ascending id from begin on. */
int thin_devices(struct thin_metadata *md, uint32_t begin, struct bs_device_info *out, int capacity);

int thin_device_get(struct thin_metadata *md, uint32_t id, struct thin_device **ret);
void thin_device_put(struct thin_metadata *md, struct thin_device *device);

/* The packed mapping of a block: 1 mapped, 0 hole. ret_shared: another device reaches the same data block. */
int thin_lookup(struct thin_metadata *md, struct thin_device *device, uint64_t block, uint64_t *ret,
	bool *ret_shared);
/* Mappings with begin <= thin block <= last, packed, ascending; returns their number. */
int thin_scan(struct thin_metadata *md, struct thin_device *device, uint64_t begin, uint64_t last,
	uint64_t *ret_blocks, uint64_t *ret_packed, int capacity);

/* A free data block, not counted until thin_insert; thin_unreserve gives it back. */
int thin_reserve(struct thin_metadata *md, uint64_t *ret);
void thin_unreserve(struct thin_metadata *md, uint64_t data_block);
/* Map a block to a reserved data block at the present time; what it was mapped to loses a reference. ret:
 * packed. */
int thin_insert(struct thin_metadata *md, struct thin_device *device, uint64_t block, uint64_t data_block,
	uint64_t *ret);
/* 1 unmapped, 0 was a hole. */
int thin_remove(struct thin_metadata *md, struct thin_device *device, uint64_t block);

/* Data blocks that no one refers to once the running transaction is committed, ascending; the caller frees.
 */
int thin_freed_blocks(struct thin_metadata *md, uint64_t **ret_blocks, uint64_t *ret_nr);

/* Commit and hold what is committed for readers (one at a time); data must be flushed before. */
int thin_hold_snapshot(struct thin_metadata *md);
/* What only the readers needed is free after the next commit. */
int thin_release_snapshot(struct thin_metadata *md);

#endif
