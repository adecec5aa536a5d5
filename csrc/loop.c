/*
 * Loop devices: a file as a block device, by ioctls.
 *
 * 1. What can wait for the backing file's server, which may be this process (opening the file, asking for its
 * size, the last close, which writes the page cache back), happens in a child process.
 * 2. An autoclear device is kept open by this process until it is detached: the kernel frees it when the
 * process and the last mount are gone, whichever is later.
 * 3. Whether a device is still attached is asked of sysfs: opening it would keep it attached. diskseq tells
 * an attachment from the next one with the same number.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/loop.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#include "blocksnap.h"
#include "child_process.h"
#include "error.h"

#define LOOP_CONTROL "/dev/loop-control"
#define LOOP_BLOCK_MAJOR 7
#define ATTACH_ATTEMPTS 1000
#define POLL_MS 5
/* What detaching may always take; only a stuck backing file takes longer. */
#define CLEAR_MS 1000

static int64_t now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

static void sleep_ms(int ms)
{
	nanosleep(&(struct timespec){.tv_nsec = ms * 1000000L}, NULL);
}

/* A descriptor that keeps an autoclear device alive (2). */
struct held_loop {
	struct held_loop *next;
	int number;
	int fd;
};

static pthread_mutex_t held_lock = PTHREAD_MUTEX_INITIALIZER;
static struct held_loop *held_loops;

static int loop_hold(int number, int fd)
{
	struct held_loop *held = malloc(sizeof(*held));

	if (!held)
		return bs_fail(-ENOMEM, "out of memory");
	pthread_mutex_lock(&held_lock);
	*held = (struct held_loop){.next = held_loops, .number = number, .fd = fd};
	held_loops = held;
	pthread_mutex_unlock(&held_lock);
	return 0;
}

static void loop_let_go(int number)
{
	pthread_mutex_lock(&held_lock);
	for (struct held_loop **link = &held_loops; *link;) {
		struct held_loop *held = *link;

		if (held->number != number) {
			link = &held->next;
			continue;
		}
		*link = held->next;
		close(held->fd);
		free(held);
	}
	pthread_mutex_unlock(&held_lock);
}

/* A /dev that is not devtmpfs (a container's) does not grow with new loop devices. */
static int loop_make_node(int number, const char *path)
{
	char sys[48];

	snprintf(sys, sizeof(sys), "/sys/block/loop%d", number);
	if (access(sys, F_OK) < 0) {
		errno = ENXIO;
		return -1;
	}
	return mknod(path, S_IFBLK | 0660, makedev(LOOP_BLOCK_MAJOR, number)) == 0 || errno == EEXIST ? 0
												      : -1;
}

static int loop_open(int number, bool writing)
{
	int mode = (writing ? O_RDWR : O_RDONLY) | O_CLOEXEC;
	char path[32];

	snprintf(path, sizeof(path), "/dev/loop%d", number);
	int fd = open(path, mode);
	if (fd < 0 && errno == ENOENT && loop_make_node(number, path) == 0)
		fd = open(path, mode);
	if (fd >= 0)
		return fd;
	if (errno == EACCES || errno == EPERM)
		return bs_fail(-EPERM, "%s: no privilege for loop devices: run as root", path);
	if (errno == ENXIO || errno == ENODEV)
		return bs_fail(-ENXIO, "%s: there is no such loop device", path);
	return bs_fail_errno("%s", path);
}

static int control_open(void)
{
	int fd = open(LOOP_CONTROL, O_RDWR | O_CLOEXEC);

	if (fd >= 0)
		return fd;
	if (errno == EACCES || errno == EPERM)
		return bs_fail(-EPERM, "%s: no privilege for loop devices: run as root", LOOP_CONTROL);
	if (errno == ENOENT || errno == ENODEV || errno == ENXIO)
		return bs_fail(-EOPNOTSUPP, "%s is missing: run modprobe loop, or pass it to this container",
			LOOP_CONTROL);
	return bs_fail_errno(LOOP_CONTROL);
}

