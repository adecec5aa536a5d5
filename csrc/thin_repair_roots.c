/*
 * Finding the roots when the superblock does not lead to them. Metadata are never updated in place, so beside the
 * trees of the last commit lie older ones, more or less overwritten. Any node that can be the root of a details tree
 * or of a top-level tree is a candidate; what the superblock names is one too.
 *
 * A pair is of one moment if both trees name the same devices, every mapping tree is whole and has as many mappings
 * as the details say. The best of these wins: what a good superblock names; then the newest by transaction ids and
 * times, provided that a bitmap of the metadata space map, itself in use by its own word, counts both roots: the
 * bitmaps of older commits are overwritten soon. If there is no such pair, one with the same devices will do, then a
 * top-level tree alone.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "crc32c.h"
#include "error.h"
#include "thin_repair.h"

#define MAX_WITNESSES 4096

struct candidate {
	uint64_t block;
	uint64_t nr; /* devices */
	uint64_t devices_hash, counts_hash;
	uint64_t transaction_id;
	uint64_t age; /* grows with each change but discards: mappings, or more exactly their ages */
	uint32_t time;
	bool whole;
	bool held;      /* by a metadata snapshot: older than the rest */
	bool preferred; /* the superblock names it */
	bool witnessed; /* a bitmap counts it */
};

struct candidates {
	struct candidate *list;
	size_t nr, capacity;
};

struct search {
	struct repair *r;
	struct candidates details, top_level;
	uint64_t *held; /* roots that copies of the superblock name */
	size_t nr_held, held_capacity;
	uint64_t *indices; /* index blocks of metadata space maps */
	size_t nr_indices, index_capacity;
	uint32_t latest_time; /* of copies of the superblock */
	int error;
};

static bool grow(struct search *s, void **array, size_t *capacity, size_t nr, size_t size)
{
	size_t wanted = *capacity ? 2 * *capacity : 64;

	if (nr < *capacity)
		return true;
	void *grown = reallocarray(*array, wanted, size);
	if (!grown) {
		s->error = bs_fail(-ENOMEM, "out of memory");
		return false;
	}
	*array = grown;
	*capacity = wanted;
	return true;
}

static void add_candidate(struct search *s, struct candidates *to, uint64_t block)
{
	if (grow(s, (void **)&to->list, &to->capacity, to->nr, sizeof(*to->list)))
		to->list[to->nr++] = (struct candidate){.block = block};
}

static void add_block(struct search *s, uint64_t **list, size_t *nr, size_t *capacity, uint64_t block)
{
	if (grow(s, (void **)list, capacity, *nr, sizeof(**list)))
		(*list)[(*nr)++] = block;
}

/* ---- what each block is */

static void meet_superblock(struct search *s, const struct disk_superblock *copy)
{
	struct pool_facts *facts = &s->r->facts;
	uint32_t time = le32_get(copy->time);

	if (le64_get(copy->magic) != SUPERBLOCK_MAGIC)
		return;
	add_block(s, &s->held, &s->nr_held, &s->held_capacity, le64_get(copy->data_mapping_root));
	add_block(s, &s->held, &s->nr_held, &s->held_capacity, le64_get(copy->device_details_root));
	if (facts->data_block_sectors == 0)
		facts->data_block_sectors = le32_get(copy->data_block_size);
	if (facts->transaction_id < le64_get(copy->trans_id) && !s->r->trusted)
		facts->transaction_id = le64_get(copy->trans_id);
	if (time <= MAX_TIME && time > s->latest_time)
		s->latest_time = time;
}

/* A leaf whose keys can be device ids and whose values can be roots. Data blocks are in the upper bits of a mapping:
 * only those of data block 0 look the same. */
static bool can_be_top_level(const struct search *s, const struct disk_node *leaf)
{
	for (uint32_t i = 0; i < node_nr(leaf); i++) {
		uint64_t root = node_value64(leaf, i);

		if (node_key(leaf, i) > MAX_DEVICE_ID || root == 0 || root >= s->r->r.nr_blocks)
			return false;
	}
	return true;
}

/* Go down from an internal node, along one edge, to a leaf of either kind. */
static bool find_edge_leaf(const struct search *s, bool last, struct disk_node *node)
{
	for (int depth = 1; depth < BTREE_MAX_DEPTH && !node_is_leaf(node); depth++) {
		uint64_t child = node_value64(node, last ? node_nr(node) - 1 : 0);

		if (metadata_read_block(&s->r->r, child, node))
			return false;
		if (metadata_node_check(&s->r->r, node, child, sizeof(uint64_t)) &&
			metadata_node_check(&s->r->r, node, child, sizeof(struct disk_device_details)))
			return false;
	}
	return node_is_leaf(node);
}

