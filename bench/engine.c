/*
 * The engine's data path beside the plain system call, on the same files in one run; prints one JSON object a
 * line.
 *
 *   bench_engine DIRECTORY [SECONDS A SLICE]      (12 GiB are free there)
 *
 * The two sides of a pair alternate in short slices, so that the machine's load falls on both alike; the
 * ratio is of their best slices. Not measured: the loop device and FUSE above the engine, cold caches, more
 * than one thread.
 */
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "blocksnap.h"
#include "io.h"
#include "thin_metadata.h"

#define MIB (1ull << 20)
#define GIB (1ull << 30)
#define SLICES 8

static char metadata[512], data[512];
static double slice_seconds = 0.25;

static void fail(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, bs_last_error());
	exit(1);
}

static void must(int64_t r, const char *what)
{
	if (r < 0)
		fail(what);
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static uint64_t random_state = 42;

static uint64_t random_next(void)
{
	uint64_t z = (random_state += 0x9e3779b97f4a7c15ull);

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return z ^ (z >> 31);
}

static void make_file(const char *path, uint64_t size)
{
	int fd = open(path, O_CREAT | O_TRUNC | O_RDWR, 0600);

	if (fd < 0 || ftruncate(fd, size) < 0) {
		perror(path);
		exit(1);
	}
	close(fd);
}

static struct bs_pool *make_pool(uint64_t data_size, uint64_t block_size, uint64_t metadata_size)
{
	struct bs_pool *pool;

	make_file(metadata, metadata_size);
	make_file(data, data_size);
	must(bs_pool_format(metadata, data, data_size, block_size), "format");
	must(bs_pool_open(metadata, data, 0, &pool), "open");
	return pool;
}

static void fill(struct bs_device *device, uint64_t size)
{
	char *buffer = calloc(1, MIB);

	for (uint64_t at = 0; at < size; at += MIB)
		must(bs_device_write(device, at, buffer, MIB), "fill");
	free(buffer);
}

/* Operations of one kind a second, over a slice. */
typedef void operation(void *context, uint64_t offset, char *buffer);

static double rate(operation *run, void *context, uint64_t size)
{
	static char buffer[4096] __attribute__((aligned(4096)));
	double begin = now();
	uint64_t done = 0;

	while (now() - begin < slice_seconds)
		for (int i = 0; i < 256; i++, done++)
			run(context, random_next() % (size / 4096) * 4096, buffer);
	return done / (now() - begin);
}

static void compare_rates(const char *name, operation *ours, void *our_context, operation *theirs,
	void *their_context, uint64_t size)
{
	double best_ours = 0, best_theirs = 0;

	for (int i = 0; i < SLICES; i++) {
		double a = rate(ours, our_context, size), b = rate(theirs, their_context, size);

		best_ours = a > best_ours ? a : best_ours;
		best_theirs = b > best_theirs ? b : best_theirs;
	}
	printf("{\"name\": \"%s\", \"ours\": %.0f, \"peer\": %.0f, \"unit\": \"1/s\", \"ratio\": %.3f}\n",
		name, best_ours, best_theirs, best_ours / best_theirs);
}

static void engine_write(void *context, uint64_t offset, char *buffer)
{
	must(bs_device_write(context, offset, buffer, 4096), "write");
}

static void engine_read(void *context, uint64_t offset, char *buffer)
{
	must(bs_device_read(context, offset, buffer, 4096), "read");
}

static void plain_write(void *context, uint64_t offset, char *buffer)
{
	if (pwrite(*(int *)context, buffer, 4096, offset) != 4096)
		fail("pwrite");
}

static void plain_read(void *context, uint64_t offset, char *buffer)
{
	if (pread(*(int *)context, buffer, 4096, offset) != 4096)
		fail("pread");
}

static void bench_mapped(void)
{
	uint64_t size = 512 * MIB;
	struct bs_pool *pool = make_pool(size + 64 * MIB, 65536, 16 * MIB);
	struct bs_device *device;
	int fd = open(data, O_RDWR);

	must(bs_pool_create_device(pool, 1), "create");
	must(bs_device_open(pool, 1, size, &device), "open");
	fill(device, size);
	compare_rates("4K random write, mapped, against pwrite on the same file", engine_write, device,
		plain_write, &fd, size);
	compare_rates("4K random read, mapped, against pread on the same file", engine_read, device,
		plain_read, &fd, size);
	close(fd);
	bs_device_close(device);
	must(bs_pool_close(pool), "close");
}

/* First writes to shared 64K blocks, in an order that no one can foresee; side_by_side.py runs the same on
 * qcow2. */
static void bench_break_sharing(void)
{
	uint64_t size = 512 * MIB, blocks = size / 65536;
	struct bs_pool *pool = make_pool(2 * size + 64 * MIB, 65536, 16 * MIB);
	struct bs_device *device, *snap;
	static char buffer[4096];
	double best = 0;

	must(bs_pool_create_device(pool, 1), "create");
	must(bs_device_open(pool, 1, size, &device), "open");
	fill(device, size);
	for (uint32_t round = 0; round < 3; round++) {
		must(bs_pool_create_snapshot(pool, 2 + round, 1), "snapshot");
		must(bs_device_open(pool, 2 + round, size, &snap), "open");
		double begin = now();
		for (uint64_t i = 0; i < blocks; i++)
			must(bs_device_write(snap, (i * 4099 % blocks) * 65536 + 8192, buffer, 4096),
				"write");
		double r = blocks / (now() - begin);
		best = r > best ? r : best;
		bs_device_close(snap);
		must(bs_pool_delete_device(pool, 2 + round), "delete");
		must(bs_pool_commit(pool), "commit");
	}
	printf("{\"name\": \"first 4K write to shared 64K blocks\", \"ours\": %.0f, \"unit\": \"1/s\"}\n",
		best);
	bs_device_close(device);
	must(bs_pool_close(pool), "close");
}

/* The same random writes, spread over a chain of snapshots or over one, and then the same reads of the last.
 */
static struct bs_device *make_chain(struct bs_pool *pool, uint32_t first_id, uint32_t depth, uint64_t size)
{
	struct bs_device *device;
	static char buffer[4096];

	must(bs_pool_create_device(pool, first_id), "create");
	must(bs_device_open(pool, first_id, size, &device), "open");
	fill(device, size);
	for (uint32_t i = 1; i <= depth; i++) {
		bs_device_close(device);
		must(bs_pool_create_snapshot(pool, first_id + i, first_id + i - 1), "snapshot");
		must(bs_device_open(pool, first_id + i, size, &device), "open");
		for (uint32_t k = 0; k < 12800 / depth; k++)
			must(bs_device_write(device, random_next() % (size / 4096) * 4096, buffer, 4096),
				"write");
	}
	return device;
}

static void bench_snapshot_chain(void)
{
	uint64_t size = 256 * MIB;
	struct bs_pool *pool = make_pool(4096 * MIB, 65536, 32 * MIB);
	struct bs_device *one = make_chain(pool, 1, 1, size), *deep = make_chain(pool, 1000, 128, size);

	compare_rates(
		"4K random read, 128 snapshots deep, against one", engine_read, deep, engine_read, one, size);
	bs_device_close(one);
	bs_device_close(deep);
	must(bs_pool_close(pool), "close");
}

static double snapshot_time(uint64_t size, uint64_t block_size)
{
	struct bs_pool *pool = make_pool(size + 64 * MIB, block_size, 256 * MIB);
	struct bs_device *device;
	double best = 1e9;

	must(bs_pool_create_device(pool, 1), "create");
	must(bs_device_open(pool, 1, size, &device), "open");
	fill(device, size);
	must(bs_pool_commit(pool), "commit");
	for (uint32_t id = 2; id < 34; id++) {
		double begin = now();

		must(bs_pool_create_snapshot(pool, id, 1), "snapshot");
		double took = now() - begin;
		best = took < best ? took : best;
		must(bs_pool_commit(pool), "commit");
	}
	bs_device_close(device);
	must(bs_pool_close(pool), "close");
	return best;
}

static void bench_snapshot(void)
{
	double small = snapshot_time(1 * GIB, 65536), large = snapshot_time(10 * GIB, 65536);

	printf("{\"name\": \"snapshot of a fully written device, 1 GiB\", \"ours\": %.1f, \"unit\": "
	       "\"us\"}\n",
		small * 1e6);
	printf("{\"name\": \"snapshot of a fully written device, 10 GiB\", \"ours\": %.1f, \"unit\": \"us\", "
	       "\"ratio\": %.2f}\n",
		large * 1e6, large / small);
}

/* ---- a pool of ten million mappings ---- */

#define MANY 10000000ull

static void make_many_mappings(void)
{
	struct io *io;
	struct thin_metadata *md;
	struct thin_device *device;
	uint64_t data_block, packed, written;

	make_file(metadata, 512 * MIB);
	make_file(data, (MANY + 1000000) * 4096);
	must(io_file_open(metadata, 0, &io), "open metadata");
	must(thin_metadata_format(io, 8, MANY + 1000000), "format");
	must(thin_metadata_open(io, &md), "open");
	must(thin_create(md, 1), "create");
	must(thin_device_get(md, 1, &device), "get");
	for (uint64_t i = 0; i < MANY; i++) {
		must(thin_reserve(md, &data_block), "reserve");
		must(thin_insert(md, device, i, data_block, &packed), "insert");
		if (i % 100000 == 99999)
			must(thin_metadata_commit(md, &written), "commit");
	}
	thin_device_put(md, device);
	thin_metadata_close(md);
	io_close(io);
}

/* In a process of its own, so that the peak is that of opening, and of reading all over the device
 * afterwards. */
static int open_many(void)
{
	struct bs_pool *pool;
	struct bs_device *device;
	struct rusage usage;
	static char buffer[4096];
	double begin = now();

	must(bs_pool_open(metadata, data, 0, &pool), "open");
	must(bs_device_open(pool, 1, MANY * 4096, &device), "open");
	double opened = now() - begin;
	getrusage(RUSAGE_SELF, &usage);
	long at_open = usage.ru_maxrss;
	for (int i = 0; i < 200000; i++)
		engine_read(device, random_next() % MANY * 4096, buffer);
	getrusage(RUSAGE_SELF, &usage);
	printf("{\"name\": \"open a pool of ten million mappings\", \"ours\": %.1f, \"unit\": \"ms\"}\n",
		opened * 1e3);
	printf("{\"name\": \"peak memory at open\", \"ours\": %.1f, \"unit\": \"MiB\"}\n", at_open / 1024.0);
	printf("{\"name\": \"peak memory after 200,000 random reads\", \"ours\": %.1f, \"unit\": \"MiB\"}\n",
		usage.ru_maxrss / 1024.0);
	bs_device_close(device);
	must(bs_pool_close(pool), "close");
	return 0;
}

static void bench_open(const char *program, const char *directory)
{
	char command[1200];

	make_many_mappings();
	fflush(stdout);
	snprintf(command, sizeof(command), "%s %s open-many", program, directory);
	if (system(command) != 0)
		exit(1);
}

int main(int argc, char **argv)
{
	if (argc < 2) {
		fprintf(stderr, "usage: %s DIRECTORY [SECONDS A SLICE]\n", argv[0]);
		return 2;
	}
	snprintf(metadata, sizeof(metadata), "%s/bench-metadata", argv[1]);
	snprintf(data, sizeof(data), "%s/bench-data", argv[1]);
	if (argc > 2 && strcmp(argv[2], "open-many") == 0)
		return open_many();
	if (argc > 2)
		slice_seconds = atof(argv[2]);
	bench_mapped();
	bench_break_sharing();
	bench_snapshot_chain();
	bench_snapshot();
	bench_open(argv[0], argv[1]);
	unlink(metadata);
	unlink(data);
	return 0;
}
