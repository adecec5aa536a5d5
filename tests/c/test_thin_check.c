/* A sound pool is clean, damage gets its verdict, and no content under right checksums breaks any walk. */
#include <errno.h>
#include <fcntl.h>

#include "thin_image.h"

static char *check_text(struct image *im, struct bs_check_result *result)
{
	int fd = memfd_create("findings", MFD_CLOEXEC);

	image_write(im);
	CHECK_EQ(bs_metadata_check(im->path, fd, result), 0);
	return text_of(fd);
}

static void expect_finding(struct image *im, const char *finding)
{
	struct bs_check_result result;
	char *text = check_text(im, &result);

	if (!strstr(text, finding)) {
		fprintf(stderr, "expected: %s\nfound: %s", finding, text);
		exit(1);
	}
	free(text);
	image_destroy(im);
}

static void sound_pool_is_clean(void)
{
	struct image *im = image_create();
	struct bs_check_result result;
	char *text = check_text(im, &result);

	fputs(text, stderr);
	CHECK(text[0] == '\0');
	CHECK_EQ(result.fatal + result.leaks + result.warnings, 0);
	CHECK_EQ(result.devices, IMAGE_DEVICES);
	CHECK_EQ(result.mappings, 4 * 200 + 2 * 3);
	CHECK_EQ(result.data_blocks_used, 300);
	CHECK_EQ(result.metadata_blocks_used, im->used);
	free(text);
	image_destroy(im);
}

static void lost_mappings_are_counted_with_the_path(void)
{
	struct image *im = image_create();
	char finding[256];

	im->blocks[im->leaf_c].node.flags = le32_of(3);
	snprintf(finding, sizeof(finding),
		"fatal: device 2, thin blocks 100..: node %u -> %u: flags of block %u are 3: neither "
		"internal (1) nor leaf "
		"(2): 100 mappings lost\n",
		im->device_2_root, im->leaf_c, im->leaf_c);
	expect_finding(im, finding);
}

static void damage_in_a_shared_node_is_told_for_each_device(void)
{
	struct image *im = image_create();
	struct bs_check_result result;

	im->blocks[im->leaf_b].node.blocknr = le64_of(1);
	char *text = check_text(im, &result);
	CHECK(strstr(text, "fatal: device 1, thin blocks 100..: "));
	CHECK(strstr(text, "fatal: device 3: "));
	CHECK(strstr(text, "fatal: device 4: "));
	CHECK(!strstr(text, "device 2"));
	CHECK_EQ(result.fatal, 3);
	CHECK_EQ(result.leaks, 0);
	free(text);
	image_destroy(im);
}

static void loop_is_found(void)
{
	struct image *im = image_create();
	struct disk_node *root = &im->blocks[im->device_2_root].node;

	root->keys[252 + 1] = le64_of(im->device_2_root);
	expect_finding(im, "lies below itself: 100 mappings lost\n");
}

static void count_below_the_truth_is_fatal_and_above_a_leak(void)
{
	struct image *im = image_create();
	struct bs_check_result result;
	uint32_t bitmap = im->used - 2;

	bitmap_set(&im->blocks[bitmap].bitmap, 7, 0);
	bitmap_set(&im->blocks[bitmap].bitmap, 8, 2);
	char *text = check_text(im, &result);
	CHECK(strstr(text, "data block 7: count 0, expected 1\n"));
	CHECK(strstr(text, "data block 8: count 2, expected 1\n"));
	CHECK_EQ(result.fatal, 1);
	CHECK_EQ(result.leaks, 1);
	free(text);
	image_destroy(im);
}

static void shared_block_that_looks_unshared_is_fatal(void)
{
	struct image *im = image_create();
	uint32_t details = (uint32_t)le64_get(im->blocks[0].superblock.device_details_root);
	struct disk_device_details *value = (void *)(im->blocks[details].node.keys + btree_max_entries(24));

	value[2].creation_time = value[2].snapshotted_time = le32_of(0);
	expect_finding(im, "device 3: node");
}

