/*
 * Crash states of the user engine: a random workload on logging devices, whose process is killed up to three times; then,
 * at every place of its log, states that a power cut there could have left are opened by the real code and judged
 * (crash_model.h): all writes up to the place, a subset of those that were not flushed, and one of torn writes. States
 * count once, however many cuts lead to the same bytes.
 *
 *   test_crash [STATES [SEED]]
 *   test_crash replay SEED POSITION KIND STATE-SEED STATE
 *
 * A wrong state is printed as the second command. The engine commits on its own once a second: a workload that was held
 * up may have another log than before, so that command runs the workload until the same state comes out.
 */
#include "count_map.h"
#include "crash_model.h"
#include "test.h"

#define STEPS 150
#define REQUESTS 150 /* of a fifth of them, about */
#define ATTEMPTS 20

struct tally {
	struct count_map distinct;
	size_t wanted, judged;
};

static struct crash_model *run_workload(uint64_t seed)
{
	struct crash_model *m = crash_model_create(seed, ONLY_NO_SPACE);
	uint64_t state = seed;

	for (uint64_t kills = seed % 4; kills; kills--)
		crash_model_run_and_kill(m, STEPS / 5, test_random(&state) % REQUESTS);
	crash_model_run(m, STEPS);
	return m;
}

static void judge(struct crash_model *m, uint64_t seed, size_t position, enum crash_kind kind,
	uint64_t state_seed, struct tally *tally)
{
	bool right = crash_model_judge(m, position, kind, state_seed, tally->judged % 100 == 0);

	tally->judged++;
	CHECK(count_map_add(&tally->distinct, crash_model_judged(m), NULL));
	if (right)
		return;
	fprintf(stderr,
		"crash state %zu is wrong: test_crash replay %" PRIu64 " %zu %d %" PRIu64 " %016" PRIx64
		": %s\n",
		tally->judged, seed, position, kind, state_seed, crash_model_judged(m), bs_last_error());
	exit(1);
}

static void explore(uint64_t seed, struct tally *tally)
{
	struct crash_model *m = run_workload(seed);
	size_t end = crash_log_position(crash_model_log(m));
	uint64_t state = seed ^ 0x5bd1e995;

	for (size_t position = 0; position <= end && tally->distinct.used < tally->wanted; position++) {
		judge(m, seed, position, CRASH_PREFIX, 0, tally);
		judge(m, seed, position, CRASH_SUBSET, test_random(&state), tally);
		judge(m, seed, position, CRASH_TORN, test_random(&state), tally);
	}
	crash_model_destroy(m);
}

static int replay(char **argv)
{
	uint64_t seed = strtoull(argv[0], NULL, 10), state = strtoull(argv[4], NULL, 16);
	size_t position = strtoull(argv[1], NULL, 10);

	for (int i = 0; i < ATTEMPTS; i++) {
		struct crash_model *m = run_workload(seed);
		bool possible = position <= crash_log_position(crash_model_log(m));
		bool right = possible && crash_model_judge(m, position, strtol(argv[2], NULL, 10),
						 strtoull(argv[3], NULL, 10), true);
		bool same = possible && crash_model_judged(m) == state;

		crash_model_destroy(m);
		if (same)
			return printf("the same state, %s: %s\n", right ? "right" : "wrong", bs_last_error()),
			       !right;
	}
	printf("the state did not come up again\n");
	return 2;
}

int main(int argc, char **argv)
{
	if (argc == 7 && strcmp(argv[1], "replay") == 0)
		return replay(argv + 2);
	struct tally tally = {.wanted = argc > 1 ? strtoull(argv[1], NULL, 10) : 5000};
	uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;

	while (tally.distinct.used < tally.wanted)
		explore(seed++, &tally);
	printf("%zu distinct crash states (%zu judged), all recovered\n", tally.distinct.used, tally.judged);
	count_map_deinit(&tally.distinct);
	return 0;
}
