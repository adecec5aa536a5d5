/*
 * Crash states of the user engine: a random workload on logging devices, then, at cuts all over its log,
 * states that a power cut could have left are opened by the real code and judged:
 *   - our check finds nothing (a sample also goes to thin_check);
 *   - a device that existed at the last acknowledged flush and was not deleted since is there;
 *   - each 512-byte sector holds a value that it had at that flush or got later, of that place and that
 * device. A failing state is printed as "seed position kind state-seed".
 *
 *   test_crash [STATES [SEED]]
 */
#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include "crash_io.h"
#include "disk_format.h"
#include "engine.h"
#include "test.h"

#define METADATA_SIZE (512ull << 10)
#define DATA_SIZE (2ull << 20)
#define DEVICES 4
#define SECTORS 512 /* of 512 bytes: a device of 256 KiB */
#define DEVICE_SIZE (SECTORS * 512ull)
#define HISTORY 64

/* The values a sector had since the last acknowledged flush, the one at the flush first; 0 is a zero sector.
 */
struct sector {
	uint32_t values[HISTORY];
	uint32_t nr;
};

struct model {
	bool exists, certain; /* certain: existed at the flush and was not deleted since */
	bool may_exist;       /* existed at some time since the flush */
	struct sector sectors[SECTORS];
};

/* What must hold for a cut at a position of the log or later, until the next snapshot of the model. */
struct moment {
	size_t position;
	struct model models[DEVICES];
};

static struct model models[DEVICES];
static struct moment *moments;
static size_t nr_moments, moment_capacity;
static uint32_t next_value;
static uint64_t block_size;

static void remember(struct crash_log *log)
{
	if (nr_moments == moment_capacity) {
		moment_capacity = moment_capacity ? moment_capacity * 2 : 64;
		moments = realloc(moments, moment_capacity * sizeof(*moments));
		CHECK(moments);
	}
	moments[nr_moments].position = crash_log_position(log);
	memcpy(moments[nr_moments].models, models, sizeof(models));
	nr_moments++;
}

static void set_sector(struct sector *s, uint32_t value)
{
	CHECK(s->nr < HISTORY);
	s->values[s->nr++] = value;
}

/* A flush was acknowledged: only the latest values count. */
static void settle_model(void)
{
	for (int d = 0; d < DEVICES; d++) {
		models[d].certain = models[d].may_exist = models[d].exists;
		for (int i = 0; i < SECTORS; i++) {
			struct sector *s = &models[d].sectors[i];

			s->values[0] = s->values[s->nr - 1];
			s->nr = 1;
		}
	}
}

static bool history_is_full(void)
{
	for (int d = 0; d < DEVICES; d++)
		for (int i = 0; i < SECTORS; i++)
			if (models[d].sectors[i].nr > HISTORY - 4)
				return true;
	return false;
}

/* A sector's content says what it is: its place and its value. */
static void fill_sector(uint32_t *words, uint32_t sector, uint32_t value)
{
	for (int i = 0; i < 128; i += 2) {
		words[i] = value ? sector + 1 : 0;
		words[i + 1] = value;
	}
}

/* A request that failed half-way for want of space: what the device shows is the latest value. */
static void adopt(struct bs_device *device, int d, uint64_t first, uint64_t nr)
{
	static uint32_t buffer[SECTORS * 128];

	CHECK_EQ(bs_device_read(device, first * 512, buffer, nr * 512), nr * 512);
	for (uint64_t i = 0; i < nr; i++)
		set_sector(&models[d].sectors[first + i], buffer[i * 128 + 1]);
}

static void write_model(struct bs_device *device, int d, uint64_t first, uint64_t nr)
{
	static uint32_t buffer[SECTORS * 128];

	next_value++;
	for (uint64_t i = 0; i < nr; i++)
		fill_sector(buffer + i * 128, first + i, next_value);
	/* Before the write: a cut inside it may leave any part of it. */
	for (uint64_t i = 0; i < nr; i++)
		set_sector(&models[d].sectors[first + i], next_value);
	int64_t r = bs_device_write(device, first * 512, buffer, nr * 512);
	CHECK(r == (int64_t)(nr * 512) || r == -ENOSPC);
	if (r < 0)
		adopt(device, d, first, nr);
}

static void discard_model(struct bs_device *device, int d, uint64_t first, uint64_t nr)
{
	for (uint64_t i = 0; i < nr; i++)
		set_sector(&models[d].sectors[first + i], 0);
	int r = bs_device_discard(device, first * 512, nr * 512);
	CHECK(r == 0 || r == -ENOSPC);
	if (r < 0)
		adopt(device, d, first, nr);
}

