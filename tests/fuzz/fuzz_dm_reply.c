/* Answers of the kernel to device-mapper ioctls, as if hostile. Promise: strings that are given out end inside of theirs. */
#include "dm_reply.h"
#include "fuzz.h"

#define ENTRIES 4
#define TEXT 64

static void read_text(const struct dm_ioctl *reply, size_t capacity)
{
	char *out = malloc(TEXT);

	int used = dm_reply_lines(reply, capacity, out, TEXT);

	PROMISE(used <= 0 || used > TEXT || !out[used - 1]);
	int length = dm_reply_message(reply, capacity, out, TEXT);
	if (length >= 0 && length < TEXT)
		PROMISE(memchr(out, 0, TEXT));
	free(out);
}

static void read_lists(const struct dm_ioctl *reply, size_t capacity)
{
	struct bs_dm_entry *entries = malloc(ENTRIES * sizeof(*entries));
	struct bs_dm_target_version *versions = malloc(ENTRIES * sizeof(*versions));
	uint64_t *devices = malloc(ENTRIES * sizeof(*devices));
	int n = dm_reply_devices(reply, capacity, entries, ENTRIES);

	for (int i = 0; i < n && i < ENTRIES; i++) {
		PROMISE(memchr(entries[i].name, 0, sizeof(entries[i].name)));
		PROMISE(memchr(entries[i].uuid, 0, sizeof(entries[i].uuid)));
	}
	dm_reply_target_versions(reply, capacity, versions, ENTRIES);
	dm_reply_dependencies(reply, capacity, devices, ENTRIES);
	free(entries);
	free(versions);
	free(devices);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct bs_dm_info info;

	if (size < sizeof(struct dm_ioctl))
		return 0;
	/* Of exactly the capacity, and aligned as the ioctl's buffer is. */
	struct dm_ioctl *reply = malloc(size);
	memcpy(reply, data, size);
	if (dm_reply_info(reply, size, &info) == 0)
		PROMISE(memchr(info.name, 0, sizeof(info.name)) && memchr(info.uuid, 0, sizeof(info.uuid)));
	read_lists(reply, size);
	read_text(reply, size);
	free(reply);
	return 0;
}
