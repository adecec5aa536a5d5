/* What the kernel answers to device-mapper ioctls, sound, hostile and garbled; and calls without a device. */
#include <errno.h>
#include <fcntl.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "dm_reply.h"
#include "test.h"

#define CAPACITY 4096
#define DATA sizeof(struct dm_ioctl)

/* An answer of exactly CAPACITY bytes, so that a step beyond it meets the sanitizer. */
static struct dm_ioctl *answer_create(void)
{
	struct dm_ioctl *answer = calloc(1, CAPACITY);

	CHECK(answer != NULL);
	answer->version[0] = 4;
	answer->version[1] = 47;
	answer->data_start = DATA;
	answer->data_size = offsetof(struct dm_ioctl, data);
	return answer;
}

static char *data_of(struct dm_ioctl *answer)
{
	return (char *)answer + DATA;
}

static void put_u32(struct dm_ioctl *answer, size_t offset, uint32_t value)
{
	memcpy(data_of(answer) + offset, &value, sizeof(value));
}

static void put_u64(struct dm_ioctl *answer, size_t offset, uint64_t value)
{
	memcpy(data_of(answer) + offset, &value, sizeof(value));
}

static void put_text(struct dm_ioctl *answer, size_t offset, const char *text)
{
	strcpy(data_of(answer) + offset, text);
}

/* ---- lists of devices -------------------------------------------- */

/* As Linux 6.1 writes it: 254:2 "first" with a uuid at 0, 254:257 "second" without one at 48. */
static struct dm_ioctl *two_devices(void)
{
	struct dm_ioctl *answer = answer_create();

	put_u64(answer, 0, 0xfe02);
	put_u32(answer, 8, 48);
	put_text(answer, 12, "first");
	put_u32(answer, 24, 7);
	put_u32(answer, 28, 1);
	put_text(answer, 32, "BLOCKSNAP-1");
	put_u64(answer, 48, 0x10fe01);
	put_text(answer, 60, "second");
	put_u32(answer, 72, 0);
	put_u32(answer, 76, 2);
	answer->data_size = DATA + 80;
	return answer;
}

static void test_devices_are_read_with_uuid_and_events(void)
{
	struct dm_ioctl *answer = two_devices();
	struct bs_dm_entry found[2];

	CHECK_EQ(dm_reply_devices(answer, CAPACITY, found, 2), 2);
	CHECK(strcmp(found[0].name, "first") == 0);
	CHECK(strcmp(found[0].uuid, "BLOCKSNAP-1") == 0);
	CHECK_EQ(found[0].device, makedev(254, 2));
	CHECK_EQ(found[0].event_nr, 7);
	CHECK(strcmp(found[1].name, "second") == 0);
	CHECK(strcmp(found[1].uuid, "") == 0);
	CHECK_EQ(found[1].device, makedev(254, 257));
	free(answer);
}

static void test_more_devices_than_asked_for_are_counted(void)
{
	struct dm_ioctl *answer = two_devices();
	struct bs_dm_entry found[1];

	CHECK_EQ(dm_reply_devices(answer, CAPACITY, found, 1), 2);
	CHECK(strcmp(found[0].name, "first") == 0);
	CHECK_EQ(dm_reply_devices(answer, CAPACITY, NULL, 0), 2);
	free(answer);
}

static void test_older_kernels_tell_less_of_a_device(void)
{
	struct dm_ioctl *answer = two_devices();
	struct bs_dm_entry found[2];

	answer->version[1] = 37;
	CHECK_EQ(dm_reply_devices(answer, CAPACITY, found, 2), 2);
	CHECK_EQ(found[0].event_nr, 7);
	CHECK(strcmp(found[0].uuid, "") == 0);
	answer->version[1] = 30;
	CHECK_EQ(dm_reply_devices(answer, CAPACITY, found, 2), 2);
	CHECK_EQ(found[0].event_nr, 0);
	free(answer);
}

static void test_no_devices_is_an_entry_of_device_0(void)
{
	struct dm_ioctl *answer = answer_create();
	struct bs_dm_entry found[1];

	CHECK_EQ(dm_reply_devices(answer, CAPACITY, found, 1), 0);
	answer->data_size = DATA + 16;
	CHECK_EQ(dm_reply_devices(answer, CAPACITY, found, 1), 0);
	free(answer);
}

