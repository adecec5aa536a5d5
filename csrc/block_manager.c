/*
 * A hash table of blocks, chained; clean blocks also hang in one list by last use. Dirty blocks stay until
 * they are written or forgotten: a transaction's size bounds them, and the engine commits at least once a
 * second.
 */
#include "block_manager.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "crc32c.h"
#include "error.h"
#include "seed_bug.h"

#define MAX_RUN 64 /* blocks in one write */

struct block_manager {
	struct io *io;
	uint64_t nr_blocks;
	uint32_t limit;
	struct bm_block **buckets;
	uint64_t nr_buckets; /* power of two */
	uint64_t nr_cached;
	uint64_t nr_dirty;
	bool shut;
	struct bm_block lru; /* list head: next = oldest */
};

/* Common head of every sealed block: csum at 0, number at 8. */
struct block_head {
	struct le32 csum;
	struct le32 other;
	struct le64 blocknr;
};

void block_seal(void *data, uint64_t nr, uint32_t salt)
{
	struct block_head *head = data;

	if (!BS_BUG(SEALED_WITHOUT_NUMBER) || le64_get(head->blocknr) == 0)
		head->blocknr = le64_of(nr);
	head->csum = le32_of(block_checksum(data, salt));
}

int block_verify(const void *data, uint64_t nr, const struct bm_validator *validator)
{
	const struct block_head *head = data;
	uint32_t csum = block_checksum(data, validator->salt);

	if (le32_get(head->csum) != csum)
		return bs_fail(-EILSEQ,
			"metadata block %" PRIu64
			" (%s): checksum is 0x%08x, expected 0x%08x: run pool check",
			nr, validator->name, le32_get(head->csum), csum);
	if (le64_get(head->blocknr) != nr)
		return bs_fail(-ENOTBLK,
			"metadata block %" PRIu64 " (%s) carries number %" PRIu64 ": run pool check", nr,
			validator->name, le64_get(head->blocknr));
	return validator->check ? validator->check(data, nr) : 0;
}

static struct bm_block **bucket_of(struct block_manager *bm, uint64_t nr)
{
	return &bm->buckets[nr * 0x9e3779b97f4a7c15ull >> 24 & (bm->nr_buckets - 1)];
}

static void lru_remove(struct bm_block *b)
{
	b->lru_prev->lru_next = b->lru_next;
	b->lru_next->lru_prev = b->lru_prev;
}

static void lru_append(struct block_manager *bm, struct bm_block *b)
{
	b->lru_prev = bm->lru.lru_prev;
	b->lru_next = &bm->lru;
	b->lru_prev->lru_next = b;
	bm->lru.lru_prev = b;
}

int bm_create(struct io *io, uint64_t nr_blocks, uint32_t cache_blocks, struct block_manager **ret)
{
	struct block_manager *bm = calloc(1, sizeof(*bm));

	if (bm) {
		bm->nr_buckets = 1024;
		bm->buckets = calloc(bm->nr_buckets, sizeof(*bm->buckets));
	}
	if (!bm || !bm->buckets) {
		free(bm);
		return bs_fail(-ENOMEM, "out of memory");
	}
	bm->io = io;
	bm->nr_blocks = nr_blocks;
	bm->limit = cache_blocks;
	bm->lru.lru_next = bm->lru.lru_prev = &bm->lru;
	*ret = bm;
	return 0;
}

void bm_destroy(struct block_manager *bm)
{
	if (!bm)
		return;
	bm_reset(bm);
	free(bm->buckets);
	free(bm);
}

void bm_set_nr_blocks(struct block_manager *bm, uint64_t nr_blocks)
{
	bm->nr_blocks = nr_blocks;
}

static struct bm_block *find(struct block_manager *bm, uint64_t nr)
{
	struct bm_block *b = *bucket_of(bm, nr);

	while (b && b->nr != nr)
		b = b->hash_next;
	return b;
}

/* Keep chains short; failing to grow only costs time. */
static void maybe_grow(struct block_manager *bm)
{
	if (bm->nr_cached < bm->nr_buckets * 2)
		return;
	struct bm_block **old = bm->buckets;
	uint64_t nr_old = bm->nr_buckets;
	struct bm_block **buckets = calloc(nr_old * 4, sizeof(*buckets));

	if (!buckets)
		return;
	bm->buckets = buckets;
	bm->nr_buckets = nr_old * 4;
	for (uint64_t i = 0; i < nr_old; i++)
		for (struct bm_block *b = old[i], *next; b; b = next) {
			struct bm_block **bucket = bucket_of(bm, b->nr);

			next = b->hash_next;
			b->hash_next = *bucket;
			*bucket = b;
		}
	free(old);
}

static struct bm_block *add(struct block_manager *bm, uint64_t nr, const struct bm_validator *validator)
{
	struct bm_block *b = aligned_alloc(64, (sizeof(*b) + 63) / 64 * 64);

	if (!b)
		return NULL;
	maybe_grow(bm);
	struct bm_block **bucket = bucket_of(bm, nr);
	b->nr = nr;
	b->validator = validator;
	b->hash_next = *bucket;
	*bucket = b;
	bm->nr_cached++;
	return b;
}

