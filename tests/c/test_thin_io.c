/* The user engine over real files: contents against plain arrays, several threads, what a crash leaves. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include "test.h"

#define BLOCK 65536ull
#define KIB 1024ull
#define MIB (1024 * KIB)

static char metadata[64], data[64];

static void make_files(uint64_t metadata_size, uint64_t data_size)
{
	snprintf(metadata, sizeof(metadata), "blocksnap-test-%d-metadata", getpid());
	snprintf(data, sizeof(data), "blocksnap-test-%d-data", getpid());
	unlink(metadata);
	unlink(data);
	int fd = open(metadata, O_CREAT | O_RDWR, 0600);
	CHECK_EQ(ftruncate(fd, metadata_size), 0);
	close(fd);
	fd = open(data, O_CREAT | O_RDWR, 0600);
	CHECK_EQ(ftruncate(fd, data_size), 0);
	close(fd);
}

static void remove_files(void)
{
	unlink(metadata);
	unlink(data);
}

static struct bs_pool *open_pool(unsigned int flags)
{
	struct bs_pool *pool;

	CHECK_EQ(bs_pool_open(metadata, data, flags, &pool), 0);
	return pool;
}

static struct bs_pool *make_pool(uint64_t data_size, uint64_t block_size, unsigned int flags)
{
	make_files(4 * MIB, data_size);
	CHECK_EQ(bs_pool_format(metadata, data, data_size, block_size), 0);
	return open_pool(flags);
}

static void close_and_check(struct bs_pool *pool)
{
	char command[128];
	struct bs_check_result result;

	CHECK_EQ(bs_pool_close(pool), 0);
	snprintf(command, sizeof(command), "thin_check -q %s", metadata);
	CHECK_EQ(system(command), 0);
	CHECK_EQ(bs_metadata_check(metadata, 2, &result), 0);
	CHECK_EQ(result.fatal + result.leaks + result.warnings, 0);
	remove_files();
}

static struct bs_pool_counters counters(struct bs_pool *pool)
{
	struct bs_pool_counters c;

	bs_pool_counters(pool, &c);
	return c;
}

static void test_counters_tell_what_was_done(void)
{
	struct bs_pool *pool = make_pool(16 * MIB, BLOCK, 0);
	struct bs_device *origin, *snap;
	static char buffer[2 * BLOCK];

	memset(buffer, 'a', sizeof(buffer));
	CHECK_EQ(bs_pool_create_device(pool, 1), 0);
	CHECK_EQ(bs_device_open(pool, 1, 4 * MIB, &origin), 0);
	CHECK_EQ(bs_device_write(origin, 4096, buffer, 4096), 4096);
	CHECK_EQ(counters(pool).zero_filled_bytes, BLOCK - 4096);
	CHECK_EQ(bs_device_write(origin, BLOCK, buffer, BLOCK), BLOCK);
	CHECK_EQ(counters(pool).zero_filled_bytes, BLOCK - 4096);
	CHECK_EQ(counters(pool).blocks_provisioned, 2);

	CHECK_EQ(bs_pool_create_snapshot(pool, 2, 1), 0);
	CHECK_EQ(bs_device_open(pool, 2, 4 * MIB, &snap), 0);
	CHECK_EQ(bs_device_write(origin, 100, buffer, 10), 10);
	CHECK_EQ(counters(pool).copied_bytes, BLOCK - 10);
	CHECK_EQ(counters(pool).blocks_copied, 1);
	CHECK_EQ(bs_device_write(origin, 200, buffer, 10), 10);
	CHECK_EQ(counters(pool).blocks_copied, 1);
	/* A write that covers the block copies nothing. */
	CHECK_EQ(bs_device_write(origin, BLOCK, buffer, BLOCK), BLOCK);
	CHECK_EQ(counters(pool).copied_bytes, BLOCK - 10);
	CHECK_EQ(counters(pool).blocks_overwritten, 1);
	CHECK_EQ(counters(pool).application_bytes, 4096 + BLOCK + 10 + 10 + BLOCK);
	bs_device_close(origin);
	bs_device_close(snap);
	close_and_check(pool);
}

