/* Repair: a sound pool comes out as it went in, what can be read of a damaged one is saved and the rest is told, a
 * lost superblock is found again among all that older commits left, and no content breaks it.
 *
 *   test_thin_repair [ROUNDS [SEED]]     of random changes
 */
#include <errno.h>
#include <fcntl.h>

#include "io.h"
#include "thin_image.h"
#include "thin_metadata.h"

#define OUTPUT_BLOCKS 512

struct repaired {
	int fd;
	char path[32];
	struct bs_repair_result result;
	char *text;
};

static void open_output(struct repaired *out, uint64_t blocks)
{
	out->fd = memfd_create("repaired", MFD_CLOEXEC);
	CHECK(out->fd >= 0);
	CHECK_EQ(ftruncate(out->fd, blocks * METADATA_BLOCK_SIZE), 0);
	snprintf(out->path, sizeof(out->path), "/proc/self/fd/%d", out->fd);
}

static int repair(
	const char *path, const struct bs_repair_options *options, uint64_t blocks, struct repaired *out)
{
	int fd = memfd_create("lines", MFD_CLOEXEC);

	open_output(out, blocks);
	int err = bs_metadata_repair(path, out->path, options, fd, &out->result);
	out->text = text_of(fd);
	return err;
}

static void close_output(struct repaired *out)
{
	close(out->fd);
	free(out->text);
}

static char *dump_of(const char *path)
{
	int fd = memfd_create("dump", MFD_CLOEXEC);

	CHECK_EQ(bs_metadata_dump(path, 0, fd), 0);
	return text_of(fd);
}

static void expect_clean(const char *path)
{
	struct bs_check_result result;
	int fd = memfd_create("findings", MFD_CLOEXEC);

	CHECK_EQ(bs_metadata_check(path, fd, &result), 0);
	char *text = text_of(fd);
	if (result.fatal + result.leaks > 0)
		fputs(text, stderr);
	CHECK_EQ(result.fatal + result.leaks, 0);
	free(text);
}

static struct repaired repair_image(struct image *im)
{
	struct bs_repair_options options = {0};
	struct repaired out;

	image_write(im);
	CHECK_EQ(repair(im->path, &options, OUTPUT_BLOCKS, &out), 0);
	expect_clean(out.path);
	return out;
}

static void sound_pool_comes_out_as_it_went_in(void)
{
	struct image *im = image_create();
	struct repaired out = repair_image(im);
	char *before = dump_of(im->path), *after = dump_of(out.path);

	CHECK(strcmp(before, after) == 0);
	CHECK_EQ(out.result.devices, IMAGE_DEVICES);
	CHECK_EQ(out.result.losses + out.result.devices_lost + out.result.changes, 0);
	free(before);
	free(after);
	close_output(&out);
	image_destroy(im);
}

static void shared_nodes_stay_shared(void)
{
	struct image *im = image_create();
	struct repaired out = repair_image(im);
	struct bs_check_result before, after;

	CHECK_EQ(bs_metadata_check(im->path, 2, &before), 0);
	CHECK_EQ(bs_metadata_check(out.path, 2, &after), 0);
	CHECK_EQ(before.metadata_blocks_used, after.metadata_blocks_used);
	close_output(&out);
	image_destroy(im);
}

static void lost_leaf_is_told_by_range_and_the_rest_is_saved(void)
{
	struct image *im = image_create();

	im->blocks[im->leaf_c].node.flags = le32_of(3);
	struct repaired out = repair_image(im);
	CHECK(strstr(out.text, "lost\t2\t100\t18446744073709551615\tflags of block"));
	CHECK(strstr(out.text, "device\t2\t100\t200\t-\n"));
	CHECK_EQ(out.result.losses, 1);
	CHECK_EQ(out.result.mappings, 3 * 200 + 100 + 2 * 3);
	close_output(&out);
	image_destroy(im);
}

