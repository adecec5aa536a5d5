/*
 * Cookies: how a process learns that udev is done with a device that it changed (dm_ioctl.c passes them on).
 *
 * The kernel puts the cookie into the uevent; the last of udev's rules for device-mapper counts the semaphore
 * of that key down. The key and the meaning of the value are libdevmapper's, whose helper does the counting.
 * A semaphore stays when its maker dies: whoever makes one destroys it on every path. For those that were killed
 * a second semaphore, which nobody else touches, tells who made the set.
 */
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/random.h>
#include <sys/sem.h>
#include <time.h>

#include "blocksnap.h"
#include "error.h"

#define KEY_BASE 0x0d4d0000u
#define ATTEMPTS 100
#define COUNTED 0
#define MAKER 1
#define SEMAPHORES 2

static int semaphore(uint32_t cookie)
{
	return semget((key_t)(KEY_BASE | (cookie & 0xffff)), 1, 0);
}

union semun {
	int value;
	struct semid_ds *set;
	struct seminfo *info;
	unsigned short *values;
};

static int try_to_create(uint16_t number)
{
	int id = semget((key_t)(KEY_BASE | number), SEMAPHORES, 0600 | IPC_CREAT | IPC_EXCL);

	if (id < 0)
		return -errno;
	if (semctl(id, 0, SETALL, (union semun){.values = (unsigned short[SEMAPHORES]){[COUNTED] = 1}}) == 0)
		return 0;
	int err = errno;
	semctl(id, 0, IPC_RMID);
	return -err;
}

int bs_dm_cookie_create(uint32_t *ret)
{
	uint16_t number;
	int r = -EEXIST;

	for (int attempt = 0; r == -EEXIST && attempt < ATTEMPTS; attempt++) {
		if (getrandom(&number, sizeof(number), 0) != sizeof(number) || number == 0)
			continue;
		r = try_to_create(number);
	}
	if (r < 0)
		return bs_fail(r, "making a semaphore for udev: %s", strerror(-r));
	*ret = number;
	return 0;
}

int bs_dm_cookie_wait(uint32_t cookie, int timeout_ms)
{
	struct sembuf zero = {.sem_num = COUNTED, .sem_op = 0};
	struct timespec limit = {timeout_ms / 1000, timeout_ms % 1000 * 1000000L};
	int id = semaphore(cookie);

	if (id < 0 || semtimedop(id, &zero, 1, &limit) == 0)
		return 0;
	switch (errno) {
	case EIDRM:
		return 0;
	case EAGAIN:
		return bs_fail(-ETIMEDOUT, "udev did not answer within %d ms: is udevd stuck?", timeout_ms);
	default:
		return bs_fail_errno("waiting for udev");
	}
}

void bs_dm_cookie_destroy(uint32_t cookie)
{
	int id = semaphore(cookie);

	if (id >= 0)
		semctl(id, 0, IPC_RMID);
}

/* Whether a set is one of ours whose maker has ended. A maker that cannot be seen from here counts as alive. */
static bool left_behind(int id, const struct semid_ds *set)
{
	if (((uint32_t)set->sem_perm.__key & 0xffff0000u) != KEY_BASE || set->sem_nsems != SEMAPHORES)
		return false;
	int maker = semctl(id, MAKER, GETPID);
	return maker > 0 && kill(maker, 0) < 0 && errno == ESRCH;
}

void bs_dm_cookies_sweep(void)
{
	struct seminfo info;
	int last = semctl(0, 0, SEM_INFO, (union semun){.info = &info});

	for (int index = 0; index <= last; index++) {
		struct semid_ds set;
		int id = semctl(index, 0, SEM_STAT, (union semun){.set = &set});

		if (id >= 0 && left_behind(id, &set))
			semctl(id, 0, IPC_RMID);
	}
}
