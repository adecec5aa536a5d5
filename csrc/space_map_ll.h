/*
 * What both space maps are made of: two-bit counts in bitmap blocks, larger counts in an overflow tree, an
 * index of the bitmaps, and the changes of the running transaction, which stay in memory until commit.
 *
 * The committed state is immutable and everything is read from it; `pending` holds the count of each block
 * that the transaction touched. At commit ll_flush writes the pending counts into shadowed bitmaps and
 * overflow nodes, which allocates and frees metadata blocks, whose counts become pending in the metadata map
 * in turn: it goes on until nothing is left, which ends because each structure is shadowed once a transaction
 * at most.
 *
 * The index (16 bytes for 16320 blocks) is kept in memory whole. Where it lies on disk is the difference of
 * the two maps: space_map_disk keeps it in a tree, space_map_metadata in one block.
 */
#ifndef BS_SPACE_MAP_LL_H
#define BS_SPACE_MAP_LL_H

#include <stdbool.h>
#include <stdint.h>

#include "btree.h"
#include "count_map.h"
#include "space_map.h"
#include "transaction_manager.h"

struct ll_index_entry {
	uint64_t blocknr; /* 0: the bitmap does not exist yet, all its entries are 0 */
	uint32_t nr_free;
	uint32_t none_free_before;
	bool changed; /* since the index was last written */
};

struct ll {
	struct space_map sm; /* first member: the vtable over this map */
	struct transaction_manager *tm;
	const char *name;

	/* Committed state. */
	struct ll_index_entry *committed;
	uint64_t committed_nr_blocks;
	uint64_t committed_free; /* of nr_blocks, growth included */
	uint64_t committed_overflow;

	/* Running transaction. */
	struct ll_index_entry *working;
	uint64_t nr_blocks, nr_bitmaps;
	uint64_t nr_allocated;
	uint64_t overflow_root;
	struct count_map pending;
	uint64_t *queue; /* pending blocks that ll_flush has not seen in their present state */
	size_t queue_nr, queue_capacity;
	uint64_t nr_taken;   /* pending blocks that are free in the committed state */
	uint64_t nr_freed;   /* pending blocks whose count went to 0 */
	uint64_t nr_touched; /* bitmaps with pending blocks: about what a commit will shadow */
	unsigned char *touched;
	uint64_t nr_overflow_changes;
	uint64_t overflow_nodes; /* of the committed overflow tree; 0: not counted yet */

	/* Reserved blocks: handed out but not counted yet. */
	uint64_t *reserved;
	uint64_t nr_reserved;

	/* Where allocation looks next: free entries of one bitmap as it was committed. */
	uint64_t cursor;
	uint32_t cursor_word;
	bool cursor_loaded;
	uint64_t free_words[510];
};

/* An empty map of nr_blocks free blocks that exists only in memory; ll_flush makes its bitmaps. */
int ll_init(struct ll *ll, struct transaction_manager *tm, const char *name, uint64_t nr_blocks);
/* Take over a committed map whose index the caller then fills into ll->committed; ll_opened finishes. */
int ll_init_committed(struct ll *ll, struct transaction_manager *tm, const char *name, uint64_t nr_blocks,
	uint64_t nr_allocated, uint64_t overflow_root);
int ll_opened(struct ll *ll);
void ll_deinit(struct ll *ll);

/* Grow by free blocks. */
int ll_extend(struct ll *ll, uint64_t nr_blocks);

/* Blocks that can be handed out now; blocks freed in the transaction come back after commit. */
uint64_t ll_available(const struct ll *ll);
/* Rough upper bound of the metadata blocks that writing the pending changes allocates. */
uint64_t ll_commit_cost(const struct ll *ll);
/* The same, a better one, for which the nodes of the overflow tree are counted once a transaction. */
int ll_exact_commit_cost(struct ll *ll, uint64_t *ret);

/* Take a free block out of circulation without counting it; then ll_take (count 1) or ll_unreserve. Survives
 * commits. */
int ll_reserve(struct ll *ll, uint64_t *ret);
int ll_take(struct ll *ll, uint64_t block);
void ll_unreserve(struct ll *ll, uint64_t block);

/* Write pending changes into bitmaps and overflow tree, entries of ll->working with `changed` set; the index
 * is the caller's. */
int ll_flush(struct ll *ll);
/* The superblock with the flushed state is on disk: it is the committed one now. */
int ll_committed(struct ll *ll);

/* Blocks whose count went to 0 in this transaction, ascending; the caller frees the array. */
int ll_freed_blocks(const struct ll *ll, uint64_t **ret_blocks, uint64_t *ret_nr);

#endif
