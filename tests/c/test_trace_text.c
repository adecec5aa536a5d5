#include <errno.h>

#include "test.h"

#define CAPACITY 64

static const struct bs_trace_word words[] = {{"write", BS_REQUEST_WRITE}, {"read", BS_REQUEST_READ},
	{"flush", BS_REQUEST_FLUSH}, {"wait", BS_TRACE_WAIT}, {"open", BS_TRACE_NOTHING}};

static const struct bs_trace_layout comma = {
	.separator = ',',
	.ordered = true,
	.time = 0,
	.kind = 1,
	.offset = 2,
	.length = 3,
	.device = 4,
	.host = -1,
	.filter = -1,
	.time_unit = 1000000000,
	.offset_unit = 512,
	.length_unit = 1,
};

static struct bs_trace_names *names;

static struct bs_trace_parser *parser_of(struct bs_trace_layout layout)
{
	struct bs_trace_parser *parser = NULL;

	CHECK_EQ(bs_trace_parser_create(&layout, words, sizeof(words) / sizeof(words[0]), names, &parser), 0);
	return parser;
}

/* Parse a text that ends right behind its allocation, so that a sanitizer sees a read too far. */
static int parse(struct bs_trace_parser *parser, const char *text, size_t length, struct bs_request *out,
	size_t capacity, struct bs_trace_progress *ret)
{
	char *copy = malloc(length + !length);

	memcpy(copy, text, length);
	int err = bs_trace_parser_parse(parser, copy, length, out, capacity, ret);
	free(copy);
	return err;
}

static int parse_line(const char *text, struct bs_request *out)
{
	struct bs_trace_parser *parser = parser_of(comma);
	struct bs_trace_progress progress = {0};
	int err = parse(parser, text, strlen(text), out, CAPACITY, &progress);

	CHECK_EQ(progress.consumed, strlen(text));
	bs_trace_parser_destroy(parser);
	return err ? err : (int)progress.count;
}

static void test_a_line_becomes_a_request(void)
{
	struct bs_request r[CAPACITY];

	CHECK_EQ(parse_line("1.25, WRITE ,8,\"4096\",3\r\n", r), 1);
	CHECK_EQ(r[0].time, 1250000000);
	CHECK_EQ(r[0].offset, 4096);
	CHECK_EQ(r[0].length, 4096);
	CHECK_EQ(r[0].kind, BS_REQUEST_WRITE);
	CHECK_EQ(r[0].device, 3);
}

static void test_numbers_are_exact_up_to_their_limits(void)
{
	struct bs_request r[CAPACITY];

	CHECK_EQ(parse_line("18446744073.709551615,read,0,0,0\n", r), 1);
	CHECK(r[0].time == UINT64_MAX);
	CHECK_EQ(parse_line("18446744073.709551616,read,0,0,0\n", r), -EBADMSG);
	CHECK_EQ(parse_line("0.0000000019,read,0,4294967295,4294967295\n", r), 1);
	CHECK_EQ(r[0].time, 1);
	CHECK_EQ(r[0].device, UINT32_MAX);
	CHECK_EQ(parse_line("0,read,18014398509481983,511,0\n", r), 1);
	CHECK_EQ(parse_line("0,read,18014398509481983,512,0\n", r), -EBADMSG);
	CHECK_EQ(parse_line("0,read,0,4294967296,0\n", r), -EBADMSG);
	CHECK_EQ(parse_line("0,read,18446744073709551615,1,0\n", r), -EBADMSG);
	CHECK_EQ(parse_line("0,read,99999999999999999999,1,0\n", r), -EBADMSG);
}

static void test_a_bad_line_is_passed_and_named(void)
{
	static const char text[] = "5,read,0,1,0\n4,read,0,1,0\n5,stir,0,1,0\n6,write,1,1,0\n7,write";
	struct bs_trace_parser *parser = parser_of(comma);
	struct bs_trace_progress progress = {0};
	struct bs_request r[CAPACITY];
	size_t at = 0, length = sizeof(text) - 1;

	CHECK_EQ(parse(parser, text, length, r, CAPACITY, &progress), -EBADMSG);
	CHECK_EQ(progress.count, 1);
	CHECK_EQ(progress.record, 2);
	CHECK(strstr(bs_last_error(), "time \"4\" is before"));
	at += progress.consumed;
	CHECK_EQ(parse(parser, text + at, length - at, r, CAPACITY, &progress), -EBADMSG);
	CHECK_EQ(progress.line, 3);
	CHECK(strstr(bs_last_error(), "operation \"stir\" is unknown"));
	at += progress.consumed;
	CHECK_EQ(parse(parser, text + at, length - at, r, CAPACITY, &progress), 0);
	CHECK_EQ(progress.count, 1);
	CHECK_EQ(length - at - progress.consumed, strlen("7,write"));
	bs_trace_parser_destroy(parser);
}

