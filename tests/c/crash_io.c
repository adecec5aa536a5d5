#include "crash_io.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

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
	log->nr = 0;
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

static int crash_readv(struct io *io, uint64_t offset, const struct iovec *iov, int count)
{
	struct crash_io *c = (struct crash_io *)io;

	for (int i = 0; i < count; i++) {
		CHECK(offset + iov[i].iov_len <= c->size);
		memcpy(iov[i].iov_base, c->content + offset, iov[i].iov_len);
		offset += iov[i].iov_len;
	}
	return 0;
}

static int crash_writev(struct io *io, uint64_t offset, const struct iovec *iov, int count)
{
	struct crash_io *c = (struct crash_io *)io;

	for (int i = 0; i < count; i++) {
		struct record record = {.device = c->device, .offset = offset, .length = iov[i].iov_len};

		CHECK(offset + iov[i].iov_len <= c->size);
		record.data = malloc(iov[i].iov_len);
		memcpy(record.data, iov[i].iov_base, iov[i].iov_len);
		memcpy(c->content + offset, iov[i].iov_base, iov[i].iov_len);
		append(c->log, record);
		offset += iov[i].iov_len;
	}
	return 0;
}

static int crash_flush(struct io *io)
{
	struct crash_io *c = (struct crash_io *)io;

	append(c->log, (struct record){.device = c->device, .flush = true});
	return 0;
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
