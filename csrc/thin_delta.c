/*
 * The differences of two thin devices of one pool: as the XML that thin_delta 0.9.0 prints, byte for byte,
 * and as ranges.
 *
 * Two cursors go through both mapping trees side by side. The next thing of a cursor is a mapping or a
 * subtree not yet opened. When both stand before the same block the subtrees are one: ranges skip it unread,
 * the text reads it once for its `same` ranges. Else the subtree that begins first is opened, of two that
 * begin together the taller one, so that the cursors meet at shared blocks even when one tree has grown a
 * level.
 *
 * Only data block numbers are compared, not times. A range is consecutive thin blocks of one kind, whatever
 * their data blocks.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "blocksnap.h"
#include "error.h"
#include "metadata_reader.h"
#include "text_output.h"

/* ---- cursor */

struct cursor_level {
	struct disk_node node;
	uint64_t high; /* no key below may exceed it */
	uint32_t index;
};

struct cursor {
	const struct metadata_reader *r;
	uint64_t root;
	uint64_t begin; /* nothing before it is wanted */
	bool root_pending;
	int depth;
	int leaf_depth;
	int height; /* of the tree, up to an offset that both cursors have */
	struct cursor_level levels[BTREE_MAX_DEPTH];
};

enum next_kind { NEXT_END, NEXT_SUBTREE, NEXT_MAPPING };

struct next {
	enum next_kind kind;
	uint64_t key;   /* of the mapping; lower bound of the subtree's keys */
	uint64_t value; /* data block; block of the subtree's root */
	int height;     /* of a subtree: nodes from its root to a leaf */
};

static int read_node(const struct cursor *c, uint64_t block, struct disk_node *ret)
{
	int err = metadata_read_block(c->r, block, ret);

	return err ? err : metadata_node_check(c->r, ret, block, sizeof(uint64_t));
}

static void cursor_init(struct cursor *c, const struct metadata_reader *r, uint64_t root, uint64_t begin)
{
	memset(c, 0, offsetof(struct cursor, levels));
	c->r = r;
	c->root = root;
	c->begin = begin;
	c->root_pending = true;
}

/* One step down the path to the wanted begin: block becomes the child, or ret_leaf is set. */
static int measure_step(struct cursor *c, uint64_t *block, bool *ret_leaf)
{
	struct disk_node *node = &c->levels[0].node;
	int err = c->height == BTREE_MAX_DEPTH
			  ? bs_fail(-EILSEQ, "%sthe tree of block %" PRIu64 " is deeper than %d nodes",
				    c->r->prefix, c->root, BTREE_MAX_DEPTH)
			  : read_node(c, *block, node);

	if (err)
		return err;
	c->height++;
	*ret_leaf = node_is_leaf(node);
	if (!*ret_leaf)
		*block = node_value64(node, node_child_index(node, c->begin));
	return 0;
}

/* The difference of the heights is needed before the first comparison: follow both paths until they meet, or
 * to the leaves. */
static int measure_heights(struct cursor *left, struct cursor *right)
{
	uint64_t left_block = left->root, right_block = right->root;
	bool left_leaf = false, right_leaf = false;
	int err = 0;

	while (!err && !(left_leaf && right_leaf) && left_block != right_block) {
		if (!left_leaf)
			err = measure_step(left, &left_block, &left_leaf);
		if (!err && !right_leaf)
			err = measure_step(right, &right_block, &right_leaf);
	}
	/* Where one side had read the leaf that the other came to, the other still has to count it. */
	left->height += right_leaf && !left_leaf;
	right->height += left_leaf && !right_leaf;
	return err;
}

/* Leave nodes that are used up, then tell what comes next. */
static struct next cursor_next(struct cursor *c)
{
	if (c->root_pending)
		return (struct next){NEXT_SUBTREE, 0, c->root, c->height};
	while (c->depth > 0) {
		struct cursor_level *level = &c->levels[c->depth - 1];

		if (level->index < node_nr(&level->node)) {
			uint64_t key = node_key(&level->node, level->index);
			uint64_t value = node_value64(&level->node, level->index);

			if (node_is_leaf(&level->node))
				return (struct next){NEXT_MAPPING, key, mapping_block(value), 0};
			return (struct next){NEXT_SUBTREE, key, value, c->height - c->depth};
		}
		c->depth--;
	}
	return (struct next){NEXT_END, UINT64_MAX, 0, 0};
}

/* Step over the mapping or the unopened subtree. */
static void cursor_skip(struct cursor *c)
{
	if (c->root_pending)
		c->root_pending = false;
	else
		c->levels[c->depth - 1].index++;
}

