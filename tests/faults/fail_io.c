/*
 * Preloaded: lets a chosen system call on the files below a directory fail.
 *
 * fail_io_arm(directory, n, error, lasting) makes the n-th such call of this process from there on (from 0) fail with an
 * error, with lasting all later ones too. A write that fails has done its first half. fail_io_count and fail_io_name
 * tell the calls since then.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define CALLS_MAX 4096

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char root[4096], names[CALLS_MAX][64];
static int count, target, failure;
static bool armed, lasts;

void fail_io_arm(const char *directory, int n, int error, int lasting)
{
	pthread_mutex_lock(&lock);
	snprintf(root, sizeof(root), "%s", directory);
	count = 0;
	target = n;
	failure = error;
	lasts = lasting;
	armed = true;
	pthread_mutex_unlock(&lock);
}

void fail_io_disarm(void)
{
	armed = false;
}

int fail_io_count(void)
{
	return count;
}

const char *fail_io_name(int n)
{
	return names[n];
}

/* Count a call on a path; is it to fail? */
static bool fails_at(const char *call, const char *path)
{
	size_t length = strlen(root);

	if (strncmp(path, root, length) != 0 || (path[length] != 0 && path[length] != '/'))
		return false;
	pthread_mutex_lock(&lock);
	int n = count < CALLS_MAX ? count++ : count;
	snprintf(names[n], sizeof(names[n]), "%s %.40s", call, path[length] ? path + length + 1 : ".");
	bool fails = n == target || (lasts && n > target);
	pthread_mutex_unlock(&lock);
	errno = failure;
	return fails;
}

static bool fails(const char *call, int fd)
{
	char link[64], path[4096];

	if (!armed)
		return false;
	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	ssize_t n = readlink(link, path, sizeof(path) - 1);
	if (n < 0)
		return false;
	path[n] = 0;
	return fails_at(call, path);
}

#define ALIAS(name, original) __typeof__(original) name __attribute__((alias(#original)))

ssize_t pread(int fd, void *buffer, size_t length, off_t offset)
{
	return fails("pread", fd) ? -1 : syscall(SYS_pread64, fd, buffer, length, offset);
}
ALIAS(pread64, pread);

ssize_t pwrite(int fd, const void *buffer, size_t length, off_t offset)
{
	if (!fails("pwrite", fd))
		return syscall(SYS_pwrite64, fd, buffer, length, offset);
	int error = errno;
	syscall(SYS_pwrite64, fd, buffer, length / 1024 * 512, offset);
	errno = error;
	return -1;
}
ALIAS(pwrite64, pwrite);

ssize_t preadv(int fd, const struct iovec *iov, int nr, off_t offset)
{
	return fails("preadv", fd) ? -1 : syscall(SYS_preadv, fd, iov, nr, offset, 0L);
}
ALIAS(preadv64, preadv);

ssize_t pwritev(int fd, const struct iovec *iov, int nr, off_t offset)
{
	return fails("pwritev", fd) ? -1 : syscall(SYS_pwritev, fd, iov, nr, offset, 0L);
}
ALIAS(pwritev64, pwritev);

ssize_t read(int fd, void *buffer, size_t length)
{
	return fails("read", fd) ? -1 : syscall(SYS_read, fd, buffer, length);
}

ssize_t write(int fd, const void *buffer, size_t length)
{
	return fails("write", fd) ? -1 : syscall(SYS_write, fd, buffer, length);
}

int fsync(int fd)
{
	return fails("fsync", fd) ? -1 : (int)syscall(SYS_fsync, fd);
}

int fdatasync(int fd)
{
	return fails("fdatasync", fd) ? -1 : (int)syscall(SYS_fdatasync, fd);
}

int ftruncate(int fd, off_t length)
{
	return fails("ftruncate", fd) ? -1 : (int)syscall(SYS_ftruncate, fd, length);
}
ALIAS(ftruncate64, ftruncate);

int fallocate(int fd, int mode, off_t offset, off_t length)
{
	return fails("fallocate", fd) ? -1 : (int)syscall(SYS_fallocate, fd, mode, offset, length);
}
ALIAS(fallocate64, fallocate);

int posix_fallocate(int fd, off_t offset, off_t length)
{
	if (fails("posix_fallocate", fd) || syscall(SYS_fallocate, fd, 0, offset, length) < 0)
		return errno;
	return 0;
}
ALIAS(posix_fallocate64, posix_fallocate);

int open(const char *path, int flags, ...)
{
	mode_t mode = 0;
	va_list arguments;

	va_start(arguments, flags);
	if (flags & (O_CREAT | __O_TMPFILE))
		mode = va_arg(arguments, mode_t);
	va_end(arguments);
	return armed && fails_at("open", path) ? -1 : (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}
ALIAS(open64, open);

int mkdir(const char *path, mode_t mode)
{
	return armed && fails_at("mkdir", path) ? -1 : (int)syscall(SYS_mkdir, path, mode);
}

int unlink(const char *path)
{
	return armed && fails_at("unlink", path) ? -1 : (int)syscall(SYS_unlink, path);
}

int rename(const char *from, const char *to)
{
	return armed && fails_at("rename", from) ? -1 : (int)syscall(SYS_rename, from, to);
}

int link(const char *from, const char *to)
{
	return armed && fails_at("link", from) ? -1 : (int)syscall(SYS_link, from, to);
}
