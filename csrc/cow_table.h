/*
 * An open hash of entries of one size by (index, device), linear probing, without removal. Entries begin with
 * struct cow_key and lie on cache lines if their size does. Not thread-safe.
 */
#ifndef BS_COW_TABLE_H
#define BS_COW_TABLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct cow_key {
	uint64_t index;
	uint32_t device;
	uint32_t stamp; /* the owner's, 0: a free slot */
};

struct cow_table {
	char *slots;
	size_t stride, capacity, used;
	int shift; /* 64 minus the bits of capacity */
};

/* Zeroed memory, NULL when there is none; in huge pages if it is large: a random access then costs no page walk.
 * Undone by munmap(). */
void *cow_map(size_t bytes);

/* -ENOMEM. */
int cow_table_init(struct cow_table *table, size_t stride);
void cow_table_deinit(struct cow_table *table);
/* Add an entry that is not there, zeroed but for its key. May move all entries. NULL when out of memory. */
void *cow_table_add(struct cow_table *table, uint64_t index, uint32_t device, uint32_t stamp);

/* These take the stride once more, a constant where they are called. */
static inline struct cow_key *cow_table_slot(
	const struct cow_table *table, size_t stride, uint64_t index, uint32_t device)
{
	uint64_t hash = (index ^ (uint64_t)device << 40) * 0x9e3779b97f4a7c15ull;

	return (struct cow_key *)(table->slots + (hash >> table->shift) * stride);
}

/* The entry, or the free slot where it belongs. */
static inline struct cow_key *cow_table_probe(
	const struct cow_table *table, size_t stride, uint64_t index, uint32_t device)
{
	struct cow_key *key = cow_table_slot(table, stride, index, device);

	while (key->stamp && (key->index != index || key->device != device)) {
		key = (struct cow_key *)((char *)key + stride);
		if ((char *)key == table->slots + table->capacity * stride)
			key = (struct cow_key *)table->slots;
	}
	return key;
}

/* NULL if absent. */
static inline void *cow_table_find(
	const struct cow_table *table, size_t stride, uint64_t index, uint32_t device)
{
	struct cow_key *key = cow_table_probe(table, stride, index, device);

	return key->stamp ? key : NULL;
}

static inline size_t cow_table_bytes(const struct cow_table *table)
{
	return table->capacity * table->stride;
}

#endif
