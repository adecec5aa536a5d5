/* The FUSE export over a real pool; with root also loop devices and file systems on it. Needs /dev/fuse. */
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <pthread.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "test.h"

#define KIB 1024ull
#define MIB (1024 * KIB)
#define BLOCK (64 * KIB)
#define DEVICE_SIZE (64 * MIB)

static char directory[64], mountpoint[96], volume[128], metadata[96], data[96], mnt[96];

/* A pool with one device, exported as <mountpoint>/volume. */
struct server {
	struct bs_pool *pool;
	struct bs_device *device;
	struct bs_export *export_;
};

static void make_file(const char *path, off_t size)
{
	int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

	CHECK(fd >= 0);
	CHECK(ftruncate(fd, size) == 0);
	close(fd);
}

static void make_pool(void)
{
	make_file(metadata, 4 * MIB);
	make_file(data, 128 * MIB);
	CHECK_EQ(bs_pool_format(metadata, data, 128 * MIB, BLOCK), 0);
}

static struct server serve(int create)
{
	struct server s;

	CHECK_EQ(bs_pool_open(metadata, data, 0, &s.pool), 0);
	if (create)
		CHECK_EQ(bs_pool_create_device(s.pool, 1), 0);
	CHECK_EQ(bs_device_open(s.pool, 1, DEVICE_SIZE, &s.device), 0);
	CHECK_EQ(bs_export_start(mountpoint, 3, 0, &s.export_), 0);
	CHECK_EQ(bs_export_add(s.export_, "volume", s.device), 0);
	return s;
}

static struct server serve_new_pool(void)
{
	make_pool();
	return serve(1);
}

static void end(struct server *s)
{
	bs_export_stop(s->export_);
	bs_device_close(s->device);
	CHECK_EQ(bs_pool_close(s->pool), 0);
}

static int open_volume(void)
{
	int fd = open(volume, O_RDWR | O_CLOEXEC);

	CHECK(fd >= 0);
	return fd;
}

static uint64_t mapped_blocks(struct server *s)
{
	struct bs_device_info info;

	CHECK_EQ(bs_pool_devices(s->pool, 1, &info, 1), 1);
	return info.mapped_blocks;
}

static void fill(char *buffer, size_t size, uint64_t seed)
{
	for (size_t i = 0; i < size; i += sizeof(uint64_t)) {
		uint64_t value = test_random(&seed);

		memcpy(buffer + i, &value, sizeof(value));
	}
}

static void test_each_device_is_a_file_of_its_size(void)
{
	struct server s = serve_new_pool();
	struct stat st;
	char other[160];

	CHECK(stat(volume, &st) == 0);
	CHECK(S_ISREG(st.st_mode));
	CHECK_EQ(st.st_size, DEVICE_SIZE);
	snprintf(other, sizeof(other), "%s/other", mountpoint);
	CHECK(stat(other, &st) < 0 && errno == ENOENT);
	CHECK_EQ(bs_export_add(s.export_, "other", s.device), 0);
	CHECK(stat(other, &st) == 0);
	CHECK_EQ(bs_export_add(s.export_, "other", s.device), -EEXIST);
	CHECK_EQ(bs_export_add(s.export_, "a/b", s.device), -EINVAL);
	CHECK_EQ(bs_export_add(s.export_, "..", s.device), -EINVAL);
	char command[160];
	snprintf(command, sizeof(command), "test \"$(ls %s | tr '\\n' ' ')\" = 'other volume '", mountpoint);
	CHECK(system(command) == 0);
	CHECK_EQ(bs_export_remove(s.export_, "other"), 0);
	CHECK(stat(other, &st) < 0 && errno == ENOENT);
	CHECK_EQ(bs_export_remove(s.export_, "other"), -ENOENT);
	end(&s);
}

static void test_file_and_device_have_the_same_content_at_any_time(void)
{
	struct server s = serve_new_pool();
	static char written[300 * KIB], found[300 * KIB];
	int fd = open_volume();

	fill(written, sizeof(written), 1);
	CHECK_EQ(pwrite(fd, written, sizeof(written), 12345), sizeof(written));
	CHECK_EQ(bs_device_read(s.device, 12345, found, sizeof(found)), sizeof(found));
	CHECK(memcmp(written, found, sizeof(found)) == 0);
	fill(written, sizeof(written), 2);
	CHECK_EQ(bs_device_write(s.device, 12345, written, sizeof(written)), sizeof(written));
	CHECK_EQ(pread(fd, found, sizeof(found), 12345), sizeof(found));
	CHECK(memcmp(written, found, sizeof(found)) == 0);
	close(fd);
	end(&s);
}

