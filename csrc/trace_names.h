/* Names of devices and hosts of a trace, numbered from 0 in order of appearance. */
#ifndef BS_TRACE_NAMES_H
#define BS_TRACE_NAMES_H

#include <stddef.h>
#include <stdint.h>

struct bs_trace_names;

/* Return the number of a name in *ret. -EINVAL: not 1 to 254 bytes; -ENOSPC: too many names. No message. */
int trace_names_number(struct bs_trace_names *names, const char *text, size_t length, uint32_t *ret);

#endif
