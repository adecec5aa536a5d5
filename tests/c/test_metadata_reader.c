/* Opening, look-ups and walks over checked nodes. */
#include <errno.h>

#include "metadata_reader.h"
#include "thin_image.h"

static struct metadata_reader open_image(struct image *im)
{
	struct metadata_reader r;

	image_write(im);
	CHECK_EQ(metadata_reader_open(&r, im->path, false), 0);
	return r;
}

static void expect_refusal(struct image *im, int err, const char *message)
{
	struct metadata_reader r;

	image_write(im);
	CHECK_EQ(metadata_reader_open(&r, im->path, false), err);
	CHECK(strstr(bs_last_error(), message));
	CHECK(strncmp(bs_last_error(), im->path, strlen(im->path)) == 0);
	metadata_reader_deinit(&r);
	image_destroy(im);
}

static void foreign_and_empty_files_are_no_pools(void)
{
	struct image *im = image_create();
	im->blocks[0].superblock.magic = le64_of(1);
	expect_refusal(im, -EMEDIUMTYPE, "the magic number is 1");

	im = image_create();
	im->blocks[0].superblock.version = le32_of(3);
	expect_refusal(im, -EMEDIUMTYPE, "version 3");

	im = image_create();
	im->blocks[0].superblock.blocknr = le64_of(4);
	expect_refusal(im, -ENOTBLK, "says that it is block 4");

	im = image_create();
	im->blocks[0].superblock.metadata_sm_root.nr_blocks = le64_of(IMAGE_BLOCKS + 1);
	expect_refusal(im, -EILSEQ, "truncated: it holds 64 blocks, the superblock says 65");
}

static void absent_file_leaves_nothing_to_free(void)
{
	struct metadata_reader r;

	CHECK_EQ(metadata_reader_open(&r, "/nonexistent/metadata", false), -ENOENT);
	metadata_reader_deinit(&r);
}

static void leaves_come_in_order(void)
{
	struct image *im = image_create();
	struct metadata_reader r = open_image(im);
	struct leaf_walk walk;
	const struct disk_node *leaf;

	CHECK_EQ(leaf_walk_init(&walk, &r, im->device_2_root, 8), 0);
	CHECK_EQ(leaf_walk_next(&walk, &leaf), 1);
	CHECK_EQ(node_key(leaf, 0), 0);
	CHECK_EQ(leaf_walk_next(&walk, &leaf), 1);
	CHECK_EQ(node_key(leaf, 99), 199);
	CHECK_EQ(leaf_walk_next(&walk, &leaf), 0);
	CHECK_EQ(leaf_walk_next(&walk, &leaf), 0);
	leaf_walk_deinit(&walk);
	metadata_reader_deinit(&r);
	image_destroy(im);
}

static void keys_outside_the_parents_range_end_a_walk(void)
{
	struct image *im = image_create();
	im->blocks[im->device_2_root].node.keys[1] = le64_of(99);
	struct metadata_reader r = open_image(im);
	struct leaf_walk walk;
	const struct disk_node *leaf;

	CHECK_EQ(leaf_walk_init(&walk, &r, im->device_2_root, 8), 0);
	CHECK_EQ(leaf_walk_next(&walk, &leaf), -EILSEQ);
	CHECK(strstr(bs_last_error(), "leave the range 0..98 of its parent"));
	leaf_walk_deinit(&walk);
	metadata_reader_deinit(&r);
	image_destroy(im);
}

static void cycle_ends_a_walk(void)
{
	struct image *im = image_create();
	struct disk_node *root = &im->blocks[im->device_2_root].node;
	struct leaf_walk walk;
	const struct disk_node *leaf;

	root->nr_entries = le32_of(1);
	root->keys[252] = le64_of(im->device_2_root);
	struct metadata_reader r = open_image(im);
	CHECK_EQ(leaf_walk_init(&walk, &r, im->device_2_root, 8), 0);
	CHECK_EQ(leaf_walk_next(&walk, &leaf), -EILSEQ);
	CHECK(strstr(bs_last_error(), "deeper than 12"));
	leaf_walk_deinit(&walk);
	struct le64 value;
	CHECK_EQ(metadata_lookup(&r, im->device_2_root, 8, 5, &value), -EILSEQ);
	metadata_reader_deinit(&r);
	image_destroy(im);
}

static void look_ups_find_values_and_holes(void)
{
	struct image *im = image_create();
	struct metadata_reader r = open_image(im);
	struct le64 value;
	uint64_t root;

	CHECK_EQ(metadata_lookup(&r, im->device_2_root, 8, 150, &value), 1);
	CHECK_EQ(mapping_block(le64_get(value)), 250);
	CHECK_EQ(metadata_lookup(&r, im->device_2_root, 8, 200, &value), 0);
	CHECK_EQ(metadata_device_root(&r, 2, &root), 0);
	CHECK_EQ(root, im->device_2_root);
	CHECK_EQ(metadata_device_root(&r, 0, &root), -ENODATA);
	metadata_reader_deinit(&r);
	image_destroy(im);
}

static void batches_skip_what_cannot_be_read(void)
{
	struct image *im = image_create();
	struct metadata_reader r = open_image(im);
	const uint64_t blocks[] = {im->leaf_c, 0, im->leaf_b, UINT64_MAX, IMAGE_BLOCKS, 1};
	char *buffer = malloc(6 * METADATA_BLOCK_SIZE);
	bool ok[6];

	metadata_read_batch(&r, blocks, 6, buffer, ok);
	for (int i = 0; i < 6; i++) {
		CHECK_EQ(ok[i], i == 0 || i == 2 || i == 5);
		if (ok[i])
			CHECK(memcmp(buffer + i * METADATA_BLOCK_SIZE, &im->blocks[blocks[i]],
				      METADATA_BLOCK_SIZE) == 0);
	}
	free(buffer);
	metadata_reader_deinit(&r);
	image_destroy(im);
}

int main(void)
{
	RUN(foreign_and_empty_files_are_no_pools);
	RUN(absent_file_leaves_nothing_to_free);
	RUN(leaves_come_in_order);
	RUN(keys_outside_the_parents_range_end_a_walk);
	RUN(cycle_ends_a_walk);
	RUN(look_ups_find_values_and_holes);
	RUN(batches_skip_what_cannot_be_read);
	return 0;
}
