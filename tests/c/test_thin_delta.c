/* Differences as text and as ranges; what both sides share is not read. */
#include <errno.h>

#include "thin_image.h"

static void text_has_same_and_different_ranges(void)
{
	struct image *im = image_create();
	int fd = memfd_create("delta", MFD_CLOEXEC);

	image_write(im);
	CHECK_EQ(bs_metadata_delta(im->path, 0, 1, 2, fd), 0);
	char *text = text_of(fd);
	CHECK(strcmp(text, "<superblock uuid=\"\" time=\"3\" transaction=\"9\" data_block_size=\"128\" "
			   "nr_data_blocks=\"400\">\n"
			   "  <diff left=\"1\" right=\"2\">\n"
			   "    <same begin=\"0\" length=\"100\"/>\n"
			   "    <different begin=\"100\" length=\"100\"/>\n"
			   "  </diff>\n"
			   "</superblock>\n") == 0);
	free(text);
	image_destroy(im);
}

static void ranges_leave_out_what_is_the_same(void)
{
	struct image *im = image_create();
	struct bs_delta_range ranges[8];

	image_write(im);
	CHECK_EQ(bs_metadata_delta_ranges(im->path, 0, 1, 2, 0, ranges, 8), 1);
	CHECK_EQ(ranges[0].thin_begin, 100);
	CHECK_EQ(ranges[0].length, 100);
	CHECK_EQ(ranges[0].kind, BS_DELTA_DIFFERENT);
	CHECK_EQ(bs_metadata_delta_ranges(im->path, 0, 1, 3, 0, ranges, 8), 0);
	CHECK_EQ(bs_metadata_delta_ranges(im->path, 0, 5, 6, 0, ranges, 8), 0);
	image_destroy(im);
}

static void ranges_go_on_where_the_last_call_ended(void)
{
	struct image *im = image_create();
	struct bs_delta_range one;

	image_write(im);
	CHECK_EQ(bs_metadata_delta_ranges(im->path, 0, 1, 5, 0, &one, 1), 1);
	CHECK_EQ(one.thin_begin, 0);
	CHECK_EQ(one.length, 100);
	CHECK_EQ(one.kind, BS_DELTA_LEFT_ONLY);
	CHECK_EQ(bs_metadata_delta_ranges(im->path, 0, 1, 5, 100, &one, 1), 1);
	CHECK_EQ(one.thin_begin, 103);
	CHECK_EQ(one.length, 97);
	CHECK_EQ(bs_metadata_delta_ranges(im->path, 0, 5, 1, 150, &one, 1), 1);
	CHECK_EQ(one.thin_begin, 150);
	CHECK_EQ(one.length, 50);
	CHECK_EQ(one.kind, BS_DELTA_RIGHT_ONLY);
	CHECK_EQ(bs_metadata_delta_ranges(im->path, 0, 1, 5, 200, &one, 1), 0);
	image_destroy(im);
}

static void shared_subtrees_are_not_read(void)
{
	struct image *im = image_create();
	struct bs_delta_range ranges[8];
	uint32_t leaf_a = im->leaf_b - 1;

	im->blocks[leaf_a].node.flags = le32_of(0);
	image_write(im);
	CHECK_EQ(bs_metadata_delta_ranges(im->path, 0, 1, 2, 0, ranges, 8), 1);
	CHECK_EQ(bs_metadata_delta_ranges(im->path, 0, 1, 5, 0, ranges, 8), -EILSEQ);
	image_destroy(im);
}

static void absent_device_is_named(void)
{
	struct image *im = image_create();
	struct bs_delta_range one;

	image_write(im);
	CHECK_EQ(bs_metadata_delta_ranges(im->path, 0, 1, 7, 0, &one, 1), -ENODATA);
	CHECK(strstr(bs_last_error(), "there is no thin device 7"));
	image_destroy(im);
}

int main(void)
{
	RUN(text_has_same_and_different_ranges);
	RUN(ranges_leave_out_what_is_the_same);
	RUN(ranges_go_on_where_the_last_call_ended);
	RUN(shared_subtrees_are_not_read);
	RUN(absent_device_is_named);
	return 0;
}
