/* The copy-on-write model: what each kind of request does to blocks, by small cases that are counted by hand. */
#include <errno.h>

#include "test.h"

#define KIB 1024ull
#define MIB (1024 * KIB)
#define GIB (1024 * MIB)
#define TIB (1024 * GIB)

static const uint64_t sizes[] = {4 * KIB, 64 * KIB, MIB};

static struct bs_cow_model *make(struct bs_cow_options options)
{
	struct bs_cow_model *model;

	CHECK_EQ(bs_cow_model_create(sizes, 3, &options, &model), 0);
	return model;
}

static struct bs_cow_model *on_parent(void)
{
	return make((struct bs_cow_options){0});
}

static struct bs_cow_model *fresh(void)
{
	return make((struct bs_cow_options){.flags = BS_COW_FRESH});
}

static int feed(struct bs_cow_model *model, uint32_t kind, uint64_t offset, uint64_t length)
{
	return bs_cow_model_feed(
		model, &(struct bs_request){.kind = kind, .offset = offset, .length = length}, 1);
}

static void write_to(struct bs_cow_model *model, uint64_t offset, uint64_t length)
{
	CHECK_EQ(feed(model, BS_REQUEST_WRITE, offset, length), 0);
}

static void discard(struct bs_cow_model *model, uint64_t offset, uint64_t length)
{
	CHECK_EQ(feed(model, BS_REQUEST_DISCARD, offset, length), 0);
}

static struct bs_cow_result result(struct bs_cow_model *model, int size)
{
	struct bs_cow_result found[3];

	CHECK_EQ(bs_cow_model_results(model, found, 3), 3);
	CHECK_EQ(found[size].block_size, sizes[size]);
	return found[size];
}

static struct bs_cow_epoch epoch(struct bs_cow_model *model, int size, uint64_t number)
{
	struct bs_cow_epoch found;

	CHECK_EQ(bs_cow_model_epochs(model, size, number, &found, 1), 1);
	return found;
}

static void test_a_partly_written_shared_block_is_copied_once(void)
{
	struct bs_cow_model *model = on_parent();

	write_to(model, 5000, 10);
	write_to(model, 5000, 100);
	CHECK_EQ(result(model, 0).blocks_copied, 1);
	CHECK_EQ(result(model, 0).copied_bytes, 4 * KIB - 10);
	CHECK_EQ(result(model, 2).blocks_copied, 1);
	CHECK_EQ(result(model, 2).copied_bytes, MIB - 10);
	CHECK_EQ(result(model, 2).blocks_overwritten + result(model, 2).blocks_provisioned, 0);
	bs_cow_model_destroy(model);
}

static void test_a_write_that_covers_blocks_copies_only_its_ends(void)
{
	struct bs_cow_model *model = on_parent();

	write_to(model, 60 * KIB + 1, 200 * KIB);
	/* 64K blocks 0 to 4, of which the first and the last are covered in part. */
	CHECK_EQ(result(model, 1).blocks_copied, 2);
	CHECK_EQ(result(model, 1).blocks_overwritten, 3);
	CHECK_EQ(result(model, 1).copied_bytes, 2 * 64 * KIB - (4 * KIB - 1) - (4 * KIB + 1));
	CHECK_EQ(result(model, 0).blocks_copied, 2);
	CHECK_EQ(result(model, 0).blocks_overwritten, 49);
	bs_cow_model_destroy(model);
}

static void test_a_hole_is_provisioned_and_filled_with_zeros(void)
{
	struct bs_cow_model *model = fresh();

	write_to(model, 0, 4 * KIB);
	CHECK_EQ(result(model, 0).blocks_provisioned, 1);
	CHECK_EQ(result(model, 0).zero_filled_bytes, 0);
	CHECK_EQ(result(model, 1).blocks_provisioned, 1);
	CHECK_EQ(result(model, 1).zero_filled_bytes, 60 * KIB);
	CHECK_EQ(result(model, 1).blocks_copied, 0);
	bs_cow_model_destroy(model);
}

