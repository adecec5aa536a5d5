/* A pool of the user engine: what its verbs refuse, and which transaction a thread may begin or end. */
#include <errno.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include "disk_format.h"
#include "engine.h"
#include "test.h"

#define BLOCK 65536ull
#define BLOCKS 32
#define METADATA (256ull * METADATA_BLOCK_SIZE)

static char metadata[32], data[32];

static int make_file(uint64_t size, char path[32])
{
	int fd = memfd_create("pool", MFD_CLOEXEC);

	CHECK(fd >= 0 && ftruncate(fd, size) == 0);
	snprintf(path, 32, "/proc/self/fd/%d", fd);
	return fd;
}

static struct bs_pool *make_pool(void)
{
	struct bs_pool *pool;

	make_file(METADATA, metadata);
	make_file(2 * BLOCKS * BLOCK, data);
	CHECK_EQ(bs_pool_format(metadata, data, BLOCKS * BLOCK, BLOCK), 0);
	CHECK_EQ(bs_pool_open(metadata, data, 0, &pool), 0);
	return pool;
}

static void test_format_refuses_what_no_pool_can_be(void)
{
	make_file(METADATA, metadata);
	make_file(BLOCKS * BLOCK, data);
	CHECK_EQ(bs_pool_format(metadata, data, BLOCKS * BLOCK, 2048), -EINVAL);
	CHECK_EQ(bs_pool_format(metadata, data, BLOCKS * BLOCK, 2ull << 30), -EINVAL);
	CHECK_EQ(bs_pool_format(metadata, data, BLOCKS * BLOCK, BLOCK + 100), -EINVAL);
	CHECK_EQ(bs_pool_format(metadata, data, (BLOCKS + 1) * BLOCK, BLOCK), -EINVAL);
	CHECK_EQ(bs_pool_format(metadata, data, BLOCK - 512, BLOCK), -EINVAL);
	CHECK_EQ(bs_pool_format(metadata, "/nonexistent", BLOCKS * BLOCK, BLOCK), -ENOENT);
	CHECK_EQ(bs_pool_format("/nonexistent", data, BLOCKS * BLOCK, BLOCK), -ENOENT);
}

static void test_a_shorter_data_device_is_refused(void)
{
	struct bs_pool *pool = make_pool();

	CHECK_EQ(bs_pool_close(pool), 0);
	make_file((BLOCKS - 1) * BLOCK, data);
	CHECK_EQ(bs_pool_open(metadata, data, 0, &pool), -EUCLEAN);
	CHECK_EQ(bs_pool_open(metadata, "/nonexistent", 0, &pool), -ENOENT);
	CHECK_EQ(bs_pool_open("/nonexistent", data, 0, &pool), -ENOENT);
}

static void test_extension_keeps_to_the_devices(void)
{
	struct bs_pool *pool = make_pool();
	struct bs_pool_status status;

	CHECK_EQ(bs_pool_extend(pool, (2 * BLOCKS + 1) * BLOCK), -EINVAL);
	CHECK_EQ(bs_pool_extend(pool, (BLOCKS - 1) * BLOCK), -EINVAL);
	CHECK_EQ(bs_pool_extend(pool, 0), 0);
	CHECK_EQ(bs_pool_status(pool, &status), 0);
	CHECK_EQ(status.data_blocks, 2 * BLOCKS);
	CHECK_EQ(bs_pool_close(pool), 0);
}

