/*
 * A hash map from block numbers to small values, for counts that a transaction changed. Open addressing,
 * linear probing, no removal of single keys: a transaction only adds and at its end clears. Not thread-safe.
 */
#ifndef BS_COUNT_MAP_H
#define BS_COUNT_MAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct count_entry {
	uint64_t block; /* COUNT_MAP_EMPTY: free slot */
	uint32_t count;
	uint32_t flags; /* the owner's */
};

#define COUNT_MAP_EMPTY UINT64_MAX

struct count_map {
	struct count_entry *slots;
	size_t capacity; /* power of two or 0 */
	size_t used;
};

void count_map_init(struct count_map *map);
void count_map_deinit(struct count_map *map);
/* Forget everything; memory of a large map is given back. */
void count_map_clear(struct count_map *map);
/* NULL if absent. Valid until the next count_map_add. */
struct count_entry *count_map_find(const struct count_map *map, uint64_t block);
/* Find or add (count 0, flags 0; ret_added tells which if not NULL). NULL when out of memory. */
struct count_entry *count_map_add(struct count_map *map, uint64_t block, bool *ret_added);

#endif
