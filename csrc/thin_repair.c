/*
 * Repair: new metadata from what can be read of damaged ones. The damaged ones are only read; the new ones are
 * written by the code that writes all pools, so every count is made anew.
 *
 *  1. Superblock: each field that can be true is kept, the others are made up from what else is known. If it does
 *     not lead to the two roots they are searched for.
 *  2. Devices: the details tree and the top-level tree. Details that are lost are made up, from the safe side; a
 *     device without mappings that had some is gone.
 *  3. Mapping trees: see thin_repair_tree.c. A node that several devices share is one node in the new pool too.
 *  4. Times: no shared block looks unshared to a device that can write to it.
 *  5. The new pool: see thin_repair_write.c.
 *
 * What the format does not let be seen, a wrong data block in a mapping under a right checksum, is kept.
 * Memory: 56 bytes a metadata block, 1 a data block up to the last one in use, 64 bytes a device, 40 MiB for the
 * transaction under way.
 */
#include "thin_repair.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "crc32c.h"
#include "error.h"

/* ---- telling */

static void put_id(struct repair *r, const char *kind, uint64_t id)
{
	if (id == NO_DEVICE)
		text_printf(r->out, "%s\t-", kind);
	else
		text_printf(r->out, "%s\t%" PRIu64, kind, id);
}

void repair_tell_lost(struct repair *r, uint64_t id, uint64_t begin, uint64_t last, const char *format, ...)
{
	char text[512];
	va_list args;

	r->result.losses++;
	if (!r->out)
		return;
	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	put_id(r, "lost", id);
	text_printf(r->out, "\t%" PRIu64 "\t%" PRIu64 "\t%s\n", begin, last, text);
}

void repair_tell_changed(struct repair *r, uint64_t id, const char *format, ...)
{
	char text[512];
	va_list args;

	r->result.changes++;
	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	put_id(r, "changed", id);
	text_printf(r->out, "\t-\t-\t%s\n", text);
}

static void tell_gone(struct repair *r, const struct repair_device *device, const char *why)
{
	r->result.devices_lost++;
	put_id(r, "gone", device->id);
	if (device->has_details)
		text_printf(r->out, "\t-\t%" PRIu64 "\t%s\n", le64_get(device->details.mapped_blocks), why);
	else
		text_printf(r->out, "\t-\t-\t%s\n", why);
}

/* ---- superblock */

/* What was made by a later version is not damaged. */
static int refuse_features(const struct repair *r)
{
	const struct disk_superblock *sb = &r->r.superblock;
	uint32_t version = le32_get(sb->version), unknown = le32_get(sb->flags) & ~SUPERBLOCK_NEEDS_CHECK;

	if (version == 0 || version > SUPERBLOCK_VERSION)
		return bs_fail(-EOPNOTSUPP,
			"version %u of the thin pool format, known is %u: use what made it", version,
			SUPERBLOCK_VERSION);
	if (le32_get(sb->incompat_flags) || le32_get(sb->compat_ro_flags) || unknown)
		return bs_fail(-EOPNOTSUPP,
			"unknown features (flags 0x%x, incompatible 0x%x, read-only 0x%x): use what made "
			"them",
			unknown, le32_get(sb->incompat_flags), le32_get(sb->compat_ro_flags));
	return 0;
}

/* A number of data blocks for which there can be bitmaps. */
static bool can_be_data_blocks(const struct repair *r, uint64_t nr)
{
	return nr > 0 && nr < MAX_DATA_BLOCKS && nr / ENTRIES_PER_BITMAP < r->r.file_blocks;
}

