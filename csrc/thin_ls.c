/*
 * The devices of a pool and the mappings of each, for Python: a call gives the next ones, nothing is kept
 * between two calls.
 */
#include "blocksnap.h"
#include "metadata_reader.h"

static struct bs_device_info device_info(const struct device_entry *device)
{
	const struct disk_device_details *details = &device->details;

	return (struct bs_device_info){
		.id = (uint32_t)device->id,
		.creation_time = le32_get(details->creation_time),
		.snapshotted_time = le32_get(details->snapshotted_time),
		.mapped_blocks = le64_get(details->mapped_blocks),
		.transaction_id = le64_get(details->transaction_id),
	};
}

static int list_devices(
	const struct metadata_reader *r, uint32_t begin, struct bs_device_info *out, int capacity)
{
	struct device_walk walk;
	struct device_entry device;
	int used = 0, found = device_walk_init(&walk, r);

	while (found >= 0 && used < capacity && (found = device_walk_next(&walk, &device)) > 0)
		if (device.id >= begin)
			out[used++] = device_info(&device);
	device_walk_deinit(&walk);
	return found < 0 ? found : used;
}

int bs_metadata_devices(
	const char *metadata, int held, uint32_t begin, struct bs_device_info *out, int capacity)
{
	struct metadata_reader reader;
	int r = metadata_reader_open(&reader, metadata, held);

	if (r == 0)
		r = list_devices(&reader, begin, out, capacity);
	metadata_reader_deinit(&reader);
	return r;
}

static int list_leaf(const struct disk_node *leaf, uint64_t begin, struct bs_mapping *out, int capacity)
{
	uint32_t first = node_lower_bound(leaf, begin), nr = node_nr(leaf) - first;

	if (nr > (uint32_t)capacity)
		nr = (uint32_t)capacity;
	for (uint32_t i = 0; i < nr; i++) {
		uint64_t value = node_value64(leaf, first + i);

		out[i] = (struct bs_mapping){
			node_key(leaf, first + i), mapping_block(value), mapping_time(value)};
	}
	return (int)nr;
}

static int list_mappings(
	const struct metadata_reader *r, uint64_t root, uint64_t begin, struct bs_mapping *out, int capacity)
{
	struct leaf_walk walk;
	const struct disk_node *leaf;
	int used = 0, found = leaf_walk_init(&walk, r, root, sizeof(uint64_t));

	walk.begin = begin;
	while (found >= 0 && used < capacity && (found = leaf_walk_next(&walk, &leaf)) > 0)
		used += list_leaf(leaf, begin, out + used, capacity - used);
	leaf_walk_deinit(&walk);
	return found < 0 ? found : used;
}

int bs_metadata_mappings(
	const char *metadata, int held, uint32_t id, uint64_t begin, struct bs_mapping *out, int capacity)
{
	struct metadata_reader reader;
	uint64_t root;
	int r = metadata_reader_open(&reader, metadata, held);

	if (r == 0)
		r = metadata_device_root(&reader, id, &root);
	if (r == 0)
		r = list_mappings(&reader, root, begin, out, capacity);
	metadata_reader_deinit(&reader);
	return r;
}
