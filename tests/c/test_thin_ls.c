/* Devices and mappings in pieces, and every walk of a metadata snapshot while the pool goes on. */
#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include "thin_image.h"

/* ---- pieces */

static void devices_come_from_an_id_on(void)
{
	struct image *im = image_create();
	struct bs_device_info info[8];

	image_write(im);
	CHECK_EQ(bs_metadata_devices(im->path, 0, 0, info, 8), IMAGE_DEVICES);
	CHECK_EQ(info[1].id, 2);
	CHECK_EQ(info[1].mapped_blocks, 200);
	CHECK_EQ(info[1].transaction_id, 1);
	CHECK_EQ(bs_metadata_devices(im->path, 0, 3, info, 2), 2);
	CHECK_EQ(info[0].id, 3);
	CHECK_EQ(info[1].id, 4);
	CHECK_EQ(bs_metadata_devices(im->path, 0, 7, info, 8), 0);
	image_destroy(im);
}

static void mappings_come_from_a_block_on(void)
{
	struct image *im = image_create();
	struct bs_mapping some[200];
	uint64_t begin = 0, nr = 0;
	int n;

	image_write(im);
	while ((n = bs_metadata_mappings(im->path, 0, 2, begin, some, 7)) > 0) {
		for (int i = 0; i < n; i++, nr++) {
			CHECK_EQ(some[i].thin_block, nr);
			CHECK_EQ(some[i].data_block, nr < 100 ? nr : nr + 100);
			CHECK_EQ(some[i].time, nr >= 100);
		}
		begin = nr;
	}
	CHECK_EQ(n, 0);
	CHECK_EQ(nr, 200);
	CHECK_EQ(bs_metadata_mappings(im->path, 0, 5, 101, some, 200), 2);
	CHECK_EQ(some[0].thin_block, 101);
	CHECK_EQ(bs_metadata_mappings(im->path, 0, 77, 0, some, 1), -ENODATA);
	image_destroy(im);
}

/* ---- metadata snapshots */

static void a_metadata_snapshot_that_is_not_there_is_an_error(void)
{
	struct image *im = image_create();
	struct bs_device_info info;

	image_write(im);
	CHECK_EQ(bs_metadata_devices(im->path, 1, 0, &info, 1), -ENODATA);
	CHECK(strstr(bs_last_error(), "no metadata snapshot is held"));
	im->blocks[0].superblock.held_root = le64_of(im->device_2_root);
	image_write(im);
	CHECK_EQ(bs_metadata_devices(im->path, 1, 0, &info, 1), -EILSEQ);
	CHECK(strstr(bs_last_error(), "is no copy of a superblock"));
	image_destroy(im);
}

#define BLOCK 65536ull

static char metadata[64], data[64];

static void make_file(const char *path, uint64_t size)
{
	int fd = open(path, O_CREAT | O_TRUNC | O_RDWR | O_CLOEXEC, 0600);

	CHECK_EQ(ftruncate(fd, (off_t)size), 0);
	close(fd);
}

static struct bs_pool *make_pool(void)
{
	struct bs_pool *pool;

	snprintf(metadata, sizeof(metadata), "blocksnap-test-%d-metadata", getpid());
	snprintf(data, sizeof(data), "blocksnap-test-%d-data", getpid());
	make_file(metadata, 512 * METADATA_BLOCK_SIZE);
	make_file(data, 64 * BLOCK);
	CHECK_EQ(bs_pool_format(metadata, data, 64 * BLOCK, BLOCK), 0);
	CHECK_EQ(bs_pool_open(metadata, data, 0, &pool), 0);
	return pool;
}

static void write_blocks(struct bs_device *device, uint64_t begin, uint64_t nr)
{
	static char buffer[BLOCK];

	for (uint64_t i = begin; i < begin + nr; i++)
		CHECK_EQ(bs_device_write(device, i * BLOCK, buffer, BLOCK), (int64_t)BLOCK);
}

static char *dump(int held)
{
	int fd = memfd_create("dump", MFD_CLOEXEC);

	CHECK_EQ(bs_metadata_dump(metadata, held, fd), 0);
	return text_of(fd);
}

static void expect_held_state(const char *before)
{
	struct bs_usage usage[4];
	struct bs_delta_range range;
	struct bs_mapping mappings[64];
	char *text = dump(1);

	CHECK(strcmp(text, before) == 0);
	free(text);
	CHECK_EQ(bs_metadata_usage(metadata, 1, usage, 4), 2);
	CHECK_EQ(usage[1].mapped_blocks, 5);
	CHECK_EQ(usage[1].exclusive_blocks, 1);
	CHECK_EQ(bs_metadata_delta_ranges(metadata, 1, 1, 2, 0, &range, 1), 1);
	CHECK_EQ(range.thin_begin, 4);
	CHECK_EQ(range.kind, BS_DELTA_RIGHT_ONLY);
	CHECK_EQ(bs_metadata_mappings(metadata, 1, 2, 0, mappings, 64), 5);
}

static void walks_see_the_metadata_as_they_were_when_held(void)
{
	struct bs_pool *pool = make_pool();
	struct bs_pool_status status;
	struct bs_check_result result;
	struct bs_device *device, *snap;

	CHECK_EQ(bs_pool_create_device(pool, 1), 0);
	CHECK_EQ(bs_device_open(pool, 1, 64 * BLOCK, &device), 0);
	write_blocks(device, 0, 4);
	CHECK_EQ(bs_pool_create_snapshot(pool, 2, 1), 0);
	CHECK_EQ(bs_device_open(pool, 2, 64 * BLOCK, &snap), 0);
	write_blocks(snap, 4, 1);
	CHECK_EQ(bs_pool_commit(pool), 0);
	char *before = dump(0);
	CHECK_EQ(bs_pool_hold_metadata(pool), 0);
	CHECK_EQ(bs_pool_hold_metadata(pool), -EBUSY);
	for (int i = 0; i < 3; i++) {
		write_blocks(snap, (uint64_t)i * 2, 8);
		CHECK_EQ(bs_device_discard(device, 0, 2 * BLOCK), 0);
		CHECK_EQ(bs_pool_commit(pool), 0);
		expect_held_state(before);
	}
	free(before);
	CHECK_EQ(bs_pool_release_metadata(pool), 0);
	CHECK_EQ(bs_pool_release_metadata(pool), -EINVAL);
	CHECK_EQ(bs_pool_status(pool, &status), 0);
	CHECK_EQ(status.held_root, 0);
	/* What only the metadata snapshot needed is free: thin blocks 2 and 3 of one device, 0 to 11 of the other. */
	CHECK_EQ(status.data_blocks_free, 64 - 2 - 12);
	bs_device_close(device);
	bs_device_close(snap);
	CHECK_EQ(bs_pool_close(pool), 0);
	CHECK_EQ(bs_metadata_check(metadata, 2, &result), 0);
	CHECK_EQ(result.fatal + result.leaks + result.warnings, 0);
	unlink(metadata);
	unlink(data);
}

int main(void)
{
	RUN(devices_come_from_an_id_on);
	RUN(mappings_come_from_a_block_on);
	RUN(a_metadata_snapshot_that_is_not_there_is_an_error);
	RUN(walks_see_the_metadata_as_they_were_when_held);
	return 0;
}
