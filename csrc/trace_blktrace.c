/*
 * Binary traces of blktrace, version 7: records of 48 bytes in the writer's byte order, each followed by
 * pdu_len bytes that only its kind of event understands (linux/blktrace_api.h).
 *
 * An event's low bits say what happened, its high bits to what. Notes (process names, times, messages) are
 * not requests. Order is not checked: the buffers of several processors follow one another in pieces.
 */
#include <errno.h>
#include <string.h>

#include "blocksnap.h"
#include "error.h"

#define HEADER 48
#define MAGIC 0x65617400u
#define VERSION 7
#define SECTOR 512

/* The low half of an action, without the mark of a control group. */
#define ACTION_MASK 0xfeffu

#define CATEGORY(bit) (1u << (16 + (bit)))
#define WRITE CATEGORY(1)
#define FLUSH CATEGORY(2)
#define PASSTHROUGH CATEGORY(9)
#define NOTE CATEGORY(10)
#define DISCARD CATEGORY(13)

struct event {
	uint32_t magic;
	uint32_t sequence;
	uint64_t time;
	uint64_t sector;
	uint32_t bytes;
	uint32_t action;
	uint32_t pid;
	uint32_t device;
	uint32_t cpu;
	uint16_t error;
	uint16_t pdu_length;
};
_Static_assert(sizeof(struct event) == HEADER, "struct blk_io_trace");

static void swap_bytes(struct event *e)
{
	e->magic = __builtin_bswap32(e->magic);
	e->time = __builtin_bswap64(e->time);
	e->sector = __builtin_bswap64(e->sector);
	e->bytes = __builtin_bswap32(e->bytes);
	e->action = __builtin_bswap32(e->action);
	e->device = __builtin_bswap32(e->device);
	e->pdu_length = __builtin_bswap16(e->pdu_length);
}

static uint32_t kind_of(const struct event *e, uint32_t action)
{
	if ((e->action & (NOTE | PASSTHROUGH)) || (e->action & ACTION_MASK) != action)
		return BS_TRACE_NOTHING;
	if (e->bytes == 0)
		return e->action & FLUSH ? BS_REQUEST_FLUSH : BS_TRACE_NOTHING;
	if (e->action & DISCARD)
		return BS_REQUEST_DISCARD;
	return e->action & WRITE ? BS_REQUEST_WRITE : BS_REQUEST_READ;
}

/* At most two requests: a preflush comes before its write. Returns how many. */
static int requests_of(const struct event *e, uint32_t action, struct bs_request *out)
{
	struct bs_request r = {.time = e->time, .kind = kind_of(e, action), .device = e->device};

	if (r.kind == BS_TRACE_NOTHING)
		return 0;
	if (r.kind == BS_REQUEST_FLUSH) {
		*out = r;
		return 1;
	}
	if (e->sector > ((uint64_t)INT64_MAX - e->bytes) / SECTOR)
		return bs_fail(-EBADMSG, "sector %llu is absurd: no device has 2^63 bytes",
			(unsigned long long)e->sector);
	bool preflush = e->action & FLUSH;
	if (preflush)
		*out++ = (struct bs_request){.time = r.time, .kind = BS_REQUEST_FLUSH, .device = r.device};
	r.offset = e->sector * SECTOR;
	r.length = e->bytes;
	*out = r;
	return 1 + preflush;
}

/* Returns 1 with the next event, 0 if it is not all there. */
static int next_event(const char *p, size_t left, bool swapped, struct event *ret)
{
	if (left < HEADER)
		return 0;
	memcpy(ret, p, HEADER);
	if (swapped)
		swap_bytes(ret);
	if ((ret->magic & 0xffffff00u) != MAGIC)
		return bs_fail(-EUCLEAN, "has magic 0x%08x instead of 0x%08x: damaged, or not of blktrace",
			ret->magic, MAGIC | VERSION);
	if ((ret->magic & 0xff) != VERSION)
		return bs_fail(-EUCLEAN, "has version %u of the format; 7 can be read", ret->magic & 0xff);
	return left >= HEADER + (size_t)ret->pdu_length;
}

int bs_trace_blktrace(const void *data, size_t length, uint32_t action, bool swapped, struct bs_request *out,
	size_t capacity, struct bs_trace_progress *ret)
{
	const char *p = data, *end = p + length;
	struct event event;
	int count = 0;

	ret->count = 0;
	while (count >= 0 && ret->count + 2 <= capacity) {
		count = next_event(p, (size_t)(end - p), swapped, &event);
		if (count == 0)
			break;
		ret->record++;
		if (count < 0)
			break;
		p += HEADER + event.pdu_length;
		count = requests_of(&event, action, out + ret->count);
		ret->count += count > 0 ? (size_t)count : 0;
	}
	ret->consumed = (size_t)(p - (const char *)data);
	return count < 0 ? count : 0;
}