static void test_bad_device_lists_are_refused(void)
{
	static const struct {
		const char *what;
		size_t offset;
		uint32_t value;
	} bad[] = {
		{"next beyond the data", 8, 4096},
		{"next at the end of the data", 8, 80},
		{"next that wraps", 8, UINT32_MAX - 7},
		{"next not aligned", 8, 47},
		{"next inside its own entry", 8, 8},
		{"next inside its own name", 8, 16},
		{"next before the uuid", 8, 32},
		{"a uuid where none can be", 76, 1},
	};

	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		struct dm_ioctl *answer = two_devices();
		struct bs_dm_entry found[8];

		fprintf(stderr, "  %s\n", bad[i].what);
		put_u32(answer, bad[i].offset, bad[i].value);
		CHECK_EQ(dm_reply_devices(answer, CAPACITY, found, 8), -EBADMSG);
		free(answer);
	}
}

static void test_names_and_uuids_without_an_end_are_refused(void)
{
	struct dm_ioctl *answer = two_devices();
	struct bs_dm_entry found[2];

	memset(data_of(answer) + 60, 'x', 20);
	CHECK_EQ(dm_reply_devices(answer, CAPACITY, found, 2), -EBADMSG);
	free(answer);
	answer = two_devices();
	memset(data_of(answer) + 32, 'x', 16);
	CHECK_EQ(dm_reply_devices(answer, CAPACITY, found, 2), -EBADMSG);
	free(answer);
	/* A name that has its NUL, but is longer than a name can be. */
	answer = answer_create();
	put_u64(answer, 0, 1);
	memset(data_of(answer) + 12, 'x', 128);
	answer->data_size = DATA + 256;
	CHECK_EQ(dm_reply_devices(answer, CAPACITY, found, 2), -EBADMSG);
	free(answer);
}

static void test_sizes_outside_the_buffer_are_refused(void)
{
	static const struct {
		uint32_t size, start;
	} bad[] = {{CAPACITY + 1, DATA}, {0, DATA}, {304, DATA}, {UINT32_MAX, DATA}, {DATA + 80, DATA + 81},
		{DATA + 80, 0}, {DATA + 80, 305}, {DATA + 80, UINT32_MAX}};

	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		struct dm_ioctl *answer = two_devices();
		struct bs_dm_entry found[2];
		char text[64];
		uint64_t device;

		answer->data_size = bad[i].size;
		answer->data_start = bad[i].start;
		answer->target_count = 1;
		answer->flags = DM_DATA_OUT_FLAG;
		CHECK_EQ(dm_reply_devices(answer, CAPACITY, found, 2), -EBADMSG);
		CHECK_EQ(dm_reply_lines(answer, CAPACITY, text, sizeof(text)), -EBADMSG);
		CHECK_EQ(dm_reply_dependencies(answer, CAPACITY, &device, 1), -EBADMSG);
		CHECK_EQ(dm_reply_message(answer, CAPACITY, text, sizeof(text)), -EBADMSG);
		free(answer);
	}
}

/* ---- state, dependencies, targets, messages ---------------------- */

static void test_state_is_read_and_its_strings_must_end(void)
{
	struct dm_ioctl *answer = answer_create();
	struct bs_dm_info info;

	strcpy(answer->name, "name");
	strcpy(answer->uuid, "uuid");
	answer->dev = 0xfe03;
	answer->event_nr = 5;
	answer->open_count = -1;
	CHECK_EQ(dm_reply_info(answer, CAPACITY, &info), 0);
	CHECK(strcmp(info.name, "name") == 0 && strcmp(info.uuid, "uuid") == 0);
	CHECK_EQ(info.device, makedev(254, 3));
	CHECK_EQ(info.event_nr, 5);
	memset(answer->name, 'x', sizeof(answer->name));
	CHECK_EQ(dm_reply_info(answer, CAPACITY, &info), -EBADMSG);
	answer->name[0] = '\0';
	memset(answer->uuid, 'x', sizeof(answer->uuid));
	CHECK_EQ(dm_reply_info(answer, CAPACITY, &info), -EBADMSG);
	free(answer);
}

static void test_dependencies_must_fit_their_count(void)
{
	static const uint32_t bad[] = {3, 1000, UINT32_MAX, 1u << 29, 1u << 31};
	struct dm_ioctl *answer = answer_create();
	uint64_t found[2];

	put_u32(answer, 0, 2);
	put_u64(answer, 8, 0x700);
	put_u64(answer, 16, 0x801);
	answer->data_size = DATA + 24;
	CHECK_EQ(dm_reply_dependencies(answer, CAPACITY, found, 2), 2);
	CHECK_EQ(found[0], makedev(7, 0));
	CHECK_EQ(found[1], makedev(8, 1));
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		put_u32(answer, 0, bad[i]);
		CHECK_EQ(dm_reply_dependencies(answer, CAPACITY, found, 2), -EBADMSG);
	}
	answer->data_size = offsetof(struct dm_ioctl, data);
	CHECK_EQ(dm_reply_dependencies(answer, CAPACITY, found, 2), -EBADMSG);
	free(answer);
}

