#include "crash_model.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "crc32c.h"
#include "disk_format.h"
#include "engine.h"
#include "test.h"

#define DEVICES 4
#define SECTORS 512 /* of 512 bytes: a device of 256 KiB */
#define DEVICE_SIZE (SECTORS * 512ull)
#define HISTORY 64

/* The values a sector had since the last acknowledged flush, the one at the flush first; 0 is a zero sector. */
struct sector {
	uint32_t values[HISTORY];
	uint32_t nr;
};

struct device_model {
	bool exists, certain; /* certain: existed at the flush and was not deleted since */
	bool may_exist;       /* existed at some time since the flush */
	bool unknown;         /* its creation or deletion failed: left alone from then on */
	struct sector sectors[SECTORS];
};

/* What must hold for a cut at a position of the log or later, until the next moment. */
struct moment {
	size_t position;
	struct device_model devices[DEVICES];
};

struct crash_model {
	enum crash_answers answers;
	uint64_t seed;
	uint32_t next_value;
	struct crash_log *log;
	struct io *metadata, *data;
	struct bs_pool *pool;
	bool killed; /* once a request fails */
	struct bs_device *handles[DEVICES];
	struct device_model devices[DEVICES];
	struct moment *moments;
	size_t nr_moments, moment_capacity;
	uint64_t judged;
	int image; /* a file in memory for the checkers, which a failed test leaves nowhere */
	char image_path[64];
};

static uint32_t buffer[SECTORS * 128];

struct crash_model *crash_model_create(uint64_t seed, enum crash_answers answers)
{
	struct crash_model *m = calloc(1, sizeof(*m));

	CHECK(m);
	m->answers = answers;
	m->seed = seed;
	m->log = crash_log_create();
	for (int d = 0; d < DEVICES; d++)
		for (int i = 0; i < SECTORS; i++)
			m->devices[d].sectors[i].nr = 1;
	m->image = memfd_create("metadata", 0);
	snprintf(m->image_path, sizeof(m->image_path), "/proc/self/fd/%d", m->image);
	uint64_t block_size = test_random(&m->seed) % 2 ? 4096 : 65536;
	CHECK_EQ(crash_io_create(m->log, 0, NULL, METADATA_SIZE, &m->metadata), 0);
	CHECK_EQ(crash_io_create(m->log, 1, NULL, DATA_SIZE, &m->data), 0);
	/* As with direct I/O: what is smaller is read and written again. */
	m->data->alignment = test_random(&m->seed) % 2 ? 4096 : 1;
	CHECK_EQ(thin_metadata_format(m->metadata, block_size / 512, DATA_SIZE / block_size), 0);
	crash_log_rebase(m->log);
	return m;
}

void crash_model_destroy(struct crash_model *m)
{
	if (m->pool)
		bs_pool_abandon(m->pool);
	crash_log_destroy(m->log);
	close(m->image);
	free(m->moments);
	free(m);
}

struct crash_log *crash_model_log(struct crash_model *m)
{
	return m->log;
}

static void remember(struct crash_model *m)
{
	if (m->nr_moments == m->moment_capacity) {
		m->moment_capacity = m->moment_capacity ? m->moment_capacity * 2 : 64;
		m->moments = realloc(m->moments, m->moment_capacity * sizeof(*m->moments));
		CHECK(m->moments);
	}
	m->moments[m->nr_moments].position = crash_log_position(m->log);
	memcpy(m->moments[m->nr_moments].devices, m->devices, sizeof(m->devices));
	m->nr_moments++;
}

/* ---- the workload ---- */

static bool is_dead(const struct crash_model *m)
{
	return m->killed && crash_log_failures(m->log);
}

static bool is_fine(const struct crash_model *m, int64_t r)
{
	return r >= 0 || r == -ENOSPC || m->answers == ANY_ERROR || is_dead(m);
}

static void set_sector(struct sector *s, uint32_t value)
{
	CHECK(s->nr < HISTORY);
	s->values[s->nr++] = value;
}

