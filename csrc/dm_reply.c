/*
 * Answers of device-mapper, checked (dm_reply.h).
 *
 * 1. `next` of a device or target version counts from its own entry and is 0 at the last; `next` of a table
 * line counts from the start of the data and means nothing at the last.
 * 2. A `next` that does not lead behind what was read of its entry would loop or overlap: it is refused.
 */
#include "dm_reply.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/sysmacros.h>

#define ALIGNMENT 8u
/* First minor versions of the interface whose lists tell the event counter, and flags with the uuid. */
#define EVENT_NR_MINOR 37
#define LIST_UUID_MINOR 45
#define LIST_HAS_UUID 1u

struct data {
	const char *bytes;
	size_t length;
};

static int reply_data(const struct dm_ioctl *reply, size_t capacity, struct data *ret)
{
	size_t end = reply->data_size, start = reply->data_start;

	*ret = (struct data){0};
	if (end > capacity || end < offsetof(struct dm_ioctl, data))
		return -EBADMSG;
	if (end <= sizeof(*reply))
		return 0;
	if (start < sizeof(*reply) || start > end || start % ALIGNMENT)
		return -EBADMSG;
	*ret = (struct data){(const char *)reply + start, end - start};
	return 0;
}

/* The length of the string at offset, if its NUL lies before end. */
static ssize_t string_length(const struct data *data, size_t offset, size_t end)
{
	if (offset >= end)
		return -EBADMSG;
	const char *nul = memchr(data->bytes + offset, '\0', end - offset);
	return nul ? nul - (data->bytes + offset) : -EBADMSG;
}

static int copy_string(const struct data *data, size_t offset, size_t end, char *out, size_t capacity)
{
	ssize_t length = string_length(data, offset, end);

	if (length < 0 || (size_t)length >= capacity)
		return -EBADMSG;
	memcpy(out, data->bytes + offset, (size_t)length + 1);
	return (int)length;
}

static uint32_t u32_at(const struct data *data, size_t offset)
{
	uint32_t value;

	memcpy(&value, data->bytes + offset, sizeof(value));
	return value;
}

static size_t aligned(size_t offset)
{
	return (offset + ALIGNMENT - 1) & ~(size_t)(ALIGNMENT - 1);
}

/* The kernel's encoding of a device number as ours. */
static uint64_t device_number(uint64_t dev)
{
	return makedev((unsigned int)(dev >> 8) & 0xfff,
		((unsigned int)dev & 0xff) | ((unsigned int)(dev >> 12) & 0xfff00));
}

int dm_reply_info(const struct dm_ioctl *reply, size_t capacity, struct bs_dm_info *ret)
{
	if (reply->data_size > capacity || !memchr(reply->name, '\0', sizeof(reply->name)) ||
		!memchr(reply->uuid, '\0', sizeof(reply->uuid)))
		return -EBADMSG;
	*ret = (struct bs_dm_info){
		.device = device_number(reply->dev),
		.flags = reply->flags,
		.open_count = reply->open_count,
		.event_nr = reply->event_nr,
		.target_count = reply->target_count,
	};
	snprintf(ret->name, sizeof(ret->name), "%s", reply->name);
	snprintf(ret->uuid, sizeof(ret->uuid), "%s", reply->uuid);
	return 0;
}

/* Where the entry at offset ends: at its next, or with the data. */
static int entry_end(const struct data *data, size_t offset, uint32_t next, size_t *ret)
{
	*ret = next ? offset + next : data->length;
	return next % ALIGNMENT || *ret > data->length || (next && *ret == data->length) ? -EBADMSG : 0;
}

/* What follows the name, by the version of the interface; name_end is the offset behind its NUL. */
static int entry_tail(
	const struct data *data, uint32_t minor, size_t name_end, size_t end, struct bs_dm_entry *ret)
{
	size_t tail = aligned(name_end);

	if (minor < EVENT_NR_MINOR)
		return 0;
	if (tail + sizeof(uint32_t) > end)
		return -EBADMSG;
	ret->event_nr = u32_at(data, tail);
	if (minor < LIST_UUID_MINOR)
		return 0;
	if (tail + 2 * sizeof(uint32_t) > end)
		return -EBADMSG;
	if (!(u32_at(data, tail + sizeof(uint32_t)) & LIST_HAS_UUID))
		return 0;
	return copy_string(data, tail + 2 * sizeof(uint32_t), end, ret->uuid, sizeof(ret->uuid));
}

/* Read the entry at *offset and step to the next: 1 there is one, 0 it was the last. */
static int read_entry(const struct data *data, uint32_t minor, size_t *offset, struct bs_dm_entry *ret)
{
	const size_t name = offsetof(struct dm_name_list, name);
	struct dm_name_list head;
	size_t end;

	*ret = (struct bs_dm_entry){0};
	if (data->length - *offset < name)
		return -EBADMSG;
	memcpy(&head, data->bytes + *offset, name);
	if (entry_end(data, *offset, head.next, &end) < 0)
		return -EBADMSG;
	int length = copy_string(data, *offset + name, end, ret->name, sizeof(ret->name));
	if (length < 0)
		return length;
	ret->device = device_number(head.dev);
	/* The one entry that says "no devices" has no tail. */
	if (head.dev && entry_tail(data, minor, *offset + name + (size_t)length + 1, end, ret) < 0)
		return -EBADMSG;
	*offset = end;
	return head.next != 0;
}

