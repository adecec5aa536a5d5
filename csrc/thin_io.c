/*
 * The data path: a request in bytes becomes an unaligned head, whole thin blocks and an unaligned tail.
 *
 * Fast path: the mapping comes from the map cache, without a lock, inside a grace section that covers the
 * I/O; neighbouring thin blocks in neighbouring data blocks make one transfer. A write goes in place if the
 * entry's time is not below the device's snapshotted_time: nobody else reaches the block.
 *
 * Slow path (hole, perhaps shared, not cached): one thread at a time for a thin block (its cell). Under the
 * pool's lock the exact answer is looked up and, if need be, a data block reserved; the lock is given away
 * while the block's new content is written, and taken again to insert the mapping. So a mapping never refers
 * to data that is not written yet, and nobody sees a block half made. Between the two, a snapshot may happen
 * (the write then counts as later), a discard (ditto), a commit (the reserved block is not counted yet and
 * cannot leak).
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "disk_format.h"
#include "engine.h"
#include "error.h"
#include "seed_bug.h"

#define COPY_CHUNK (1u << 20)
#define DISCARD_BATCH 256

static uint64_t minimum(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static int check_range(struct bs_device *device, uint64_t offset, uint64_t length)
{
	uint64_t size = atomic_load(&device->size);

	if (offset > size || length > size - offset)
		return bs_fail(-EINVAL,
			"bytes %" PRIu64 " to %" PRIu64 " are beyond the device's end at %" PRIu64, offset,
			offset + length, size);
	return 0;
}

static int check_device(struct bs_device *device)
{
	if (device->thin->gone)
		return bs_fail(-ENODATA, "device %u is not there any more", device->thin->id);
	return 0;
}

/* ---- mappings: cache, and metadata behind it ---- */

/* Load the page of a block, with the lock held. */
static int load_page(struct bs_device *device, uint64_t block)
{
	struct bs_pool *pool = device->pool;
	uint64_t blocks[MAP_PAGE_ENTRIES], packed[MAP_PAGE_ENTRIES];
	uint64_t index = block / MAP_PAGE_ENTRIES, begin = index * MAP_PAGE_ENTRIES;
	int n = thin_scan(pool->md, device->thin, begin, begin + MAP_PAGE_ENTRIES - 1, blocks, packed,
		MAP_PAGE_ENTRIES);

	if (n < 0)
		return n;
	int r = map_cache_add(&device->cache, index, blocks, packed, n, &pool->retired);
	free_retired(pool, false);
	return r;
}

static void set_entry(struct bs_device *device, uint64_t block, uint64_t value)
{
	_Atomic uint64_t *entry = map_cache_find(&device->cache, block);

	if (entry)
		atomic_store(entry, value);
}

/* The entry of a block, within a grace section: 0 if its page is not cached. */
static int cached(struct bs_device *device, uint64_t block, uint64_t *ret)
{
	_Atomic uint64_t *entry = map_cache_find(&device->cache, block);

	if (!entry)
		return 0;
	*ret = atomic_load(entry);
	return 1;
}

static bool writable_in_place(struct bs_device *device, uint64_t entry)
{
	return entry != MAP_HOLE && mapping_time(entry) >= atomic_load(&device->snapshotted_time);
}

/* ---- read ---- */

/* Bytes from offset on that lie in one piece: in a run of data blocks, or in holes (ret_data = MAP_HOLE). 0:
 * not cached. */
static uint64_t find_run(struct bs_device *device, uint64_t offset, uint64_t length, uint64_t *ret_data)
{
	struct bs_pool *pool = device->pool;
	uint64_t block = pool_block_of(pool, offset), within = offset - block * pool->block_size;
	uint64_t entry, next, run = pool->block_size - within;

	if (!cached(device, block, &entry))
		return 0;
	uint64_t data = entry == MAP_HOLE ? 0 : mapping_block(entry);
	*ret_data = entry == MAP_HOLE ? MAP_HOLE : data * pool->block_size + within;
	while (run < length && cached(device, ++block, &next)) {
		bool joins = entry == MAP_HOLE ? next == MAP_HOLE
					       : next != MAP_HOLE && mapping_block(next) == ++data;

		if (!joins)
			break;
		run += pool->block_size;
	}
	return minimum(run, length);
}

static int64_t read_cached(struct bs_device *device, uint64_t offset, char *buffer, uint64_t length)
{
	struct bs_pool *pool = device->pool;
	int ticket = grace_enter(&pool->grace);
	uint64_t data;
	uint64_t run = find_run(device, offset, length, &data);
	int r = 0;

	if (run && data == MAP_HOLE)
		memset(buffer, 0, run);
	else if (run)
		r = data_read(pool, data, buffer, run);
	grace_exit(&pool->grace, ticket);
	return r < 0 ? r : (int64_t)run;
}