/* The fields of block 0 that can be true; the rest stays 0. */
static int read_superblock(struct repair *r)
{
	const struct disk_superblock *sb = &r->r.superblock;
	uint32_t csum = block_checksum(sb, SUPERBLOCK_SALT), time = le32_get(sb->time);
	bool sealed = le32_get(sb->csum) == csum, ours = le64_get(sb->magic) == SUPERBLOCK_MAGIC;

	if (sealed && ours) {
		int err = refuse_features(r);

		if (err)
			return err;
	}
	if (!sealed)
		repair_tell_changed(r, NO_DEVICE, "superblock: checksum was 0x%08x, expected 0x%08x",
			le32_get(sb->csum), csum);
	if (!ours)
		repair_tell_changed(
			r, NO_DEVICE, "superblock: magic number was %" PRIu64, le64_get(sb->magic));
	if (!sealed && !ours)
		return 0;
	r->trusted = sealed;
	r->details_root = le64_get(sb->device_details_root);
	r->mapping_root = le64_get(sb->data_mapping_root);
	r->facts.transaction_id = le64_get(sb->trans_id);
	r->facts.time = time <= MAX_TIME ? time : 0;
	r->time_known = sealed && time <= MAX_TIME;
	if (is_data_block_size((uint64_t)le32_get(sb->data_block_size) * SECTOR_SIZE))
		r->facts.data_block_sectors = le32_get(sb->data_block_size);
	if (can_be_data_blocks(r, le64_get(sb->data_sm_root.nr_blocks)))
		r->facts.nr_data_blocks = le64_get(sb->data_sm_root.nr_blocks);
	if (le64_get(sb->held_root))
		repair_tell_changed(r, NO_DEVICE, "the held metadata snapshot is dropped");
	if (le32_get(sb->flags) & SUPERBLOCK_NEEDS_CHECK)
		repair_tell_changed(r, NO_DEVICE, "needs_check is cleared");
	return 0;
}

static int settle_block_size(struct repair *r)
{
	uint64_t given = r->options->block_size, own = (uint64_t)r->facts.data_block_sectors * SECTOR_SIZE;
	uint64_t data = r->options->data_bytes, nr = r->facts.nr_data_blocks;

	if (given && bs_check_block_size(given) < 0)
		return -EINVAL;
	if (given && own && r->trusted && given != own)
		return bs_fail(-EINVAL, "the superblock says data blocks of %" PRIu64 " bytes, not %" PRIu64,
			own, given);
	if (own && !r->trusted && nr && data && own > data / nr)
		own = 0;
	if (!given && own)
		return 0;
	if (!given && nr && data % nr == 0 && is_data_block_size(data / nr))
		given = data / nr;
	if (!given)
		return bs_fail(-EINVAL, "the superblock does not tell the size of data blocks: give it");
	r->facts.data_block_sectors = (uint32_t)(given / SECTOR_SIZE);
	repair_tell_changed(r, NO_DEVICE, "superblock: data blocks have %" PRIu64 " bytes", given);
	return 0;
}

/* How many data blocks mappings may name: all that the data device has. The pool's own number is settled when it is
 * known which are mapped. */
static int settle_data_limit(struct repair *r)
{
	uint64_t blocks = r->options->data_bytes / ((uint64_t)r->facts.data_block_sectors * SECTOR_SIZE);

	r->nr_data = blocks ? blocks : r->facts.nr_data_blocks;
	if (r->nr_data == 0)
		return bs_fail(
			-EINVAL, "the superblock does not tell the size of the data: give the data device");
	if (!can_be_data_blocks(r, r->nr_data))
		return bs_fail(-EINVAL,
			"%" PRIu64 " data blocks need more bitmaps than the metadata has blocks", r->nr_data);
	return 0;
}

static void settle_data_blocks(struct repair *r)
{
	uint64_t own = r->facts.nr_data_blocks;

	if (own && own <= r->nr_data && r->last_data < own)
		return;
	r->facts.nr_data_blocks = r->nr_data;
	repair_tell_changed(r, NO_DEVICE, "superblock: the pool has %" PRIu64 " data blocks", r->nr_data);
}

/* ---- devices */

