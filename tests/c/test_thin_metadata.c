/* Random changes against arrays, on a device in memory; committed images are judged by Debian's thin_check
 * and by our own check, which recomputes every count. */
#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#include "disk_format.h"
#include "io.h"
#include "test.h"
#include "thin_metadata.h"

#define METADATA_BLOCKS 4096
#define DATA_BLOCKS 20000
#define DEVICES 6
#define BLOCKS 3000
#define HOLE UINT64_MAX

struct model {
	bool exists;
	uint64_t map[BLOCKS]; /* data block or HOLE */
};

static struct model models[DEVICES];
static bool may_be_held;
static bool released; /* a mapping went since the last commit: blocks that it shared still count as shared */

static void commit(struct thin_metadata *md)
{
	CHECK_EQ(thin_metadata_commit(md), 0);
	released = false;
}
static char image[64]; /* a file in memory for the checkers */
static int image_fd;

static void write_image(struct io *io)
{
	CHECK_EQ(ftruncate(image_fd, io_size(io)), 0);
	CHECK_EQ(pwrite(image_fd, io_memory_data(io), io_size(io), 0), io_size(io));
}

static void check_image(struct io *io)
{
	char command[256];
	struct bs_check_result result;

	write_image(io);
	snprintf(command, sizeof(command), "thin_check -q %s", image);
	CHECK_EQ(system(command), 0);
	CHECK_EQ(bs_metadata_check(image, 2, &result), 0);
	CHECK_EQ(result.fatal + result.leaks + result.warnings, 0);
}

static void check_device(struct thin_metadata *md, uint32_t id)
{
	static uint64_t blocks[BLOCKS], packed[BLOCKS];
	struct thin_device *device;
	uint64_t mapped = 0;

	CHECK_EQ(thin_device_get(md, id, &device), 0);
	int n = thin_scan(md, device, 0, BLOCKS, blocks, packed, BLOCKS), at = 0;
	for (uint64_t b = 0; b < BLOCKS; b++) {
		if (models[id].map[b] == HOLE)
			continue;
		mapped++;
		CHECK(at < n);
		CHECK_EQ(blocks[at], b);
		CHECK_EQ(mapping_block(packed[at]), models[id].map[b]);
		at++;
	}
	CHECK_EQ(at, n);
	CHECK_EQ(device->mapped_blocks, mapped);
	thin_device_put(md, device);
}

static bool model_shares(uint32_t id, uint64_t b)
{
	for (uint32_t other = 0; other < DEVICES; other++)
		if (other != id && models[other].exists && models[other].map[b] == models[id].map[b])
			return true;
	return false;
}

static void write_block(struct thin_metadata *md, uint32_t id, uint64_t b)
{
	struct thin_device *device;
	uint64_t packed, data;
	bool shared = false;

	CHECK_EQ(thin_device_get(md, id, &device), 0);
	int r = thin_lookup(md, device, b, &packed, &shared);
	CHECK_EQ(r, models[id].map[b] != HOLE);
	/* Exact sharing: true if and only if another device has the block, now or in the committed state. A
	 * held metadata snapshot may count as one. */
	if (r && (model_shares(id, b) || (!may_be_held && !released)))
		CHECK_EQ(shared, model_shares(id, b));
	if (!r || shared) {
		CHECK_EQ(thin_reserve(md, &data), 0);
		CHECK_EQ(thin_insert(md, device, b, data, &packed), 0);
		released |= r;
		models[id].map[b] = data;
	}
	thin_device_put(md, device);
}

static void remove_block(struct thin_metadata *md, uint32_t id, uint64_t b)
{
	struct thin_device *device;

	CHECK_EQ(thin_device_get(md, id, &device), 0);
	CHECK_EQ(thin_remove(md, device, b), models[id].map[b] != HOLE);
	models[id].map[b] = HOLE;
	released = true;
	thin_device_put(md, device);
}

static void change_devices(struct thin_metadata *md, uint64_t *seed)
{
	uint32_t id = test_random(seed) % DEVICES, origin = test_random(seed) % DEVICES;

	if (models[id].exists) {
		CHECK_EQ(thin_create(md, id), -EEXIST);
		CHECK_EQ(thin_delete(md, id), 0);
		released = true;
		models[id].exists = false;
	} else if (models[origin].exists) {
		CHECK_EQ(thin_create_snapshot(md, id, origin), 0);
		models[id] = models[origin];
	} else {
		CHECK_EQ(thin_create_snapshot(md, id, origin), -ENODATA);
		CHECK_EQ(thin_create(md, id), 0);
		models[id].exists = true;
		for (uint64_t b = 0; b < BLOCKS; b++)
			models[id].map[b] = HOLE;
	}
}

/* One burst of neighbouring or scattered changes. */
static void burst(struct thin_metadata *md, uint64_t *seed)
{
	uint32_t id = test_random(seed) % DEVICES;
	uint64_t begin = test_random(seed) % BLOCKS, nr = test_random(seed) % 400;
	bool scattered = test_random(seed) % 2, removing = test_random(seed) % 3 == 0;

	if (!models[id].exists)
		return;
	for (uint64_t i = 0; i < nr; i++) {
		uint64_t b = scattered ? test_random(seed) % BLOCKS : (begin + i) % BLOCKS;

		if (removing)
			remove_block(md, id, b);
		else
			write_block(md, id, b);
	}
}