static int load_for_read(struct bs_device *device, uint64_t offset)
{
	struct bs_pool *pool = device->pool;

	pthread_mutex_lock(&pool->lock);
	int r = check_device(device);
	if (r == 0)
		r = load_page(device, pool_block_of(pool, offset));
	pthread_mutex_unlock(&pool->lock);
	return r;
}

int64_t bs_device_read(struct bs_device *device, uint64_t offset, void *buffer, uint64_t length)
{
	int64_t r = check_range(device, offset, length);

	for (uint64_t done = 0; r >= 0 && done < length;) {
		r = read_cached(device, offset + done, (char *)buffer + done, length - done);
		if (r == 0)
			r = load_for_read(device, offset + done);
		else if (r > 0)
			done += r;
	}
	if (r < 0)
		return r;
	atomic_fetch_add_explicit(&device->pool->counters.application_read, length, memory_order_relaxed);
	return length;
}

/* ---- write ---- */

/* What a write puts where: n bytes of buffer at byte `within` of a thin block. */
struct piece {
	uint64_t block;
	uint64_t within;
	const char *buffer;
	uint64_t n;
};

/* Write in place as far as the cache says that it may: bytes written, 0 if the first block may not. */
static int64_t write_cached(struct bs_device *device, uint64_t offset, const char *buffer, uint64_t length)
{
	struct bs_pool *pool = device->pool;
	uint64_t block = pool_block_of(pool, offset), within = offset - block * pool->block_size;
	uint64_t entry, next, run = pool->block_size - within;
	int ticket = grace_enter(&pool->grace);
	int r = 0;

	if (cached(device, block, &entry) && writable_in_place(device, entry)) {
		uint64_t data = mapping_block(entry);

		while (run < length && cached(device, ++block, &next) && writable_in_place(device, next) &&
			mapping_block(next) == data + (run + within) / pool->block_size)
			run += pool->block_size;
		run = minimum(run, length);
		r = data_write(pool, data * pool->block_size + within, buffer, run);
	} else
		run = 0;
	grace_exit(&pool->grace, ticket);
	return r < 0 ? r : (int64_t)run;
}

static _Thread_local unsigned char *copy_buffer;
static pthread_key_t copy_buffer_key;
static pthread_once_t copy_buffer_once = PTHREAD_ONCE_INIT;

static void make_key(void)
{
	pthread_key_create(&copy_buffer_key, free);
}

/* A buffer of COPY_CHUNK bytes of this thread: fresh ones of that size would cost a page fault for each 4
 * KiB. */
static unsigned char *get_copy_buffer(void)
{
	pthread_once(&copy_buffer_once, make_key);
	if (!copy_buffer) {
		copy_buffer = aligned_alloc(4096, COPY_CHUNK);
		pthread_setspecific(copy_buffer_key, copy_buffer);
	}
	return copy_buffer;
}

/* Write bytes begin to end of a new data block: what the piece covers from it, the rest from old (or zero).
 */
static int fill_chunk(struct bs_pool *pool, uint64_t old, uint64_t target, const struct piece *piece,
	uint64_t begin, uint64_t end)
{
	uint64_t piece_end = piece->within + piece->n;
	uint64_t from = piece->within > begin ? piece->within : begin, to = minimum(piece_end, end);
	uint64_t covered = from < to ? to - from : 0, rest = end - begin - covered;
	uint64_t at = target * pool->block_size + begin;

	if (rest == 0)
		return data_write(pool, at, piece->buffer + (begin - piece->within), end - begin);
	unsigned char *content = get_copy_buffer();
	if (!content)
		return bs_fail(-ENOMEM, "out of memory");
	if (old == MAP_HOLE && BS_BUG(NEW_BLOCK_NOT_ZEROED))
		memset(content, 0xa5, end - begin);
	else if (old == MAP_HOLE)
		memset(content, 0, end - begin);
	else {
		int r = data_read(pool, mapping_block(old) * pool->block_size + begin, content, end - begin);

		if (r < 0)
			return r;
		atomic_fetch_add(&pool->counters.read_for_copy, end - begin);
	}
	if (covered)
		memcpy(content + (from - begin), piece->buffer + (from - piece->within), covered);
	if (covered && old != MAP_HOLE && BS_BUG(COPY_LOSES_TAIL))
		memset(content + (to - begin), 0, end - to);
	atomic_fetch_add(old == MAP_HOLE ? &pool->counters.zero_filled : &pool->counters.copied, rest);
	return data_write(pool, at, content, end - begin);
}

