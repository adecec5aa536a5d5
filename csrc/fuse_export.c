/*
 * Thin devices as files of a FUSE file system (libfuse3's low-level API): a loop device over such a file
 * gives the kernel a block device without device-mapper and without privilege for the server.
 *
 * 1. The directory is flat. A file's inode number is never used twice, so that a late request of the kernel
 * cannot meet another device. The list of files is guarded by files_lock; a file that is open stays on it.
 * 2. The files bypass the kernel's page cache (FOPEN_DIRECT_IO), attributes are not cached: the kernel never
 * holds a copy that a discard, a restore or a resize on this side makes stale. The loop device above has a
 * cache of its own.
 * 3. Each thread reads requests into its own buffer, placed so that the payload of a write begins on a page.
 * Data is handed to the device from there and read from the device into a second buffer: one copy by the
 * kernel, none here.
 * 4. A request is answered by the thread that took it. Threads can be cancelled only while they wait for a
 * request.
 * 5. The server never extends, truncates or renames: the pool's owner does, through the library.
 */
#include "fuse_export.h"

#include <errno.h>
#include <linux/fuse.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "error.h"

#define MAX_READ_OPTION "max_read=1048576"
/* Headers before the payload of a write; the kernel wants room for a page of headers in any case. */
#define WRITE_HEADER (sizeof(struct fuse_in_header) + sizeof(struct fuse_write_in))
#define HEADER_ROOM 4096
/* The kernel reports the last close of a file some time after close(2) has returned. */
#define RELEASE_WAIT_MS 500

#ifndef PR_SET_IO_FLUSHER
#define PR_SET_IO_FLUSHER 57
#endif

/* ---- threads ----------------------------------------------------------------------------------- */

struct buffers {
	char *memory;
	size_t size;
};

static void free_buffers(void *arg)
{
	struct buffers *b = arg;

	munmap(b->memory, b->size);
}

/* Take requests until the file system is gone. buffer has HEADER_ROOM + FUSE_MAX_TRANSFER bytes. */
static void serve_requests(struct fuse_session *session, char *buffer)
{
	int fd = fuse_session_fd(session);

	while (!fuse_session_exited(session)) {
		pthread_setcancelstate(PTHREAD_CANCEL_ENABLE, NULL);
		ssize_t n = read(fd, buffer, HEADER_ROOM + FUSE_MAX_TRANSFER);
		pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, NULL);
		/* ENOENT: the request was withdrawn while it was read. */
		if (n < 0 && (errno == EINTR || errno == EAGAIN || errno == ENOENT))
			continue;
		if (n <= 0)
			return;
		fuse_session_process_buf(session, &(struct fuse_buf){.mem = buffer, .size = (size_t)n});
	}
}

static void *serve(void *arg)
{
	struct bs_export *ex = arg;
	struct buffers b = {.size = HEADER_ROOM + HEADER_ROOM + FUSE_MAX_TRANSFER + FUSE_MAX_TRANSFER};

	pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, NULL);
	/* Memory for serving must not come from writing back what is served. Fails without privilege. */
	prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
	b.memory = mmap(NULL, b.size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (b.memory == MAP_FAILED)
		return NULL;
	fuse_read_buffer = b.memory + 2 * HEADER_ROOM + FUSE_MAX_TRANSFER;
	pthread_cleanup_push(free_buffers, &b);
	serve_requests(ex->session, b.memory + HEADER_ROOM - WRITE_HEADER);
	pthread_cleanup_pop(1);
	return NULL;
}

/* Signals are the business of the program's other threads. */
static int start_threads(struct bs_export *ex, int threads)
{
	sigset_t all, old;
	int r = 0;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	while (r == 0 && ex->thread_count < threads) {
		r = pthread_create(&ex->threads[ex->thread_count], NULL, serve, ex);
		if (r == 0)
			ex->thread_count++;
	}
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return r ? bs_fail(-r, "%s: starting a thread: %s", ex->mountpoint, strerror(r)) : 0;
}

static void end_threads(struct bs_export *ex)
{
	for (int i = 0; i < ex->thread_count; i++)
		pthread_cancel(ex->threads[i]);
	for (int i = 0; i < ex->thread_count; i++)
		pthread_join(ex->threads[i], NULL);
	ex->thread_count = 0;
}

