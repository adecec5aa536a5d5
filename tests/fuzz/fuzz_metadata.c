/*
 * Metadata with valid checksums and hostile content: an input is a list of changes to a small pool (thin_image.h), made
 * before its blocks are sealed. The walkers go over it; repair makes a new pool of it; the engine opens and uses it.
 *
 * Promises
 * 1. What repair calls a success our check finds clean.
 * 2. A pool that check finds clean is clean after the engine has used it.
 */
#include <errno.h>
#include <fcntl.h>

#include "../c/thin_image.h"
#include "engine.h"
#include "fuzz.h"

#define BLOCK 4096ull /* the smallest: a run takes as little time as can be */
#define DEVICE_SIZE (200 * BLOCK)
#define CHANGES 64

struct change {
	uint8_t block;
	uint8_t kind;
	uint8_t offset[2];
	uint8_t value[8];
};

enum kind { SET_8, SET_4, SET_2, SET_1, ADD_8, COPY_BLOCK, RETYPE, BREAK_CHECKSUM, KINDS };

static int nowhere;

static void apply(struct image *im, const struct change *change, bool *broken)
{
	uint32_t block = change->block % im->used;
	uint32_t offset = (change->offset[0] | change->offset[1] << 8) % (METADATA_BLOCK_SIZE - 8);
	uint8_t *at = im->blocks[block].bytes + offset;
	uint64_t value, old;

	memcpy(&value, change->value, 8);
	switch (change->kind % KINDS) {
	case ADD_8:
		memcpy(&old, at, 8);
		value += old;
		memcpy(at, &value, 8);
		break;
	case COPY_BLOCK:
		im->blocks[block] = im->blocks[value % im->used];
		im->salts[block] = im->salts[value % im->used];
		im->blocks[block].bitmap.blocknr = le64_of(block);
		break;
	case RETYPE:
		im->salts[block] = im->salts[value % im->used];
		break;
	case BREAK_CHECKSUM:
		broken[block] = true;
		break;
	default:
		memcpy(at, &value, 8 >> change->kind % KINDS);
	}
}

static struct image *hostile_image(const uint8_t *data, size_t size)
{
	struct image *im = image_create();
	bool broken[IMAGE_BLOCKS] = {false};
	struct change change;

	im->blocks[0].superblock.data_block_size = le32_of(BLOCK / 512);
	for (int i = 0; size && i < CHANGES; i++) {
		fuzz_take(&data, &size, &change, sizeof(change));
		apply(im, &change, broken);
	}
	image_write(im);
	for (uint32_t i = 0; i < im->used; i++)
		if (broken[i])
			PROMISE(pwrite(im->fd, "damn", 4, i * METADATA_BLOCK_SIZE) == 4);
	return im;
}

static bool is_clean(const char *path)
{
	struct bs_check_result result;

	return bs_metadata_check(path, nowhere, &result) == 0 && !result.fatal && !result.leaks;
}

static void walk(const char *path)
{
	struct bs_delta_range ranges[16];
	struct bs_usage usage[16];
	struct bs_mapping mappings[64];
	struct bs_device_info devices[16];

	for (int held = 0; held < 2; held++) {
		bs_metadata_dump(path, held, nowhere);
		bs_metadata_delta(path, held, 1, 2, nowhere);
		bs_metadata_delta_ranges(path, held, 2, 5, 0, ranges, 16);
		bs_metadata_usage(path, held, usage, 16);
		bs_metadata_devices(path, held, 0, devices, 16);
		bs_metadata_mappings(path, held, 2, 50, mappings, 64);
	}
}

static void repair(const char *path)
{
	static const struct bs_repair_options as_told;
	struct bs_repair_result result;
	char output[32];
	int fd = memfd_create("repaired", MFD_CLOEXEC);

	PROMISE(fd >= 0 && ftruncate(fd, 4 * IMAGE_BLOCKS * METADATA_BLOCK_SIZE) == 0);
	snprintf(output, sizeof(output), "/proc/self/fd/%d", fd);
	if (bs_metadata_repair(path, output, &as_told, nowhere, &result) == 0)
		PROMISE(is_clean(output));
	close(fd);
}

static void use_device(struct bs_pool *pool, uint32_t id)
{
	static uint8_t buffer[3 * BLOCK];
	struct bs_device *device;

	if (bs_device_open(pool, id, DEVICE_SIZE, &device) < 0)
		return;
	bs_device_read(device, 99 * BLOCK, buffer, sizeof(buffer));
	bs_device_write(device, 5000, buffer, 5000);
	bs_device_write(device, 120 * BLOCK, buffer, sizeof(buffer));
	bs_device_discard(device, 100 * BLOCK - 512, 3 * BLOCK);
	bs_device_close(device);
}

static void use_pool(struct bs_pool *pool)
{
	bs_pool_create_snapshot(pool, 7, 1);
	use_device(pool, 1);
	bs_pool_create_device(pool, 8);
	use_device(pool, 8);
	use_device(pool, 5);
	bs_pool_delete_device(pool, 2);
	bs_pool_commit(pool);
	bs_pool_delete_device(pool, 7);
	use_device(pool, 6);
}

static void run_engine(struct image *im)
{
	bool was_clean = is_clean(im->path);
	struct io *metadata, *data;
	struct bs_pool *pool;

	CHECK_EQ(io_memory_create(sizeof(im->blocks), &metadata), 0);
	CHECK_EQ(io_memory_create(IMAGE_DATA_BLOCKS * BLOCK, &data), 0);
	CHECK_EQ(pread(im->fd, io_memory_data(metadata), sizeof(im->blocks), 0), (ssize_t)sizeof(im->blocks));
	if (pool_open_on(metadata, data, 0, &pool) < 0)
		return;
	use_pool(pool);
	if (bs_pool_commit(pool) == 0 && was_clean) {
		CHECK_EQ(pwrite(im->fd, io_memory_data(metadata), sizeof(im->blocks), 0),
			(ssize_t)sizeof(im->blocks));
		PROMISE(is_clean(im->path));
	}
	bs_pool_close(pool);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	if (!nowhere)
		nowhere = open("/dev/null", O_WRONLY | O_CLOEXEC);
	struct image *im = hostile_image(data, size);
	walk(im->path);
	repair(im->path);
	run_engine(im);
	image_destroy(im);
	return 0;
}
