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
#define FUSE_USE_VERSION 31
#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <limits.h>
#include <linux/falloc.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "blocksnap.h"
#include "error.h"

#define MAX_TRANSFER (1u << 20)
#define MAX_TRANSFER_OPTION "max_read=1048576"
/* Headers before the payload of a write; the kernel wants room for a page of headers in any case. */
#define WRITE_HEADER (sizeof(struct fuse_in_header) + sizeof(struct fuse_write_in))
#define HEADER_ROOM 4096
#define MAX_BACKGROUND 64
#define MAX_THREADS 64
/* The kernel reports the last close of a file some time after close(2) has returned. */
#define RELEASE_WAIT_MS 500

#ifndef PR_SET_IO_FLUSHER
#define PR_SET_IO_FLUSHER 57
#endif

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
	pthread_t threads[MAX_THREADS];
};

/* The page-aligned buffer of this thread that reads are answered from. */
static _Thread_local char *read_buffer;

static struct bs_export *to_export(fuse_req_t req)
{
	return fuse_req_userdata(req);
}

/* ---- the list of files (files_lock held) ------------------------------------------------------- */

static struct file *find_name(struct bs_export *ex, const char *name)
{
	struct file *file = ex->files;

	while (file && strcmp(file->name, name) != 0)
		file = file->next;
	return file;
}

static struct file *find_inode(struct bs_export *ex, uint64_t inode)
{
	struct file *file = ex->files;

	while (file && file->inode != inode)
		file = file->next;
	return file;
}

static void append_file(struct bs_export *ex, struct file *file)
{
	struct file **link = &ex->files;

	while (*link)
		link = &(*link)->next;
	file->next = NULL;
	*link = file;
}

static void unlink_file(struct bs_export *ex, struct file *file)
{
	struct file **link = &ex->files;

	while (*link != file)
		link = &(*link)->next;
	*link = file->next;
}

/* ---- attributes -------------------------------------------------------------------------------- */

static struct stat base_attributes(const struct bs_export *ex)
{
	return (struct stat){
		.st_uid = ex->owner,
		.st_gid = ex->group,
		.st_blksize = 4096,
		.st_atim = ex->started,
		.st_mtim = ex->started,
		.st_ctim = ex->started,
	};
}

static struct stat file_attributes(const struct bs_export *ex, const struct file *file)
{
	struct stat st = base_attributes(ex);

	st.st_ino = file->inode;
	st.st_mode = S_IFREG | 0600;
	st.st_nlink = 1;
	st.st_size = bs_device_size(file->device);
	st.st_blocks = st.st_size / 512;
	return st;
}

static struct stat root_attributes(const struct bs_export *ex)
{
	struct stat st = base_attributes(ex);

	st.st_ino = FUSE_ROOT_ID;
	st.st_mode = S_IFDIR | 0700;
	st.st_nlink = 2;
	return st;
}

/* Attributes of the root or a file; 0 or -ENOENT. */
static int inode_attributes(struct bs_export *ex, uint64_t inode, struct stat *ret)
{
	int r = 0;

	if (inode == FUSE_ROOT_ID) {
		*ret = root_attributes(ex);
		return 0;
	}
	pthread_mutex_lock(&ex->files_lock);
	struct file *file = find_inode(ex, inode);
	if (file)
		*ret = file_attributes(ex, file);
	else
		r = -ENOENT;
	pthread_mutex_unlock(&ex->files_lock);
	return r;
}

static void export_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	struct bs_export *ex = to_export(req);
	struct fuse_entry_param entry = {0};

	pthread_mutex_lock(&ex->files_lock);
	struct file *file = parent == FUSE_ROOT_ID ? find_name(ex, name) : NULL;
	if (file) {
		entry.ino = file->inode;
		entry.attr = file_attributes(ex, file);
	}
	pthread_mutex_unlock(&ex->files_lock);
	if (file)
		fuse_reply_entry(req, &entry);
	else
		fuse_reply_err(req, ENOENT);
}

