/*
 * Errors: functions return a negative errno; the function that detects a failure writes one message for
 * people.
 *
 * The message is thread-local. Callers only pass the code on. The codes have the kernel's meaning:
 * -EILSEQ checksum or magic, -ENOTBLK block in the wrong place, -EUCLEAN needs_check or inconsistent content,
 * -EMEDIUMTYPE not a thin pool of ours, -ENOSPC, -EEXIST, -ENODATA, -EBUSY, -EINVAL.
 */
#ifndef BS_ERROR_H
#define BS_ERROR_H

void bs_set_error(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* The same with ": <strerror(errno)>" appended; returns -errno (-EIO if errno is 0). */
int bs_set_error_errno(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Write the message of a failure and yield err, a negative errno. Macros, so that the compiler sees the sign.
 */
#define bs_fail(err, ...) (bs_set_error(__VA_ARGS__), (err))

static inline int bs_negative(int err)
{
	if (err >= 0)
		__builtin_unreachable();
	return err;
}
#define bs_fail_errno(...) bs_negative(bs_set_error_errno(__VA_ARGS__))

/* The pool could not go back to its last commit. */
#define bs_fail_lost() bs_fail(-EIO, "the pool failed earlier: close it and run pool check")

#endif
