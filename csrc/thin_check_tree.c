/*
 * Checking one B-tree: an explicit stack, children read in batches, every node read at its first visit only.
 *
 * Damage (a node or pointer that cannot be used) is different from a finding about a node that can: below
 * damage nothing is known, so it spreads upwards, keeps counts from being called leaks, and its line waits
 * until the caller knows how many mappings are missing.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "thin_check.h"

int tree_check_init(struct tree_check *t, struct check *c)
{
	memset(t, 0, sizeof(*t));
	t->c = c;
	t->root_node = malloc(METADATA_BLOCK_SIZE);
	return t->root_node ? 0 : bs_fail(-ENOMEM, "out of memory");
}

void tree_check_deinit(struct tree_check *t)
{
	for (int i = 0; i <= BTREE_MAX_DEPTH; i++)
		free(t->frames[i].batch);
	free(t->root_node);
}

/* ---- findings */

/* "device 3, thin blocks 256..507: node 812 -> 93" */
static void put_path(const struct tree_check *t, char *text, size_t size)
{
	const struct tree_frame *frame = &t->frames[t->depth];
	size_t used = (size_t)snprintf(text, size, "%s", t->label);

	if (t->depth > 0 && used < size) {
		if (frame->high == UINT64_MAX)
			used += (size_t)snprintf(
				text + used, size - used, ", %s %" PRIu64 "..", t->kind->keys, frame->low);
		else
			used += (size_t)snprintf(text + used, size - used, ", %s %" PRIu64 "..%" PRIu64,
				t->kind->keys, frame->low, frame->high);
	}
	for (int i = 0; i <= t->depth && used < size; i++)
		used += (size_t)snprintf(text + used, size - used, "%s%" PRIu64, i == 0 ? ": node " : " -> ",
			t->frames[i].block);
}

void tree_finding(struct tree_check *t, enum severity severity, const char *format, ...)
{
	char path[512], text[512];
	va_list args;

	put_path(t, path, sizeof(path));
	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	check_finding(t->c, severity, "%s: %s", path, text);
}

static void mark_damaged(struct tree_check *t)
{
	if (t->depth > 0)
		t->c->blocks[t->frames[t->depth - 1].block].damaged = true;
	t->c->metadata_incomplete = true;
	if (t->kind->role == ROLE_MAPPING || t->kind->role == ROLE_TOP_LEVEL)
		t->c->data_incomplete = true;
}

/* What the frame being looked at points to cannot be used. */
static void __attribute__((format(printf, 2, 3))) damage(struct tree_check *t, const char *format, ...)
{
	char path[512], text[512];
	va_list args;

	mark_damaged(t);
	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	put_path(t, path, sizeof(path));
	if (++t->damages == 2)
		check_finding(t->c, FATAL, "%s", t->first_damage);
	if (t->damages == 1)
		snprintf(t->first_damage, sizeof(t->first_damage), "%s: %s", path, text);
	else
		check_finding(t->c, FATAL, "%s: %s", path, text);
}

void tree_check_tell_damage(struct tree_check *t, uint64_t lost)
{
	if (t->damages == 1 && lost > 0)
		check_finding(t->c, FATAL, "%s: %" PRIu64 " mapping%s lost", t->first_damage, lost,
			lost == 1 ? "" : "s");
	else if (t->damages == 1)
		check_finding(t->c, FATAL, "%s", t->first_damage);
	else if (t->damages > 1 && lost > 0)
		check_finding(t->c, FATAL, "%s: %" PRIu64 " mappings lost in %" PRIu64 " damaged places",
			t->label, lost, t->damages);
}

/* ---- nodes */

