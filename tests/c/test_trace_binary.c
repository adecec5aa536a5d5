#include <errno.h>

#include "test.h"

#define CAPACITY 64

/* Each reader as a call of one shape, so that any bytes can be given to all of them. */
typedef int reader(const void *data, size_t length, struct bs_request *out, struct bs_trace_progress *ret);

static int read_blktrace(
	const void *data, size_t length, struct bs_request *out, struct bs_trace_progress *ret)
{
	return bs_trace_blktrace(data, length, 1, false, out, CAPACITY, ret);
}

static int read_blktrace_swapped(
	const void *data, size_t length, struct bs_request *out, struct bs_trace_progress *ret)
{
	return bs_trace_blktrace(data, length, 1, true, out, CAPACITY, ret);
}

static int read_vscsi_1(
	const void *data, size_t length, struct bs_request *out, struct bs_trace_progress *ret)
{
	struct bs_trace_vscsi as = {.version = 1, .ordered = true};

	return bs_trace_vscsi(data, length, &as, out, CAPACITY, ret);
}

static int read_vscsi_2(
	const void *data, size_t length, struct bs_request *out, struct bs_trace_progress *ret)
{
	struct bs_trace_vscsi as = {.version = 2, .swapped = true};

	return bs_trace_vscsi(data, length, &as, out, CAPACITY, ret);
}

static int read_srt(const void *data, size_t length, struct bs_request *out, struct bs_trace_progress *ret)
{
	return bs_trace_srt(data, length, UINT32_MAX, true, out, CAPACITY, ret);
}

static reader *const readers[] = {read_blktrace, read_blktrace_swapped, read_vscsi_1, read_vscsi_2, read_srt};

/* linux/blktrace_api.h */
struct event {
	uint32_t magic, sequence;
	uint64_t time, sector;
	uint32_t bytes, action, pid, device, cpu;
	uint16_t error, pdu_length;
};

static const struct event write_event = {
	.magic = 0x65617407, .time = 5, .sector = 8, .bytes = 4096, .action = 0x00020001, .device = 8 << 20};

static void test_a_write_event_is_a_request(void)
{
	struct bs_trace_progress progress = {0};
	struct bs_request r[CAPACITY];

	CHECK_EQ(read_blktrace(&write_event, sizeof(write_event), r, &progress), 0);
	CHECK_EQ(progress.count, 1);
	CHECK_EQ(r[0].offset, 4096);
	CHECK_EQ(r[0].length, 4096);
	CHECK_EQ(r[0].kind, BS_REQUEST_WRITE);
	CHECK_EQ(r[0].device, 8 << 20);
}

static void test_an_absurd_sector_is_passed_and_a_lost_magic_ends(void)
{
	struct event events[3] = {write_event, write_event, write_event};
	struct bs_trace_progress progress = {0};
	struct bs_request r[CAPACITY];

	events[0].sector = UINT64_MAX;
	events[2].magic = 0;
	CHECK_EQ(read_blktrace(events, sizeof(events), r, &progress), -EBADMSG);
	CHECK_EQ(progress.consumed, sizeof(events[0]));
	CHECK_EQ(read_blktrace(events + 1, 2 * sizeof(events[0]), r, &progress), -EUCLEAN);
	CHECK_EQ(progress.count, 1);
	CHECK_EQ(progress.record, 3);
}

static void test_a_record_that_is_not_all_there_is_left(void)
{
	struct event events[2] = {write_event, write_event};
	struct bs_trace_progress progress = {0};
	struct bs_request r[CAPACITY];

	events[1].pdu_length = 1;
	CHECK_EQ(read_blktrace(events, sizeof(events), r, &progress), 0);
	CHECK_EQ(progress.consumed, sizeof(events[0]));
}

/* Bytes that are mostly records of some format, at the end of their allocation: the sanitizers judge. */
static void test_any_bytes_are_read_or_refused(void)
{
	uint64_t seed = 11;
	struct bs_request r[CAPACITY];

	for (int round = 0; round < 50000; round++) {
		size_t length = test_random(&seed) % 400;
		unsigned char *data = malloc(length + !length);

		for (size_t i = 0; i < length; i++)
			data[i] = test_random(&seed) % 3 ? 0 : (unsigned char)test_random(&seed);
		for (size_t i = 0; i + sizeof(write_event) <= length; i += sizeof(write_event) + data[i])
			memcpy(data + i, &write_event, sizeof(write_event.magic));
		for (size_t i = 0; i < sizeof(readers) / sizeof(readers[0]); i++) {
			struct bs_trace_progress progress = {0};
			readers[i](data, length, r, &progress);
			CHECK(progress.consumed <= length && progress.count <= CAPACITY);
		}
		free(data);
	}
}

int main(void)
{
	RUN(test_a_write_event_is_a_request);
	RUN(test_an_absurd_sector_is_passed_and_a_lost_magic_ends);
	RUN(test_a_record_that_is_not_all_there_is_left);
	RUN(test_any_bytes_are_read_or_refused);
	return 0;
}