int dm_reply_devices(const struct dm_ioctl *reply, size_t capacity, struct bs_dm_entry *out, int count)
{
	struct bs_dm_entry entry;
	struct data data;
	size_t offset = 0;
	int found = 0, r = reply_data(reply, capacity, &data);

	if (r < 0 || data.length == 0)
		return r;
	do {
		r = read_entry(&data, reply->version[1], &offset, &entry);
		if (r < 0)
			return r;
		if (entry.device == 0)
			continue;
		if (found < count)
			out[found] = entry;
		found++;
	} while (r == 1);
	return found;
}

int dm_reply_target_versions(
	const struct dm_ioctl *reply, size_t capacity, struct bs_dm_target_version *out, int count)
{
	struct bs_dm_target_version target;
	struct dm_target_versions head;
	struct data data;
	int found = 0, r = reply_data(reply, capacity, &data);

	if (r < 0 || data.length == 0)
		return r;
	for (size_t offset = 0, end;; offset = end, found++) {
		if (data.length - offset < sizeof(head))
			return -EBADMSG;
		memcpy(&head, data.bytes + offset, sizeof(head));
		if (entry_end(&data, offset, head.next, &end) < 0 ||
			copy_string(&data, offset + sizeof(head), end, target.name, sizeof(target.name)) < 0)
			return -EBADMSG;
		memcpy(target.version, head.version, sizeof(target.version));
		if (found < count)
			out[found] = target;
		if (head.next == 0)
			return found + 1;
	}
}

int dm_reply_dependencies(const struct dm_ioctl *reply, size_t capacity, uint64_t *out, int count)
{
	const size_t head = offsetof(struct dm_target_deps, dev);
	struct data data;
	uint64_t dev;
	int r = reply_data(reply, capacity, &data);

	if (r < 0 || data.length < head)
		return r < 0 ? r : -EBADMSG;
	uint32_t found = u32_at(&data, 0);
	if (found > INT_MAX || found > (data.length - head) / sizeof(dev))
		return -EBADMSG;
	for (uint32_t i = 0; i < found && i < (uint32_t)count; i++) {
		memcpy(&dev, data.bytes + head + i * sizeof(dev), sizeof(dev));
		out[i] = device_number(dev);
	}
	return (int)found;
}

struct line {
	struct dm_target_spec spec;
	const char *text;
	size_t end; /* offset behind the text's NUL */
};

static int read_line(const struct data *data, size_t offset, struct line *ret)
{
	if (offset % ALIGNMENT || offset >= data->length || data->length - offset < sizeof(ret->spec))
		return -EBADMSG;
	memcpy(&ret->spec, data->bytes + offset, sizeof(ret->spec));
	size_t text = offset + sizeof(ret->spec);
	ssize_t length = string_length(data, text, data->length);
	if (length < 0 || !memchr(ret->spec.target_type, '\0', sizeof(ret->spec.target_type)))
		return -EBADMSG;
	ret->text = data->bytes + text;
	ret->end = text + (size_t)length + 1;
	return 0;
}

int dm_reply_lines(const struct dm_ioctl *reply, size_t capacity, char *out, int length)
{
	size_t offset = 0, used = 0;
	struct line line;
	struct data data;
	int r = reply_data(reply, capacity, &data);

	for (uint32_t i = 0; r == 0 && i < reply->target_count; i++) {
		if (read_line(&data, offset, &line) < 0)
			return -EBADMSG;
		size_t left = used < (size_t)length ? (size_t)length - used : 0;
		int n = snprintf(left ? out + used : NULL, left, "%llu %llu %s %s",
			(unsigned long long)line.spec.sector_start, (unsigned long long)line.spec.length,
			line.spec.target_type, line.text);
		if (n < 0)
			return -EBADMSG;
		used += (size_t)n + 1;
		if (used > INT_MAX || (i + 1 < reply->target_count && line.spec.next < line.end))
			return -EBADMSG;
		offset = line.spec.next;
	}
	return r < 0 ? r : (int)used;
}

int dm_reply_message(const struct dm_ioctl *reply, size_t capacity, char *out, int length)
{
	struct data data;
	int r = reply_data(reply, capacity, &data);

	if (length > 0)
		out[0] = '\0';
	if (r < 0 || !(reply->flags & DM_DATA_OUT_FLAG) || data.length == 0)
		return r;
	ssize_t n = string_length(&data, 0, data.length);
	if (n < 0 || n > INT_MAX)
		return -EBADMSG;
	if (length > 0)
		snprintf(out, (size_t)length, "%s", data.bytes);
	return (int)n;
}
