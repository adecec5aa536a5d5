/*
 * Reading a metadata file or device that nothing writes: the bottom of dump, delta, check and usage.
 *
 * Nothing read from disk is trusted: a block is used only after its checksum, its number and every field that
 * a walk relies on were checked, pointers are bounded by the device, recursion by a fixed stack. Walks end on
 * any content: a child must hold at least one key, all of them inside the range that its parent gives it, so
 * no node fits into one tree twice, and cycles run into the depth limit.
 *
 * Errors: -EMEDIUMTYPE for a file that is no thin pool, -EILSEQ for a wrong checksum or structure, -ENOTBLK
 * for a block in the wrong place. Single-threaded: one reader a caller.
 */
#ifndef BS_METADATA_READER_H
#define BS_METADATA_READER_H

#include <stdbool.h>
#include <stdint.h>

#include "disk_format.h"
#include "io.h"

struct metadata_reader {
	struct io *io;
	char *prefix;         /* "<path>: ", put before messages; check cuts it off */
	uint64_t file_blocks; /* whole blocks that the file holds */
	uint64_t nr_blocks;   /* pointers must be below it */
	struct disk_superblock superblock;
};

/* Open and read block 0, which is only known not to be foreign: -EMEDIUMTYPE when neither magic nor checksum
 * fit. */
int metadata_reader_init(struct metadata_reader *r, const char *path);
/* NULL io is accepted, so a failed init may be followed by it. */
void metadata_reader_deinit(struct metadata_reader *r);
/* Init, then demand everything of the superblock that dump, delta and usage rely on. With held, what is read
 * is the metadata snapshot that the superblock names (-ENODATA if there is none); the pool may then go on
 * meanwhile. The sizes stay those of the superblock: a metadata snapshot has none. */
int metadata_reader_open(struct metadata_reader *r, const char *path, bool held);

/* Read one block, bounded by the device; its content is not checked. */
int metadata_read_block(const struct metadata_reader *r, uint64_t block, void *buffer);

/* Read nr blocks, each to its place in buffer, neighbours on disk in one request. Blocks that are 0, beyond
 * the device or unreadable leave ok[i] false: metadata_read_block then tells why. */
void metadata_read_batch(
	const struct metadata_reader *r, const uint64_t *blocks, uint32_t nr, char *buffer, bool *ok);

/* Is this block what a walk of a tree with such leaf values can use? Says nothing of fill, ranges and
 * padding. */
int metadata_node_check(
	const struct metadata_reader *r, const struct disk_node *node, uint64_t block, uint32_t value_size);

/* What only the place in a tree tells: at least one key (but for a root), all of them in low..high, no more
 * levels than possible, leaves all at one depth. depth counts from 1, the root; leaf_depth is 0 until the
 * first leaf sets it. */
int metadata_place_check(const struct metadata_reader *r, const struct disk_node *node, uint64_t block,
	int depth, int *leaf_depth, uint64_t low, uint64_t high);

/* ---- checked nodes */

static inline bool node_is_leaf(const struct disk_node *node)
{
	return le32_get(node->flags) == BTREE_LEAF;
}

static inline uint32_t node_nr(const struct disk_node *node)
{
	return le32_get(node->nr_entries);
}

static inline uint64_t node_key(const struct disk_node *node, uint32_t i)
{
	return le64_get(node->keys[i]);
}

/* The values, whatever their size; 8-byte aligned. */
static inline const void *node_values(const struct disk_node *node)
{
	return node->keys + le32_get(node->max_entries);
}

static inline uint64_t node_value64(const struct disk_node *node, uint32_t i)
{
	return le64_get(((const struct le64 *)node_values(node))[i]);
}

/* First entry with a key >= key; nr when there is none. */
uint32_t node_lower_bound(const struct disk_node *node, uint64_t key);
/* The child whose range holds key: the last entry with a key <= key; 0 when key lies below all. */
uint32_t node_child_index(const struct disk_node *node, uint64_t key);

/* ---- walks */

#define WALK_BATCH 64

/* One node of the path from the root; the children are read in batches. */
struct walk_level {
	const struct disk_node *node;
	uint64_t high; /* no key below may exceed it */
	uint32_t index;
	uint32_t batch_begin, batch_end;
	char *batch;
	bool ok[WALK_BATCH];
};

/* All leaves of a tree, ascending. Up to 256 KiB of memory a level. */
struct leaf_walk {
	const struct metadata_reader *r;
	uint32_t value_size;
	uint64_t root;
	uint64_t begin; /* leaves with smaller keys only are left out; 0 unless set before the first call */
	int depth;      /* nodes on the path; 0 before the first leaf and after the last */
	int leaf_depth; /* of the first leaf; all others must agree */
	bool started;
	struct disk_node *root_node;
	struct walk_level levels[BTREE_MAX_DEPTH];
};

int leaf_walk_init(struct leaf_walk *w, const struct metadata_reader *r, uint64_t root, uint32_t value_size);
void leaf_walk_deinit(struct leaf_walk *w);
/* 1 and the next leaf (valid until the next call), 0 at the end. Only the leaf of an empty tree has no
 * entries. */
int leaf_walk_next(struct leaf_walk *w, const struct disk_node **ret);

/* All entries of a tree, ascending: for the small trees. */
struct entry_walk {
	struct leaf_walk leaves;
	const struct disk_node *leaf;
	uint32_t index;
};

int entry_walk_init(
	struct entry_walk *w, const struct metadata_reader *r, uint64_t root, uint32_t value_size);
void entry_walk_deinit(struct entry_walk *w);
/* 1 and the next entry (value valid until the next call), 0 at the end. */
int entry_walk_next(struct entry_walk *w, uint64_t *key, const void **value);

/* The value of a key: 1 found, 0 absent. */
int metadata_lookup(
	const struct metadata_reader *r, uint64_t root, uint32_t value_size, uint64_t key, void *ret);

/* The root of a device's mapping tree; -ENODATA when there is no such device. */
int metadata_device_root(const struct metadata_reader *r, uint64_t device_id, uint64_t *ret);

/* The devices of a pool, ascending, from both trees, which must have the same ids. */
struct device_walk {
	struct entry_walk details, roots;
};

struct device_entry {
	uint64_t id;
	uint64_t root;
	struct disk_device_details details;
};

int device_walk_init(struct device_walk *w, const struct metadata_reader *r);
void device_walk_deinit(struct device_walk *w);
/* 1 and the next device, 0 at the end. */
int device_walk_next(struct device_walk *w, struct device_entry *ret);

#endif
