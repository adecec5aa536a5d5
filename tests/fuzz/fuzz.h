/*
 * Fuzz targets: one function that takes any bytes and must neither crash nor break what its file promises.
 *
 * Built with -DBLOCKSNAP_FUZZ=ON (clang) each is a libFuzzer program; with -DBLOCKSNAP_TESTS=ON it replays its corpus,
 * corpus/NAME, as one of the C tests.
 */
#ifndef FUZZ_H
#define FUZZ_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* A promise that no input may break. */
#define PROMISE(condition)                                                                                   \
	do {                                                                                                 \
		if (!(condition)) {                                                                          \
			fprintf(stderr, "%s:%d: broken promise: %s\n", __FILE__, __LINE__, #condition);      \
			abort();                                                                             \
		}                                                                                            \
	} while (0)

/* Take up to n bytes from the front of the input; what is missing is zero. */
static inline void fuzz_take(const uint8_t **data, size_t *size, void *out, size_t n)
{
	size_t have = n < *size ? n : *size;

	memset(out, 0, n);
	if (have)
		memcpy(out, *data, have);
	*data += have;
	*size -= have;
}

#endif