static void test_survivor_of_a_deleted_snapshot_copies_nothing(void)
{
	struct bs_pool *pool = make_pool(16 * MIB, BLOCK, 0);
	struct bs_device *origin;
	char buffer[4096] = "x";

	CHECK_EQ(bs_pool_create_device(pool, 1), 0);
	CHECK_EQ(bs_device_open(pool, 1, 4 * MIB, &origin), 0);
	for (uint64_t at = 0; at < 2 * MIB; at += 4096)
		CHECK_EQ(bs_device_write(origin, at, buffer, 4096), 4096);
	CHECK_EQ(bs_pool_create_snapshot(pool, 2, 1), 0);
	CHECK_EQ(bs_device_write(origin, 0, buffer, 4096), 4096);
	CHECK_EQ(bs_pool_delete_device(pool, 2), 0);
	/* Until the deletion is committed a crash would bring the snapshot back: only then is the origin
	 * alone. */
	CHECK_EQ(bs_pool_commit(pool), 0);
	uint64_t copied = counters(pool).copied_bytes;
	for (uint64_t at = 0; at < 2 * MIB; at += BLOCK)
		CHECK_EQ(bs_device_write(origin, at, buffer, 4096), 4096);
	CHECK_EQ(counters(pool).copied_bytes, copied);
	bs_device_close(origin);
	close_and_check(pool);
}

static void test_second_open_names_the_holder(void)
{
	struct bs_pool *pool = make_pool(16 * MIB, BLOCK, 0);
	int status;

	if (fork() == 0) {
		struct bs_pool *second;
		char pid[32];

		snprintf(pid, sizeof(pid), "process %d", getppid());
		_exit(!(bs_pool_open(metadata, data, 0, &second) == -EBUSY && strstr(bs_last_error(), pid)));
	}
	CHECK(wait(&status) > 0);
	CHECK_EQ(status, 0);
	close_and_check(pool);
}

static void test_out_of_space_is_an_error_at_once_and_ends_with_extend(void)
{
	struct bs_pool *pool = make_pool(4 * BLOCK, BLOCK, 0);
	struct bs_device *device;
	static char buffer[BLOCK];

	CHECK_EQ(bs_pool_create_device(pool, 1), 0);
	CHECK_EQ(bs_device_open(pool, 1, MIB, &device), 0);
	for (uint64_t b = 0; b < 4; b++)
		CHECK_EQ(bs_device_write(device, b * BLOCK, buffer, BLOCK), BLOCK);
	CHECK_EQ(bs_device_write(device, 4 * BLOCK, buffer, BLOCK), -ENOSPC);
	CHECK_EQ(bs_device_write(device, 0, buffer, BLOCK), BLOCK);
	/* What a discard frees is found, with a commit in between. */
	CHECK_EQ(bs_device_discard(device, 0, BLOCK), 0);
	CHECK_EQ(bs_device_write(device, 4 * BLOCK, buffer, BLOCK), BLOCK);
	CHECK_EQ(bs_device_write(device, 5 * BLOCK, buffer, BLOCK), -ENOSPC);
	CHECK_EQ(truncate(data, 8 * BLOCK), 0);
	CHECK_EQ(bs_pool_extend(pool, 0), 0);
	CHECK_EQ(bs_device_write(device, 5 * BLOCK, buffer, BLOCK), BLOCK);
	bs_device_close(device);
	close_and_check(pool);
}

