#include "map_cache.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"

int map_cache_init(struct map_cache *cache, uint64_t nr_blocks)
{
	uint64_t slots = 1;

	while (slots < MAP_CACHE_SLOTS && slots * MAP_PAGE_ENTRIES < nr_blocks)
		slots *= 2;
	cache->slots = calloc(slots, sizeof(*cache->slots));
	cache->mask = slots - 1;
	return cache->slots ? 0 : bs_fail(-ENOMEM, "out of memory");
}

static void retire(struct map_page *page, struct map_page **retired)
{
	if (!page)
		return;
	page->next_retired = *retired;
	*retired = page;
}

void map_cache_drop(struct map_cache *cache, struct map_page **retired)
{
	for (uint64_t i = 0; i <= cache->mask; i++)
		retire(atomic_exchange(&cache->slots[i], NULL), retired);
}

void map_cache_deinit(struct map_cache *cache)
{
	if (!cache->slots)
		return;
	for (uint64_t i = 0; i <= cache->mask; i++)
		free(cache->slots[i]);
	free(cache->slots);
	cache->slots = NULL;
}

void map_pages_free(struct map_page *retired)
{
	while (retired) {
		struct map_page *next = retired->next_retired;

		free(retired);
		retired = next;
	}
}

int map_cache_add(struct map_cache *cache, uint64_t index, const uint64_t *blocks, const uint64_t *packed,
	int n, struct map_page **retired)
{
	struct map_page *page = malloc(sizeof(*page));

	if (!page)
		return bs_fail(-ENOMEM, "out of memory");
	page->index = index;
	memset(page->entries, 0xff, sizeof(page->entries)); /* MAP_HOLE */
	for (int i = 0; i < n; i++)
		atomic_init(&page->entries[blocks[i] % MAP_PAGE_ENTRIES], packed[i]);
	retire(atomic_exchange(&cache->slots[index & cache->mask], page), retired);
	return 0;
}
