/*
 * Devices that remember every write and flush, and what a power cut could have left of them.
 *
 * A log holds the writes and flushes of several devices in order. The state after a cut at a point of the log
 * is any in which each device holds all writes before its last flush, and of the later ones a subset, in any
 * order among those that do not overlap, each whole or torn at a multiple of 512 bytes.
 *
 * The devices can also be made to fail: a chosen request ends with an error, a write after its first half.
 */
#ifndef CRASH_IO_H
#define CRASH_IO_H

#include "io.h"

#define CRASH_DEVICES 2

struct crash_log;

struct crash_log *crash_log_create(void);
void crash_log_destroy(struct crash_log *log);
/* Records so far: a point to cut at. */
size_t crash_log_position(const struct crash_log *log);
/* A memory device that logs as number `device` (0 metadata, 1 data). Its start state is copied. */
int crash_io_create(struct crash_log *log, int device, const void *start, uint64_t size, struct io **ret);
/* From here on the present content is the start state, and the log is empty. */
void crash_log_rebase(struct crash_log *log);

#define LASTING SIZE_MAX

/* Let request number `at` of the log's devices (reads, writes, flushes, punches, from 0) fail with -error, and number
 * `again` (0: none), which for LASTING are all later ones. */
void crash_log_fail(struct crash_log *log, size_t at, int error, size_t again);
/* Requests so far. */
size_t crash_log_requests(const struct crash_log *log);
/* Requests that failed on purpose since crash_log_fail. */
size_t crash_log_failures(const struct crash_log *log);
/* Called with the code address that made a request, before each. */
void crash_log_watch(struct crash_log *log, void (*watch)(const void *caller));

/* How the unflushed writes are treated. */
enum crash_kind { CRASH_PREFIX, CRASH_SUBSET, CRASH_TORN };

/* Fill image (of the device's size) with a state that a cut at position can leave; the choice depends on
 * seed. */
void crash_state(
	struct crash_log *log, int device, size_t position, enum crash_kind kind, uint64_t seed, void *image);

#endif