static void test_end_of_the_device_is_the_end_of_the_file(void)
{
	struct server s = serve_new_pool();
	char buffer[8192] = "x";
	int fd = open_volume();

	CHECK_EQ(pread(fd, buffer, sizeof(buffer), DEVICE_SIZE - 4096), 4096);
	CHECK_EQ(pread(fd, buffer, sizeof(buffer), DEVICE_SIZE), 0);
	CHECK(pwrite(fd, buffer, sizeof(buffer), DEVICE_SIZE - 4096) < 0 && errno == EFBIG);
	CHECK(ftruncate(fd, 0) < 0 && errno == EPERM);
	CHECK(ftruncate(fd, DEVICE_SIZE) == 0);
	CHECK(fallocate(fd, 0, 0, DEVICE_SIZE) == 0);
	CHECK(fallocate(fd, 0, 0, DEVICE_SIZE + 1) < 0 && errno == EOPNOTSUPP);
	CHECK(fallocate(fd, FALLOC_FL_COLLAPSE_RANGE, 0, BLOCK) < 0 && errno == EOPNOTSUPP);
	close(fd);
	end(&s);
}

static void check_zero(int fd, uint64_t offset, size_t length)
{
	static char found[MIB];

	CHECK_EQ(pread(fd, found, length, offset), length);
	for (size_t i = 0; i < length; i++)
		CHECK_EQ(found[i], 0);
}

static void test_punched_holes_are_zero_and_unmapped(void)
{
	struct server s = serve_new_pool();
	static char buffer[MIB];
	int fd = open_volume();

	memset(buffer, 'x', sizeof(buffer));
	CHECK_EQ(pwrite(fd, buffer, sizeof(buffer), 0), sizeof(buffer));
	CHECK_EQ(mapped_blocks(&s), MIB / BLOCK);
	CHECK(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, BLOCK, 4 * BLOCK) == 0);
	CHECK_EQ(mapped_blocks(&s), MIB / BLOCK - 4);
	check_zero(fd, BLOCK, 4 * BLOCK);
	CHECK(fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, 8 * BLOCK - 512, BLOCK + 1024) == 0);
	CHECK_EQ(mapped_blocks(&s), MIB / BLOCK - 5);
	check_zero(fd, 8 * BLOCK - 512, BLOCK + 1024);
	CHECK_EQ(pread(fd, buffer, 1, 8 * BLOCK - 513), 1);
	CHECK_EQ(buffer[0], 'x');
	CHECK(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 1ull << 40) == 0);
	CHECK_EQ(mapped_blocks(&s), 0);
	close(fd);
	end(&s);
}

static void test_fsync_commits(void)
{
	struct server s = serve_new_pool();
	char buffer[4096] = "kept";
	int fd = open_volume();

	CHECK_EQ(pwrite(fd, buffer, sizeof(buffer), 0), sizeof(buffer));
	CHECK(fsync(fd) == 0);
	CHECK_EQ(pwrite(fd, buffer, sizeof(buffer), BLOCK), sizeof(buffer));
	close(fd);
	bs_export_stop(s.export_);
	bs_pool_abandon(s.pool);
	s = serve(0);
	fd = open_volume();
	CHECK_EQ(pread(fd, buffer, sizeof(buffer), 0), sizeof(buffer));
	CHECK(strcmp(buffer, "kept") == 0);
	close(fd);
	end(&s);
}

static void test_open_file_is_not_removed(void)
{
	struct server s = serve_new_pool();
	int fd = open_volume();

	CHECK_EQ(bs_export_remove(s.export_, "volume"), -EBUSY);
	close(fd);
	CHECK_EQ(bs_export_remove(s.export_, "volume"), 0);
	end(&s);
}

struct writer {
	pthread_t thread;
	int number;
};

/* Each writer has every fourth 64 KiB of the file. */
static void *write_stripes(void *arg)
{
	struct writer *w = arg;
	char *buffer = malloc(BLOCK);
	int fd = open_volume();

	for (uint64_t stripe = w->number; stripe < 16 * MIB / BLOCK; stripe += 4) {
		fill(buffer, BLOCK, stripe);
		CHECK_EQ(pwrite(fd, buffer, BLOCK, stripe * BLOCK + 8), BLOCK);
		if (stripe % 16 == 0)
			CHECK(fsync(fd) == 0);
	}
	close(fd);
	free(buffer);
	return NULL;
}