static void test_target_versions_are_read_to_the_last(void)
{
	struct dm_ioctl *answer = answer_create();
	struct bs_dm_target_version found[2];

	put_u32(answer, 0, 24);
	put_u32(answer, 4, 1);
	put_text(answer, 16, "linear");
	put_u32(answer, 28, 1);
	put_u32(answer, 32, 22);
	put_text(answer, 40, "thin");
	answer->data_size = DATA + 48;
	CHECK_EQ(dm_reply_target_versions(answer, CAPACITY, found, 2), 2);
	CHECK(strcmp(found[0].name, "linear") == 0 && strcmp(found[1].name, "thin") == 0);
	CHECK_EQ(found[1].version[1], 22);
	for (uint32_t next = 1; next < 24; next++) {
		put_u32(answer, 0, next);
		CHECK_EQ(dm_reply_target_versions(answer, CAPACITY, found, 2), -EBADMSG);
	}
	free(answer);
}

static void test_a_message_may_answer_or_not(void)
{
	struct dm_ioctl *answer = answer_create();
	char text[8];

	put_text(answer, 0, "some words");
	answer->data_size = DATA + 16;
	CHECK_EQ(dm_reply_message(answer, CAPACITY, text, sizeof(text)), 0);
	CHECK(strcmp(text, "") == 0);
	answer->flags = DM_DATA_OUT_FLAG;
	CHECK_EQ(dm_reply_message(answer, CAPACITY, text, sizeof(text)), 10);
	CHECK(strcmp(text, "some wo") == 0);
	memset(data_of(answer), 'x', 16);
	CHECK_EQ(dm_reply_message(answer, CAPACITY, text, sizeof(text)), -EBADMSG);
	free(answer);
}

/* ---- lines ------------------------------------------------------- */

/* Lines at 0 and at 56. */
static struct dm_ioctl *two_lines(void)
{
	struct dm_ioctl *answer = answer_create();

	put_u64(answer, 8, 100);
	put_u32(answer, 20, 56);
	put_text(answer, 24, "linear");
	put_text(answer, 40, "7:0 2048");
	put_u64(answer, 56, 100);
	put_u64(answer, 64, 8);
	put_u32(answer, 76, 104);
	put_text(answer, 80, "error");
	answer->target_count = 2;
	answer->data_size = DATA + 104;
	return answer;
}

static void test_lines_are_texts_with_their_nul(void)
{
	static const char expected[] = "0 100 linear 7:0 2048\0"
				       "100 8 error ";
	struct dm_ioctl *answer = two_lines();
	char text[64];

	CHECK_EQ(dm_reply_lines(answer, CAPACITY, text, sizeof(text)), sizeof(expected));
	CHECK(memcmp(text, expected, sizeof(expected)) == 0);
	for (int length = 0; length < (int)sizeof(expected); length++) {
		char *exact = malloc(length ? (size_t)length : 1);

		CHECK_EQ(dm_reply_lines(answer, CAPACITY, exact, length), sizeof(expected));
		free(exact);
	}
	free(answer);
}

static void test_bad_lines_are_refused(void)
{
	static const uint32_t bad_next[] = {
		0, 8, 40, 48, 55, 57, 64, 72, 104, 4096, UINT32_MAX, UINT32_MAX - 7};
	char text[64];

	for (size_t i = 0; i < sizeof(bad_next) / sizeof(bad_next[0]); i++) {
		struct dm_ioctl *answer = two_lines();

		put_u32(answer, 20, bad_next[i]);
		CHECK_EQ(dm_reply_lines(answer, CAPACITY, text, sizeof(text)), -EBADMSG);
		free(answer);
	}
	struct dm_ioctl *answer = two_lines();
	answer->target_count = UINT32_MAX;
	CHECK_EQ(dm_reply_lines(answer, CAPACITY, text, sizeof(text)), -EBADMSG);
	answer->target_count = 2;
	memset(data_of(answer) + 24, 'x', 16);
	CHECK_EQ(dm_reply_lines(answer, CAPACITY, text, sizeof(text)), -EBADMSG);
	free(answer);
	answer = two_lines();
	memset(data_of(answer) + 96, 'x', 8);
	CHECK_EQ(dm_reply_lines(answer, CAPACITY, text, sizeof(text)), -EBADMSG);
	free(answer);
}

/* ---- garbled answers --------------------------------------------- */