static void test_metadata_full_is_refused_cleanly(void)
{
	struct bs_device *device;
	char buffer[4096] = "y";
	int64_t r = 4096;
	uint64_t at = 0;

	make_files(200 * 4096, 1024 * MIB);
	CHECK_EQ(bs_pool_format(metadata, data, 1024 * MIB, 4096), 0);
	struct bs_pool *pool = open_pool(0);
	CHECK_EQ(bs_pool_create_device(pool, 1), 0);
	CHECK_EQ(bs_device_open(pool, 1, 1024 * MIB, &device), 0);
	for (; r == 4096 && at < 1024 * MIB; at += 4096 * 97)
		r = bs_device_write(device, at, buffer, 4096);
	for (at = 0; r == 4096 && at < 1024 * MIB; at += 4096)
		r = bs_device_write(device, at, buffer, 4096);
	CHECK_EQ(r, -ENOSPC);
	CHECK_EQ(bs_pool_commit(pool), 0);
	CHECK_EQ(bs_device_discard(device, 0, 512 * MIB), 0);
	CHECK_EQ(bs_pool_commit(pool), 0);
	bs_device_close(device);
	close_and_check(pool);
}

/* Blocks that many snapshots share have large counts: a transaction that changes them all fits nevertheless. */
static void test_deletions_of_much_shared_devices_fit_in_little_metadata(void)
{
	struct bs_pool *pool = make_pool(64 * MIB, BLOCK, 0);
	struct bs_device *device;
	char buffer[4096] = "z";

	CHECK_EQ(bs_pool_create_device(pool, 0), 0);
	CHECK_EQ(bs_device_open(pool, 0, 32 * MIB, &device), 0);
	for (uint64_t at = 0; at < 32 * MIB; at += BLOCK)
		CHECK_EQ(bs_device_write(device, at, buffer, sizeof(buffer)), sizeof(buffer));
	bs_device_close(device);
	for (uint32_t id = 1; id <= 6; id++) {
		CHECK_EQ(bs_pool_create_snapshot(pool, id, 0), 0);
		CHECK_EQ(bs_device_open(pool, id, 32 * MIB, &device), 0);
		/* Each leaf is no longer shared, nearly all of its blocks are. */
		for (uint64_t at = 0; at < 32 * MIB; at += 64 * BLOCK)
			CHECK_EQ(bs_device_write(device, at, buffer, sizeof(buffer)), sizeof(buffer));
		bs_device_close(device);
	}
	CHECK_EQ(bs_pool_commit(pool), 0);
	CHECK_EQ(bs_pool_begin(pool), 0);
	for (uint32_t id = 1; id <= 6; id++)
		CHECK_EQ(bs_pool_delete_device(pool, id), 0);
	CHECK_EQ(bs_pool_end(pool, 0, 1), 0);
	close_and_check(pool);
}

static void test_abandoned_pool_shows_its_last_commit(void)
{
	struct bs_pool *pool = make_pool(16 * MIB, BLOCK, 0);
	struct bs_device *device;
	char buffer[4096], seen[4096];
	struct bs_device_info info[8];

	memset(buffer, 'c', sizeof(buffer));
	CHECK_EQ(bs_pool_create_device(pool, 1), 0);
	CHECK_EQ(bs_device_open(pool, 1, MIB, &device), 0);
	CHECK_EQ(bs_device_write(device, 0, buffer, 4096), 4096);
	CHECK_EQ(bs_device_flush(device), 0);
	CHECK_EQ(bs_pool_begin(pool), 0);
	CHECK_EQ(bs_pool_create_snapshot(pool, 2, 1), 0);
	bs_pool_abandon(pool);

	pool = open_pool(0);
	CHECK_EQ(bs_pool_devices(pool, 0, info, 8), 1);
	CHECK_EQ(bs_device_open(pool, 1, MIB, &device), 0);
	CHECK_EQ(bs_device_read(device, 0, seen, 4096), 4096);
	CHECK_EQ(memcmp(seen, buffer, 4096), 0);
	bs_device_close(device);
	close_and_check(pool);
}

/* ---- random requests against arrays ---- */

#define RANDOM_SIZE (3 * MIB + 12345)
#define RANDOM_DEVICES 4

