/* Metadata blocks through the cache: what is written comes back, however many neighbours a write has, and nothing is
 * believed that does not carry its own number and checksum. */
#include <errno.h>

#include "block_manager.h"
#include "test.h"

#define BLOCKS 1024

static const struct bm_validator validator = {"test block", BITMAP_SALT, NULL};

static void fill(struct block_manager *bm, uint64_t nr)
{
	struct bm_block *b;

	CHECK_EQ(bm_new(bm, nr, &validator, &b), 0);
	memset(b->data + 16, (int)(nr % 251), METADATA_BLOCK_SIZE - 16);
}

static void expect(struct block_manager *bm, uint64_t nr)
{
	struct bm_block *b;

	CHECK_EQ(bm_read(bm, nr, &validator, &b), 0);
	CHECK_EQ(b->data[16], nr % 251);
	CHECK_EQ(b->data[METADATA_BLOCK_SIZE - 1], nr % 251);
}

static void runs_of_any_length_reach_the_disk(void)
{
	static const uint64_t lengths[] = {1, 2, 63, 64, 65, 127, 128, 129, 200};
	struct block_manager *bm;
	struct io *io;
	uint64_t begin = 1, before;

	CHECK_EQ(io_memory_create(BLOCKS * METADATA_BLOCK_SIZE, &io), 0);
	CHECK_EQ(bm_create(io, BLOCKS, 16, &bm), 0);
	for (size_t i = 0; i < sizeof(lengths) / sizeof(*lengths); i++) {
		for (uint64_t nr = begin; nr < begin + lengths[i]; nr++)
			fill(bm, nr);
		before = io->written_bytes;
		CHECK_EQ(bm_write_dirty(bm), 0);
		CHECK_EQ(io->written_bytes - before, lengths[i] * METADATA_BLOCK_SIZE);
		bm_reset(bm);
		for (uint64_t nr = begin; nr < begin + lengths[i]; nr++)
			expect(bm, nr);
		begin += lengths[i] + 1;
	}
	bm_destroy(bm);
	io_close(io);
}

static void forgotten_blocks_are_not_written(void)
{
	struct block_manager *bm;
	struct io *io;

	CHECK_EQ(io_memory_create(BLOCKS * METADATA_BLOCK_SIZE, &io), 0);
	CHECK_EQ(bm_create(io, BLOCKS, 16, &bm), 0);
	fill(bm, 5);
	fill(bm, 6);
	bm_forget(bm, 5);
	CHECK_EQ(bm_write_dirty(bm), 0);
	CHECK_EQ(io->written_bytes, METADATA_BLOCK_SIZE);
	CHECK_EQ(((char *)io_memory_data(io))[5 * METADATA_BLOCK_SIZE + 100], 0);
	bm_destroy(bm);
	io_close(io);
}

static void blocks_of_another_place_or_content_are_refused(void)
{
	struct block_manager *bm;
	struct bm_block *b;
	struct io *io;

	CHECK_EQ(io_memory_create(BLOCKS * METADATA_BLOCK_SIZE, &io), 0);
	CHECK_EQ(bm_create(io, BLOCKS, 16, &bm), 0);
	fill(bm, 7);
	CHECK_EQ(bm_write_dirty(bm), 0);
	bm_reset(bm);
	char *content = io_memory_data(io);
	memcpy(content + 8 * METADATA_BLOCK_SIZE, content + 7 * METADATA_BLOCK_SIZE, METADATA_BLOCK_SIZE);
	CHECK_EQ(bm_read(bm, 8, &validator, &b), -ENOTBLK);
	content[7 * METADATA_BLOCK_SIZE + 99] ^= 4;
	CHECK_EQ(bm_read(bm, 7, &validator, &b), -EILSEQ);
	CHECK_EQ(bm_read(bm, 0, &validator, &b), -EUCLEAN);
	CHECK_EQ(bm_read(bm, BLOCKS, &validator, &b), -EUCLEAN);
	bm_destroy(bm);
	io_close(io);
}

int main(void)
{
	RUN(runs_of_any_length_reach_the_disk);
	RUN(forgotten_blocks_are_not_written);
	RUN(blocks_of_another_place_or_content_are_refused);
	return 0;
}
