/*
 * Invariants (each holds for every committed tree, whoever wrote it):
 * 1. keys of a node ascend strictly; key i of an internal node is <= every key below child i and > every key
 *    below child i-1;
 * 2. all leaves lie at one depth; a node that is not the root holds at least max/3 entries;
 * 3. a node is changed only after it was shadowed, from the root down: the parent of a changed node is
 *    changeable.
 *
 * Insertion splits a full child before it steps into it, removal fills a poor child before it steps into it,
 * so neither goes back up. A node split while keys arrive in ascending order leaves two thirds on the left.
 *
 * Foreign nodes may have fewer places (max_entries) than the format's figure; a shadow always has the full
 * number.
 */
#include "btree.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "seed_bug.h"

static uint32_t node_nr(const struct disk_node *n)
{
	return le32_get(n->nr_entries);
}

static uint32_t node_max(const struct disk_node *n)
{
	return le32_get(n->max_entries);
}

static bool node_is_leaf(const struct disk_node *n)
{
	return le32_get(n->flags) == BTREE_LEAF;
}

static uint64_t node_key(const struct disk_node *n, uint32_t i)
{
	return le64_get(n->keys[i]);
}

static void *node_value(const struct disk_node *n, uint32_t i)
{
	return (char *)&n->keys[node_max(n)] + (size_t)i * le32_get(n->value_size);
}

static uint64_t node_child(const struct disk_node *n, uint32_t i)
{
	const struct le64 *child = node_value(n, i);

	return le64_get(*child);
}

static void node_set_child(struct disk_node *n, uint32_t i, uint64_t child)
{
	*(struct le64 *)node_value(n, i) = le64_of(child);
}

static void node_set_nr(struct disk_node *n, uint32_t nr)
{
	n->nr_entries = le32_of(nr);
}

/* Index of the largest key <= key, -1 if all are larger. */
static int node_search(const struct disk_node *n, uint64_t key)
{
	uint32_t low = 0, high = node_nr(n);

	while (low < high) {
		uint32_t middle = (low + high) / 2;

		if (node_key(n, middle) <= key)
			low = middle + 1;
		else
			high = middle;
	}
	return (int)low - 1;
}

static int check_node(const void *data, uint64_t nr)
{
	const struct disk_node *n = data;
	uint32_t flags = le32_get(n->flags), max = node_max(n), size = le32_get(n->value_size);

	if (flags != BTREE_INTERNAL && flags != BTREE_LEAF)
		return bs_fail(-EUCLEAN, "metadata block %" PRIu64 ": node flags are 0x%x: run pool check",
			nr, flags);
	if (size == 0 || size > BTREE_MAX_VALUE_SIZE || size % 4 || (flags == BTREE_INTERNAL && size != 8))
		return bs_fail(
			-EUCLEAN, "metadata block %" PRIu64 ": values of %u bytes: run pool check", nr, size);
	if (max == 0 || max > btree_max_entries(size) || node_nr(n) > max ||
		(flags == BTREE_INTERNAL && node_nr(n) == 0))
		return bs_fail(-EUCLEAN, "metadata block %" PRIu64 ": %u of %u entries: run pool check", nr,
			node_nr(n), max);
	for (uint32_t i = 1; i < node_nr(n); i++)
		if (node_key(n, i - 1) >= node_key(n, i))
			return bs_fail(-EUCLEAN,
				"metadata block %" PRIu64 ": key %u out of order: run pool check", nr, i);
	return 0;
}

static const struct bm_validator node_validator = {"B-tree node", BTREE_NODE_SALT, check_node};

static struct disk_node *node_of(struct bm_block *b)
{
	return (struct disk_node *)b->data;
}

static int node_fits(const struct btree *tree, const struct bm_block *b)
{
	const struct disk_node *n = (const struct disk_node *)b->data;

	if (node_is_leaf(n) && le32_get(n->value_size) != tree->value_size)
		return bs_fail(-EUCLEAN,
			"metadata block %" PRIu64 ": values of %u bytes in a tree of %u: run pool check",
			b->nr, le32_get(n->value_size), tree->value_size);
	return 0;
}

