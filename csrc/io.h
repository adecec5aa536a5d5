/*
 * The bottom of the core: a device as a vtable of reads, writes and flushes. Implementations: a file or block
 * device (io_file.c), memory (io_memory.c), and a crash-simulating one in tests/crash.
 *
 * A call transfers everything or fails: short transfers never reach the caller. Errors are negative errno
 * with a message that names the device. All calls may run on several threads at once.
 */
#ifndef BS_IO_H
#define BS_IO_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

struct io;

struct io_ops {
	int (*readv)(struct io *io, uint64_t offset, const struct iovec *iov, int count);
	int (*writev)(struct io *io, uint64_t offset, const struct iovec *iov, int count);
	int (*flush)(struct io *io);
	/* Give the space of a range back; its content is then undefined or zero. Optional: may be NULL. */
	int (*punch)(struct io *io, uint64_t offset, uint64_t length);
	int64_t (*size)(struct io *io);
	void (*close)(struct io *io);
};

struct io {
	const struct io_ops *ops;
	/* Offsets, lengths and addresses must be multiples of it; 1 without direct I/O. */
	uint32_t alignment;
	const char *name;
	_Atomic uint64_t written_bytes; /* by all writes that succeeded */
	_Atomic uint64_t failed_reads;
};

#define IO_READ_ONLY 1u
#define IO_DIRECT 2u /* O_DIRECT where the file system has it; alignment tells */
#define IO_LOCK 4u   /* exclusive flock; -EBUSY names the process that holds it */
#define IO_LOCK_SHARED 8u

int io_file_open(const char *path, unsigned int flags, struct io **ret);
/* A device in memory, zero-filled. */
int io_memory_create(uint64_t size, struct io **ret);
/* The content of a memory device; valid until close. */
void *io_memory_data(struct io *io);

/* NULL is accepted. */
void io_close(struct io *io);

static inline int io_readv(struct io *io, uint64_t offset, const struct iovec *iov, int count)
{
	int r = io->ops->readv(io, offset, iov, count);

	if (r)
		atomic_fetch_add_explicit(&io->failed_reads, 1, memory_order_relaxed);
	return r;
}

static inline int io_writev(struct io *io, uint64_t offset, const struct iovec *iov, int count)
{
	int r = io->ops->writev(io, offset, iov, count);

	for (int i = 0; r == 0 && i < count; i++)
		atomic_fetch_add_explicit(&io->written_bytes, iov[i].iov_len, memory_order_relaxed);
	return r;
}

static inline int io_read(struct io *io, uint64_t offset, void *buffer, size_t length)
{
	struct iovec iov = {buffer, length};

	return io_readv(io, offset, &iov, 1);
}

static inline int io_write(struct io *io, uint64_t offset, const void *buffer, size_t length)
{
	struct iovec iov = {(void *)buffer, length};

	return io_writev(io, offset, &iov, 1);
}

static inline int io_flush(struct io *io)
{
	return io->ops->flush(io);
}

static inline int io_punch(struct io *io, uint64_t offset, uint64_t length)
{
	return io->ops->punch ? io->ops->punch(io, offset, length) : 0;
}

static inline int64_t io_size(struct io *io)
{
	return io->ops->size(io);
}

#endif
