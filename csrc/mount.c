/*
 * Mounting, unmounting, syncing and freezing file systems by system calls, each in a child process
 * (child_process.h says why), and limiting FUSE connections.
 *
 * A freeze is held by such a child, its guard. The guard thaws when told so, when the freeze completes after
 * its time-out, and when its maker is gone: neither a slow freeze nor a killed process leaves
 * anything frozen.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#include "blocksnap.h"
#include "child_process.h"
#include "error.h"

#define UMOUNT_PAUSE_MS 5
#define UMOUNT_PATIENCE_MS 500

/* ---- mounts ------------------------------------------------------ */

struct mount_args {
	const char *source;
	const char *target;
	const char *type;
	unsigned long flags;
	const char *data;
};

static void mount_child(const void *args, int socket)
{
	const struct mount_args *a = args;
	unsigned long per_mount = a->flags & (MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIME);
	int r = mount(a->source, a->target, a->type, a->flags, a->data) < 0 ? -errno : 0;

	/* A bind mount takes over the source's flags; others need a second call. */
	if (r == 0 && (a->flags & MS_BIND) && !(a->flags & MS_REMOUNT) && per_mount &&
		mount(NULL, a->target, NULL, MS_REMOUNT | MS_BIND | per_mount, NULL) < 0) {
		r = -errno;
		umount2(a->target, MNT_DETACH);
	}
	child_reply(socket, r, 0);
}

static int mount_failed(const struct mount_args *a, int err)
{
	const char *source = a->source, *type = a->type ? a->type : "file system";

	switch (-err) {
	case EPERM:
		return bs_fail(err, "mounting %s at %s: no privilege: run as root", source, a->target);
	case EACCES:
		return bs_fail(-EROFS, "mounting %s at %s: the device is read-only: mount it read-only",
			source, a->target);
	case EBUSY:
		return bs_fail(
			err, "mounting %s at %s: already mounted or the target is in use", source, a->target);
	case ENODEV:
		return bs_fail(
			-EOPNOTSUPP, "mounting %s: this kernel has no %s: load its module", source, type);
	case ENOTBLK:
		return bs_fail(
			-EINVAL, "mounting %s: not a block device: attach a loop device first", source);
	case ENOENT:
		return bs_fail(err, "mounting %s at %s: one of them does not exist", source, a->target);
	case ENOTDIR:
		return bs_fail(
			-EINVAL, "mounting %s at %s: the target is not a directory", source, a->target);
	case EINVAL:
		return bs_fail(err, "mounting %s at %s: no valid %s on it, or an unknown option in \"%s\"",
			source, a->target, type, a->data ? a->data : "");
	default:
		return bs_fail(err, "mounting %s at %s: %s", source, a->target, strerror(-err));
	}
}

int bs_mount(const char *source, const char *target, const char *type, unsigned long flags, const char *data)
{
	struct mount_args args = {source ? source : "none", target, type, flags, data};
	int r = child_run(mount_child, &args);

	return r < 0 ? mount_failed(&args, r) : 0;
}

/* Whatever forks has for a moment also the files open that its maker has just closed: a new child of another
 * thread here, or of another program. So a busy file system is asked again before it is called so. */
static void umount_child(const void *args, int socket)
{
	const struct mount_args *a = args;
	int r;

	for (int waited = 0;; waited += UMOUNT_PAUSE_MS) {
		r = umount2(a->target, (int)a->flags) < 0 ? -errno : 0;
		if (r != -EBUSY || a->flags || waited >= UMOUNT_PATIENCE_MS)
			break;
		nanosleep(&(struct timespec){.tv_nsec = UMOUNT_PAUSE_MS * 1000000L}, NULL);
	}
	child_reply(socket, r, 0);
}

