/*
 * Traces of virtual SCSI disks as CloudPhysics recorded them: records of 32 (version 1) or 40 bytes (2), sectors
 * of 512 bytes, times in microseconds.
 *
 * A record has no magic, only its version in the high byte of a field. A command that neither reads nor
 * writes is no request.
 */
#include <errno.h>
#include <string.h>

#include "blocksnap.h"
#include "error.h"

#define SECTOR 512
#define MICROSECOND 1000

struct record_v1 {
	uint32_t serial;
	uint32_t length;
	uint32_t segments;
	uint16_t command;
	uint16_t version;
	uint64_t sector;
	uint64_t time;
};
_Static_assert(sizeof(struct record_v1) == 32, "version 1");

struct record_v2 {
	uint16_t command;
	uint16_t version;
	uint32_t serial;
	uint32_t length;
	uint32_t segments;
	uint64_t sector;
	uint64_t time;
	uint64_t response_time;
};
_Static_assert(sizeof(struct record_v2) == 40, "version 2");

static struct record_v1 load(const char *p, int version, bool swapped)
{
	struct record_v1 r;
	struct record_v2 v2;

	if (version == 1) {
		memcpy(&r, p, sizeof(r));
	} else {
		memcpy(&v2, p, sizeof(v2));
		r = (struct record_v1){
			v2.serial, v2.length, v2.segments, v2.command, v2.version, v2.sector, v2.time};
	}
	if (swapped) {
		r.length = __builtin_bswap32(r.length);
		r.command = __builtin_bswap16(r.command);
		r.version = __builtin_bswap16(r.version);
		r.sector = __builtin_bswap64(r.sector);
		r.time = __builtin_bswap64(r.time);
	}
	return r;
}

/* Operation codes of SCSI in all their lengths. */
static uint32_t kind_of(uint16_t command)
{
	switch (command) {
	case 0x08:
	case 0x28:
	case 0x88:
	case 0xa8:
		return BS_REQUEST_READ;
	case 0x0a:
	case 0x2a:
	case 0x2e:
	case 0x41:
	case 0x8a:
	case 0x8e:
	case 0x93:
	case 0xaa:
	case 0xae:
		return BS_REQUEST_WRITE;
	case 0x35:
	case 0x91:
		return BS_REQUEST_FLUSH;
	default:
		return BS_TRACE_NOTHING;
	}
}

/* Returns 1 with a request, 0 if the record is none. */
static int request_of(struct record_v1 r, int version, uint64_t clock, struct bs_request *ret)
{
	if (r.version >> 8 != version || r.command > 0xff)
		return bs_fail(-EBADMSG, "has version %u and command 0x%x: damaged, or not of vscsi",
			r.version >> 8, r.command);
	ret->kind = kind_of(r.command);
	if (ret->kind == BS_TRACE_NOTHING)
		return 0;
	if (r.sector > ((uint64_t)INT64_MAX - r.length) / SECTOR)
		return bs_fail(-EBADMSG, "sector %llu is absurd: no device has 2^63 bytes",
			(unsigned long long)r.sector);
	if (__builtin_mul_overflow(r.time, MICROSECOND, &ret->time))
		return bs_fail(-EBADMSG, "time %llu is absurd: beyond 64 bits of nanoseconds",
			(unsigned long long)r.time);
	if (ret->time < clock)
		return bs_fail(-EBADMSG,
			"time %llu is before that of the record before: sort the trace (--sort)",
			(unsigned long long)r.time);
	ret->offset = r.sector * SECTOR;
	ret->length = r.length;
	ret->device = 0;
	return 1;
}

int bs_trace_vscsi(const void *data, size_t length, const struct bs_trace_vscsi *as, struct bs_request *out,
	size_t capacity, struct bs_trace_progress *ret)
{
	size_t size = as->version == 1 ? sizeof(struct record_v1) : sizeof(struct record_v2);
	const char *p = data;
	size_t left = length;
	int count = 0;

	ret->count = 0;
	for (; count >= 0 && ret->count < capacity && left >= size; p += size, left -= size) {
		ret->record++;
		uint64_t clock = as->ordered ? ret->clock : 0;
		count = request_of(load(p, as->version, as->swapped), as->version, clock, &out[ret->count]);
		if (count <= 0)
			continue;
		ret->clock = out[ret->count++].time;
	}
	ret->consumed = length - left;
	return count < 0 ? count : 0;
}
