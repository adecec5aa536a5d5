/*
 * System calls behind loop devices, mounts, device-mapper and FUSE exports that fail: each in turn, in this process or in the child that
 * makes it, with each error that the manual pages name. The linker leads these calls here (--wrap).
 *
 * Promises
 * 1. What fails says so in one line.
 * 2. No loop device, mount or export is left by what failed, once the failure is over.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/loop.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include "disk_format.h"
#include "engine.h"
#include "test.h"

#define SIZE (1 << 20)

static const int errors[] = {EPERM, EACCES, EBUSY, ENODEV, ENXIO, ENOENT, EINVAL, ENOTBLK, ENOTDIR, EISDIR,
	EROFS, EOPNOTSUPP, EEXIST, EIDRM, EIO};

/* Shared with children. */
static struct injection {
	long calls, at;
	int error;
} * injection;

static bool fails(void)
{
	if (!injection) /* before main */
		return false;
	bool now = __atomic_fetch_add(&injection->calls, 1, __ATOMIC_RELAXED) ==
		   __atomic_load_n(&injection->at, __ATOMIC_RELAXED);

	if (now)
		errno = injection->error;
	return now;
}

#define WRAP(type, name, failed, parameters, ...)                                                            \
	type __real_##name parameters;                                                                       \
	type __wrap_##name parameters                                                                        \
	{                                                                                                    \
		return fails() ? failed : __real_##name(__VA_ARGS__);                                        \
	}

WRAP(void *, malloc, NULL, (size_t size), size)
WRAP(void *, calloc, NULL, (size_t nr, size_t size), nr, size)
WRAP(char *, strdup, NULL, (const char *text), text)
WRAP(int, open64, -1, (const char *path, int flags, int mode), path, flags, mode)
WRAP(int, fstat64, -1, (int fd, void *st), fd, st)
WRAP(int, stat64, -1, (const char *path, void *st), path, st)
WRAP(int, ioctl, -1, (int fd, unsigned long request, void *argument), fd, request, argument)
WRAP(int, mount, -1,
	(const char *source, const char *target, const char *type, unsigned long flags, const void *data),
	source, target, type, flags, data)
WRAP(int, umount2, -1, (const char *target, int flags), target, flags)
WRAP(int, syncfs, -1, (int fd), fd)
WRAP(int, socketpair, -1, (int domain, int type, int protocol, int ends[2]), domain, type, protocol, ends)
WRAP(int, _Fork, -1, (void), )
WRAP(int, pthread_create, injection->error,
	(pthread_t * thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument),
	thread, attributes, start, argument)

WRAP(int, semget, -1, (int key, int count, int flags), key, count, flags)
WRAP(int, semctl, -1, (int id, int number, int command, void *argument), id, number, command, argument)
WRAP(int, semtimedop, -1, (int id, void *operations, size_t nr, const void *limit), id, operations, nr, limit)
WRAP(ssize_t, getrandom, -1, (void *data, size_t length, unsigned int flags), data, length, flags)

static char directory[64], image[96], target[96], bound[96];

static void told(int r)
{
	if (r < 0)
		CHECK(*bs_last_error() && !strchr(bs_last_error(), '\n'));
}

/* ---- loop devices */

static bool is_ours(const char *loop)
{
	char name[320], line[256] = "";

	snprintf(name, sizeof(name), "/sys/block/%s/loop/backing_file", loop);
	FILE *file = fopen(name, "re");
	if (!file)
		return false;
	bool ours = fgets(line, sizeof(line), file) && strstr(line, image) == line;
	fclose(file);
	return ours;
}

static bool any_is_ours(void)
{
	struct dirent *entry;
	bool found = false;
	DIR *blocks = opendir("/sys/block");

	while (blocks && (entry = readdir(blocks)))
		found |= is_ours(entry->d_name);
	if (blocks)
		closedir(blocks);
	return found;
}

static int attached = -1;

