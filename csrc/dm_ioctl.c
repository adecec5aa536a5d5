/*
 * The kernel's device-mapper by the ioctls of /dev/mapper/control.
 *
 * 1. Each call builds its buffer anew, also for a second attempt: the kernel overwrites the header.
 * 2. An answer that does not fit (BUFFER_FULL, no error) is thrown away and asked for again with twice the room.
 * 3. The version sent is the lowest that has the command and its flags, so that old kernels refuse what they
 * would otherwise ignore.
 * 4. After an error nothing but the kernel's version is read from the buffer.
 * 5. No state, no locks: calls may run on any threads, on one descriptor too.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "blocksnap.h"
#include "dm_reply.h"
#include "error.h"

#define CONTROL "/dev/mapper/control"
#define REPLY_SIZE (16u << 10)
#define REPLY_SIZE_MAX (64u << 20)
#define MESSAGE_SIZE_MAX 4096
#define LABEL "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+_.-"

_Static_assert(BS_DM_READ_ONLY == DM_READONLY_FLAG, "kernel's value");
_Static_assert(BS_DM_SUSPENDED == DM_SUSPEND_FLAG, "kernel's value");
_Static_assert(BS_DM_TABLE == DM_STATUS_TABLE_FLAG, "kernel's value");
_Static_assert(BS_DM_LIVE == DM_ACTIVE_PRESENT_FLAG, "kernel's value");
_Static_assert(BS_DM_PENDING == DM_INACTIVE_PRESENT_FLAG, "kernel's value");
_Static_assert(BS_DM_SKIP_LOCKFS == DM_SKIP_LOCKFS_FLAG, "kernel's value");
_Static_assert(BS_DM_NOFLUSH == DM_NOFLUSH_FLAG, "kernel's value");
_Static_assert(BS_DM_QUERY_PENDING == DM_QUERY_INACTIVE_TABLE_FLAG, "kernel's value");
_Static_assert(BS_DM_UEVENT_GENERATED == DM_UEVENT_GENERATED_FLAG, "kernel's value");
_Static_assert(BS_DM_DEFERRED_REMOVE == DM_DEFERRED_REMOVE, "kernel's value");
_Static_assert(BS_DM_INTERNAL_SUSPEND == DM_INTERNAL_SUSPEND_FLAG, "kernel's value");

struct dm_command {
	unsigned long request;
	const char *doing;
	uint32_t minor;
	bool grows; /* the answer is as long as it needs to be */
};

static const struct dm_command version = {DM_VERSION, "asking for its version", 0, false};
static const struct dm_command list_devices = {DM_LIST_DEVICES, "listing devices", 0, true};
static const struct dm_command list_versions = {DM_LIST_VERSIONS, "listing targets", 1, true};
static const struct dm_command target_version = {DM_GET_TARGET_VERSION, "finding the target", 41, true};
static const struct dm_command dev_create = {DM_DEV_CREATE, "creating", 0, false};
static const struct dm_command dev_remove = {DM_DEV_REMOVE, "removing", 0, false};
static const struct dm_command dev_remove_deferred = {DM_DEV_REMOVE, "removing", 27, false};
static const struct dm_command dev_rename = {DM_DEV_RENAME, "renaming", 0, false};
static const struct dm_command dev_suspend = {DM_DEV_SUSPEND, "suspending", 0, false};
static const struct dm_command dev_resume = {DM_DEV_SUSPEND, "resuming", 0, false};
static const struct dm_command dev_status = {DM_DEV_STATUS, "asking for its state", 0, false};
static const struct dm_command dev_wait = {DM_DEV_WAIT, "waiting for an event", 0, false};
static const struct dm_command arm_poll = {DM_DEV_ARM_POLL, "arming poll", 37, false};
static const struct dm_command table_load = {DM_TABLE_LOAD, "loading a table", 0, false};
static const struct dm_command table_clear = {DM_TABLE_CLEAR, "dropping the pending table", 0, false};
static const struct dm_command table_deps = {DM_TABLE_DEPS, "asking for its dependencies", 0, true};
static const struct dm_command table_status = {DM_TABLE_STATUS, "asking for its status", 0, true};
static const struct dm_command target_message = {DM_TARGET_MSG, "sending a message", 2, true};

struct request {
	const struct dm_command *command;
	const char *name;
	const char *uuid;
	uint32_t flags;
	uint32_t event_nr;
	uint32_t target_count;
	const void *payload;
	size_t payload_size;
	const char *detail; /* for messages: the table or message that the kernel may refuse */
};