/* A flush was acknowledged: only the latest values count. */
static void settle(struct crash_model *m)
{
	for (int d = 0; d < DEVICES; d++) {
		struct device_model *device = &m->devices[d];

		if (device->unknown)
			continue;
		device->certain = device->may_exist = device->exists;
		for (int i = 0; i < SECTORS; i++) {
			struct sector *s = &device->sectors[i];

			s->values[0] = s->values[s->nr - 1];
			s->nr = 1;
		}
	}
}

static bool history_is_full(const struct crash_model *m)
{
	for (int d = 0; d < DEVICES; d++)
		for (int i = 0; i < SECTORS; i++)
			if (m->devices[d].sectors[i].nr > HISTORY - 4)
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

/* A request that failed half-way: what the device shows is the latest value, unless that is not to be had. */
static void adopt(struct crash_model *m, int d, uint64_t first, uint64_t nr)
{
	int64_t r = bs_device_read(m->handles[d], first * 512, buffer, nr * 512);

	if (is_dead(m)) /* before the read, or in it */
		return;
	if (r < 0) {
		CHECK(m->answers == ANY_ERROR);
		m->devices[d].unknown = true;
		m->devices[d].certain = false;
		return;
	}
	for (uint64_t i = 0; i < nr; i++)
		set_sector(&m->devices[d].sectors[first + i], buffer[i * 128 + 1]);
}

static void write_device(struct crash_model *m, int d, uint64_t first, uint64_t nr)
{
	m->next_value++;
	for (uint64_t i = 0; i < nr; i++)
		fill_sector(buffer + i * 128, first + i, m->next_value);
	/* Before the write: a cut inside it may leave any part of it. */
	for (uint64_t i = 0; i < nr; i++)
		set_sector(&m->devices[d].sectors[first + i], m->next_value);
	int64_t r = bs_device_write(m->handles[d], first * 512, buffer, nr * 512);
	CHECK(r == (int64_t)(nr * 512) || (r < 0 && is_fine(m, r)));
	if (r < 0)
		adopt(m, d, first, nr);
}

static void discard_device(struct crash_model *m, int d, uint64_t first, uint64_t nr)
{
	for (uint64_t i = 0; i < nr; i++)
		set_sector(&m->devices[d].sectors[first + i], 0);
	int r = bs_device_discard(m->handles[d], first * 512, nr * 512);
	CHECK(r == 0 || is_fine(m, r));
	if (r < 0)
		adopt(m, d, first, nr);
}

/* Creation or deletion failed: whether the device is there is not known any more. */
static void lose(struct crash_model *m, int d, int r)
{
	CHECK(is_fine(m, r));
	m->devices[d].unknown = !is_dead(m);
	m->devices[d].certain = false;
}

static void delete_device(struct crash_model *m, int d)
{
	bs_device_close(m->handles[d]);
	m->handles[d] = NULL;
	m->devices[d].exists = m->devices[d].certain = false;
	int r = bs_pool_delete_device(m->pool, d);
	if (r < 0)
		lose(m, d, r);
}

static void create_device(struct crash_model *m, int d, int origin)
{
	bool snapshot = m->devices[origin].exists && !m->devices[origin].unknown;
	int r;

	for (int i = 0; i < SECTORS; i++)
		m->devices[d].sectors[i] =
			snapshot ? m->devices[origin].sectors[i] : (struct sector){.values = {0}, .nr = 1};
	m->devices[d].exists = m->devices[d].may_exist = true;
	r = snapshot ? bs_pool_create_snapshot(m->pool, d, origin) : bs_pool_create_device(m->pool, d);
	if (r == 0)
		r = bs_device_open(m->pool, d, DEVICE_SIZE, &m->handles[d]);
	if (r < 0)
		lose(m, d, r);
}

static void toggle_device(struct crash_model *m)
{
	int d = test_random(&m->seed) % DEVICES, origin = test_random(&m->seed) % DEVICES;

	if (m->devices[d].unknown)
		return;
	if (m->devices[d].exists)
		delete_device(m, d);
	/* An id that was in use since the flush may show either device after a cut: wait for the next flush. */
	else if (!m->devices[d].may_exist)
		create_device(m, d, origin);
}

static bool commit(struct crash_model *m)
{
	int r = bs_pool_commit(m->pool);

	CHECK(r == 0 || is_fine(m, r));
	if (r == 0)
		settle(m);
	return r == 0;
}

static void step(struct crash_model *m)
{
	int d = test_random(&m->seed) % DEVICES;
	uint64_t unit = test_random(&m->seed) % 2 ? 8 : 1,
		 first = test_random(&m->seed) % (SECTORS / unit) * unit;
	uint64_t nr = (1 + test_random(&m->seed) % 16) * unit, kind = test_random(&m->seed) % 24;
	bool usable = m->devices[d].exists && !m->devices[d].unknown;

	if (nr > SECTORS - first)
		nr = SECTORS - first;
	if (kind == 0)
		commit(m);
	else if (kind < 3)
		toggle_device(m);
	else if (usable && kind < 6)
		discard_device(m, d, first, nr);
	else if (usable)
		write_device(m, d, first, nr);
	remember(m);
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

static bool content_is_right(const uint32_t *content, int d, const struct device_model *model)
{
	for (int i = 0; i < SECTORS; i++) {
		const uint32_t *words = content + i * 128;
		const struct sector *s = &model->sectors[i];

		if (sector_is_right(words, i, s))
			continue;
		fprintf(stderr, "device %d sector %d: place %u value %u, possible are", d, i, words[0],
			words[1]);
		for (uint32_t k = 0; k < s->nr; k++)
			fprintf(stderr, " %u", s->values[k]);
		fprintf(stderr, "\n");
		return false;
	}
	return true;
}

/* If a device can be read, what is read is right. */
static void look(struct crash_model *m, int d)
{
	if (bs_device_read(m->handles[d], 0, buffer, DEVICE_SIZE) == (int64_t)DEVICE_SIZE)
		CHECK(content_is_right(buffer, d, &m->devices[d]));
}

/* Open the devices that a pool opened again should have; what a failed close left is the latest. */
static void open_devices(struct crash_model *m)
{
	for (int d = 0; d < DEVICES; d++) {
		struct device_model *device = &m->devices[d];

		if (device->unknown || !device->may_exist)
			continue;
		int r = bs_device_open(m->pool, d, DEVICE_SIZE, &m->handles[d]);
		if (r < 0 && r != -ENODATA) /* neither there nor not */
			lose(m, d, r);
		else if (r == 0 && device->exists) {
			look(m, d);
			adopt(m, d, 0, SECTORS);
		} else if (r == 0 || device->exists) { /* its deletion or creation never reached the disk */
			CHECK(m->answers == ANY_ERROR || !device->certain);
			bs_device_close(m->handles[d]);
			m->handles[d] = NULL;
			device->unknown = true;
		}
	}
}

void crash_model_run(struct crash_model *m, int steps)
{
	int r = pool_open_on(m->metadata, m->data, m->seed % 2 ? BS_POOL_PASSDOWN : 0, &m->pool);

	remember(m);
	if (r < 0) {
		CHECK(is_fine(m, r));
		m->pool = NULL;
		return;
	}
	open_devices(m);
	while (steps-- && !is_dead(m) && (!history_is_full(m) || commit(m)))
		step(m);
}

void crash_model_run_and_kill(struct crash_model *m, int steps, size_t at)
{
	crash_log_fail(m->log, crash_log_requests(m->log) + at, EIO, LASTING);
	m->killed = true;
	crash_model_run(m, steps);
	for (int d = 0; d < DEVICES; d++) {
		bs_device_close(m->handles[d]);
		m->handles[d] = NULL;
	}
	if (m->pool)
		bs_pool_abandon(m->pool);
	m->pool = NULL;
	remember(m);
	m->killed = false;
	crash_log_fail(m->log, 0, 0, 0);
}

int crash_model_close(struct crash_model *m)
{
	struct bs_pool *pool = m->pool;

	m->pool = NULL;
	if (!pool)
		return 0;
	for (int d = 0; d < DEVICES; d++) {
		bs_device_close(m->handles[d]);
		m->handles[d] = NULL;
	}
	int r = bs_pool_close(pool);
	if (r == 0)
		settle(m);
	remember(m);
	return r;
}

/* ---- judging a state ---- */

void crash_model_look(struct crash_model *m)
{
	for (int d = 0; m->pool && d < DEVICES; d++)
		if (m->handles[d] && !m->devices[d].unknown)
			look(m, d);
}

static bool metadata_is_clean(const struct crash_model *m, const void *image, bool with_thin_check)
{
	struct bs_check_result result;
	char command[128];

	CHECK_EQ(pwrite(m->image, image, METADATA_SIZE, 0), METADATA_SIZE);
	int quiet = open("/dev/null", O_WRONLY);
	int r = bs_metadata_check(m->image_path, quiet, &result);
	close(quiet);
	/* A pool that met an error says so by needs_check, and that alone is a warning. */
	if (r < 0 || result.fatal || result.leaks || result.warnings != result.needs_check ||
		(result.needs_check && m->answers != ANY_ERROR)) {
		bs_metadata_check(m->image_path, 2, &result);
		return false;
	}
	snprintf(command, sizeof(command), "thin_check -q %s", m->image_path);
	return !with_thin_check || result.needs_check || system(command) == 0;
}

static bool device_is_right(struct bs_pool *pool, int d, const struct device_model *model, bool present)
{
	struct bs_device *device;

	if (present ? !model->may_exist && !model->unknown : model->certain) {
		fprintf(stderr, "device %d is %s\n", d, present ? "there" : "missing");
		return false;
	}
	if (!present)
		return true;
	CHECK_EQ(bs_device_open(pool, d, DEVICE_SIZE, &device), 0);
	CHECK_EQ(bs_device_read(device, 0, buffer, DEVICE_SIZE), DEVICE_SIZE);
	bs_device_close(device);
	return content_is_right(buffer, d, model);
}

static bool contents_are_right(const void *metadata, const void *data, const struct moment *moment)
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
		right = right && device_is_right(pool, d, &moment->devices[d], present);
	}
	bs_pool_abandon(pool);
	return right;
}

