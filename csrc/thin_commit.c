/*
 * When and in which order things reach the disk.
 *
 * A commit: wait for the I/O in flight if blocks were freed (they may be handed out again afterwards), flush
 * the data device, write the metadata, flush, write the superblock, flush; then give freed space back to the
 * backing file. A mapping is inserted only after the data it refers to was written, and insertions need the
 * lock that a commit holds: so the flush covers all data that the committed mappings refer to.
 *
 * Group commit: whoever asks while a commit runs waits for the next one, which serves all that wait. The
 * first flush of the data happens outside the lock, so that the one inside finds little to do.
 *
 * A failed flush of data counts as a failed commit: what the kernel dropped cannot be flushed again.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "disk_format.h"
#include "engine.h"
#include "error.h"
#include "seed_bug.h"

#define COMMIT_INTERVAL 1 /* second */
#define MANY_RETIRED 1024 /* pages: 4 MiB */
#define METADATA_LOW_WATER 1024

int check_writable(struct bs_pool *pool)
{
	struct thin_metadata_status status;

	thin_metadata_status(pool->md, &status);
	if (status.failed)
		return bs_fail_lost();
	if (status.needs_check)
		return bs_fail(-EUCLEAN,
			"the pool is read-only until it was checked: run pool check --clear-needs-check");
	if (pool->read_only)
		return bs_fail(-EROFS, "the pool is open read-only");
	return 0;
}

void free_retired(struct bs_pool *pool, bool force)
{
	if (!pool->retired || (!force && ++pool->nr_retired < MANY_RETIRED))
		return;
	grace_wait(&pool->grace);
	map_pages_free(pool->retired);
	pool->retired = NULL;
	pool->nr_retired = 0;
}

/* The message of the first failure is the one to keep: what comes after it is its consequence. */
int break_transaction(struct bs_pool *pool, int err)
{
	char message[512];

	strncpy(message, bs_last_error(), sizeof(message) - 1);
	message[sizeof(message) - 1] = 0;
	thin_metadata_abort(pool->md);
	pool->broken = true;
	for (struct bs_device *d = pool->devices; d; d = d->next) {
		map_cache_drop(&d->cache, &pool->retired);
		atomic_store(&d->snapshotted_time, UINT32_MAX);
	}
	free_retired(pool, true);
	for (struct bs_device *d = pool->devices; d; d = d->next)
		atomic_store(&d->snapshotted_time, d->thin->snapshotted_time);
	return bs_fail(
		err, "%s; the pool went back to its last commit and is read-only: run pool check", message);
}

static int flush_data(struct bs_pool *pool)
{
	if (!atomic_exchange(&pool->data_dirty, false) || BS_BUG(DATA_NOT_FLUSHED))
		return 0;
	int r = io_flush(pool->data_io);
	if (r < 0)
		atomic_store(&pool->data_dirty, true);
	return r;
}

/* Give the space of blocks that nobody refers to any more back to the backing file, neighbours together. */
static void pass_down(struct bs_pool *pool, const uint64_t *blocks, uint64_t nr)
{
	for (uint64_t i = 0; i < nr;) {
		uint64_t run = 1;

		while (i + run < nr && blocks[i + run] == blocks[i] + run)
			run++;
		/* Only space is at stake: a failure changes nothing that anyone reads. */
		io_punch(pool->data_io, blocks[i] * pool->block_size, run * pool->block_size);
		i += run;
	}
}

int commit_locked(struct bs_pool *pool)
{
	struct thin_metadata_status status;
	uint64_t *freed = NULL, nr_freed = 0;

	/* What was lost must not look flushed to who asks again. */
	if (pool->broken)
		return check_writable(pool);
	thin_metadata_status(pool->md, &status);
	if (!status.changed && BS_BUG(OVERWRITE_NOT_FLUSHED))
		return 0;
	if (!status.changed || pool->read_only || status.needs_check)
		return status.failed ? check_writable(pool) : flush_data(pool);
	if (status.freed_data_blocks)
		grace_wait(&pool->grace);
	free_retired(pool, true);
	int r = flush_data(pool);
	if (r == 0 && pool->passdown && status.freed_data_blocks)
		r = thin_freed_blocks(pool->md, &freed, &nr_freed);
	if (r == 0 && BS_BUG(FREED_SPACE_PUNCHED_EARLY))
		pass_down(pool, freed, nr_freed);
	if (r == 0)
		r = thin_metadata_commit(pool->md);
	if (r == 0) {
		pthread_cond_broadcast(&pool->space_came);
		pass_down(pool, freed, nr_freed);
		atomic_fetch_add(&pool->counters.commits, 1);
	}
	free(freed);
	return r < 0 ? break_transaction(pool, r) : 0;
}