static char *contents[RANDOM_DEVICES];
static struct bs_device *handles[RANDOM_DEVICES];

static void random_device(struct bs_pool *pool, uint64_t *seed)
{
	uint32_t id = test_random(seed) % RANDOM_DEVICES, origin = test_random(seed) % RANDOM_DEVICES;

	if (handles[id]) {
		bs_device_close(handles[id]);
		CHECK_EQ(bs_pool_delete_device(pool, id), 0);
		handles[id] = NULL;
		return;
	}
	if (handles[origin]) {
		CHECK_EQ(bs_pool_create_snapshot(pool, id, origin), 0);
		memcpy(contents[id], contents[origin], RANDOM_SIZE);
	} else {
		CHECK_EQ(bs_pool_create_device(pool, id), 0);
		memset(contents[id], 0, RANDOM_SIZE);
	}
	CHECK_EQ(bs_device_open(pool, id, RANDOM_SIZE, &handles[id]), 0);
}

static void random_request(uint64_t *seed, char *buffer)
{
	uint32_t id = test_random(seed) % RANDOM_DEVICES;
	uint64_t offset = test_random(seed) % RANDOM_SIZE;
	uint64_t length = test_random(seed) % (test_random(seed) % 4 ? 20000 : 500000);
	uint64_t unit = test_random(seed) % 2 ? 4096 : 1;

	offset = offset / unit * unit;
	length = length / unit * unit;
	if (length > RANDOM_SIZE - offset)
		length = RANDOM_SIZE - offset;
	if (!handles[id])
		return;
	switch (test_random(seed) % 5) {
	case 0:
		CHECK_EQ(bs_device_discard(handles[id], offset, length), 0);
		memset(contents[id] + offset, 0, length);
		break;
	case 1:
		CHECK_EQ(bs_device_read(handles[id], offset, buffer, length), length);
		CHECK_EQ(memcmp(buffer, contents[id] + offset, length), 0);
		break;
	default:
		memset(buffer, test_random(seed), length);
		CHECK_EQ(bs_device_write(handles[id], offset, buffer, length), length);
		memcpy(contents[id] + offset, buffer, length);
	}
}

static void run_random(uint64_t seed, uint64_t block_size, unsigned int flags)
{
	struct bs_pool *pool = make_pool(64 * MIB, block_size, flags);
	char *buffer = aligned_alloc(4096, 512 * KIB);

	for (int i = 0; i < RANDOM_DEVICES; i++) {
		contents[i] = malloc(RANDOM_SIZE);
		handles[i] = NULL;
	}
	for (int step = 0; step < 1500; step++) {
		if (test_random(&seed) % 30 == 0)
			random_device(pool, &seed);
		else if (test_random(&seed) % 40 == 0)
			CHECK_EQ(bs_pool_commit(pool), 0);
		else
			random_request(&seed, buffer);
	}
	for (int i = 0; i < RANDOM_DEVICES; i++) {
		for (uint64_t at = 0; handles[i] && at < RANDOM_SIZE; at += 512 * KIB) {
			uint64_t n = RANDOM_SIZE - at < 512 * KIB ? RANDOM_SIZE - at : 512 * KIB;

			CHECK_EQ(bs_device_read(handles[i], at, buffer, n), n);
			CHECK_EQ(memcmp(buffer, contents[i] + at, n), 0);
		}
		bs_device_close(handles[i]);
		free(contents[i]);
	}
	free(buffer);
	close_and_check(pool);
}

static void test_random_requests_at_every_block_size(void)
{
	uint64_t sizes[] = {4096, 32768, 65536, 196608, 1048576};

	for (int i = 0; i < 5; i++) {
		run_random(i + 1, sizes[i], 0);
		run_random(i + 10, sizes[i], BS_POOL_DIRECT_IO | BS_POOL_PASSDOWN);
	}
}

/* ---- threads ---- */

#define THREADS 4
#define REGION (1 * MIB)