static void test_each_snapshot_makes_every_block_shared_again(void)
{
	struct bs_cow_model *model = fresh();

	for (int i = 0; i < 5; i++) {
		write_to(model, 0, 1);
		CHECK_EQ(bs_cow_model_snapshot(model), 0);
		CHECK_EQ(bs_cow_model_snapshot(model), 0);
	}
	CHECK_EQ(result(model, 1).blocks_provisioned, 1);
	CHECK_EQ(result(model, 1).blocks_copied, 4);
	bs_cow_model_destroy(model);
}

static void test_a_discard_unmaps_whole_blocks_and_zeroes_parts(void)
{
	struct bs_cow_model *model = on_parent();

	discard(model, 62 * KIB, 68 * KIB); /* 64K block 1; 2K of blocks 0 and 2 */
	CHECK_EQ(result(model, 1).blocks_discarded, 1);
	CHECK_EQ(result(model, 1).blocks_copied, 2);
	CHECK_EQ(result(model, 1).zero_filled_bytes, 4 * KIB);
	write_to(model, 64 * KIB, 64 * KIB);
	CHECK_EQ(result(model, 1).blocks_provisioned, 1);
	CHECK_EQ(result(model, 1).blocks_overwritten, 0);
	bs_cow_model_destroy(model);
}

static void test_kept_parts_are_left_alone(void)
{
	struct bs_cow_model *model = make((struct bs_cow_options){.flags = BS_COW_KEEP_PARTS});

	discard(model, 62 * KIB, 68 * KIB);
	CHECK_EQ(result(model, 1).blocks_discarded, 1);
	CHECK_EQ(result(model, 1).blocks_copied + result(model, 1).zero_filled_bytes, 0);
	bs_cow_model_destroy(model);
}

static void test_a_discard_in_holes_does_nothing(void)
{
	struct bs_cow_model *model = fresh();

	discard(model, 100, TIB);
	write_to(model, GIB, 4 * KIB);
	discard(model, 0, GIB);
	CHECK_EQ(result(model, 0).blocks_discarded + result(model, 2).blocks_discarded, 0);
	CHECK_EQ(result(model, 0).zero_filled_bytes, 0);
	discard(model, 0, GIB + 4 * KIB);
	CHECK_EQ(result(model, 0).blocks_discarded, 1);
	CHECK_EQ(result(model, 0).blocks_freed, 1);
	bs_cow_model_destroy(model);
}

static void test_a_huge_discard_is_remembered_wherever_one_looks(void)
{
	struct bs_cow_model *model = on_parent();
	struct bs_cow_trace trace;

	write_to(model, 7 * TIB, 1);
	discard(model, 0, 1ull << 62);
	CHECK_EQ(result(model, 0).blocks_discarded, 1ull << 50);
	CHECK_EQ(result(model, 2).blocks_discarded, 1ull << 42);
	write_to(model, 3 * TIB + 5, 1);
	write_to(model, 7 * TIB, 1);
	CHECK_EQ(result(model, 0).blocks_provisioned, 2);
	write_to(model, 1ull << 62, 1);
	CHECK_EQ(result(model, 0).blocks_provisioned, 2);
	CHECK_EQ(result(model, 0).blocks_copied, 2);
	bs_cow_model_trace(model, &trace);
	CHECK(trace.memory_bytes < 4 * MIB);
	bs_cow_model_destroy(model);
}

