/*
 * Crash states of the user engine: a random workload on logging devices, then, at cuts all over its log, states that a
 * power cut could have left are opened by the real code and judged (crash_model.h). A failing state is printed as "seed
 * position kind state-seed".
 *
 *   test_crash [STATES [SEED]]
 */
#include "crash_model.h"
#include "test.h"

#define STEPS 150
#define STATES_A_WORKLOAD 600

static void judge(
	struct crash_model *m, size_t position, enum crash_kind kind, uint64_t seed, uint64_t state_seed)
{
	if (crash_model_judge(m, position, kind, state_seed, state_seed % 100 == 0))
		return;
	fprintf(stderr,
		"crash state is wrong: workload seed %" PRIu64 ", position %zu, kind %d, state seed %" PRIu64
		": %s\n",
		seed, position, kind, state_seed, bs_last_error());
	exit(1);
}

static size_t run_workload(uint64_t seed, size_t states)
{
	struct crash_model *m = crash_model_create(seed, ONLY_NO_SPACE);
	uint64_t state = seed ^ 0x5bd1e995;

	crash_model_run(m, STEPS);
	size_t end = crash_log_position(crash_model_log(m)), done = 0;
	for (; done < states; done++) {
		uint64_t state_seed = test_random(&state);

		judge(m, done < end ? done : state_seed % (end + 1), done % 3, seed, state_seed);
	}
	crash_model_destroy(m);
	return done;
}

int main(int argc, char **argv)
{
	size_t wanted = argc > 1 ? strtoull(argv[1], NULL, 10) : 5000, done = 0;
	uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;

	while (done < wanted)
		done += run_workload(
			seed++, wanted - done < STATES_A_WORKLOAD ? wanted - done : STATES_A_WORKLOAD);
	printf("%zu crash states, all recovered\n", done);
	return 0;
}
