#include "error.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "blocksnap.h"

static _Thread_local char message[1024];

int bs_fail(int err, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vsnprintf(message, sizeof(message), format, args);
	va_end(args);
	return err;
}

int bs_fail_errno(const char *format, ...)
{
	int err = errno ? errno : EIO;
	va_list args;

	va_start(args, format);
	int used = vsnprintf(message, sizeof(message), format, args);
	va_end(args);
	if (used >= 0 && (size_t)used < sizeof(message))
		snprintf(message + used, sizeof(message) - used, ": %s", strerror(err));
	return -err;
}

const char *bs_last_error(void)
{
	return message;
}