static int read_node(const struct btree *tree, uint64_t nr, struct bm_block **ret)
{
	int r = tm_read(tree->tm, nr, &node_validator, ret);

	return r < 0 ? r : node_fits(tree, *ret);
}

static int too_deep(uint64_t root)
{
	return bs_fail(-EUCLEAN, "the tree at metadata block %" PRIu64 " is deeper than %d: run pool check",
		root, BTREE_MAX_DEPTH);
}

static void init_node(struct disk_node *n, uint32_t flags, uint32_t value_size)
{
	n->flags = le32_of(flags);
	n->value_size = le32_of(value_size);
	n->max_entries = le32_of(btree_max_entries(value_size));
}

static int new_node(const struct btree *tree, bool leaf, struct bm_block **ret)
{
	int r = tm_new(tree->tm, &node_validator, ret);

	if (r == 0)
		init_node(node_of(*ret), leaf ? BTREE_LEAF : BTREE_INTERNAL, leaf ? tree->value_size : 8);
	return r;
}

/* One more reference to all that a node refers to. */
static int inc_entries(const struct btree *tree, const struct disk_node *n)
{
	int r = 0;

	for (uint32_t i = 0; r == 0 && i < node_nr(n); i++) {
		if (!node_is_leaf(n))
			r = tm_inc(tree->tm, node_child(n, i));
		else if (tree->inc && !BS_BUG(SHARED_VALUES_NOT_COUNTED))
			r = tree->inc(tree->context, node_value(n, i));
	}
	return r;
}

/* Give a foreign node the format's number of places. */
static void normalise(struct disk_node *n)
{
	uint32_t size = le32_get(n->value_size), max = btree_max_entries(size);

	if (node_max(n) == max)
		return;
	void *from = node_value(n, 0);
	n->max_entries = le32_of(max);
	memmove(node_value(n, 0), from, (size_t)node_nr(n) * size);
}

static int shadow_node(const struct btree *tree, uint64_t nr, struct bm_block **ret)
{
	bool shared;
	int r = tm_shadow(tree->tm, nr, &node_validator, ret, &shared);

	if (r == 0)
		r = node_fits(tree, *ret);
	if (r < 0)
		return r;
	normalise(node_of(*ret));
	return shared ? inc_entries(tree, node_of(*ret)) : 0;
}

static void insert_entry(struct disk_node *n, uint32_t at, uint64_t key, const void *value)
{
	uint32_t nr = node_nr(n), size = le32_get(n->value_size);

	memmove(&n->keys[at + 1], &n->keys[at], (nr - at) * sizeof(n->keys[0]));
	memmove(node_value(n, at + 1), node_value(n, at), (size_t)(nr - at) * size);
	n->keys[at] = le64_of(key);
	memcpy(node_value(n, at), value, size);
	node_set_nr(n, nr + 1);
}

static void delete_entry(struct disk_node *n, uint32_t at)
{
	uint32_t nr = node_nr(n), size = le32_get(n->value_size);

	memmove(&n->keys[at], &n->keys[at + 1], (nr - at - 1) * sizeof(n->keys[0]));
	memmove(node_value(n, at), node_value(n, at + 1), (size_t)(nr - at - 1) * size);
	node_set_nr(n, nr - 1);
}

static void copy_entries(
	struct disk_node *to, uint32_t at, const struct disk_node *from, uint32_t first, uint32_t nr)
{
	memcpy(&to->keys[at], &from->keys[first], nr * sizeof(to->keys[0]));
	memcpy(node_value(to, at), node_value(from, first), (size_t)nr * le32_get(to->value_size));
}

/* Move the last nr entries of left before those of right. */
static void shift_right(struct disk_node *left, struct disk_node *right, uint32_t nr)
{
	uint32_t size = le32_get(right->value_size);

	memmove(&right->keys[nr], &right->keys[0], node_nr(right) * sizeof(right->keys[0]));
	memmove(node_value(right, nr), node_value(right, 0), (size_t)node_nr(right) * size);
	copy_entries(right, 0, left, node_nr(left) - nr, nr);
	node_set_nr(right, node_nr(right) + nr);
	node_set_nr(left, node_nr(left) - nr);
}

