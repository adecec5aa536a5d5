/* Loop devices, mounts and freezing on the real kernel: needs root and /dev/loop-control. */
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "test.h"

static char directory[64];

static const char *in_directory(const char *name)
{
	static char paths[4][128];
	static int next;
	char *path = paths[next++ % 4];

	snprintf(path, sizeof(paths[0]), "%s/%s", directory, name);
	return path;
}

static const char *make_file(const char *name, off_t size)
{
	const char *path = in_directory(name);
	int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

	CHECK(fd >= 0);
	CHECK(ftruncate(fd, size) == 0);
	close(fd);
	return path;
}

static uint64_t block_device_size(int number)
{
	uint64_t size;
	char path[32];

	snprintf(path, sizeof(path), "/dev/loop%d", number);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	CHECK(fd >= 0);
	CHECK(ioctl(fd, BLKGETSIZE64, &size) == 0);
	close(fd);
	return size;
}

/* An ext4 file system of its own, mounted at <directory>/mnt. */
static int mount_ext4(void)
{
	const char *path = make_file("image", 16 << 20), *mnt = in_directory("mnt");
	char command[256], device[32];
	int number;

	snprintf(command, sizeof(command), "mkfs.ext4 -q -F %s", path);
	CHECK(system(command) == 0);
	CHECK_EQ(bs_loop_attach(path, 0, 0, &number), 0);
	snprintf(device, sizeof(device), "/dev/loop%d", number);
	CHECK(mkdir(mnt, 0700) == 0);
	CHECK_EQ(bs_mount(device, mnt, "ext4", 0, NULL), 0);
	return number;
}

static void unmount_ext4(int number)
{
	const char *mnt = in_directory("mnt");

	CHECK_EQ(bs_umount(mnt, 0), 0);
	CHECK_EQ(bs_loop_detach(number, 5000), 0);
	CHECK(rmdir(mnt) == 0);
}

/* Whether a write to the file system at mnt goes through within a second. */
static int can_write(const char *mnt)
{
	pid_t pid = fork();
	int status;

	if (pid == 0) {
		char path[128];

		snprintf(path, sizeof(path), "%s/probe", mnt);
		int fd = open(path, O_RDWR | O_CREAT, 0600);
		_exit(fd >= 0 && write(fd, "x", 1) == 1 && fsync(fd) == 0 ? 0 : 1);
	}
	for (int i = 0; i < 100; i++) {
		if (waitpid(pid, &status, WNOHANG) == pid)
			return WIFEXITED(status) && WEXITSTATUS(status) == 0;
		nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
	}
	kill(pid, SIGKILL);
	return 0;
}

static void test_attach_tells_the_backing_file(void)
{
	const char *path = make_file("backing", 1 << 20);
	struct bs_loop_info info;
	struct stat st;
	int number;

	CHECK_EQ(bs_loop_attach(path, BS_LOOP_READ_ONLY, 4096, &number), 0);
	CHECK_EQ(bs_loop_info(number, &info), 0);
	CHECK(stat(path, &st) == 0);
	CHECK_EQ(info.backing_inode, st.st_ino);
	CHECK_EQ(info.backing_device, st.st_dev);
	CHECK_EQ(info.flags, BS_LOOP_READ_ONLY);
	CHECK(strcmp(info.backing_path, path) == 0);
	CHECK_EQ(bs_loop_detach(number, 1000), 0);
	CHECK_EQ(bs_loop_info(number, &info), -ENXIO);
	CHECK_EQ(bs_loop_detach(number, 1000), 0);
}

static void test_refresh_takes_over_a_grown_file(void)
{
	const char *path = make_file("backing", 1 << 20);
	int number;

	CHECK_EQ(bs_loop_attach(path, 0, 0, &number), 0);
	CHECK(truncate(path, 3 << 20) == 0);
	CHECK_EQ(block_device_size(number), 1 << 20);
	CHECK_EQ(bs_loop_refresh(number), 0);
	CHECK_EQ(block_device_size(number), 3 << 20);
	CHECK_EQ(bs_loop_detach(number, 1000), 0);
	CHECK_EQ(bs_loop_refresh(number), -ENXIO);
}

static void test_detach_of_an_open_device_is_busy_and_happens_later(void)
{
	const char *path = make_file("backing", 1 << 20);
	struct bs_loop_info info;
	char device[32];
	int number;

	CHECK_EQ(bs_loop_attach(path, 0, 0, &number), 0);
	snprintf(device, sizeof(device), "/dev/loop%d", number);
	int fd = open(device, O_RDONLY | O_CLOEXEC);
	CHECK(fd >= 0);
	CHECK_EQ(bs_loop_detach(number, 50), -EBUSY);
	CHECK_EQ(bs_loop_info(number, &info), 0);
	close(fd);
	CHECK_EQ(bs_loop_detach(number, 1000), 0);
	CHECK_EQ(bs_loop_info(number, &info), -ENXIO);
}