/* What a walk does not need, but every correct node has. */
static void check_node(struct tree_check *t, const struct disk_node *node)
{
	const struct tree_frame *frame = &t->frames[t->depth];
	uint32_t nr = node_nr(node), max = le32_get(node->max_entries);
	uint32_t expected = btree_max_entries(node_is_leaf(node) ? t->kind->value_size : sizeof(uint64_t));

	if (max != expected)
		tree_finding(t, FATAL, "room for %u entries, expected %u", max, expected);
	if (t->depth > 0 && nr < max / 3)
		tree_finding(t, FATAL, "%u entries, at least %u expected", nr, max / 3);
	if (nr > 0 && (node_key(node, 0) < frame->low || node_key(node, nr - 1) > frame->high))
		tree_finding(t, FATAL, "keys %" PRIu64 "..%" PRIu64 " leave the range of the parent",
			node_key(node, 0), node_key(node, nr - 1));
	if (le32_get(node->padding) != 0)
		tree_finding(t, WARNING, "padding is 0x%x, expected 0", le32_get(node->padding));
}

/* A node is done: the one above it learns what lies below. */
static void settle(struct tree_check *t)
{
	const struct block_info *info = &t->c->blocks[t->frames[t->depth].block];
	struct block_info *parent;

	if (t->depth == 0 || t->frames[t->depth - 1].known)
		return;
	parent = &t->c->blocks[t->frames[t->depth - 1].block];
	if (parent->height == 0)
		parent->height = info->height + 1;
	else if (parent->height != info->height + 1)
		tree_finding(t, FATAL, "its leaves lie %d levels below it, those of its siblings %d",
			info->height, parent->height - 1);
	if (info->entries > 0) {
		/* first_key of an internal node is its own, set when it was opened. */
		if (parent->entries == 0 || info->last_key > parent->last_key)
			parent->last_key = info->last_key;
		parent->entries += info->entries;
	}
	if (info->max_time > parent->max_time)
		parent->max_time = info->max_time;
	parent->damaged |= info->damaged;
}

static void meet_known(struct tree_check *t, struct block_info *info)
{
	const struct tree_frame *frame = &t->frames[t->depth];

	if (info->damaged) {
		damage(t, "block %" PRIu64 " is shared and it or a block below is damaged, see above",
			frame->block);
		return;
	}
	if (t->depth > 0 && t->frames[t->depth - 1].known)
		return; /* the same pointer was met before */
	if (info->entries > 0 && (info->first_key < frame->low || info->last_key > frame->high))
		tree_finding(t, FATAL, "keys %" PRIu64 "..%" PRIu64 " leave the range of the parent",
			info->first_key, info->last_key);
	if (t->kind->known)
		t->kind->known(t, info);
	settle(t);
}

static void take_leaf(struct tree_check *t, struct block_info *info, const struct disk_node *leaf, bool known)
{
	uint32_t nr = node_nr(leaf);

	if (!known) {
		info->entries = nr;
		info->first_key = nr ? node_key(leaf, 0) : 0;
		info->last_key = nr ? node_key(leaf, nr - 1) : 0;
	}
	t->kind->leaf(t, leaf, known);
	if (!known)
		settle(t);
}

static void open_node(struct tree_check *t, struct block_info *info, const struct disk_node *node, bool known)
{
	struct tree_frame *frame = &t->frames[t->depth];

	frame->node = node;
	frame->known = known;
	frame->index = frame->batch_begin = frame->batch_end = 0;
	info->open = true;
	if (!known)
		info->first_key = node_key(node, 0);
	t->depth++;
}

/* ---- the walk */

/* May the pointer of the frame being looked at be followed? If it can be one, it is counted. */
static bool check_pointer(struct tree_check *t)
{
	struct check *c = t->c;
	uint64_t block = t->frames[t->depth].block;

	if (block == 0 || block >= c->r.nr_blocks) {
		damage(t, "pointer to block %" PRIu64 " is outside 1..%" PRIu64, block, c->r.nr_blocks - 1);
		return false;
	}
	struct block_info *info = &c->blocks[block];
	if (info->role != ROLE_NONE && info->role != t->kind->role) {
		damage(t, "block %" PRIu64 " is in use as %s already", block, role_name(info->role));
		return false;
	}
	if (info->open) {
		damage(t, "block %" PRIu64 " lies below itself", block);
		return false;
	}
	if (t->depth == 0 || !t->frames[t->depth - 1].known)
		count_pointer(info);
	if (t->depth == BTREE_MAX_DEPTH) {
		damage(t, "the tree is deeper than %d nodes", BTREE_MAX_DEPTH);
		return false;
	}
	return true;
}