static int backing_open(const char *path, bool read_only)
{
	struct stat st;
	int fd = open(path, (read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC | O_NONBLOCK);

	if (fd < 0 && errno == EISDIR)
		return bs_fail(
			-EINVAL, "%s is a directory: a loop device needs a file or a block device", path);
	if (fd < 0 && (errno == EROFS || errno == EACCES) && !read_only)
		return bs_fail(-errno, "%s cannot be written: attach it read-only", path);
	if (fd < 0)
		return bs_fail_errno("%s", path);
	if (fstat(fd, &st) == 0 && (S_ISREG(st.st_mode) || S_ISBLK(st.st_mode)))
		return fd;
	close(fd);
	return bs_fail(-EINVAL, "%s is not a file: a loop device needs a file or a block device", path);
}

static int configure_failed(const struct loop_config *config, const char *path, int number)
{
	if (errno == EINVAL && config->block_size)
		return bs_fail(-EINVAL,
			"%s: no loop device with sectors of %u bytes: 512, 1024, 2048 or 4096 can be", path,
			config->block_size);
	return bs_fail_errno("%s: attaching /dev/loop%d", path, number);
}

/* One attempt on the next free device: a descriptor of it, -EBUSY when the race for it was lost, or an error. */
static int loop_configure(int control, const struct loop_config *config, const char *path, int *number)
{
	*number = ioctl(control, LOOP_CTL_GET_FREE);
	if (*number < 0)
		return bs_fail_errno("%s: finding a free loop device", LOOP_CONTROL);
	int fd = loop_open(*number, !(config->info.lo_flags & LO_FLAGS_READ_ONLY));
	if (fd < 0)
		return fd == -ENXIO ? -EBUSY : fd;
	if (ioctl(fd, LOOP_CONFIGURE, config) == 0)
		return fd;
	int r = errno == EBUSY ? -EBUSY : configure_failed(config, path, *number);
	close(fd);
	return r;
}

static int configure_free(const struct loop_config *config, const char *path, int *number)
{
	int control = control_open(), r = -EBUSY;

	if (control < 0)
		return control;
	for (int attempt = 0; r == -EBUSY && attempt < ATTACH_ATTEMPTS; attempt++) {
		r = loop_configure(control, config, path, number);
		if (r == -EBUSY)
			sleep_ms(1);
	}
	close(control);
	if (r == -EBUSY)
		return bs_fail(r, "%s: every free loop device was taken by others: try again", path);
	return r;
}

struct attach_args {
	const char *path;
	struct loop_config config;
};

static int attach(const struct attach_args *args, int *number)
{
	struct loop_config config = args->config;
	int backing = backing_open(args->path, config.info.lo_flags & LO_FLAGS_READ_ONLY);

	if (backing < 0)
		return backing;
	config.fd = (uint32_t)backing;
	int fd = configure_free(&config, args->path, number);
	close(backing);
	return fd;
}

/* An error is followed by its message; on success the device stays open until the maker has opened it too. */
static void attach_child(const void *args, int socket)
{
	int number, fd = attach(args, &number);

	if (fd < 0) {
		child_reply(socket, fd, 0);
		send(socket, bs_last_error(), strlen(bs_last_error()), MSG_NOSIGNAL);
		return;
	}
	child_reply(socket, 0, (uint64_t)number);
	child_wait(socket);
}

static int receive_error(const struct child *child, int error)
{
	char message[1024];
	ssize_t n = recv(child->socket, message, sizeof(message) - 1, 0);

	message[n < 0 ? 0 : n] = '\0';
	return bs_fail(error, "%s", message);
}

static int take_attached(int number, bool autoclear)
{
	if (!autoclear)
		return 0;
	int fd = loop_open(number, false);
	if (fd < 0)
		return fd;
	int r = loop_hold(number, fd);
	if (r < 0)
		close(fd);
	return r;
}

int bs_loop_attach(const char *path, unsigned int flags, unsigned int sector_size, int *ret)
{
	struct attach_args args = {.path = path, .config = {.block_size = sector_size}};
	struct loop_info64 *info = &args.config.info;
	struct child_reply answer = {0};
	struct child child;

	info->lo_flags = (flags & BS_LOOP_READ_ONLY ? LO_FLAGS_READ_ONLY : 0) |
			 (flags & BS_LOOP_DIRECT_IO ? LO_FLAGS_DIRECT_IO : 0) |
			 (flags & BS_LOOP_AUTOCLEAR ? LO_FLAGS_AUTOCLEAR : 0);
	snprintf((char *)info->lo_file_name, LO_NAME_SIZE, "%s", path);
	int r = child_start(attach_child, &args, &child);
	if (r < 0)
		return r;
	if (child_answer(&child, -1, &answer) != 1)
		r = bs_fail(-EIO, "%s: attaching a loop device was killed", path);
	else if (answer.error < 0)
		r = receive_error(&child, answer.error);
	else
		r = take_attached((int)answer.device, flags & BS_LOOP_AUTOCLEAR);
	child_end(&child);
	*ret = (int)answer.device;
	return r;
}

/* Read a small file below /sys/block/loopN; the trailing newline goes. Returns its length or a negative
 * errno. */
static ssize_t loop_attribute(int number, const char *name, char *buffer, size_t capacity)
{
	char path[64];

	snprintf(path, sizeof(path), "/sys/block/loop%d/%s", number, name);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	ssize_t n = read(fd, buffer, capacity - 1);
	int err = errno;
	close(fd);
	if (n < 0)
		return -err;
	if (n > 0 && buffer[n - 1] == '\n')
		n--;
	buffer[n] = '\0';
	return n;
}

/* Counts what was ever attached to the device, so that a reused number is not taken for the old attachment.
 */
static uint64_t loop_sequence(int number)
{
	char text[32];

	return loop_attribute(number, "diskseq", text, sizeof(text)) > 0 ? strtoull(text, NULL, 10) : 0;
}

/* Asked of sysfs, because opening the device would keep it attached. */
static bool loop_attached(int number, uint64_t sequence)
{
	char text[8];

	return loop_attribute(number, "loop/backing_file", text, sizeof(text)) >= 0 &&
	       loop_sequence(number) == sequence;
}

/* The kernel detaches at the last close, which also writes back the device's page cache: both stay in the
 * child. */
static void detach_child(const void *args, int socket)
{
	const int *number = args;
	int fd = loop_open(*number, false);
	int r = fd < 0 ? fd : 0;

	child_reply(socket, r, 0);
	if (r < 0)
		return;
	/* A maker that gave up wants it detached as well. */
	child_wait(socket);
	if (ioctl(fd, LOOP_CLR_FD) < 0)
		r = -errno;
	close(fd);
	child_reply(socket, r, 0);
}

static int loop_clear(int number, int timeout_ms)
{
	struct child_reply answer;
	struct child child;
	int r = child_start(detach_child, &number, &child);

	if (r < 0)
		return r;
	r = child_answer(&child, timeout_ms, &answer);
	/* Once the child has it open this is not the last close. */
	loop_let_go(number);
	if (r == 1 && answer.error == 0) {
		r = child_tell(&child) == 0 ? child_answer(&child, timeout_ms, &answer) : -EIO;
	}
	if (r == 0) {
		child_lose(&child);
		return -EBUSY;
	}
	child_end(&child);
	return r == 1 ? answer.error : r;
}

int bs_loop_detach(int number, int timeout_ms)
{
	uint64_t sequence = loop_sequence(number);
	int64_t deadline = now_ms() + timeout_ms;

	int r = loop_clear(number, timeout_ms < CLEAR_MS ? CLEAR_MS : timeout_ms);
	if (r == -ENXIO)
		return 0;
	if (r == -EPERM || r == -EACCES)
		return bs_fail(-EPERM, "/dev/loop%d: no privilege to detach it: run as root", number);
	if (r < 0 && r != -EBUSY)
		return bs_fail(r, "/dev/loop%d: detaching: %s", number, strerror(-r));
	while (loop_attached(number, sequence)) {
		if (now_ms() >= deadline)
			return bs_fail(-EBUSY,
				"/dev/loop%d is open or mounted: end its users, then it detaches", number);
		sleep_ms(POLL_MS);
	}
	return 0;
}

struct info_reply {
	int error;
	struct loop_info64 info;
};

static void info_child(const void *args, int socket)
{
	const int *number = args;
	struct info_reply reply = {0};
	int fd = loop_open(*number, false);

	if (fd < 0)
		reply.error = fd;
	else if (ioctl(fd, LOOP_GET_STATUS64, &reply.info) < 0)
		reply.error = -errno;
	send(socket, &reply, sizeof(reply), MSG_NOSIGNAL);
}

static int loop_status(int number, struct loop_info64 *ret)
{
	struct info_reply reply = {.error = -EIO};
	struct child child;
	int r = child_start(info_child, &number, &child);

	if (r < 0)
		return r;
	if (recv(child.socket, &reply, sizeof(reply), 0) != sizeof(reply))
		reply.error = -EIO;
	child_end(&child);
	*ret = reply.info;
	return reply.error;
}

int bs_loop_info(int number, struct bs_loop_info *ret)
{
	struct loop_info64 info = {0};

	*ret = (struct bs_loop_info){.number = number};
	ssize_t n = loop_attribute(number, "loop/backing_file", ret->backing_path, sizeof(ret->backing_path));
	int r = loop_status(number, &info);
	if (r == -ENXIO)
		return bs_fail(-ENXIO, "/dev/loop%d is free", number);
	if (r == -EPERM || r == -EACCES)
		return bs_fail(-EPERM, "/dev/loop%d: no privilege for loop devices: run as root", number);
	if (r < 0 && n < 0)
		return bs_fail(r, "/dev/loop%d: status: %s", number, strerror(-r));
	/* A backing file whose server is gone has a path, but no inode can be asked for. */
	if (r < 0)
		return 0;
	ret->flags = (info.lo_flags & LO_FLAGS_READ_ONLY ? BS_LOOP_READ_ONLY : 0) |
		     (info.lo_flags & LO_FLAGS_DIRECT_IO ? BS_LOOP_DIRECT_IO : 0) |
		     (info.lo_flags & LO_FLAGS_AUTOCLEAR ? BS_LOOP_AUTOCLEAR : 0);
	ret->backing_device = info.lo_device;
	ret->backing_inode = info.lo_inode;
	if (n < 0)
		memcpy(ret->backing_path, info.lo_file_name, LO_NAME_SIZE);
	return 0;
}

static void refresh_child(const void *args, int socket)
{
	const int *number = args;
	int fd = loop_open(*number, false);
	char path[4096];
	struct stat st;

	/* Kernels before 6.17 take the size from the inode that they have in memory: renew it. */
	if (fd >= 0 && loop_attribute(*number, "loop/backing_file", path, sizeof(path)) > 0)
		stat(path, &st);
	child_reply(socket, fd < 0 ? fd : ioctl(fd, LOOP_SET_CAPACITY) < 0 ? -errno : 0, 0);
}

int bs_loop_refresh(int number)
{
	int r = child_run(refresh_child, &number);

	if (r == -ENXIO)
		return bs_fail(r, "/dev/loop%d is free", number);
	if (r < 0)
		return bs_fail(r, "/dev/loop%d: taking over the size of its file: %s", number, strerror(-r));
	return 0;
}
