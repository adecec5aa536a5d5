/*
 * A file or block device behind io.h: preadv/pwritev, fdatasync, fallocate.
 *
 * The lock is flock(2), which unlike POSIX record locks does not fall when the process closes another
 * descriptor of the same file; the holder's pid comes from /proc/locks. udevd takes a shared one on a block
 * device for as long as it looks into it: that is waited for.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#include "error.h"
#include "io.h"

#define MAX_IOV 64
#define LOOKS_MAX 300
#define LOOK_NS 10000000L

struct io_file {
	struct io io;
	int fd;
	bool block_device;
	char path[];
};

static struct io_file *to_file(struct io *io)
{
	return (struct io_file *)io;
}

/* Drop the first done bytes of a vector. */
static int iov_advance(struct iovec *iov, int count, size_t done)
{
	int first = 0;

	while (first < count && done >= iov[first].iov_len)
		done -= iov[first++].iov_len;
	if (first < count) {
		iov[first].iov_base = (char *)iov[first].iov_base + done;
		iov[first].iov_len -= done;
	}
	memmove(iov, iov + first, (count - first) * sizeof(*iov));
	return count - first;
}

/* One buffer, the common case, spares the kernel the import of a vector. */
static ssize_t transfer_once(int fd, uint64_t offset, const struct iovec *iov, int count, bool writing)
{
	if (count == 1)
		return writing ? pwrite(fd, iov->iov_base, iov->iov_len, offset)
			       : pread(fd, iov->iov_base, iov->iov_len, offset);
	return writing ? pwritev(fd, iov, count, offset) : preadv(fd, iov, count, offset);
}

/* Go on after a short transfer, which has done the first n bytes (0: none, or it was interrupted). */
static int transfer_rest(
	struct io *io, uint64_t offset, const struct iovec *iov, int count, size_t n, bool writing)
{
	struct io_file *f = to_file(io);
	struct iovec rest[MAX_IOV];

	if (count > MAX_IOV)
		return bs_fail(-EINVAL, "%s: %d buffers in one transfer", f->path, count);
	memcpy(rest, iov, count * sizeof(*iov));
	for (;;) {
		offset += n;
		count = iov_advance(rest, count, n);
		if (count == 0)
			return 0;
		ssize_t r = transfer_once(f->fd, offset, rest, count, writing);
		if (r == 0)
			return bs_fail(-EIO, "%s: %s at byte %" PRIu64 " is beyond the end of the file",
				f->path, writing ? "write" : "read", offset);
		if (r < 0 && errno != EINTR)
			return bs_fail_errno(
				"%s: %s at byte %" PRIu64, f->path, writing ? "write" : "read", offset);
		n = r < 0 ? 0 : r;
	}
}

static int file_transfer(struct io *io, uint64_t offset, const struct iovec *iov, int count, bool writing)
{
	struct io_file *f = to_file(io);
	ssize_t n = transfer_once(f->fd, offset, iov, count, writing);

	if (n < 0 && errno != EINTR)
		return bs_fail_errno("%s: %s at byte %" PRIu64, f->path, writing ? "write" : "read", offset);
	if (count == 1 && n == (ssize_t)iov->iov_len)
		return 0;
	return transfer_rest(io, offset, iov, count, n < 0 ? 0 : n, writing);
}

static int file_readv(struct io *io, uint64_t offset, const struct iovec *iov, int count)
{
	return file_transfer(io, offset, iov, count, false);
}

static int file_writev(struct io *io, uint64_t offset, const struct iovec *iov, int count)
{
	return file_transfer(io, offset, iov, count, true);
}

static int file_flush(struct io *io)
{
	struct io_file *f = to_file(io);

	if (fdatasync(f->fd) < 0)
		return bs_fail_errno("%s: flush", f->path);
	return 0;
}

static int file_punch(struct io *io, uint64_t offset, uint64_t length)
{
	struct io_file *f = to_file(io);

	/* Giving space back is best effort: a file system without holes just keeps it. */
	if (fallocate(f->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length) < 0 &&
		errno != EOPNOTSUPP)
		return bs_fail_errno("%s: punch hole at byte %" PRIu64, f->path, offset);
	return 0;
}

static int64_t file_size(struct io *io)
{
	struct io_file *f = to_file(io);
	off_t end = lseek(f->fd, 0, SEEK_END);

	if (end < 0)
		return bs_fail_errno("%s: size", f->path);
	return end;
}

static void file_close(struct io *io)
{
	struct io_file *f = to_file(io);

	close(f->fd);
	free(f);
}

