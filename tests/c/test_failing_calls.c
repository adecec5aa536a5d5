/*
 * Calls to libc that fail: each scenario runs once for every call that it makes to get memory or to use a file, and that
 * one call fails (ENOMEM, EIO), alone or with all that follow; a transfer also stops half-way. The linker leads these
 * calls here (--wrap).
 *
 * Promises
 * 1. What fails says so in one line; what reports success after a failed call did all the same.
 * 2. What only reads leaves the file as it is.
 * 3. A pool that met a failure is sound afterwards, on the same files and without the failure.
 */
#include <errno.h>
#include <fcntl.h>
#include <sys/uio.h>

#include "thin_image.h"

#define BLOCK 65536ull
#define DATA_BLOCKS 24
#define POOL_METADATA (256 * METADATA_BLOCK_SIZE)

enum how { ONCE, LASTING, SHORT, WAYS };

static long calls, fail_at = -1; /* the engine's commit thread counts too */
static enum how how;
static int nowhere;

static bool fails(void)
{
	long n = __atomic_fetch_add(&calls, 1, __ATOMIC_RELAXED),
	     at = __atomic_load_n(&fail_at, __ATOMIC_RELAXED);

	return at >= 0 && (n == at || (how == LASTING && n > at));
}

#define WRAP(type, name, error, failed, parameters, ...)                                                     \
	type __real_##name parameters;                                                                       \
	type __wrap_##name parameters                                                                        \
	{                                                                                                    \
		if (!fails())                                                                                \
			return __real_##name(__VA_ARGS__);                                                   \
		errno = error;                                                                               \
		return failed;                                                                               \
	}

WRAP(void *, malloc, ENOMEM, NULL, (size_t size), size)
WRAP(void *, calloc, ENOMEM, NULL, (size_t nr, size_t size), nr, size)
WRAP(void *, realloc, ENOMEM, NULL, (void *old, size_t size), old, size)
WRAP(void *, reallocarray, ENOMEM, NULL, (void *old, size_t nr, size_t size), old, nr, size)
WRAP(void *, aligned_alloc, ENOMEM, NULL, (size_t alignment, size_t size), alignment, size)
WRAP(int, open64, EIO, -1, (const char *path, int flags), path, flags)
WRAP(int, fstat64, EIO, -1, (int fd, void *st), fd, st)
WRAP(off_t, lseek64, EIO, -1, (int fd, off_t offset, int whence), fd, offset, whence)
WRAP(int, fdatasync, EIO, -1, (int fd), fd)
WRAP(ssize_t, write, ENOSPC, -1, (int fd, const void *data, size_t length), fd, data, length)

/* Half of the bytes, of which the caller has to ask for the rest, or none. */
#define WRAP_TRANSFER(name, pointer, error)                                                                  \
	ssize_t __real_##name(int fd, pointer data, size_t length, off_t offset);                            \
	ssize_t __wrap_##name(int fd, pointer data, size_t length, off_t offset)                             \
	{                                                                                                    \
		bool failed = fails();                                                                       \
                                                                                                             \
		if (failed && how == SHORT)                                                                  \
			length = length / 1024 * 512;                                                        \
		if (!failed || (how == SHORT && length))                                                     \
			return __real_##name(fd, data, length, offset);                                      \
		errno = error;                                                                               \
		return -1;                                                                                   \
	}

WRAP_TRANSFER(pread64, void *, EIO)
WRAP_TRANSFER(pwrite64, const void *, ENOSPC)

#define WRAP_VECTOR(name, error)                                                                             \
	ssize_t __real_##name(int fd, const struct iovec *iov, int count, off_t offset);                     \
	ssize_t __wrap_##name(int fd, const struct iovec *iov, int count, off_t offset)                      \
	{                                                                                                    \
		bool failed = fails();                                                                       \
                                                                                                             \
		if (failed && how == SHORT)                                                                  \
			count = (count + 1) / 2;                                                             \
		if (!failed || how == SHORT)                                                                 \
			return __real_##name(fd, iov, count, offset);                                        \
		errno = error;                                                                               \
		return -1;                                                                                   \
	}

WRAP_VECTOR(preadv64, EIO)
WRAP_VECTOR(pwritev64, ENOSPC)

/* ---- what runs: each returns the first error, or 0 */

struct files {
	int metadata, data, output;
	char metadata_path[32], data_path[32], output_path[32];
};

static int make_file(const char *name, uint64_t size, char path[32])
{
	int fd = memfd_create(name, MFD_CLOEXEC);

	CHECK(fd >= 0 && ftruncate(fd, size) == 0);
	snprintf(path, 32, "/proc/self/fd/%d", fd);
	return fd;
}

static void first(int *error, int64_t r)
{
	if (r < 0 && *error == 0)
		*error = (int)r;
}

