/*
 * The new pool, device by device. A tree that fits together is copied node by node, each distinct node once; any
 * other is put together from the leaves: fine ones stay what they are and may be shared, the mappings of loose ones
 * become new leaves, at least a third full. A fine leaf whose neighbours' mappings are too few for a leaf of their
 * own is taken apart and joins them.
 */
#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "thin_repair.h"

/* The node may be used below what is on the path; NULL if nothing of it is left. */
static struct node_info *usable(struct repair *r, uint64_t block, int depth)
{
	struct node_info *info = &r->nodes[block < r->r.nr_blocks ? block : 0];

	if (info->entries == 0 || info->role != NODE_MAPPING || depth + info->height >= BTREE_MAX_DEPTH)
		return NULL;
	for (int i = 0; i < depth; i++)
		if (r->path_blocks[i] == block)
			return NULL;
	return info;
}

/* ---- trees that fit together */

static int copy_tree(struct repair *r, uint64_t block, int depth, uint64_t *ret);

static int copy_leaf(struct repair *r, const struct disk_node *leaf, uint64_t *ret)
{
	struct leaf_entries entries;

	repair_leaf_entries(r, leaf, &entries);
	return thin_rebuild_leaf(r->md, entries.keys, entries.packed, entries.nr, ret);
}

static int copy_children(struct repair *r, const struct disk_node *node, int depth, uint64_t *ret)
{
	uint64_t keys[NODE_ENTRIES], children[NODE_ENTRIES];
	uint32_t nr = 0;

	for (uint32_t i = 0; i < node_nr(node); i++) {
		const struct node_info *child = usable(r, node_value64(node, i), depth + 1);

		if (!child)
			continue;
		int err = copy_tree(r, node_value64(node, i), depth + 1, &children[nr]);
		if (err)
			return err;
		keys[nr++] = child->first_key;
	}
	return thin_rebuild_internal(r->md, keys, children, nr, ret);
}

/* ret: one reference to the copy. */
static int copy_tree(struct repair *r, uint64_t block, int depth, uint64_t *ret)
{
	struct node_info *info = &r->nodes[block];
	struct disk_node *node = &r->path[depth];

	if (info->new_block) {
		*ret = info->new_block;
		return thin_rebuild_share(r->md, *ret);
	}
	int err = repair_load(r, block, NODE_MAPPING, sizeof(uint64_t), depth, node);
	if (err)
		return err;
	r->path_blocks[depth] = block;
	err = node_is_leaf(node) ? copy_leaf(r, node, ret) : copy_children(r, node, depth, ret);
	if (!err)
		info->new_block = (uint32_t)*ret;
	return err;
}

/* ---- trees that do not: from the leaves up */

#define LEVEL_ENTRIES (NODE_ENTRIES + NODE_MINIMUM)

/* Entries that are not in a node yet. When a full node was taken from the front enough is left for another. */
struct level {
	uint32_t nr;
	bool used; /* something was put here before */
	uint64_t keys[LEVEL_ENTRIES], values[LEVEL_ENTRIES];
};

struct builder {
	struct repair *r;
	uint64_t id;
	uint64_t mappings;
	uint64_t visits;
	bool any; /* there is a last key */
	uint64_t last_key;
	/* A leaf before the entries of level 0 that is not in a parent yet, and what it is a copy of. */
	uint64_t leaf, leaf_source, leaf_key;
	struct level levels[BTREE_MAX_DEPTH]; /* 0: mappings */
};

static int put(struct builder *b, int level, uint64_t key, uint64_t value);

static int put_leaf_in_parent(struct builder *b)
{
	uint64_t leaf = b->leaf;

	b->leaf = 0;
	return leaf ? put(b, 1, b->leaf_key, leaf) : 0;
}

/* Make a node of the first entries of a level. */
static int take_node(struct builder *b, int level, uint32_t nr, uint64_t *ret)
{
	struct level *l = &b->levels[level];
	int err = level == 0 ? thin_rebuild_leaf(b->r->md, l->keys, l->values, nr, ret)
			     : thin_rebuild_internal(b->r->md, l->keys, l->values, nr, ret);

	l->nr -= nr;
	memmove(l->keys, l->keys + nr, l->nr * sizeof(*l->keys));
	memmove(l->values, l->values + nr, l->nr * sizeof(*l->values));
	return err;
}

static int put_node_in_parent(struct builder *b, int level, uint32_t nr)
{
	uint64_t key = b->levels[level].keys[0], node;
	int err = level == 0 ? put_leaf_in_parent(b) : 0;

	if (!err)
		err = take_node(b, level, nr, &node);
	return err ? err : put(b, level + 1, key, node);
}