static void meet_internal(struct search *s, uint64_t block, const struct disk_node *found)
{
	struct disk_node *leaf = &s->r->path[0];
	bool known = false;

	for (int last = 0; last < 2 && !known; last++) {
		*leaf = *found;
		known = find_edge_leaf(s, last, leaf);
	}
	if (known && le32_get(leaf->value_size) == sizeof(struct disk_device_details))
		add_candidate(s, &s->details, block);
	else if (known && can_be_top_level(s, leaf))
		add_candidate(s, &s->top_level, block);
}

static void meet_node(struct search *s, uint64_t block, const struct disk_node *node)
{
	if (metadata_node_check(&s->r->r, node, block, sizeof(struct disk_device_details)) == 0) {
		if (node_is_leaf(node))
			add_candidate(s, &s->details, block);
		else
			meet_internal(s, block, node);
	} else if (metadata_node_check(&s->r->r, node, block, sizeof(uint64_t)) == 0 &&
		   can_be_top_level(s, node)) {
		add_candidate(s, &s->top_level, block);
	}
}

static void meet_block(struct search *s, uint64_t block, const void *data)
{
	const struct disk_bitmap *head = data; /* all blocks begin alike */
	uint32_t csum = le32_get(head->csum), plain = block_checksum(data, 0);

	if (le64_get(head->blocknr) != block)
		return;
	if (csum == (plain ^ BTREE_NODE_SALT))
		meet_node(s, block, data);
	else if (csum == (plain ^ SUPERBLOCK_SALT))
		meet_superblock(s, data);
	else if (csum == (plain ^ INDEX_SALT) && s->nr_indices < MAX_WITNESSES)
		add_block(s, &s->indices, &s->nr_indices, &s->index_capacity, block);
}

static int scan(struct search *s)
{
	char *buffer = malloc((size_t)WALK_BATCH * METADATA_BLOCK_SIZE);
	uint64_t blocks[WALK_BATCH];
	bool ok[WALK_BATCH];

	if (!buffer)
		return bs_fail(-ENOMEM, "out of memory");
	for (uint64_t block = 1; block < s->r->r.nr_blocks && !s->error;) {
		uint32_t nr = 0;

		while (nr < WALK_BATCH && block < s->r->r.nr_blocks)
			blocks[nr++] = block++;
		metadata_read_batch(&s->r->r, blocks, nr, buffer, ok);
		for (uint32_t i = 0; i < nr; i++) {
			char *data = buffer + (size_t)i * METADATA_BLOCK_SIZE;

			if (ok[i] || metadata_read_block(&s->r->r, blocks[i], data) == 0)
				meet_block(s, blocks[i], data);
		}
	}
	free(buffer);
	return s->error;
}

/* ---- what a candidate holds */

static uint64_t mix(uint64_t hash, uint64_t value)
{
	hash = (hash ^ value) * 0x9e3779b97f4a7c15ull;
	return hash ^ hash >> 29;
}

static bool is_held(const struct search *s, uint64_t block)
{
	for (size_t i = 0; i < s->nr_held; i++)
		if (s->held[i] == block)
			return true;
	return false;
}

static void look_at_details(struct search *s, struct candidate *c)
{
	struct repair *r = s->r;

	r->unread = 0;
	c->whole = repair_read_details(r, c->block) && r->unread == 0;
	c->nr = r->nr_devices;
	for (size_t i = 0; i < r->nr_devices; i++) {
		const struct disk_device_details *details = &r->devices[i].details;
		uint64_t transaction_id = le64_get(details->transaction_id);
		uint32_t time = le32_get(details->snapshotted_time);

		c->devices_hash = mix(c->devices_hash, r->devices[i].id);
		c->counts_hash = mix(c->counts_hash, le64_get(details->mapped_blocks));
		c->age += le64_get(details->mapped_blocks);
		c->transaction_id = transaction_id > c->transaction_id ? transaction_id : c->transaction_id;
		c->time = time > c->time && time <= MAX_TIME ? time : c->time;
	}
	r->nr_devices = 0;
}

static void look_at_top_level(struct search *s, struct candidate *c)
{
	struct repair *r = s->r;

	r->unread = 0;
	c->whole = repair_read_top_level(r, c->block) && r->unread == 0;
	c->nr = r->nr_devices;
	for (size_t i = 0; i < r->nr_devices; i++) {
		const struct node_info *info = repair_assess(r, NOBODY, r->devices[i].root, 0);

		c->devices_hash = mix(c->devices_hash, r->devices[i].id);
		c->counts_hash = mix(c->counts_hash, info ? info->entries : 0);
		c->whole &= info && !info->lossy;
		c->time = info && info->max_time > c->time ? info->max_time : c->time;
		c->age += info ? info->age : 0;
	}
	r->nr_devices = 0;
}

