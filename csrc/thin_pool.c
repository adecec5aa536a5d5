/* A pool of the user engine: format, open, close, devices, status. */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "disk_format.h"
#include "engine.h"
#include "error.h"
#include "seed_bug.h"

int bs_pool_format(const char *metadata, const char *data, uint64_t data_bytes, uint64_t block_size)
{
	struct io *metadata_io = NULL, *data_io = NULL;
	int r = io_file_open(metadata, IO_LOCK, &metadata_io);

	if (r == 0)
		r = io_file_open(data, 0, &data_io);
	if (r == 0)
		r = bs_check_block_size(block_size);
	if (r == 0 && (io_size(data_io) < 0 || (uint64_t)io_size(data_io) < data_bytes))
		r = bs_fail(-EINVAL, "%s is shorter than %" PRIu64 " bytes", data, data_bytes);
	if (r == 0 && data_bytes / block_size == 0)
		r = bs_fail(-EINVAL, "%" PRIu64 " bytes of data hold no block of %" PRIu64 " bytes",
			data_bytes, block_size);
	if (r == 0)
		r = thin_metadata_format(metadata_io, block_size / SECTOR_SIZE, data_bytes / block_size);
	io_close(data_io);
	io_close(metadata_io);
	return r;
}

static void init_locks(struct bs_pool *pool)
{
	pthread_condattr_t clock;

	grace_init(&pool->grace);
	pthread_mutex_init(&pool->lock, NULL);
	pthread_mutex_init(&pool->commit_lock, NULL);
	pthread_cond_init(&pool->hold_ended, NULL);
	pthread_cond_init(&pool->commit_done, NULL);
	pthread_condattr_init(&clock);
	pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
	pthread_cond_init(&pool->wake_committer, &clock);
	pthread_cond_init(&pool->space_came, &clock);
	pthread_condattr_destroy(&clock);
	for (int i = 0; i < CELLS; i++)
		pthread_mutex_init(&pool->cells[i], NULL);
	for (int i = 0; i < RMW_LOCKS; i++)
		pthread_rwlock_init(&pool->rmw[i], NULL);
}

static void deinit_locks(struct bs_pool *pool)
{
	grace_deinit(&pool->grace);
	pthread_mutex_destroy(&pool->lock);
	pthread_mutex_destroy(&pool->commit_lock);
	pthread_cond_destroy(&pool->hold_ended);
	pthread_cond_destroy(&pool->commit_done);
	pthread_cond_destroy(&pool->wake_committer);
	pthread_cond_destroy(&pool->space_came);
	for (int i = 0; i < CELLS; i++)
		pthread_mutex_destroy(&pool->cells[i]);
	for (int i = 0; i < RMW_LOCKS; i++)
		pthread_rwlock_destroy(&pool->rmw[i]);
}

static void destroy(struct bs_pool *pool)
{
	map_pages_free(pool->retired);
	thin_metadata_close(pool->md);
	io_close(pool->data_io);
	io_close(pool->metadata_io);
	deinit_locks(pool);
	free(pool);
}

static int open_devices(struct bs_pool *pool, const char *metadata, const char *data, unsigned int flags)
{
	unsigned int mode = flags & BS_POOL_READ_ONLY ? IO_READ_ONLY : 0;
	unsigned int lock = flags & BS_POOL_LOCKED ? 0 : mode ? IO_LOCK_SHARED : IO_LOCK;
	int r = io_file_open(metadata, mode | lock, &pool->metadata_io);

	if (r == 0)
		r = io_file_open(data, mode | (flags & BS_POOL_DIRECT_IO ? IO_DIRECT : 0), &pool->data_io);
	return r;
}