int bs_umount(const char *target, int flags)
{
	int r = child_run(umount_child, &(struct mount_args){.target = target, .flags = flags});

	switch (-r) {
	case 0:
		return 0;
	case EPERM:
		return bs_fail(r, "unmounting %s: no privilege: run as root", target);
	case EBUSY:
		return bs_fail(
			r, "unmounting %s: files on it are open, or something is mounted below it", target);
	case EINVAL:
		return bs_fail(r, "%s is not a mount point", target);
	default:
		return bs_fail(r, "unmounting %s: %s", target, strerror(-r));
	}
}

/* Open a file of the FUSE control file system, which need not be mounted anywhere: through a mount of its own,
 * which no name leads to and which is gone with its descriptor. */
static int fusectl_open(const char *name)
{
	int root = -1, fd = -1, err = 0;
	int context = fsopen("fusectl", FSOPEN_CLOEXEC);

	if (context < 0 || fsconfig(context, FSCONFIG_CMD_CREATE, NULL, NULL, 0) < 0 ||
		(root = fsmount(context, FSMOUNT_CLOEXEC, 0)) < 0 ||
		(fd = openat(root, name, O_WRONLY | O_CLOEXEC)) < 0)
		err = -errno;
	if (root >= 0)
		close(root);
	if (context >= 0)
		close(context);
	return err ? err : fd;
}

int bs_fuse_set_max_background(unsigned int connection, unsigned int limit)
{
	char name[64], value[16];

	snprintf(name, sizeof(name), "%u/max_background", connection);
	int length = snprintf(value, sizeof(value), "%u", limit), err = 0, fd = fusectl_open(name);
	if (fd < 0 || write(fd, value, (size_t)length) < 0)
		err = fd < 0 ? fd : -errno;
	if (fd >= 0)
		close(fd);
	switch (-err) {
	case 0:
		return 0;
	case EPERM:
		return bs_fail(err, "FUSE connection %u: no privilege to limit it: run as root", connection);
	case ENODEV:
		return bs_fail(-EOPNOTSUPP, "this kernel has no fusectl: run modprobe fuse");
	default:
		return bs_fail(err, "FUSE connection %u: max_background: %s", connection, strerror(-err));
	}
}

static void sync_child(const void *args, int socket)
{
	int fd = open(args, O_RDONLY | O_CLOEXEC);

	child_reply(socket, fd < 0 || syncfs(fd) < 0 ? -errno : 0, 0);
}

int bs_filesystem_sync(const char *path)
{
	int r = child_run(sync_child, path);

	return r < 0 ? bs_fail(r, "%s: writing its file system back: %s", path, strerror(-r)) : 0;
}

static void probe_child(const void *args, int socket)
{
	struct statfs st;

	child_reply(socket, statfs(args, &st) < 0 ? -errno : 0, 0);
}

int bs_filesystem_probe(const char *path, int timeout_ms)
{
	struct child_reply answer;
	struct child child;
	int r = child_start(probe_child, path, &child);

	if (r < 0)
		return r;
	r = child_answer(&child, timeout_ms, &answer);
	if (r == 0) {
		kill(child.pid, SIGKILL); /* it goes at once unless the server has its request */
		child_lose(&child);
		return bs_fail(
			-ETIMEDOUT, "%s: its file system did not answer within %d ms", path, timeout_ms);
	}
	child_end(&child);
	r = r == 1 ? answer.error : r;
	return r < 0 ? bs_fail(r, "%s: asking its file system: %s", path, strerror(-r)) : 0;
}

/* ---- freezing ---------------------------------------------------- */

/* A child that holds (or still tries to get) a file system frozen. */
struct guard {
	struct guard *next;
	struct child child;
	uint64_t device;
	char path[];
};

static pthread_mutex_t guards_lock = PTHREAD_MUTEX_INITIALIZER;
static struct guard *guards;

