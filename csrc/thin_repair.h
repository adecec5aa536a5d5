/*
 * Inside of bs_metadata_repair: what its files share.
 *
 *   thin_repair.c        order of the steps, what the superblock says, devices
 *   thin_repair_roots.c  finding the two roots when the superblock does not lead to them
 *   thin_repair_tree.c   what is left of mapping trees, and what is not
 *   thin_repair_write.c  the new pool
 *
 * See thin_repair.c for the rules.
 */
#ifndef BS_THIN_REPAIR_H
#define BS_THIN_REPAIR_H

#include "blocksnap.h"
#include "metadata_reader.h"
#include "text_output.h"
#include "thin_rebuild.h"

#define NODE_ENTRIES 252 /* of nodes with values of 8 bytes */
#define NODE_MINIMUM (NODE_ENTRIES / 3)
#define NOBODY UINT32_MAX

enum node_state {
	NODE_UNSEEN,
	NODE_OPEN,  /* on the path that is walked now */
	NODE_FINE,  /* what is left of it can be a node of the new pool in any place */
	NODE_LOOSE, /* too little is left, or it does not fit together: its entries are used one by one */
	NODE_LOST,
};

enum node_role { NODE_MAPPING, NODE_DETAILS, NODE_TOP_LEVEL };

/* What is known of a block as a node of a mapping tree. Counts are of what is kept. */
struct node_info {
	uint64_t entries; /* mappings in the leaves below */
	uint64_t first_key, last_key;
	uint64_t age; /* sum of time + 1 of the mappings below: grows with every block that is written anew */
	uint32_t max_time;
	uint32_t owner;     /* index of the device that met it first */
	uint32_t new_block; /* 0: not written yet */
	uint8_t state, role, height;
	bool lossy;   /* something of it or below is lost */
	bool fits;    /* its children fit together; only their number may be too small */
	bool settled; /* its times were compared */
};

#define DATA_NAMED 1u
#define DATA_TWICE 2u
#define DATA_CLAIMED 4u /* by a mapping that looks unshared */

struct repair_device {
	uint64_t id, root;
	struct disk_device_details details;
	bool has_details, has_root;
	uint32_t needed_time; /* snapshotted_time must not be below */
};

struct repair {
	struct metadata_reader r; /* its prefix is empty: messages become parts of lines */
	const struct bs_repair_options *options;
	struct text_output *out; /* NULL while roots are being tried */
	struct bs_repair_result result;
	struct pool_facts facts;
	bool trusted;      /* the superblock's checksum is right */
	bool time_known;   /* and its time is possible */
	bool trying;       /* roots are being tried: nothing is told, nodes of ids are not remembered */
	uint64_t visits;   /* of nodes of ids while trying */
	uint64_t unread;   /* nodes of ids that could not be read */
	uint64_t left_out; /* times that a node lay below itself or too deep */
	int error;         /* out of memory */
	uint64_t details_root, mapping_root; /* 0: none */
	struct node_info *nodes;             /* one a block */
	uint8_t *data;                       /* DATA_ bits of each data block; NULL: not wanted */
	uint32_t latest_time;                /* times of mappings beyond become it */
	uint64_t nr_data;                    /* mappings beyond are dropped */
	uint64_t last_data;                  /* the highest data block that is mapped */
	bool conflict; /* a data block that one mapping takes for unshared is named twice */
	struct repair_device *devices;
	size_t nr_devices, device_capacity;
	struct thin_metadata *md;
	struct disk_node path[BTREE_MAX_DEPTH + 1]; /* a buffer for each level of a walk */
	uint64_t path_blocks[BTREE_MAX_DEPTH];
};

/* ---- thin_repair.c */

#define NO_DEVICE UINT64_MAX

void repair_tell_lost(struct repair *r, uint64_t id, uint64_t begin, uint64_t last, const char *format, ...)
	__attribute__((format(printf, 5, 6)));
void repair_tell_changed(struct repair *r, uint64_t id, const char *format, ...)
	__attribute__((format(printf, 3, 4)));
/* Add the devices that a details tree, or a top-level tree, names: half a device each. False if the root itself
 * cannot be used. */
bool repair_read_details(struct repair *r, uint64_t root);
bool repair_read_top_level(struct repair *r, uint64_t root);
/* Forget all devices and nodes. */
void repair_forget(struct repair *r);

/* ---- thin_repair_tree.c */

struct leaf_entries {
	uint32_t nr, dropped;
	uint64_t first_dropped, last_dropped;
	uint64_t keys[NODE_ENTRIES], packed[NODE_ENTRIES];
};

/* Read a node of such a tree at such a depth. The message of a failure says what is wrong with it. */
int repair_load(struct repair *r, uint64_t block, enum node_role role, uint32_t value_size, int depth,
	struct disk_node *node);
/* The mappings of a leaf that can be kept. */
void repair_leaf_entries(const struct repair *r, const struct disk_node *leaf, struct leaf_entries *ret);
/* The last key that child i of a node may have. */
uint64_t repair_high(const struct disk_node *node, uint32_t i, uint64_t high);
/* Look at a mapping tree for a device (or NOBODY); NULL if the block cannot be a node at all. */
struct node_info *repair_assess(struct repair *r, uint32_t device, uint64_t block, int depth);
/* Raise needed_time of the devices whose mappings look unshared and are not, once all were assessed. */
void repair_settle_times(struct repair *r);
/* Tell the thin blocks of a device that are lost below a node: all that can be mapped from low to high. */
void repair_tell_node(struct repair *r, uint64_t id, uint64_t block, int depth, uint64_t low, uint64_t high);

/* ---- thin_repair_roots.c */

/* Find a root (details_root, mapping_root) that is 0, from a pair of one moment if there is one. -EILSEQ if there
 * are no mapping trees. What superblock copies tell goes to facts that are 0. */
int repair_find_roots(struct repair *r);

/* ---- thin_repair_write.c */

int repair_write(struct repair *r, struct io *output);

#endif
