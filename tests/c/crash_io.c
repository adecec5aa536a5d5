#include "crash_io.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "test.h"

struct record {
	int device;
	bool flush;
	uint64_t offset, length;
	unsigned char *data;
};

struct crash_log {
	pthread_mutex_t lock; /* the engine's commit thread writes too */
	struct record *records;
	size_t nr, capacity;
	struct crash_io *devices[CRASH_DEVICES];
	size_t requests, failures, fail_at, fail_again;
	int error;
	void (*watch)(const void *caller);
};

struct crash_io {
	struct io io;
	struct crash_log *log;
	int device;
	uint64_t size;
	unsigned char *content, *start;
};

struct crash_log *crash_log_create(void)
{
	struct crash_log *log = calloc(1, sizeof(*log));

	CHECK(log);
	pthread_mutex_init(&log->lock, NULL);
	return log;
}

static void clear(struct crash_log *log)
{
	for (size_t i = 0; i < log->nr; i++)
		free(log->records[i].data);
	log->nr = log->requests = 0;
}

void crash_log_destroy(struct crash_log *log)
{
	clear(log);
	free(log->records);
	for (int d = 0; d < CRASH_DEVICES; d++)
		if (log->devices[d]) {
			free(log->devices[d]->content);
			free(log->devices[d]->start);
			free(log->devices[d]);
		}
	free(log);
}

size_t crash_log_position(const struct crash_log *log)
{
	return log->nr;
}

void crash_log_fail(struct crash_log *log, size_t at, int error, size_t again)
{
	log->fail_at = at;
	log->error = error;
	log->fail_again = again;
	log->failures = 0;
}

size_t crash_log_requests(const struct crash_log *log)
{
	return log->requests;
}

size_t crash_log_failures(const struct crash_log *log)
{
	return log->failures;
}

void crash_log_watch(struct crash_log *log, void (*watch)(const void *caller))
{
	log->watch = watch;
}

void crash_log_rebase(struct crash_log *log)
{
	clear(log);
	for (int d = 0; d < CRASH_DEVICES; d++)
		memcpy(log->devices[d]->start, log->devices[d]->content, log->devices[d]->size);
}

static void append(struct crash_log *log, struct record record)
{
	pthread_mutex_lock(&log->lock);
	if (log->nr == log->capacity) {
		log->capacity = log->capacity ? log->capacity * 2 : 256;
		log->records = realloc(log->records, log->capacity * sizeof(*log->records));
		CHECK(log->records);
	}
	log->records[log->nr++] = record;
	pthread_mutex_unlock(&log->lock);
}

/* Count a request; is it to fail? */
static int fault(struct crash_io *c, const char *what, const void *caller)
{
	struct crash_log *log = c->log;

	pthread_mutex_lock(&log->lock);
	size_t n = log->requests++;
	bool second = n > log->fail_at && (n == log->fail_again || log->fail_again == LASTING);
	bool fails = log->error && (n == log->fail_at || second);
	log->failures += fails;
	if (log->watch)
		log->watch(caller);
	pthread_mutex_unlock(&log->lock);
	return fails ? bs_fail(-log->error, "%s: %s fails on purpose", c->io.name, what) : 0;
}

static int crash_readv(struct io *io, uint64_t offset, const struct iovec *iov, int count)
{
	struct crash_io *c = (struct crash_io *)io;
	int r = fault(c, "read", __builtin_return_address(0));

	for (int i = 0; i < count; i++) {
		CHECK(offset + iov[i].iov_len <= c->size);
		/* What a failed read leaves in the buffer must not matter. */
		if (r < 0)
			memset(iov[i].iov_base, 0xa5, iov[i].iov_len);
		else
			memcpy(iov[i].iov_base, c->content + offset, iov[i].iov_len);
		offset += iov[i].iov_len;
	}
	return r;
}

/* Write to the content and to the log; NULL writes zeros. */
static void put(struct crash_io *c, uint64_t offset, const void *data, uint64_t length)
{
	struct record record = {.device = c->device, .offset = offset, .length = length};

	CHECK(offset + length <= c->size);
	record.data = calloc(1, length);
	CHECK(record.data);
	if (data)
		memcpy(record.data, data, length);
	memcpy(c->content + offset, record.data, length);
	append(c->log, record);
}

static int crash_writev(struct io *io, uint64_t offset, const struct iovec *iov, int count)
{
	struct crash_io *c = (struct crash_io *)io;
	int r = fault(c, "write", __builtin_return_address(0));

	for (int i = 0; i < count; i++) {
		size_t length = r < 0 ? iov[i].iov_len / 1024 * 512 : iov[i].iov_len;

		if (length)
			put(c, offset, iov[i].iov_base, length);
		if (r < 0)
			break;
		offset += length;
	}
	return r;
}

static int crash_flush(struct io *io)
{
	struct crash_io *c = (struct crash_io *)io;
	int r = fault(c, "flush", __builtin_return_address(0));

	if (r == 0)
		append(c->log, (struct record){.device = c->device, .flush = true});
	return r;
}

static int crash_punch(struct io *io, uint64_t offset, uint64_t length)
{
	struct crash_io *c = (struct crash_io *)io;
	int r = fault(c, "punch", __builtin_return_address(0));

	if (r == 0)
		put(c, offset, NULL, length);
	return r;
}

static int64_t crash_size(struct io *io)
{
	return ((struct crash_io *)io)->size;
}

/* The log still needs the device's start state: crash_log_destroy frees. */
static void crash_close(struct io *io)
{
	(void)io;
}

static const struct io_ops crash_ops = {
	.readv = crash_readv,
	.writev = crash_writev,
	.flush = crash_flush,
	.punch = crash_punch,
	.size = crash_size,
	.close = crash_close,
};

int crash_io_create(struct crash_log *log, int device, const void *start, uint64_t size, struct io **ret)
{
	struct crash_io *c = calloc(1, sizeof(*c));

	CHECK(c);
	c->io = (struct io){.ops = &crash_ops, .alignment = 1, .name = device ? "data" : "metadata"};
	c->log = log;
	c->device = device;
	c->size = size;
	c->content = calloc(1, size);
	c->start = calloc(1, size);
	CHECK(c->content && c->start);
	if (start) {
		memcpy(c->content, start, size);
		memcpy(c->start, start, size);
	}
	log->devices[device] = c;
	*ret = &c->io;
	return 0;
}

static void apply(const struct record *record, enum crash_kind kind, uint64_t *seed, unsigned char *image)
{
	if (kind != CRASH_TORN || test_random(seed) % 2) {
		memcpy(image + record->offset, record->data, record->length);
		return;
	}
	/* Each sector of its own. */
	for (uint64_t at = 0; at < record->length;) {
		uint64_t n = 512 - (record->offset + at) % 512;

		n = n < record->length - at ? n : record->length - at;
		if (test_random(seed) % 2)
			memcpy(image + record->offset + at, record->data + at, n);
		at += n;
	}
}

void crash_state(
	struct crash_log *log, int device, size_t position, enum crash_kind kind, uint64_t seed, void *image)
{
	size_t flushed = 0;

	memcpy(image, log->devices[device]->start, log->devices[device]->size);
	for (size_t i = 0; i < position; i++)
		if (log->records[i].flush && log->records[i].device == device)
			flushed = i;
	for (size_t i = 0; i < position; i++) {
		const struct record *record = &log->records[i];

		if (record->device != device || record->flush)
			continue;
		if (i < flushed || kind == CRASH_PREFIX || test_random(&seed) % 2)
			apply(record, i < flushed ? CRASH_PREFIX : kind, &seed, image);
	}
}