/* Move the first nr entries of right behind those of left. */
static void shift_left(struct disk_node *left, struct disk_node *right, uint32_t nr)
{
	uint32_t size = le32_get(right->value_size), rest = node_nr(right) - nr;

	copy_entries(left, node_nr(left), right, 0, nr);
	memmove(&right->keys[0], &right->keys[nr], rest * sizeof(right->keys[0]));
	memmove(node_value(right, 0), node_value(right, nr), (size_t)rest * size);
	node_set_nr(left, node_nr(left) + nr);
	node_set_nr(right, rest);
}

int btree_create(const struct btree *tree, uint64_t *ret_root)
{
	struct bm_block *b;
	int r = new_node(tree, true, &b);

	if (r == 0)
		*ret_root = b->nr;
	return r;
}

int btree_write_node(const struct btree *tree, bool leaf, const uint64_t *keys, const void *values,
	uint32_t nr, uint64_t *ret)
{
	struct bm_block *b;
	int r = new_node(tree, leaf, &b);

	if (r < 0)
		return r;
	struct disk_node *n = node_of(b);
	assert(nr <= node_max(n));
	for (uint32_t i = 0; i < nr; i++)
		n->keys[i] = le64_of(keys[i]);
	memcpy(node_value(n, 0), values, (size_t)nr * le32_get(n->value_size));
	node_set_nr(n, nr);
	*ret = b->nr;
	return 0;
}

/* ---- look-up ---- */

typedef int count_function(struct transaction_manager *tm, uint64_t nr, uint32_t *ret);

/* count: NULL if nobody asks whether the path is shared. */
static int lookup(const struct btree *tree, uint64_t root, uint64_t key, count_function *count,
	void *ret_value, bool *ret_shared)
{
	uint64_t nr = root;

	for (int depth = 0; depth < BTREE_MAX_DEPTH; depth++) {
		struct bm_block *b;
		uint32_t references;
		int r = read_node(tree, nr, &b);

		if (r == 0 && count && !*ret_shared) {
			r = count(tree->tm, nr, &references);
			*ret_shared = r == 0 && references > 1;
		}
		if (r < 0)
			return r;
		const struct disk_node *n = node_of(b);
		int i = node_search(n, key);
		if (i < 0)
			return 0;
		if (node_is_leaf(n)) {
			if (node_key(n, i) != key)
				return 0;
			memcpy(ret_value, node_value(n, i), tree->value_size);
			return 1;
		}
		nr = node_child(n, i);
	}
	return too_deep(root);
}

int btree_lookup(const struct btree *tree, uint64_t root, uint64_t key, void *ret_value)
{
	return lookup(tree, root, key, NULL, ret_value, NULL);
}

int btree_lookup_shared(const struct btree *tree, uint64_t root, uint64_t key, bool committed,
	void *ret_value, bool *ret_shared)
{
	*ret_shared = false;
	return lookup(tree, root, key, committed ? tm_committed_count : tm_count, ret_value, ret_shared);
}

/* The leaf that would hold key; ret_bound: no key of a later leaf is below it. */
static int find_leaf(
	const struct btree *tree, uint64_t root, uint64_t key, struct bm_block **ret, uint64_t *ret_bound)
{
	uint64_t nr = root;

	*ret_bound = UINT64_MAX;
	for (int depth = 0; depth < BTREE_MAX_DEPTH; depth++) {
		int r = read_node(tree, nr, ret);

		if (r < 0)
			return r;
		const struct disk_node *n = node_of(*ret);
		if (node_is_leaf(n))
			return 0;
		int i = node_search(n, key);
		if (i < 0)
			i = 0;
		if ((uint32_t)i + 1 < node_nr(n))
			*ret_bound = node_key(n, i + 1);
		nr = node_child(n, i);
	}
	return too_deep(root);
}

