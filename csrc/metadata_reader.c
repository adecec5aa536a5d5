/*
 * Blocks and nodes are checked here once for all readers; the walks below are loops over a stack of at most
 * BTREE_MAX_DEPTH nodes. Children are read a batch at a time in the order of their place on disk, so that a
 * tree written in one go is read in large pieces and a scattered one at least in ascending order.
 *
 * Why every walk ends: a child must have at least one key, its first key not below its own key in the parent
 * and its last key below the next key of the parent. Ranges of siblings are disjoint, so one tree cannot hold
 * a node twice, except below itself, where the depth limit ends the descent.
 */
#include "metadata_reader.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "crc32c.h"
#include "error.h"

#define SUPERBLOCK_READS 100

/* ---- opening */

static bool is_zero(const void *data, size_t length)
{
	const unsigned char *p = data;

	return length == 0 || (p[0] == 0 && memcmp(p, p + 1, length - 1) == 0);
}

static int check_not_foreign(const struct metadata_reader *r)
{
	const struct disk_superblock *sb = &r->superblock;

	if (is_zero(sb, sizeof(*sb)))
		return bs_fail(
			-EMEDIUMTYPE, "%sthe first block is empty: there is no thin pool yet", r->prefix);
	if (le64_get(sb->magic) != SUPERBLOCK_MAGIC &&
		le32_get(sb->csum) != block_checksum(sb, SUPERBLOCK_SALT))
		return bs_fail(-EMEDIUMTYPE,
			"%snot the metadata of a thin pool: the magic number is %" PRIu64 ", not %llu",
			r->prefix, le64_get(sb->magic), SUPERBLOCK_MAGIC);
	return 0;
}

/* How many blocks pointers may name: the space map's word where it can be true, else the file's. */
static uint64_t pointer_limit(const struct metadata_reader *r)
{
	uint64_t nr = le64_get(r->superblock.metadata_sm_root.nr_blocks);

	if (nr == 0 || nr > METADATA_MAX_BLOCKS)
		return r->file_blocks < METADATA_MAX_BLOCKS ? r->file_blocks : METADATA_MAX_BLOCKS;
	return nr;
}

int metadata_reader_init(struct metadata_reader *r, const char *path)
{
	memset(r, 0, sizeof(*r));
	if (asprintf(&r->prefix, "%s: ", path) < 0) {
		r->prefix = NULL;
		return bs_fail(-ENOMEM, "%s: out of memory", path);
	}
	int err = io_file_open(path, IO_READ_ONLY, &r->io);
	if (err)
		return err;
	int64_t size = io_size(r->io);
	if (size < 0)
		return (int)size;
	if (size < METADATA_BLOCK_SIZE)
		return bs_fail(-EMEDIUMTYPE, "%s: not the metadata of a thin pool: %" PRId64 " bytes only",
			path, size);
	r->file_blocks = (uint64_t)size / METADATA_BLOCK_SIZE;
	err = io_read(r->io, 0, &r->superblock, METADATA_BLOCK_SIZE);
	if (!err)
		err = check_not_foreign(r);
	r->nr_blocks = pointer_limit(r);
	return err;
}

void metadata_reader_deinit(struct metadata_reader *r)
{
	io_close(r->io);
	free(r->prefix);
}

static int check_superblock(const struct metadata_reader *r)
{
	const struct disk_superblock *sb = &r->superblock;
	uint64_t nr = le64_get(sb->metadata_sm_root.nr_blocks);
	uint32_t csum = block_checksum(sb, SUPERBLOCK_SALT);

	if (le64_get(sb->magic) != SUPERBLOCK_MAGIC)
		return bs_fail(-EMEDIUMTYPE,
			"%snot the metadata of a thin pool: the magic number is %" PRIu64 ", not %llu",
			r->prefix, le64_get(sb->magic), SUPERBLOCK_MAGIC);
	if (le32_get(sb->csum) != csum)
		return bs_fail(-EILSEQ, "%schecksum of the superblock is 0x%08x, expected 0x%08x", r->prefix,
			le32_get(sb->csum), csum);
	if (le64_get(sb->blocknr) != 0)
		return bs_fail(-ENOTBLK, "%sthe superblock says that it is block %" PRIu64, r->prefix,
			le64_get(sb->blocknr));
	/* thin_restore writes version 1 when its input names none; the layout is the same. */
	if (le32_get(sb->version) == 0 || le32_get(sb->version) > SUPERBLOCK_VERSION)
		return bs_fail(-EMEDIUMTYPE, "%sversion %u of the thin pool format, known is %u", r->prefix,
			le32_get(sb->version), SUPERBLOCK_VERSION);
	if (le32_get(sb->incompat_flags) != 0)
		return bs_fail(-EMEDIUMTYPE, "%sunknown incompatible features 0x%x", r->prefix,
			le32_get(sb->incompat_flags));
	if (nr == 0 || nr > METADATA_MAX_BLOCKS)
		return bs_fail(-EILSEQ,
			"%sthe superblock says %" PRIu64 " metadata blocks, possible are 1..%llu", r->prefix,
			nr, METADATA_MAX_BLOCKS);
	if (nr > r->file_blocks)
		return bs_fail(-EILSEQ,
			"%struncated: it holds %" PRIu64 " blocks, the superblock says %" PRIu64 " (%" PRIu64
			" bytes)",
			r->prefix, r->file_blocks, nr, nr * METADATA_BLOCK_SIZE);
	return 0;
}