static int walk(struct files *f)
{
	struct bs_delta_range ranges[16];
	struct bs_usage usage[16];
	struct bs_mapping mappings[64];
	struct bs_device_info devices[16];
	struct bs_check_result result;
	uint8_t bits[DATA_BLOCKS * 20 / 8];
	int error = 0;

	first(&error, bs_metadata_check(f->metadata_path, nowhere, &result));
	first(&error, bs_metadata_dump(f->metadata_path, 0, nowhere));
	first(&error, bs_metadata_delta(f->metadata_path, 0, 1, 2, nowhere));
	first(&error, bs_metadata_delta_ranges(f->metadata_path, 0, 2, 5, 0, ranges, 16));
	first(&error, bs_metadata_usage(f->metadata_path, 0, usage, 16));
	first(&error, bs_metadata_devices(f->metadata_path, 0, 0, devices, 16));
	first(&error, bs_metadata_mappings(f->metadata_path, 0, 2, 50, mappings, 64));
	first(&error, bs_metadata_mapped_blocks(f->metadata_path, 0, bits, sizeof(bits) * 8));
	return error;
}

static bool is_sound(const char *path)
{
	struct bs_check_result result;

	if (bs_metadata_check(path, nowhere, &result) == 0 && !result.fatal && !result.leaks)
		return true;
	bs_metadata_check(path, 2, &result);
	return false;
}

static int repair(struct files *f)
{
	static const struct bs_repair_options options = {
		.block_size = BLOCK, .data_bytes = IMAGE_DATA_BLOCKS * BLOCK};
	struct bs_repair_result result;

	CHECK(ftruncate(f->output, 0) == 0 &&
		ftruncate(f->output, 4 * IMAGE_BLOCKS * METADATA_BLOCK_SIZE) == 0);
	return bs_metadata_repair(f->metadata_path, f->output_path, &options, nowhere, &result);
}

static void use_devices(struct bs_pool *pool, int *error)
{
	static uint8_t bytes[3 * BLOCK];
	struct bs_device *device;
	struct bs_pool_status status;

	first(error, bs_pool_create_device(pool, 1));
	int r = bs_device_open(pool, 1, 12 * BLOCK, &device);
	first(error, r);
	if (r < 0)
		return;
	first(error, bs_device_write(device, 100, bytes, 2 * BLOCK));
	first(error, bs_device_flush(device));
	first(error, bs_pool_create_snapshot(pool, 2, 1));
	first(error, bs_device_write(device, BLOCK + 5, bytes, BLOCK));
	first(error, bs_pool_hold_metadata(pool));
	first(error, bs_device_discard(device, 0, 2 * BLOCK));
	first(error, bs_device_read(device, 0, bytes, sizeof(bytes)));
	first(error, bs_pool_commit(pool));
	first(error, bs_pool_release_metadata(pool));
	bs_device_close(device);
	first(error, bs_pool_delete_device(pool, 2));
	first(error, bs_pool_extend(pool, 2 * DATA_BLOCKS * BLOCK));
	first(error, bs_pool_status(pool, &status));
}

static int use_pool(struct files *f)
{
	struct bs_pool *pool;
	int error = 0;

	CHECK(ftruncate(f->metadata, 0) == 0 && ftruncate(f->metadata, POOL_METADATA) == 0);
	CHECK(ftruncate(f->data, 0) == 0 && ftruncate(f->data, 2 * DATA_BLOCKS * BLOCK) == 0);
	first(&error, bs_pool_format(f->metadata_path, f->data_path, DATA_BLOCKS * BLOCK, BLOCK));
	for (int life = 0; life < 2; life++) {
		int r = bs_pool_open(f->metadata_path, f->data_path, life ? BS_POOL_PASSDOWN : 0, &pool);

		first(&error, r);
		if (r < 0)
			continue;
		use_devices(pool, &error);
		if (life)
			first(&error, bs_pool_delete_device(pool, 1));
		first(&error, bs_pool_close(pool));
	}
	/* The second life finds the first one's device. */
	return error == -EEXIST ? 0 : error;
}

static int feed(struct bs_cow_model *m)
{
	int r = 0;

	for (uint64_t i = 0; r == 0 && i < 60; i++) {
		struct bs_request request = {.time = i,
			.offset = (i * i * 77777) << 12,
			.length = 9000,
			.kind = i % 7 ? BS_REQUEST_WRITE : BS_REQUEST_DISCARD,
			.device = i % 3};

		r = bs_cow_model_feed(m, &request, 1);
	}
	return r;
}

