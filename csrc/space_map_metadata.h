/* The counts of metadata blocks: an ll whose index is one block of at most 255 entries. */
#ifndef BS_SPACE_MAP_METADATA_H
#define BS_SPACE_MAP_METADATA_H

#include "space_map_ll.h"

struct sm_metadata {
	struct ll ll; /* first member */
	uint64_t index_root;
};

/* An empty map in which block 0, the superblock, is taken. tm->sm must point to it before anything else is
 * done. */
int sm_metadata_create(struct sm_metadata *sm, struct transaction_manager *tm, uint64_t nr_blocks);
int sm_metadata_open(struct sm_metadata *sm, struct transaction_manager *tm, const struct disk_sm_root *root);
/* Write all pending counts, those that the writing itself makes included. Last of all maps and trees in a
 * commit. */
int sm_metadata_flush(struct sm_metadata *sm, struct disk_sm_root *ret);
int sm_metadata_extend(struct sm_metadata *sm, uint64_t nr_blocks);

#endif