static int load_pool(struct bs_pool *pool, const char *data)
{
	struct thin_metadata_status status;
	int r = thin_metadata_open(pool->metadata_io, &pool->md);

	if (r < 0)
		return r;
	thin_metadata_status(pool->md, &status);
	pool->block_size = status.data_block_sectors * SECTOR_SIZE;
	pool->block_shift =
		(pool->block_size & (pool->block_size - 1)) == 0 ? __builtin_ctzll(pool->block_size) : -1;
	int64_t size = io_size(pool->data_io);
	if (size < 0)
		return size;
	if ((uint64_t)size / pool->block_size < status.data_blocks)
		return bs_fail(-EUCLEAN,
			"%s is shorter (%" PRId64 " bytes) than the pool says (%" PRIu64 " blocks of %" PRIu64
			" bytes): restore its size",
			data, size, status.data_blocks, pool->block_size);
	if (pool->data_io->alignment > MIN_DATA_BLOCK_SIZE)
		return bs_fail(-EOPNOTSUPP,
			"%s wants direct I/O in units of %u bytes: open the pool without it", data,
			pool->data_io->alignment);
	return 0;
}

/* What a killed process wrote and did not flush is seen here, and would be gone after a power cut. The superblock must
 * not be: what the state before it refers to is free now, and written over by the next transaction. */
static int settle_former_writes(struct bs_pool *pool)
{
	if (BS_BUG(OPENED_UNFLUSHED))
		return 0;
	atomic_store(&pool->data_dirty, true);
	return io_flush(pool->metadata_io);
}

/* The devices are the pool's from here on, also when opening fails. */
static int open_on(struct bs_pool *pool, const char *data_name)
{
	int r = load_pool(pool, data_name);

	if (r == 0 && !pool->read_only)
		r = settle_former_writes(pool);
	return r < 0 ? r : start_committer(pool);
}

static int create_pool(unsigned int flags, struct bs_pool **ret)
{
	struct bs_pool *pool = calloc(1, sizeof(*pool));

	if (!pool)
		return bs_fail(-ENOMEM, "out of memory");
	init_locks(pool);
	pool->read_only = flags & BS_POOL_READ_ONLY;
	pool->passdown = flags & BS_POOL_PASSDOWN;
	pool->watch_fd = -1;
	*ret = pool;
	return 0;
}

int bs_pool_open(const char *metadata, const char *data, unsigned int flags, struct bs_pool **ret)
{
	struct bs_pool *pool;
	int r = create_pool(flags, &pool);

	if (r < 0)
		return r;
	r = open_devices(pool, metadata, data, flags);
	if (r == 0)
		r = open_on(pool, data);
	if (r < 0)
		destroy(pool);
	else
		*ret = pool;
	return r;
}

int pool_open_on(struct io *metadata, struct io *data, unsigned int flags, struct bs_pool **ret)
{
	struct bs_pool *pool;
	int r = create_pool(flags, &pool);

	if (r < 0) {
		io_close(data);
		io_close(metadata);
		return r;
	}
	pool->metadata_io = metadata;
	pool->data_io = data;
	r = open_on(pool, data->name);
	if (r < 0)
		destroy(pool);
	else
		*ret = pool;
	return r;
}

int bs_pool_clear_needs_check(const char *metadata)
{
	struct thin_metadata *md;
	struct io *io;
	int r = io_file_open(metadata, IO_LOCK, &io);

	if (r < 0)
		return r;
	r = thin_metadata_open(io, &md);
	if (r == 0) {
		r = thin_metadata_clear_needs_check(md);
		thin_metadata_close(md);
	}
	io_close(io);
	return r;
}

int bs_pool_close(struct bs_pool *pool)
{
	if (!pool)
		return 0;
	pthread_mutex_lock(&pool->lock);
	bool busy = pool->devices || pool->held;
	pthread_mutex_unlock(&pool->lock);
	if (busy)
		return bs_fail(-EBUSY, "the pool has open devices or a running transaction");
	stop_committer(pool);
	int r = commit_group(pool);
	destroy(pool);
	return r;
}

