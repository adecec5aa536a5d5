/*
 * How many data blocks each thin device maps, and how many of them no other device reaches.
 *
 * Every node and every data block remembers the first device that reached it; a second device makes it
 * shared. A node is read at most twice, once for its owner and once, with everything below it, when it
 * becomes shared. Memory: 16 bytes a metadata block, 4 a data block up to the last one in use.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "blocksnap.h"
#include "error.h"
#include "metadata_reader.h"

#define OWNER_SHARED UINT32_MAX

struct owner_node {
	uint64_t mappings; /* in the leaves below */
	uint32_t owner;    /* 0 none yet, 1 + index of a device, or OWNER_SHARED */
};

struct usage {
	struct metadata_reader r;
	struct owner_node *nodes;
	uint32_t *owners; /* of data blocks, as above */
	uint64_t nr_data;
	uint64_t data_end; /* behind the last data block that is mapped */
	struct bs_usage *devices;
	size_t nr_devices, capacity;
};

struct usage_level {
	struct disk_node node;
	uint64_t block, high;
	uint32_t index;
};

/* One device's walk; owner is what unowned things get. */
struct usage_walk {
	struct usage *u;
	uint32_t owner;
	int depth, leaf_depth;
	struct usage_level levels[BTREE_MAX_DEPTH];
};

static uint32_t merge_owner(uint32_t old, uint32_t owner)
{
	return old == 0 || old == owner ? owner : OWNER_SHARED;
}

static int own_data(struct usage *u, const struct disk_node *leaf, uint32_t owner)
{
	uint32_t nr = node_nr(leaf);

	for (uint32_t i = 0; i < nr; i++) {
		uint64_t block = mapping_block(node_value64(leaf, i));

		if (block >= u->nr_data)
			return bs_fail(-EILSEQ,
				"%sthin block %" PRIu64 " is mapped to data block %" PRIu64 " of %" PRIu64,
				u->r.prefix, node_key(leaf, i), block, u->nr_data);
		u->owners[block] = merge_owner(u->owners[block], owner);
		u->data_end = block >= u->data_end ? block + 1 : u->data_end;
	}
	return 0;
}

static int push_node(struct usage_walk *w, uint64_t block, uint64_t low, uint64_t high)
{
	struct usage_level *level = &w->levels[w->depth];
	int err = metadata_read_block(&w->u->r, block, &level->node);

	if (!err)
		err = metadata_node_check(&w->u->r, &level->node, block, sizeof(uint64_t));
	if (!err)
		err = metadata_place_check(
			&w->u->r, &level->node, block, w->depth + 1, &w->leaf_depth, low, high);
	if (err)
		return err;
	level->block = block;
	level->high = high;
	level->index = 0;
	w->depth++;
	return 0;
}

/* Go below a node unless all that is to be known of it is known; its mappings count for the parent either
 * way. */
static int visit(struct usage_walk *w, uint64_t block, uint64_t low, uint64_t high)
{
	if (block >= w->u->r.nr_blocks)
		return metadata_read_block(&w->u->r, block, NULL); /* tells why not */
	struct owner_node *known = &w->u->nodes[block];
	uint32_t owner = merge_owner(known->owner, w->owner);
	if (owner == known->owner) {
		if (w->depth > 0)
			w->u->nodes[w->levels[w->depth - 1].block].mappings += known->mappings;
		return 0;
	}
	known->owner = owner;
	known->mappings = 0;
	return push_node(w, block, low, high);
}

static int visit_child(struct usage_walk *w, struct usage_level *level)
{
	uint32_t i = level->index++;
	uint64_t high = i + 1 < node_nr(&level->node) ? node_key(&level->node, i + 1) - 1 : level->high;

	return visit(w, node_value64(&level->node, i), node_key(&level->node, i), high);
}

/* The deepest node is done. */
static void pop_node(struct usage_walk *w)
{
	uint64_t mappings = w->u->nodes[w->levels[--w->depth].block].mappings;

	if (w->depth > 0)
		w->u->nodes[w->levels[w->depth - 1].block].mappings += mappings;
}