struct answer {
	struct dm_ioctl *header;
	size_t capacity;
};

/* ---- errors ------------------------------------------------------ */

/* How to mend it, beginning with ": ", or nothing. */
static const char *mend(const struct dm_command *command, int err)
{
	bool table = command == &table_load, message = command == &target_message;

	switch (err) {
	case EBUSY:
		if (command == &dev_remove)
			return ": unmount it, close it and remove the devices on it first";
		if (table)
			return ": a device of the table is mounted or belongs to another pool";
		if (message)
			return ": the thin device is active, or the metadata snapshot is already held";
		return ": another device has that name or uuid";
	case EEXIST:
		return message ? ": the pool has a thin device of that id" : "";
	case ENODATA:
		return message || table ? ": the pool has no thin device of that id" : "";
	case ENODEV:
		return table ? ": a device of the table does not exist" : "";
	case ENXIO:
		return message ? ": it does not exist or has no live table" : ": no such device";
	case EOPNOTSUPP:
		return message ? ": the pool is read-only or failed" : "";
	case EINVAL:
		return table || command == &dev_resume ? ": the kernel's log (dmesg) says why" : "";
	default:
		return "";
	}
}

static const char *label(const struct request *request)
{
	if (request->name && *request->name)
		return request->name;
	return request->uuid ? request->uuid : "device-mapper";
}

static int request_failed(const struct request *request, const uint32_t *kernel, int err)
{
	const struct dm_command *command = request->command;
	const char *name = label(request);
	const char *detail = request->detail ? request->detail : "";
	const char *open = *detail ? " \"" : "", *close = *detail ? "\"" : "";

	if (err == EACCES || err == EPERM)
		return bs_fail(
			-EPERM, "%s: %s: no privilege for device-mapper: run as root", name, command->doing);
	if (err == ENOTTY || (err == EINVAL && (kernel[0] != DM_VERSION_MAJOR || kernel[1] < command->minor)))
		return bs_fail(-EOPNOTSUPP,
			"%s: %s: needs device-mapper interface %u.%u, this kernel has %u.%u: use a newer "
			"kernel",
			name, command->doing, DM_VERSION_MAJOR, command->minor, kernel[0], kernel[1]);
	return bs_fail(-err, "%s: %s%s%.200s%s: %s%s", name, command->doing, open, detail, close,
		strerror(err), mend(command == &dev_remove_deferred ? &dev_remove : command, err));
}

static int answer_failed(const struct request *request, int err)
{
	const char *name = label(request);

	return bs_fail(err, "%s: %s: the kernel's answer cannot be read: %s", name, request->command->doing,
		strerror(-err));
}

/* ---- names ------------------------------------------------------- */

static bool fits(const char *text, size_t most, const char *allowed)
{
	size_t length = strnlen(text, most + 1);

	return length > 0 && length <= most && (!allowed || text[strspn(text, allowed)] == '\0');
}

static int check_name(const char *name)
{
	if (fits(name, DM_NAME_LEN - 1, LABEL) && name[0] != '.' && name[0] != '-')
		return 0;
	return bs_fail(-EINVAL,
		"\"%.140s\" cannot name a device: 1 to %d of A-Z a-z 0-9 + _ . - and no . or - at the front",
		name, DM_NAME_LEN - 1);
}

static int check_uuid(const char *uuid)
{
	if (fits(uuid, DM_UUID_LEN - 1, LABEL ":"))
		return 0;
	return bs_fail(-EINVAL,
		"\"%.140s\" cannot be a device's uuid: 1 to %d of A-Z a-z 0-9 + _ . - :", uuid,
		DM_UUID_LEN - 1);
}

/* A name or uuid to look up may be another program's: it only must fit. */
static int check_key(const struct request *request)
{
	if (request->uuid)
		return fits(request->uuid, DM_UUID_LEN - 1, NULL)
			       ? 0
			       : bs_fail(-EINVAL, "\"%.140s\" is no uuid of a device", request->uuid);
	if (request->name && !fits(request->name, DM_NAME_LEN - 1, NULL))
		return bs_fail(-EINVAL, "\"%.140s\" is no name of a device", request->name);
	return 0;
}

/* ---- one ioctl --------------------------------------------------- */

static void answer_deinit(struct answer *answer)
{
	free(answer->header);
}