static void run_random(uint64_t seed, bool hold)
{
	struct io *io;
	struct thin_metadata *md;
	struct thin_metadata_status status;

	memset(models, 0, sizeof(models));
	may_be_held = hold;
	CHECK_EQ(io_memory_create(METADATA_BLOCKS * METADATA_BLOCK_SIZE, &io), 0);
	CHECK_EQ(thin_metadata_format(io, 128, DATA_BLOCKS), 0);
	CHECK_EQ(thin_metadata_open(io, &md), 0);
	for (int step = 0; step < 300; step++) {
		uint64_t kind = test_random(&seed) % 20;

		if (kind == 0)
			change_devices(md, &seed);
		else if (kind < 15)
			burst(md, &seed);
		else if (kind == 15 && hold) {
			thin_metadata_status(md, &status);
			CHECK_EQ(status.held_root ? thin_release_snapshot(md) : thin_hold_snapshot(md), 0);
		} else
			commit(md);
		if (step % 50 == 49) {
			commit(md);
			thin_metadata_close(md);
			check_image(io);
			CHECK_EQ(thin_metadata_open(io, &md), 0);
		}
	}
	for (uint32_t id = 0; id < DEVICES; id++)
		if (models[id].exists)
			check_device(md, id);
	thin_metadata_close(md);
	io_close(io);
}

static void test_random_changes(void)
{
	for (uint64_t seed = 1; seed <= 6; seed++)
		run_random(seed, false);
}

static void test_random_changes_with_held_snapshots(void)
{
	for (uint64_t seed = 11; seed <= 14; seed++)
		run_random(seed, true);
}

/* The kernel's fixed bug "metadata refcount underflow": the only child of a root is shared when it is
 * collapsed. */
static void test_collapse_of_a_shared_child(void)
{
	struct io *io;
	struct thin_metadata *md;

	memset(models, 0, sizeof(models));
	CHECK_EQ(io_memory_create(METADATA_BLOCKS * METADATA_BLOCK_SIZE, &io), 0);
	CHECK_EQ(thin_metadata_format(io, 128, DATA_BLOCKS), 0);
	CHECK_EQ(thin_metadata_open(io, &md), 0);
	CHECK_EQ(thin_create(md, 0), 0);
	models[0].exists = true;
	memset(models[0].map, 0xff, sizeof(models[0].map));
	for (uint64_t b = 0; b < 300; b++)
		write_block(md, 0, b);
	for (uint64_t b = 0; b < 131; b++)
		remove_block(md, 0, b);
	CHECK_EQ(thin_create_snapshot(md, 1, 0), 0);
	models[1] = models[0];
	remove_block(md, 0, 200);
	remove_block(md, 0, 201);
	commit(md);
	check_device(md, 0);
	check_device(md, 1);
	thin_metadata_close(md);
	check_image(io);
	io_close(io);
}

static void test_devices_in_descending_order(void)
{
	struct io *io;
	struct thin_metadata *md;
	struct bs_device_info info[128];

	CHECK_EQ(io_memory_create(METADATA_BLOCKS * METADATA_BLOCK_SIZE, &io), 0);
	CHECK_EQ(thin_metadata_format(io, 8, DATA_BLOCKS), 0);
	CHECK_EQ(thin_metadata_open(io, &md), 0);
	for (uint32_t id = 1000; id > 0; id--)
		CHECK_EQ(thin_create(md, id), 0);
	commit(md);
	CHECK_EQ(thin_devices(md, 0, info, 128), 128);
	CHECK_EQ(info[0].id, 1);
	for (uint32_t id = 1000; id > 5; id--)
		CHECK_EQ(thin_delete(md, id), 0);
	commit(md);
	CHECK_EQ(thin_devices(md, 0, info, 128), 5);
	thin_metadata_close(md);
	io_close(io);
}

static void test_refusals(void)
{
	struct io *io;
	struct thin_metadata *md;

	CHECK_EQ(io_memory_create(METADATA_BLOCKS * METADATA_BLOCK_SIZE, &io), 0);
	CHECK_EQ(thin_metadata_open(io, &md), -EMEDIUMTYPE);
	CHECK_EQ(thin_metadata_format(io, 24, DATA_BLOCKS), -EINVAL);
	CHECK_EQ(thin_metadata_format(io, 192, DATA_BLOCKS), -EINVAL);
	CHECK_EQ(thin_metadata_format(io, 1 << 22, DATA_BLOCKS), -EINVAL);
	CHECK_EQ(thin_metadata_format(io, 128, DATA_BLOCKS), 0);
	CHECK_EQ(thin_metadata_format(io, 128, DATA_BLOCKS), -EEXIST);
	CHECK_EQ(thin_metadata_open(io, &md), 0);
	CHECK_EQ(thin_create(md, 1 << 24), -EINVAL);
	CHECK_EQ(thin_delete(md, 7), -ENODATA);
	CHECK_EQ(thin_metadata_set_transaction_id(md, 1, 2), -EINVAL);
	thin_metadata_close(md);
	((char *)io_memory_data(io))[100] ^= 1;
	CHECK_EQ(thin_metadata_open(io, &md), -EILSEQ);
	io_close(io);
}

int main(void)
{
	image_fd = memfd_create("metadata", 0);
	snprintf(image, sizeof(image), "/proc/self/fd/%d", image_fd);
	RUN(test_refusals);
	RUN(test_random_changes);
	RUN(test_random_changes_with_held_snapshots);
	RUN(test_collapse_of_a_shared_child);
	RUN(test_devices_in_descending_order);
	return 0;
}
