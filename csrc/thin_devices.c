/* The devices of a pool and their mappings: thin_metadata.h says what, thin_metadata.c has the invariants. */
#include "thin_metadata.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "error.h"
#include "seed_bug.h"
#include "thin_state.h"

/* ---- devices ---- */

int thin_load_device(struct thin_metadata *md, struct thin_device *device)
{
	struct disk_device_details details;
	struct le64 root;
	int r = btree_lookup(&md->details, md->details_root, device->id, &details);

	if (r == 1)
		r = btree_lookup(&md->top, md->top_root, device->id, &root);
	if (r < 0)
		return r;
	if (r == 0)
		return bs_fail(-ENODATA, "the pool has no device %u", device->id);
	device->root = le64_get(root);
	device->mapped_blocks = le64_get(details.mapped_blocks);
	device->transaction_id = le64_get(details.transaction_id);
	device->creation_time = le32_get(details.creation_time);
	device->snapshotted_time = le32_get(details.snapshotted_time);
	return 0;
}

int thin_write_details(struct thin_metadata *md, const struct thin_device *device)
{
	struct disk_device_details details = {
		.mapped_blocks = le64_of(device->mapped_blocks),
		.transaction_id = le64_of(device->transaction_id),
		.creation_time = le32_of(device->creation_time),
		.snapshotted_time = le32_of(device->snapshotted_time),
	};

	return btree_insert(&md->details, &md->details_root, device->id, &details, NULL);
}

int thin_write_root(struct thin_metadata *md, const struct thin_device *device)
{
	return btree_insert(&md->top, &md->top_root, device->id, &(struct le64){htole64(device->root)}, NULL);
}

static struct thin_device *find_device(struct thin_metadata *md, uint32_t id)
{
	struct thin_device *d = md->devices;

	while (d && d->id != id)
		d = d->next;
	return d;
}

int thin_device_get(struct thin_metadata *md, uint32_t id, struct thin_device **ret)
{
	struct thin_device *d = find_device(md, id);

	if (!d) {
		d = calloc(1, sizeof(*d));
		if (!d)
			return bs_fail(-ENOMEM, "out of memory");
		d->id = id;
		int r = thin_load_device(md, d);
		if (r < 0) {
			free(d);
			return r;
		}
		d->next = md->devices;
		md->devices = d;
	}
	d->references++;
	*ret = d;
	return 0;
}

void thin_device_put(struct thin_metadata *md, struct thin_device *device)
{
	if (--device->references || device->changed)
		return;
	struct thin_device **link = &md->devices;
	while (*link != device)
		link = &(*link)->next;
	*link = device->next;
	free(device);
}

static int check_new_id(struct thin_metadata *md, uint32_t id)
{
	struct disk_device_details details;

	if (id > MAX_DEVICE_ID)
		return bs_fail(-EINVAL, "device id %u: 0 to %u are possible", id, MAX_DEVICE_ID);
	int r = btree_lookup(&md->details, md->details_root, id, &details);
	if (r == 1)
		return bs_fail(-EEXIST, "the pool has a device %u already", id);
	return r;
}

int thin_create(struct thin_metadata *md, uint32_t id)
{
	struct thin_device device = {
		.id = id,
		.creation_time = md->time,
		.snapshotted_time = md->time,
		.transaction_id = md->transaction_id,
	};
	int r = check_new_id(md, id);

	if (r == 0)
		r = thin_metadata_room(md, false);
	if (r < 0)
		return r;
	md->changed = true;
	r = btree_create(&md->mappings, &device.root);
	if (r == 0)
		r = thin_write_root(md, &device);
	return r < 0 ? r : thin_write_details(md, &device);
}

/* Invariant 2. */
static int begin_change(struct thin_metadata *md, struct thin_device *device)
{
	int r = 0;

	if (!device->path_shadowed && !BS_BUG(PATH_NOT_SHADOWED))
		r = thin_write_root(md, device);
	device->path_shadowed = device->changed = md->changed = true;
	return r;
}

