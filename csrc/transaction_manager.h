/*
 * Transactions over metadata blocks: a committed block is never changed; whoever wants to change it gets a
 * shadow, a copy at a newly allocated place, once a transaction. Not thread-safe; cost of each call: one
 * cache look-up.
 */
#ifndef BS_TRANSACTION_MANAGER_H
#define BS_TRANSACTION_MANAGER_H

#include <stdbool.h>
#include <stdint.h>

#include "block_manager.h"
#include "space_map.h"

struct transaction_manager {
	struct block_manager *bm;
	struct space_map *sm; /* counts of metadata blocks */
};

int tm_read(struct transaction_manager *tm, uint64_t nr, const struct bm_validator *validator,
	struct bm_block **ret);
int tm_new(struct transaction_manager *tm, const struct bm_validator *validator, struct bm_block **ret);
/* A changeable copy of nr, or nr itself if it already is one and not shared. ret_shared: nr stays in use
 * elsewhere, so whatever it refers to now has one reference more and the caller must count that. */
int tm_shadow(struct transaction_manager *tm, uint64_t nr, const struct bm_validator *validator,
	struct bm_block **ret, bool *ret_shared);
int tm_inc(struct transaction_manager *tm, uint64_t nr);
/* Drop one reference; the block itself goes when none is left (what it refers to is the caller's business).
 */
int tm_dec(struct transaction_manager *tm, uint64_t nr);
int tm_count(struct transaction_manager *tm, uint64_t nr, uint32_t *ret);
int tm_committed_count(struct transaction_manager *tm, uint64_t nr, uint32_t *ret);

#endif
