/* Pools filled bottom up, also with shapes that only the kernel leaves behind: sound, and changed rightly by the code
 * that writes pools. And where a pool ends: its last data block, and growth. */
#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#include "io.h"
#include "test.h"
#include "thin_rebuild.h"

#define METADATA_BLOCKS 4096

static struct io *new_metadata(void)
{
	struct io *io;

	CHECK_EQ(io_memory_create(METADATA_BLOCKS * METADATA_BLOCK_SIZE, &io), 0);
	return io;
}

static void expect_sound(struct io *io)
{
	struct bs_check_result result;
	char path[32];
	int fd = memfd_create("metadata", MFD_CLOEXEC);

	CHECK_EQ(write(fd, io_memory_data(io), io_size(io)), io_size(io));
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	CHECK_EQ(bs_metadata_check(path, 2, &result), 0);
	CHECK_EQ(result.fatal + result.leaks + result.warnings, 0);
	close(fd);
}

static uint64_t new_leaf(struct thin_metadata *md, uint64_t begin, uint32_t nr)
{
	uint64_t keys[252], packed[252], leaf;

	for (uint32_t i = 0; i < nr; i++) {
		keys[i] = begin + i;
		packed[i] = mapping_pack(begin + i, 0);
	}
	CHECK_EQ(thin_rebuild_leaf(md, keys, packed, nr, &leaf), 0);
	return leaf;
}

static void add_device(struct thin_metadata *md, uint64_t id, uint64_t root, uint64_t mapped)
{
	struct disk_device_details details = {
		.mapped_blocks = le64_of(mapped),
		.snapshotted_time = le32_of(1),
	};

	CHECK_EQ(thin_rebuild_device(md, id, root, &details), 0);
}

static struct thin_metadata *begin(struct io *io)
{
	const struct pool_facts facts = {128, 40000, 1, 7};
	struct thin_metadata *md;

	CHECK_EQ(thin_rebuild_begin(io, &facts, &md), 0);
	return md;
}

static void end(struct thin_metadata *md)
{
	CHECK_EQ(thin_rebuild_end(md), 0);
	thin_metadata_close(md);
}

static void half_of_a_pool_needs_a_check(void)
{
	struct io *io = new_metadata();
	struct thin_metadata *md = begin(io);
	struct thin_metadata_status status;

	for (uint32_t i = 0; i < 2100; i++)
		CHECK_EQ(thin_rebuild_drop(md, new_leaf(md, 100 * i % 30000, 100)), 0);
	thin_metadata_close(md);
	CHECK_EQ(thin_metadata_open(io, &md), 0);
	thin_metadata_status(md, &status);
	CHECK(status.needs_check);
	thin_metadata_close(md);
	io_close(io);
}

static void shared_nodes_are_counted(void)
{
	struct io *io = new_metadata();
	struct thin_metadata *md = begin(io);
	uint64_t keys[2] = {0, 100}, children[2] = {new_leaf(md, 0, 100), new_leaf(md, 100, 100)}, root;

	CHECK_EQ(thin_rebuild_internal(md, keys, children, 2, &root), 0);
	CHECK_EQ(thin_rebuild_share(md, root), 0);
	CHECK_EQ(thin_rebuild_share(md, children[0]), 0);
	add_device(md, 1, root, 200);
	add_device(md, 2, root, 200);
	add_device(md, 3, children[0], 100);
	end(md);
	expect_sound(io);
	io_close(io);
}

static void remove_mapping(struct thin_metadata *md, uint32_t id, uint64_t block)
{
	struct thin_device *device;

	CHECK_EQ(thin_device_get(md, id, &device), 0);
	CHECK_EQ(thin_remove(md, device, block), 1);
	thin_device_put(md, device);
}

/* The kernel's fixed bug "metadata refcount underflow". Its removals leave a root with one child; a snapshot shares
 * both; the child then takes the root's place in one of the two. */
static void only_child_that_is_shared_takes_the_place_of_its_root(void)
{
	struct io *io = new_metadata();
	struct thin_metadata *md = begin(io);
	uint64_t key = 0, leaf = new_leaf(md, 0, 150), root;

	CHECK_EQ(thin_rebuild_internal(md, &key, &leaf, 1, &root), 0);
	CHECK_EQ(thin_rebuild_share(md, root), 0);
	add_device(md, 1, root, 150);
	add_device(md, 2, root, 150);
	end(md);
	expect_sound(io);
	CHECK_EQ(thin_metadata_open(io, &md), 0);
	remove_mapping(md, 1, 70);
	CHECK_EQ(thin_metadata_commit(md), 0);
	thin_metadata_close(md);
	expect_sound(io);
	io_close(io);
}

/* ---- ends */

static void last_block_is_the_last(void)
{
	struct io *io = new_metadata();
	struct thin_metadata *md;
	uint64_t block, given_back;

	CHECK_EQ(thin_metadata_format(io, 128, 100), 0);
	CHECK_EQ(thin_metadata_open(io, &md), 0);
	/* One that was handed out and given back is found again, not one behind the end. */
	CHECK_EQ(thin_reserve(md, &given_back), 0);
	for (int i = 1; i < 100; i++) {
		CHECK_EQ(thin_reserve(md, &block), 0);
		CHECK(block < 100);
	}
	thin_unreserve(md, given_back);
	CHECK_EQ(thin_reserve(md, &block), 0);
	CHECK_EQ(block, given_back);
	CHECK_EQ(thin_reserve(md, &block), -ENOSPC);
	thin_metadata_close(md);
	io_close(io);
}

static void grow_to(uint64_t metadata_blocks, uint64_t data_blocks)
{
	struct io *io = new_metadata();
	struct thin_metadata *md;
	struct thin_metadata_status status;

	CHECK_EQ(thin_metadata_format(io, 128, 100), 0);
	CHECK_EQ(thin_metadata_open(io, &md), 0);
	CHECK_EQ(thin_metadata_extend(md, metadata_blocks, data_blocks), 0);
	CHECK_EQ(thin_metadata_commit(md), 0);
	thin_metadata_close(md);
	expect_sound(io);
	CHECK_EQ(thin_metadata_open(io, &md), 0);
	thin_metadata_status(md, &status);
	CHECK_EQ(status.data_blocks, data_blocks);
	CHECK_EQ(status.data_free, data_blocks);
	thin_metadata_close(md);
	io_close(io);
}

static void grown_pools_have_all_their_bitmaps(void)
{
	static const uint64_t sizes[] = {101, 16319, 16320, 16321, 5 * 16320, 5 * 16320 + 1, 1000000};

	for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); i++)
		grow_to(METADATA_BLOCKS, sizes[i]);
}

int main(void)
{
	RUN(half_of_a_pool_needs_a_check);
	RUN(shared_nodes_are_counted);
	RUN(only_child_that_is_shared_takes_the_place_of_its_root);
	RUN(last_block_is_the_last);
	RUN(grown_pools_have_all_their_bitmaps);
	return 0;
}