static const struct io_ops file_ops = {
	.readv = file_readv,
	.writev = file_writev,
	.flush = file_flush,
	.punch = file_punch,
	.size = file_size,
	.close = file_close,
};

/* The process that holds a flock on the file: /proc/locks has "1: FLOCK ADVISORY WRITE <pid>
 * <maj>:<min>:<inode> ..." */
static long lock_holder(const struct stat *st)
{
	FILE *locks = fopen("/proc/locks", "re");
	char line[256];
	long holder = 0;

	if (!locks)
		return 0;
	while (!holder && fgets(line, sizeof(line), locks)) {
		unsigned int major_nr, minor_nr;
		unsigned long inode;
		long pid;

		if (strstr(line, "->") || sscanf(line, "%*s FLOCK %*s %*s %ld %x:%x:%lu", &pid, &major_nr,
						  &minor_nr, &inode) != 4)
			continue;
		if (inode == st->st_ino && major_nr == major(st->st_dev) && minor_nr == minor(st->st_dev))
			holder = pid;
	}
	fclose(locks);
	return holder;
}

static int lock_failed(const struct io_file *f, const struct stat *st)
{
	long pid = lock_holder(st);

	if (pid > 0)
		return bs_fail(-EBUSY, "%s is in use by process %ld: end it or go through it", f->path, pid);
	return bs_fail(-EBUSY, "%s is in use by another process", f->path);
}

static int file_lock(struct io_file *f, const struct stat *st, bool shared)
{
	int looks = f->block_device && !shared ? LOOKS_MAX : 0;

	while (flock(f->fd, (shared ? LOCK_SH : LOCK_EX) | LOCK_NB) < 0) {
		if (errno != EWOULDBLOCK)
			return bs_fail_errno("%s: lock", f->path);
		/* Who has it for itself is no udevd. */
		if (looks-- == 0 || flock(f->fd, LOCK_SH | LOCK_NB) < 0)
			return lock_failed(f, st);
		nanosleep(&(struct timespec){.tv_nsec = LOOK_NS}, NULL);
	}
	return 0;
}

/* Memory and offset alignment of direct I/O on this file. */
static uint32_t direct_alignment(const struct io_file *f)
{
	struct statx stx;
	int sector;

	if (f->block_device)
		return ioctl(f->fd, BLKSSZGET, &sector) == 0 ? (uint32_t)sector : 4096;
#ifdef STATX_DIOALIGN
	if (statx(f->fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &stx) == 0 && (stx.stx_mask & STATX_DIOALIGN) &&
		stx.stx_dio_offset_align) {
		uint32_t align = stx.stx_dio_offset_align;

		return align > stx.stx_dio_mem_align ? align : stx.stx_dio_mem_align;
	}
#else
	(void)stx;
#endif
	return 4096;
}

int io_file_open(const char *path, unsigned int flags, struct io **ret)
{
	int mode = (flags & IO_READ_ONLY ? O_RDONLY : O_RDWR) | O_CLOEXEC;
	struct io_file *f = calloc(1, sizeof(*f) + strlen(path) + 1);
	struct stat st;
	int r;

	if (!f)
		return bs_fail(-ENOMEM, "out of memory");
	strcpy(f->path, path);
	f->io = (struct io){.ops = &file_ops, .alignment = 1, .name = f->path};
	f->fd = open(path, mode | (flags & IO_DIRECT ? O_DIRECT : 0));
	bool direct = f->fd >= 0 && (flags & IO_DIRECT);
	if (f->fd < 0 && errno == EINVAL && (flags & IO_DIRECT))
		f->fd = open(path, mode);
	if (f->fd < 0) {
		r = bs_fail_errno("%s", path);
		free(f);
		return r;
	}
	if (fstat(f->fd, &st) < 0) {
		r = bs_fail_errno("%s", path);
		goto fail;
	}
	if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode)) {
		r = bs_fail(-EINVAL, "%s is neither a file nor a block device", path);
		goto fail;
	}
	f->block_device = S_ISBLK(st.st_mode);
	if (flags & (IO_LOCK | IO_LOCK_SHARED)) {
		r = file_lock(f, &st, flags & IO_LOCK_SHARED);
		if (r < 0)
			goto fail;
	}
	if (direct)
		f->io.alignment = direct_alignment(f);
	/* The kernel's device-mapper writes below the page cache, which may remember what was there before. */
	if (f->block_device && (flags & IO_READ_ONLY))
		posix_fadvise(f->fd, 0, 0, POSIX_FADV_DONTNEED);
	*ret = &f->io;
	return 0;
fail:
	file_close(&f->io);
	return r;
}

void io_close(struct io *io)
{
	if (io)
		io->ops->close(io);
}