static void toggle_device(struct bs_pool *pool, struct bs_device **handles, uint64_t *seed)
{
	int d = test_random(seed) % DEVICES, origin = test_random(seed) % DEVICES;

	if (models[d].exists) {
		bs_device_close(handles[d]);
		handles[d] = NULL;
		models[d].exists = models[d].certain = false;
		CHECK_EQ(bs_pool_delete_device(pool, d), 0);
		return;
	}
	/* An id that was in use since the flush may show either device after a cut: wait for the next flush.
	 */
	if (models[d].may_exist)
		return;
	if (models[origin].exists) {
		for (int i = 0; i < SECTORS; i++)
			models[d].sectors[i] = models[origin].sectors[i];
		models[d].exists = models[d].may_exist = true;
		CHECK_EQ(bs_pool_create_snapshot(pool, d, origin), 0);
	} else {
		for (int i = 0; i < SECTORS; i++)
			models[d].sectors[i] = (struct sector){.values = {0}, .nr = 1};
		models[d].exists = models[d].may_exist = true;
		CHECK_EQ(bs_pool_create_device(pool, d), 0);
	}
	CHECK_EQ(bs_device_open(pool, d, DEVICE_SIZE, &handles[d]), 0);
}

static void random_step(
	struct bs_pool *pool, struct bs_device **handles, struct crash_log *log, uint64_t *seed)
{
	int d = test_random(seed) % DEVICES;
	uint64_t unit = test_random(seed) % 2 ? 8 : 1, first = test_random(seed) % (SECTORS / unit) * unit;
	uint64_t nr = (1 + test_random(seed) % 16) * unit, kind = test_random(seed) % 24;

	if (nr > SECTORS - first)
		nr = SECTORS - first;
	if (kind == 0 || history_is_full()) {
		CHECK_EQ(bs_pool_commit(pool), 0);
		settle_model();
	} else if (kind < 3)
		toggle_device(pool, handles, seed);
	else if (models[d].exists && kind < 6)
		discard_model(handles[d], d, first, nr);
	else if (models[d].exists)
		write_model(handles[d], d, first, nr);
	remember(log);
}

/* ---- judging a state ---- */

static char image_path[64];

static void write_image(const void *image)
{
	int fd = open(image_path, O_CREAT | O_TRUNC | O_WRONLY, 0600);

	CHECK(fd >= 0);
	CHECK_EQ(write(fd, image, METADATA_SIZE), METADATA_SIZE);
	close(fd);
}

static bool metadata_is_clean(const void *image, bool with_thin_check)
{
	struct bs_check_result result;
	char command[128];

	write_image(image);
	if (bs_metadata_check(image_path, 2, &result) < 0 || result.fatal || result.leaks || result.warnings)
		return false;
	snprintf(command, sizeof(command), "thin_check -q %s", image_path);
	return !with_thin_check || system(command) == 0;
}

static bool sector_is_right(const uint32_t *words, uint32_t sector, const struct sector *s)
{
	uint32_t expected[128];

	for (uint32_t i = 0; i < s->nr; i++) {
		fill_sector(expected, sector, s->values[i]);
		if (memcmp(words, expected, 512) == 0)
			return true;
	}
	return false;
}

static void report(int d, int sector, const uint32_t *words, const struct sector *s)
{
	fprintf(stderr, "device %d sector %d: place %u value %u, possible are", d, sector, words[0],
		words[1]);
	for (uint32_t i = 0; i < s->nr; i++)
		fprintf(stderr, " %u", s->values[i]);
	fprintf(stderr, "\n");
}

static bool device_is_right(struct bs_pool *pool, int d, const struct model *m, bool present)
{
	static uint32_t buffer[SECTORS * 128];
	struct bs_device *device;
	bool right = true;

	if (!present)
		return !m->certain;
	if (!m->may_exist)
		return false;
	CHECK_EQ(bs_device_open(pool, d, DEVICE_SIZE, &device), 0);
	CHECK_EQ(bs_device_read(device, 0, buffer, DEVICE_SIZE), DEVICE_SIZE);
	for (int i = 0; right && i < SECTORS; i++) {
		right = sector_is_right(buffer + i * 128, i, &m->sectors[i]);
		if (!right)
			report(d, i, buffer + i * 128, &m->sectors[i]);
	}
	bs_device_close(device);
	return right;
}

