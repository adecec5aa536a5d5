#include "child_process.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "error.h"

/* Children that were given up: they end by themselves, only their exit is still to be collected. */
struct lost_child {
	struct lost_child *next;
	pid_t pid;
};

static pthread_mutex_t lost_lock = PTHREAD_MUTEX_INITIALIZER;
static struct lost_child *lost_children;

static void collect_lost_children(void)
{
	pthread_mutex_lock(&lost_lock);
	for (struct lost_child **link = &lost_children; *link;) {
		struct lost_child *lost = *link;

		if (waitpid(lost->pid, NULL, WNOHANG) == 0) {
			link = &lost->next;
			continue;
		}
		*link = lost->next;
		free(lost);
	}
	pthread_mutex_unlock(&lost_lock);
}

static _Noreturn void child_enter(child_main *main_, const void *args, int socket)
{
	dup2(socket, 0);
	syscall(SYS_close_range, 1, ~0u, 0);
	setsid();
	main_(args, 0);
	_exit(0);
}

int child_start(child_main *main_, const void *args, struct child *ret)
{
	sigset_t all, old;
	int ends[2];

	collect_lost_children();
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0)
		return bs_fail_errno("starting a child process");
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	/* Without the fork handlers of the program: the child needs none of what they mend. */
	pid_t pid = _Fork();
	if (pid == 0)
		child_enter(main_, args, ends[1]);
	int r = pid < 0 ? bs_fail_errno("starting a child process") : 0;
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	close(ends[1]);
	if (r < 0)
		close(ends[0]);
	*ret = (struct child){pid, ends[0]};
	return r;
}

static int64_t now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

/* Returns 1 when the socket can be read (or is closed at the other end), 0 after the time-out. */
static int wait_readable(int fd, int timeout_ms)
{
	int64_t deadline = now_ms() + timeout_ms;
	struct pollfd p = {.fd = fd, .events = POLLIN};

	for (;;) {
		int64_t left = deadline - now_ms();
		int n = poll(&p, 1, timeout_ms < 0 ? -1 : left > 0 ? (int)left : 0);

		if (n >= 0 || errno != EINTR)
			return n != 0;
	}
}

int child_answer(const struct child *child, int timeout_ms, struct child_reply *ret)
{
	if (!wait_readable(child->socket, timeout_ms))
		return 0;
	return recv(child->socket, ret, sizeof(*ret), 0) == sizeof(*ret) ? 1 : -EIO;
}

int child_tell(const struct child *child)
{
	return send(child->socket, "", 1, MSG_NOSIGNAL) == 1 ? 0 : -EIO;
}

void child_end(struct child *child)
{
	close(child->socket);
	while (waitpid(child->pid, NULL, 0) < 0 && errno == EINTR)
		;
}

void child_lose(struct child *child)
{
	struct lost_child *lost = malloc(sizeof(*lost));

	close(child->socket);
	/* Without memory it stays a zombie until this process ends. */
	if (!lost)
		return;
	pthread_mutex_lock(&lost_lock);
	*lost = (struct lost_child){.next = lost_children, .pid = child->pid};
	lost_children = lost;
	pthread_mutex_unlock(&lost_lock);
}

int child_run(child_main *main_, const void *args)
{
	struct child_reply answer;
	struct child child;
	int r = child_start(main_, args, &child);

	if (r < 0)
		return r;
	r = child_answer(&child, -1, &answer) == 1 ? answer.error : -EIO;
	child_end(&child);
	return r;
}

void child_reply(int socket, int error, uint64_t device)
{
	struct child_reply answer = {.error = error, .device = device};

	send(socket, &answer, sizeof(answer), MSG_NOSIGNAL);
}

int child_wait(int socket)
{
	char byte;

	return recv(socket, &byte, 1, 0) == 1 ? 0 : -EPIPE;
}
