/*
 * The mappings of a device as the data path reads them: pages of 512 packed mappings, looked up without a
 * lock.
 *
 * A page is complete (holes included) or absent; pages are set and entries changed under the pool's lock,
 * read within a section of its grace object. A page that makes room for another is retired: freed after a
 * grace period. Memory is bounded: at most MAP_CACHE_SLOTS pages of 4 KiB a device, direct-mapped.
 *
 * The time in an entry says since when the block is known to be this device's alone: a write may go in place
 * while it is not below the device's snapshotted_time. A snapshot thereby takes the right from all entries at
 * once.
 */
#ifndef BS_MAP_CACHE_H
#define BS_MAP_CACHE_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define MAP_PAGE_ENTRIES 512
#define MAP_CACHE_SLOTS 16384
#define MAP_HOLE UINT64_MAX

struct map_page {
	uint64_t index; /* thin block / MAP_PAGE_ENTRIES */
	struct map_page *next_retired;
	_Atomic uint64_t entries[MAP_PAGE_ENTRIES];
};

struct map_cache {
	_Atomic(struct map_page *) *slots;
	uint64_t mask;
};

/* nr_blocks: of the device; sets the number of slots. */
int map_cache_init(struct map_cache *cache, uint64_t nr_blocks);
/* The pages go to the retired list. */
void map_cache_drop(struct map_cache *cache, struct map_page **retired);
void map_cache_deinit(struct map_cache *cache);
void map_pages_free(struct map_page *retired);

/* NULL if the page is absent. */
static inline _Atomic uint64_t *map_cache_find(const struct map_cache *cache, uint64_t block)
{
	uint64_t index = block / MAP_PAGE_ENTRIES;
	struct map_page *page =
		atomic_load_explicit(&cache->slots[index & cache->mask], memory_order_acquire);

	return page && page->index == index ? &page->entries[block % MAP_PAGE_ENTRIES] : NULL;
}

/* Add a page of the n ascending mappings (blocks, packed) of page index; everything else in it is a hole. */
int map_cache_add(struct map_cache *cache, uint64_t index, const uint64_t *blocks, const uint64_t *packed,
	int n, struct map_page **retired);

#endif