static void needs_check_is_told(void)
{
	struct image *im = image_create();
	struct bs_check_result result;

	im->blocks[0].superblock.flags = le32_of(SUPERBLOCK_NEEDS_CHECK);
	free(check_text(im, &result));
	CHECK_EQ(result.needs_check, 1);
	CHECK_EQ(result.fatal, 0);
	image_destroy(im);
}

/* ---- hostile content */

static uint64_t interesting(uint64_t *state)
{
	static const uint64_t values[] = {0, 1, 2, 3, 84, 251, 252, 253, 255, 63, 64, 65, 1u << 24,
		UINT32_MAX, 1ull << 39, 1ull << 40, UINT64_MAX, UINT64_MAX >> 1, 16320};
	uint64_t pick = test_random(state);

	return pick % 3 ? values[pick / 3 % (sizeof(values) / sizeof(*values))]
			: test_random(state) % IMAGE_BLOCKS;
}

/* Headers, first keys and values and the superblock's fields are hit more often than the rest. */
static void mutate(struct image *im, uint64_t *state)
{
	uint32_t block = (uint32_t)(test_random(state) % im->used);
	uint64_t value = interesting(state);
	size_t limits[] = {48, 400, METADATA_BLOCK_SIZE};
	size_t width = test_random(state) % 2 ? 4 : 8;
	size_t offset = 4 + test_random(state) % (limits[test_random(state) % 3] - 4 - width);

	if (test_random(state) % 3)
		offset &= ~(width - 1);
	if (offset >= 4)
		memcpy(im->blocks[block].bytes + offset, &value, width);
}

static void run_all_walks(const char *path, int null)
{
	struct bs_check_result result;
	struct bs_delta_range ranges[4];
	struct bs_usage usage[2];

	bs_metadata_check(path, null, &result);
	bs_metadata_dump(path, 0, null);
	bs_metadata_delta(path, 0, 1, 2, null);
	bs_metadata_delta_ranges(path, 0, 2, 5, 101, ranges, 4);
	bs_metadata_usage(path, 0, usage, 2);
}

static void no_content_breaks_a_walk(void)
{
	struct image *sound = image_create(), *im = image_create();
	int fd = im->fd, null = open("/dev/null", O_WRONLY | O_CLOEXEC);
	uint64_t state = 42;
	char path[sizeof(im->path)];

	memcpy(path, im->path, sizeof(path));
	for (int i = 0; i < 2500; i++) {
		memcpy(im, sound, sizeof(*im));
		im->fd = fd;
		for (uint64_t n = 1 + test_random(&state) % 4; n > 0; n--)
			mutate(im, &state);
		image_write(im);
		run_all_walks(path, null);
	}
	close(null);
	image_destroy(im);
	image_destroy(sound);
}

static void every_truncation_is_survived(void)
{
	struct image *im = image_create();
	int null = open("/dev/null", O_WRONLY | O_CLOEXEC);

	image_write(im);
	for (int size = (int)(im->used + 1) * METADATA_BLOCK_SIZE; size >= 0; size -= 1999) {
		struct bs_check_result result;

		CHECK_EQ(ftruncate(im->fd, size), 0);
		int err = bs_metadata_check(im->path, null, &result);
		CHECK(err == -EMEDIUMTYPE ? size < (int)METADATA_BLOCK_SIZE : err == 0 && result.fatal > 0);
		run_all_walks(im->path, null);
	}
	close(null);
	image_destroy(im);
}

int main(void)
{
	RUN(sound_pool_is_clean);
	RUN(lost_mappings_are_counted_with_the_path);
	RUN(damage_in_a_shared_node_is_told_for_each_device);
	RUN(loop_is_found);
	RUN(count_below_the_truth_is_fatal_and_above_a_leak);
	RUN(shared_block_that_looks_unshared_is_fatal);
	RUN(needs_check_is_told);
	RUN(no_content_breaks_a_walk);
	RUN(every_truncation_is_survived);
	return 0;
}