static void export_getattr(fuse_req_t req, fuse_ino_t inode, struct fuse_file_info *fi)
{
	struct stat st;
	int r = inode_attributes(to_export(req), inode, &st);

	if (r < 0)
		fuse_reply_err(req, -r);
	else
		fuse_reply_attr(req, &st, 0);
}

static void export_setattr(
	fuse_req_t req, fuse_ino_t inode, struct stat *wanted, int set, struct fuse_file_info *fi)
{
	struct stat st;
	int r = inode_attributes(to_export(req), inode, &st);

	if (r == 0 && (set & (FUSE_SET_ATTR_MODE | FUSE_SET_ATTR_UID | FUSE_SET_ATTR_GID)))
		r = -EPERM;
	if (r == 0 && (set & FUSE_SET_ATTR_SIZE) && wanted->st_size != st.st_size)
		r = -EPERM;
	/* Times are not kept: setting them succeeds, as programs that copy files expect. */
	if (r < 0)
		fuse_reply_err(req, -r);
	else
		fuse_reply_attr(req, &st, 0);
}

/* ---- the directory ----------------------------------------------------------------------------- */

/* Append an entry if it fits; next is the offset behind it. */
static bool add_entry(fuse_req_t req, char *buffer, size_t capacity, size_t *used, const char *name,
	const struct stat *st, off_t next)
{
	size_t size = fuse_add_direntry(req, buffer + *used, capacity - *used, name, st, next);

	if (size > capacity - *used)
		return false;
	*used += size;
	return true;
}

/* The offset of an entry is its inode number, 1 and 2 standing for "." and "..": files begin at 3. */
static void export_readdir(
	fuse_req_t req, fuse_ino_t inode, size_t size, off_t offset, struct fuse_file_info *fi)
{
	struct bs_export *ex = to_export(req);
	struct stat root = root_attributes(ex);
	size_t capacity = size < MAX_TRANSFER ? size : MAX_TRANSFER, used = 0;
	bool room = true;

	if (inode != FUSE_ROOT_ID) {
		fuse_reply_err(req, ENOTDIR);
		return;
	}
	if (offset < 1)
		room = add_entry(req, read_buffer, capacity, &used, ".", &root, 1);
	if (room && offset < 2)
		room = add_entry(req, read_buffer, capacity, &used, "..", &root, 2);
	pthread_mutex_lock(&ex->files_lock);
	for (struct file *file = ex->files; room && file; file = file->next) {
		struct stat st = file_attributes(ex, file);

		if (file->inode > (uint64_t)offset)
			room = add_entry(
				req, read_buffer, capacity, &used, file->name, &st, (off_t)file->inode);
	}
	pthread_mutex_unlock(&ex->files_lock);
	fuse_reply_buf(req, read_buffer, used);
}

static void export_statfs(fuse_req_t req, fuse_ino_t inode)
{
	struct bs_export *ex = to_export(req);
	struct statvfs st = {.f_bsize = 4096, .f_frsize = 4096, .f_namemax = NAME_MAX};

	pthread_mutex_lock(&ex->files_lock);
	for (struct file *file = ex->files; file; file = file->next) {
		st.f_files++;
		st.f_blocks += bs_device_size(file->device) / st.f_frsize;
	}
	pthread_mutex_unlock(&ex->files_lock);
	fuse_reply_statfs(req, &st);
}

/* ---- open files -------------------------------------------------------------------------------- */

static struct file *open_file(struct bs_export *ex, uint64_t inode)
{
	pthread_mutex_lock(&ex->files_lock);
	struct file *file = find_inode(ex, inode);
	if (file)
		file->open_count++;
	pthread_mutex_unlock(&ex->files_lock);
	return file;
}

static void release_file(struct bs_export *ex, struct file *file)
{
	pthread_mutex_lock(&ex->files_lock);
	if (--file->open_count == 0)
		pthread_cond_broadcast(&ex->released);
	pthread_mutex_unlock(&ex->files_lock);
}