static int count_nodes(const struct btree *tree, uint64_t nr, int depth, uint64_t *ret)
{
	uint64_t children[508];
	struct bm_block *b;

	if (depth > BTREE_MAX_DEPTH)
		return bs_fail(
			-EUCLEAN, "metadata block %" PRIu64 ": the tree is too deep: run pool check", nr);
	int r = read_node(tree, nr, &b);
	if (r < 0)
		return r;
	uint32_t n = node_is_leaf(node_of(b)) ? 0 : node_nr(node_of(b));
	for (uint32_t i = 0; i < n; i++)
		children[i] = node_child(node_of(b), i);
	++*ret;
	uint64_t before = *ret;
	for (uint32_t i = 0; r == 0 && i < n; i++) {
		r = count_nodes(tree, children[i], depth + 1, ret);
		/* The first child is a leaf: so are its siblings. */
		if (r == 0 && *ret == before + 1) {
			*ret = before + n;
			break;
		}
	}
	return r;
}

int btree_count_nodes(const struct btree *tree, uint64_t root, uint64_t *ret)
{
	*ret = 0;
	return count_nodes(tree, root, 1, ret);
}

int btree_scan(const struct btree *tree, uint64_t root, uint64_t begin, uint64_t last, uint64_t *ret_keys,
	void *ret_values, int capacity)
{
	int found = 0;

	while (found < capacity && begin <= last) {
		struct bm_block *b;
		uint64_t bound;
		int r = find_leaf(tree, root, begin, &b, &bound);

		if (r < 0)
			return r;
		const struct disk_node *n = node_of(b);
		int at = node_search(n, begin);
		uint32_t i = at < 0 || node_key(n, at) < begin ? at + 1 : at;
		for (; found < capacity && i < node_nr(n) && node_key(n, i) <= last; i++, found++) {
			ret_keys[found] = node_key(n, i);
			memcpy((char *)ret_values + (size_t)found * tree->value_size, node_value(n, i),
				tree->value_size);
		}
		if (i < node_nr(n) || bound == UINT64_MAX)
			break;
		begin = bound;
	}
	return found;
}

/* ---- insertion ---- */

static bool is_full(const struct disk_node *n, uint64_t key)
{
	if (node_nr(n) < node_max(n))
		return false;
	if (!node_is_leaf(n))
		return true;
	int i = node_search(n, key);
	return i < 0 || node_key(n, i) != key;
}

/* How many entries stay on the left: two thirds when key goes behind the last one, else half. */
static uint32_t split_point(const struct disk_node *n, uint64_t key)
{
	uint32_t nr = node_nr(n);

	return key > node_key(n, nr - 1) ? nr - node_max(n) / 3 : nr / 2;
}

/* The root block stays the root, with two children of half its content each. */
static int split_root(const struct btree *tree, struct bm_block *root, uint64_t key)
{
	struct disk_node *n = node_of(root);
	bool leaf = node_is_leaf(n);
	uint32_t nr = node_nr(n), half = split_point(n, key);
	struct bm_block *left, *right;
	int r = new_node(tree, leaf, &left);

	if (r == 0)
		r = new_node(tree, leaf, &right);
	if (r < 0)
		return r;
	copy_entries(node_of(left), 0, n, 0, half);
	node_set_nr(node_of(left), half);
	copy_entries(node_of(right), 0, n, half, nr - half);
	node_set_nr(node_of(right), nr - half);

	memset(n, 0, sizeof(*n));
	init_node(n, BTREE_INTERNAL, 8);
	insert_entry(n, 0, node_key(node_of(left), 0), &(struct le64){htole64(left->nr)});
	insert_entry(n, 1, node_key(node_of(right), 0), &(struct le64){htole64(right->nr)});
	return 0;
}

/* Split child i of parent, which has room; ret: the half that key belongs to. */
static int split_child(const struct btree *tree, struct disk_node *parent, uint32_t i, struct bm_block *child,
	uint64_t key, struct bm_block **ret)
{
	struct disk_node *left = node_of(child);
	uint32_t nr = node_nr(left), half = split_point(left, key);
	struct bm_block *right;
	int r = new_node(tree, node_is_leaf(left), &right);

	if (r < 0)
		return r;
	copy_entries(node_of(right), 0, left, half, nr - half);
	node_set_nr(node_of(right), nr - half);
	node_set_nr(left, half - BS_BUG(SPLIT_LOSES_AN_ENTRY));
	insert_entry(parent, i + 1, node_key(node_of(right), 0), &(struct le64){htole64(right->nr)});
	*ret = key >= node_key(node_of(right), 0) ? right : child;
	return 0;
}