static struct repair_device *add_device(struct repair *r, uint64_t id)
{
	if (r->nr_devices == r->device_capacity) {
		size_t capacity = r->device_capacity ? 2 * r->device_capacity : 64;
		struct repair_device *devices = reallocarray(r->devices, capacity, sizeof(*devices));

		if (!devices) {
			r->error = bs_fail(-ENOMEM, "out of memory");
			return NULL;
		}
		r->devices = devices;
		r->device_capacity = capacity;
	}
	struct repair_device *device = &r->devices[r->nr_devices++];
	*device = (struct repair_device){.id = id};
	return device;
}

static void add_entries(struct repair *r, enum node_role role, const struct disk_node *leaf)
{
	for (uint32_t i = 0; i < node_nr(leaf); i++) {
		struct repair_device *device = add_device(r, node_key(leaf, i));

		if (!device)
			return;
		if (role == NODE_DETAILS) {
			device->has_details = true;
			device->details = ((const struct disk_device_details *)node_values(leaf))[i];
		} else {
			device->has_root = true;
			device->root = node_value64(leaf, i);
		}
	}
}

/* A node of ids is lost. While its devices are known from the other tree they are told one by one. */
static void tell_unread(struct repair *r, enum node_role role, uint64_t low, uint64_t high)
{
	bool others_unread = role == NODE_TOP_LEVEL && r->unread > 0;

	r->unread++;
	if (!r->out)
		return;
	if (others_unread)
		repair_tell_lost(r, NO_DEVICE, low, high, "%s", bs_last_error());
	else
		repair_tell_changed(r, NO_DEVICE, "%s tree, devices %" PRIu64 "..%" PRIu64 ": %s",
			role == NODE_DETAILS ? "details" : "top-level", low, high, bs_last_error());
}

static bool read_ids(
	struct repair *r, enum node_role role, uint64_t block, int depth, uint64_t low, uint64_t high)
{
	uint32_t value_size = role == NODE_DETAILS ? sizeof(struct disk_device_details) : sizeof(uint64_t);
	struct disk_node *node = &r->path[depth];

	if (r->error || (r->trying && r->visits++ > 64 * r->r.nr_blocks))
		return false;
	if (repair_load(r, block, role, value_size, depth, node)) {
		tell_unread(r, role, low, high);
		return false;
	}
	if (!r->trying)
		r->nodes[block] = (struct node_info){.state = NODE_FINE, .role = role};
	if (node_is_leaf(node)) {
		add_entries(r, role, node);
		return true;
	}
	for (uint32_t i = 0; i < node_nr(node); i++)
		read_ids(r, role, node_value64(node, i), depth + 1, node_key(node, i),
			repair_high(node, i, high));
	return true;
}

bool repair_read_details(struct repair *r, uint64_t root)
{
	return read_ids(r, NODE_DETAILS, root, 0, 0, UINT64_MAX);
}

bool repair_read_top_level(struct repair *r, uint64_t root)
{
	return read_ids(r, NODE_TOP_LEVEL, root, 0, 0, UINT64_MAX);
}

void repair_forget(struct repair *r)
{
	memset(r->nodes, 0, r->r.nr_blocks * sizeof(*r->nodes));
	r->nr_devices = 0;
	r->unread = 0;
	r->left_out = 0;
}

static int compare_devices(const void *left, const void *right)
{
	const struct repair_device *l = left, *r = right;

	if (l->id != r->id)
		return l->id < r->id ? -1 : 1;
	return (int)r->has_details - (int)l->has_details;
}

/* Damaged trees may hold an id several times: the first wins. */
static void join_devices(struct repair *r)
{
	size_t used = 0;

	if (r->nr_devices > 0)
		qsort(r->devices, r->nr_devices, sizeof(*r->devices), compare_devices);
	for (size_t i = 0; i < r->nr_devices; i++) {
		struct repair_device *last = used ? &r->devices[used - 1] : NULL, *device = &r->devices[i];

		if (!last || last->id != device->id) {
			r->devices[used++] = *device;
		} else if (!last->has_root && device->has_root) {
			last->has_root = true;
			last->root = device->root;
		}
	}
	r->nr_devices = used;
}