static int fill(const struct request *request, size_t capacity, struct dm_ioctl **ret)
{
	struct dm_ioctl *header = calloc(1, capacity);

	if (!header)
		return bs_fail(-ENOMEM, "out of memory");
	header->version[0] = DM_VERSION_MAJOR;
	header->version[1] = request->command->minor;
	header->data_size = (uint32_t)capacity;
	header->data_start = sizeof(*header);
	header->flags = request->flags;
	header->event_nr = request->event_nr;
	header->target_count = request->target_count;
	/* Creating takes both, everything else one of them. */
	if (request->uuid)
		strcpy(header->uuid, request->uuid);
	if (request->name && (!request->uuid || request->command == &dev_create))
		strcpy(header->name, request->name);
	if (request->payload_size)
		memcpy((char *)header + sizeof(*header), request->payload, request->payload_size);
	*ret = header;
	return 0;
}

static int attempt(int control, const struct request *request, size_t capacity, struct answer *ret)
{
	struct dm_ioctl *header;
	int r = fill(request, capacity, &header);

	if (r < 0)
		return r;
	if (ioctl(control, request->command->request, header) < 0) {
		r = request_failed(request, header->version, errno);
		free(header);
		return r;
	}
	*ret = (struct answer){header, capacity};
	return 0;
}

/* On success the caller frees the answer. */
static int exchange(int control, const struct request *request, struct answer *ret)
{
	bool grows = request->command->grows;
	size_t capacity = sizeof(struct dm_ioctl) + request->payload_size + (grows ? REPLY_SIZE : 0);
	int r = check_key(request);

	if (r < 0)
		return r;
	for (; capacity <= REPLY_SIZE_MAX; capacity *= 2) {
		r = attempt(control, request, capacity, ret);
		if (r < 0 || !grows || !(ret->header->flags & DM_BUFFER_FULL_FLAG))
			return r;
		answer_deinit(ret);
	}
	return answer_failed(request, -EOVERFLOW);
}

static int exchange_info(int control, const struct request *request, struct bs_dm_info *ret)
{
	struct answer answer;
	int r = exchange(control, request, &answer);

	if (r < 0)
		return r;
	r = dm_reply_info(answer.header, answer.capacity, ret);
	answer_deinit(&answer);
	return r < 0 ? answer_failed(request, r) : 0;
}

static int exchange_nothing(int control, const struct request *request)
{
	struct answer answer;
	int r = exchange(control, request, &answer);

	if (r == 0)
		answer_deinit(&answer);
	return r;
}

/* ---- the machine ------------------------------------------------- */

int bs_dm_open(void)
{
	int fd = open(CONTROL, O_RDWR | O_CLOEXEC);

	if (fd >= 0)
		return fd;
	switch (errno) {
	case ENOENT:
	case ENODEV:
	case ENXIO:
		return bs_fail(
			-EOPNOTSUPP, "%s: no device-mapper here: load it with modprobe dm_mod", CONTROL);
	case EACCES:
	case EPERM:
		return bs_fail(-EPERM, "%s: no privilege: run as root", CONTROL);
	default:
		return bs_fail_errno("%s", CONTROL);
	}
}

int bs_dm_version(int control, uint32_t ret[3])
{
	struct answer answer;
	int r = exchange(control, &(struct request){.command = &version}, &answer);

	if (r < 0)
		return r;
	memcpy(ret, answer.header->version, sizeof(answer.header->version));
	answer_deinit(&answer);
	return 0;
}

int bs_dm_devices(int control, struct bs_dm_entry *out, int capacity)
{
	/* Kernels that do not tell uuids ignore the flag. */
	const struct request request = {.command = &list_devices, .flags = DM_UUID_FLAG};
	struct answer answer;
	int r = exchange(control, &request, &answer);

	if (r < 0)
		return r;
	r = dm_reply_devices(answer.header, answer.capacity, out, capacity);
	answer_deinit(&answer);
	return r < 0 ? answer_failed(&request, r) : r;
}

static int versions(
	int control, const struct request *request, struct bs_dm_target_version *out, int capacity)
{
	struct answer answer;
	int r = exchange(control, request, &answer);

	if (r < 0)
		return r;
	r = dm_reply_target_versions(answer.header, answer.capacity, out, capacity);
	answer_deinit(&answer);
	return r < 0 ? answer_failed(request, r) : r;
}

