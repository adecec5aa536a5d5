/*
 * Errors of the devices below the user engine: a random workload runs once to count its requests, then once for each
 * request that fails, with EIO and with ENOSPC, alone or with all that follow. Then what can be read is right, and so is
 * what an opening finds on the devices, as they are or after a power cut (crash_model.h).
 *
 *   test_faults [WORKLOADS [SEED]]
 */
#include <errno.h>
#include <pthread.h>
#include <unistd.h>

#include "crash_model.h"
#include "test.h"

#define STEPS 25
#define LIVES 3 /* of the pool on its devices */
#define CALLERS 256
#define FAULTS_A_REQUEST 4 /* EIO and ENOSPC, each once and lasting */

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

static void run_with_fault(uint64_t seed, size_t at, int error, bool lasting)
{
	struct crash_model *m = crash_model_create(seed, ANY_ERROR);
	struct crash_log *log = crash_model_log(m);

	crash_log_fail(log, at, error, lasting);
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
				", request %zu, error %d, %s, kind %d: %s\n",
				seed, at, error, lasting ? "lasting" : "once", kind, bs_last_error());
			exit(1);
		}
	crash_model_destroy(m);
}

int main(int argc, char **argv)
{
	size_t workloads = argc > 1 ? strtoull(argv[1], NULL, 10) : 2, faults = 0;
	uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;

	for (; workloads; workloads--, seed++) {
		size_t nr = count_requests(seed);

		for (size_t at = 0; at < nr; at++)
			for (int choice = 0; choice < FAULTS_A_REQUEST; choice++, faults++)
				run_with_fault(seed, at, choice & 1 ? ENOSPC : EIO, choice & 2);
	}
	print_callers();
	printf("%zu faults, all survived\n", faults);
	return 0;
}
