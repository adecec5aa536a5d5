#include "cow_table.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "error.h"

#define FIRST_BITS 8
#define HUGE_PAGE (2u << 20)

void *cow_map(size_t bytes)
{
	void *slots = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (slots == MAP_FAILED)
		return NULL;
	if (bytes >= 2 * HUGE_PAGE)
		madvise(slots, bytes, MADV_HUGEPAGE);
	return slots;
}

int cow_table_init(struct cow_table *table, size_t stride)
{
	*table = (struct cow_table){.stride = stride, .capacity = 1u << FIRST_BITS, .shift = 64 - FIRST_BITS};
	table->slots = cow_map(table->capacity * stride);
	return table->slots ? 0 : bs_fail(-ENOMEM, "out of memory");
}

void cow_table_deinit(struct cow_table *table)
{
	if (table->slots)
		munmap(table->slots, table->capacity * table->stride);
	*table = (struct cow_table){0};
}

static bool grow(struct cow_table *table)
{
	struct cow_table larger = *table;

	larger.capacity *= 2;
	larger.shift--;
	larger.slots = cow_map(larger.capacity * larger.stride);
	if (!larger.slots)
		return false;
	for (size_t i = 0; i < table->capacity; i++) {
		const struct cow_key *key = (const struct cow_key *)(table->slots + i * table->stride);

		if (key->stamp)
			memcpy(cow_table_probe(&larger, larger.stride, key->index, key->device), key,
				table->stride);
	}
	munmap(table->slots, table->capacity * table->stride);
	*table = larger;
	return true;
}

void *cow_table_add(struct cow_table *table, uint64_t index, uint32_t device, uint32_t stamp)
{
	if (table->used * 4 >= table->capacity * 3 && !grow(table))
		return NULL;
	struct cow_key *key = cow_table_probe(table, table->stride, index, device);
	*key = (struct cow_key){index, device, stamp};
	table->used++;
	return key;
}
