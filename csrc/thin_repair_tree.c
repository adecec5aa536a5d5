/*
 * What is left of mapping trees. Every distinct node is read and judged once, for all the devices that reach it:
 *
 * - a node that cannot be read, or that is not what its place demands, is lost with all below it;
 * - of a leaf, mappings beyond the data device are dropped; times of the future become the pool's;
 * - a node of which at least a third of a full one is left, and whose children fit together, is fine: one copy of
 *   it serves all who share it. Others are loose: what is below them is put together anew for each device.
 *
 * Times decide sharing, and a shared block that looks unshared would be written in place. Whoever meets a node that
 * was met before, and whoever has a mapping that looks unshared to a data block that is named twice, needs a later
 * snapshotted_time; raising it costs a needless copy at worst. Where nodes lie below themselves all devices get the
 * latest.
 */
#include <errno.h>
#include <inttypes.h>

#include "error.h"
#include "thin_repair.h"

int repair_load(struct repair *r, uint64_t block, enum node_role role, uint32_t value_size, int depth,
	struct disk_node *node)
{
	int err = metadata_read_block(&r->r, block, node);

	if (err)
		return err;
	const struct node_info *info = &r->nodes[block];
	if (!r->trying && info->state != NODE_UNSEEN && (info->role != NODE_MAPPING || role != NODE_MAPPING))
		return bs_fail(-EILSEQ, "block %" PRIu64 " is in use as another node already", block);
	if (depth + info->height >= BTREE_MAX_DEPTH)
		return bs_fail(-EILSEQ, "the tree is deeper than %d nodes", BTREE_MAX_DEPTH);
	return metadata_node_check(&r->r, node, block, value_size);
}

void repair_leaf_entries(const struct repair *r, const struct disk_node *leaf, struct leaf_entries *ret)
{
	ret->nr = ret->dropped = 0;
	for (uint32_t i = 0; i < node_nr(leaf); i++) {
		uint64_t key = node_key(leaf, i), value = node_value64(leaf, i), block = mapping_block(value);
		uint32_t time = mapping_time(value);

		if (block >= r->nr_data) {
			ret->first_dropped = ret->dropped++ ? ret->first_dropped : key;
			ret->last_dropped = key;
			continue;
		}
		ret->keys[ret->nr] = key;
		ret->packed[ret->nr++] = mapping_pack(block, time < r->latest_time ? time : r->latest_time);
	}
}

uint64_t repair_high(const struct disk_node *node, uint32_t i, uint64_t high)
{
	uint64_t own = i + 1 < node_nr(node) ? node_key(node, i + 1) - 1 : UINT64_MAX;

	return own < high ? own : high;
}

/* ---- assessing */

static void need_time(struct repair *r, uint32_t device, uint32_t time)
{
	if (device != NOBODY && r->devices[device].needed_time <= time)
		r->devices[device].needed_time = time + 1;
}

static uint32_t snapshotted_time(const struct repair *r, uint32_t device)
{
	return le32_get(r->devices[device].details.snapshotted_time);
}

static void mark_data(struct repair *r, uint32_t device, uint64_t packed)
{
	uint64_t block = mapping_block(packed);
	uint8_t *mark = &r->data[block];

	if (*mark & DATA_NAMED)
		*mark |= DATA_TWICE;
	*mark |= DATA_NAMED | (mapping_time(packed) >= snapshotted_time(r, device) ? DATA_CLAIMED : 0);
	r->conflict |= (*mark & (DATA_TWICE | DATA_CLAIMED)) == (DATA_TWICE | DATA_CLAIMED);
	if (block > r->last_data)
		r->last_data = block;
}

static void assess_leaf(
	struct repair *r, uint32_t device, struct node_info *info, const struct disk_node *leaf)
{
	struct leaf_entries entries;

	repair_leaf_entries(r, leaf, &entries);
	info->entries = entries.nr;
	info->lossy = entries.dropped > 0;
	info->fits = true;
	for (uint32_t i = 0; i < entries.nr; i++) {
		uint32_t time = mapping_time(entries.packed[i]);

		info->age += time + 1ull;
		info->max_time = time > info->max_time ? time : info->max_time;
		if (r->data)
			mark_data(r, device, entries.packed[i]);
	}
	if (entries.nr > 0) {
		info->first_key = entries.keys[0];
		info->last_key = entries.keys[entries.nr - 1];
	}
	if (entries.nr == 0)
		info->state = NODE_LOST;
	else
		info->state = entries.nr < NODE_MINIMUM ? NODE_LOOSE : NODE_FINE;
}

/* Take in what was found out about a child. Children fit together by the keys that they have; what the parent says
 * of them does not count, since the new parent takes their first keys. */
static void add_child(struct node_info *info, const struct node_info *child)
{
	bool first = info->entries == 0;

	info->fits &= child->state == NODE_FINE;
	info->fits &= first || (child->height + 1 == info->height && child->first_key > info->last_key);
	if (first) {
		info->height = child->height + 1;
		info->first_key = child->first_key;
	}
	info->last_key = child->last_key;
	info->entries += child->entries;
	info->age += child->age;
	info->lossy |= child->lossy;
	if (child->max_time > info->max_time)
		info->max_time = child->max_time;
}

static void assess_children(
	struct repair *r, uint32_t device, struct node_info *info, const struct disk_node *node, int depth)
{
	uint32_t kept = 0;