int bs_dm_target_versions(int control, struct bs_dm_target_version *out, int capacity)
{
	return versions(control, &(struct request){.command = &list_versions}, out, capacity);
}

int bs_dm_target_version(int control, const char *type, struct bs_dm_target_version *ret)
{
	int r = fits(type, DM_MAX_TYPE_NAME - 1, LABEL)
			? versions(control, &(struct request){.command = &target_version, .name = type}, ret,
				  1)
			: -EINVAL;

	if (r == -EINVAL || r == 0)
		return bs_fail(-EOPNOTSUPP,
			"this kernel has no target \"%.20s\": load its module (modprobe dm-%.20s)", type,
			type);
	return r < 0 ? r : 0;
}

int bs_dm_arm_poll(int control)
{
	return exchange_nothing(control, &(struct request){.command = &arm_poll});
}

/* ---- the life of a device ---------------------------------------- */

int bs_dm_create(int control, const char *name, const char *uuid, struct bs_dm_info *ret)
{
	const struct request request = {.command = &dev_create, .name = name, .uuid = uuid};
	int r = check_name(name);

	if (r == 0 && uuid)
		r = check_uuid(uuid);
	return r < 0 ? r : exchange_info(control, &request, ret);
}

int bs_dm_remove(int control, const char *name, const char *uuid, unsigned int flags, uint32_t cookie,
	struct bs_dm_info *ret)
{
	const struct request request = {
		.command = flags & BS_DM_DEFERRED_REMOVE ? &dev_remove_deferred : &dev_remove,
		.name = name,
		.uuid = uuid,
		.flags = flags & BS_DM_DEFERRED_REMOVE,
		.event_nr = cookie,
	};

	return exchange_info(control, &request, ret);
}

int bs_dm_rename(int control, const char *name, const char *new_name, uint32_t cookie, struct bs_dm_info *ret)
{
	int r = check_name(new_name);

	if (r < 0)
		return r;
	return exchange_info(control,
		&(struct request){.command = &dev_rename,
			.name = name,
			.event_nr = cookie,
			.payload = new_name,
			.payload_size = strlen(new_name) + 1,
			.detail = new_name},
		ret);
}

int bs_dm_suspend(int control, const char *name, const char *uuid, unsigned int flags, struct bs_dm_info *ret)
{
	const struct request request = {
		.command = &dev_suspend,
		.name = name,
		.uuid = uuid,
		.flags = DM_SUSPEND_FLAG | (flags & (BS_DM_SKIP_LOCKFS | BS_DM_NOFLUSH)),
	};

	return exchange_info(control, &request, ret);
}

int bs_dm_resume(int control, const char *name, const char *uuid, unsigned int flags, uint32_t cookie,
	struct bs_dm_info *ret)
{
	const struct request request = {
		.command = &dev_resume,
		.name = name,
		.uuid = uuid,
		.flags = flags & (BS_DM_SKIP_LOCKFS | BS_DM_NOFLUSH),
		.event_nr = cookie,
	};

	return exchange_info(control, &request, ret);
}

int bs_dm_info(int control, const char *name, const char *uuid, struct bs_dm_info *ret)
{
	return exchange_info(
		control, &(struct request){.command = &dev_status, .name = name, .uuid = uuid}, ret);
}

int bs_dm_wait(int control, const char *name, const char *uuid, uint32_t event_nr, struct bs_dm_info *ret)
{
	return exchange_info(control,
		&(struct request){.command = &dev_wait, .name = name, .uuid = uuid, .event_nr = event_nr},
		ret);
}

/* ---- tables ------------------------------------------------------ */

static size_t line_size(const struct bs_dm_target *target)
{
	return (sizeof(struct dm_target_spec) + strlen(target->parameters) + 1 + 7) & ~(size_t)7;
}

static int check_targets(const char *name, const struct bs_dm_target *targets, int count, size_t *ret)
{
	uint64_t sector = 0;
	size_t size = 0;

	for (int i = 0; i < count; i++) {
		const struct bs_dm_target *target = &targets[i];

		if (!fits(target->type, DM_MAX_TYPE_NAME - 1, LABEL))
			return bs_fail(
				-EINVAL, "%s: \"%.40s\" cannot be the type of a target", name, target->type);
		if (target->start_sector != sector || target->length_sectors == 0 ||
			target->length_sectors > UINT64_MAX - sector)
			return bs_fail(-EINVAL, "%s: line %d of the table does not begin where line %d ends",
				name, i + 1, i);
		sector += target->length_sectors;
		size += line_size(target);
		if (size > REPLY_SIZE_MAX / 2)
			return bs_fail(-EINVAL, "%s: the table is too long", name);
	}
	*ret = size;
	return count > 0 ? 0 : bs_fail(-EINVAL, "%s: a table needs at least one line", name);
}

