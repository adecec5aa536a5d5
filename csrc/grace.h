/*
 * Grace periods: readers mark a section with two atomic additions and no lock; grace_wait returns when every
 * section that had begun before it was called has ended. What a reader could see before may then be freed or
 * used again.
 *
 * A section does I/O and nothing else: it takes no lock, so grace_wait may be called with any lock held,
 * except from within a section.
 */
#ifndef BS_GRACE_H
#define BS_GRACE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#define GRACE_STRIPES 16

struct grace {
	_Atomic uint32_t epoch;
	pthread_mutex_t lock; /* one waiter at a time */
	struct {
		_Atomic int64_t inside[2];
	} __attribute__((aligned(64))) stripes[GRACE_STRIPES];
};

void grace_init(struct grace *grace);
void grace_deinit(struct grace *grace);
/* Returns the ticket that grace_exit wants. */
int grace_enter(struct grace *grace);
void grace_exit(struct grace *grace, int ticket);
void grace_wait(struct grace *grace);

#endif