static struct file *to_file(const struct fuse_file_info *fi)
{
	return (struct file *)(uintptr_t)fi->fh;
}

static void export_open(fuse_req_t req, fuse_ino_t inode, struct fuse_file_info *fi)
{
	struct bs_export *ex = to_export(req);
	struct file *file = open_file(ex, inode);

	if (!file) {
		fuse_reply_err(req, inode == FUSE_ROOT_ID ? EISDIR : ENOENT);
		return;
	}
	/* Written out, because libfuse before 3.15 does not know the flag without which writes to a file take
	 * turns. */
	struct fuse_open_out out = {
		.fh = (uintptr_t)file,
		.open_flags = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES | FOPEN_NOFLUSH,
	};
	if (fuse_reply_buf(req, (const char *)&out, sizeof(out)) < 0)
		release_file(ex, file);
}

static void export_release(fuse_req_t req, fuse_ino_t inode, struct fuse_file_info *fi)
{
	release_file(to_export(req), to_file(fi));
	fuse_reply_err(req, 0);
}

static void export_read(
	fuse_req_t req, fuse_ino_t inode, size_t size, off_t offset, struct fuse_file_info *fi)
{
	struct file *file = to_file(fi);
	uint64_t end = bs_device_size(file->device), begin = (uint64_t)offset;

	if (size > MAX_TRANSFER)
		size = MAX_TRANSFER;
	if (begin >= end)
		size = 0;
	else if (size > end - begin)
		size = end - begin;
	int64_t r = size ? bs_device_read(file->device, begin, read_buffer, size) : 0;
	if (r < 0)
		fuse_reply_err(req, (int)-r);
	else
		fuse_reply_buf(req, read_buffer, size);
}

static void export_write(fuse_req_t req, fuse_ino_t inode, const char *buffer, size_t size, off_t offset,
	struct fuse_file_info *fi)
{
	struct file *file = to_file(fi);
	uint64_t end = bs_device_size(file->device), begin = (uint64_t)offset;

	if (begin > end || size > end - begin) {
		fuse_reply_err(req, EFBIG);
		return;
	}
	int64_t r = bs_device_write(file->device, begin, buffer, size);
	if (r < 0)
		fuse_reply_err(req, (int)-r);
	else
		fuse_reply_write(req, size);
}

static void export_fsync(fuse_req_t req, fuse_ino_t inode, int datasync, struct fuse_file_info *fi)
{
	fuse_reply_err(req, -bs_device_flush(to_file(fi)->device));
}

/* Zero a range by unmapping it; what lies behind the end is left out. */
static int zero_range(struct bs_device *device, uint64_t begin, uint64_t length)
{
	uint64_t end = bs_device_size(device);

	if (begin >= end)
		return 0;
	return bs_device_discard(device, begin, length < end - begin ? length : end - begin);
}

static void export_fallocate(
	fuse_req_t req, fuse_ino_t inode, int mode, off_t offset, off_t length, struct fuse_file_info *fi)
{
	struct bs_device *device = to_file(fi)->device;
	uint64_t begin = (uint64_t)offset, end = begin + (uint64_t)length;
	bool grows = !(mode & FALLOC_FL_KEEP_SIZE) && end > bs_device_size(device);
	int r;

	switch (mode & ~FALLOC_FL_KEEP_SIZE) {
	case FALLOC_FL_PUNCH_HOLE:
	case FALLOC_FL_ZERO_RANGE:
		r = grows ? -EOPNOTSUPP : zero_range(device, begin, (uint64_t)length);
		break;
	case 0: /* Space comes from the pool when it is written to. */
		r = grows ? -EOPNOTSUPP : 0;
		break;
	default:
		r = -EOPNOTSUPP;
	}
	fuse_reply_err(req, -r);
}

static void export_init(void *userdata, struct fuse_conn_info *conn)
{
	conn->max_write = MAX_TRANSFER;
	conn->max_read = MAX_TRANSFER;
	conn->max_background = MAX_BACKGROUND;
	conn->congestion_threshold = MAX_BACKGROUND * 3 / 4;
}