static void free_device(struct bs_device *device)
{
	map_cache_deinit(&device->cache);
	free(device);
}

void bs_pool_abandon(struct bs_pool *pool)
{
	if (!pool)
		return;
	stop_committer(pool);
	while (pool->devices) {
		struct bs_device *next = pool->devices->next;

		free_device(pool->devices);
		pool->devices = next;
	}
	destroy(pool);
}

int bs_pool_commit(struct bs_pool *pool)
{
	return commit_group(pool);
}

int bs_pool_begin(struct bs_pool *pool)
{
	pthread_mutex_lock(&pool->lock);
	int r = check_writable(pool);
	if (r == 0 && pool->held && pthread_equal(pool->holder, pthread_self()))
		r = bs_fail(-EDEADLK, "a transaction inside a transaction");
	while (r == 0 && pool->held)
		pthread_cond_wait(&pool->hold_ended, &pool->lock);
	if (r == 0) {
		pool->held = true;
		pool->holder = pthread_self();
	}
	pthread_mutex_unlock(&pool->lock);
	return r;
}

int bs_pool_end(struct bs_pool *pool, uint64_t current_id, uint64_t new_id)
{
	pthread_mutex_lock(&pool->lock);
	int r = pool->held ? 0 : bs_fail(-EINVAL, "no transaction was begun");
	if (r == 0)
		r = thin_metadata_set_transaction_id(pool->md, current_id, new_id);
	if (r == 0)
		r = commit_locked(pool);
	pool->held = false;
	pthread_cond_broadcast(&pool->hold_ended);
	pthread_mutex_unlock(&pool->lock);
	return r;
}

int bs_pool_status(struct bs_pool *pool, struct bs_pool_status *ret)
{
	struct thin_metadata_status status;
	struct bs_device_info info[128];
	uint32_t devices = 0, begin = 0;
	int n = 0;

	pthread_mutex_lock(&pool->lock);
	thin_metadata_status(pool->md, &status);
	while (!status.failed && (n = thin_devices(pool->md, begin, info, 128)) > 0) {
		devices += n;
		begin = info[n - 1].id + 1;
	}
	*ret = (struct bs_pool_status){
		.transaction_id = status.transaction_id,
		.block_size = pool->block_size,
		.data_blocks = status.data_blocks,
		.data_blocks_free = status.data_free,
		.metadata_blocks = status.metadata_blocks,
		.metadata_blocks_free = status.metadata_free,
		.held_root = status.held_root,
		.time = status.time,
		.nr_devices = devices,
		.read_only = pool->read_only || status.needs_check,
		.needs_check = status.needs_check,
		.out_of_space = status.data_free == 0,
		.metadata_low = metadata_low(pool),
		.failed = status.failed,
		.direct_io = pool->data_io->alignment > 1,
	};
	pthread_mutex_unlock(&pool->lock);
	return n < 0 ? n : 0;
}

int bs_pool_watch(struct bs_pool *pool, int fd, uint64_t data_low, int wait_ms)
{
	pthread_mutex_lock(&pool->lock);
	pool->watch_fd = fd;
	pool->data_low = data_low;
	pool->wait_ms = fd < 0 ? 0 : wait_ms;
	pool->told_data = pool->told_metadata = false;
	pthread_cond_broadcast(&pool->space_came);
	pthread_mutex_unlock(&pool->lock);
	return 0;
}

int bs_pool_counters(struct bs_pool *pool, struct bs_pool_counters *ret)
{
	struct pool_counters *c = &pool->counters;

	*ret = (struct bs_pool_counters){
		.application_bytes = atomic_load(&c->application),
		.application_read_bytes = atomic_load(&c->application_read),
		.zero_filled_bytes = atomic_load(&c->zero_filled),
		.copied_bytes = atomic_load(&c->copied),
		.read_for_copy_bytes = atomic_load(&c->read_for_copy),
		.metadata_bytes = atomic_load(&pool->metadata_io->written_bytes),
		.padding_bytes = atomic_load(&c->padding),
		.discarded_bytes = atomic_load(&c->discarded),
		.blocks_provisioned = atomic_load(&c->provisioned),
		.blocks_copied = atomic_load(&c->blocks_copied),
		.blocks_overwritten = atomic_load(&c->overwritten),
		.commits = atomic_load(&c->commits),
		.flushes = atomic_load(&c->flushes),
	};
	return 0;
}

