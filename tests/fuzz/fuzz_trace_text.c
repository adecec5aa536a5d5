/*
 * Lines of text traces: an input is a layout and a text, which is read in two pieces as a stream would bring it.
 * Promise: every call gets on, stays within the text, and gives requests whose ends are below 2^63.
 */
#include <errno.h>

#include "blocksnap.h"
#include "fuzz.h"

#define REQUESTS 64

static const struct bs_trace_word words[] = {
	{"read", BS_REQUEST_READ},
	{"write", BS_REQUEST_WRITE},
	{"trim", BS_REQUEST_DISCARD},
	{"sync", BS_REQUEST_FLUSH},
	{"wait", BS_TRACE_WAIT},
	{"add", BS_TRACE_NOTHING},
	{"1", BS_REQUEST_WRITE},
};

static struct bs_trace_layout take_layout(const uint8_t **data, size_t *size)
{
	int8_t fields[8];

	fuzz_take(data, size, fields, sizeof(fields));
	return (struct bs_trace_layout){
		.separator = fields[7] & 2 ? ' ' : ',',
		.letters = fields[7] & 4,
		.ordered = fields[7] & 8,
		.time = fields[0],
		.offset = fields[1],
		.length = fields[2],
		.kind = fields[3],
		.device = fields[4],
		.host = fields[5],
		.filter = fields[6],
		.filter_word = "Q",
		.time_unit = fields[7] & 16 ? 1000000000 : 100,
		.offset_unit = fields[7] & 32 ? 512 : 1,
		.length_unit = fields[7] & 64 ? 512 : 1,
	};
}

static void parse(struct bs_trace_parser *parser, const char *text, size_t length)
{
	struct bs_request requests[REQUESTS];
	struct bs_trace_progress progress;

	while (length) {
		int r = bs_trace_parser_parse(parser, text, length, requests, REQUESTS, &progress);

		PROMISE(progress.consumed <= length && progress.count <= REQUESTS);
		for (uint64_t i = 0; i < progress.count; i++)
			PROMISE(requests[i].offset + requests[i].length <= INT64_MAX);
		if (!progress.consumed)
			break;
		PROMISE(r == 0 || r == -EBADMSG);
		text += progress.consumed;
		length -= progress.consumed;
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct bs_trace_layout layout = take_layout(&data, &size);
	struct bs_trace_names *names;
	struct bs_trace_parser *parser;

	if (bs_trace_names_create(&names) < 0)
		return 0;
	if (bs_trace_parser_create(&layout, words, sizeof(words) / sizeof(*words), names, &parser) < 0) {
		bs_trace_names_destroy(names);
		return 0;
	}
	char *text = malloc(size ? size : 1);
	if (size)
		memcpy(text, data, size);
	parse(parser, text, size / 2);
	parse(parser, text, size);
	free(text);
	bs_trace_parser_destroy(parser);
	bs_trace_names_destroy(names);
	return 0;
}