static int model(struct files *f)
{
	static const uint64_t sizes[] = {4096, BLOCK};
	static const struct bs_cow_options options = {.commit_ns = 5, .snapshot_writes = 20};
	struct bs_cow_result results[2];
	struct bs_cow_model *m;
	int r = bs_cow_model_create(sizes, 2, &options, &m);

	(void)f;
	if (r < 0)
		return r;
	r = feed(m);
	if (r == 0)
		r = bs_cow_model_results(m, results, 2);
	bs_cow_model_destroy(m);
	return r < 0 ? r : 0;
}

/* ---- running them */

static void judge_walk(struct files *f, int error)
{
	(void)error;
	CHECK_EQ(walk(f), 0);
}

static void judge_repair(struct files *f, int error)
{
	if (error == 0)
		CHECK(is_sound(f->output_path));
}

static void judge_pool(struct files *f, int error)
{
	struct bs_check_result result;
	struct bs_pool *pool;

	/* Nothing was formatted, or half of it: then formatting says so, or a superblock is there. */
	if (bs_metadata_check(f->metadata_path, nowhere, &result) < 0) {
		CHECK(error < 0);
		return;
	}
	CHECK(is_sound(f->metadata_path));
	if (result.needs_check)
		CHECK_EQ(bs_pool_clear_needs_check(f->metadata_path), 0);
	CHECK_EQ(bs_pool_open(f->metadata_path, f->data_path, 0, &pool), 0);
	CHECK_EQ(bs_pool_close(pool), 0);
}

static void judge_nothing(struct files *f, int error)
{
	(void)f;
	(void)error;
}

struct scenario {
	const char *name;
	int (*run)(struct files *f);
	void (*judge)(struct files *f, int error);
	bool reads_only;
};

static int run_failing(const struct scenario *s, struct files *f, long at, bool *ret_failed)
{
	calls = 0;
	__atomic_store_n(&fail_at, at, __ATOMIC_RELAXED);
	int error = s->run(f);
	__atomic_store_n(&fail_at, -1, __ATOMIC_RELAXED);
	*ret_failed = calls > at;
	return error;
}

/* Let each call fail in turn; return how many there are. */
static long run_scenario(const struct scenario *s, struct files *f)
{
	static uint8_t before[IMAGE_BLOCKS * METADATA_BLOCK_SIZE], after[sizeof(before)];
	bool failed = true;
	long at = 0;

	for (; failed; at++) {
		CHECK_EQ(pread(f->metadata, before, sizeof(before), 0), (ssize_t)sizeof(before));
		int error = run_failing(s, f, at, &failed);
		if (error < 0 && failed)
			CHECK(*bs_last_error() && !strchr(bs_last_error(), '\n'));
		else
			CHECK_EQ(error, 0);
		if (s->reads_only) {
			CHECK_EQ(pread(f->metadata, after, sizeof(after), 0), (ssize_t)sizeof(after));
			CHECK(memcmp(before, after, sizeof(before)) == 0);
		}
		s->judge(f, error);
	}
	return at - 1;
}

static const struct scenario scenarios[] = {
	{"walks", walk, judge_walk, true},
	{"repair", repair, judge_repair, true},
	{"a pool", use_pool, judge_pool, false},
	{"the model", model, judge_nothing, true},
};

static void run_all(struct image *im, const char *state)
{
	struct files f;

	f.metadata = make_file("metadata", sizeof(im->blocks), f.metadata_path);
	f.data = make_file("data", 0, f.data_path);
	f.output = make_file("output", 0, f.output_path);
	for (size_t i = 0; i < sizeof(scenarios) / sizeof(*scenarios); i++) {
		const struct scenario *s = &scenarios[i];
		long nr = 0;

		if (*state && s->run != repair)
			continue;
		CHECK_EQ(pwrite(f.metadata, im->blocks, sizeof(im->blocks), 0), (ssize_t)sizeof(im->blocks));
		for (how = 0; how < WAYS; how++)
			nr += run_scenario(s, &f);
		printf("%s%s: %ld failures, all told and survived\n", s->name, state, nr);
	}
	close(f.metadata);
	close(f.data);
	close(f.output);
}

int main(void)
{
	struct image *im = image_create();

	nowhere = open("/dev/null", O_WRONLY | O_CLOEXEC);
	image_write(im);
	run_all(im, "");
	im->blocks[im->leaf_c].node.keys[0] = le64_of(50); /* where the leaf before it has one */
	image_write(im);
	run_all(im, " of a tree that does not fit");
	im->blocks[im->leaf_b].node.keys[3] = le64_of(7); /* out of order */
	image_write(im);
	run_all(im, " of a bad leaf");
	im->blocks[0].superblock.data_mapping_root = le64_of(3);
	im->blocks[0].superblock.device_details_root = le64_of(2);
	image_write(im);
	run_all(im, " without roots");
	image_destroy(im);
	return 0;
}