static void test_exclusive_is_what_only_one_snapshot_holds(void)
{
	struct bs_cow_model *model = fresh();

	write_to(model, 0, 3 * 64 * KIB);
	bs_cow_model_snapshot(model);
	write_to(model, 0, 1);
	discard(model, 64 * KIB, 64 * KIB);
	bs_cow_model_snapshot(model);
	write_to(model, 2 * 64 * KIB, 1);
	/* Of the three blocks of the first epoch two were left in the second; the third one both snapshots hold. */
	CHECK_EQ(epoch(model, 1, 0).blocks_exclusive, 2);
	CHECK_EQ(epoch(model, 1, 1).blocks_exclusive, 0);
	CHECK_EQ(epoch(model, 1, 2).blocks_exclusive, 1);
	CHECK_EQ(epoch(model, 1, 0).blocks_allocated, 3);
	CHECK_EQ(epoch(model, 1, 1).blocks_allocated, 1);
	CHECK_EQ(epoch(model, 1, 0).blocks_copied, 0);
	CHECK_EQ(epoch(model, 1, 1).blocks_copied, 1);
	CHECK_EQ(epoch(model, 1, 2).blocks_copied, 1);
	bs_cow_model_destroy(model);
}

static void test_devices_are_address_spaces_of_their_own(void)
{
	struct bs_cow_model *model = on_parent();
	struct bs_request requests[] = {
		{.kind = BS_REQUEST_WRITE, .length = 1},
		{.kind = BS_REQUEST_WRITE, .length = 1, .device = 1},
		{.kind = BS_REQUEST_WRITE, .length = 1, .device = UINT32_MAX},
		{.kind = BS_REQUEST_WRITE, .length = 1, .device = 1},
	};

	CHECK_EQ(bs_cow_model_feed(model, requests, 4), 0);
	CHECK_EQ(result(model, 2).blocks_copied, 3);
	bs_cow_model_destroy(model);
}

static void test_snapshots_come_by_count_and_by_time(void)
{
	struct bs_cow_model *model = make((struct bs_cow_options){.snapshot_bytes = 3});
	struct bs_cow_trace trace;

	for (int i = 0; i < 10; i++)
		write_to(model, 0, 1);
	bs_cow_model_trace(model, &trace);
	CHECK_EQ(trace.snapshots, 3);
	CHECK_EQ(result(model, 0).blocks_copied, 4);
	bs_cow_model_destroy(model);

	model = make((struct bs_cow_options){.snapshot_ns = 10});
	for (uint64_t time = 7; time < 100; time += 60) {
		struct bs_request request = {.kind = BS_REQUEST_WRITE, .length = 1, .time = time};

		CHECK_EQ(bs_cow_model_feed(model, &request, 1), 0);
	}
	bs_cow_model_trace(model, &trace);
	CHECK_EQ(trace.snapshots, 1); /* of many intervals without a write one counts */
	bs_cow_model_destroy(model);
}

static void test_many_epochs_are_summed_up(void)
{
	struct bs_cow_model *model = make((struct bs_cow_options){.snapshot_writes = 1});
	static struct bs_cow_epoch epochs[65536];
	uint64_t allocated = 0, exclusive = 0, copied = 0, metadata = 0;

	for (int i = 0; i < 150000; i++)
		write_to(model, 0, 1);
	CHECK_EQ(bs_cow_model_epochs_a_record(model), 4);
	int n = bs_cow_model_epochs(model, 0, 0, epochs, 65536);
	CHECK_EQ(n, 150000 / 4 + 1);
	for (int i = 0; i < n; i++) {
		allocated += epochs[i].blocks_allocated;
		exclusive += epochs[i].blocks_exclusive;
		copied += epochs[i].blocks_copied;
		metadata += epochs[i].metadata_blocks;
	}
	CHECK_EQ(allocated, 150000);
	CHECK_EQ(copied, 150000);
	CHECK_EQ(metadata, result(model, 0).metadata_blocks);
	CHECK_EQ(exclusive, 149999); /* the last block both the last snapshot and the device hold */
	CHECK_EQ(bs_cow_model_epochs(model, 0, n, epochs, 1), 0);
	CHECK_EQ(bs_cow_model_epochs(model, 3, 0, epochs, 1), -EINVAL);
	bs_cow_model_destroy(model);
}

