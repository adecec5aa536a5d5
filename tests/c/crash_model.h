/*
 * A random workload on a pool over logging devices, and what must hold of every state that a power cut or an
 * error can leave of them:
 *   - our check finds nothing (where asked, thin_check too);
 *   - a device that existed at the last acknowledged flush and was not deleted since is there;
 *   - each 512-byte sector holds a value that it had at that flush or got later, of that place and that
 *     device.
 */
#ifndef CRASH_MODEL_H
#define CRASH_MODEL_H

#include "crash_io.h"

#define METADATA_SIZE (512ull << 10)
#define DATA_SIZE (2ull << 20)

struct crash_model;

/* Which answers of the pool are no failure of the test. */
enum crash_answers { ONLY_NO_SPACE, ANY_ERROR };

/* An empty pool, whose geometry depends on the seed, on two devices of a log. */
struct crash_model *crash_model_create(uint64_t seed, enum crash_answers answers);
void crash_model_destroy(struct crash_model *m);
struct crash_log *crash_model_log(struct crash_model *m);
/* Open the pool as the log's devices are now, and take `steps` steps. */
void crash_model_run(struct crash_model *m, int steps);
/* Look at the running pool: what can be read is right. */
void crash_model_look(struct crash_model *m);
/* What bs_pool_close returns; after it the model can still judge. */
int crash_model_close(struct crash_model *m);
/* Open the pool, take steps, and kill its process in the middle of request `at` from now on, or after the steps: the
 * devices have what was written until then, flushed or not. */
void crash_model_run_and_kill(struct crash_model *m, int steps, size_t at);
/* Is the state after a cut at a position as it must be? If not, it says on stderr what is wrong. */
bool crash_model_judge(struct crash_model *m, size_t position, enum crash_kind kind, uint64_t state_seed,
	bool with_thin_check);
/* Equal for states with equal bytes: the checksums of the devices in the state judged last. */
uint64_t crash_model_judged(const struct crash_model *m);

#endif
