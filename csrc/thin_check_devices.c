/*
 * Thin devices: the details tree, the top-level tree, each device's mapping tree, and what mappings may say.
 *
 * Sharing. A mapping is taken for shared if and only if the device's snapshotted_time is later than the
 * mapping's time; a shared block that looks unshared would be overwritten in place. One pass proves that it
 * cannot happen:
 *  - a node met again is shared with all below, so its latest time must be earlier than the snapshotted_time
 * of the device that meets it and of the one that met it first;
 *  - a mapping that looks unshared claims its data block; a claimed block must not be named twice.
 * References of a held metadata snapshot do not count here (the kernel overwrites such blocks in place), so
 * its trees are walked after the live ones and only counted.
 *
 * A block named twice should have the same thin block and time each time; 24 bits of a hash of both are
 * remembered, which is enough for a warning.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "error.h"
#include "thin_check.h"

/* ---- data cells */

/* Anonymous memory is zero and takes no room before it is touched: a large, mostly empty pool costs little.
 */
int data_cells_init(struct data_cells *data, uint64_t nr)
{
	count_map_init(&data->large);
	data->nr = nr;
	data->used = 0;
	data->cells = NULL;
	if (nr == 0)
		return 0;
	void *memory = mmap(NULL, nr * sizeof(*data->cells), PROT_READ | PROT_WRITE,
		MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (memory == MAP_FAILED) {
		data->nr = 0;
		return bs_fail(-ENOMEM, "no memory to count %" PRIu64 " data blocks", nr);
	}
	data->cells = memory;
	return 0;
}

void data_cells_deinit(struct data_cells *data)
{
	if (data->cells)
		munmap(data->cells, data->nr * sizeof(*data->cells));
	count_map_deinit(&data->large);
}

uint64_t data_cells_count(const struct data_cells *data, uint64_t block)
{
	uint32_t count = data->cells[block] & CELL_COUNT;
	const struct count_entry *entry = count == CELL_COUNT ? count_map_find(&data->large, block) : NULL;

	return entry ? entry->count : count;
}

static bool add_reference(struct data_cells *data, uint64_t block)
{
	uint32_t *cell = &data->cells[block];
	struct count_entry *entry;

	if ((*cell & CELL_COUNT) < CELL_COUNT - 1) {
		++*cell;
		return true;
	}
	entry = count_map_add(&data->large, block, NULL);
	if (!entry)
		return false;
	if (entry->count == 0) {
		entry->count = CELL_COUNT - 1;
		*cell |= CELL_COUNT;
	}
	entry->count += entry->count < UINT32_MAX;
	return true;
}

/* ---- one device's mappings */

struct check_device {
	uint64_t id, root;
	struct disk_device_details details;
	bool has_details, has_root;
	bool root_known; /* the root pointer lies in a leaf that was met before */
};

/* What the leaf callbacks of one set need. */
struct device_context {
	const struct device_set *set;
	struct check_device *devices;
	size_t nr_devices, capacity;
	uint32_t snapshotted_time;
};

/* Mappings of one leaf with the same fault: one finding for all. */
struct tally {
	uint64_t count;
	uint64_t thin_block, data_block;
	uint32_t time;
};

static void tally_add(struct tally *tally, uint64_t thin_block, uint64_t value)
{
	if (tally->count++ == 0)
		*tally = (struct tally){1, thin_block, mapping_block(value), mapping_time(value)};
}

static void tell_tally(struct tree_check *t, enum severity severity, const struct tally *tally,
	const char *one, const char *many)
{
	if (tally->count > 0)
		tree_finding(t, severity,
			"%" PRIu64 " mapping%s %s, first thin block %" PRIu64 " -> data block %" PRIu64
			" of time %u",
			tally->count, tally->count == 1 ? "" : "s", tally->count == 1 ? one : many,
			tally->thin_block, tally->data_block, tally->time);
}

struct leaf_tallies {
	struct tally outside, future, unsafe, claimed, different;
};

static void tell_tallies(struct tree_check *t, const struct leaf_tallies *tallies)
{
	tell_tally(t, FATAL, &tallies->outside, "names a data block beyond the pool",
		"name data blocks beyond the pool");
	tell_tally(t, FATAL, &tallies->future, "is later than the pool's time",
		"are later than the pool's time");
	tell_tally(t, FATAL, &tallies->unsafe,
		"looks unshared (time not before the device's snapshotted_time) but the data block is shared",
		"look unshared (time not before the device's snapshotted_time) but the data blocks are "
		"shared");
	tell_tally(t, FATAL, &tallies->claimed, "names a data block that another mapping takes for unshared",
		"name data blocks that another mapping takes for unshared");
	tell_tally(t, WARNING, &tallies->different,
		"shares its data block with a mapping of other thin block or time",
		"share their data blocks with mappings of other thin blocks or times");
}

static uint32_t signature(uint64_t thin_block, uint32_t time)
{
	return (uint32_t)((thin_block * 0x9e3779b97f4a7c15ull + time * 0xc2b2ae3d27d4eb4full) >> 32) &
	       CELL_SIGNATURE;
}

/* A data block that has a reference already. */
static void check_shared(
	uint32_t *cell, uint32_t fresh, uint64_t key, uint64_t value, struct leaf_tallies *tallies)
{
	if (fresh & CELL_CLAIMED)
		tally_add(&tallies->unsafe, key, value);
	else if (*cell & CELL_CLAIMED)
		tally_add(&tallies->claimed, key, value);
	else if ((*cell ^ fresh) & CELL_SIGNATURE)
		tally_add(&tallies->different, key, value);
	*cell |= fresh & CELL_CLAIMED;
}

static void mapping_leaf(struct tree_check *t, const struct disk_node *leaf, bool known)
{
	struct check *c = t->c;
	struct device_context *context = t->context;
	struct block_info *info = &c->blocks[t->frames[t->depth].block];
	struct leaf_tallies tallies = {0};
	uint32_t nr = node_nr(leaf), latest = 0;

	(void)known; /* mapping trees are not opened twice */
	for (uint32_t i = 0; i < nr; i++) {
		uint64_t key = node_key(leaf, i), value = node_value64(leaf, i), block = mapping_block(value);
		uint32_t time = mapping_time(value);
		uint32_t fresh =
			signature(key, time) | (time >= context->snapshotted_time ? CELL_CLAIMED : 0) | 1;

		latest = time > latest ? time : latest;
		if (time > context->set->time)
			tally_add(&tallies.future, key, value);
		if (block >= c->data.nr) {
			tally_add(&tallies.outside, key, value);
			continue;
		}
		uint32_t *cell = &c->data.cells[block];
		if (*cell == 0) {
			*cell = fresh;
			c->data.used++;
			continue;
		}
		if (context->set->live)
			check_shared(cell, fresh, key, value, &tallies);
		if (!add_reference(&c->data, block))
			c->error = bs_fail(-ENOMEM, "out of memory");
	}
	info->max_time = latest;
	tell_tallies(t, &tallies);
}

static void mapping_known(struct tree_check *t, struct block_info *info)
{
	struct device_context *context = t->context;

	if (!context->set->live || info->entries == 0)
		return;
	if (info->max_time >= context->snapshotted_time)
		tree_finding(t, FATAL,
			"mappings of time %u lie in a shared node, the device's snapshotted_time is %u: they "
			"look unshared",
			info->max_time, context->snapshotted_time);
	const struct check_device *owner = &context->devices[info->owner];
	uint32_t owner_time = le32_get(owner->details.snapshotted_time);
	if (owner->has_details && !info->owner_told && info->max_time >= owner_time) {
		info->owner_told = true;
		tree_finding(t, FATAL,
			"mappings of time %u lie in a node shared with device %" PRIu64
			", whose snapshotted_time is %u: they look unshared there",
			info->max_time, owner->id, owner_time);
	}
}

static const struct tree_kind mapping_kind = {
	.role = ROLE_MAPPING,
	.value_size = sizeof(uint64_t),
	.keys = "thin blocks",
	.leaf = mapping_leaf,
	.known = mapping_known,
};

/* ---- the trees of devices */

static struct check_device *add_device(struct check *c, struct device_context *context, uint64_t id)
{
	if (!check_grow(c, (void **)&context->devices, &context->capacity, context->nr_devices,
		    sizeof(*context->devices)))
		return NULL;
	struct check_device *device = &context->devices[context->nr_devices++];
	memset(device, 0, sizeof(*device));
	device->id = id;
	return device;
}

static void details_leaf(struct tree_check *t, const struct disk_node *leaf, bool known)
{
	const struct disk_device_details *details = node_values(leaf);

	(void)known; /* details refer to nothing */
	for (uint32_t i = 0; i < node_nr(leaf); i++) {
		struct check_device *device = add_device(t->c, t->context, node_key(leaf, i));

		if (!device)
			return;
		device->has_details = true;
		device->details = details[i];
	}
}

static void top_level_leaf(struct tree_check *t, const struct disk_node *leaf, bool known)
{
	for (uint32_t i = 0; i < node_nr(leaf); i++) {
		struct check_device *device = add_device(t->c, t->context, node_key(leaf, i));

		if (!device)
			return;
		device->has_root = true;
		device->root = node_value64(leaf, i);
		device->root_known = known;
	}
}

static const struct tree_kind details_kind = {
	.role = ROLE_DETAILS,
	.value_size = sizeof(struct disk_device_details),
	.keys = "devices",
	.revisit = true,
	.leaf = details_leaf,
};

static const struct tree_kind top_level_kind = {
	.role = ROLE_TOP_LEVEL,
	.value_size = sizeof(uint64_t),
	.keys = "devices",
	.revisit = true,
	.leaf = top_level_leaf,
};

static int compare_devices(const void *left, const void *right)
{
	const struct check_device *l = left, *r = right;

	if (l->id != r->id)
		return l->id < r->id ? -1 : 1;
	return (int)r->has_details - (int)l->has_details;
}

/* Bring both halves of each device together. Damaged trees may hold an id several times: the first wins. */
static void join_devices(struct device_context *context)
{
	struct check_device *devices = context->devices;
	size_t used = 0;

	if (context->nr_devices > 0)
		qsort(devices, context->nr_devices, sizeof(*devices), compare_devices);
	for (size_t i = 0; i < context->nr_devices; i++) {
		struct check_device *last = used ? &devices[used - 1] : NULL;

		if (last && last->id == devices[i].id && !last->has_root && devices[i].has_root) {
			last->has_root = true;
			last->root = devices[i].root;
			last->root_known = devices[i].root_known;
		} else {
			devices[used++] = devices[i];
		}
	}
	context->nr_devices = used;
}

/* ---- one device */

static void check_details(
	struct check *c, const struct device_set *set, const struct check_device *device, const char *label)
{
	uint32_t creation = le32_get(device->details.creation_time);
	uint32_t snapshotted = le32_get(device->details.snapshotted_time);
	uint64_t transaction_id = le64_get(device->details.transaction_id);

	if (creation > set->time)
		check_finding(c, FATAL, "%s: creation_time %u is later than the pool's time %u", label,
			creation, set->time);
	if (snapshotted > set->time)
		check_finding(c, FATAL, "%s: snapshotted_time %u is later than the pool's time %u", label,
			snapshotted, set->time);
	if (creation > snapshotted)
		check_finding(c, FATAL, "%s: creation_time %u is later than snapshotted_time %u", label,
			creation, snapshotted);
	/* User space may set the pool's id back. */
	if (transaction_id > set->transaction_id)
		check_finding(c, WARNING, "%s: transaction id %" PRIu64 " is later than the pool's %" PRIu64,
			label, transaction_id, set->transaction_id);
}

static void check_mapped_blocks(struct check *c, const struct check_device *device, const char *label)
{
	const struct block_info *info = device->root < c->r.nr_blocks ? &c->blocks[device->root] : NULL;
	uint64_t mapped = le64_get(device->details.mapped_blocks);

	if (info && info->role == ROLE_MAPPING && !info->damaged && info->entries != mapped)
		check_finding(c, FATAL, "%s: mapped_blocks is %" PRIu64 ", the mapping tree has %" PRIu64,
			label, mapped, info->entries);
}

static void check_mappings(
	struct check *c, struct tree_check *t, struct device_context *context, const char *label)
{
	const struct check_device *device = &context->devices[t->owner];

	context->snapshotted_time =
		device->has_details ? le32_get(device->details.snapshotted_time) : UINT32_MAX;
	tree_check_run(t, &mapping_kind, label, device->root, context);
	uint64_t found = 0, mapped = le64_get(device->details.mapped_blocks);
	if (device->root < c->r.nr_blocks && c->blocks[device->root].role == ROLE_MAPPING)
		found = c->blocks[device->root].entries;
	if (context->set->live)
		c->result.mappings += found;
	tree_check_tell_damage(t, device->has_details && mapped > found ? mapped - found : 0);
}

static void check_device(struct check *c, struct tree_check *t, struct device_context *context,
	bool details_whole, bool roots_whole)
{
	const struct check_device *device = &context->devices[t->owner];
	char label[64];

	snprintf(label, sizeof(label), "%sdevice %" PRIu64, context->set->prefix, device->id);
	if (device->id > MAX_DEVICE_ID)
		check_finding(c, FATAL, "%s: the id is larger than %u", label, MAX_DEVICE_ID);
	if (device->has_details)
		check_details(c, context->set, device, label);
	if (!device->has_details && details_whole)
		check_finding(c, FATAL, "%s: it has a mapping tree but no details", label);
	if (!device->has_root && roots_whole)
		check_finding(c, FATAL, "%s: it has details but no mapping tree", label);
	if (!device->has_root)
		return;
	if (!device->root_known)
		check_mappings(c, t, context, label);
	if (device->has_details)
		check_mapped_blocks(c, device, label);
}

/* Both trees of ids; true if all of it could be read. */
static bool walk_ids(struct check *c, struct tree_check *t, const struct tree_kind *kind, const char *name,
	uint64_t root, struct device_context *context)
{
	char label[64];

	snprintf(label, sizeof(label), "%s%s", context->set->prefix, name);
	tree_check_run(t, kind, label, root, context);
	bool whole = t->damages == 0;
	tree_check_tell_damage(t, 0);
	return whole && !c->error;
}

void check_devices(struct check *c, struct tree_check *t, const struct device_set *set)
{
	struct device_context context = {.set = set};
	bool details_whole = walk_ids(c, t, &details_kind, "details tree", set->details_root, &context);
	bool roots_whole = walk_ids(c, t, &top_level_kind, "top-level tree", set->mapping_root, &context);

	join_devices(&context);
	if (set->live)
		c->result.devices = context.nr_devices;
	for (size_t i = 0; i < context.nr_devices && !c->error && !c->out->error; i++) {
		t->owner = (uint32_t)i;
		check_device(c, t, &context, details_whole, roots_whole);
	}
	free(context.devices);
}
