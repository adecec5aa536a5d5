/* Mapped and exclusive blocks where roots, leaves and data blocks are shared. */
#include <errno.h>

#include "thin_image.h"

static void blocks_that_one_device_reaches_are_exclusive(void)
{
	struct image *im = image_create();
	struct bs_usage usage[IMAGE_DEVICES];
	static const uint64_t expected[IMAGE_DEVICES][2] = {
		{200, 0}, {200, 100}, {200, 0}, {200, 0}, {3, 0}, {3, 0}};

	image_write(im);
	CHECK_EQ(bs_metadata_usage(im->path, 0, usage, IMAGE_DEVICES), IMAGE_DEVICES);
	for (int i = 0; i < IMAGE_DEVICES; i++) {
		CHECK_EQ(usage[i].id, i + 1);
		CHECK_EQ(usage[i].mapped_blocks, expected[i][0]);
		CHECK_EQ(usage[i].exclusive_blocks, expected[i][1]);
	}
	image_destroy(im);
}

static void number_of_devices_is_told_beyond_capacity(void)
{
	struct image *im = image_create();
	struct bs_usage usage[2] = {{.id = 0}, {.id = 77}};

	image_write(im);
	CHECK_EQ(bs_metadata_usage(im->path, 0, usage, 1), IMAGE_DEVICES);
	CHECK_EQ(usage[0].id, 1);
	CHECK_EQ(usage[1].id, 77);
	CHECK_EQ(bs_metadata_usage(im->path, 0, NULL, 0), IMAGE_DEVICES);
	image_destroy(im);
}

static void mapping_beyond_the_data_device_is_refused(void)
{
	struct image *im = image_create();

	im->blocks[im->leaf_c].node.keys[252] = le64_of(mapping_pack(IMAGE_DATA_BLOCKS, 1));
	image_write(im);
	CHECK_EQ(bs_metadata_usage(im->path, 0, NULL, 0), -EILSEQ);
	CHECK(strstr(bs_last_error(), "thin block 100 is mapped to data block 400 of 400"));
	image_destroy(im);
}

int main(void)
{
	RUN(blocks_that_one_device_reaches_are_exclusive);
	RUN(number_of_devices_is_told_beyond_capacity);
	RUN(mapping_beyond_the_data_device_is_refused);
	return 0;
}