/* ---- the export -------------------------------------------------------------------------------- */

/* What libfuse has to say about a failed mount, instead of on stderr. */
static _Thread_local char fuse_message[512];

static void keep_fuse_message(enum fuse_log_level level, const char *format, va_list args)
{
	int length = vsnprintf(fuse_message, sizeof(fuse_message), format, args);

	while (length > 0 && (size_t)length < sizeof(fuse_message) && fuse_message[length - 1] == '\n')
		fuse_message[--length] = '\0';
}

static int check_mountpoint(const char *mountpoint)
{
	struct stat st;

	if (stat(mountpoint, &st) < 0 && errno == ENOTCONN)
		return bs_fail(
			-EBUSY, "%s: a dead file system is mounted there: unmount it first", mountpoint);
	if (stat(mountpoint, &st) < 0)
		return bs_fail_errno("%s", mountpoint);
	if (!S_ISDIR(st.st_mode))
		return bs_fail(-EINVAL, "%s is not a directory: nothing can be mounted there", mountpoint);
	if (access("/dev/fuse", F_OK) < 0)
		return bs_fail(
			-EOPNOTSUPP, "/dev/fuse is missing: run modprobe fuse, or pass it to this container");
	if (access("/dev/fuse", R_OK | W_OK) < 0)
		return bs_fail(-EPERM, "/dev/fuse may not be opened: run as root, or chmod 666 /dev/fuse");
	return 0;
}

static int mount_session(struct bs_export *ex, bool allow_other)
{
	char *argv[] = {"blocksnap", "-o",
		allow_other ? MAX_READ_OPTION
			",fsname=blocksnap,subtype=blocksnap,default_permissions,allow_other"
			    : MAX_READ_OPTION ",fsname=blocksnap,subtype=blocksnap,default_permissions"};
	struct fuse_args args = FUSE_ARGS_INIT(3, argv);

	fuse_message[0] = '\0';
	fuse_set_log_func(keep_fuse_message);
	ex->session = fuse_session_new(&args, &fuse_export_ops, sizeof(fuse_export_ops), ex);
	fuse_opt_free_args(&args);
	if (!ex->session)
		return bs_fail(-EINVAL, "%s: FUSE: %s", ex->mountpoint, fuse_message);
	if (fuse_session_mount(ex->session, ex->mountpoint) == 0)
		return 0;
	fuse_session_destroy(ex->session);
	return bs_fail(-EPERM, "%s: mounting with FUSE failed: %s", ex->mountpoint,
		fuse_message[0] ? fuse_message : "fusermount3 (package fuse3) has said why");
}

static void free_export(struct bs_export *ex)
{
	while (ex->files) {
		struct file *file = ex->files;

		ex->files = file->next;
		free(file);
	}
	pthread_cond_destroy(&ex->released);
	pthread_mutex_destroy(&ex->files_lock);
	free(ex->mountpoint);
	free(ex);
}

static struct bs_export *create_export(const char *mountpoint)
{
	struct bs_export *ex = calloc(1, sizeof(*ex));
	pthread_condattr_t attributes;

	if (!ex)
		return NULL;
	ex->mountpoint = realpath(mountpoint, NULL);
	if (!ex->mountpoint) {
		free(ex);
		return NULL;
	}
	ex->next_inode = FUSE_FIRST_INODE;
	ex->owner = geteuid();
	ex->group = getegid();
	clock_gettime(CLOCK_REALTIME, &ex->started);
	pthread_mutex_init(&ex->files_lock, NULL);
	pthread_condattr_init(&attributes);
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	pthread_cond_init(&ex->released, &attributes);
	pthread_condattr_destroy(&attributes);
	return ex;
}

