/*
 * The kernel's requests to a FUSE export; fuse_export.c has the design.
 */
#include "fuse_export.h"

#include <errno.h>
#include <linux/falloc.h>
#include <linux/fuse.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define MAX_BACKGROUND 64

_Thread_local char *fuse_read_buffer;

static struct bs_export *to_export(fuse_req_t req)
{
	return fuse_req_userdata(req);
}

struct file *fuse_find_name(struct bs_export *ex, const char *name)
{
	struct file *file = ex->files;

	while (file && strcmp(file->name, name) != 0)
		file = file->next;
	return file;
}

/* files_lock held. */
static struct file *find_inode(struct bs_export *ex, uint64_t inode)
{
	struct file *file = ex->files;

	while (file && file->inode != inode)
		file = file->next;
	return file;
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
	struct file *file = parent == FUSE_ROOT_ID ? fuse_find_name(ex, name) : NULL;
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
	size_t capacity = size < FUSE_MAX_TRANSFER ? size : FUSE_MAX_TRANSFER, used = 0;
	bool room = true;

	if (inode != FUSE_ROOT_ID) {
		fuse_reply_err(req, ENOTDIR);
		return;
	}
	if (offset < 1)
		room = add_entry(req, fuse_read_buffer, capacity, &used, ".", &root, 1);
	if (room && offset < 2)
		room = add_entry(req, fuse_read_buffer, capacity, &used, "..", &root, 2);
	pthread_mutex_lock(&ex->files_lock);
	for (struct file *file = ex->files; room && file; file = file->next) {
		struct stat st = file_attributes(ex, file);

		if (file->inode > (uint64_t)offset)
			room = add_entry(
				req, fuse_read_buffer, capacity, &used, file->name, &st, (off_t)file->inode);
	}
	pthread_mutex_unlock(&ex->files_lock);
	fuse_reply_buf(req, fuse_read_buffer, used);
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

	if (size > FUSE_MAX_TRANSFER)
		size = FUSE_MAX_TRANSFER;
	if (begin >= end)
		size = 0;
	else if (size > end - begin)
		size = end - begin;
	int64_t r = size ? bs_device_read(file->device, begin, fuse_read_buffer, size) : 0;
	if (r < 0)
		fuse_reply_err(req, (int)-r);
	else
		fuse_reply_buf(req, fuse_read_buffer, size);
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
	conn->max_write = FUSE_MAX_TRANSFER;
	conn->max_read = FUSE_MAX_TRANSFER;
	conn->max_background = MAX_BACKGROUND;
	conn->congestion_threshold = MAX_BACKGROUND * 3 / 4;
}

const struct fuse_lowlevel_ops fuse_export_ops = {
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
