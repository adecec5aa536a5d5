/* A device in memory behind io.h: for tests and for metadata that is only built to be looked at. */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "io.h"

struct io_memory {
	struct io io;
	uint64_t size;
	char *data;
};

static int memory_transfer(struct io *io, uint64_t offset, const struct iovec *iov, int count, bool writing)
{
	struct io_memory *m = (struct io_memory *)io;

	for (int i = 0; i < count; i++) {
		size_t length = iov[i].iov_len;

		if (offset > m->size || length > m->size - offset)
			return bs_fail(
				-EIO, "memory: transfer at byte %" PRIu64 " is beyond the end", offset);
		if (writing)
			memcpy(m->data + offset, iov[i].iov_base, length);
		else
			memcpy(iov[i].iov_base, m->data + offset, length);
		offset += length;
	}
	return 0;
}

static int memory_readv(struct io *io, uint64_t offset, const struct iovec *iov, int count)
{
	return memory_transfer(io, offset, iov, count, false);
}

static int memory_writev(struct io *io, uint64_t offset, const struct iovec *iov, int count)
{
	return memory_transfer(io, offset, iov, count, true);
}

static int memory_flush(struct io *io)
{
	return 0;
}

static int64_t memory_size(struct io *io)
{
	return ((struct io_memory *)io)->size;
}

static void memory_close(struct io *io)
{
	free(((struct io_memory *)io)->data);
	free(io);
}

static const struct io_ops memory_ops = {
	.readv = memory_readv,
	.writev = memory_writev,
	.flush = memory_flush,
	.size = memory_size,
	.close = memory_close,
};

int io_memory_create(uint64_t size, struct io **ret)
{
	struct io_memory *m = calloc(1, sizeof(*m));

	if (m)
		m->data = calloc(1, size);
	if (!m || !m->data) {
		free(m);
		return bs_fail(-ENOMEM, "out of memory");
	}
	m->io = (struct io){.ops = &memory_ops, .alignment = 1, .name = "memory"};
	m->size = size;
	*ret = &m->io;
	return 0;
}

void *io_memory_data(struct io *io)
{
	return ((struct io_memory *)io)->data;
}