/* What holds for a cut at position: the guarantees of the moment before it (flushes acknowledged by then),
 * and the possibilities of the one after it (what was under way). */
static struct moment expectation(const struct crash_model *m, size_t position)
{
	size_t before = 0;

	while (before + 1 < m->nr_moments && m->moments[before + 1].position <= position)
		before++;
	struct moment found = m->moments[before];
	if (before + 1 == m->nr_moments)
		return found;
	const struct moment *after = &m->moments[before + 1];
	for (int d = 0; d < DEVICES; d++) {
		struct device_model *now = &found.devices[d];
		const struct device_model *later = &after->devices[d];

		now->certain &= later->exists && !later->unknown;
		now->unknown |= later->unknown;
		if (!now->may_exist)
			memcpy(now->sectors, later->sectors, sizeof(now->sectors));
		else if (later->may_exist)
			for (int i = 0; i < SECTORS; i++)
				if (later->sectors[i].nr >= now->sectors[i].nr)
					now->sectors[i] = later->sectors[i];
		now->may_exist |= later->may_exist;
	}
	return found;
}

bool crash_model_judge(struct crash_model *m, size_t position, enum crash_kind kind, uint64_t state_seed,
	bool with_thin_check)
{
	static unsigned char metadata[METADATA_SIZE], data[DATA_SIZE];
	struct moment moment = expectation(m, position);

	crash_state(m->log, 0, position, kind, state_seed, metadata);
	crash_state(m->log, 1, position, kind, state_seed, data);
	m->judged = (uint64_t)crc32c(0, metadata, sizeof(metadata)) << 32 | crc32c(0, data, sizeof(data));
	return metadata_is_clean(m, metadata, with_thin_check) && contents_are_right(metadata, data, &moment);
}

uint64_t crash_model_judged(const struct crash_model *m)
{
	return m->judged;
}