/* Go into the unopened subtree. */
static int cursor_open(struct cursor *c, const struct next *next)
{
	uint64_t high = UINT64_MAX;

	if (c->depth > 0) {
		const struct cursor_level *parent = &c->levels[c->depth - 1];

		high = parent->high;
		if (parent->index + 1 < node_nr(&parent->node))
			high = node_key(&parent->node, parent->index + 1) - 1;
	}
	struct cursor_level *level = &c->levels[c->depth];
	int err = read_node(c, next->value, &level->node);
	if (!err)
		err = metadata_place_check(
			c->r, &level->node, next->value, c->depth + 1, &c->leaf_depth, next->key, high);
	if (err)
		return err;
	cursor_skip(c);
	level->high = high;
	level->index = node_is_leaf(&level->node) ? node_lower_bound(&level->node, c->begin)
						  : node_child_index(&level->node, c->begin);
	c->depth++;
	return 0;
}

/* ---- where ranges go */

struct sink {
	struct text_output *text; /* NULL: to ranges, without those of kind same */
	struct bs_delta_range *ranges;
	int capacity, used;
	struct bs_delta_range current; /* length 0: none */
};

static bool sink_full(const struct sink *sink)
{
	return sink->text ? sink->text->error != 0 : sink->used == sink->capacity;
}

static void put_text(struct text_output *out, const struct bs_delta_range *range)
{
	static const char *const names[] = {
		[BS_DELTA_LEFT_ONLY] = "left_only",
		[BS_DELTA_RIGHT_ONLY] = "right_only",
		[BS_DELTA_DIFFERENT] = "different",
		[BS_DELTA_SAME] = "same",
	};
	const char *name = names[range->kind];
	size_t length = strlen(name);
	char *p = text_output_reserve(out, 256);

	p = text_put_literal(p, "    <");
	p = (char *)memcpy(p, name, length) + length;
	p = text_put_literal(p, " begin=\"");
	p = text_put_number(p, range->thin_begin);
	p = text_put_literal(p, "\" length=\"");
	p = text_put_number(p, range->length);
	p = text_put_literal(p, "\"/>\n");
	text_output_advance(out, p);
}

static void sink_end_range(struct sink *sink)
{
	if (sink->current.length == 0)
		return;
	if (sink->text)
		put_text(sink->text, &sink->current);
	else if (sink->used < sink->capacity)
		sink->ranges[sink->used++] = sink->current;
	sink->current.length = 0;
}

static void sink_add(struct sink *sink, uint64_t key, uint64_t length, uint64_t kind)
{
	struct bs_delta_range *current = &sink->current;

	if (!sink->text && kind == BS_DELTA_SAME)
		return;
	if (current->length > 0 && current->kind == kind && current->thin_begin + current->length == key) {
		current->length += length;
		return;
	}
	sink_end_range(sink);
	*current = (struct bs_delta_range){key, length, kind};
}

/* ---- comparing */

struct delta {
	struct cursor left, right;
	struct sink sink;
};

/* Entries from index on that have consecutive keys. */
static uint32_t consecutive_keys(const struct disk_node *leaf, uint32_t index)
{
	uint32_t end = index + 1, nr = node_nr(leaf);

	while (end < nr && node_key(leaf, end) == node_key(leaf, end - 1) + 1)
		end++;
	return end - index;
}

/* Both sides stand before the same block. */
static int take_shared(struct delta *d)
{
	int outside = d->left.depth;
	struct next next = cursor_next(&d->left);

	cursor_skip(&d->right);
	if (!d->sink.text) {
		cursor_skip(&d->left);
		return 0;
	}
	int err = cursor_open(&d->left, &next);
	while (!err && d->left.depth > outside && !sink_full(&d->sink)) {
		struct cursor_level *level = &d->left.levels[d->left.depth - 1];

		if (level->index == node_nr(&level->node)) {
			d->left.depth--;
		} else if (node_is_leaf(&level->node)) {
			uint32_t length = consecutive_keys(&level->node, level->index);

			sink_add(&d->sink, node_key(&level->node, level->index), length, BS_DELTA_SAME);
			level->index += length;
		} else {
			next = cursor_next(&d->left);
			err = cursor_open(&d->left, &next);
		}
	}
	return err;
}