static int walk_device(struct usage_walk *w, uint64_t root)
{
	int err = visit(w, root, 0, UINT64_MAX);

	while (!err && w->depth > 0) {
		struct usage_level *level = &w->levels[w->depth - 1];
		struct owner_node *known = &w->u->nodes[level->block];

		if (node_is_leaf(&level->node)) {
			known->mappings = node_nr(&level->node);
			err = own_data(w->u, &level->node, known->owner);
			pop_node(w);
		} else if (level->index < node_nr(&level->node)) {
			err = visit_child(w, level);
		} else {
			pop_node(w);
		}
	}
	return err;
}

static int add_device(struct usage *u, uint64_t id)
{
	if (id > MAX_DEVICE_ID)
		return bs_fail(-EILSEQ, "%sthin device id %" PRIu64 " is too large", u->r.prefix, id);
	if (u->nr_devices == u->capacity) {
		size_t capacity = u->capacity ? u->capacity * 2 : 64;
		struct bs_usage *devices = reallocarray(u->devices, capacity, sizeof(*devices));

		if (!devices)
			return bs_fail(-ENOMEM, "%sout of memory", u->r.prefix);
		u->devices = devices;
		u->capacity = capacity;
	}
	u->devices[u->nr_devices++] = (struct bs_usage){.id = (uint32_t)id};
	return 0;
}

static int walk_devices(struct usage *u, struct usage_walk *w)
{
	struct device_walk devices;
	struct device_entry device;
	int found = device_walk_init(&devices, &u->r);

	while (found >= 0 && (found = device_walk_next(&devices, &device)) > 0) {
		int err = add_device(u, device.id);

		memset(w, 0, offsetof(struct usage_walk, levels));
		w->u = u;
		w->owner = (uint32_t)u->nr_devices;
		if (!err)
			err = walk_device(w, device.root);
		if (err)
			found = err;
		else
			u->devices[u->nr_devices - 1].mapped_blocks = u->nodes[device.root].mappings;
	}
	device_walk_deinit(&devices);
	return found;
}

static int usage_init(struct usage *u)
{
	u->nr_data = le64_get(u->r.superblock.data_sm_root.nr_blocks);
	if (u->nr_data > u->r.file_blocks * ENTRIES_PER_BITMAP)
		return bs_fail(-EILSEQ,
			"%s%" PRIu64 " data blocks need more bitmaps than the metadata has blocks",
			u->r.prefix, u->nr_data);
	u->nodes = calloc(u->r.nr_blocks, sizeof(*u->nodes));
	if (!u->nodes)
		return bs_fail(-ENOMEM, "%sout of memory", u->r.prefix);
	if (u->nr_data == 0)
		return 0;
	void *memory = mmap(NULL, u->nr_data * sizeof(*u->owners), PROT_READ | PROT_WRITE,
		MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (memory == MAP_FAILED)
		return bs_fail(-ENOMEM, "%sno memory for the owners of %" PRIu64 " data blocks", u->r.prefix,
			u->nr_data);
	u->owners = memory;
	return 0;
}

static void usage_deinit(struct usage *u)
{
	if (u->owners)
		munmap(u->owners, u->nr_data * sizeof(*u->owners));
	free(u->nodes);
	free(u->devices);
	metadata_reader_deinit(&u->r);
}

static void count_exclusive(struct usage *u)
{
	for (uint64_t block = 0; block < u->data_end; block++)
		if (u->owners[block] != 0 && u->owners[block] != OWNER_SHARED)
			u->devices[u->owners[block] - 1].exclusive_blocks++;
}

int bs_metadata_usage(const char *metadata, int held, struct bs_usage *out, int capacity)
{
	struct usage u = {0};
	struct usage_walk *walk = malloc(sizeof(*walk));
	int err = metadata_reader_open(&u.r, metadata, held);

	if (!err && !walk)
		err = bs_fail(-ENOMEM, "%s: out of memory", metadata);
	if (!err)
		err = usage_init(&u);
	if (!err)
		err = walk_devices(&u, walk);
	if (!err) {
		count_exclusive(&u);
		err = (int)u.nr_devices;
		for (int i = 0; i < err && i < capacity; i++)
			out[i] = u.devices[i];
	}
	free(walk);
	usage_deinit(&u);
	return err;
}
