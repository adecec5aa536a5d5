#include "text_output.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

#include "error.h"

static void pipe_set(sigset_t *set)
{
	sigemptyset(set);
	sigaddset(set, SIGPIPE);
}

void text_output_init(struct text_output *t, int fd)
{
	sigset_t set, pending;

	t->fd = fd;
	t->error = 0;
	t->used = 0;
	pipe_set(&set);
	sigpending(&pending);
	t->pipe_was_pending = sigismember(&pending, SIGPIPE);
	pthread_sigmask(SIG_BLOCK, &set, &t->old_mask);
}

int text_output_finish(struct text_output *t, int err)
{
	static const struct timespec at_once;
	sigset_t set;

	text_output_flush(t);
	pipe_set(&set);
	/* The signal that our own write raised must not be delivered when the mask is lifted. */
	if (t->error == -EPIPE && !t->pipe_was_pending)
		while (sigtimedwait(&set, NULL, &at_once) < 0 && errno == EINTR)
			;
	pthread_sigmask(SIG_SETMASK, &t->old_mask, NULL);
	if (err || !t->error)
		return err;
	errno = -t->error;
	return bs_fail_errno("output");
}

void text_output_flush(struct text_output *t)
{
	size_t done = 0;

	while (!t->error && done < t->used) {
		ssize_t n = write(t->fd, t->buffer + done, t->used - done);

		if (n >= 0)
			done += (size_t)n;
		else if (errno != EINTR)
			t->error = -errno;
	}
	t->used = 0;
}

void text_printf(struct text_output *t, const char *format, ...)
{
	va_list args;
	const size_t room = 4096;
	char *p = text_output_reserve(t, room);

	va_start(args, format);
	int length = vsnprintf(p, room, format, args);
	va_end(args);
	if (length > 0)
		text_output_advance(t, p + ((size_t)length < room ? (size_t)length : room - 1));
}

char *text_put_number(char *p, uint64_t value)
{
	static const char pairs[] = "0001020304050607080910111213141516171819"
				    "2021222324252627282930313233343536373839"
				    "4041424344454647484950515253545556575859"
				    "6061626364656667686970717273747576777879"
				    "8081828384858687888990919293949596979899";
	char digits[20];
	char *q = digits + sizeof(digits);

	for (; value >= 100; value /= 100) {
		q -= 2;
		memcpy(q, pairs + value % 100 * 2, 2);
	}
	if (value >= 10) {
		q -= 2;
		memcpy(q, pairs + value * 2, 2);
	} else {
		*--q = (char)('0' + value);
	}
	size_t length = (size_t)(digits + sizeof(digits) - q);
	memcpy(p, q, length);
	return p + length;
}