static void test_a_transaction_is_begun_once_and_ended_with_the_right_id(void)
{
	struct bs_pool *pool = make_pool();
	struct bs_pool_status status;

	CHECK_EQ(bs_pool_end(pool, 0, 1), -EINVAL);
	CHECK_EQ(bs_pool_begin(pool), 0);
	CHECK_EQ(bs_pool_begin(pool), -EDEADLK);
	CHECK_EQ(bs_pool_commit(pool), -EDEADLK);
	CHECK_EQ(bs_pool_hold_metadata(pool), -EDEADLK);
	CHECK_EQ(bs_pool_release_metadata(pool), -EDEADLK);
	CHECK_EQ(bs_pool_close(pool), -EBUSY);
	CHECK_EQ(bs_pool_create_device(pool, 1), 0);
	CHECK_EQ(bs_pool_end(pool, 5, 6), -EINVAL);
	CHECK_EQ(bs_pool_begin(pool), 0);
	CHECK_EQ(bs_pool_extend(pool, 0), 0);
	CHECK_EQ(bs_pool_end(pool, 0, 7), 0);
	CHECK_EQ(bs_pool_status(pool, &status), 0);
	CHECK_EQ(status.transaction_id, 7);
	CHECK_EQ(bs_pool_close(pool), 0);
}

static void *begin_and_end(void *pool)
{
	CHECK_EQ(bs_pool_begin(pool), 0);
	CHECK_EQ(bs_pool_end(pool, 1, 2), 0);
	return NULL;
}

static void *commit_and_hold(void *pool)
{
	CHECK_EQ(bs_pool_commit(pool), 0);
	CHECK_EQ(bs_pool_hold_metadata(pool), 0);
	CHECK_EQ(bs_pool_release_metadata(pool), 0);
	return NULL;
}

static void test_other_threads_wait_for_the_end_of_a_transaction(void)
{
	struct bs_pool *pool = make_pool();
	struct bs_pool_status status;
	pthread_t threads[2];

	CHECK_EQ(bs_pool_begin(pool), 0);
	CHECK_EQ(bs_pool_create_device(pool, 1), 0);
	CHECK_EQ(pthread_create(&threads[0], NULL, begin_and_end, pool), 0);
	CHECK_EQ(pthread_create(&threads[1], NULL, commit_and_hold, pool), 0);
	usleep(50000);
	CHECK_EQ(bs_pool_end(pool, 0, 1), 0);
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	CHECK_EQ(bs_pool_status(pool, &status), 0);
	CHECK_EQ(status.transaction_id, 2);
	CHECK_EQ(bs_pool_close(pool), 0);
}

static void test_what_is_read_only_changes_nothing(void)
{
	struct bs_pool *pool = make_pool();
	struct bs_device *device;
	static char bytes[512];

	CHECK_EQ(bs_pool_create_device(pool, 1), 0);
	CHECK_EQ(bs_pool_close(pool), 0);
	CHECK_EQ(bs_pool_open(metadata, data, BS_POOL_READ_ONLY, &pool), 0);
	CHECK_EQ(bs_pool_begin(pool), -EROFS);
	CHECK_EQ(bs_pool_create_device(pool, 2), -EROFS);
	CHECK_EQ(bs_pool_extend(pool, 0), -EROFS);
	CHECK_EQ(bs_pool_hold_metadata(pool), -EROFS);
	CHECK_EQ(bs_device_open(pool, 1, INT64_MAX, &device), -EINVAL);
	CHECK_EQ(bs_device_open(pool, 2, BLOCK, &device), -ENODATA);
	CHECK_EQ(bs_device_open(pool, 1, BLOCK, &device), 0);
	CHECK_EQ(bs_device_write(device, 0, bytes, sizeof(bytes)), -EROFS);
	CHECK_EQ(bs_device_flush(device), 0);
	CHECK_EQ(bs_pool_close(pool), -EBUSY);
	bs_device_close(device);
	CHECK_EQ(bs_pool_close(pool), 0);
}

static void test_nothing_is_closed_twice(void)
{
	bs_pool_abandon(NULL);
	bs_device_close(NULL);
	CHECK_EQ(bs_pool_close(NULL), 0);
}

int main(void)
{
	RUN(test_format_refuses_what_no_pool_can_be);
	RUN(test_a_shorter_data_device_is_refused);
	RUN(test_extension_keeps_to_the_devices);
	RUN(test_a_transaction_is_begun_once_and_ended_with_the_right_id);
	RUN(test_other_threads_wait_for_the_end_of_a_transaction);
	RUN(test_what_is_read_only_changes_nothing);
	RUN(test_nothing_is_closed_twice);
	return 0;
}