static void test_several_writers_do_not_disturb_each_other(void)
{
	struct server s = serve_new_pool();
	struct writer writers[4];
	char *wanted = malloc(BLOCK), *found = malloc(BLOCK);

	for (int i = 0; i < 4; i++) {
		writers[i].number = i;
		CHECK(pthread_create(&writers[i].thread, NULL, write_stripes, &writers[i]) == 0);
	}
	for (int i = 0; i < 4; i++)
		pthread_join(writers[i].thread, NULL);
	for (uint64_t stripe = 0; stripe < 16 * MIB / BLOCK; stripe++) {
		fill(wanted, BLOCK, stripe);
		CHECK_EQ(bs_device_read(s.device, stripe * BLOCK + 8, found, BLOCK), BLOCK);
		CHECK(memcmp(wanted, found, BLOCK) == 0);
	}
	free(wanted);
	free(found);
	end(&s);
}

static void test_bad_mountpoint_is_refused(void)
{
	struct bs_export *ex;

	CHECK_EQ(bs_export_start("/tmp/blocksnap-no-such-directory", 2, 0, &ex), -ENOENT);
	CHECK_EQ(bs_export_start("/etc/hostname", 2, 0, &ex), -EINVAL);
	CHECK_EQ(bs_export_start(mountpoint, 0, 0, &ex), -EINVAL);
}

static void test_export_survives_an_unmount_by_others(void)
{
	struct server s = serve_new_pool();
	char command[160];

	snprintf(command, sizeof(command), "fusermount3 -u %s", mountpoint);
	CHECK(system(command) == 0);
	end(&s);
}

/* ---- loop devices and file systems (root) ---- */

static void run(const char *format, const char *what)
{
	char command[256];

	snprintf(command, sizeof(command), format, what);
	if (system(command) != 0) {
		fprintf(stderr, "failed: %s\n", command);
		exit(1);
	}
}

static int attach(unsigned int flags, char device[32])
{
	int number;

	CHECK_EQ(bs_loop_attach(volume, flags, 0, &number), 0);
	snprintf(device, 32, "/dev/loop%d", number);
	return number;
}

static void write_tree(int round)
{
	static char buffer[3 * MIB];
	char path[160];

	for (int i = 0; i < 8; i++) {
		fill(buffer, sizeof(buffer), round * 100 + i);
		snprintf(path, sizeof(path), "%s/file%d", mnt, i);
		int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
		CHECK(fd >= 0);
		CHECK_EQ(write(fd, buffer, sizeof(buffer) - i * 1000), sizeof(buffer) - i * 1000);
		close(fd);
	}
}

static void check_tree(int round)
{
	static char wanted[3 * MIB], found[3 * MIB];
	char path[160];

	for (int i = 0; i < 8; i++) {
		fill(wanted, sizeof(wanted), round * 100 + i);
		snprintf(path, sizeof(path), "%s/file%d", mnt, i);
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		CHECK(fd >= 0);
		CHECK_EQ(read(fd, found, sizeof(found)), sizeof(found) - i * 1000);
		CHECK(memcmp(wanted, found, sizeof(found) - i * 1000) == 0);
		close(fd);
	}
}

static void trim(void)
{
	struct fstrim_range range = {.len = UINT64_MAX};
	int fd = open(mnt, O_RDONLY | O_CLOEXEC);

	CHECK(fd >= 0);
	CHECK(ioctl(fd, FITRIM, &range) == 0);
	close(fd);
}

static void check_file_system(const char *type, const char *make, const char *check, unsigned int flags)
{
	struct server s = serve_new_pool();
	char device[32];
	int number = attach(flags, device);

	run(make, device);
	for (int round = 0; round < 2; round++) {
		CHECK_EQ(bs_mount(device, mnt, type, 0, "discard"), 0);
		if (round > 0)
			check_tree(round - 1);
		write_tree(round);
		CHECK_EQ(bs_filesystem_sync(mnt), 0);
		trim();
		CHECK_EQ(bs_umount(mnt, 0), 0);
		run(check, device);
	}
	CHECK_EQ(bs_loop_detach(number, 5000), 0);
	CHECK_EQ(bs_export_remove(s.export_, "volume"), 0);
	end(&s);
}

