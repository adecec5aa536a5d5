/*
 * Records of binary traces: the first byte says which format and how it is read, the rest is the trace.
 * Promise: every call gets on or fails for good, stays within the trace, and gives requests whose ends are below 2^63.
 */
#include <errno.h>

#include "blocksnap.h"
#include "fuzz.h"

#define REQUESTS 32

static int read_some(uint8_t how, const uint8_t *data, size_t size, struct bs_request *out,
	struct bs_trace_progress *progress)
{
	bool swapped = how & 4, ordered = how & 8;
	struct bs_trace_vscsi vscsi = {how & 16 ? 2 : 1, swapped, ordered};

	switch (how & 3) {
	case 0:
		return bs_trace_blktrace(data, size, how & 16 ? 7 : 1, swapped, out, REQUESTS, progress);
	case 1:
		return bs_trace_vscsi(data, size, &vscsi, out, REQUESTS, progress);
	default:
		return bs_trace_srt(data, size, how & 16 ? 256 : 512, ordered, out, REQUESTS, progress);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct bs_trace_progress progress = {0};
	struct bs_request requests[REQUESTS];
	uint8_t how;

	fuzz_take(&data, &size, &how, 1);
	uint8_t *copy = malloc(size ? size : 1), *at = copy;
	if (size)
		memcpy(copy, data, size);
	while (size) {
		int r = read_some(how, at, size, requests, &progress);

		PROMISE(progress.consumed <= size && progress.count <= REQUESTS);
		for (uint64_t i = 0; i < progress.count; i++)
			PROMISE(requests[i].offset + requests[i].length <= INT64_MAX);
		if (!progress.consumed || (r < 0 && r != -EBADMSG))
			break;
		at += progress.consumed;
		size -= progress.consumed;
	}
	free(copy);
	return 0;
}