int bs_export_start(const char *mountpoint, int threads, int allow_other, struct bs_export **ret)
{
	int r = check_mountpoint(mountpoint);

	if (r < 0)
		return r;
	if (threads < 1 || threads > FUSE_MAX_THREADS)
		return bs_fail(-EINVAL, "%d threads for an export: give 1 to %d", threads, FUSE_MAX_THREADS);
	struct bs_export *ex = create_export(mountpoint);
	if (!ex)
		return bs_fail_errno("%s", mountpoint);
	r = mount_session(ex, allow_other);
	if (r < 0) {
		free_export(ex);
		return r;
	}
	r = start_threads(ex, threads);
	if (r < 0) {
		bs_export_stop(ex);
		return r;
	}
	*ret = ex;
	return 0;
}

/* files_lock held. */
static void append_file(struct bs_export *ex, struct file *file)
{
	struct file **link = &ex->files;

	while (*link)
		link = &(*link)->next;
	file->next = NULL;
	*link = file;
}

/* files_lock held. */
static void unlink_file(struct bs_export *ex, struct file *file)
{
	struct file **link = &ex->files;

	while (*link != file)
		link = &(*link)->next;
	*link = file->next;
}

int bs_export_add(struct bs_export *ex, const char *name, struct bs_device *device)
{
	size_t length = strlen(name);

	if (length == 0 || length > NAME_MAX || strchr(name, '/') || !strcmp(name, ".") ||
		!strcmp(name, ".."))
		return bs_fail(-EINVAL, "\"%s\" cannot be the name of a file", name);
	struct file *file = calloc(1, sizeof(*file));
	if (!file)
		return bs_fail(-ENOMEM, "out of memory");
	file->device = device;
	memcpy(file->name, name, length + 1);
	pthread_mutex_lock(&ex->files_lock);
	bool taken = fuse_find_name(ex, name) != NULL;
	if (!taken) {
		file->inode = ex->next_inode++;
		append_file(ex, file);
	}
	pthread_mutex_unlock(&ex->files_lock);
	if (!taken)
		return 0;
	free(file);
	return bs_fail(-EEXIST, "%s/%s is exported already", ex->mountpoint, name);
}

static struct timespec deadline_after(int ms)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	ts.tv_nsec += ms * 1000000L;
	ts.tv_sec += ts.tv_nsec / 1000000000L;
	ts.tv_nsec %= 1000000000L;
	return ts;
}

int bs_export_remove(struct bs_export *ex, const char *name)
{
	struct timespec deadline = deadline_after(RELEASE_WAIT_MS);
	struct file *file;
	int waited = 0;

	pthread_mutex_lock(&ex->files_lock);
	while ((file = fuse_find_name(ex, name)) && file->open_count > 0 && waited != ETIMEDOUT)
		waited = pthread_cond_timedwait(&ex->released, &ex->files_lock, &deadline);
	bool busy = file && file->open_count > 0;
	if (file && !busy)
		unlink_file(ex, file);
	pthread_mutex_unlock(&ex->files_lock);
	if (!file)
		return bs_fail(-ENOENT, "%s/%s is not exported", ex->mountpoint, name);
	if (busy)
		return bs_fail(-EBUSY, "%s/%s is open: detach its loop device first", ex->mountpoint, name);
	free(file);
	return 0;
}

/* False once the file system was unmounted or aborted by others. */
static bool is_connected(struct fuse_session *session)
{
	struct pollfd p = {.fd = fuse_session_fd(session)};

	return poll(&p, 1, 0) >= 0 && !(p.revents & POLLERR);
}

void bs_export_stop(struct bs_export *ex)
{
	struct stat st;

	if (!ex)
		return;
	/* An unused mount ends in order, while the threads still answer. */
	bool gone = !is_connected(ex->session) || bs_umount(ex->mountpoint, UMOUNT_NOFOLLOW) == 0;
	end_threads(ex);
	/* Users of a busy one get errors from now on. */
	if (!gone)
		bs_umount(ex->mountpoint, MNT_FORCE | MNT_DETACH | UMOUNT_NOFOLLOW);
	/* Does the rest, and without privilege all of it. */
	fuse_session_unmount(ex->session);
	fuse_session_destroy(ex->session);
	/* A connection that somebody aborted looks unmounted to libfuse. */
	if (stat(ex->mountpoint, &st) < 0 && errno == ENOTCONN)
		bs_umount(ex->mountpoint, MNT_DETACH | UMOUNT_NOFOLLOW);
	free_export(ex);
}