static struct bs_pool *shared_pool;
static struct bs_device *shared_device;
static _Atomic bool stop_snapshots;

/* Each thread owns a region and checks that it reads what it wrote last. */
static void *writer(void *argument)
{
	uint64_t seed = (uintptr_t)argument + 99, base = (uintptr_t)argument * REGION;
	char *own = calloc(1, REGION), *seen = malloc(REGION);

	for (int i = 0; i < 3000; i++) {
		uint64_t at = test_random(&seed) % (REGION - 9000), n = test_random(&seed) % 9000;

		if (i % 7 == 0) {
			CHECK_EQ(bs_device_read(shared_device, base + at, seen, n), n);
			CHECK_EQ(memcmp(seen, own + at, n), 0);
		} else if (i % 50 == 1) {
			CHECK_EQ(bs_device_discard(shared_device, base + at, n), 0);
			memset(own + at, 0, n);
		} else if (i % 100 == 2) {
			CHECK_EQ(bs_device_flush(shared_device), 0);
		} else {
			memset(own + at, test_random(&seed), n);
			CHECK_EQ(bs_device_write(shared_device, base + at, own + at, n), n);
		}
	}
	CHECK_EQ(bs_device_read(shared_device, base, seen, REGION), REGION);
	CHECK_EQ(memcmp(seen, own, REGION), 0);
	free(own);
	free(seen);
	return NULL;
}

/* A snapshot read twice, some time apart, is the same: no write in flight reached it. */
static void *snapshotter(void *argument)
{
	static char first[THREADS * REGION], second[THREADS * REGION];

	for (uint32_t id = 2; !stop_snapshots; id++) {
		struct bs_device *snap;

		CHECK_EQ(bs_pool_create_snapshot(shared_pool, id, 1), 0);
		CHECK_EQ(bs_device_open(shared_pool, id, THREADS * REGION, &snap), 0);
		CHECK_EQ(bs_device_read(snap, 0, first, sizeof(first)), sizeof(first));
		usleep(5000);
		CHECK_EQ(bs_device_read(snap, 0, second, sizeof(second)), sizeof(second));
		CHECK_EQ(memcmp(first, second, sizeof(first)), 0);
		bs_device_close(snap);
		CHECK_EQ(bs_pool_delete_device(shared_pool, id), 0);
	}
	return argument;
}

static void run_threads(uint64_t block_size, unsigned int flags)
{
	pthread_t threads[THREADS], snapshots;

	shared_pool = make_pool(64 * MIB, block_size, flags);
	CHECK_EQ(bs_pool_create_device(shared_pool, 1), 0);
	CHECK_EQ(bs_device_open(shared_pool, 1, THREADS * REGION, &shared_device), 0);
	stop_snapshots = false;
	for (uintptr_t i = 0; i < THREADS; i++)
		pthread_create(&threads[i], NULL, writer, (void *)i);
	pthread_create(&snapshots, NULL, snapshotter, NULL);
	for (int i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	stop_snapshots = true;
	pthread_join(snapshots, NULL);
	bs_device_close(shared_device);
	close_and_check(shared_pool);
}

static void test_threads_with_snapshots(void)
{
	run_threads(4096, 0);
	run_threads(65536, BS_POOL_DIRECT_IO);
	run_threads(65536, BS_POOL_PASSDOWN);
}

int main(void)
{
	RUN(test_counters_tell_what_was_done);
	RUN(test_survivor_of_a_deleted_snapshot_copies_nothing);
	RUN(test_second_open_names_the_holder);
	RUN(test_out_of_space_is_an_error_at_once_and_ends_with_extend);
	RUN(test_metadata_full_is_refused_cleanly);
	RUN(test_deletions_of_much_shared_devices_fit_in_little_metadata);
	RUN(test_abandoned_pool_shows_its_last_commit);
	RUN(test_random_requests_at_every_block_size);
	RUN(test_threads_with_snapshots);
	return 0;
}