static void use_loop(unsigned int flags)
{
	struct bs_loop_info info;
	int number, r = bs_loop_attach(image, flags, 0, &number);

	told(r);
	if (r < 0)
		return;
	attached = number;
	told(bs_loop_info(number, &info));
	told(bs_loop_refresh(number));
	told(bs_loop_detach(number, 0));
}

static void use_own_loop(void)
{
	use_loop(BS_LOOP_AUTOCLEAR);
}

static void use_lasting_loop(void)
{
	use_loop(BS_LOOP_READ_ONLY);
}

static void no_loop_is_left(void)
{
	char name[16];

	snprintf(name, sizeof(name), "loop%d", attached);
	if (is_ours(name)) /* what failed was the detaching */
		CHECK_EQ(bs_loop_detach(attached, 5000), 0);
}

/* ---- mounts */

static void use_mounts(void)
{
	told(bs_mount(NULL, target, "tmpfs", 0, NULL));
	told(bs_mount(target, bound, NULL, MS_BIND | MS_NOSUID, NULL));
	told(bs_filesystem_sync(target));
	told(bs_filesystem_freeze(target, 1000));
	told(bs_filesystem_thaw(target));
	told(bs_umount(bound, 0));
	told(bs_umount(target, 0));
}

static bool is_mounted(const char *path)
{
	FILE *mounts = fopen("/proc/self/mounts", "re");
	char line[4096];
	bool found = false;

	CHECK(mounts);
	while (fgets(line, sizeof(line), mounts))
		found |= strstr(line, path) != NULL;
	fclose(mounts);
	return found;
}

static void no_mount_is_left(void)
{
	while (umount2(bound, MNT_DETACH) == 0 || umount2(target, MNT_DETACH) == 0)
		;
	CHECK(!is_mounted(directory));
}

/* ---- exports */

static void use_export(void)
{
	struct io *metadata, *data;
	struct bs_device *device;
	struct bs_export *export_;
	struct bs_pool *pool;
	long at = injection->at;

	injection->at = -1;
	CHECK_EQ(io_memory_create(256 * METADATA_BLOCK_SIZE, &metadata), 0);
	CHECK_EQ(io_memory_create(SIZE, &data), 0);
	CHECK_EQ(thin_metadata_format(metadata, 128, SIZE / 65536), 0);
	CHECK_EQ(pool_open_on(metadata, data, 0, &pool), 0);
	CHECK_EQ(bs_pool_create_device(pool, 1), 0);
	CHECK_EQ(bs_device_open(pool, 1, SIZE, &device), 0);
	injection->calls = 0;
	injection->at = at;
	int r = bs_export_start(target, 2, 0, &export_);
	told(r);
	if (r == 0) {
		told(bs_export_add(export_, "one", device));
		told(bs_export_remove(export_, "one"));
		bs_export_stop(export_);
	}
	injection->at = -1;
	bs_device_close(device);
	CHECK_EQ(bs_pool_close(pool), 0);
}

static void no_export_is_left(void)
{
	CHECK(!is_mounted(directory));
}

/* ---- device-mapper, asked through a device that is none; and the semaphores of udev */