/* The running pool may be writing its superblock just now. */
static int read_superblock_again(struct metadata_reader *r)
{
	int err = io_read(r->io, 0, &r->superblock, METADATA_BLOCK_SIZE);

	r->nr_blocks = pointer_limit(r);
	return err ? err : check_superblock(r);
}

/* Go on with the trees of the held metadata snapshot and the space maps of the superblock. */
static int take_held(struct metadata_reader *r)
{
	uint64_t block = le64_get(r->superblock.held_root);
	struct disk_superblock held;

	if (block == 0)
		return bs_fail(-ENODATA, "%sno metadata snapshot is held", r->prefix);
	int err = metadata_read_block(r, block, &held);
	if (err)
		return err;
	if (le32_get(held.csum) != block_checksum(&held, SUPERBLOCK_SALT) ||
		le64_get(held.magic) != SUPERBLOCK_MAGIC || le64_get(held.blocknr) != block)
		return bs_fail(-EILSEQ,
			"%sblock %" PRIu64 ", the held metadata snapshot, is no copy of a superblock",
			r->prefix, block);
	held.data_sm_root = r->superblock.data_sm_root;
	held.metadata_sm_root = r->superblock.metadata_sm_root;
	r->superblock = held;
	return 0;
}

int metadata_reader_open(struct metadata_reader *r, const char *path, bool held)
{
	int err = metadata_reader_init(r, path);

	if (err)
		return err;
	err = check_superblock(r);
	for (int i = 0; err == -EILSEQ && held && i < SUPERBLOCK_READS; i++)
		err = read_superblock_again(r);
	return err || !held ? err : take_held(r);
}

/* ---- blocks */

int metadata_read_block(const struct metadata_reader *r, uint64_t block, void *buffer)
{
	if (block == 0 || block >= r->nr_blocks)
		return bs_fail(-EILSEQ, "%spointer to block %" PRIu64 " is outside 1..%" PRIu64, r->prefix,
			block, r->nr_blocks - 1);
	if (block >= r->file_blocks)
		return bs_fail(-EILSEQ,
			"%sblock %" PRIu64 " lies behind the end of the file (%" PRIu64 " blocks)", r->prefix,
			block, r->file_blocks);
	return io_read(r->io, block * METADATA_BLOCK_SIZE, buffer, METADATA_BLOCK_SIZE);
}

struct batch_slot {
	uint64_t block;
	uint32_t place;
};

static int compare_slots(const void *left, const void *right)
{
	const struct batch_slot *l = left, *r = right;

	return (l->block > r->block) - (l->block < r->block);
}

/* How many of the slots lie one behind the other on disk. */
static uint32_t run_length(const struct batch_slot *slots, uint32_t nr)
{
	uint32_t length = 1;

	while (length < nr && slots[length].block == slots[0].block + length)
		length++;
	return length;
}

static void read_run(
	const struct metadata_reader *r, const struct batch_slot *slots, uint32_t nr, char *buffer, bool *ok)
{
	struct iovec iov[WALK_BATCH];

	for (uint32_t i = 0; i < nr; i++)
		iov[i] = (struct iovec){
			buffer + (size_t)slots[i].place * METADATA_BLOCK_SIZE, METADATA_BLOCK_SIZE};
	if (io_readv(r->io, slots[0].block * METADATA_BLOCK_SIZE, iov, (int)nr))
		return;
	for (uint32_t i = 0; i < nr; i++)
		ok[slots[i].place] = true;
}