/* The whole content of a new data block. */
static int fill_block(struct bs_pool *pool, uint64_t old, uint64_t target, const struct piece *piece)
{
	int r = 0;

	for (uint64_t begin = 0; r == 0 && begin < pool->block_size; begin += COPY_CHUNK)
		r = fill_chunk(
			pool, old, target, piece, begin, minimum(begin + COPY_CHUNK, pool->block_size));
	return r;
}

static void count_block(struct bs_pool *pool, uint64_t old, const struct piece *piece)
{
	struct pool_counters *c = &pool->counters;

	if (old == MAP_HOLE)
		atomic_fetch_add(&c->provisioned, 1);
	else if (piece->n == pool->block_size)
		atomic_fetch_add(&c->overwritten, 1);
	else
		atomic_fetch_add(&c->blocks_copied, 1);
}

/* Insert the mapping to a filled block; with the lock held. */
static int insert_mapping(struct bs_device *device, uint64_t block, uint64_t target)
{
	struct bs_pool *pool = device->pool;
	uint64_t packed;
	int r = make_room(pool, false);

	/* It may have given the lock away. */
	if (r == 0)
		r = check_writable(pool);
	if (r == 0)
		r = check_device(device);
	if (r < 0) {
		thin_unreserve(pool->md, target);
		return r;
	}
	r = thin_insert(pool->md, device->thin, block, target, &packed);
	if (r < 0)
		return break_transaction(pool, r);
	set_entry(device, block, packed);
	return 0;
}

/* Look up exactly, with the lock held: 1 the block may be written in place (ret), 0 it needs a new data
 * block. */
static int decide(struct bs_device *device, uint64_t block, uint64_t *ret)
{
	struct thin_metadata_status status;
	bool shared;
	int r = check_device(device);

	if (r == 0 && !map_cache_find(&device->cache, block))
		r = load_page(device, block);
	if (r == 0)
		r = thin_lookup(device->pool->md, device->thin, block, ret, &shared);
	if (r < 0)
		return r;
	if (r == 0)
		*ret = MAP_HOLE;
	if (r == 0 || shared)
		return 0;
	thin_metadata_status(device->pool->md, &status);
	set_entry(device, block, mapping_pack(mapping_block(*ret), status.time));
	return 1;
}

/* Fill a reserved block and map it; called with the lock held, returns with it held. */
static int write_new_block(struct bs_device *device, const struct piece *piece, uint64_t old, uint64_t target)
{
	struct bs_pool *pool = device->pool;
	int ticket = grace_enter(&pool->grace);

	pthread_mutex_unlock(&pool->lock);
	int r = fill_block(pool, old, target, piece);
	grace_exit(&pool->grace, ticket);
	pthread_mutex_lock(&pool->lock);
	if (r < 0) {
		thin_unreserve(pool->md, target);
		return r;
	}
	r = insert_mapping(device, piece->block, target);
	if (r == 0)
		count_block(pool, old, piece);
	return r;
}

static int write_in_place(struct bs_device *device, const struct piece *piece, uint64_t entry)
{
	struct bs_pool *pool = device->pool;
	int ticket = grace_enter(&pool->grace);

	pthread_mutex_unlock(&pool->lock);
	int r = data_write(
		pool, mapping_block(entry) * pool->block_size + piece->within, piece->buffer, piece->n);
	grace_exit(&pool->grace, ticket);
	pthread_mutex_lock(&pool->lock);
	return r;
}

static int write_slow(struct bs_device *device, const struct piece *piece)
{
	struct bs_pool *pool = device->pool;
	pthread_mutex_t *cell = &pool->cells[(piece->block * 31 + device->thin->id) % CELLS];
	uint64_t entry, target;

	pthread_mutex_lock(cell);
	pthread_mutex_lock(&pool->lock);
	int r = decide(device, piece->block, &entry);
	if (r == 1)
		r = write_in_place(device, piece, entry);
	else if (r == 0) {
		r = check_writable(pool);
		if (r == 0)
			r = make_room(pool, false);
		if (r == 0)
			r = reserve_data(pool, &target);
		/* Room and space may have been waited for with the lock given away: look again. */
		if (r == 0) {
			r = decide(device, piece->block, &entry);
			if (r != 0)
				thin_unreserve(pool->md, target);
			if (r == 1)
				r = write_in_place(device, piece, entry);
			else if (r == 0)
				r = write_new_block(device, piece, entry, target);
		}
	}
	pthread_mutex_unlock(&pool->lock);
	pthread_mutex_unlock(cell);
	return r;
}

static int write_bytes(struct bs_device *device, uint64_t offset, const char *buffer, uint64_t length)
{
	struct bs_pool *pool = device->pool;
	int64_t r = 0;

	while (r >= 0 && length) {
		uint64_t block = pool_block_of(pool, offset), within = offset - block * pool->block_size;
		struct piece piece = {block, within, buffer, minimum(length, pool->block_size - within)};

		r = write_cached(device, offset, buffer, length);
		if (r == 0) {
			r = write_slow(device, &piece);
			r = r < 0 ? r : (int64_t)piece.n;
		}
		if (r > 0) {
			offset += r;
			buffer += r;
			length -= r;
		}
	}
	return r < 0 ? r : 0;
}

