/*
 * Opening below a directory, confined by the kernel: openat2(2).
 *
 * With RESOLVE_IN_ROOT the kernel itself resolves "..", absolute names and symlinks as if the directory were
 * the root, so no exchange of a directory for a symlink in the middle of the walk leads out. Checks of the
 * string cannot promise that. Magic links (/proc/PID/fd) are refused throughout.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "blocksnap.h"
#include "error.h"

/* The kernel answers EAGAIN when a rename or mount elsewhere raced with the resolution of "..". */
#define MAX_TRIES 128

int bs_open_in_root(int root, const char *path, int flags)
{
	struct open_how how = {
		.flags = (uint64_t)(flags | O_CLOEXEC),
		.resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS,
	};

	for (int tries = 0; tries < MAX_TRIES; tries++) {
		long fd = syscall(SYS_openat2, root, path, &how, sizeof(how));

		if (fd >= 0)
			return (int)fd;
		if (errno != EAGAIN && errno != EINTR)
			break;
	}
	if (errno == ENOSYS)
		return bs_fail(-EOPNOTSUPP,
			"this kernel has no openat2 (Linux 5.6 or newer is needed to extract layers)");
	return bs_fail_errno("%s", path);
}