static void test_ext4_on_a_loop_device_with_direct_io(void)
{
	check_file_system("ext4", "mkfs.ext4 -q %s", "e2fsck -fn %s > /dev/null 2>&1", BS_LOOP_DIRECT_IO);
}

static void test_ext4_on_a_buffered_loop_device(void)
{
	check_file_system("ext4", "mkfs.ext4 -q %s", "e2fsck -fn %s > /dev/null 2>&1", 0);
}

static void test_trim_gives_blocks_back_to_the_pool(void)
{
	struct server s = serve_new_pool();
	char device[32], path[160];
	int number = attach(BS_LOOP_DIRECT_IO, device);

	run("mkfs.ext4 -q %s", device);
	CHECK_EQ(bs_mount(device, mnt, "ext4", 0, NULL), 0);
	write_tree(0);
	CHECK_EQ(bs_filesystem_sync(mnt), 0);
	uint64_t full = mapped_blocks(&s);
	for (int i = 0; i < 8; i++) {
		snprintf(path, sizeof(path), "%s/file%d", mnt, i);
		CHECK(unlink(path) == 0);
	}
	CHECK_EQ(bs_filesystem_sync(mnt), 0);
	trim();
	CHECK(mapped_blocks(&s) < full - 20 * MIB / BLOCK);
	CHECK_EQ(bs_umount(mnt, 0), 0);
	CHECK_EQ(bs_loop_detach(number, 5000), 0);
	end(&s);
}

static void test_resize_reaches_the_loop_device(void)
{
	struct server s = serve_new_pool();
	char device[32];
	int number = attach(0, device);
	uint64_t size;

	CHECK_EQ(bs_device_resize(s.device, 2 * DEVICE_SIZE), 0);
	CHECK_EQ(bs_loop_refresh(number), 0);
	int fd = open(device, O_RDONLY | O_CLOEXEC);
	CHECK(fd >= 0);
	CHECK(ioctl(fd, BLKGETSIZE64, &size) == 0);
	CHECK_EQ(size, 2 * DEVICE_SIZE);
	close(fd);
	CHECK_EQ(bs_loop_detach(number, 5000), 0);
	end(&s);
}

static void test_stop_with_a_mounted_file_system_does_not_wait_for_it(void)
{
	struct server s = serve_new_pool();
	char device[32];
	int number = attach(0, device);

	run("mkfs.ext4 -q %s", device);
	CHECK_EQ(bs_mount(device, mnt, "ext4", 0, NULL), 0);
	write_tree(0);
	end(&s);
	bs_umount(mnt, MNT_DETACH);
	CHECK_EQ(bs_loop_detach(number, 10000), 0);
}

/* A server in a process of its own, which unmounts mnt when told so. */
static pid_t start_server(int create, int *command)
{
	int ready[2], order[2];
	char byte;

	CHECK(pipe2(ready, O_CLOEXEC) == 0 && pipe2(order, O_CLOEXEC) == 0);
	pid_t pid = fork();
	if (pid == 0) {
		serve(create);
		if (write(ready[1], "x", 1) != 1 || read(order[0], &byte, 1) != 1)
			_exit(1);
		bs_umount(mnt, 0);
		pause();
	}
	close(ready[1]);
	close(order[0]);
	CHECK(read(ready[0], &byte, 1) == 1);
	close(ready[0]);
	*command = order[1];
	return pid;
}

static void end_killed_server(pid_t pid, int number)
{
	kill(pid, SIGKILL);
	CHECK(waitpid(pid, NULL, 0) == pid);
	bs_umount(mountpoint, MNT_FORCE);
	bs_umount(mnt, MNT_DETACH);
	CHECK_EQ(bs_loop_detach(number, 10000), 0);
	CHECK_EQ(bs_umount(mountpoint, MNT_DETACH), 0);
}

/* Append synced records until the device dies; returns how many were acknowledged. */
static int append_until_error(pid_t server)
{
	char path[160];
	int count = 0;

	snprintf(path, sizeof(path), "%s/log", mnt);
	int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	CHECK(fd >= 0);
	while (count < 100000) {
		if (count == 100)
			kill(server, SIGKILL);
		if (pwrite(fd, &count, sizeof(count), count * sizeof(count)) != sizeof(count) ||
			fdatasync(fd) < 0)
			break;
		count++;
	}
	close(fd);
	return count;
}