static void leaf_of_too_few_mappings_joins_its_neighbour(void)
{
	struct image *im = image_create();
	struct disk_node *leaf = &im->blocks[im->leaf_c].node;

	/* Of its 100 mappings 30 name blocks that the pool does not have. */
	for (int i = 10; i < 40; i++)
		((struct le64 *)(leaf->keys + 252))[i] = le64_of(mapping_pack(5000, 1));
	struct repaired out = repair_image(im);
	CHECK(strstr(out.text, "lost\t2\t110\t139\t30 of the mappings"));
	CHECK(strstr(out.text, "device\t2\t170\t200\t-\n"));
	close_output(&out);
	image_destroy(im);
}

static void set_second_child(struct image *im, uint32_t block, uint32_t child)
{
	((struct le64 *)(im->blocks[block].node.keys + 252))[1] = le64_of(child);
}

/* From the root of device 1 the root of device 2 has one child; by itself it has two, of the same first key. */
static void roots_below_each_other_are_put_together_anew(void)
{
	struct image *im = image_create();
	uint32_t device_1_root = im->device_2_root - 1;

	set_second_child(im, device_1_root, im->device_2_root);
	set_second_child(im, im->device_2_root, device_1_root);
	struct repaired out = repair_image(im);
	CHECK(strstr(out.text, "lies below itself"));
	CHECK(strstr(out.text, "device\t1\t100\t200\t-\n"));
	CHECK(strstr(out.text, "device\t2\t100\t200\t-\n"));
	close_output(&out);
	image_destroy(im);
}

static void device_without_mappings_that_had_some_is_gone(void)
{
	struct image *im = image_create();

	im->blocks[im->device_2_root].node.nr_entries = le32_of(0);
	struct repaired out = repair_image(im);
	CHECK(strstr(out.text, "gone\t2\t-\t200\tmapping tree: internal node"));
	CHECK_EQ(out.result.devices_lost, 1);
	CHECK_EQ(out.result.devices, IMAGE_DEVICES - 1);
	close_output(&out);
	image_destroy(im);
}

static void damaged_metadata_are_not_taken_as_output(void)
{
	struct image *im = image_create();
	struct bs_repair_options options = {0};
	struct bs_repair_result result;

	image_write(im);
	CHECK_EQ(bs_metadata_repair(im->path, im->path, &options, 2, &result), -EINVAL);
	image_destroy(im);
}

static void output_that_is_too_small_is_told(void)
{
	struct image *im = image_create();
	struct bs_repair_options options = {0};
	struct repaired out;

	image_write(im);
	CHECK_EQ(repair(im->path, &options, 12, &out), -ENOSPC);
	close_output(&out);
	image_destroy(im);
}

static void features_of_later_versions_are_refused(void)
{
	struct image *im = image_create();
	struct bs_repair_options options = {0};
	struct repaired out;

	im->blocks[0].superblock.incompat_flags = le32_of(1);
	image_write(im);
	CHECK_EQ(repair(im->path, &options, OUTPUT_BLOCKS, &out), -EOPNOTSUPP);
	close_output(&out);
	image_destroy(im);
}

static void lost_superblock_needs_the_block_size(void)
{
	struct image *im = image_create();
	struct bs_repair_options options = {0};
	static const char zeros[METADATA_BLOCK_SIZE];
	struct repaired out;

	image_write(im);
	CHECK_EQ(pwrite(im->fd, zeros, sizeof(zeros), 0), (ssize_t)sizeof(zeros));
	CHECK_EQ(repair(im->path, &options, OUTPUT_BLOCKS, &out), -EINVAL);
	close_output(&out);
	options = (struct bs_repair_options){.block_size = 65536, .data_bytes = IMAGE_DATA_BLOCKS * 65536ull};
	CHECK_EQ(repair(im->path, &options, OUTPUT_BLOCKS, &out), 0);
	expect_clean(out.path);
	CHECK_EQ(out.result.roots_found, 1);
	CHECK_EQ(out.result.devices, IMAGE_DEVICES);
	CHECK_EQ(out.result.losses, 0);
	close_output(&out);
	image_destroy(im);
}