void metadata_read_batch(
	const struct metadata_reader *r, const uint64_t *blocks, uint32_t nr, char *buffer, bool *ok)
{
	struct batch_slot slots[WALK_BATCH];
	uint64_t limit = r->nr_blocks < r->file_blocks ? r->nr_blocks : r->file_blocks;
	uint32_t used = 0, length;
	bool sorted = true;

	memset(ok, 0, nr * sizeof(*ok));
	for (uint32_t i = 0; i < nr && i < WALK_BATCH; i++) {
		if (blocks[i] == 0 || blocks[i] >= limit)
			continue;
		sorted &= used == 0 || slots[used - 1].block < blocks[i];
		slots[used++] = (struct batch_slot){blocks[i], i};
	}
	if (!sorted)
		qsort(slots, used, sizeof(*slots), compare_slots);
	for (uint32_t i = 0; i < used; i += length) {
		length = run_length(slots + i, used - i);
		read_run(r, slots + i, length, buffer, ok);
	}
}

/* ---- nodes */

static int check_keys(const struct metadata_reader *r, const struct disk_node *node, uint64_t block)
{
	uint32_t nr = node_nr(node), bad = 0;

	/* Without an exit in the loop the compiler makes vectors of it. */
	for (uint32_t i = 1; i < nr; i++)
		bad |= node_key(node, i - 1) >= node_key(node, i);
	if (!bad)
		return 0;
	for (uint32_t i = 1; i < nr; i++)
		if (node_key(node, i - 1) >= node_key(node, i))
			return bs_fail(-EILSEQ,
				"%skeys of block %" PRIu64 " are not ascending: entry %u is %" PRIu64
				", entry %u is %" PRIu64,
				r->prefix, block, i - 1, node_key(node, i - 1), i, node_key(node, i));
	return 0;
}

static int check_header(
	const struct metadata_reader *r, const struct disk_node *node, uint64_t block, uint32_t value_size)
{
	uint32_t flags = le32_get(node->flags), max = le32_get(node->max_entries);

	if (flags != BTREE_INTERNAL && flags != BTREE_LEAF)
		return bs_fail(-EILSEQ,
			"%sflags of block %" PRIu64 " are %u: neither internal (1) nor leaf (2)", r->prefix,
			block, flags);
	if (flags == BTREE_INTERNAL)
		value_size = sizeof(uint64_t);
	if (le32_get(node->value_size) != value_size)
		return bs_fail(-EILSEQ, "%svalue size of block %" PRIu64 " is %u, expected %u", r->prefix,
			block, le32_get(node->value_size), value_size);
	if (max > btree_max_entries(value_size))
		return bs_fail(-EILSEQ, "%smaximum of block %" PRIu64 " is %u entries, expected %u",
			r->prefix, block, max, btree_max_entries(value_size));
	if (node_nr(node) > max)
		return bs_fail(-EILSEQ, "%sblock %" PRIu64 " has %u entries, possible are %u", r->prefix,
			block, node_nr(node), max);
	if (flags == BTREE_INTERNAL && node_nr(node) == 0)
		return bs_fail(-EILSEQ, "%sinternal node %" PRIu64 " has no entries", r->prefix, block);
	return 0;
}

int metadata_node_check(
	const struct metadata_reader *r, const struct disk_node *node, uint64_t block, uint32_t value_size)
{
	uint32_t csum = block_checksum(node, BTREE_NODE_SALT);

	if (le32_get(node->csum) != csum)
		return bs_fail(-EILSEQ, "%schecksum of block %" PRIu64 " is 0x%08x, expected 0x%08x",
			r->prefix, block, le32_get(node->csum), csum);
	if (le64_get(node->blocknr) != block)
		return bs_fail(-ENOTBLK, "%sblock %" PRIu64 " says that it is block %" PRIu64, r->prefix,
			block, le64_get(node->blocknr));
	int err = check_header(r, node, block, value_size);
	return err ? err : check_keys(r, node, block);
}

int metadata_place_check(const struct metadata_reader *r, const struct disk_node *node, uint64_t block,
	int depth, int *leaf_depth, uint64_t low, uint64_t high)
{
	uint32_t nr = node_nr(node);

	if (nr == 0 && depth > 1)
		return bs_fail(-EILSEQ, "%sblock %" PRIu64 " has no entries", r->prefix, block);
	if (nr > 0 && (node_key(node, 0) < low || node_key(node, nr - 1) > high))
		return bs_fail(-EILSEQ,
			"%skeys %" PRIu64 "..%" PRIu64 " of block %" PRIu64 " leave the range %" PRIu64
			"..%" PRIu64 " of its parent",
			r->prefix, node_key(node, 0), node_key(node, nr - 1), block, low, high);
	if (depth >= BTREE_MAX_DEPTH && !node_is_leaf(node))
		return bs_fail(-EILSEQ, "%sblock %" PRIu64 ": the tree is deeper than %d nodes", r->prefix,
			block, BTREE_MAX_DEPTH);
	if (!node_is_leaf(node))
		return 0;
	if (*leaf_depth == 0)
		*leaf_depth = depth;
	if (*leaf_depth != depth)
		return bs_fail(-EILSEQ, "%sleaf %" PRIu64 " lies at depth %d, others at %d", r->prefix, block,
			depth, *leaf_depth);
	return 0;
}

