/*
 * Names of devices and hosts: an open hash table of bounded size, so that a trace cannot make it grow.
 *
 * Files of one trace share a table: a name means one device in all of them.
 */
#include "trace_names.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "blocksnap.h"
#include "error.h"

#define NAMES_MAX 4096
#define SLOTS (2 * NAMES_MAX)
#define LENGTH_MAX 254

struct slot {
	char text[LENGTH_MAX + 1];
	uint8_t length; /* 0 if the slot is free */
	uint32_t number;
};

struct bs_trace_names {
	uint32_t count;
	uint16_t slot_of[NAMES_MAX]; /* by number */
	struct slot slots[SLOTS];
};

int bs_trace_names_create(struct bs_trace_names **ret)
{
	*ret = calloc(1, sizeof(**ret));
	return *ret ? 0 : bs_fail(-ENOMEM, "out of memory");
}

void bs_trace_names_destroy(struct bs_trace_names *names)
{
	free(names);
}

/* FNV-1a */
static uint32_t hash(const char *text, size_t length)
{
	uint32_t value = 2166136261u;

	for (size_t i = 0; i < length; i++)
		value = (value ^ (unsigned char)text[i]) * 16777619u;
	return value;
}

static bool is_name(const struct slot *slot, const char *text, size_t length)
{
	return slot->length == length && memcmp(slot->text, text, length) == 0;
}

int trace_names_number(struct bs_trace_names *names, const char *text, size_t length, uint32_t *ret)
{
	if (length == 0 || length > LENGTH_MAX)
		return -EINVAL;
	uint32_t at = hash(text, length) % SLOTS;
	while (names->slots[at].length && !is_name(&names->slots[at], text, length))
		at = (at + 1) % SLOTS;
	struct slot *slot = &names->slots[at];
	if (!slot->length) {
		if (names->count == NAMES_MAX)
			return -ENOSPC;
		memcpy(slot->text, text, length);
		slot->length = (uint8_t)length;
		slot->number = names->count;
		names->slot_of[names->count++] = (uint16_t)at;
	}
	*ret = slot->number;
	return 0;
}

int bs_trace_names_number(struct bs_trace_names *names, const char *text, size_t length)
{
	uint32_t number;
	int err = trace_names_number(names, text, length, &number);

	if (err == -ENOSPC)
		return bs_fail(err, "too many names of devices: 4096 can be told apart");
	return err ? bs_fail(err, "a device's name has %zu bytes; 1 to 254 can be", length) : (int)number;
}

int bs_trace_names_name(const struct bs_trace_names *names, int number, char *out, int capacity)
{
	if (number < 0 || (uint32_t)number >= names->count)
		return bs_fail(-ENODATA, "there is no name %d", number);
	const struct slot *slot = &names->slots[names->slot_of[number]];
	if (slot->length >= capacity)
		return bs_fail(-ERANGE, "the name has %d bytes", slot->length);
	memcpy(out, slot->text, slot->length);
	out[slot->length] = 0;
	return slot->length;
}