/* Whatever bits are turned over, reading stays inside the buffer and inside what the caller gave. */
static void test_garbled_answers_are_survived(void)
{
	uint64_t state = 20;

	for (int round = 0; round < 20000; round++) {
		struct dm_ioctl *answer = round % 2 ? two_devices() : two_lines();
		struct bs_dm_target_version versions[2];
		struct bs_dm_entry entries[2];
		struct bs_dm_info info;
		uint64_t devices[2];
		char text[40];

		for (uint64_t flips = test_random(&state) % 4 + 1; flips; flips--) {
			size_t range = test_random(&state) % 4 ? 112 : DATA + 112;
			size_t place = test_random(&state) % range + (range == 112 ? DATA : 0);

			((uint8_t *)answer)[place] ^= (uint8_t)(1u << test_random(&state) % 8);
		}
		dm_reply_info(answer, CAPACITY, &info);
		dm_reply_devices(answer, CAPACITY, entries, 2);
		dm_reply_target_versions(answer, CAPACITY, versions, 2);
		dm_reply_dependencies(answer, CAPACITY, devices, 2);
		dm_reply_lines(answer, CAPACITY, text, sizeof(text));
		dm_reply_message(answer, CAPACITY, text, sizeof(text));
		free(answer);
	}
}

/* ---- what never reaches the kernel ------------------------------- */

static void test_what_cannot_be_is_refused_before_the_kernel(void)
{
	const struct bs_dm_target gap[] = {{0, 8, "linear", "7:0 0"}, {16, 8, "linear", "7:0 0"}};
	const struct bs_dm_target none = {0, 0, "linear", "7:0 0"}, wraps = {0, UINT64_MAX, "a b", ""};
	char long_name[200];
	struct bs_dm_info info;

	memset(long_name, 'n', sizeof(long_name));
	long_name[199] = '\0';
	/* -1 is no descriptor: what got past the checks would be EBADF. */
	CHECK_EQ(bs_dm_create(-1, "a/b", NULL, &info), -EINVAL);
	CHECK_EQ(bs_dm_create(-1, long_name, NULL, &info), -EINVAL);
	CHECK_EQ(bs_dm_create(-1, "good", long_name, &info), -EINVAL);
	CHECK_EQ(bs_dm_create(-1, "good", "u/1", &info), -EINVAL);
	CHECK_EQ(bs_dm_create(-1, "good", "u:1", &info), -EBADF);
	CHECK(strstr(bs_last_error(), "good: creating") != NULL);
	CHECK_EQ(bs_dm_rename(-1, "good", "..", 0, &info), -EINVAL);
	CHECK_EQ(bs_dm_info(-1, long_name, NULL, &info), -EINVAL);
	CHECK_EQ(bs_dm_info(-1, "good", long_name, &info), -EINVAL);
	CHECK_EQ(bs_dm_load(-1, "good", NULL, gap, 2, 0, &info), -EINVAL);
	CHECK_EQ(bs_dm_load(-1, "good", NULL, gap, 0, 0, &info), -EINVAL);
	CHECK_EQ(bs_dm_load(-1, "good", NULL, &none, 1, 0, &info), -EINVAL);
	CHECK_EQ(bs_dm_load(-1, "good", NULL, &wraps, 1, 0, &info), -EINVAL);
	CHECK_EQ(bs_dm_message(-1, "good", NULL, 0, "", NULL, 0), -EINVAL);
	CHECK_EQ(bs_dm_message(-1, "good", NULL, 0, "words", NULL, 0), -EBADF);
	CHECK(strstr(bs_last_error(), "good: sending a message \"words\"") != NULL);
}

static void test_another_file_is_no_device_mapper(void)
{
	uint32_t version[3];
	int fd = open("/dev/null", O_RDWR | O_CLOEXEC);

	CHECK(fd >= 0);
	CHECK_EQ(bs_dm_version(fd, version), -EOPNOTSUPP);
	close(fd);
}

int main(void)
{
	RUN(test_devices_are_read_with_uuid_and_events);
	RUN(test_more_devices_than_asked_for_are_counted);
	RUN(test_older_kernels_tell_less_of_a_device);
	RUN(test_no_devices_is_an_entry_of_device_0);
	RUN(test_bad_device_lists_are_refused);
	RUN(test_names_and_uuids_without_an_end_are_refused);
	RUN(test_sizes_outside_the_buffer_are_refused);
	RUN(test_state_is_read_and_its_strings_must_end);
	RUN(test_dependencies_must_fit_their_count);
	RUN(test_target_versions_are_read_to_the_last);
	RUN(test_a_message_may_answer_or_not);
	RUN(test_lines_are_texts_with_their_nul);
	RUN(test_bad_lines_are_refused);
	RUN(test_garbled_answers_are_survived);
	RUN(test_what_cannot_be_is_refused_before_the_kernel);
	RUN(test_another_file_is_no_device_mapper);
	return 0;
}
