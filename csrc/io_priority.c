/* The calling thread's input and output give way to everybody else's. */
#include <linux/ioprio.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "blocksnap.h"
#include "error.h"

int bs_io_idle(void)
{
	if (syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_PRIO_VALUE(IOPRIO_CLASS_IDLE, 0)) < 0)
		return bs_fail_errno("I/O priority");
	return 0;
}
