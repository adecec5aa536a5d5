/*
 * Cache of metadata blocks over io: reads are validated once, written blocks get checksum and block number at
 * write.
 *
 * Not thread-safe: the owner serialises. A pointer from bm_read or bm_new stays valid until bm_trim,
 * bm_forget of that block, bm_reset or bm_destroy: callers trim only between operations, so no reference
 * counts are needed. Every dirty block was allocated in the running transaction (metadata is never updated in
 * place), hence dirty is also the transaction manager's "may be changed in place".
 */
#ifndef BS_BLOCK_MANAGER_H
#define BS_BLOCK_MANAGER_H

#include <stdbool.h>
#include <stdint.h>

#include "disk_format.h"
#include "io.h"

/* What a type of block has to satisfy. check runs after checksum and block number were found right. */
struct bm_validator {
	const char *name;
	uint32_t salt;
	int (*check)(const void *data, uint64_t nr);
};

struct bm_block {
	uint64_t nr;
	const struct bm_validator *validator;
	bool dirty;
	struct bm_block *hash_next;
	struct bm_block *lru_prev, *lru_next; /* clean blocks only */
	unsigned char data[METADATA_BLOCK_SIZE] __attribute__((aligned(16)));
};

struct block_manager;

/* cache_blocks: how many clean blocks bm_trim leaves. The io stays the caller's. */
int bm_create(struct io *io, uint64_t nr_blocks, uint32_t cache_blocks, struct block_manager **ret);
void bm_destroy(struct block_manager *bm);

void bm_set_nr_blocks(struct block_manager *bm, uint64_t nr_blocks);

/* -EILSEQ wrong checksum or content, -ENOTBLK other block's number, -EUCLEAN beyond the device. */
int bm_read(
	struct block_manager *bm, uint64_t nr, const struct bm_validator *validator, struct bm_block **ret);
/* A zeroed, dirty block; whatever was cached for nr is dropped. */
int bm_new(
	struct block_manager *bm, uint64_t nr, const struct bm_validator *validator, struct bm_block **ret);
/* Drop a block from the cache without writing it. */
void bm_forget(struct block_manager *bm, uint64_t nr);
/* Seal and write every dirty block, neighbours in one call. They stay cached, clean, only if all were
 * written. */
int bm_write_dirty(struct block_manager *bm);
void bm_trim(struct block_manager *bm);
void bm_reset(struct block_manager *bm);
/* From here on every bm_read and bm_new fails with -EIO: whoever knows block numbers has them of no committed
 * state, and what lies there may be valid and old. */
void bm_shut(struct block_manager *bm);

/* Checksum and block number of a block as it goes to disk, and their check on what came from there. */
void block_seal(void *data, uint64_t nr, uint32_t salt);
int block_verify(const void *data, uint64_t nr, const struct bm_validator *validator);

#endif