/* ---- times and details */

static uint32_t latest_time(const struct repair_device *device)
{
	uint32_t creation = le32_get(device->details.creation_time);
	uint32_t snapshotted = le32_get(device->details.snapshotted_time);

	return creation > snapshotted ? creation : snapshotted;
}

/* A device that is ahead of the pool is wrong; if several are, the pool is. */
static void settle_time(struct repair *r)
{
	uint32_t latest = 0;
	size_t ahead = 0;

	for (size_t i = 0; i < r->nr_devices; i++) {
		uint32_t time = latest_time(&r->devices[i]);

		if (!r->devices[i].has_details || time > MAX_TIME || time <= r->facts.time)
			continue;
		ahead++;
		latest = time > latest ? time : latest;
	}
	if (ahead < 2 && r->time_known)
		return;
	if (ahead > 0)
		r->facts.time = latest;
	if (r->facts.time != le32_get(r->r.superblock.time))
		repair_tell_changed(r, NO_DEVICE, "superblock: the time is %u", r->facts.time);
}

static void settle_transaction_id(struct repair *r)
{
	uint64_t latest = 0;

	if (r->trusted)
		return;
	for (size_t i = 0; i < r->nr_devices; i++) {
		uint64_t id = le64_get(r->devices[i].details.transaction_id);

		latest = r->devices[i].has_details && id > latest ? id : latest;
	}
	if (r->options->transaction_id)
		r->facts.transaction_id = r->options->transaction_id;
	else if (r->facts.transaction_id < latest)
		r->facts.transaction_id = latest;
	if (r->facts.transaction_id != le64_get(r->r.superblock.trans_id))
		repair_tell_changed(
			r, NO_DEVICE, "superblock: the transaction id is %" PRIu64, r->facts.transaction_id);
}

static void settle_details(struct repair *r, struct repair_device *device)
{
	uint32_t time = r->facts.time, creation = le32_get(device->details.creation_time);
	uint32_t snapshotted = le32_get(device->details.snapshotted_time);

	if (!device->has_details) {
		repair_tell_changed(
			r, device->id, "details were lost: it counts as created and snapshotted now");
		device->details.transaction_id = le64_of(r->facts.transaction_id);
		creation = snapshotted = time;
	}
	if (creation > time || snapshotted > time || creation > snapshotted)
		repair_tell_changed(r, device->id,
			"creation_time was %u and snapshotted_time %u, the pool's time is %u", creation,
			snapshotted, time);
	snapshotted = snapshotted < time ? snapshotted : time;
	creation = creation < time ? creation : time;
	device->details.creation_time = le32_of(creation);
	device->details.snapshotted_time = le32_of(creation > snapshotted ? creation : snapshotted);
}

static int raise_times(struct repair *r)
{
	for (size_t i = 0; i < r->nr_devices; i++) {
		struct repair_device *device = &r->devices[i];

		if (device->needed_time <= le32_get(device->details.snapshotted_time))
			continue;
		if (device->needed_time > MAX_TIME)
			return bs_fail(
				-EOVERFLOW, "the pool has used up all times that the format can count");
		repair_tell_changed(r, device->id,
			"snapshotted_time is raised from %u to %u: shared blocks looked unshared",
			le32_get(device->details.snapshotted_time), device->needed_time);
		device->details.snapshotted_time = le32_of(device->needed_time);
		if (device->needed_time > r->facts.time)
			r->facts.time = device->needed_time;
	}
	return 0;
}

/* ---- which devices there will be */