static void write_lines(const struct bs_dm_target *targets, int count, char *out)
{
	for (int i = 0; i < count; i++) {
		struct dm_target_spec spec = {
			.sector_start = targets[i].start_sector,
			.length = targets[i].length_sectors,
			.next = (uint32_t)line_size(&targets[i]),
		};

		strcpy(spec.target_type, targets[i].type);
		memcpy(out, &spec, sizeof(spec));
		strcpy(out + sizeof(spec), targets[i].parameters);
		out += spec.next;
	}
}

int bs_dm_load(int control, const char *name, const char *uuid, const struct bs_dm_target *targets, int count,
	unsigned int flags, struct bs_dm_info *ret)
{
	size_t size;
	int r = check_targets(name ? name : uuid, targets, count, &size);

	if (r < 0)
		return r;
	char *payload = calloc(1, size);
	if (!payload)
		return bs_fail(-ENOMEM, "out of memory");
	write_lines(targets, count, payload);
	r = exchange_info(control,
		&(struct request){.command = &table_load,
			.name = name,
			.uuid = uuid,
			.flags = flags & BS_DM_READ_ONLY,
			.target_count = (uint32_t)count,
			.payload = payload,
			.payload_size = size,
			.detail = count == 1 ? payload + sizeof(struct dm_target_spec) : NULL},
		ret);
	free(payload);
	return r;
}

int bs_dm_clear(int control, const char *name, const char *uuid, struct bs_dm_info *ret)
{
	return exchange_info(
		control, &(struct request){.command = &table_clear, .name = name, .uuid = uuid}, ret);
}

int bs_dm_dependencies(
	int control, const char *name, const char *uuid, unsigned int flags, uint64_t *out, int capacity)
{
	const struct request request = {
		.command = &table_deps,
		.name = name,
		.uuid = uuid,
		.flags = flags & BS_DM_QUERY_PENDING,
	};
	struct answer answer;
	int r = exchange(control, &request, &answer);

	if (r < 0)
		return r;
	r = dm_reply_dependencies(answer.header, answer.capacity, out, capacity);
	answer_deinit(&answer);
	return r < 0 ? answer_failed(&request, r) : r;
}

int bs_dm_lines(int control, const char *name, const char *uuid, unsigned int flags, char *out, int capacity,
	struct bs_dm_info *ret)
{
	const struct request request = {
		.command = &table_status,
		.name = name,
		.uuid = uuid,
		.flags = flags & (BS_DM_TABLE | BS_DM_NOFLUSH | BS_DM_QUERY_PENDING),
	};
	struct answer answer;
	int r = exchange(control, &request, &answer);

	if (r < 0)
		return r;
	r = dm_reply_info(answer.header, answer.capacity, ret);
	if (r == 0)
		r = dm_reply_lines(answer.header, answer.capacity, out, capacity);
	answer_deinit(&answer);
	return r < 0 ? answer_failed(&request, r) : r;
}

/* ---- messages ---------------------------------------------------- */

int bs_dm_message(int control, const char *name, const char *uuid, uint64_t sector, const char *message,
	char *out, int capacity)
{
	const size_t head = offsetof(struct dm_target_msg, message);
	char payload[sizeof(struct dm_target_msg) + MESSAGE_SIZE_MAX];
	struct answer answer;

	if (!fits(message, MESSAGE_SIZE_MAX - 1, NULL))
		return bs_fail(
			-EINVAL, "%s: a message has 1 to %d bytes", name ? name : uuid, MESSAGE_SIZE_MAX - 1);
	memcpy(payload, &sector, sizeof(sector));
	strcpy(payload + head, message);
	const struct request request = {
		.command = &target_message,
		.name = name,
		.uuid = uuid,
		.payload = payload,
		.payload_size = head + strlen(message) + 1,
		.detail = message,
	};
	int r = exchange(control, &request, &answer);
	if (r < 0)
		return r;
	r = dm_reply_message(answer.header, answer.capacity, out, capacity);
	answer_deinit(&answer);
	return r < 0 ? answer_failed(&request, r) : r;
}