static void test_names_are_numbered_in_order_of_appearance(void)
{
	static const char text[] = "0,read,0,1,sdb\n0,read,0,1,sda\n0,read,0,1,sdb\n0,read,0,1,8,16\n";
	struct bs_trace_parser *parser = parser_of(comma);
	struct bs_trace_progress progress = {0};
	struct bs_request r[CAPACITY];
	char name[8];

	CHECK_EQ(parse(parser, text, sizeof(text) - 1, r, CAPACITY, &progress), 0);
	CHECK_EQ(r[0].device, 0);
	CHECK_EQ(r[1].device, 1);
	CHECK_EQ(r[2].device, 0);
	CHECK_EQ(bs_trace_names_name(names, 1, name, sizeof(name)), 3);
	CHECK_EQ(strcmp(name, "sda"), 0);
	CHECK_EQ(bs_trace_names_name(names, 2, name, sizeof(name)), -ENODATA);
	CHECK_EQ(bs_trace_names_name(names, 1, name, 3), -ERANGE);
	bs_trace_parser_destroy(parser);
}

static void test_too_many_names_are_refused(void)
{
	struct bs_trace_parser *parser = parser_of(comma);
	struct bs_trace_progress progress;
	struct bs_request r[CAPACITY];
	char text[64];

	for (int i = 0; bs_trace_names_number(names, "last", 4) < 0 || i < 4095; i++) {
		int length = snprintf(text, sizeof(text), "0,read,0,1,disk%d\n", i);
		parse(parser, text, (size_t)length, r, CAPACITY, &progress);
	}
	CHECK_EQ(parse(parser, "0,read,0,1,last\n", 16, r, CAPACITY, &progress), 0);
	CHECK_EQ(parse(parser, "0,read,0,1,one\n", 15, r, CAPACITY, &progress), -EBADMSG);
	CHECK(strstr(bs_last_error(), "is one name too many"));
	bs_trace_parser_destroy(parser);
}

static void test_waits_let_time_pass(void)
{
	struct bs_trace_layout layout = comma;
	struct bs_trace_progress progress = {0};
	struct bs_request r[CAPACITY];
	static const char text[] = "f write 0 1\nf wait 7\nf open\nf read 0 1\n";

	layout.separator = ' ';
	layout.time = -1;
	layout.device = 0;
	struct bs_trace_parser *parser = parser_of(layout);
	CHECK_EQ(parse(parser, text, sizeof(text) - 1, r, CAPACITY, &progress), 0);
	CHECK_EQ(progress.count, 2);
	CHECK_EQ(r[1].time, 7000);
	bs_trace_parser_destroy(parser);
}

static void test_output_is_never_written_beyond_its_capacity(void)
{
	static const char text[] = "0,read,0,1,0\n0,read,1,1,0\n0,read,2,1,0\n";
	struct bs_trace_progress progress = {0};
	struct bs_trace_parser *parser = parser_of(comma);

	for (size_t capacity = 0; capacity < 4; capacity++) {
		struct bs_request *out = malloc((capacity + !capacity) * sizeof(*out));
		CHECK_EQ(parse(parser, text, sizeof(text) - 1, out, capacity, &progress), 0);
		CHECK_EQ(progress.count, capacity < 2 ? 0 : capacity - 1);
		free(out);
	}
	bs_trace_parser_destroy(parser);
}

/* Lines of random pieces of a good one: only the sanitizers and the invariants judge. */
static void test_any_bytes_are_read_or_refused(void)
{
	static const char alphabet[] = "0123456789999,,,,\n\n\"  .-RWFDQ+[x";
	uint64_t seed = 7;
	struct bs_request r[CAPACITY];
	struct bs_trace_layout layouts[2] = {comma, comma};

	layouts[1].separator = ' ';
	layouts[1].letters = true;
	for (int round = 0; round < 20000; round++) {
		struct bs_trace_parser *parser = parser_of(layouts[round % 2]);
		struct bs_trace_progress progress = {0};
		char text[200];
		size_t length = test_random(&seed) % sizeof(text), at = 0;
		int err;

		for (size_t i = 0; i < length; i++)
			text[i] = alphabet[test_random(&seed) % (sizeof(alphabet) - 1)];
		do {
			err = parse(parser, text + at, length - at, r, CAPACITY, &progress);
			at += progress.consumed;
			CHECK(at <= length && progress.count <= CAPACITY);
			for (size_t i = 0; i < progress.count; i++)
				CHECK(r[i].kind <= BS_REQUEST_FLUSH &&
					(r[i].kind == BS_REQUEST_FLUSH ||
						r[i].offset + r[i].length <= INT64_MAX));
		} while (err);
		CHECK(!memchr(text + at, '\n', length - at));
		bs_trace_parser_destroy(parser);
	}
}

int main(void)
{
	CHECK_EQ(bs_trace_names_create(&names), 0);
	RUN(test_a_line_becomes_a_request);
	RUN(test_numbers_are_exact_up_to_their_limits);
	RUN(test_a_bad_line_is_passed_and_named);
	RUN(test_names_are_numbered_in_order_of_appearance);
	RUN(test_waits_let_time_pass);
	RUN(test_output_is_never_written_beyond_its_capacity);
	RUN(test_any_bytes_are_read_or_refused);
	RUN(test_too_many_names_are_refused);
	bs_trace_names_destroy(names);
	return 0;
}