static void test_autoclear_ends_with_the_process(void)
{
	const char *path = make_file("backing", 1 << 20);
	struct bs_loop_info info;
	int ends[2], number;

	CHECK(pipe2(ends, O_CLOEXEC) == 0);
	pid_t pid = fork();
	if (pid == 0) {
		if (bs_loop_attach(path, BS_LOOP_AUTOCLEAR, 0, &number) < 0 ||
			write(ends[1], &number, sizeof(number)) < 0)
			_exit(1);
		pause();
	}
	CHECK(read(ends[0], &number, sizeof(number)) == sizeof(number));
	CHECK_EQ(bs_loop_info(number, &info), 0);
	CHECK_EQ(info.flags, BS_LOOP_AUTOCLEAR);
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
	CHECK_EQ(bs_loop_info(number, &info), -ENXIO);
	close(ends[0]);
	close(ends[1]);
}

static void test_autoclear_can_be_detached_early(void)
{
	struct bs_loop_info info;
	int number;

	CHECK_EQ(bs_loop_attach(make_file("backing", 1 << 20), BS_LOOP_AUTOCLEAR, 0, &number), 0);
	CHECK_EQ(bs_loop_info(number, &info), 0);
	CHECK_EQ(bs_loop_detach(number, 1000), 0);
	CHECK_EQ(bs_loop_info(number, &info), -ENXIO);
}

static void test_what_cannot_be_attached_is_refused(void)
{
	int number;

	CHECK_EQ(bs_loop_attach(directory, 0, 0, &number), -EINVAL);
	CHECK(strstr(bs_last_error(), "is a directory"));
	CHECK_EQ(bs_loop_attach(in_directory("missing"), 0, 0, &number), -ENOENT);
	CHECK_EQ(bs_loop_attach("/dev/null", 0, 0, &number), -EINVAL);
	CHECK_EQ(bs_loop_attach(make_file("backing", 1 << 20), 0, 1000, &number), -EINVAL);
	CHECK(strstr(bs_last_error(), "sectors of 1000"));
}

static void test_mount_errors_name_both_sides(void)
{
	const char *target = in_directory("target");
	int number;

	CHECK(mkdir(target, 0700) == 0);
	CHECK_EQ(bs_mount("/dev/missing", target, "ext4", 0, NULL), -ENOENT);
	CHECK_EQ(bs_umount(target, 0), -EINVAL);
	CHECK(strstr(bs_last_error(), "is not a mount point"));
	CHECK_EQ(bs_loop_attach(make_file("backing", 1 << 20), 0, 0, &number), 0);
	char device[32];
	snprintf(device, sizeof(device), "/dev/loop%d", number);
	CHECK_EQ(bs_mount(device, target, "ext4", 0, NULL), -EINVAL);
	CHECK(strstr(bs_last_error(), device) && strstr(bs_last_error(), target));
	CHECK_EQ(bs_mount(device, target, "nosuchfs", 0, NULL), -EOPNOTSUPP);
	CHECK_EQ(bs_loop_detach(number, 1000), 0);
	CHECK(rmdir(target) == 0);
}

static void test_read_only_bind_refuses_writes(void)
{
	const char *source = in_directory("source"), *target = in_directory("target");
	char path[256];

	CHECK(mkdir(source, 0700) == 0 && mkdir(target, 0700) == 0);
	CHECK_EQ(bs_mount(source, target, NULL, MS_BIND | MS_RDONLY, NULL), 0);
	snprintf(path, sizeof(path), "%s/file", target);
	CHECK(open(path, O_RDWR | O_CREAT, 0600) < 0 && errno == EROFS);
	CHECK_EQ(bs_umount(target, 0), 0);
	CHECK(rmdir(source) == 0 && rmdir(target) == 0);
}

/* As a child process does between its fork and the closing of what it does not need. */
static void test_who_has_a_file_open_for_a_moment_does_not_keep_a_mount(void)
{
	int number = mount_ext4(), ends[2];
	char path[160], byte;

	snprintf(path, sizeof(path), "%s/file", in_directory("mnt"));
	CHECK(pipe(ends) == 0);
	if (fork() == 0) {
		open(path, O_RDWR | O_CREAT, 0600);
		write(ends[1], "", 1);
		nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL);
		_exit(0);
	}
	CHECK(read(ends[0], &byte, 1) == 1);
	CHECK(umount2(in_directory("mnt"), 0) < 0);
	unmount_ext4(number);
	wait(NULL);
	close(ends[0]);
	close(ends[1]);
}