/* Look at the frame's block; buffer holds it already if loaded. */
static void visit(struct tree_check *t, struct disk_node *buffer, bool loaded)
{
	uint64_t block = t->frames[t->depth].block;

	if (!check_pointer(t))
		return;
	struct block_info *info = &t->c->blocks[block];
	bool known = info->role != ROLE_NONE;

	if (!known)
		info->owner = t->owner;
	if (known && (!t->kind->revisit || info->damaged)) {
		meet_known(t, info);
		return;
	}
	info->role = t->kind->role;
	int err = loaded ? 0 : metadata_read_block(&t->c->r, block, buffer);
	if (!err)
		err = metadata_node_check(&t->c->r, buffer, block, t->kind->value_size);
	if (err) {
		info->damaged = true;
		damage(t, "%s", bs_last_error());
		return;
	}
	if (known)
		meet_known(t, info);
	else
		check_node(t, buffer);
	if (node_is_leaf(buffer))
		take_leaf(t, info, buffer, known);
	else
		open_node(t, info, buffer, known);
}

/* Children that will be read: those not met yet, or all where known nodes are opened. */
static void load_children(struct tree_check *t, struct tree_frame *frame)
{
	uint64_t blocks[WALK_BATCH];
	uint32_t nr = node_nr(frame->node) - frame->index;

	if (nr > WALK_BATCH)
		nr = WALK_BATCH;
	for (uint32_t i = 0; i < nr; i++) {
		uint64_t block = node_value64(frame->node, frame->index + i);
		bool wanted = block < t->c->r.nr_blocks &&
			      (t->kind->revisit || t->c->blocks[block].role == ROLE_NONE);

		blocks[i] = wanted ? block : 0;
	}
	metadata_read_batch(&t->c->r, blocks, nr, frame->batch, frame->ok);
	frame->batch_begin = frame->index;
	frame->batch_end = frame->index + nr;
}

static void visit_child(struct tree_check *t, struct tree_frame *frame)
{
	struct tree_frame *child = &t->frames[t->depth];
	uint32_t i = frame->index;

	if (!frame->batch)
		frame->batch = malloc((size_t)WALK_BATCH * METADATA_BLOCK_SIZE);
	if (!frame->batch) {
		t->c->error = bs_fail(-ENOMEM, "out of memory");
		return;
	}
	if (i >= frame->batch_end)
		load_children(t, frame);
	child->block = node_value64(frame->node, i);
	child->low = node_key(frame->node, i);
	child->high = i + 1 < node_nr(frame->node) ? node_key(frame->node, i + 1) - 1 : frame->high;
	frame->index++;
	i -= frame->batch_begin;
	visit(t, (struct disk_node *)(frame->batch + (size_t)i * METADATA_BLOCK_SIZE), frame->ok[i]);
}

void tree_check_run(
	struct tree_check *t, const struct tree_kind *kind, const char *label, uint64_t root, void *context)
{
	t->kind = kind;
	t->label = label;
	t->context = context;
	t->depth = 0;
	t->damages = 0;
	t->frames[0].block = root;
	t->frames[0].low = 0;
	t->frames[0].high = UINT64_MAX;
	visit(t, t->root_node, false);
	while (t->depth > 0 && !t->c->error && !t->c->out->error) {
		struct tree_frame *frame = &t->frames[t->depth - 1];

		if (frame->index < node_nr(frame->node)) {
			visit_child(t, frame);
			continue;
		}
		t->depth--;
		t->c->blocks[frame->block].open = false;
		if (!frame->known)
			settle(t);
	}
}
