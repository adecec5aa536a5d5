/*
 * What the two halves of the FUSE export share: fuse_requests.c answers the kernel's requests, fuse_export.c
 * mounts, runs the threads and keeps the list of files.
 */
#ifndef BS_FUSE_EXPORT_H
#define BS_FUSE_EXPORT_H

#define FUSE_USE_VERSION 31
#include <fuse_lowlevel.h>
#include <limits.h>
#include <pthread.h>
#include <time.h>

#include "blocksnap.h"

/* The largest read or write; the mount option and conn->max_read must agree. */
#define FUSE_MAX_TRANSFER (1u << 20)
#define FUSE_FIRST_INODE 3 /* 1 and 2 stand for "." and ".." in a listing */
#define FUSE_MAX_THREADS 64

struct file {
	struct file *next; /* ascending inode numbers */
	uint64_t inode;
	struct bs_device *device;
	unsigned int open_count;
	char name[NAME_MAX + 1];
};

struct bs_export {
	struct fuse_session *session;
	char *mountpoint;
	pthread_mutex_t files_lock;
	pthread_cond_t released;
	struct file *files;
	uint64_t next_inode;
	struct timespec started;
	uid_t owner;
	gid_t group;
	int thread_count;
	pthread_t threads[FUSE_MAX_THREADS];
};

extern const struct fuse_lowlevel_ops fuse_export_ops;

/* The page-aligned buffer, FUSE_MAX_TRANSFER bytes, of this thread that reads are answered from. */
extern _Thread_local char *fuse_read_buffer;

/* files_lock held; NULL when there is none. */
struct file *fuse_find_name(struct bs_export *ex, const char *name);

#endif
