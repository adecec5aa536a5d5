#include "error.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "blocksnap.h"

static _Thread_local char message[1024];

/* The arguments may point into the present message. */
static size_t format_message(const char *format, va_list args)
{
	char text[sizeof(message)];
	int used = vsnprintf(text, sizeof(text), format, args);

	memcpy(message, text, sizeof(message));
	return used < 0 ? 0 : (size_t)used;
}

void bs_set_error(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	format_message(format, args);
	va_end(args);
}

int bs_set_error_errno(const char *format, ...)
{
	int err = errno > 0 ? errno : EIO;
	va_list args;

	va_start(args, format);
	size_t used = format_message(format, args);
	va_end(args);
	if (used < sizeof(message))
		snprintf(message + used, sizeof(message) - used, ": %s", strerror(err));
	return -err;
}

const char *bs_last_error(void)
{
	return message;
}