static void check_log(int count)
{
	char path[160];
	int value;

	snprintf(path, sizeof(path), "%s/log", mnt);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	CHECK(fd >= 0);
	for (int i = 0; i < count; i++) {
		CHECK(pread(fd, &value, sizeof(value), i * sizeof(value)) == sizeof(value));
		CHECK_EQ(value, i);
	}
	close(fd);
}

static void test_killed_server_is_a_power_cut(void)
{
	char device[32];
	int command;

	make_pool();
	pid_t pid = start_server(1, &command);
	int number = attach(BS_LOOP_DIRECT_IO, device);
	run("mkfs.ext4 -q %s", device);
	CHECK_EQ(bs_mount(device, mnt, "ext4", 0, NULL), 0);
	int count = append_until_error(pid);
	CHECK(count >= 100);
	end_killed_server(pid, number);
	close(command);

	struct server s = serve(0);
	number = attach(BS_LOOP_DIRECT_IO, device);
	CHECK_EQ(bs_mount(device, mnt, "ext4", 0, NULL), 0);
	check_log(count);
	CHECK_EQ(bs_umount(mnt, 0), 0);
	run("e2fsck -fn %s > /dev/null 2>&1", device);
	CHECK_EQ(bs_loop_detach(number, 5000), 0);
	end(&s);
}

static void test_server_killed_while_it_unmounts_its_own_device_ends(void)
{
	char device[32];
	int command;

	make_pool();
	pid_t pid = start_server(1, &command);
	int number = attach(BS_LOOP_DIRECT_IO, device);
	run("mkfs.ext4 -q %s", device);
	CHECK_EQ(bs_mount(device, mnt, "ext4", 0, NULL), 0);
	write_tree(0);
	CHECK(write(command, "x", 1) == 1);
	nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
	end_killed_server(pid, number);
	close(command);
}

static void make_directory(void)
{
	snprintf(directory, sizeof(directory), "/tmp/blocksnap-fuse-XXXXXX");
	CHECK(mkdtemp(directory));
	snprintf(mountpoint, sizeof(mountpoint), "%s/export", directory);
	snprintf(volume, sizeof(volume), "%s/volume", mountpoint);
	snprintf(metadata, sizeof(metadata), "%s/metadata", directory);
	snprintf(data, sizeof(data), "%s/data", directory);
	snprintf(mnt, sizeof(mnt), "%s/mnt", directory);
	CHECK(mkdir(mountpoint, 0700) == 0 && mkdir(mnt, 0700) == 0);
}

static void remove_directory(void)
{
	CHECK(unlink(metadata) == 0 && unlink(data) == 0);
	CHECK(rmdir(mnt) == 0 && rmdir(mountpoint) == 0 && rmdir(directory) == 0);
}

static void run_with_root(void)
{
	RUN(test_ext4_on_a_loop_device_with_direct_io);
	RUN(test_ext4_on_a_buffered_loop_device);
	RUN(test_trim_gives_blocks_back_to_the_pool);
	RUN(test_resize_reaches_the_loop_device);
	RUN(test_stop_with_a_mounted_file_system_does_not_wait_for_it);
	RUN(test_killed_server_is_a_power_cut);
	RUN(test_server_killed_while_it_unmounts_its_own_device_ends);
}

int main(void)
{
	if (access("/dev/fuse", R_OK | W_OK) < 0) {
		fprintf(stderr, "skipped: needs /dev/fuse\n");
		return 77;
	}
	make_directory();
	/* Nothing here may hang: the tests of killed servers are about that. */
	alarm(300);
	RUN(test_each_device_is_a_file_of_its_size);
	RUN(test_file_and_device_have_the_same_content_at_any_time);
	RUN(test_end_of_the_device_is_the_end_of_the_file);
	RUN(test_punched_holes_are_zero_and_unmapped);
	RUN(test_fsync_commits);
	RUN(test_open_file_is_not_removed);
	RUN(test_several_writers_do_not_disturb_each_other);
	RUN(test_bad_mountpoint_is_refused);
	RUN(test_export_survives_an_unmount_by_others);
	if (geteuid() == 0 && access("/dev/loop-control", R_OK | W_OK) == 0)
		run_with_root();
	else
		fprintf(stderr, "skipped: file systems on loop devices need root\n");
	remove_directory();
	return 0;
}