int64_t bs_device_write(struct bs_device *device, uint64_t offset, const void *buffer, uint64_t length)
{
	struct bs_pool *pool = device->pool;
	int r = check_range(device, offset, length);

	if (r == 0 && pool->read_only)
		r = bs_fail(-EROFS, "the pool is open read-only");
	if (r == 0)
		r = write_bytes(device, offset, buffer, length);
	if (r < 0)
		return r;
	atomic_fetch_add_explicit(&pool->counters.application, length, memory_order_relaxed);
	return length;
}

/* ---- discard ---- */

/* Write zeros over parts of blocks that are no holes, never of two at once: what is copied does not hang on
 * where blocks lie. */
static int zero_part(struct bs_device *device, uint64_t offset, uint64_t length)
{
	static const unsigned char zeros[65536];
	struct bs_pool *pool = device->pool;
	uint64_t data;

	while (length) {
		uint64_t rest = pool->block_size - offset % pool->block_size;
		int ticket = grace_enter(&pool->grace);
		uint64_t run = find_run(device, offset, minimum(length, rest), &data);
		grace_exit(&pool->grace, ticket);
		int r = run ? 0 : load_for_read(device, offset);
		if (run && data != MAP_HOLE) {
			run = minimum(run, sizeof(zeros));
			r = write_bytes(device, offset, (const char *)zeros, run);
			atomic_fetch_add(&pool->counters.zero_filled, run);
		}
		if (r < 0)
			return r;
		offset += run;
		length -= run;
	}
	return 0;
}

/* Unmap up to DISCARD_BATCH blocks from *begin on, with the lock held; *begin moves on. */
static int unmap_batch(struct bs_device *device, uint64_t *begin, uint64_t last)
{
	struct bs_pool *pool = device->pool;
	uint64_t blocks[DISCARD_BATCH], packed[DISCARD_BATCH];
	int n = thin_scan(pool->md, device->thin, *begin, last, blocks, packed, DISCARD_BATCH);

	for (int i = 0; i < n; i++) {
		int r = make_room(pool, true);

		if (r < 0)
			return r;
		r = thin_remove(pool->md, device->thin, blocks[i]);
		if (r < 0)
			return break_transaction(pool, r);
		set_entry(device, blocks[i], MAP_HOLE);
		atomic_fetch_add(&pool->counters.discarded, r * pool->block_size);
	}
	*begin = n == DISCARD_BATCH ? blocks[n - 1] + 1 : last + 1;
	return n < 0 ? n : 0;
}

static int unmap(struct bs_device *device, uint64_t begin, uint64_t end)
{
	struct bs_pool *pool = device->pool;
	int r = 0;

	while (r == 0 && begin < end) {
		pthread_mutex_lock(&pool->lock);
		r = check_writable(pool);
		if (r == 0)
			r = check_device(device);
		if (r == 0)
			r = unmap_batch(device, &begin, end - 1);
		pthread_mutex_unlock(&pool->lock);
	}
	return r;
}

int bs_device_discard(struct bs_device *device, uint64_t offset, uint64_t length)
{
	struct bs_pool *pool = device->pool;
	uint64_t size = pool->block_size, end = offset + length;
	int r = check_range(device, offset, length);

	if (r < 0)
		return r;
	uint64_t first = (offset + size - 1) / size;
	uint64_t last = (end + (BS_BUG(DISCARD_ROUNDS_OUTWARDS) ? size - 1 : 0)) / size;
	/* The device's own end counts as a block boundary. */
	if (end == atomic_load(&device->size) && end % size)
		last++;
	if (first >= last)
		return zero_part(device, offset, length);
	r = zero_part(device, offset, first * size - offset);
	if (r == 0)
		r = unmap(device, first, last);
	if (r == 0 && last * size < end)
		r = zero_part(device, last * size, end - last * size);
	return r;
}

int bs_device_flush(struct bs_device *device)
{
	atomic_fetch_add(&device->pool->counters.flushes, 1);
	return commit_group(device->pool);
}

int bs_device_resize(struct bs_device *device, uint64_t size)
{
	uint64_t old = atomic_load(&device->size), block_size = device->pool->block_size;
	int r = 0;

	if (size > (uint64_t)INT64_MAX - block_size)
		return bs_fail(-EINVAL, "a device of %" PRIu64 " bytes is too large", size);
	if (size < old)
		r = bs_device_discard(device, size, old - size);
	if (r == 0)
		atomic_store(&device->size, size);
	return r;
}
