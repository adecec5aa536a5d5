/*
 * Calls that can wait for a file system or a device, made in a child process.
 *
 * A process that serves a device over FUSE often is the one that mounts, syncs, freezes or unmounts the file
 * system on it. Such a call waits uninterruptibly for I/O that the same process has to do. If the process is
 * killed meanwhile, the waiting thread keeps its descriptors, and with them /dev/fuse, open: the kernel never
 * learns that nobody will answer, and everything hangs. A child that has closed every inherited descriptor
 * may wait instead; its maker waits on a socket, which SIGKILL ends.
 *
 * A child makes system calls only (a lock that another thread held at the fork stays locked in it), has all
 * signals blocked and leaves the process group: it finishes what it began whatever happens to its maker.
 */
#ifndef BS_CHILD_PROCESS_H
#define BS_CHILD_PROCESS_H

#include <stdint.h>
#include <sys/types.h>

struct child {
	pid_t pid;
	int socket;
};

struct child_reply {
	int error; /* 0 or a negative errno */
	uint64_t device;
};

/* Runs in the child, which ends when it returns. */
typedef void child_main(const void *args, int socket);

int child_start(child_main *main_, const void *args, struct child *ret);
/* Wait for the next answer; a negative time-out waits for ever. Returns 1 with an answer, 0 after the
 * time-out, -EIO if the child ended without one. */
int child_answer(const struct child *child, int timeout_ms, struct child_reply *ret);
/* Let a child that waits go on. -EIO if it has ended. */
int child_tell(const struct child *child);
/* Close the socket and wait for the child's end. */
void child_end(struct child *child);
/* Close the socket and leave the child to itself; a later child_start collects its exit. */
void child_lose(struct child *child);
/* Run main_ to its end and return the error that it answered. */
int child_run(child_main *main_, const void *args);

/* In the child: answer. */
void child_reply(int socket, int error, uint64_t device);
/* In the child: wait until the maker tells it to go on (0) or is gone (-EPIPE). */
int child_wait(int socket);

#endif