int bs_pool_extend(struct bs_pool *pool, uint64_t data_bytes)
{
	struct thin_metadata_status status;

	pthread_mutex_lock(&pool->lock);
	int r = check_writable(pool);
	int64_t data_size = io_size(pool->data_io), metadata_size = io_size(pool->metadata_io);
	if (r == 0 && (data_size < 0 || metadata_size < 0))
		r = data_size < 0 ? data_size : metadata_size;
	if (r == 0 && data_bytes > (uint64_t)data_size)
		r = bs_fail(-EINVAL, "the data device has only %" PRId64 " bytes", data_size);
	uint64_t wanted = data_bytes ? data_bytes : (uint64_t)data_size;
	thin_metadata_status(pool->md, &status);
	if (r == 0 && wanted / pool->block_size < status.data_blocks)
		r = bs_fail(-EINVAL, "a pool cannot shrink: it has %" PRIu64 " blocks of %" PRIu64 " bytes",
			status.data_blocks, pool->block_size);
	if (r == 0) {
		r = thin_metadata_extend(
			pool->md, metadata_size / METADATA_BLOCK_SIZE, wanted / pool->block_size);
		if (r == 0 || r == -ENOSPC) {
			/* The metadata may have grown although the data did not: commit that. */
			int committed = pool->held ? 0 : commit_locked(pool);

			r = r < 0 ? r : committed;
			pthread_cond_broadcast(&pool->space_came);
		} else
			r = break_transaction(pool, r);
	}
	pthread_mutex_unlock(&pool->lock);
	return r;
}

/* ---- held metadata ---- */

/* Refusals leave the transaction whole; anything else breaks it, -ENOSPC too, since make_room went before. */
static int settle(struct bs_pool *pool, int r)
{
	if (r >= 0 || r == -EEXIST || r == -ENODATA || r == -EBUSY || r == -EINVAL || r == -EOVERFLOW)
		return r;
	return break_transaction(pool, r);
}

/* The lock is taken once no other thread has a transaction; 0 or why nothing can be changed. */
static int lock_between_transactions(struct bs_pool *pool)
{
	pthread_mutex_lock(&pool->lock);
	if (pool->held && pthread_equal(pool->holder, pthread_self()))
		return bs_fail(-EDEADLK, "a metadata snapshot inside a transaction: end it first");
	while (pool->held)
		pthread_cond_wait(&pool->hold_ended, &pool->lock);
	return check_writable(pool);
}

int bs_pool_hold_metadata(struct bs_pool *pool)
{
	int r = lock_between_transactions(pool);

	if (r == 0)
		r = make_room(pool, false);
	if (r == 0)
		r = commit_locked(pool);
	if (r == 0)
		r = settle(pool, thin_hold_snapshot(pool->md));
	pthread_mutex_unlock(&pool->lock);
	return r;
}

int bs_pool_release_metadata(struct bs_pool *pool)
{
	int r = lock_between_transactions(pool);

	if (r == 0)
		r = settle(pool, thin_release_snapshot(pool->md));
	if (r == 0)
		r = commit_locked(pool);
	pthread_mutex_unlock(&pool->lock);
	return r;
}

/* ---- devices ---- */

static struct bs_device *find_device(struct bs_pool *pool, uint32_t id)
{
	struct bs_device *d = pool->devices;

	while (d && d->thin->id != id)
		d = d->next;
	return d;
}