static int put(struct builder *b, int level, uint64_t key, uint64_t value)
{
	assert(level < BTREE_MAX_DEPTH);
	struct level *l = &b->levels[level];
	int err = l->nr == LEVEL_ENTRIES ? put_node_in_parent(b, level, NODE_ENTRIES) : 0;

	if (err)
		return err;
	l->used = true;
	l->keys[l->nr] = key;
	l->values[l->nr++] = value;
	return 0;
}

/* Everything of a level that is left goes into one or two nodes. */
static int put_rest_in_parent(struct builder *b, int level)
{
	struct level *l = &b->levels[level];
	int err = 0;

	if (l->nr > NODE_ENTRIES)
		err = put_node_in_parent(b, level, l->nr / 2);
	return err ? err : put_node_in_parent(b, level, l->nr);
}

static int put_mapping(struct builder *b, uint64_t key, uint64_t packed)
{
	b->any = true;
	b->last_key = key;
	b->mappings++;
	return put(b, 0, key, packed);
}

/* The place of a node below its parent: thin blocks low to high are its own by the parent's keys; none above bound
 * can be, by what the next node holds. */
struct range {
	uint64_t low, high, bound;
};

static const struct range whole_range = {0, UINT64_MAX, UINT64_MAX};

/* Mappings of a leaf one by one; those that are not above the last one, or above the bound, belong to others. */
static int put_mappings(
	struct builder *b, uint64_t block, const struct disk_node *leaf, const struct range *range)
{
	struct leaf_entries entries;
	uint64_t first = range->low, last = range->high, lost = 0;
	int err = 0;

	repair_leaf_entries(b->r, leaf, &entries);
	for (uint32_t i = 0; !err && i < entries.nr; i++) {
		uint64_t key = entries.keys[i];

		if ((!b->any || key > b->last_key) && key <= range->bound) {
			err = put_mapping(b, key, entries.packed[i]);
			continue;
		}
		lost++;
		first = key < first ? key : first;
		last = key > last ? key : last;
	}
	if (lost > 0)
		repair_tell_lost(b->r, b->id, first, last,
			"%" PRIu64 " of the mappings in block %" PRIu64 " lie outside its place", lost,
			block);
	return err;
}

/* A fine leaf, whole. */
static int put_leaf(struct builder *b, uint64_t block, int depth, const struct node_info *info)
{
	struct level *l = &b->levels[0];
	struct disk_node *node = &b->r->path[depth];
	int err;

	if (l->nr > 0 && l->nr < NODE_MINIMUM) {
		err = repair_load(b->r, block, NODE_MAPPING, sizeof(uint64_t), depth, node);
		return err ? err : put_mappings(b, block, node, &whole_range);
	}
	err = l->nr > 0 ? put_rest_in_parent(b, 0) : put_leaf_in_parent(b);
	if (!err)
		err = copy_tree(b->r, block, depth, &b->leaf);
	b->leaf_source = block;
	b->leaf_key = info->first_key;
	b->any = true;
	b->last_key = info->last_key;
	b->mappings += info->entries;
	return err;
}

/* Where child i has its place: up to the next one that is left, by its own first key or by the parent's. */
static struct range range_of(
	struct repair *r, const struct disk_node *node, uint32_t i, int depth, const struct range *parent)
{
	struct range range = {node_key(node, i), repair_high(node, i, parent->high), parent->bound};

	for (uint32_t k = i + 1; k < node_nr(node); k++) {
		const struct node_info *next = usable(r, node_value64(node, k), depth + 1);

		if (!next)
			continue;
		uint64_t key = node_key(node, k) > next->first_key ? node_key(node, k) : next->first_key;
		range.bound = key > 0 && key - 1 < range.bound ? key - 1 : range.bound;
		break;
	}
	return range;
}

static int put_tree(struct builder *b, uint64_t block, int depth, const struct range *range)
{
	struct repair *r = b->r;
	struct disk_node *node = &r->path[depth];
	int err = repair_load(r, block, NODE_MAPPING, sizeof(uint64_t), depth, node);

	if (err)
		return err;
	if (node_is_leaf(node))
		return put_mappings(b, block, node, range);
	r->path_blocks[depth] = block;
	for (uint32_t i = 0; !err && i < node_nr(node); i++) {
		uint64_t child = node_value64(node, i);
		const struct node_info *info = usable(r, child, depth + 1);

		if (!info)
			continue;
		struct range place = range_of(r, node, i, depth, range);
		/* Only nodes made to deceive are met this often. */
		if (++b->visits > 2 * r->r.nr_blocks) {
			repair_tell_lost(r, b->id, place.low, place.high, "the tree is a tangle");
			return 0;
		}
		if (info->state == NODE_FINE && info->height == 0 && info->last_key <= place.bound &&
			(!b->any || info->first_key > b->last_key))
			err = put_leaf(b, child, depth + 1, info);
		else
			err = put_tree(b, child, depth + 1, &place);
	}
	return err;
}

