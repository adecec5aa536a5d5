/*
 * Text to a file descriptor through a buffer. An error is kept and makes everything after it a no-op, so that
 * callers look at it once in a while and at the end. A closed pipe is an error (-EPIPE), never a signal.
 * Single-threaded.
 */
#ifndef BS_TEXT_OUTPUT_H
#define BS_TEXT_OUTPUT_H

#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define TEXT_OUTPUT_SIZE 65536

struct text_output {
	int fd;
	int error; /* 0 or the negative errno of the first failed write */
	size_t used;
	bool pipe_was_pending;
	sigset_t old_mask;
	char buffer[TEXT_OUTPUT_SIZE];
};

/* Between init and finish SIGPIPE is blocked on this thread. */
void text_output_init(struct text_output *t, int fd);
/* Write what is left. Returns err if it is one (its message stays the last), else the output's error, 0 if
 * none. */
int text_output_finish(struct text_output *t, int err);
void text_output_flush(struct text_output *t);

void text_printf(struct text_output *t, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Room for length bytes (far below the buffer's size); what was put there counts after text_output_advance.
 */
static inline char *text_output_reserve(struct text_output *t, size_t length)
{
	if (t->used + length > TEXT_OUTPUT_SIZE)
		text_output_flush(t);
	return t->buffer + t->used;
}

static inline void text_output_advance(struct text_output *t, const char *end)
{
	t->used = (size_t)(end - t->buffer);
}

/* The decimal digits of a number (at most 20) at p; returns their end. */
char *text_put_number(char *p, uint64_t value);

/* A string literal at p; returns its end. */
#define text_put_literal(p, literal) ((char *)memcpy(p, literal, sizeof(literal) - 1) + (sizeof(literal) - 1))

#endif
