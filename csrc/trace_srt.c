/*
 * HP's SRT traces as DiskSim has them: behind a text that ends with a form feed, big-endian records of
 * 32-bit words: size, version and type, seconds, microseconds, start, stop, bytes, sector, device, driver,
 * cylinder, flags, information; later versions append words.
 */
#include <errno.h>
#include <string.h>

#include "blocksnap.h"
#include "error.h"

#define WORDS 13
#define SIZE_MAX_RECORD 256
#define TYPE_REQUEST 1
#define READ 1

enum word {
	SIZE = 0,
	TYPE = 1,
	SECONDS = 2,
	MICROSECONDS = 3,
	BYTES = 6,
	SECTOR = 7,
	DEVICE = 8,
	FLAGS = 11,
};

/* Returns 1 with the words that every version has, 0 if the record is not all there. */
static int next_record(const char *p, size_t left, uint32_t *ret)
{
	if (left < WORDS * sizeof(*ret))
		return 0;
	memcpy(ret, p, WORDS * sizeof(*ret));
	for (int i = 0; i < WORDS; i++)
		ret[i] = __builtin_bswap32(ret[i]);
	if (ret[SIZE] < WORDS * sizeof(*ret) || ret[SIZE] > SIZE_MAX_RECORD || ret[TYPE] >> 16 < 1 ||
		ret[TYPE] >> 16 > 4)
		return bs_fail(-EUCLEAN, "has size %u and version %u: damaged, or not of SRT", ret[SIZE],
			ret[TYPE] >> 16);
	return left >= ret[SIZE];
}

int bs_trace_srt(const void *data, size_t length, uint32_t sector_size, bool ordered, struct bs_request *out,
	size_t capacity, struct bs_trace_progress *ret)
{
	const char *p = data, *end = p + length;
	uint32_t w[WORDS];
	int found = 0;

	ret->count = 0;
	while (ret->count < capacity && (found = next_record(p, (size_t)(end - p), w)) > 0) {
		ret->record++;
		p += w[SIZE];
		ret->consumed = (size_t)(p - (const char *)data);
		if ((w[TYPE] & 0xffff) != TYPE_REQUEST)
			continue;
		uint64_t time = w[SECONDS] * 1000000000ull + w[MICROSECONDS] * 1000ull;
		if (ordered && time < ret->clock)
			return bs_fail(-EBADMSG,
				"time %u.%06u is before that of the record before: sort the trace (--sort)",
				w[SECONDS], w[MICROSECONDS]);
		ret->clock = time;
		out[ret->count++] = (struct bs_request){
			.time = time,
			.offset = (uint64_t)w[SECTOR] * sector_size,
			.length = w[BYTES],
			.kind = w[FLAGS] & READ ? BS_REQUEST_READ : BS_REQUEST_WRITE,
			.device = w[DEVICE] >> 8 & 0xff,
		};
	}
	ret->consumed = (size_t)(p - (const char *)data);
	ret->record += found < 0;
	return found < 0 ? found : 0;
}