static bool held_by_other(struct bs_pool *pool)
{
	return pool->held && !pthread_equal(pool->holder, pthread_self());
}

static int commit_once(struct bs_pool *pool)
{
	int r = BS_BUG(OVERWRITE_NOT_FLUSHED) ? 0 : flush_data(pool);

	pthread_mutex_lock(&pool->lock);
	while (held_by_other(pool))
		pthread_cond_wait(&pool->hold_ended, &pool->lock);
	r = r < 0 ? break_transaction(pool, r) : commit_locked(pool);
	pthread_mutex_unlock(&pool->lock);
	return r;
}

static void run_commit(struct bs_pool *pool)
{
	uint64_t number = ++pool->commits_started;

	pool->committing = true;
	pthread_mutex_unlock(&pool->commit_lock);
	int r = commit_once(pool);
	pthread_mutex_lock(&pool->commit_lock);
	pool->committing = false;
	pool->commits_finished = number;
	pool->commit_result = r;
	if (r < 0)
		strncpy(pool->commit_message, bs_last_error(), sizeof(pool->commit_message) - 1);
	pthread_cond_broadcast(&pool->commit_done);
}

int commit_group(struct bs_pool *pool)
{
	pthread_mutex_lock(&pool->lock);
	bool mine = pool->held && !held_by_other(pool);
	pthread_mutex_unlock(&pool->lock);
	if (mine)
		return bs_fail(-EDEADLK, "a flush inside a transaction: end it first");
	pthread_mutex_lock(&pool->commit_lock);
	uint64_t wanted = pool->commits_started + !BS_BUG(FLUSH_JOINS_PAST_COMMIT);
	while (pool->commits_finished < wanted) {
		if (pool->committing)
			pthread_cond_wait(&pool->commit_done, &pool->commit_lock);
		else
			run_commit(pool);
	}
	int r = pool->commit_result;
	if (r < 0)
		r = bs_fail(r, "%s", pool->commit_message);
	pthread_mutex_unlock(&pool->commit_lock);
	return r;
}

/* A commit to free something, when the present transaction does not fit: 1 done, try again. */
static int commit_for_space(struct bs_pool *pool)
{
	if (pool->held && !held_by_other(pool))
		return 0;
	while (pool->held)
		pthread_cond_wait(&pool->hold_ended, &pool->lock);
	int r = commit_locked(pool);
	return r < 0 ? r : 1;
}

/* ---- low and out of space ---- */

static void tell_watcher(struct bs_pool *pool)
{
	uint64_t one = 1;

	/* A full counter has been told enough. */
	if (write(pool->watch_fd, &one, sizeof(one)) < 0)
		return;
}

bool metadata_low(struct bs_pool *pool)
{
	struct thin_metadata_status status;

	thin_metadata_status(pool->md, &status);
	uint64_t quarter = status.metadata_blocks / 4;
	return status.metadata_free <= (quarter < METADATA_LOW_WATER ? quarter : METADATA_LOW_WATER) ||
	       thin_metadata_room(pool->md, false) == -ENOSPC;
}

/* reserved: data blocks that the caller is about to use. */
static void watch_space(struct bs_pool *pool, uint64_t reserved)
{
	struct thin_metadata_status status;

	if (pool->watch_fd < 0 || (pool->told_data && pool->told_metadata))
		return;
	thin_metadata_status(pool->md, &status);
	bool data = !pool->told_data &&
		    status.data_free * pool->block_size <= pool->data_low + reserved * pool->block_size;
	bool metadata = !pool->told_metadata && metadata_low(pool);
	pool->told_data |= data;
	pool->told_metadata |= metadata;
	if (data || metadata)
		tell_watcher(pool);
}