/* ---- pools with a history */

#define POOL_BLOCKS 2048
#define POOL_DATA_BLOCKS 40000

static void write_blocks(struct thin_metadata *md, uint32_t id, uint64_t begin, uint64_t nr)
{
	struct thin_device *device;
	uint64_t packed, data;
	bool shared;

	CHECK_EQ(thin_device_get(md, id, &device), 0);
	for (uint64_t b = begin; b < begin + nr; b++)
		if (thin_lookup(md, device, b, &packed, &shared) == 0 || shared) {
			CHECK_EQ(thin_reserve(md, &data), 0);
			CHECK_EQ(thin_insert(md, device, b, data, &packed), 0);
		}
	thin_device_put(md, device);
}

static void commit(struct thin_metadata *md)
{
	CHECK_EQ(thin_metadata_commit(md), 0);
}

/* Snapshots, writes and deletions over many commits: older trees lie everywhere. */
static void make_history(struct io *io, uint64_t seed, uint32_t nr_devices)
{
	struct thin_metadata *md;

	CHECK_EQ(thin_metadata_format(io, 128, POOL_DATA_BLOCKS), 0);
	CHECK_EQ(thin_metadata_open(io, &md), 0);
	CHECK_EQ(thin_create(md, 0), 0);
	write_blocks(md, 0, 0, 1000);
	commit(md);
	for (uint32_t id = 1; id < nr_devices; id++) {
		CHECK_EQ(thin_create_snapshot(md, id, test_random(&seed) % id), 0);
		CHECK_EQ(thin_metadata_set_transaction_id(md, id - 1, id), 0);
		commit(md);
		for (int i = 0; i < 3; i++) {
			write_blocks(md, test_random(&seed) % (id + 1), test_random(&seed) % 1000, 30);
			commit(md);
		}
	}
	thin_metadata_close(md);
}

static int image_fd(struct io *io, char path[32])
{
	int fd = memfd_create("pool", MFD_CLOEXEC);

	CHECK_EQ(write(fd, io_memory_data(io), io_size(io)), io_size(io));
	snprintf(path, 32, "/proc/self/fd/%d", fd);
	return fd;
}

static void lost_superblock_is_found_again(void)
{
	static const char zeros[METADATA_BLOCK_SIZE];
	struct bs_repair_options options = {65536, POOL_DATA_BLOCKS * 65536ull, 0};

	for (uint64_t seed = 1; seed <= 20; seed++) {
		uint32_t nr_devices = seed == 20 ? 300 : 2 + seed;
		struct repaired out;
		struct io *io;
		char path[32];

		CHECK_EQ(io_memory_create(POOL_BLOCKS * METADATA_BLOCK_SIZE, &io), 0);
		make_history(io, seed, nr_devices);
		int fd = image_fd(io, path);
		char *before = dump_of(path);
		CHECK_EQ(pwrite(fd, zeros, sizeof(zeros), 0), (ssize_t)sizeof(zeros));
		CHECK_EQ(repair(path, &options, POOL_BLOCKS, &out), 0);
		expect_clean(out.path);
		char *after = dump_of(out.path);
		/* The transaction id is the last device's; the rest must be equal from the first device on. */
		if (strcmp(strchr(before, '\n'), strchr(after, '\n'))) {
			fprintf(stderr, "seed %" PRIu64 ": %s", seed, out.text);
			CHECK(!"another state was found");
		}
		CHECK_EQ(out.result.losses + out.result.devices_lost, 0);
		free(before);
		free(after);
		close_output(&out);
		close(fd);
		io_close(io);
	}
}

static void reseal(unsigned char *block)
{
	static const uint32_t salts[] = {BTREE_NODE_SALT, SUPERBLOCK_SALT, BITMAP_SALT, INDEX_SALT};
	uint32_t best = block[16] % 4;

	memcpy(block, &(struct le32){htole32(block_checksum(block, salts[best]))}, 4);
}

