#include "count_map.h"

#include <stdlib.h>
#include <string.h>

#define INITIAL_CAPACITY 256
#define KEEP_CAPACITY 65536

static size_t slot_of(uint64_t block, size_t capacity)
{
	return block * 0x9e3779b97f4a7c15ull >> 20 & (capacity - 1);
}

void count_map_init(struct count_map *map)
{
	*map = (struct count_map){0};
}

void count_map_deinit(struct count_map *map)
{
	free(map->slots);
	*map = (struct count_map){0};
}

void count_map_clear(struct count_map *map)
{
	if (map->capacity > KEEP_CAPACITY)
		count_map_deinit(map);
	else if (map->used)
		memset(map->slots, 0xff, map->capacity * sizeof(*map->slots));
	map->used = 0;
}

struct count_entry *count_map_find(const struct count_map *map, uint64_t block)
{
	if (!map->used)
		return NULL;
	for (size_t i = slot_of(block, map->capacity);; i = (i + 1) & (map->capacity - 1)) {
		struct count_entry *e = &map->slots[i];

		if (e->block == block)
			return e;
		if (e->block == COUNT_MAP_EMPTY)
			return NULL;
	}
}

static struct count_entry *place(struct count_entry *slots, size_t capacity, uint64_t block)
{
	size_t i = slot_of(block, capacity);

	while (slots[i].block != COUNT_MAP_EMPTY)
		i = (i + 1) & (capacity - 1);
	slots[i] = (struct count_entry){.block = block};
	return &slots[i];
}

static bool grow(struct count_map *map)
{
	size_t capacity = map->capacity ? map->capacity * 2 : INITIAL_CAPACITY;
	struct count_entry *slots = malloc(capacity * sizeof(*slots));

	if (!slots)
		return false;
	memset(slots, 0xff, capacity * sizeof(*slots));
	for (size_t i = 0; i < map->capacity; i++)
		if (map->slots[i].block != COUNT_MAP_EMPTY)
			*place(slots, capacity, map->slots[i].block) = map->slots[i];
	free(map->slots);
	map->slots = slots;
	map->capacity = capacity;
	return true;
}

struct count_entry *count_map_add(struct count_map *map, uint64_t block, bool *ret_added)
{
	struct count_entry *e = count_map_find(map, block);

	if (ret_added)
		*ret_added = !e;
	if (e)
		return e;
	if (map->used * 4 >= map->capacity * 3 && !grow(map))
		return NULL;
	map->used++;
	return place(map->slots, map->capacity, block);
}