static void look_at_all(struct search *s)
{
	for (size_t i = 0; i < s->details.nr && !s->r->error; i++) {
		struct candidate *c = &s->details.list[i];

		look_at_details(s, c);
		c->held = is_held(s, c->block);
		c->preferred = c->block == s->r->details_root;
	}
	for (size_t i = 0; i < s->top_level.nr && !s->r->error; i++) {
		struct candidate *c = &s->top_level.list[i];

		look_at_top_level(s, c);
		c->held = is_held(s, c->block);
		c->preferred = c->block == s->r->mapping_root;
	}
}

/* ---- witnesses */

static int read_bitmap(const struct search *s, uint64_t block, struct disk_bitmap *ret)
{
	int err = metadata_read_block(&s->r->r, block, ret);

	if (err)
		return err;
	if (le32_get(ret->csum) != block_checksum(ret, BITMAP_SALT) || le64_get(ret->blocknr) != block)
		return bs_fail(-EILSEQ, "no bitmap");
	return 0;
}

/* Candidates come in the order of their blocks: each bitmap is read once. */
static void witness(
	const struct search *s, const struct disk_metadata_index *index, const struct candidates *candidates)
{
	struct disk_bitmap bitmap;
	uint64_t loaded = UINT64_MAX;
	int err = 0;

	for (size_t i = 0; i < candidates->nr; i++) {
		struct candidate *c = &candidates->list[i];
		uint64_t nr = c->block / ENTRIES_PER_BITMAP;

		if (nr != loaded)
			err = read_bitmap(s, le64_get(index->entries[nr].blocknr), &bitmap);
		loaded = nr;
		c->witnessed |= !err && bitmap_get(&bitmap, c->block % ENTRIES_PER_BITMAP) > 0;
	}
}

static void hear_witness(struct search *s, uint64_t block)
{
	struct disk_metadata_index index;
	struct disk_bitmap bitmap;

	if (metadata_read_block(&s->r->r, block, &index) ||
		read_bitmap(s, le64_get(index.entries[block / ENTRIES_PER_BITMAP].blocknr), &bitmap) ||
		bitmap_get(&bitmap, block % ENTRIES_PER_BITMAP) == 0)
		return;
	witness(s, &index, &s->details);
	witness(s, &index, &s->top_level);
}

/* ---- pairs */

static int compare(uint64_t left, uint64_t right)
{
	return (left > right) - (left < right);
}

/* The better one first. */
static int compare_worth(const struct candidate *l, const struct candidate *r)
{
	int order = compare(r->preferred, l->preferred);

	if (order == 0)
		order = compare(l->held, r->held);
	if (order == 0)
		order = compare(r->witnessed, l->witnessed);
	if (order == 0)
		order = compare(r->nr > 0, l->nr > 0);
	if (order == 0)
		order = compare(r->transaction_id, l->transaction_id);
	if (order == 0)
		order = compare(r->time, l->time);
	if (order == 0)
		order = compare(r->nr, l->nr);
	return order ? order : compare(r->age, l->age);
}

static int by_worth(const void *left, const void *right)
{
	return compare_worth(left, right);
}

static int compare_devices(const struct candidate *l, const struct candidate *r)
{
	int order = compare(l->nr, r->nr);

	return order ? order : compare(l->devices_hash, r->devices_hash);
}

static int compare_moment(const struct candidate *l, const struct candidate *r)
{
	int order = compare_devices(l, r);

	if (order == 0)
		order = compare(r->whole, l->whole);
	return order ? order : compare(l->counts_hash, r->counts_hash);
}

/* Those of one moment together, the best of them first. */
static int by_moment(const void *left, const void *right)
{
	int order = compare_moment(left, right);

	return order ? order : compare_worth(left, right);
}

static int by_devices(const void *left, const void *right)
{
	int order = compare_devices(left, right);

	return order ? order : compare_worth(left, right);
}

typedef int candidate_order(const struct candidate *l, const struct candidate *r);

/* The first of the sorted ones that is equal in some respect. */
static const struct candidate *find_first(
	const struct candidates *list, const struct candidate *like, candidate_order *order)
{
	size_t low = 0, high = list->nr;

	while (low < high) {
		size_t middle = (low + high) / 2;

		if (order(&list->list[middle], like) < 0)
			low = middle + 1;
		else
			high = middle;
	}
	return low < list->nr && order(&list->list[low], like) == 0 ? &list->list[low] : NULL;
}

struct pair {
	const struct candidate *details, *top_level;
};

static bool is_better(const struct pair *left, const struct pair *right)
{
	if (!right->details)
		return true;
	bool l_witnessed = left->details->witnessed && left->top_level->witnessed;
	bool r_witnessed = right->details->witnessed && right->top_level->witnessed;
	int order = compare(right->top_level->preferred, left->top_level->preferred);
	if (order == 0)
		order = compare(r_witnessed, l_witnessed);
	if (order == 0)
		order = compare_worth(left->details, right->details);
	return (order ? order : compare_worth(left->top_level, right->top_level)) < 0;
}