static void ask_for_devices(int control)
{
	struct bs_dm_info info;
	struct bs_dm_entry entries[4];
	struct bs_dm_target_version versions[4];
	struct bs_dm_target linear = {0, 8, "linear", "/dev/null 0"};
	uint64_t devices[4];
	char text[64];
	uint32_t version[3];
	const char *name = "blocksnap-failing", *uuid = "blocksnap-failing-uuid";

	told(bs_dm_version(control, version));
	told(bs_dm_devices(control, entries, 4));
	told(bs_dm_target_versions(control, versions, 4));
	told(bs_dm_target_version(control, "linear", versions));
	told(bs_dm_create(control, name, uuid, &info));
	told(bs_dm_rename(control, name, "blocksnap-failing-2", 0, &info));
	told(bs_dm_load(control, name, NULL, &linear, 1, 0, &info));
	told(bs_dm_clear(control, name, NULL, &info));
	told(bs_dm_suspend(control, name, NULL, 0, &info));
	told(bs_dm_resume(control, NULL, uuid, 0, 0, &info));
	told(bs_dm_info(control, name, NULL, &info));
	told(bs_dm_dependencies(control, name, NULL, 0, devices, 4));
	told(bs_dm_lines(control, name, NULL, 0, text, sizeof(text), &info));
	told(bs_dm_wait(control, name, NULL, 0, &info));
	told(bs_dm_message(control, name, NULL, 0, "create_thin 1", text, sizeof(text)));
	told(bs_dm_message(control, name, NULL, 0, "delete 1", text, sizeof(text)));
	told(bs_dm_arm_poll(control));
	told(bs_dm_remove(control, name, NULL, 0, 0, &info));
}

static void use_device_mapper(void)
{
	struct bs_dm_guard *guard;
	int control = open("/dev/null", O_RDWR | O_CLOEXEC);

	if (control >= 0)
		ask_for_devices(control);
	close(control);
	int r = bs_dm_guard_suspend("blocksnap-failing", NULL, 0, 1000, &guard);
	told(r);
	if (r == 0)
		told(bs_dm_guard_resume(guard));
}

static uint32_t cookie;

static void use_cookies(void)
{
	int r = bs_dm_cookie_create(&cookie);

	told(r);
	if (r < 0)
		return;
	told(bs_dm_cookie_wait(cookie, 1));
	bs_dm_cookie_destroy(cookie);
	bs_dm_cookies_sweep();
}

static void nothing_to_look_at(void)
{
}

static void no_cookie_is_left(void)
{
	bs_dm_cookie_destroy(cookie);
	CHECK_EQ(bs_dm_cookie_wait(cookie, 1), 0);
}

/* ---- running them */

static void run(const char *name, void (*use)(void), void (*nothing_is_left)(void))
{
	long runs = 0;

	for (size_t e = 0; e < sizeof(errors) / sizeof(*errors); e++)
		for (long at = 0;; at++, runs++) {
			*injection = (struct injection){0, at, errors[e]};
			use();
			injection->at = -1;
			nothing_is_left();
			if (injection->calls <= at)
				break;
		}
	CHECK(!any_is_ours());
	printf("%s: %ld failures, all told, nothing left\n", name, runs);
	fflush(stdout);
}

int main(void)
{
	if (geteuid() != 0 || access("/dev/loop-control", R_OK | W_OK) < 0 ||
		access("/dev/fuse", R_OK | W_OK) < 0)
		return 77;
	injection = mmap(NULL, sizeof(*injection), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(injection != MAP_FAILED);
	injection->at = -1;
	strcpy(directory, "/tmp/blocksnap-failing-XXXXXX");
	CHECK(mkdtemp(directory));
	snprintf(image, sizeof(image), "%s/image", directory);
	snprintf(target, sizeof(target), "%s/target", directory);
	snprintf(bound, sizeof(bound), "%s/bound", directory);
	CHECK(mkdir(target, 0700) == 0 && mkdir(bound, 0700) == 0);
	int fd = open(image, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	CHECK(fd >= 0 && ftruncate(fd, SIZE) == 0);
	close(fd);
	run("loop devices", use_lasting_loop, no_loop_is_left);
	run("loop devices of their user", use_own_loop, no_loop_is_left);
	run("mounts", use_mounts, no_mount_is_left);
	run("device-mapper", use_device_mapper, nothing_to_look_at);
	run("cookies", use_cookies, no_cookie_is_left);
	run("exports", use_export, no_export_is_left);
	CHECK(unlink(image) == 0 && rmdir(target) == 0 && rmdir(bound) == 0 && rmdir(directory) == 0);
	return 0;
}
