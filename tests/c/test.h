/* The smallest test harness: CHECK aborts with the place, RUN names each test. */
#ifndef TEST_H
#define TEST_H

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "blocksnap.h"

#define CHECK(condition)                                                                                     \
	do {                                                                                                 \
		if (!(condition)) {                                                                          \
			fprintf(stderr, "%s:%d: %s: CHECK(%s) failed (last error: %s)\n", __FILE__,          \
				__LINE__, __func__, #condition, bs_last_error());                            \
			exit(1);                                                                             \
		}                                                                                            \
	} while (0)

#define CHECK_EQ(left, right)                                                                                \
	do {                                                                                                 \
		long long left_ = (long long)(left), right_ = (long long)(right);                            \
		if (left_ != right_) {                                                                       \
			fprintf(stderr, "%s:%d: %s: %s is %lld, expected %lld (last error: %s)\n", __FILE__, \
				__LINE__, __func__, #left, left_, right_, bs_last_error());                  \
			exit(1);                                                                             \
		}                                                                                            \
	} while (0)

#define RUN(test)                                                                                            \
	do {                                                                                                 \
		fprintf(stderr, "%s\n", #test);                                                              \
		test();                                                                                      \
	} while (0)

/* A small seeded generator (splitmix64): tests repeat from their seed. */
static inline uint64_t test_random(uint64_t *state)
{
	uint64_t z = (*state += 0x9e3779b97f4a7c15ull);

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return z ^ (z >> 31);
}

#endif