/* The best pair that is equal in some respect. Both lists are sorted by moment. */
static struct pair best_pair(const struct search *s, candidate_order *order)
{
	struct pair best = {NULL, NULL};

	for (size_t i = 0; i < s->details.nr; i++) {
		const struct candidate *c = &s->details.list[i];
		struct pair pair = {c, find_first(&s->top_level, c, order)};

		if (pair.top_level && (c->whole || order == compare_devices) && is_better(&pair, &best))
			best = pair;
	}
	return best;
}

static const struct candidate *find_preferred(const struct candidates *list)
{
	for (size_t i = 0; i < list->nr; i++)
		if (list->list[i].preferred)
			return &list->list[i];
	return NULL;
}

/* What a good superblock names needs no rival. */
static void only_preferred(struct candidates *list)
{
	const struct candidate *preferred = find_preferred(list);

	if (!preferred)
		return;
	list->list[0] = *preferred;
	list->nr = 1;
}

static void sort(struct search *s, int (*order)(const void *, const void *))
{
	if (s->details.nr)
		qsort(s->details.list, s->details.nr, sizeof(*s->details.list), order);
	if (s->top_level.nr)
		qsort(s->top_level.list, s->top_level.nr, sizeof(*s->top_level.list), order);
}

/* ret_how: what kind of pair it is. */
static struct pair choose(struct search *s, const char **ret_how)
{
	struct pair named = {find_preferred(&s->details), find_preferred(&s->top_level)}, pair;

	*ret_how = "named by the superblock";
	if (named.details && named.top_level && compare_devices(named.details, named.top_level) == 0)
		return named;
	if (s->r->trusted) {
		only_preferred(&s->details);
		only_preferred(&s->top_level);
	}
	sort(s, by_moment);
	pair = best_pair(s, compare_moment);
	*ret_how = "of one moment";
	if (pair.details)
		return pair;
	sort(s, by_devices);
	pair = best_pair(s, compare_devices);
	*ret_how = "of two moments";
	if (pair.details || s->top_level.nr == 0)
		return pair;
	sort(s, by_worth);
	*ret_how = "that name different devices";
	return (struct pair){find_preferred(&s->details), s->top_level.list};
}

static int take_best(struct search *s)
{
	struct repair *r = s->r;
	const char *how;
	struct pair pair = choose(s, &how);

	if (!pair.top_level)
		return bs_fail(-EILSEQ, "there are no mapping trees: nothing can be saved");
	uint64_t details = pair.details ? pair.details->block : 0;
	if (details == r->details_root && pair.top_level->block == r->mapping_root && details)
		return 0;
	r->result.roots_found = 1;
	r->details_root = details;
	r->mapping_root = pair.top_level->block;
	if (details)
		repair_tell_changed(r, NO_DEVICE,
			"superblock: roots found by searching: details tree at block %" PRIu64
			", top-level tree at block %" PRIu64 ", %s",
			details, r->mapping_root, how);
	else
		repair_tell_changed(r, NO_DEVICE,
			"superblock: top-level tree found by searching at block %" PRIu64 ", no details tree",
			r->mapping_root);
	if (!r->time_known && r->facts.time < pair.top_level->time)
		r->facts.time = pair.top_level->time;
	return 0;
}

/* What the superblock names counts even if it does not look like what it should be. */
static void add_named(struct search *s, struct candidates *to, uint64_t root)
{
	for (size_t i = 0; i < to->nr; i++)
		if (to->list[i].block == root)
			return;
	if (root)
		add_candidate(s, to, root);
}

static int search(struct search *s)
{
	struct repair *r = s->r;
	struct text_output *out = r->out;

	/* While trying nothing is told, and no mapping is too late or beyond the data. */
	r->out = NULL;
	r->nr_data = UINT64_MAX;
	r->latest_time = MAX_TIME;
	r->trying = true;
	int err = scan(s);
	if (!err) {
		add_named(s, &s->details, r->details_root);
		add_named(s, &s->top_level, r->mapping_root);
		look_at_all(s);
	}
	for (size_t i = 0; i < s->nr_indices; i++)
		hear_witness(s, s->indices[i]);
	r->out = out;
	r->trying = false;
	if (!r->time_known && r->facts.time < s->latest_time)
		r->facts.time = s->latest_time;
	repair_forget(r);
	return err ? err : r->error;
}

int repair_find_roots(struct repair *r)
{
	struct search s = {.r = r};
	int err = search(&s);

	if (!err)
		err = take_best(&s);
	free(s.details.list);
	free(s.top_level.list);
	free(s.held);
	free(s.indices);
	return err;
}