static void guard_child(const void *args, int socket)
{
	struct statx stx = {0};
	int fd = open(args, O_RDONLY | O_CLOEXEC | O_NONBLOCK);

	if (fd < 0 || statx(fd, "", AT_EMPTY_PATH, STATX_BASIC_STATS, &stx) < 0) {
		child_reply(socket, -errno, 0);
		return;
	}
	/* A path below which nothing is mounted any more would freeze the host's file system. */
	if (!(stx.stx_attributes & STATX_ATTR_MOUNT_ROOT)) {
		child_reply(socket, -EINVAL, 0);
		return;
	}
	if (ioctl(fd, FIFREEZE, 0) < 0) {
		child_reply(socket, -errno, 0);
		return;
	}
	child_reply(socket, 0, makedev(stx.stx_dev_major, stx.stx_dev_minor));
	child_wait(socket);
	child_reply(socket, ioctl(fd, FITHAW, 0) < 0 ? -errno : 0, 0);
}

static int freeze_failed(const char *path, int err)
{
	switch (-err) {
	case EPERM:
	case EACCES:
		return bs_fail(-EPERM, "freezing %s: no privilege: run as root", path);
	case EBUSY:
		return bs_fail(err, "%s is already frozen", path);
	case EINVAL:
		return bs_fail(err, "%s is not a mount point: nothing to freeze", path);
	case EOPNOTSUPP:
		return bs_fail(err, "%s: this file system cannot be frozen", path);
	default:
		return bs_fail(err, "freezing %s: %s", path, strerror(-err));
	}
}

int bs_filesystem_freeze(const char *path, int timeout_ms)
{
	struct guard *guard = calloc(1, sizeof(*guard) + strlen(path) + 1);
	struct child_reply answer;

	if (!guard)
		return bs_fail(-ENOMEM, "out of memory");
	strcpy(guard->path, path);
	int r = child_start(guard_child, path, &guard->child);
	if (r < 0) {
		free(guard);
		return r;
	}
	r = child_answer(&guard->child, timeout_ms < 0 ? 0 : timeout_ms, &answer);
	if (r == 0) {
		child_lose(&guard->child);
		free(guard);
		return bs_fail(
			-ETIMEDOUT, "freezing %s took longer than %d ms and was given up", path, timeout_ms);
	}
	if (r < 0 || answer.error < 0) {
		child_end(&guard->child);
		free(guard);
		return freeze_failed(path, r < 0 ? r : answer.error);
	}
	guard->device = answer.device;
	pthread_mutex_lock(&guards_lock);
	guard->next = guards;
	guards = guard;
	pthread_mutex_unlock(&guards_lock);
	return 0;
}

/* Take the guard of the file system at path off the list. */
static struct guard *guard_take(const char *path)
{
	struct stat st;
	bool known = stat(path, &st) == 0;
	struct guard *found = NULL;

	pthread_mutex_lock(&guards_lock);
	for (struct guard **link = &guards; *link && !found;) {
		struct guard *guard = *link;

		if (known ? guard->device == st.st_dev : strcmp(guard->path, path) == 0) {
			*link = guard->next;
			found = guard;
		} else {
			link = &guard->next;
		}
	}
	pthread_mutex_unlock(&guards_lock);
	return found;
}

static void thaw_child(const void *args, int socket)
{
	int fd = open(args, O_RDONLY | O_CLOEXEC | O_NONBLOCK);

	child_reply(socket, fd < 0 || ioctl(fd, FITHAW, 0) < 0 ? -errno : 0, 0);
}

int bs_filesystem_thaw(const char *path)
{
	struct guard *guard = guard_take(path);
	struct child_reply answer = {.error = -EIO};
	int r = -EIO;

	if (guard) {
		if (child_tell(&guard->child) == 0 && child_answer(&guard->child, -1, &answer) == 1)
			r = answer.error;
		child_end(&guard->child);
		free(guard);
	}
	/* Frozen by another process, or the guard was killed. */
	if (r == -EIO)
		r = child_run(thaw_child, path);
	if (r == -EINVAL)
		return bs_fail(r, "%s is not frozen", path);
	if (r == -EPERM || r == -EACCES)
		return bs_fail(-EPERM, "thawing %s: no privilege: run as root", path);
	return r < 0 ? bs_fail(r, "thawing %s: %s", path, strerror(-r)) : 0;
}
