/*
 * Preloaded into the user-mode kernel: it corrects two of its ptrace(2) requests.
 *
 * 1. It asks to be told of its processes' events without PTRACE_O_EXITKILL. When it is killed its processes
 * would go on as ordinary processes of the host, their system calls answered by the host's kernel: a test's
 * write to its own file system would land in the host's. The option is added to every request that sets
 * options.
 * 2. It keeps a process's vector registers in a buffer of fixed size. Where the processor's state is longer
 * (AMX) the host lets it read the front of the state, but refuses to set less than the whole (EFAULT), and the
 * guest ends at its first process. Such a request is repeated with the buffer as the front of a whole state
 * that is zero behind it, and with the bits of the states behind it cleared: no guest can have used them.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

/* The request's number before PTRACE_SETOPTIONS had its own; the kernel takes both. */
#define OLD_SETOPTIONS 21
#define EXITKILL 0x00100000ul
#define XSTATE_NOTE 0x202
/* Where the state says which of its components are in use, and those that precede AMX. */
#define COMPONENTS_OFFSET 512
#define COMPONENTS_KEPT ((UINT64_C(1) << 17) - 1)

static char state[1 << 16] __attribute__((aligned(64)));
static size_t state_size; /* 0 until a request was refused */

static long request_kernel(long request, pid_t pid, void *address, void *data)
{
	return syscall(SYS_ptrace, request, (long)pid, address, data);
}

/* Learn the size of the whole state by reading it. */
static bool learn_size(pid_t pid, void *note, size_t front)
{
	struct iovec all = {state, sizeof(state)};

	if (front < COMPONENTS_OFFSET + sizeof(uint64_t))
		return false;
	if (request_kernel(PTRACE_GETREGSET, pid, note, &all) < 0 || all.iov_len <= front)
		return false;
	memset(state, 0, sizeof(state));
	state_size = all.iov_len;
	return true;
}

static long set_state(pid_t pid, void *note, const struct iovec *front)
{
	struct iovec all = {state, state_size};
	uint64_t components;

	if (state_size == 0 || front->iov_len >= state_size) {
		long r = request_kernel(PTRACE_SETREGSET, pid, note, (void *)front);
		if (r == 0 || errno != EFAULT || state_size)
			return r;
		if (!learn_size(pid, note, front->iov_len)) {
			errno = EFAULT;
			return -1;
		}
		all.iov_len = state_size;
	}
	memcpy(state, front->iov_base, front->iov_len);
	memcpy(&components, state + COMPONENTS_OFFSET, sizeof(components));
	components &= COMPONENTS_KEPT;
	memcpy(state + COMPONENTS_OFFSET, &components, sizeof(components));
	return request_kernel(PTRACE_SETREGSET, pid, note, &all);
}

long ptrace(enum __ptrace_request request, ...)
{
	va_list arguments;

	va_start(arguments, request);
	pid_t pid = va_arg(arguments, pid_t);
	void *address = va_arg(arguments, void *);
	void *data = va_arg(arguments, void *);
	va_end(arguments);
	switch ((int)request) {
	case PTRACE_SETREGSET:
		if ((uintptr_t)address == XSTATE_NOTE)
			return set_state(pid, address, data);
		break;
	case PTRACE_SETOPTIONS:
	case OLD_SETOPTIONS:
		data = (void *)((uintptr_t)data | EXITKILL);
		break;
	case PTRACE_PEEKTEXT:
	case PTRACE_PEEKDATA:
	case PTRACE_PEEKUSER: {
		/* The system call stores the word, the library's function returns it. */
		long word;
		long r = request_kernel(request, pid, address, &word);
		return r < 0 ? r : word;
	}
	}
	return request_kernel(request, pid, address, data);
}
