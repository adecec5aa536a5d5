/*
 * The user engine's own state, shared by thin_pool.c (life, devices, status), thin_commit.c (when and in
 * which order things reach the disk), thin_io.c (read, write, discard) and data_io.c (the data device).
 *
 * Locks, in the order in which they may be taken:
 *   commit_lock   group commit: who commits, who waits
 *   cells[]       one thread at a time changes the mapping of a thin block (hashed)
 *   lock          metadata, devices, map pages; held over a commit
 *   rmw[]         partial sectors under direct I/O
 * A grace section may be entered while holding `lock` or a cell, takes none of them itself, and covers each
 * access to the data device through a mapping. A data block that became free is not handed out again before a
 * grace period has passed, and a snapshot is taken only after the writes in flight have ended.
 */
#ifndef BS_ENGINE_H
#define BS_ENGINE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "blocksnap.h"
#include "grace.h"
#include "io.h"
#include "map_cache.h"
#include "thin_metadata.h"

#define CELLS 256
#define RMW_LOCKS 64

struct pool_counters {
	_Atomic uint64_t application, application_read, zero_filled, copied, read_for_copy, padding,
		discarded;
	_Atomic uint64_t provisioned, blocks_copied, overwritten, commits, flushes;
};

struct bs_device {
	struct bs_pool *pool;
	struct thin_device *thin;
	struct map_cache cache;
	_Atomic uint64_t size;
	_Atomic uint32_t snapshotted_time;
	unsigned int references;
	struct bs_device *next;
};

struct bs_pool {
	struct io *metadata_io, *data_io;
	struct thin_metadata *md;
	uint64_t block_size;
	int block_shift; /* -1: not a power of two */
	bool read_only, passdown;
	_Atomic bool data_dirty; /* written since the last data flush began */
	struct grace grace;
	struct pool_counters counters;

	pthread_mutex_t lock;
	struct bs_device *devices;
	struct map_page *retired;
	unsigned int nr_retired;
	bool broken; /* a transaction was lost: nothing counts as flushed any more */
	bool held;   /* between begin and end */
	pthread_t holder;
	pthread_cond_t hold_ended;

	pthread_mutex_t commit_lock;
	pthread_cond_t commit_done;
	uint64_t commits_started, commits_finished;
	bool committing;
	int commit_result;
	char commit_message[512];

	int watch_fd;      /* an eventfd, -1: nobody watches the space */
	uint64_t data_low; /* bytes */
	int wait_ms;       /* how long who finds the pool full waits for it to grow */
	bool told_data, told_metadata;
	pthread_cond_t space_came;

	pthread_t committer;
	bool committer_runs, stopping;
	pthread_cond_t wake_committer;

	pthread_mutex_t cells[CELLS];
	pthread_rwlock_t rmw[RMW_LOCKS];
};

static inline uint64_t pool_block_of(const struct bs_pool *pool, uint64_t offset)
{
	return pool->block_shift >= 0 ? offset >> pool->block_shift : offset / pool->block_size;
}

/* thin_pool.c: open a pool on any io; both are the pool's from here on, also when this fails. */
int pool_open_on(struct io *metadata, struct io *data, unsigned int flags, struct bs_pool **ret);

/* data_io.c: byte ranges of the data device, any alignment. */
int data_read(struct bs_pool *pool, uint64_t offset, void *buffer, uint64_t length);
int data_write(struct bs_pool *pool, uint64_t offset, const void *buffer, uint64_t length);

/* thin_commit.c, with the lock held unless it says otherwise. */
/* Commit now: data flush, metadata, superblock; freed blocks come back. Not while held by another thread. */
int commit_locked(struct bs_pool *pool);
/* Without the lock: return when everything that was done before the call is on disk. */
int commit_group(struct bs_pool *pool);
/* Make sure that one more metadata change fits, by a commit if need be; releasing: it gives space back and
 * may use the reserve. May give the lock away for a while. */
int make_room(struct bs_pool *pool, bool releasing);
/* Reserve a data block, by a commit if that frees some. May give the lock away for a while. */
int reserve_data(struct bs_pool *pool, uint64_t *ret);
/* Is a quarter of the metadata (at most 4 MiB) or less free, or too little for the next change? */
bool metadata_low(struct bs_pool *pool);
/* A metadata change failed half-way: back to the committed state, read-only, needs_check. Returns err. */
int break_transaction(struct bs_pool *pool, int err);
/* 0 or why nothing can be changed. */
int check_writable(struct bs_pool *pool);
/* Free retired pages when there are many; always if force. Not within a grace section. */
void free_retired(struct bs_pool *pool, bool force);
int start_committer(struct bs_pool *pool);
void stop_committer(struct bs_pool *pool);

#endif