static void take_mappings(struct delta *d, const struct next *left, const struct next *right)
{
	bool has_left = left->kind == NEXT_MAPPING && (right->kind == NEXT_END || left->key <= right->key);
	bool has_right = right->kind == NEXT_MAPPING && (left->kind == NEXT_END || right->key <= left->key);

	if (has_left && has_right)
		sink_add(&d->sink, left->key, 1,
			left->value == right->value ? BS_DELTA_SAME : BS_DELTA_DIFFERENT);
	else if (has_left)
		sink_add(&d->sink, left->key, 1, BS_DELTA_LEFT_ONLY);
	else
		sink_add(&d->sink, right->key, 1, BS_DELTA_RIGHT_ONLY);
	if (has_left)
		cursor_skip(&d->left);
	if (has_right)
		cursor_skip(&d->right);
}

/* A subtree must be opened when nothing of the other side comes before it; two at once: see the top of the
 * file. */
static bool must_open(const struct next *this, const struct next *other)
{
	if (this->kind != NEXT_SUBTREE)
		return false;
	if (other->kind == NEXT_END || this->key < other->key)
		return true;
	if (this->key > other->key)
		return false;
	return other->kind == NEXT_MAPPING || this->height >= other->height;
}

static int compare_trees(struct delta *d)
{
	int err = 0;

	while (!err && !sink_full(&d->sink)) {
		struct next left = cursor_next(&d->left), right = cursor_next(&d->right);

		if (left.kind == NEXT_END && right.kind == NEXT_END)
			break;
		if (left.kind == NEXT_SUBTREE && right.kind == NEXT_SUBTREE && left.value == right.value)
			err = take_shared(d);
		else if (must_open(&left, &right))
			err = cursor_open(&d->left, &left);
		else if (must_open(&right, &left))
			err = cursor_open(&d->right, &right);
		else
			take_mappings(d, &left, &right);
	}
	if (!err)
		sink_end_range(&d->sink);
	return err;
}

static int delta_init(
	struct delta *d, const struct metadata_reader *r, uint32_t left, uint32_t right, uint64_t begin)
{
	uint64_t left_root, right_root;
	int err = metadata_device_root(r, left, &left_root);

	if (!err)
		err = metadata_device_root(r, right, &right_root);
	if (err)
		return err;
	cursor_init(&d->left, r, left_root, begin);
	cursor_init(&d->right, r, right_root, begin);
	return measure_heights(&d->left, &d->right);
}

/* ---- public functions */

static int delta_text(struct delta *d, const struct metadata_reader *r, uint32_t left, uint32_t right,
	struct text_output *out)
{
	const struct disk_superblock *sb = &r->superblock;

	int err = delta_init(d, r, left, right, 0);

	if (err)
		return err;
	d->sink = (struct sink){.text = out};
	text_printf(out,
		"<superblock uuid=\"\" time=\"%u\" transaction=\"%" PRIu64
		"\" data_block_size=\"%u\" nr_data_blocks=\"%" PRIu64 "\"",
		le32_get(sb->time), le64_get(sb->trans_id), le32_get(sb->data_block_size),
		le64_get(sb->data_sm_root.nr_blocks));
	if (le64_get(sb->held_root))
		text_printf(out, " metadata_snap=\"%" PRIu64 "\"", le64_get(sb->held_root));
	text_printf(out, ">\n  <diff left=\"%u\" right=\"%u\">\n", left, right);
	err = compare_trees(d);
	if (!err)
		text_printf(out, "  </diff>\n</superblock>\n");
	return err;
}

int bs_metadata_delta(const char *metadata, int held, uint32_t left, uint32_t right, int fd)
{
	struct metadata_reader reader;
	struct delta *delta = malloc(sizeof(*delta));
	struct text_output *out = malloc(sizeof(*out));
	int err = metadata_reader_open(&reader, metadata, held);

	if (!err && (!delta || !out))
		err = bs_fail(-ENOMEM, "%s: out of memory", metadata);
	if (!err) {
		text_output_init(out, fd);
		err = text_output_finish(out, delta_text(delta, &reader, left, right, out));
	}
	metadata_reader_deinit(&reader);
	free(out);
	free(delta);
	return err;
}

int bs_metadata_delta_ranges(const char *metadata, int held, uint32_t left, uint32_t right, uint64_t begin,
	struct bs_delta_range *out, int capacity)
{
	struct metadata_reader reader;
	struct delta *delta = malloc(sizeof(*delta));
	int err = metadata_reader_open(&reader, metadata, held);

	if (!err && !delta)
		err = bs_fail(-ENOMEM, "%s: out of memory", metadata);
	if (!err) {
		delta->sink = (struct sink){.ranges = out, .capacity = capacity};
		err = delta_init(delta, &reader, left, right, begin);
		if (!err)
			err = compare_trees(delta);
	}
	int used = err ? err : delta->sink.used;
	metadata_reader_deinit(&reader);
	free(delta);
	return used;
}