/* The mappings at the end are too few for a leaf: the one before joins them. */
static int take_leaf_apart(struct builder *b)
{
	struct level *l = &b->levels[0];
	struct leaf_entries entries;
	struct disk_node *node = &b->r->path[0];
	int err = repair_load(b->r, b->leaf_source, NODE_MAPPING, sizeof(uint64_t), 0, node);

	if (err)
		return err;
	repair_leaf_entries(b->r, node, &entries);
	memmove(l->keys + entries.nr, l->keys, l->nr * sizeof(*l->keys));
	memmove(l->values + entries.nr, l->values, l->nr * sizeof(*l->values));
	memcpy(l->keys, entries.keys, entries.nr * sizeof(*l->keys));
	memcpy(l->values, entries.packed, entries.nr * sizeof(*l->values));
	l->nr += entries.nr;
	b->r->nodes[b->leaf_source].new_block = 0;
	err = thin_rebuild_drop(b->r->md, b->leaf);
	b->leaf = 0;
	return err;
}

static int finish_leaves(struct builder *b, uint64_t *ret)
{
	struct level *l = &b->levels[0];
	int err = b->leaf && l->nr > 0 && l->nr < NODE_MINIMUM ? take_leaf_apart(b) : 0;

	if (err)
		return err;
	bool alone = !b->levels[1].used;
	if (alone && !b->leaf && l->nr <= NODE_ENTRIES)
		return take_node(b, 0, l->nr, ret);
	if (alone && b->leaf && l->nr == 0) {
		*ret = b->leaf;
		return 0;
	}
	return l->nr > 0 ? put_rest_in_parent(b, 0) : put_leaf_in_parent(b);
}

static int finish(struct builder *b, uint64_t *ret)
{
	int err = finish_leaves(b, ret);

	for (int level = 1; !err && level + 1 < BTREE_MAX_DEPTH && b->levels[level].used; level++) {
		struct level *l = &b->levels[level];
		bool top = !b->levels[level + 1].used;

		if (top && l->nr <= NODE_ENTRIES)
			return take_node(b, level, l->nr, ret);
		err = put_rest_in_parent(b, level);
	}
	return err;
}

static int build_tree(struct repair *r, uint64_t id, uint64_t root, uint64_t *ret, uint64_t *ret_mappings)
{
	struct builder *b = calloc(1, sizeof(*b));

	if (!b)
		return bs_fail(-ENOMEM, "out of memory");
	b->r = r;
	b->id = id;
	int err = put_tree(b, root, 0, &whole_range);
	if (!err)
		err = finish(b, ret);
	*ret_mappings = b->mappings;
	free(b);
	return err;
}

/* ---- devices */

static int write_device(struct repair *r, struct repair_device *device)
{
	const struct node_info *info = &r->nodes[device->root];
	uint64_t root, mappings = info->entries;
	int err;

	if (device->root == 0) {
		mappings = 0;
		err = thin_rebuild_leaf(r->md, NULL, NULL, 0, &root);
	} else if (info->fits) {
		err = copy_tree(r, device->root, 0, &root);
	} else {
		err = build_tree(r, device->id, device->root, &root, &mappings);
	}
	if (err)
		return err;
	text_printf(r->out, "device\t%" PRIu64 "\t%" PRIu64 "\t", device->id, mappings);
	if (device->has_details)
		text_printf(r->out, "%" PRIu64 "\t-\n", le64_get(device->details.mapped_blocks));
	else
		text_printf(r->out, "-\t-\n");
	device->details.mapped_blocks = le64_of(mappings);
	r->result.devices++;
	r->result.mappings += mappings;
	return thin_rebuild_device(r->md, device->id, root, &device->details);
}

int repair_write(struct repair *r, struct io *output)
{
	int err = thin_rebuild_begin(output, &r->facts, &r->md);

	for (size_t i = 0; !err && i < r->nr_devices && !r->out->error; i++)
		err = write_device(r, &r->devices[i]);
	if (!err)
		err = thin_rebuild_end(r->md);
	thin_metadata_close(r->md);
	r->md = NULL;
	return err;
}