static uint32_t salt_of(const unsigned char *block)
{
	static const uint32_t salts[] = {BTREE_NODE_SALT, SUPERBLOCK_SALT, BITMAP_SALT, INDEX_SALT};
	const struct le32 *csum = (const struct le32 *)block;

	for (int i = 0; i < 4; i++)
		if (le32_get(*csum) == block_checksum(block, salts[i]))
			return salts[i];
	return 0;
}

static void change_block(unsigned char *block, uint64_t *seed)
{
	uint32_t salt = salt_of(block);
	uint64_t offset = test_random(seed) % 2 ? 4 + test_random(seed) % 76 : 4 + test_random(seed) % 4092;
	uint64_t nr = test_random(seed) % 60, other = test_random(seed) % 60, node = test_random(seed) % 200;

	if (test_random(seed) % 3 == 0) /* a key of this node in another place */
		memcpy(block + 32 + 8 * nr, block + 32 + 8 * other, 8);
	else if (test_random(seed) % 3 == 0) /* a pointer to another node */
		memcpy(block + 2048 + 8 * nr, &(struct le64){htole64(node)}, 8);
	else
		block[offset] ^= 1u << test_random(seed) % 8;
	if (salt)
		*(struct le32 *)block = le32_of(block_checksum(block, salt));
	else if (test_random(seed) % 4 == 0)
		reseal(block);
}

static int rounds = 400;
static uint64_t first_seed = 7;

/* Whatever comes out is sound, or there is one clear error. */
static void changes_under_right_checksums_are_survived(void)
{
	struct bs_repair_options options = {65536, POOL_DATA_BLOCKS * 65536ull, 0};
	struct io *io;
	uint64_t seed = first_seed, saved = 0;

	CHECK_EQ(io_memory_create(POOL_BLOCKS * METADATA_BLOCK_SIZE, &io), 0);
	make_history(io, 3, 12);
	for (int round = 0; round < rounds; round++) {
		struct repaired out;
		char path[32];
		int fd = image_fd(io, path);

		for (uint64_t i = 0, nr = 1 + test_random(&seed) % 12; i < nr; i++) {
			unsigned char block[METADATA_BLOCK_SIZE];
			off_t at = (off_t)(test_random(&seed) % (i % 8 ? 200 : 4)) * METADATA_BLOCK_SIZE;

			CHECK_EQ(pread(fd, block, sizeof(block), at), (ssize_t)sizeof(block));
			change_block(block, &seed);
			CHECK_EQ(pwrite(fd, block, sizeof(block), at), (ssize_t)sizeof(block));
		}
		int err = repair(path, &options, POOL_BLOCKS, &out);
		CHECK(err == 0 || err == -EOPNOTSUPP || err == -EILSEQ || err == -EINVAL);
		if (err == 0) {
			expect_clean(out.path);
			saved++;
		}
		close_output(&out);
		close(fd);
	}
	CHECK(saved * 2 > (uint64_t)rounds);
	io_close(io);
}

int main(int argc, char **argv)
{
	rounds = argc > 1 ? atoi(argv[1]) : rounds;
	first_seed = argc > 2 ? strtoull(argv[2], NULL, 10) : first_seed;
	RUN(sound_pool_comes_out_as_it_went_in);
	RUN(shared_nodes_stay_shared);
	RUN(lost_leaf_is_told_by_range_and_the_rest_is_saved);
	RUN(leaf_of_too_few_mappings_joins_its_neighbour);
	RUN(roots_below_each_other_are_put_together_anew);
	RUN(device_without_mappings_that_had_some_is_gone);
	RUN(damaged_metadata_are_not_taken_as_output);
	RUN(output_that_is_too_small_is_told);
	RUN(features_of_later_versions_are_refused);
	RUN(lost_superblock_needs_the_block_size);
	RUN(lost_superblock_is_found_again);
	RUN(changes_under_right_checksums_are_survived);
	return 0;
}
