/*
 * What the transaction manager knows of a space map: a vtable, and nothing else. It cuts the circle of space
 * map, B-tree and transaction manager.
 *
 * Counts are those of the running transaction. A block is handed out only if it is free in the committed
 * state and was not touched since: what a transaction frees is not used again in it.
 */
#ifndef BS_SPACE_MAP_H
#define BS_SPACE_MAP_H

#include <stdint.h>

struct space_map;

struct space_map_ops {
	int (*count)(struct space_map *sm, uint64_t block, uint32_t *ret);
	/* The count in the committed state, whatever the running transaction did. */
	int (*committed_count)(struct space_map *sm, uint64_t block, uint32_t *ret);
	int (*inc)(struct space_map *sm, uint64_t block);
	/* ret: the count left. -EUCLEAN if it was 0. */
	int (*dec)(struct space_map *sm, uint64_t block, uint32_t *ret);
	/* A free block, its count raised to 1. -ENOSPC. */
	int (*new_block)(struct space_map *sm, uint64_t *ret);
};

struct space_map {
	const struct space_map_ops *ops;
};

static inline int sm_count(struct space_map *sm, uint64_t block, uint32_t *ret)
{
	return sm->ops->count(sm, block, ret);
}

static inline int sm_committed_count(struct space_map *sm, uint64_t block, uint32_t *ret)
{
	return sm->ops->committed_count(sm, block, ret);
}

static inline int sm_inc(struct space_map *sm, uint64_t block)
{
	return sm->ops->inc(sm, block);
}

static inline int sm_dec(struct space_map *sm, uint64_t block, uint32_t *ret)
{
	return sm->ops->dec(sm, block, ret);
}

static inline int sm_new_block(struct space_map *sm, uint64_t *ret)
{
	return sm->ops->new_block(sm, ret);
}

#endif