static bool is_kept(struct repair *r, struct repair_device *device)
{
	bool empty = device->has_details && le64_get(device->details.mapped_blocks) == 0;
	const struct node_info *info = NULL;
	char why[512];

	if (device->id > MAX_DEVICE_ID) {
		snprintf(why, sizeof(why), "the id is larger than %u", MAX_DEVICE_ID);
		tell_gone(r, device, why);
		return false;
	}
	if (device->has_root)
		info = repair_assess(r, (uint32_t)(device - r->devices), device->root, 0);
	if (info && (info->entries > 0 || !info->lossy)) {
		device->root = info->entries > 0 ? device->root : 0;
		return true;
	}
	if (device->has_root && repair_load(r, device->root, NODE_MAPPING, sizeof(uint64_t), 0, r->path) < 0)
		snprintf(why, sizeof(why), "mapping tree: %s", bs_last_error());
	else
		snprintf(why, sizeof(why),
			device->has_root ? "all of its mappings are lost" : "no mapping tree");
	device->root = 0;
	device->has_root = false;
	if (!empty)
		tell_gone(r, device, why);
	else
		repair_tell_changed(r, device->id, "%s; it had no mappings", why);
	return empty;
}

static void choose_devices(struct repair *r)
{
	size_t kept = 0;

	/* Owners are indices: those that go have no part in any node, so the others may move up. */
	for (size_t i = 0; i < r->nr_devices; i++) {
		r->devices[kept] = r->devices[i];
		if (r->devices[kept].id <= MAX_DEVICE_ID)
			settle_details(r, &r->devices[kept]);
		kept += is_kept(r, &r->devices[kept]);
	}
	r->nr_devices = kept;
}

/* Nothing was seen to be missing, but the details may know better. */
static void tell_mapped_blocks(struct repair *r, const struct repair_device *device)
{
	uint64_t mapped = le64_get(device->details.mapped_blocks), found = r->nodes[device->root].entries;

	if (!device->has_details || mapped == found)
		return;
	if (mapped > found)
		repair_tell_lost(r, device->id, 0, UINT64_MAX,
			"mapped_blocks was %" PRIu64 ", the mapping tree has %" PRIu64, mapped, found);
	else
		repair_tell_changed(r, device->id,
			"mapped_blocks was %" PRIu64 ", the mapping tree has %" PRIu64, mapped, found);
}

static void tell_losses(struct repair *r)
{
	for (size_t i = 0; i < r->nr_devices; i++) {
		const struct repair_device *device = &r->devices[i];

		if (device->root && r->nodes[device->root].lossy)
			repair_tell_node(r, device->id, device->root, 0, 0, UINT64_MAX);
		else
			tell_mapped_blocks(r, device);
	}
}

/* ---- all of it */

/* The trees of ids, from the superblock or by searching. */
static int read_devices(struct repair *r)
{
	struct text_output *out = r->out;

	r->out = NULL;
	/* A try: a root below which nothing can be read is none. */
	bool details = r->details_root && repair_read_details(r, r->details_root);
	details &= r->nr_devices > 0 || r->unread == 0;
	r->nr_devices = 0;
	bool roots = r->mapping_root && repair_read_top_level(r, r->mapping_root);
	roots &= r->nr_devices > 0 || r->unread == 0;
	repair_forget(r);
	r->out = out;
	if (!details || !roots || !r->trusted) {
		if (!details)
			r->details_root = 0;
		if (!roots)
			r->mapping_root = 0;
		int err = repair_find_roots(r);

		if (err)
			return err;
	}
	if (r->details_root)
		repair_read_details(r, r->details_root);
	repair_read_top_level(r, r->mapping_root);
	join_devices(r);
	return r->error;
}