static int snapshot(struct thin_metadata *md, uint32_t id, struct thin_device *origin)
{
	struct thin_device device = *origin;
	int r = begin_change(md, origin);

	if (r == 0 && !BS_BUG(SNAPSHOT_ROOT_NOT_COUNTED))
		r = tm_inc(&md->tm, origin->root);
	if (r < 0)
		return r;
	md->time += !BS_BUG(TIME_NOT_RAISED);
	origin->snapshotted_time = BS_BUG(ORIGIN_TIME_NOT_RAISED) ? origin->snapshotted_time : md->time;
	device.id = id;
	device.root = origin->root;
	device.transaction_id = md->transaction_id;
	device.creation_time = device.snapshotted_time = md->time;
	r = thin_write_root(md, &device);
	return r < 0 ? r : thin_write_details(md, &device);
}

int thin_create_snapshot(struct thin_metadata *md, uint32_t id, uint32_t origin)
{
	struct thin_device *device;
	int r = check_new_id(md, id);

	if (r == 0)
		r = thin_metadata_room(md, false);
	if (r < 0)
		return r;
	if (md->time == MAX_TIME)
		return bs_fail(-EOVERFLOW,
			"the pool has taken %u snapshots, the most that the format can count", MAX_TIME);
	r = thin_device_get(md, origin, &device);
	if (r < 0)
		return r;
	r = snapshot(md, id, device);
	thin_device_put(md, device);
	return r;
}

int thin_delete(struct thin_metadata *md, uint32_t id)
{
	struct thin_device *device;
	int r = thin_device_get(md, id, &device);

	if (r < 0)
		return r;
	if (device->references > 1)
		r = bs_fail(-EBUSY, "device %u is open", id);
	if (r == 0)
		r = thin_metadata_room(md, true);
	if (r < 0) {
		thin_device_put(md, device);
		return r;
	}
	md->changed = true;
	r = thin_write_root(md, device);
	device->changed = false;
	thin_device_put(md, device);
	if (r == 0)
		r = btree_remove(&md->details, &md->details_root, id);
	if (r >= 0)
		r = btree_remove(&md->top, &md->top_root, id);
	return r < 0 ? r : 0;
}

int thin_devices(struct thin_metadata *md, uint32_t begin, struct bs_device_info *out, int capacity)
{
	uint64_t keys[128];
	struct disk_device_details details[128];

	if (capacity > 128)
		capacity = 128;
	int n = btree_scan(&md->details, md->details_root, begin, MAX_DEVICE_ID, keys, details, capacity);
	for (int i = 0; i < n; i++) {
		const struct thin_device *d = find_device(md, keys[i]);

		out[i] = (struct bs_device_info){
			.id = keys[i],
			.mapped_blocks = d ? d->mapped_blocks : le64_get(details[i].mapped_blocks),
			.transaction_id = le64_get(details[i].transaction_id),
			.creation_time = le32_get(details[i].creation_time),
			.snapshotted_time = d ? d->snapshotted_time : le32_get(details[i].snapshotted_time),
		};
	}
	return n;
}

/* ---- mappings ---- */

/* Does anything but this device's own mapping of the block reach a data block in the present state, or
 * (committed) in the one that a crash would bring back? packed: the present mapping. */
static int is_shared(struct thin_metadata *md, uint64_t root, uint64_t block, uint64_t packed, bool committed,
	bool *ret_shared)
{
	struct space_map *sm = &md->data_sm.ll.sm;
	struct le64 mapped;
	uint32_t count;
	int r = btree_lookup_shared(&md->mappings, root, block, committed, &mapped, ret_shared);

	if (r < 0 || *ret_shared)
		return r < 0 ? r : 0;
	bool own = r == 1 && mapping_block(le64_get(mapped)) == mapping_block(packed);
	r = committed ? sm_committed_count(sm, mapping_block(packed), &count)
		      : sm_count(sm, mapping_block(packed), &count);
	*ret_shared = count > own;
	return r;
}