uint32_t node_lower_bound(const struct disk_node *node, uint64_t key)
{
	uint32_t low = 0, high = node_nr(node);

	while (low < high) {
		uint32_t middle = (low + high) / 2;

		if (node_key(node, middle) < key)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

uint32_t node_child_index(const struct disk_node *node, uint64_t key)
{
	uint32_t i = node_lower_bound(node, key);

	if (i == node_nr(node) || (i > 0 && node_key(node, i) > key))
		i--;
	return i;
}

/* ---- walk over leaves */

int leaf_walk_init(struct leaf_walk *w, const struct metadata_reader *r, uint64_t root, uint32_t value_size)
{
	memset(w, 0, sizeof(*w));
	w->r = r;
	w->root = root;
	w->value_size = value_size;
	w->root_node = malloc(METADATA_BLOCK_SIZE);
	return w->root_node ? 0 : bs_fail(-ENOMEM, "%sout of memory", r->prefix);
}

void leaf_walk_deinit(struct leaf_walk *w)
{
	for (int i = 0; i < BTREE_MAX_DEPTH; i++)
		free(w->levels[i].batch);
	free(w->root_node);
}

/* Have the child at level->index, and those behind it, in the batch. */
static int load_children(struct leaf_walk *w, struct walk_level *level)
{
	uint64_t blocks[WALK_BATCH];
	uint32_t nr = node_nr(level->node) - level->index;

	if (level->index < level->batch_end)
		return 0;
	if (!level->batch)
		level->batch = malloc((size_t)WALK_BATCH * METADATA_BLOCK_SIZE);
	if (!level->batch)
		return bs_fail(-ENOMEM, "%sout of memory", w->r->prefix);
	if (nr > WALK_BATCH)
		nr = WALK_BATCH;
	for (uint32_t i = 0; i < nr; i++)
		blocks[i] = node_value64(level->node, level->index + i);
	metadata_read_batch(w->r, blocks, nr, level->batch, level->ok);
	level->batch_begin = level->index;
	level->batch_end = level->index + nr;
	return 0;
}

static void push_level(struct leaf_walk *w, const struct disk_node *node, uint64_t high)
{
	struct walk_level *level = &w->levels[w->depth++];

	level->node = node;
	level->high = high;
	level->index = node_is_leaf(node) ? 0 : node_child_index(node, w->begin);
	level->batch_begin = level->batch_end = 0;
}

static int start_walk(struct leaf_walk *w)
{
	int err = metadata_read_block(w->r, w->root, w->root_node);

	w->started = true;
	if (!err)
		err = metadata_node_check(w->r, w->root_node, w->root, w->value_size);
	if (!err)
		err = metadata_place_check(w->r, w->root_node, w->root, 1, &w->leaf_depth, 0, UINT64_MAX);
	if (!err)
		push_level(w, w->root_node, UINT64_MAX);
	return err;
}

/* Push the next child of the deepest node. */
static int push_child(struct leaf_walk *w)
{
	struct walk_level *level = &w->levels[w->depth - 1];
	uint32_t i = level->index;
	uint64_t block = node_value64(level->node, i);
	uint64_t high = i + 1 < node_nr(level->node) ? node_key(level->node, i + 1) - 1 : level->high;
	int err = load_children(w, level);

	if (err)
		return err;
	struct disk_node *node =
		(struct disk_node *)(level->batch + (size_t)(i - level->batch_begin) * METADATA_BLOCK_SIZE);
	if (!level->ok[i - level->batch_begin])
		err = metadata_read_block(w->r, block, node);
	if (!err)
		err = metadata_node_check(w->r, node, block, w->value_size);
	if (!err)
		err = metadata_place_check(
			w->r, node, block, w->depth + 1, &w->leaf_depth, node_key(level->node, i), high);
	if (err)
		return err;
	level->index++;
	push_level(w, node, high);
	return 0;
}

int leaf_walk_next(struct leaf_walk *w, const struct disk_node **ret)
{
	int err = 0;

	if (!w->started)
		err = start_walk(w);
	else if (w->depth > 0)
		w->depth--; /* the leaf of the last call */
	while (!err && w->depth > 0) {
		struct walk_level *level = &w->levels[w->depth - 1];

		if (node_is_leaf(level->node)) {
			*ret = level->node;
			return 1;
		}
		if (level->index == node_nr(level->node))
			w->depth--;
		else
			err = push_child(w);
	}
	return err;
}

/* ---- walk over entries */

int entry_walk_init(struct entry_walk *w, const struct metadata_reader *r, uint64_t root, uint32_t value_size)
{
	w->leaf = NULL;
	w->index = 0;
	return leaf_walk_init(&w->leaves, r, root, value_size);
}

void entry_walk_deinit(struct entry_walk *w)
{
	leaf_walk_deinit(&w->leaves);
}

int entry_walk_next(struct entry_walk *w, uint64_t *key, const void **value)
{
	while (!w->leaf || w->index == node_nr(w->leaf)) {
		int r = leaf_walk_next(&w->leaves, &w->leaf);

		w->index = 0;
		if (r <= 0) {
			w->leaf = NULL;
			return r;
		}
	}
	*key = node_key(w->leaf, w->index);
	*value = (const char *)node_values(w->leaf) + (size_t)w->index * w->leaves.value_size;
	w->index++;
	return 1;
}

/* ---- look-ups */

int metadata_lookup(
	const struct metadata_reader *r, uint64_t root, uint32_t value_size, uint64_t key, void *ret)
{
	struct disk_node node;
	uint64_t block = root;

	for (int depth = 0; depth < BTREE_MAX_DEPTH; depth++) {
		int err = metadata_read_block(r, block, &node);

		if (!err)
			err = metadata_node_check(r, &node, block, value_size);
		if (err)
			return err;
		if (node_is_leaf(&node)) {
			uint32_t i = node_lower_bound(&node, key);

			if (i == node_nr(&node) || node_key(&node, i) != key)
				return 0;
			memcpy(ret, (const char *)node_values(&node) + (size_t)i * value_size, value_size);
			return 1;
		}
		if (key < node_key(&node, 0))
			return 0;
		block = node_value64(&node, node_child_index(&node, key));
	}
	return bs_fail(-EILSEQ, "%sthe tree of block %" PRIu64 " is deeper than %d nodes", r->prefix, root,
		BTREE_MAX_DEPTH);
}

int metadata_device_root(const struct metadata_reader *r, uint64_t device_id, uint64_t *ret)
{
	struct le64 value;
	int found = metadata_lookup(
		r, le64_get(r->superblock.data_mapping_root), sizeof(value), device_id, &value);

	if (found < 0)
		return found;
	if (!found)
		return bs_fail(-ENODATA, "%sthere is no thin device %" PRIu64, r->prefix, device_id);
	*ret = le64_get(value);
	return 0;
}

/* ---- devices */

int device_walk_init(struct device_walk *w, const struct metadata_reader *r)
{
	int err = entry_walk_init(&w->details, r, le64_get(r->superblock.device_details_root),
		sizeof(struct disk_device_details));
	int err_roots =
		entry_walk_init(&w->roots, r, le64_get(r->superblock.data_mapping_root), sizeof(struct le64));

	return err ? err : err_roots;
}

void device_walk_deinit(struct device_walk *w)
{
	entry_walk_deinit(&w->details);
	entry_walk_deinit(&w->roots);
}

int device_walk_next(struct device_walk *w, struct device_entry *ret)
{
	uint64_t details_id = UINT64_MAX, root_id = UINT64_MAX;
	const void *details, *root;
	int found_details = entry_walk_next(&w->details, &details_id, &details);
	int found_root = found_details < 0 ? found_details : entry_walk_next(&w->roots, &root_id, &root);

	if (found_root < 0)
		return found_root;
	if (found_details && (!found_root || details_id < root_id))
		return bs_fail(-EILSEQ, "%sthin device %" PRIu64 " has details but no mapping tree",
			w->details.leaves.r->prefix, details_id);
	if (found_root && (!found_details || root_id < details_id))
		return bs_fail(-EILSEQ, "%sthin device %" PRIu64 " has a mapping tree but no details",
			w->details.leaves.r->prefix, root_id);
	if (!found_details)
		return 0;
	ret->id = details_id;
	ret->root = le64_get(*(const struct le64 *)root);
	memcpy(&ret->details, details, sizeof(ret->details));
	return 1;
}
