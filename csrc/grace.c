/*
 * A section counts itself in the half of its stripe that the epoch names. grace_wait changes the epoch and
 * waits for the old half to empty, twice: a section that read the epoch before the first change but counted
 * itself only after the wait for its half is caught by the second. (The scheme of early sleepable RCU.) All
 * accesses are sequentially consistent: a section that counts itself after grace_wait looked sees what the
 * waiter stored before.
 */
#include "grace.h"

#include <string.h>
#include <time.h>

static _Thread_local int own_stripe = -1;
static _Atomic int next_stripe;

void grace_init(struct grace *grace)
{
	memset(grace, 0, sizeof(*grace));
	pthread_mutex_init(&grace->lock, NULL);
}

void grace_deinit(struct grace *grace)
{
	pthread_mutex_destroy(&grace->lock);
}

int grace_enter(struct grace *grace)
{
	if (own_stripe < 0)
		own_stripe = atomic_fetch_add(&next_stripe, 1) % GRACE_STRIPES;
	int half = atomic_load(&grace->epoch) & 1;

	atomic_fetch_add(&grace->stripes[own_stripe].inside[half], 1);
	return own_stripe * 2 + half;
}

void grace_exit(struct grace *grace, int ticket)
{
	atomic_fetch_sub(&grace->stripes[ticket / 2].inside[ticket & 1], 1);
}

static void wait_for_half(struct grace *grace, int half)
{
	struct timespec pause = {0, 1000};

	for (int s = 0; s < GRACE_STRIPES; s++)
		while (atomic_load(&grace->stripes[s].inside[half]) > 0) {
			nanosleep(&pause, NULL);
			if (pause.tv_nsec < 1000000)
				pause.tv_nsec *= 2;
		}
}

void grace_wait(struct grace *grace)
{
	pthread_mutex_lock(&grace->lock);
	for (int turn = 0; turn < 2; turn++)
		wait_for_half(grace, atomic_fetch_add(&grace->epoch, 1) & 1);
	pthread_mutex_unlock(&grace->lock);
}