	info->fits = true;
	for (uint32_t i = 0; i < node_nr(node); i++) {
		uint64_t left_out = r->left_out;
		const struct node_info *child = repair_assess(r, device, node_value64(node, i), depth + 1);

		if (child && child->entries > 0) {
			add_child(info, child);
			kept++;
			continue;
		}
		info->lossy |= !child || child->lossy;
		/* In another place, where it can be used, the node is not what was found out about it here. */
		info->fits &= child || r->left_out == left_out;
	}
	if (kept == 0)
		info->state = NODE_LOST;
	else
		info->state = info->fits && kept >= NODE_MINIMUM ? NODE_FINE : NODE_LOOSE;
}

static struct node_info *leave_out(struct repair *r)
{
	r->left_out++;
	return NULL;
}

static struct node_info *meet_again(struct repair *r, uint32_t device, struct node_info *info, int depth)
{
	if (info->role != NODE_MAPPING)
		return NULL;
	if (info->state == NODE_OPEN || depth + info->height >= BTREE_MAX_DEPTH)
		return leave_out(r);
	if (info->entries > 0) {
		need_time(r, device, info->max_time);
		need_time(r, info->owner, info->max_time);
	}
	return info;
}

struct node_info *repair_assess(struct repair *r, uint32_t device, uint64_t block, int depth)
{
	struct node_info *info = &r->nodes[block < r->r.nr_blocks ? block : 0];

	if (info->state != NODE_UNSEEN)
		return meet_again(r, device, info, depth);
	if (depth >= BTREE_MAX_DEPTH)
		return leave_out(r);
	struct disk_node *node = &r->path[depth];
	bool usable = repair_load(r, block, NODE_MAPPING, sizeof(uint64_t), depth, node) == 0;
	if (block == 0 || block >= r->r.nr_blocks)
		return NULL;
	info->owner = device;
	info->state = NODE_OPEN;
	if (!usable) {
		info->state = NODE_LOST;
		info->lossy = true;
	} else if (node_is_leaf(node)) {
		assess_leaf(r, device, info, node);
	} else {
		assess_children(r, device, info, node, depth);
	}
	return info;
}

/* ---- times */

/* The nodes that a device met first: each is looked at once. */
static void settle_node(struct repair *r, uint32_t device, uint64_t block, int depth)
{
	struct node_info *info = &r->nodes[block < r->r.nr_blocks ? block : 0];
	struct disk_node *node = &r->path[depth];
	struct leaf_entries entries;

	if (info->owner != device || info->entries == 0 || info->settled)
		return;
	if (repair_load(r, block, NODE_MAPPING, sizeof(uint64_t), depth, node))
		return;
	info->settled = true;
	if (!node_is_leaf(node)) {
		for (uint32_t i = 0; i < node_nr(node); i++)
			settle_node(r, device, node_value64(node, i), depth + 1);
		return;
	}
	repair_leaf_entries(r, node, &entries);
	for (uint32_t i = 0; i < entries.nr; i++) {
		uint32_t time = mapping_time(entries.packed[i]);

		if (r->data[mapping_block(entries.packed[i])] & DATA_TWICE &&
			time >= snapshotted_time(r, device))
			need_time(r, device, time);
	}
}

void repair_settle_times(struct repair *r)
{
	/* Whoever uses a node that was left out elsewhere has not met what is below it. */
	for (size_t i = 0; r->left_out > 0 && i < r->nr_devices; i++)
		need_time(r, (uint32_t)i, r->latest_time);
	for (size_t i = 0; r->conflict && i < r->nr_devices; i++)
		if (r->devices[i].has_root)
			settle_node(r, (uint32_t)i, r->devices[i].root, 0);
}

/* ---- telling */

static void tell_child(struct repair *r, uint64_t id, uint64_t block, int depth, uint64_t low, uint64_t high)
{
	const struct node_info *info = block && block < r->r.nr_blocks ? &r->nodes[block] : NULL;
	bool known = info && info->role == NODE_MAPPING && info->state != NODE_UNSEEN;

	for (int i = 0; i < depth; i++)
		if (r->path_blocks[i] == block) {
			repair_tell_lost(r, id, low, high, "block %" PRIu64 " lies below itself", block);
			return;
		}
	if (!known || info->lossy)
		repair_tell_node(r, id, block, depth, low, high);
}

void repair_tell_node(struct repair *r, uint64_t id, uint64_t block, int depth, uint64_t low, uint64_t high)
{
	struct disk_node *node = &r->path[depth];
	struct leaf_entries entries;

	if (repair_load(r, block, NODE_MAPPING, sizeof(uint64_t), depth, node)) {
		repair_tell_lost(r, id, low, high, "%s", bs_last_error());
		return;
	}
	if (node_is_leaf(node)) {
		repair_leaf_entries(r, node, &entries);
		if (entries.dropped > 0)
			repair_tell_lost(r, id, entries.first_dropped, entries.last_dropped,
				"%u of the mappings in block %" PRIu64 " name data blocks beyond the pool",
				entries.dropped, block);
		return;
	}
	r->path_blocks[depth] = block;
	for (uint32_t i = 0; i < node_nr(node); i++) {
		uint64_t begin = node_key(node, i), last = repair_high(node, i, high);

		if (begin <= high && last >= low)
			tell_child(r, id, node_value64(node, i), depth + 1, begin > low ? begin : low, last);
	}
}