static struct timespec wait_limit(const struct bs_pool *pool)
{
	struct timespec until;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += pool->wait_ms / 1000;
	until.tv_nsec += pool->wait_ms % 1000 * 1000000L;
	if (until.tv_nsec >= 1000000000L) {
		until.tv_sec++;
		until.tv_nsec -= 1000000000L;
	}
	return until;
}

/* The pool is full: give the lock away until it has changed. False if nobody makes it grow, or not in time. */
static bool wait_for_space(struct bs_pool *pool, const struct timespec *until)
{
	if (pool->watch_fd >= 0)
		tell_watcher(pool);
	if (pool->wait_ms == 0)
		return false;
	return pthread_cond_timedwait(&pool->space_came, &pool->lock, until) == 0;
}

static int make_room_now(struct bs_pool *pool, bool releasing)
{
	int r = thin_metadata_room(pool->md, releasing);

	if (r != -ENOSPC)
		return r;
	int committed = commit_for_space(pool);
	if (committed < 0)
		return committed;
	return thin_metadata_room(pool->md, releasing);
}

int make_room(struct bs_pool *pool, bool releasing)
{
	int r = make_room_now(pool, releasing);

	if (r == -ENOSPC && !releasing) {
		struct timespec until = wait_limit(pool);

		while (r == -ENOSPC && wait_for_space(pool, &until))
			r = make_room_now(pool, releasing);
	}
	if (r == 0)
		watch_space(pool, 0);
	return r;
}

static int reserve_data_now(struct bs_pool *pool, uint64_t *ret)
{
	struct thin_metadata_status status;
	int r = thin_reserve(pool->md, ret);

	if (r != -ENOSPC)
		return r;
	thin_metadata_status(pool->md, &status);
	if (!status.freed_data_blocks)
		return r;
	int committed = commit_for_space(pool);
	if (committed < 0)
		return committed;
	return thin_reserve(pool->md, ret);
}

int reserve_data(struct bs_pool *pool, uint64_t *ret)
{
	int r = reserve_data_now(pool, ret);

	if (r == -ENOSPC) {
		struct timespec until = wait_limit(pool);

		while (r == -ENOSPC && wait_for_space(pool, &until))
			r = reserve_data_now(pool, ret);
	}
	if (r == 0)
		watch_space(pool, 1);
	return r;
}

/* At least once a second what was changed is committed; errors show at the next flush, in the pool's state.
 */
static void *committer_main(void *argument)
{
	struct bs_pool *pool = argument;

	pthread_mutex_lock(&pool->lock);
	while (!pool->stopping) {
		struct thin_metadata_status status;
		struct timespec until;

		clock_gettime(CLOCK_MONOTONIC, &until);
		until.tv_sec += COMMIT_INTERVAL;
		pthread_cond_timedwait(&pool->wake_committer, &pool->lock, &until);
		thin_metadata_status(pool->md, &status);
		if (!status.changed || pool->held || pool->stopping || status.failed || status.needs_check)
			continue;
		pthread_mutex_unlock(&pool->lock);
		commit_group(pool);
		pthread_mutex_lock(&pool->lock);
	}
	pthread_mutex_unlock(&pool->lock);
	return NULL;
}

int start_committer(struct bs_pool *pool)
{
	int err = pthread_create(&pool->committer, NULL, committer_main, pool);

	pool->committer_runs = err == 0;
	return err ? bs_fail(-err, "cannot start the commit thread: %s", strerror(err)) : 0;
}

void stop_committer(struct bs_pool *pool)
{
	if (!pool->committer_runs)
		return;
	pthread_mutex_lock(&pool->lock);
	pool->stopping = true;
	pthread_cond_signal(&pool->wake_committer);
	pthread_mutex_unlock(&pool->lock);
	pthread_join(pool->committer, NULL);
	pool->committer_runs = false;
}