int bs_pool_create_device(struct bs_pool *pool, uint32_t id)
{
	pthread_mutex_lock(&pool->lock);
	int r = check_writable(pool);
	if (r == 0)
		r = make_room(pool, false);
	if (r == 0)
		r = settle(pool, thin_create(pool->md, id));
	pthread_mutex_unlock(&pool->lock);
	return r;
}

/* No write in place may be under way when the origin's blocks become shared. */
static void stop_writes_in_place(struct bs_pool *pool, struct bs_device *origin)
{
	atomic_store(&origin->snapshotted_time, UINT32_MAX);
	grace_wait(&pool->grace);
}

int bs_pool_create_snapshot(struct bs_pool *pool, uint32_t id, uint32_t origin_id)
{
	pthread_mutex_lock(&pool->lock);
	int r = check_writable(pool);
	if (r == 0)
		r = make_room(pool, false);
	struct bs_device *origin = find_device(pool, origin_id);
	if (r == 0) {
		if (origin)
			stop_writes_in_place(pool, origin);
		r = settle(pool, thin_create_snapshot(pool->md, id, origin_id));
		if (origin)
			atomic_store(&origin->snapshotted_time,
				BS_BUG(CACHED_TIME_NOT_RAISED) ? 0 : origin->thin->snapshotted_time);
	}
	pthread_mutex_unlock(&pool->lock);
	return r;
}

int bs_pool_delete_device(struct bs_pool *pool, uint32_t id)
{
	pthread_mutex_lock(&pool->lock);
	int r = check_writable(pool);
	if (r == 0)
		r = make_room(pool, true);
	if (r == 0)
		r = settle(pool, thin_delete(pool->md, id));
	pthread_mutex_unlock(&pool->lock);
	return r;
}

int bs_pool_devices(struct bs_pool *pool, uint32_t begin, struct bs_device_info *out, int capacity)
{
	pthread_mutex_lock(&pool->lock);
	int n = thin_devices(pool->md, begin, out, capacity);
	pthread_mutex_unlock(&pool->lock);
	return n;
}

static int create_handle(struct bs_pool *pool, uint32_t id, uint64_t size, struct bs_device **ret)
{
	struct bs_device *device = calloc(1, sizeof(*device));

	if (!device)
		return bs_fail(-ENOMEM, "out of memory");
	int r = map_cache_init(&device->cache, size / pool->block_size + 1);
	if (r == 0)
		r = thin_device_get(pool->md, id, &device->thin);
	if (r < 0) {
		free_device(device);
		return r;
	}
	device->pool = pool;
	atomic_init(&device->size, size);
	atomic_init(&device->snapshotted_time, device->thin->snapshotted_time);
	device->next = pool->devices;
	pool->devices = device;
	*ret = device;
	return 0;
}

int bs_device_open(struct bs_pool *pool, uint32_t id, uint64_t size, struct bs_device **ret)
{
	int r = 0;

	if (size > (uint64_t)INT64_MAX - pool->block_size)
		return bs_fail(-EINVAL, "a device of %" PRIu64 " bytes is too large", size);
	pthread_mutex_lock(&pool->lock);
	struct bs_device *device = find_device(pool, id);
	if (!device)
		r = create_handle(pool, id, size, &device);
	if (r == 0) {
		device->references++;
		*ret = device;
	}
	pthread_mutex_unlock(&pool->lock);
	return r;
}

void bs_device_close(struct bs_device *device)
{
	if (!device)
		return;
	struct bs_pool *pool = device->pool;
	pthread_mutex_lock(&pool->lock);
	if (--device->references == 0) {
		struct bs_device **link = &pool->devices;

		while (*link != device)
			link = &(*link)->next;
		*link = device->next;
		thin_device_put(pool->md, device->thin);
		free_device(device);
	}
	pthread_mutex_unlock(&pool->lock);
}

uint64_t bs_device_size(struct bs_device *device)
{
	return atomic_load(&device->size);
}