/* Shadow the child that key belongs to, hook it into its parent. */
static int shadow_child(const struct btree *tree, struct disk_node *parent, uint32_t i, struct bm_block **ret)
{
	int r = shadow_node(tree, node_child(parent, i), ret);

	if (r == 0)
		node_set_child(parent, i, (*ret)->nr);
	return r;
}

static void set_in_leaf(struct disk_node *leaf, uint64_t key, const void *value, bool *ret_added)
{
	int i = node_search(leaf, key);
	bool present = i >= 0 && node_key(leaf, i) == key;

	if (present)
		memcpy(node_value(leaf, i), value, le32_get(leaf->value_size));
	else
		insert_entry(leaf, i + 1, key, value);
	if (ret_added)
		*ret_added = !present;
}

int btree_insert(const struct btree *tree, uint64_t *root, uint64_t key, const void *value, bool *ret_added)
{
	struct bm_block *b;
	int r = shadow_node(tree, *root, &b);

	if (r < 0)
		return r;
	*root = b->nr;
	if (is_full(node_of(b), key)) {
		r = split_root(tree, b, key);
		if (r < 0)
			return r;
	}
	for (int depth = 0; depth < BTREE_MAX_DEPTH; depth++) {
		struct disk_node *n = node_of(b);

		if (node_is_leaf(n)) {
			set_in_leaf(n, key, value, ret_added);
			return 0;
		}
		int i = node_search(n, key);
		if (i < 0) {
			n->keys[0] = BS_BUG(FIRST_KEY_NOT_LOWERED) ? n->keys[0] : le64_of(key);
			i = 0;
		}
		r = shadow_child(tree, n, i, &b);
		if (r == 0 && is_full(node_of(b), key))
			r = split_child(tree, n, i, b, key, &b);
		if (r < 0)
			return r;
	}
	return too_deep(*root);
}

/* ---- removal ---- */

/* Put the content of a root's only child in its place. If the child is shared its entries get one more
 * reference. */
static int collapse(const struct btree *tree, struct disk_node *n)
{
	uint64_t nr = node_child(n, 0);
	struct bm_block *child;
	uint32_t count;
	int r = read_node(tree, nr, &child);

	if (r == 0)
		r = tm_count(tree->tm, nr, &count);
	if (r < 0)
		return r;
	memcpy(n, child->data, METADATA_BLOCK_SIZE);
	normalise(n);
	if (count > 1 && !BS_BUG(COLLAPSE_FORGETS_COUNTS))
		r = inc_entries(tree, n);
	return r < 0 ? r : tm_dec(tree->tm, nr);
}

/* Let child i of n, which has no entry to spare, get some from a neighbour or be merged with it. */
static int fill_child(const struct btree *tree, struct disk_node *n, uint32_t i)
{
	struct bm_block *left, *right;
	struct btree uncounted = {.tm = tree->tm, .value_size = tree->value_size};
	uint32_t l = i + 1 < node_nr(n) ? i : i - 1;
	int r = shadow_child(BS_BUG(REBALANCE_FORGETS_COUNTS) ? &uncounted : tree, n, l, &left);

	if (r == 0)
		r = shadow_child(BS_BUG(REBALANCE_FORGETS_COUNTS) ? &uncounted : tree, n, l + 1, &right);
	if (r < 0)
		return r;
	struct disk_node *a = node_of(left), *b = node_of(right);
	uint32_t total = node_nr(a) + node_nr(b);
	if (total < (BS_BUG(MERGE_TOO_LATE) ? 1u : 2u) * (node_max(a) / 3 + 1)) {
		shift_left(a, b, node_nr(b));
		delete_entry(n, l + 1);
		return BS_BUG(MERGED_NODE_KEPT) ? 0 : tm_dec(tree->tm, right->nr);
	}
	if (node_nr(a) < total / 2)
		shift_left(a, b, total / 2 - node_nr(a));
	else
		shift_right(a, b, node_nr(a) - total / 2);
	n->keys[l + 1] = BS_BUG(SEPARATOR_NOT_MOVED) ? n->keys[l + 1] : b->keys[0];
	return 0;
}

