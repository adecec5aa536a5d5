/* What a watcher hears of a pool's space, and who waits in a full one. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "test.h"

#define BLOCK 65536ull
#define DATA_BLOCKS 64ull

static char metadata[64], data[64];
static const char buffer[BLOCK];

static void make_file(const char *path, uint64_t size)
{
	int fd = open(path, O_CREAT | O_RDWR | O_CLOEXEC, 0600);

	CHECK_EQ(ftruncate(fd, (off_t)size), 0);
	close(fd);
}

static struct bs_pool *make_pool(struct bs_device **ret)
{
	struct bs_pool *pool;

	snprintf(metadata, sizeof(metadata), "blocksnap-test-%d-metadata", getpid());
	snprintf(data, sizeof(data), "blocksnap-test-%d-data", getpid());
	unlink(metadata);
	unlink(data);
	make_file(metadata, 2 << 20);
	make_file(data, DATA_BLOCKS * BLOCK);
	CHECK_EQ(bs_pool_format(metadata, data, DATA_BLOCKS * BLOCK, BLOCK), 0);
	CHECK_EQ(bs_pool_open(metadata, data, 0, &pool), 0);
	CHECK_EQ(bs_pool_create_device(pool, 1), 0);
	CHECK_EQ(bs_device_open(pool, 1, 1ull << 30, ret), 0);
	return pool;
}

static void end_pool(struct bs_pool *pool, struct bs_device *device)
{
	struct bs_check_result result;

	bs_device_close(device);
	CHECK_EQ(bs_pool_close(pool), 0);
	CHECK_EQ(bs_metadata_check(metadata, 2, &result), 0);
	CHECK_EQ(result.fatal + result.leaks + result.warnings, 0);
	unlink(metadata);
	unlink(data);
}

static void write_blocks(struct bs_device *device, uint64_t begin, uint64_t end)
{
	for (uint64_t i = begin; i < end; i++)
		CHECK_EQ(bs_device_write(device, i * BLOCK, buffer, BLOCK), (int64_t)BLOCK);
}

static uint64_t told(int fd)
{
	uint64_t count = 0;

	return read(fd, &count, sizeof(count)) == sizeof(count) ? count : 0;
}

static void low_data_are_told_once(void)
{
	struct bs_device *device;
	struct bs_pool *pool = make_pool(&device);
	int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

	CHECK_EQ(bs_pool_watch(pool, fd, 16 * BLOCK, 0), 0);
	write_blocks(device, 0, DATA_BLOCKS - 17);
	CHECK_EQ(told(fd), 0);
	write_blocks(device, DATA_BLOCKS - 17, DATA_BLOCKS - 8);
	CHECK_EQ(told(fd), 1);
	CHECK_EQ(bs_pool_watch(pool, fd, 4 * BLOCK, 0), 0);
	write_blocks(device, DATA_BLOCKS - 8, DATA_BLOCKS - 4);
	CHECK_EQ(told(fd), 1);
	CHECK_EQ(bs_pool_watch(pool, -1, 0, 0), 0);
	write_blocks(device, DATA_BLOCKS - 4, DATA_BLOCKS);
	CHECK_EQ(told(fd), 0);
	close(fd);
	end_pool(pool, device);
}

static void a_full_pool_fails_at_once_when_nobody_is_to_wait(void)
{
	struct bs_device *device;
	struct bs_pool *pool = make_pool(&device);
	int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

	CHECK_EQ(bs_pool_watch(pool, fd, 0, 0), 0);
	write_blocks(device, 0, DATA_BLOCKS);
	told(fd);
	CHECK_EQ(bs_device_write(device, DATA_BLOCKS * BLOCK, buffer, BLOCK), -ENOSPC);
	CHECK(told(fd) > 0);
	CHECK_EQ(bs_pool_watch(pool, fd, 0, 50), 0);
	CHECK_EQ(bs_device_write(device, DATA_BLOCKS * BLOCK, buffer, BLOCK), -ENOSPC);
	CHECK(strstr(bs_last_error(), "full"));
	close(fd);
	end_pool(pool, device);
}

static void *write_more(void *device)
{
	write_blocks(device, DATA_BLOCKS, 2 * DATA_BLOCKS);
	return NULL;
}

static void *write_in_vain(void *device)
{
	CHECK_EQ(bs_device_write(device, DATA_BLOCKS * BLOCK, buffer, BLOCK), -ENOSPC);
	return NULL;
}

/* A thread that waits in a full pool; told returns once it does. */
static pthread_t wait_in(struct bs_pool *pool, struct bs_device *device, int fd, void *(*work)(void *))
{
	pthread_t thread;

	CHECK_EQ(bs_pool_watch(pool, fd, 0, 60000), 0);
	write_blocks(device, 0, DATA_BLOCKS);
	told(fd);
	CHECK_EQ(pthread_create(&thread, NULL, work, device), 0);
	while (!told(fd))
		usleep(1000);
	return thread;
}

static void who_waits_goes_on_when_the_pool_has_grown(void)
{
	struct bs_device *device;
	struct bs_pool *pool = make_pool(&device);
	int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	pthread_t thread = wait_in(pool, device, fd, write_more);

	make_file(data, 2 * DATA_BLOCKS * BLOCK);
	CHECK_EQ(bs_pool_extend(pool, 0), 0);
	pthread_join(thread, NULL);
	close(fd);
	end_pool(pool, device);
}

static void who_waits_fails_when_nobody_makes_the_pool_grow_any_more(void)
{
	struct bs_device *device;
	struct bs_pool *pool = make_pool(&device);
	int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	pthread_t thread = wait_in(pool, device, fd, write_in_vain);

	CHECK_EQ(bs_pool_watch(pool, fd, 0, 0), 0);
	pthread_join(thread, NULL);
	close(fd);
	end_pool(pool, device);
}

int main(void)
{
	RUN(low_data_are_told_once);
	RUN(a_full_pool_fails_at_once_when_nobody_is_to_wait);
	RUN(who_waits_goes_on_when_the_pool_has_grown);
	RUN(who_waits_fails_when_nobody_makes_the_pool_grow_any_more);
	return 0;
}
