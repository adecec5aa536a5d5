/*
 * Loaded before libc (LD_PRELOAD): writes down, in order, every change that this process makes to files below the
 * directory RECORD_IO_ROOT, and every sync of them, in the file RECORD_IO_LOG. One change at a time: the order in the log
 * is the order on the files.
 *
 * A record: kind, length of the path, offset, length, the path, and for writes the content. A sync of the directory
 * itself has the path of the directory.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { WRITE = 1, SYNC, TRUNCATE, GROW, ZERO, NAME };

struct record {
	uint32_t kind, path_length;
	uint64_t offset, length;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int log_fd = -1;
static char root[4096];

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static void __attribute__((constructor)) start(void)
{
	const char *path = getenv("RECORD_IO_LOG"), *below = getenv("RECORD_IO_ROOT");

	if (!path || !below)
		return;
	snprintf(root, sizeof(root), "%s", below);
	log_fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

/* The path of a file that is watched. */
static int watched(int fd, char *path, size_t size)
{
	char link[64];
	size_t length = strlen(root);

	if (log_fd < 0 || fd < 0 || fd == log_fd)
		return 0;
	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	ssize_t n = readlink(link, path, size - 1);
	if (n < 0)
		return 0;
	path[n] = 0;
	return strncmp(path, root, length) == 0 && (path[length] == 0 || path[length] == '/');
}

static void put(const void *data, size_t length)
{
	if (REAL(write)(log_fd, data, length) != (ssize_t)length)
		abort();
}

static void put_head(enum kind kind, const char *path, uint64_t offset, uint64_t length)
{
	struct record record = {kind, (uint32_t)strlen(path), offset, length};

	put(&record, sizeof(record));
	put(path, record.path_length);
}

static ssize_t log_writev(int fd, const struct iovec *iov, int count, int64_t offset)
{
	char path[4096];
	int is_watched = watched(fd, path, sizeof(path));

	if (is_watched)
		pthread_mutex_lock(&lock);
	int64_t at = offset >= 0 ? offset : lseek(fd, 0, SEEK_CUR);
	ssize_t n = offset >= 0 ? REAL(pwritev)(fd, iov, count, offset) : REAL(writev)(fd, iov, count);
	int error = errno;
	if (is_watched && n > 0)
		put_head(WRITE, path, (uint64_t)at, (uint64_t)n);
	for (size_t left = is_watched && n > 0 ? (size_t)n : 0; left; iov++) {
		size_t part = iov->iov_len < left ? iov->iov_len : left;

		put(iov->iov_base, part);
		left -= part;
	}
	if (is_watched)
		pthread_mutex_unlock(&lock);
	errno = error;
	return n;
}

ssize_t write(int fd, const void *data, size_t length)
{
	struct iovec iov = {(void *)data, length};
	char path[4096];

	return watched(fd, path, sizeof(path)) ? log_writev(fd, &iov, 1, -1) : REAL(write)(fd, data, length);
}

ssize_t pwrite(int fd, const void *data, size_t length, off_t offset)
{
	struct iovec iov = {(void *)data, length};

	return log_writev(fd, &iov, 1, offset);
}

ssize_t pwrite64(int fd, const void *data, size_t length, off64_t offset)
{
	return pwrite(fd, data, length, offset);
}

ssize_t writev(int fd, const struct iovec *iov, int count)
{
	char path[4096];

	return watched(fd, path, sizeof(path)) ? log_writev(fd, iov, count, -1)
					       : REAL(writev)(fd, iov, count);
}

ssize_t pwritev(int fd, const struct iovec *iov, int count, off_t offset)
{
	return log_writev(fd, iov, count, offset);
}

ssize_t pwritev64(int fd, const struct iovec *iov, int count, off64_t offset)
{
	return log_writev(fd, iov, count, offset);
}

/* Do something to a file and write it down if it succeeds. */
#define LOGGED(fd, kind, offset, length, call)                                                               \
	do {                                                                                                 \
		char path[4096];                                                                             \
		int is_watched = watched(fd, path, sizeof(path));                                            \
		if (is_watched)                                                                              \
			pthread_mutex_lock(&lock);                                                           \
		int r = (call), error = errno;                                                               \
		if (is_watched && r == 0)                                                                    \
			put_head(kind, path, (uint64_t)(offset), (uint64_t)(length));                        \
		if (is_watched)                                                                              \
			pthread_mutex_unlock(&lock);                                                         \
		errno = error;                                                                               \
		return r;                                                                                    \
	} while (0)

int fsync(int fd)
{
	LOGGED(fd, SYNC, 0, 0, REAL(fsync)(fd));
}

int fdatasync(int fd)
{
	LOGGED(fd, SYNC, 0, 0, REAL(fdatasync)(fd));
}

int ftruncate(int fd, off_t length)
{
	LOGGED(fd, TRUNCATE, 0, length, REAL(ftruncate)(fd, length));
}

int ftruncate64(int fd, off64_t length)
{
	LOGGED(fd, TRUNCATE, 0, length, REAL(ftruncate64)(fd, length));
}

int fallocate(int fd, int mode, off_t offset, off_t length)
{
	LOGGED(fd, mode & FALLOC_FL_PUNCH_HOLE ? ZERO : GROW, mode & FALLOC_FL_PUNCH_HOLE ? offset : 0,
		mode & FALLOC_FL_PUNCH_HOLE ? length : offset + length,
		REAL(fallocate)(fd, mode, offset, length));
}

int fallocate64(int fd, int mode, off64_t offset, off64_t length)
{
	return fallocate(fd, mode, offset, length);
}

int posix_fallocate(int fd, off_t offset, off_t length)
{
	LOGGED(fd, GROW, 0, offset + length, REAL(posix_fallocate)(fd, offset, length));
}

int posix_fallocate64(int fd, off64_t offset, off64_t length)
{
	return posix_fallocate(fd, offset, length);
}

/* No state is built of what happens to names: the recorded workloads must not change any. */
int unlink(const char *path)
{
	int r = REAL(unlink)(path), error = errno;

	if (r == 0 && log_fd >= 0 && strncmp(path, root, strlen(root)) == 0)
		put_head(NAME, path, 0, 0);
	errno = error;
	return r;
}
