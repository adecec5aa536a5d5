/*
 * A suspended device that somebody is sure to resume.
 *
 * The kernel keeps a device suspended whoever dies, and everything that writes to it hangs. So a child process
 * (child_process.h) suspends it and holds on: it resumes when told so, when its maker has ended, and when the
 * suspending is through only after the maker gave it up.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/dm-ioctl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "blocksnap.h"
#include "child_process.h"
#include "error.h"

struct bs_dm_guard {
	struct child child;
	uint32_t flags;
	char name[DM_NAME_LEN];
	char uuid[DM_UUID_LEN]; /* the key, unless empty */
};

static int dm_suspend(int control, const struct bs_dm_guard *guard, uint32_t flags)
{
	struct dm_ioctl header = {
		.version = {DM_VERSION_MAJOR},
		.data_size = sizeof(header),
		.data_start = sizeof(header),
		.flags = flags,
	};

	if (*guard->uuid)
		memcpy(header.uuid, guard->uuid, sizeof(header.uuid));
	else
		memcpy(header.name, guard->name, sizeof(header.name));
	return ioctl(control, DM_DEV_SUSPEND, &header) < 0 ? -errno : 0;
}

static void guard_child(const void *args, int socket)
{
	const struct bs_dm_guard *guard = args;
	int control = open("/dev/mapper/control", O_RDWR | O_CLOEXEC);
	int r = control < 0 ? -errno : dm_suspend(control, guard, DM_SUSPEND_FLAG | guard->flags);

	child_reply(socket, r, 0);
	if (r < 0)
		return;
	child_wait(socket);
	child_reply(socket, dm_suspend(control, guard, 0), 0);
}

static int guard_failed(const struct bs_dm_guard *guard, const char *doing, int err)
{
	if (err == -EPERM || err == -EACCES)
		return bs_fail(
			-EPERM, "%s: %s: no privilege for device-mapper: run as root", guard->name, doing);
	return bs_fail(err, "%s: %s: %s%s", guard->name, doing, strerror(-err),
		err == -ENXIO ? ": no such device" : "");
}

static int guard_create(const char *name, const char *uuid, unsigned int flags, struct bs_dm_guard **ret)
{
	struct bs_dm_guard *guard = calloc(1, sizeof(*guard));

	if (!guard)
		return bs_fail(-ENOMEM, "out of memory");
	if (strlen(name) >= sizeof(guard->name) || (uuid && strlen(uuid) >= sizeof(guard->uuid))) {
		free(guard);
		return bs_fail(
			-EINVAL, "\"%.140s\": the name or uuid is longer than a device's can be", name);
	}
	strcpy(guard->name, name);
	strcpy(guard->uuid, uuid ? uuid : "");
	guard->flags = flags & (BS_DM_SKIP_LOCKFS | BS_DM_NOFLUSH);
	*ret = guard;
	return 0;
}

int bs_dm_guard_suspend(
	const char *name, const char *uuid, unsigned int flags, int timeout_ms, struct bs_dm_guard **ret)
{
	struct child_reply answer;
	struct bs_dm_guard *guard;
	int r = guard_create(name, uuid, flags, &guard);

	if (r < 0)
		return r;
	r = child_start(guard_child, guard, &guard->child);
	if (r < 0) {
		free(guard);
		return r;
	}
	r = child_answer(&guard->child, timeout_ms < 0 ? 0 : timeout_ms, &answer);
	if (r == 0) {
		child_lose(&guard->child);
		free(guard);
		return bs_fail(-ETIMEDOUT, "%s: suspending took longer than %d ms and was given up", name,
			timeout_ms);
	}
	if (r < 0 || answer.error < 0) {
		r = guard_failed(guard, "suspending", r < 0 ? r : answer.error);
		child_end(&guard->child);
		free(guard);
		return r;
	}
	*ret = guard;
	return 0;
}

int bs_dm_guard_resume(struct bs_dm_guard *guard)
{
	struct child_reply answer = {.error = -EIO};
	bool told = child_tell(&guard->child) == 0 && child_answer(&guard->child, -1, &answer) == 1;
	int r = answer.error;

	child_end(&guard->child);
	if (!told) {
		/* Somebody killed the guard. */
		int control = open("/dev/mapper/control", O_RDWR | O_CLOEXEC);

		r = control < 0 ? -errno : dm_suspend(control, guard, 0);
		if (control >= 0)
			close(control);
	}
	if (r < 0)
		r = guard_failed(guard, "resuming", r);
	free(guard);
	return r;
}