static int remove_from_leaf(const struct btree *tree, struct disk_node *leaf, uint64_t key)
{
	int i = node_search(leaf, key);
	int r = 0;

	if (i < 0 || node_key(leaf, i) != key)
		return bs_fail(-EUCLEAN, "key %" PRIu64 " went missing in its tree: run pool check", key);
	if (tree->dec && !BS_BUG(DISCARD_KEEPS_DATA_BLOCK))
		r = tree->dec(tree->context, node_value(leaf, i));
	delete_entry(leaf, i);
	return r < 0 ? r : 1;
}

int btree_remove(const struct btree *tree, uint64_t *root, uint64_t key)
{
	unsigned char value[BTREE_MAX_VALUE_SIZE];
	struct bm_block *b, *child;
	int r = btree_lookup(tree, *root, key, value);

	if (r <= 0)
		return r;
	r = shadow_node(tree, *root, &b);
	if (r < 0)
		return r;
	*root = b->nr;
	/* Each level can take one filling of its child and the root one collapse more. */
	for (int steps = 0; steps < 3 * BTREE_MAX_DEPTH; steps++) {
		struct disk_node *n = node_of(b);

		if (node_is_leaf(n))
			return remove_from_leaf(tree, n, key);
		if (node_nr(n) == 1) {
			r = collapse(tree, n);
			if (r < 0)
				return r;
			continue;
		}
		int i = node_search(n, key);
		if (i < 0)
			return bs_fail(
				-EUCLEAN, "key %" PRIu64 " went missing in its tree: run pool check", key);
		r = shadow_child(tree, n, i, &child);
		if (r < 0)
			return r;
		if (node_nr(node_of(child)) > node_max(node_of(child)) / 3) {
			b = child;
			continue;
		}
		r = fill_child(tree, n, i);
		if (r < 0)
			return r;
	}
	return too_deep(*root);
}

/* ---- deletion of a whole tree ---- */

struct block_stack {
	uint64_t *blocks;
	size_t nr, capacity;
};

static int stack_push(struct block_stack *stack, uint64_t block)
{
	if (stack->nr == stack->capacity) {
		size_t capacity = stack->capacity ? stack->capacity * 2 : 1024;
		uint64_t *blocks = realloc(stack->blocks, capacity * sizeof(*blocks));

		if (!blocks)
			return bs_fail(-ENOMEM, "out of memory");
		stack->blocks = blocks;
		stack->capacity = capacity;
	}
	stack->blocks[stack->nr++] = block;
	return 0;
}

/* Drop a node; when that was its last reference, go on with what it refers to. Works on a copy: dec may
 * delete a tree of its own, which trims the cache. */
static int delete_node(const struct btree *tree, uint64_t nr, struct block_stack *stack)
{
	struct disk_node n;
	struct bm_block *b;
	uint32_t count;
	int r = tm_count(tree->tm, nr, &count);

	if (r == 0 && (count == 1 || BS_BUG(DELETE_GOES_INTO_SHARED))) {
		r = read_node(tree, nr, &b);
		if (r == 0)
			memcpy(&n, b->data, sizeof(n));
		for (uint32_t i = 0; r == 0 && i < node_nr(&n); i++) {
			if (!node_is_leaf(&n))
				r = stack_push(stack, node_child(&n, i));
			else if (tree->dec)
				r = tree->dec(tree->context, node_value(&n, i));
		}
	}
	return r < 0 ? r : tm_dec(tree->tm, nr);
}

int btree_delete(const struct btree *tree, uint64_t root)
{
	struct block_stack stack = {0};
	int r = stack_push(&stack, root);

	while (r == 0 && stack.nr) {
		r = delete_node(tree, stack.blocks[--stack.nr], &stack);
		bm_trim(tree->tm->bm);
	}
	free(stack.blocks);
	return r;
}
