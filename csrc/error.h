/*
 * Errors: functions return a negative errno; the function that detects a failure writes one message for people.
 *
 * The message is thread-local. Callers only pass the code on. The codes have the kernel's meaning:
 * -EILSEQ checksum or magic, -ENOTBLK block in the wrong place, -EUCLEAN needs_check or inconsistent content,
 * -ENOSPC, -EEXIST, -ENODATA, -EBUSY, -EINVAL.
 */
#ifndef BS_ERROR_H
#define BS_ERROR_H

/* Write the message of a failure and return err (a negative errno). */
int bs_fail(int err, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* The same, with ": <strerror(errno)>" appended; returns -errno. */
int bs_fail_errno(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