static const struct fuse_lowlevel_ops export_ops = {
	.init = export_init,
	.lookup = export_lookup,
	.getattr = export_getattr,
	.setattr = export_setattr,
	.readdir = export_readdir,
	.statfs = export_statfs,
	.open = export_open,
	.release = export_release,
	.read = export_read,
	.write = export_write,
	.fsync = export_fsync,
	.fallocate = export_fallocate,
};

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

/* Take requests until the file system is gone. buffer has HEADER_ROOM + MAX_TRANSFER bytes. */
static void serve_requests(struct fuse_session *session, char *buffer)
{
	int fd = fuse_session_fd(session);

	while (!fuse_session_exited(session)) {
		pthread_setcancelstate(PTHREAD_CANCEL_ENABLE, NULL);
		ssize_t n = read(fd, buffer, HEADER_ROOM + MAX_TRANSFER);
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
	struct buffers b = {.size = HEADER_ROOM + HEADER_ROOM + MAX_TRANSFER + MAX_TRANSFER};

	pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, NULL);
	/* Memory for serving must not come from writing back what is served; needs a privilege, does without.
	 */
	prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
	b.memory = mmap(NULL, b.size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (b.memory == MAP_FAILED)
		return NULL;
	read_buffer = b.memory + 2 * HEADER_ROOM + MAX_TRANSFER;
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
		return bs_fail(-EOPNOTSUPP,
			"/dev/fuse is missing: load the fuse module (modprobe fuse) or pass the "
			"device to this container");
	return 0;
}

static int mount_session(struct bs_export *ex, bool allow_other)
{
	char *argv[] = {"blocksnap", "-o",
		allow_other ? MAX_TRANSFER_OPTION
			",fsname=blocksnap,subtype=blocksnap,default_permissions,allow_other"
			    : MAX_TRANSFER_OPTION ",fsname=blocksnap,subtype=blocksnap,default_permissions"};
	struct fuse_args args = FUSE_ARGS_INIT(3, argv);

	fuse_message[0] = '\0';
	fuse_set_log_func(keep_fuse_message);
	ex->session = fuse_session_new(&args, &export_ops, sizeof(export_ops), ex);
	fuse_opt_free_args(&args);
	if (!ex->session)
		return bs_fail(-EINVAL, "%s: FUSE: %s", ex->mountpoint, fuse_message);
	if (fuse_session_mount(ex->session, ex->mountpoint) == 0)
		return 0;
	fuse_session_destroy(ex->session);
	return bs_fail(-EPERM, "%s: mounting with FUSE failed: %s", ex->mountpoint,
		fuse_message[0] ? fuse_message
				: "see fusermount3's message; allow_other needs user_allow_other in "
				  "/etc/fuse.conf");
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
	ex->next_inode = 3;
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
	if (threads < 1 || threads > MAX_THREADS)
		return bs_fail(-EINVAL, "%d threads for an export: give 1 to %d", threads, MAX_THREADS);
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
	bool taken = find_name(ex, name) != NULL;
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
	while ((file = find_name(ex, name)) && file->open_count > 0 && waited != ETIMEDOUT)
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

void bs_export_stop(struct bs_export *ex)
{
	struct stat st;

	if (!ex)
		return;
	/* While the threads still answer, so that an unused mount ends in order. Without privilege libfuse
	 * does it. */
	bs_umount(ex->mountpoint, MNT_DETACH | UMOUNT_NOFOLLOW);
	end_threads(ex);
	fuse_session_unmount(ex->session);
	fuse_session_destroy(ex->session);
	/* A connection that somebody aborted looks unmounted to libfuse. */
	if (stat(ex->mountpoint, &st) < 0 && errno == ENOTCONN)
		bs_umount(ex->mountpoint, MNT_DETACH | UMOUNT_NOFOLLOW);
	free_export(ex);
}
