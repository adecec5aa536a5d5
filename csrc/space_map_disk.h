/* The counts of data blocks: an ll whose index lies in a B-tree keyed by bitmap number. */
#ifndef BS_SPACE_MAP_DISK_H
#define BS_SPACE_MAP_DISK_H

#include "space_map_ll.h"

struct sm_disk {
	struct ll ll; /* first member */
	uint64_t index_root;
};

int sm_disk_create(struct sm_disk *sm, struct transaction_manager *tm, uint64_t nr_blocks);
int sm_disk_open(struct sm_disk *sm, struct transaction_manager *tm, const struct disk_sm_root *root);
/* Write the pending counts; changes counts of metadata blocks. */
int sm_disk_flush(struct sm_disk *sm, struct disk_sm_root *ret);
int sm_disk_extend(struct sm_disk *sm, uint64_t nr_blocks);

#endif