static void drop(struct block_manager *bm, struct bm_block *b)
{
	struct bm_block **link = bucket_of(bm, b->nr);

	while (*link != b)
		link = &(*link)->hash_next;
	*link = b->hash_next;
	if (b->dirty)
		bm->nr_dirty--;
	else
		lru_remove(b);
	bm->nr_cached--;
	free(b);
}

int bm_read(
	struct block_manager *bm, uint64_t nr, const struct bm_validator *validator, struct bm_block **ret)
{
	if (bm->shut)
		return bs_fail_lost();
	struct bm_block *b = find(bm, nr);

	if (b) {
		if (b->validator != validator)
			return bs_fail(-EUCLEAN,
				"metadata block %" PRIu64 " is used as %s and as %s: run pool check", nr,
				b->validator->name, validator->name);
		if (!b->dirty) {
			lru_remove(b);
			lru_append(bm, b);
		}
		*ret = b;
		return 0;
	}
	if (nr == 0 || nr >= bm->nr_blocks)
		return bs_fail(-EUCLEAN,
			"metadata block %" PRIu64 " (%s) is outside the metadata device of %" PRIu64
			" blocks: run pool check",
			nr, validator->name, bm->nr_blocks);
	b = add(bm, nr, validator);
	if (!b)
		return bs_fail(-ENOMEM, "out of memory");
	b->dirty = false;
	lru_append(bm, b);
	int r = io_read(bm->io, nr * METADATA_BLOCK_SIZE, b->data, METADATA_BLOCK_SIZE);
	if (r == 0)
		r = block_verify(b->data, nr, validator);
	if (r < 0) {
		drop(bm, b);
		return r;
	}
	*ret = b;
	return 0;
}

int bm_new(struct block_manager *bm, uint64_t nr, const struct bm_validator *validator, struct bm_block **ret)
{
	if (bm->shut)
		return bs_fail_lost();
	bm_forget(bm, nr);
	struct bm_block *b = add(bm, nr, validator);

	if (!b)
		return bs_fail(-ENOMEM, "out of memory");
	memset(b->data, 0, sizeof(b->data));
	b->dirty = true;
	bm->nr_dirty++;
	*ret = b;
	return 0;
}

void bm_forget(struct block_manager *bm, uint64_t nr)
{
	struct bm_block *b = find(bm, nr);

	if (b)
		drop(bm, b);
}

static int by_number(const void *a, const void *b)
{
	const struct bm_block *l = *(struct bm_block *const *)a, *r = *(struct bm_block *const *)b;

	return l->nr < r->nr ? -1 : l->nr > r->nr;
}

static struct bm_block **collect_dirty(struct block_manager *bm)
{
	struct bm_block **blocks = malloc((bm->nr_dirty + 1) * sizeof(*blocks));
	uint64_t n = 0;

	if (!blocks)
		return NULL;
	for (uint64_t i = 0; i < bm->nr_buckets; i++)
		for (struct bm_block *b = bm->buckets[i]; b; b = b->hash_next)
			if (b->dirty)
				blocks[n++] = b;
	qsort(blocks, n, sizeof(*blocks), by_number);
	return blocks;
}

static int write_runs(struct block_manager *bm, struct bm_block **blocks, uint64_t n)
{
	struct iovec iov[MAX_RUN];

	for (uint64_t i = 0; i < n;) {
		int run = 0;

		do {
			struct bm_block *b = blocks[i + run];

			block_seal(b->data, b->nr, b->validator->salt);
			iov[run++] = (struct iovec){b->data, METADATA_BLOCK_SIZE};
		} while (i + run < n && run < MAX_RUN && blocks[i + run]->nr == blocks[i]->nr + run);
		int lost = BS_BUG(RUN_LOSES_LAST_BLOCK) && run == MAX_RUN;
		int r = io_writev(bm->io, blocks[i]->nr * METADATA_BLOCK_SIZE, iov, run - lost);
		if (r < 0)
			return r;
		i += run;
	}
	return 0;
}

int bm_write_dirty(struct block_manager *bm)
{
	uint64_t n = bm->nr_dirty;
	struct bm_block **blocks = collect_dirty(bm);

	if (!blocks)
		return bs_fail(-ENOMEM, "out of memory");
	int r = write_runs(bm, blocks, n);
	for (uint64_t i = 0; r == 0 && i < n; i++) {
		blocks[i]->dirty = false;
		lru_append(bm, blocks[i]);
	}
	free(blocks);
	if (r < 0)
		return r;
	bm->nr_dirty = 0;
	return 0;
}

void bm_trim(struct block_manager *bm)
{
	while (bm->nr_cached - bm->nr_dirty > bm->limit)
		drop(bm, bm->lru.lru_next);
}

void bm_reset(struct block_manager *bm)
{
	for (uint64_t i = 0; i < bm->nr_buckets; i++)
		while (bm->buckets[i])
			drop(bm, bm->buckets[i]);
}

void bm_shut(struct block_manager *bm)
{
	bm_reset(bm);
	bm->shut = true;
}