static void test_a_mount_in_use_is_busy(void)
{
	int number = mount_ext4();
	int fd = open(in_directory("mnt"), O_RDONLY | O_CLOEXEC);

	CHECK_EQ(bs_umount(in_directory("mnt"), 0), -EBUSY);
	CHECK(strstr(bs_last_error(), "files on it are open"));
	close(fd);
	unmount_ext4(number);
}

static void test_a_fuse_connection_that_is_not_there_is_told(void)
{
	CHECK_EQ(bs_fuse_set_max_background(123456789, 1), -ENOENT);
	CHECK(strstr(bs_last_error(), "FUSE connection 123456789: max_background: No such file"));
}

static void test_frozen_file_system_takes_writes_only_after_the_thaw(void)
{
	int number = mount_ext4();
	const char *mnt = in_directory("mnt");

	CHECK(can_write(mnt));
	CHECK_EQ(bs_filesystem_freeze(mnt, 5000), 0);
	CHECK_EQ(bs_filesystem_freeze(mnt, 5000), -EBUSY);
	CHECK(!can_write(mnt));
	CHECK_EQ(bs_filesystem_thaw(mnt), 0);
	CHECK(can_write(mnt));
	CHECK_EQ(bs_filesystem_thaw(mnt), -EINVAL);
	CHECK_EQ(bs_filesystem_sync(mnt), 0);
	CHECK_EQ(bs_filesystem_probe(mnt, 60000), 0);
	CHECK_EQ(bs_filesystem_probe(in_directory("none"), 60000), -ENOENT);
	unmount_ext4(number);
}

static void test_killed_freezer_leaves_nothing_frozen(void)
{
	int number = mount_ext4();
	const char *mnt = in_directory("mnt");
	int ends[2];
	char byte;

	CHECK(pipe2(ends, O_CLOEXEC) == 0);
	pid_t pid = fork();
	if (pid == 0) {
		int r = bs_filesystem_freeze(mnt, 5000);

		if (write(ends[1], r == 0 ? "y" : "n", 1) == 1)
			pause();
		_exit(1);
	}
	CHECK(read(ends[0], &byte, 1) == 1 && byte == 'y');
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
	CHECK(can_write(mnt));
	close(ends[0]);
	close(ends[1]);
	/* The guard may be closing its descriptor. */
	for (int i = 0; i < 100 && bs_umount(mnt, 0) == -EBUSY; i++)
		nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
	CHECK_EQ(bs_loop_detach(number, 5000), 0);
	CHECK(rmdir(mnt) == 0);
}

static void test_freeze_that_runs_out_of_time_is_undone(void)
{
	int number = mount_ext4();
	const char *mnt = in_directory("mnt");

	CHECK_EQ(bs_filesystem_freeze(mnt, 0), -ETIMEDOUT);
	CHECK(can_write(mnt));
	for (int i = 0; i < 100 && bs_umount(mnt, 0) == -EBUSY; i++)
		nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
	CHECK_EQ(bs_loop_detach(number, 5000), 0);
	CHECK(rmdir(mnt) == 0);
}

static void test_only_a_mount_point_is_frozen(void)
{
	CHECK_EQ(bs_filesystem_freeze(directory, 1000), -EINVAL);
	CHECK(strstr(bs_last_error(), "is not a mount point"));
	CHECK_EQ(bs_filesystem_freeze(in_directory("missing"), 1000), -ENOENT);
}

int main(void)
{
	if (geteuid() != 0 || access("/dev/loop-control", R_OK | W_OK) < 0) {
		fprintf(stderr, "skipped: needs root and /dev/loop-control\n");
		return 77;
	}
	snprintf(directory, sizeof(directory), "/tmp/blocksnap-mount-XXXXXX");
	CHECK(mkdtemp(directory));
	RUN(test_attach_tells_the_backing_file);
	RUN(test_refresh_takes_over_a_grown_file);
	RUN(test_detach_of_an_open_device_is_busy_and_happens_later);
	RUN(test_autoclear_ends_with_the_process);
	RUN(test_autoclear_can_be_detached_early);
	RUN(test_what_cannot_be_attached_is_refused);
	RUN(test_mount_errors_name_both_sides);
	RUN(test_read_only_bind_refuses_writes);
	RUN(test_who_has_a_file_open_for_a_moment_does_not_keep_a_mount);
	RUN(test_a_mount_in_use_is_busy);
	RUN(test_a_fuse_connection_that_is_not_there_is_told);
	RUN(test_frozen_file_system_takes_writes_only_after_the_thaw);
	RUN(test_killed_freezer_leaves_nothing_frozen);
	RUN(test_freeze_that_runs_out_of_time_is_undone);
	RUN(test_only_a_mount_point_is_frozen);
	CHECK(unlink(in_directory("backing")) == 0 && unlink(in_directory("image")) == 0);
	CHECK(rmdir(directory) == 0);
	return 0;
}