static bool contents_are_right(void *metadata, void *data, const struct moment *moment)
{
	struct bs_device_info info[DEVICES + 1];
	struct io *metadata_io, *data_io;
	struct bs_pool *pool;
	bool right = true;

	CHECK_EQ(io_memory_create(METADATA_SIZE, &metadata_io), 0);
	CHECK_EQ(io_memory_create(DATA_SIZE, &data_io), 0);
	memcpy(io_memory_data(metadata_io), metadata, METADATA_SIZE);
	memcpy(io_memory_data(data_io), data, DATA_SIZE);
	if (pool_open_on(metadata_io, data_io, 0, &pool) < 0)
		return false;
	int n = bs_pool_devices(pool, 0, info, DEVICES + 1);
	for (int d = 0; d < DEVICES; d++) {
		bool present = false;

		for (int i = 0; i < n; i++)
			present |= info[i].id == (uint32_t)d;
		right = right && device_is_right(pool, d, &moment->models[d], present);
	}
	bs_pool_abandon(pool);
	return right;
}

/* What holds for a cut at position: the guarantees of the moment before it (flushes acknowledged by then),
 * and the possibilities of the one after it (what was under way). */
static struct moment expectation(size_t position)
{
	size_t before = 0;

	while (before + 1 < nr_moments && moments[before + 1].position <= position)
		before++;
	struct moment m = moments[before];
	if (before + 1 == nr_moments)
		return m;
	const struct moment *after = &moments[before + 1];
	for (int d = 0; d < DEVICES; d++) {
		m.models[d].may_exist |= after->models[d].may_exist;
		m.models[d].certain &= after->models[d].exists;
		if (!moments[before].models[d].may_exist)
			memcpy(m.models[d].sectors, after->models[d].sectors, sizeof(m.models[d].sectors));
		else if (after->models[d].may_exist)
			for (int i = 0; i < SECTORS; i++)
				if (after->models[d].sectors[i].nr >= m.models[d].sectors[i].nr)
					m.models[d].sectors[i] = after->models[d].sectors[i];
	}
	return m;
}

static void judge(struct crash_log *log, size_t position, enum crash_kind kind, uint64_t workload_seed,
	uint64_t state_seed)
{
	static unsigned char metadata[METADATA_SIZE], data[DATA_SIZE];
	struct moment moment = expectation(position);

	crash_state(log, 0, position, kind, state_seed, metadata);
	crash_state(log, 1, position, kind, state_seed, data);
	if (metadata_is_clean(metadata, state_seed % 100 == 0) && contents_are_right(metadata, data, &moment))
		return;
	fprintf(stderr,
		"crash state is wrong: workload seed %" PRIu64 ", position %zu, kind %d, state seed %" PRIu64
		": %s\n",
		workload_seed, position, kind, state_seed, bs_last_error());
	exit(1);
}

/* ---- one workload and its states ---- */

static size_t run_workload(uint64_t seed, size_t states)
{
	struct crash_log *log = crash_log_create();
	struct bs_device *handles[DEVICES] = {NULL};
	struct io *metadata_io, *data_io;
	struct bs_pool *pool;
	uint64_t state = seed;

	next_value = 0;
	nr_moments = 0;
	memset(models, 0, sizeof(models));
	for (int d = 0; d < DEVICES; d++)
		for (int i = 0; i < SECTORS; i++)
			models[d].sectors[i].nr = 1;
	block_size = test_random(&state) % 2 ? 4096 : 65536;
	CHECK_EQ(crash_io_create(log, 0, NULL, METADATA_SIZE, &metadata_io), 0);
	CHECK_EQ(crash_io_create(log, 1, NULL, DATA_SIZE, &data_io), 0);
	CHECK_EQ(thin_metadata_format(metadata_io, block_size / 512, DATA_SIZE / block_size), 0);
	crash_log_rebase(log);
	CHECK_EQ(pool_open_on(metadata_io, data_io, 0, &pool), 0);
	remember(log);
	for (int step = 0; step < 150; step++)
		random_step(pool, handles, log, &state);
	size_t end = crash_log_position(log), done = 0;
	for (; done < states; done++) {
		uint64_t state_seed = test_random(&state);

		judge(log, done < end ? done : state_seed % (end + 1), done % 3, seed, state_seed);
	}
	bs_pool_abandon(pool);
	crash_log_destroy(log);
	return done;
}

int main(int argc, char **argv)
{
	size_t wanted = argc > 1 ? strtoull(argv[1], NULL, 10) : 5000, done = 0;
	uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;

	snprintf(image_path, sizeof(image_path), "/tmp/blocksnap-crash-%d", getpid());
	while (done < wanted)
		done += run_workload(seed++, wanted - done < 600 ? wanted - done : 600);
	unlink(image_path);
	free(moments);
	printf("%zu crash states, all recovered\n", done);
	return 0;
}
