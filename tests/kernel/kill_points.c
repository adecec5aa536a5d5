/*
 * Preloaded into a process that a test kills before, or after, each of its ioctls and of its writes to a catalog.
 *
 * kill_points_arm(n, after, catalog) makes the n-th such call from there on the last that begins, or that ends;
 * without catalog only ioctls count. Calls in its child processes count too; there it is the armed process that
 * is killed, and the child goes on, as a child that survives its maker does. What was counted outlives the
 * process: its parent shares the memory.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/dm-ioctl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <unistd.h>

#define POINTS_MAX 1024
#define CATALOG "/catalog.db"
/* What catalog writes are in the list of points; an ioctl is its request, which is larger. */
enum { CATALOG_WRITE = 1, CATALOG_SYNC, CATALOG_TRUNCATE };

struct points {
	atomic_int begun;
	atomic_int ended;
	int target; /* 0: not armed */
	bool after;
	bool catalog;
	pid_t armed;
	atomic_int busy; /* removals of devices that others had open */
	unsigned long kinds[POINTS_MAX];
};

static struct points *points;

__attribute__((constructor)) static void points_share(void)
{
	points = mmap(NULL, sizeof(*points), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (points == MAP_FAILED)
		abort();
}

void kill_points_arm(int target, bool after, bool catalog)
{
	atomic_store(&points->begun, 0);
	atomic_store(&points->ended, 0);
	atomic_store(&points->busy, 0);
	points->after = after;
	points->catalog = catalog;
	points->armed = getpid();
	points->target = target;
}

void kill_points_disarm(void)
{
	points->target = 0;
}

/* How many calls have begun. */
int kill_points_count(void)
{
	return atomic_load(&points->begun);
}

unsigned long kill_points_kind(int number)
{
	return points->kinds[number];
}

/* How many removals were refused: the device was open for a moment, and they were repeated. */
int kill_points_busy(void)
{
	return atomic_load(&points->busy);
}

static void call_begins(unsigned long kind)
{
	int number = atomic_fetch_add(&points->begun, 1);

	if (number >= POINTS_MAX)
		abort();
	points->kinds[number] = kind;
	if (!points->after && number + 1 == points->target)
		kill(points->armed, SIGKILL);
}

static void call_ends(unsigned long kind, bool busy)
{
	if (busy && kind == DM_DEV_REMOVE)
		atomic_fetch_add(&points->busy, 1);
	if (atomic_fetch_add(&points->ended, 1) + 1 == points->target && points->after)
		kill(points->armed, SIGKILL);
}

static bool armed(void)
{
	return points && points->target;
}

static bool in_catalog(int fd)
{
	char link[32], path[4096];

	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	ssize_t n = readlink(link, path, sizeof(path) - 1);
	if (!points->catalog || n < 0)
		return false;
	path[n] = '\0';
	return strstr(path, CATALOG) != NULL;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define COUNTED(kind, watched, call)                                                                         \
	do {                                                                                                 \
		bool watched_ = armed() && watched;                                                          \
		if (watched_)                                                                                \
			call_begins(kind);                                                                   \
		__typeof__(call) r_ = call;                                                                  \
		int error_ = errno;                                                                          \
		if (watched_)                                                                                \
			call_ends(kind, r_ == -1 && error_ == EBUSY);                                        \
		errno = error_;                                                                              \
		return r_;                                                                                   \
	} while (0)

int ioctl(int fd, unsigned long request, ...)
{
	va_list list;

	va_start(list, request);
	void *argument = va_arg(list, void *);
	va_end(list);
	COUNTED(request, true, NEXT(ioctl)(fd, request, argument));
}

ssize_t write(int fd, const void *data, size_t length)
{
	COUNTED(CATALOG_WRITE, in_catalog(fd), NEXT(write)(fd, data, length));
}

ssize_t pwrite64(int fd, const void *data, size_t length, off64_t offset)
{
	COUNTED(CATALOG_WRITE, in_catalog(fd), NEXT(pwrite64)(fd, data, length, offset));
}

int fsync(int fd)
{
	COUNTED(CATALOG_SYNC, in_catalog(fd), NEXT(fsync)(fd));
}

int fdatasync(int fd)
{
	COUNTED(CATALOG_SYNC, in_catalog(fd), NEXT(fdatasync)(fd));
}

int ftruncate64(int fd, off64_t length)
{
	COUNTED(CATALOG_TRUNCATE, in_catalog(fd), NEXT(ftruncate64)(fd, length));
}
