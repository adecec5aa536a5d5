/*
 * The data device in bytes. Without direct I/O this is io.h; with it, what is not aligned goes through an
 * aligned buffer, and a partly written sector is read, changed and written back under a lock that keeps
 * whole-sector writes to the same place out meanwhile.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "engine.h"
#include "error.h"

#define CHUNK (1u << 20)

struct chunk {
	unsigned char *data;
};

static void chunk_free(struct chunk *chunk)
{
	free(chunk->data);
}

static int chunk_alloc(struct chunk *chunk, size_t length)
{
	chunk->data = aligned_alloc(4096, (length + 4095) / 4096 * 4096);
	return chunk->data ? 0 : bs_fail(-ENOMEM, "out of memory");
}

#define CHUNK_AUTO __attribute__((cleanup(chunk_free))) struct chunk

static bool is_aligned(const struct bs_pool *pool, uint64_t offset, const void *buffer, uint64_t length)
{
	return ((offset | length | (uintptr_t)buffer) & (pool->data_io->alignment - 1)) == 0;
}

static uint64_t round_down(uint64_t value, uint64_t unit)
{
	return value & ~(unit - 1);
}

static uint64_t minimum(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static int read_bounced(struct bs_pool *pool, uint64_t offset, char *buffer, uint64_t length)
{
	uint32_t align = pool->data_io->alignment;
	CHUNK_AUTO chunk = {NULL};
	int r = chunk_alloc(&chunk, minimum(length + 2 * align, CHUNK));

	while (r == 0 && length) {
		uint64_t begin = round_down(offset, align), skip = offset - begin;
		uint64_t n = minimum(length, CHUNK - skip - align);

		r = io_read(pool->data_io, begin, chunk.data, round_down(skip + n + align - 1, align));
		if (r < 0)
			return r;
		memcpy(buffer, chunk.data + skip, n);
		buffer += n;
		offset += n;
		length -= n;
	}
	return r;
}

int data_read(struct bs_pool *pool, uint64_t offset, void *buffer, uint64_t length)
{
	if (is_aligned(pool, offset, buffer, length))
		return io_read(pool->data_io, offset, buffer, length);
	return read_bounced(pool, offset, buffer, length);
}

/* Sectors are locked by the chunk that they lie in, so that a run needs few locks. */
static pthread_rwlock_t *rmw_lock(struct bs_pool *pool, uint64_t offset)
{
	return &pool->rmw[offset / CHUNK % RMW_LOCKS];
}

/* Write less than a sector, or a piece of one: read, change, write back. */
static int write_partial(struct bs_pool *pool, uint64_t offset, const char *buffer, uint64_t length)
{
	uint32_t align = pool->data_io->alignment;
	uint64_t begin = round_down(offset, align);
	CHUNK_AUTO chunk = {NULL};
	int r = chunk_alloc(&chunk, align);

	if (r < 0)
		return r;
	pthread_rwlock_wrlock(rmw_lock(pool, begin));
	r = io_read(pool->data_io, begin, chunk.data, align);
	if (r == 0) {
		memcpy(chunk.data + (offset - begin), buffer, length);
		r = io_write(pool->data_io, begin, chunk.data, align);
	}
	pthread_rwlock_unlock(rmw_lock(pool, begin));
	atomic_fetch_add(&pool->counters.padding, align - length);
	return r;
}

/* Whole sectors of one chunk. */
static int write_whole(struct bs_pool *pool, uint64_t offset, const void *buffer, uint64_t length)
{
	pthread_rwlock_rdlock(rmw_lock(pool, offset));
	int r = io_write(pool->data_io, offset, buffer, length);
	pthread_rwlock_unlock(rmw_lock(pool, offset));
	return r;
}

/* The next piece of an unaligned write: a part of a sector, or whole sectors out of the bounce buffer. */
static int64_t write_piece(
	struct bs_pool *pool, struct chunk *chunk, uint64_t offset, const char *buffer, uint64_t length)
{
	uint32_t align = pool->data_io->alignment;
	uint64_t skip = offset & (align - 1), chunk_rest = CHUNK - offset % CHUNK;
	uint64_t n;
	int r;

	if (skip || length < align) {
		n = minimum(length, align - skip);
		r = write_partial(pool, offset, buffer, n);
	} else {
		n = minimum(round_down(length, align), chunk_rest);
		const void *from = buffer;
		if (!is_aligned(pool, 0, buffer, 0)) {
			r = chunk->data ? 0 : chunk_alloc(chunk, minimum(round_down(length, align), CHUNK));
			if (r < 0)
				return r;
			from = memcpy(chunk->data, buffer, n);
		}
		r = write_whole(pool, offset, from, n);
	}
	return r < 0 ? r : (int64_t)n;
}

/* Any alignment, by pieces. */
static int write_pieces(struct bs_pool *pool, uint64_t offset, const char *from, uint64_t length)
{
	CHUNK_AUTO chunk = {NULL};

	while (length) {
		int64_t n = write_piece(pool, &chunk, offset, from, length);

		if (n < 0)
			return n;
		from += n;
		offset += n;
		length -= n;
	}
	return 0;
}

int data_write(struct bs_pool *pool, uint64_t offset, const void *buffer, uint64_t length)
{
	int r = pool->data_io->alignment == 1 ? io_write(pool->data_io, offset, buffer, length)
					      : write_pieces(pool, offset, buffer, length);

	/* After the write: a flush that clears the mark from here on covers it. Mostly it is set, and a look
	 * is cheap. */
	if (!atomic_load(&pool->data_dirty))
		atomic_store(&pool->data_dirty, true);
	return r;
}