static int map_data_marks(struct repair *r)
{
	void *memory = mmap(
		NULL, r->nr_data, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (memory == MAP_FAILED)
		return bs_fail(-ENOMEM, "no memory for %" PRIu64 " data blocks", r->nr_data);
	r->data = memory;
	return 0;
}

static int run(struct repair *r, struct io *output)
{
	r->nodes = calloc(r->r.nr_blocks, sizeof(*r->nodes));
	if (!r->nodes)
		return bs_fail(-ENOMEM, "out of memory");
	int err = read_superblock(r);
	if (!err)
		err = read_devices(r);
	if (!err)
		err = settle_block_size(r);
	if (!err)
		err = settle_data_limit(r);
	if (!err)
		err = map_data_marks(r);
	if (err)
		return err;
	settle_time(r);
	r->latest_time = r->facts.time;
	settle_transaction_id(r);
	choose_devices(r);
	repair_settle_times(r);
	settle_data_blocks(r);
	err = raise_times(r);
	if (err)
		return err;
	tell_losses(r);
	return repair_write(r, output);
}

/* As the reader does, but whatever block 0 holds. */
static int open_damaged(struct repair *r, const char *path)
{
	r->r.prefix = strdup("");
	if (!r->r.prefix)
		return bs_fail(-ENOMEM, "out of memory");
	int err = io_file_open(path, IO_READ_ONLY, &r->r.io);
	if (err)
		return err;
	int64_t size = io_size(r->r.io);
	if (size < 0)
		return (int)size;
	r->r.file_blocks = (uint64_t)size / METADATA_BLOCK_SIZE;
	r->r.nr_blocks = r->r.file_blocks < METADATA_MAX_BLOCKS ? r->r.file_blocks : METADATA_MAX_BLOCKS;
	if (r->r.nr_blocks < 2)
		return bs_fail(-EILSEQ, "only %" PRId64 " bytes: there is nothing to save", size);
	if (io_read(r->r.io, 0, &r->r.superblock, METADATA_BLOCK_SIZE))
		memset(&r->r.superblock, 0, sizeof(r->r.superblock));
	return 0;
}

/* The output may be empty because it is the damaged metadata, its superblock lost. */
static int refuse_same(const char *metadata, const char *output)
{
	struct stat from, to;

	if (stat(metadata, &from) < 0)
		return bs_fail_errno("%s", metadata);
	if (stat(output, &to) < 0)
		return bs_fail_errno("%s", output);
	if ((from.st_dev == to.st_dev && from.st_ino == to.st_ino) ||
		(S_ISBLK(from.st_mode) && S_ISBLK(to.st_mode) && from.st_rdev == to.st_rdev))
		return bs_fail(-EINVAL, "%s holds the damaged metadata: give another output", output);
	return 0;
}

static int repair(struct repair *r, const char *metadata, const char *output)
{
	struct io *io = NULL;
	int err = refuse_same(metadata, output);

	if (!err)
		err = open_damaged(r, metadata);
	if (!err)
		err = io_file_open(output, IO_LOCK, &io);
	if (!err)
		err = run(r, io);
	io_close(io);
	r->result.failed_reads = r->r.io ? r->r.io->failed_reads : 0;
	r->result.transaction_id = r->facts.transaction_id;
	r->result.block_size = (uint64_t)r->facts.data_block_sectors * SECTOR_SIZE;
	r->result.data_blocks = r->facts.nr_data_blocks;
	r->result.time = r->facts.time;
	return err;
}

int bs_metadata_repair(const char *metadata, const char *output, const struct bs_repair_options *options,
	int fd, struct bs_repair_result *ret)
{
	struct repair *r = calloc(1, sizeof(*r));
	struct text_output *out = malloc(sizeof(*out));

	if (!r || !out) {
		free(r);
		free(out);
		return bs_fail(-ENOMEM, "out of memory");
	}
	text_output_init(out, fd);
	r->out = out;
	r->options = options;
	int err = text_output_finish(out, repair(r, metadata, output));
	*ret = r->result;
	if (r->data)
		munmap(r->data, r->nr_data);
	free(r->devices);
	free(r->nodes);
	metadata_reader_deinit(&r->r);
	free(out);
	free(r);
	return err;
}
