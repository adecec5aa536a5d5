/*
 * Errors of the devices below the user engine: a random workload runs once to count its requests, then once for each
 * request that fails, with EIO and with ENOSPC, alone, with all that follow, or with one of the next that a seed chooses.
 * Then what can be read is right, and so is what an opening finds on the devices, as they are or after a power cut
 * (crash_model.h).
 *
 *   test_faults [WORKLOADS [SEED]]
 */
#include <errno.h>
#include <pthread.h>
#include <unistd.h>

#include "crash_model.h"
#include "engine.h"
#include "test.h"

#define STEPS 25
#define LIVES 3 /* of the pool on its devices */
#define CALLERS 256
#define BLOCK 65536ull
#define FAULTS_A_REQUEST 6 /* EIO and ENOSPC, each once, lasting and twice */

extern const char __executable_start;

static struct {
	const void *caller;
	size_t requests;
} callers[CALLERS];
static size_t nr_callers;

/* Under the log's lock. */
static void watch(const void *caller)
{
	size_t i = 0;

	while (i < nr_callers && callers[i].caller != caller)
		i++;
	CHECK(i < CALLERS);
	callers[i].caller = caller;
	callers[i].requests++;
	nr_callers += i == nr_callers;
}

/* Print the places in the code that made requests, with what was injected there. */
static void print_callers(void)
{
	char command[256];
	bool named = true;

	for (size_t i = 0; i < nr_callers; i++) {
		printf("%zu faults at ", callers[i].requests * FAULTS_A_REQUEST);
		fflush(stdout);
		snprintf(command, sizeof(command), "addr2line -i -s -f -p -e /proc/%d/exe %tx", getpid(),
			(const char *)callers[i].caller - &__executable_start - 1);
		named &= system(command) == 0;
	}
	if (!named)
		printf("(addr2line of binutils would name them)\n");
	printf("%zu places make requests\n", nr_callers);
}

static size_t count_requests(uint64_t seed)
{
	struct crash_model *m = crash_model_create(seed, ONLY_NO_SPACE);

	crash_log_watch(crash_model_log(m), watch);
	for (int life = 0; life < LIVES; life++) {
		crash_model_run(m, STEPS);
		CHECK_EQ(crash_model_close(m), 0);
	}
	size_t nr = crash_log_requests(crash_model_log(m));
	crash_model_destroy(m);
	return nr;
}

/* The request that fails after number `at`: mostly one that has to do with that. */
static size_t second_fault(uint64_t seed, size_t at, int error)
{
	uint64_t state = seed * 1000003 + at * 31 + error;
	size_t reach = test_random(&state) % 4 ? 12 : 120;

	return at + 1 + test_random(&state) % reach;
}

static void run_with_fault(uint64_t seed, size_t at, int error, size_t again)
{
	struct crash_model *m = crash_model_create(seed, ANY_ERROR);
	struct crash_log *log = crash_model_log(m);

	crash_log_fail(log, at, error, again);
	for (int life = 0; life < LIVES; life++) {
		crash_model_run(m, STEPS);
		crash_model_look(m);
		crash_model_close(m);
	}
	size_t end = crash_log_position(log);
	for (int kind = CRASH_PREFIX; kind <= CRASH_TORN; kind++)
		if (!crash_model_judge(m, end, kind, seed + at, kind == CRASH_PREFIX && at % 50 == 0)) {
			fprintf(stderr,
				"wrong after a fault: workload seed %" PRIu64
				", requests %zu and %zu, error %d, kind %d: %s\n",
				seed, at, again, error, kind, bs_last_error());
			exit(1);
		}
	crash_model_destroy(m);
}

/* A commit fails, and then request `k` of what goes back to the state before, which is not in memory: its tree lies in
 * other blocks, and in those of the failed transaction an older one, valid. Says whether both failed. */
static bool read_after_lost_state(size_t k)
{
	static char block[BLOCK], found[BLOCK];
	struct crash_log *log = crash_log_create();
	struct io *metadata, *data;
	struct bs_device *device;
	struct bs_pool *pool;

	CHECK_EQ(crash_io_create(log, 0, NULL, METADATA_SIZE, &metadata), 0);
	CHECK_EQ(crash_io_create(log, 1, NULL, DATA_SIZE, &data), 0);
	CHECK_EQ(thin_metadata_format(metadata, BLOCK / 512, DATA_SIZE / BLOCK), 0);
	CHECK_EQ(pool_open_on(metadata, data, 0, &pool), 0);
	CHECK_EQ(bs_pool_create_device(pool, 1), 0);
	CHECK_EQ(bs_device_open(pool, 1, 3 * BLOCK, &device), 0);
	for (int i = 0; i < 3; i++) {
		memset(block, 'a' + i, BLOCK);
		CHECK_EQ(bs_device_write(device, i * BLOCK, block, BLOCK), BLOCK);
		if (i < 2)
			CHECK_EQ(bs_pool_commit(pool), 0);
	}
	size_t at = crash_log_requests(log);
	crash_log_fail(log, at, EIO, at + k);
	bool failed = bs_pool_commit(pool) < 0, both = crash_log_failures(log) == 2;
	for (int i = 0; failed && i < 2; i++) {
		memset(block, 'a' + i, BLOCK);
		if (bs_device_read(device, i * BLOCK, found, BLOCK) == (int64_t)BLOCK)
			CHECK(memcmp(found, block, BLOCK) == 0);
	}
	bs_device_close(device);
	bs_pool_abandon(pool);
	crash_log_destroy(log);
	/* The engine's own commit may have been faster: then it was for nothing. */
	return failed ? both : read_after_lost_state(k);
}

static void test_a_state_that_cannot_be_read_again_is_not_taken_for_another(void)
{
	size_t k = 1;

	while (read_after_lost_state(k))
		k++;
	CHECK(k > 3);
}

int main(int argc, char **argv)
{
	test_a_state_that_cannot_be_read_again_is_not_taken_for_another();
	size_t workloads = argc > 1 ? strtoull(argv[1], NULL, 10) : 2, faults = 0;
	uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;

	for (; workloads; workloads--, seed++) {
		size_t nr = count_requests(seed);

		for (size_t at = 0; at < nr; at++)
			for (int choice = 0; choice < FAULTS_A_REQUEST; choice++, faults++) {
				int error = choice & 1 ? ENOSPC : EIO;
				size_t again = choice < 2   ? 0
					       : choice < 4 ? LASTING
							    : second_fault(seed, at, error);

				run_with_fault(seed, at, error, again);
			}
	}
	print_callers();
	printf("%zu faults, all survived\n", faults);
	return 0;
}