/* Invariant 4. */
static int is_shared_in_committed(struct thin_metadata *md, struct thin_device *device, uint64_t block,
	uint64_t packed, bool *ret_shared)
{
	struct le64 root;
	uint32_t count;
	int r = btree_lookup(&md->top, le64_get(md->superblock.data_mapping_root), device->id, &root);

	if (r == 1)
		return is_shared(md, le64_get(root), block, packed, true, ret_shared);
	if (r == 0) {
		r = sm_committed_count(&md->data_sm.ll.sm, mapping_block(packed), &count);
		*ret_shared = count > 0;
	}
	return r;
}

int thin_lookup(
	struct thin_metadata *md, struct thin_device *device, uint64_t block, uint64_t *ret, bool *ret_shared)
{
	struct le64 packed;

	bm_trim(md->bm);
	int r = btree_lookup(&md->mappings, device->root, block, &packed);
	if (r <= 0)
		return r;
	*ret = le64_get(packed);
	*ret_shared = false;
	if (mapping_block(*ret) >= md->data_sm.ll.nr_blocks)
		return bs_fail(-EUCLEAN,
			"device %u: block %" PRIu64 " is mapped beyond the data device: run pool check",
			device->id, block);
	/* Invariant 3; a held metadata snapshot raises counts without another device being there. */
	if (device->snapshotted_time <= mapping_time(*ret))
		return 1;
	r = is_shared(md, device->root, block, *ret, false, ret_shared);
	if (r == 0 && !*ret_shared && !BS_BUG(SHARING_IN_COMMITTED_IGNORED))
		r = is_shared_in_committed(md, device, block, *ret, ret_shared);
	return r < 0 ? r : 1;
}

int thin_scan(struct thin_metadata *md, struct thin_device *device, uint64_t begin, uint64_t last,
	uint64_t *ret_blocks, uint64_t *ret_packed, int capacity)
{
	bm_trim(md->bm);
	int n = btree_scan(&md->mappings, device->root, begin, last, ret_blocks, ret_packed, capacity);
	for (int i = 0; i < n; i++) {
		ret_packed[i] = le64toh(ret_packed[i]);
		if (mapping_block(ret_packed[i]) >= md->data_sm.ll.nr_blocks)
			return bs_fail(-EUCLEAN,
				"device %u: block %" PRIu64
				" is mapped beyond the data device: run pool check",
				device->id, ret_blocks[i]);
	}
	return n;
}

int thin_reserve(struct thin_metadata *md, uint64_t *ret)
{
	return ll_reserve(&md->data_sm.ll, ret);
}

void thin_unreserve(struct thin_metadata *md, uint64_t data_block)
{
	ll_unreserve(&md->data_sm.ll, data_block);
}

int thin_insert(struct thin_metadata *md, struct thin_device *device, uint64_t block, uint64_t data_block,
	uint64_t *ret)
{
	struct le64 old;
	uint32_t left;
	uint64_t packed = mapping_pack(data_block, md->time);
	int present = btree_lookup(&md->mappings, device->root, block, &old);
	int r = present < 0 ? present : begin_change(md, device);

	if (r == 0)
		r = btree_insert(&md->mappings, &device->root, block, &(struct le64){htole64(packed)}, NULL);
	if (r == 0)
		r = ll_take(&md->data_sm.ll, data_block);
	if (r == 0 && present && !BS_BUG(OVERWRITE_KEEPS_DATA_BLOCK))
		r = sm_dec(&md->data_sm.ll.sm, mapping_block(le64_get(old)), &left);
	device->mapped_blocks += !present;
	*ret = packed;
	bm_trim(md->bm);
	return r;
}

int thin_remove(struct thin_metadata *md, struct thin_device *device, uint64_t block)
{
	int r = begin_change(md, device);

	if (r == 0)
		r = btree_remove(&md->mappings, &device->root, block);
	device->mapped_blocks -= r == 1;
	bm_trim(md->bm);
	return r;
}

int thin_freed_blocks(struct thin_metadata *md, uint64_t **ret_blocks, uint64_t *ret_nr)
{
	return ll_freed_blocks(&md->data_sm.ll, ret_blocks, ret_nr);
}