static void test_impossible_requests_are_refused(void)
{
	struct bs_cow_model *model = on_parent();
	struct bs_cow_trace trace;

	CHECK_EQ(feed(model, BS_REQUEST_WRITE, UINT64_MAX - 10, 100), -EINVAL);
	CHECK_EQ(feed(model, BS_REQUEST_DISCARD, 100, UINT64_MAX), -EINVAL);
	CHECK_EQ(feed(model, BS_REQUEST_READ, (1ull << 63) + 1, 0), -EINVAL);
	CHECK_EQ(feed(model, BS_REQUEST_WRITE, 0, (1ull << 32) + 1), -EINVAL);
	CHECK_EQ(feed(model, 17, 0, 1), -EINVAL);
	CHECK(strstr(bs_last_error(), "request 0"));
	CHECK_EQ(feed(model, BS_REQUEST_FLUSH, UINT64_MAX, UINT64_MAX), 0);
	write_to(model, 1ull << 63, 0);
	write_to(model, (1ull << 63) - 1, 1);
	write_to(model, (1ull << 63) - 1, 1);
	discard(model, 0, 1ull << 63);
	CHECK_EQ(result(model, 1).blocks_copied, 1);
	CHECK_EQ(result(model, 1).blocks_freed, 1);
	bs_cow_model_trace(model, &trace);
	CHECK_EQ(trace.requests, 5);
	CHECK_EQ(trace.highest_byte, 1ull << 63);
	bs_cow_model_destroy(model);
}

static void test_impossible_block_sizes_are_refused(void)
{
	const uint64_t bad[][2] = {{256, 512}, {4096, 4096}, {8192, 4096}, {4096, 5000}, {4096, 2 * GIB}};
	struct bs_cow_options options = {0};
	struct bs_cow_model *model;

	for (int i = 0; i < 5; i++)
		CHECK_EQ(bs_cow_model_create(bad[i], 2, &options, &model), -EINVAL);
	CHECK_EQ(bs_cow_model_create(bad[0], 0, &options, &model), -EINVAL);
	bs_cow_model_destroy(NULL);
}

static void test_memory_grows_with_the_touched_blocks_only(void)
{
	struct bs_cow_model *model = make((struct bs_cow_options){.snapshot_writes = 1000, .commit_ns = 50});
	struct bs_cow_trace early, late;
	uint64_t state = 1;

	for (int round = 0; round < 8; round++) {
		for (int i = 0; i < 50000; i++) {
			struct bs_request request = {
				.time = round * 50000ull + i,
				.offset = test_random(&state) % (4096 * MIB),
				.length = 4096,
				.kind = BS_REQUEST_WRITE,
			};

			CHECK_EQ(bs_cow_model_feed(model, &request, 1), 0);
		}
		bs_cow_model_trace(model, round ? &late : &early);
	}
	CHECK(late.memory_bytes < early.memory_bytes + 64 * KIB);
	bs_cow_model_destroy(model);
}

int main(void)
{
	RUN(test_a_partly_written_shared_block_is_copied_once);
	RUN(test_a_write_that_covers_blocks_copies_only_its_ends);
	RUN(test_a_hole_is_provisioned_and_filled_with_zeros);
	RUN(test_each_snapshot_makes_every_block_shared_again);
	RUN(test_a_discard_unmaps_whole_blocks_and_zeroes_parts);
	RUN(test_kept_parts_are_left_alone);
	RUN(test_a_discard_in_holes_does_nothing);
	RUN(test_a_huge_discard_is_remembered_wherever_one_looks);
	RUN(test_exclusive_is_what_only_one_snapshot_holds);
	RUN(test_devices_are_address_spaces_of_their_own);
	RUN(test_snapshots_come_by_count_and_by_time);
	RUN(test_many_epochs_are_summed_up);
	RUN(test_impossible_requests_are_refused);
	RUN(test_impossible_block_sizes_are_refused);
	RUN(test_memory_grows_with_the_touched_blocks_only);
	return 0;
}
