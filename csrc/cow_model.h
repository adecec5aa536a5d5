/*
 * The inside of the copy-on-write model, shared by cow_model.c (requests, snapshots, results), cow_write.c
 * and cow_discard.c (what a request changes) and cow_metadata.c (what a commit writes).
 *
 * Level k is the block size `base << k`, base the smallest size asked for. All levels are kept at once in a
 * radix tree of fan-out 64: a node of depth d holds the state of 64 blocks of level 6d and of the blocks of
 * the five levels above that these make up. Word 0 of a set is the 64 blocks, word 1 a heap: block i of
 * level 6d + j is bit (64 >> j) + i, so that half a bit's number is the number of the block that it lies
 * in. One cache line answers for six block sizes. Nodes are found by a hash, at once at any depth.
 *
 * Invariants, by which a write ends at the first level where it finds nothing new:
 * 1. what is current at a level is current at every larger one; what is mapped at a level is mapped at
 *    every larger one (a discard that unmaps a block covers all that lies inside);
 * 2. a hole is neither current nor previous;
 * 3. a node exists if anything in it was ever written or discarded in part, and then so do all above it. A
 *    block with no node below it is through and through what its own bit says: a hole, or shared with the
 *    parent. Without the node at the top a device is as it began.
 */
#ifndef BS_COW_MODEL_H
#define BS_COW_MODEL_H

#include "blocksnap.h"
#include "cow_nodes.h"

#define COW_DEPTHS 9 /* block sizes from 512 on: 9 + 9 * 6 bits, every offset below 2^63 */
#define COW_LEVELS (6 * COW_DEPTHS)
#define COW_HEIGHTS 9 /* 0: bitmaps; of mapping trees: 168^8 leaves are more than there can be */
#define COW_MAX_END (1ull << 63)
#define COW_MAX_WRITE (1ull << 32)
#define COW_LEAF (252 / 3 * 2ull) /* mappings in a leaf: cow_metadata.c */

#define COW_LANES 8

#if defined(__x86_64__)
#define FAST __attribute__((target("popcnt,bmi,bmi2,lzcnt,avx2")))
#else
#define FAST
#endif
#define INLINE static inline __attribute__((always_inline))

/* Of the six levels of a depth, side by side for vector instructions; lanes 6 and 7 are idle. In blocks unless
 * the name says bytes. */
struct cow_sums {
	uint64_t allocated[COW_LANES];    /* data blocks */
	uint64_t provisioned[COW_LANES];  /* of these: for holes */
	uint64_t copied[COW_LANES];       /* of these: with a copy; the others were overwritten */
	uint64_t copied_bytes[COW_LANES]; /* of copied blocks, without the piece that broke sharing */
	uint64_t filled_bytes[COW_LANES]; /* zeros: around pieces that provision, by discards of parts */
	uint64_t superseded[COW_LANES]; /* allocated in the epoch before, replaced or unmapped in this one */
	uint64_t discarded[COW_LANES];  /* mapped blocks unmapped */
	uint64_t freed[COW_LANES];      /* of these: allocated in the same epoch */
};

/* Metadata blocks that the running transaction changes. */
struct cow_pending {
	uint64_t leaves, overflow, inner, bitmaps;
};

struct cow_level {
	uint64_t metadata_blocks, metadata_before, commits; /* before: when the epoch began */
	struct cow_pending pending;                         /* as of cow_metadata_pending() */
	uint64_t allocated;                                 /* when the transaction began */
	uint64_t unmapped_leaves; /* of the transaction, without marks, inside large ranges */
	int height;               /* of the mapping tree */
};

/* The latest of the bitmaps, or of the nodes of a height, that were counted: the one before `next`. */
struct cow_counted {
	uint32_t device;
	uint64_t next;
};

struct bs_cow_model {
	struct bs_cow_options options;
	struct bs_cow_trace trace;
	int base_shift;
	int top; /* the depth whose one node covers everything */
	int nr_sizes;
	bool fast;                  /* the processor has instructions for bits */
	uint8_t sizes[COW_LEVELS];  /* the levels asked for, ascending */
	uint8_t wanted[COW_DEPTHS]; /* the same: bit j for level 6 * depth + j */
	bool out_of_memory;
	bool dirty;                                     /* a write or discard since the snapshot */
	uint32_t epoch;                                 /* from 1 on */
	uint64_t transaction;                           /* from 1 on */
	uint64_t writes, bytes;                         /* of the epoch */
	uint64_t snapshot_writes, snapshot_bytes;       /* a snapshot is due */
	uint64_t next_snapshot, next_commit, next_time; /* ns; next_time is the earlier one */
	uint64_t grows_at;           /* a device of more bytes has a higher mapping tree at some level */
	struct bs_cow_epoch *epochs; /* nr_sizes for each of so many records */
	uint64_t records, epochs_a_record;
	struct cow_nodes nodes;
	struct cow_table marks;  /* cow_metadata.c */
	struct cow_key *changed; /* marks of the running transaction */
	size_t nr_changed, changed_capacity;
	struct cow_counted counted[COW_LEVELS][COW_HEIGHTS];
	uint64_t inside[COW_DEPTHS][COW_LANES]; /* bits of an offset that say where it lies in its block */
	uint64_t heap_from[64], heap_to[64]; /* word 1: all that lies at or behind, at or before, a block */
	struct cow_sums sums[COW_DEPTHS], before[COW_DEPTHS]; /* now; when the epoch began */
	struct cow_level levels[COW_LEVELS];
};

/* Levels beyond every size are not counted: any shift that can be will do. */
static inline int cow_shift(const struct bs_cow_model *m, int level)
{
	return m->base_shift + level < 62 ? m->base_shift + level : 62;
}

static inline uint64_t cow_allocated(const struct bs_cow_model *m, int level)
{
	return m->sums[level / 6].allocated[level % 6];
}

/* The blocks of level 6 * depth + j in a set, from bit 0 on. */
static inline uint64_t cow_level_bits(struct cow_set set, int j)
{
	return j ? set.w[1] >> (64 >> j) & ((1ull << (64 >> j)) - 1) : set.w[0];
}

static inline uint64_t cow_minimum(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

/* A request: bytes begin to before end, never empty. */
struct cow_range {
	uint64_t begin, end;
	uint32_t device;
};

/* NULL if the node does not exist. */
static inline struct cow_node *cow_node_find(
	struct bs_cow_model *m, int depth, uint64_t node, uint32_t device)
{
	struct cow_node *n = cow_nodes_place(&m->nodes, depth, node, device);

	return n && n->stamp ? n : NULL;
}

/* Bring the sets to the running epoch. Without branches: when a node was met before is random. */
static inline void cow_node_begin_epoch(const struct bs_cow_model *m, struct cow_node *n)
{
	uint64_t now = -(uint64_t)(n->stamp == m->epoch), before = -(uint64_t)(n->stamp == m->epoch - 1);

	for (int i = 0; i < 2; i++) {
		n->previous.w[i] = (n->previous.w[i] & now) | (n->current.w[i] & before);
		n->current.w[i] &= now;
	}
	n->stamp = m->epoch;
}

/* cow_model.c. Make the node, which is not there; or find or make it, brought to the running epoch. NULL
 * when out of memory. */
struct cow_node *cow_node_add(struct bs_cow_model *m, int depth, uint64_t node, uint32_t device);
struct cow_node *cow_node_get(struct bs_cow_model *m, int depth, uint64_t node, uint32_t device);

/* Where a range begins and ends in a node: places among its 64 blocks; bytes, 0 for an end in another node. */
struct cow_ends {
	unsigned int first, last;
	uint64_t begin, end;
};

static inline struct cow_ends cow_ends(
	const struct bs_cow_model *m, int depth, uint64_t node, const struct cow_range *range)
{
	int shift = cow_shift(m, 6 * depth);
	uint64_t first = range->begin >> shift, last = (range->end - 1) >> shift;
	struct cow_ends ends = {0, 63, 0, 0};

	if (first >> 6 == node) {
		ends.first = first & 63;
		ends.begin = range->begin;
	}
	if (last >> 6 == node) {
		ends.last = last & 63;
		ends.end = range->end;
	}
	return ends;
}

/* The same at level 6 * depth + j: bits of its word, and bytes of the two blocks that lie outside the
 * range. */
struct cow_span {
	int word;
	unsigned int first, last;
	uint64_t head, tail;
};

static inline struct cow_span cow_span(
	const struct bs_cow_model *m, int depth, int j, const struct cow_ends *ends)
{
	uint64_t inside = m->inside[depth][j];

	return (struct cow_span){
		.word = j > 0,
		.first = j ? (64 + ends->first) >> j : ends->first,
		.last = j ? (64 + ends->last) >> j : ends->last,
		.head = ends->begin & inside,
		.tail = -ends->end & inside,
	};
}

static inline uint64_t cow_span_bits(const struct cow_span *span)
{
	return ~0ull << span->first & ~0ull >> (63 - span->last);
}

/* cow_write.c */
void cow_write(struct bs_cow_model *m, const struct cow_range *range);
/* Take reads and writes as long as nothing else happens: no higher tree, no event of time, no snapshot but behind
 * the last one. Returns their number. */
uint64_t cow_take_transfers(struct bs_cow_model *m, const struct bs_request *requests, uint64_t count);

/* cow_discard.c */
void cow_discard(struct bs_cow_model *m, const struct cow_range *range);

/* cow_metadata.c. The mappings of blocks in a leaf of level 6 * depth change, and in those that it lies in
 * at the next levels, `levels` in all. */
void cow_metadata_mark(struct bs_cow_model *m, int depth, uint32_t device, uint64_t leaf, int levels);
/* The same for a set of blocks of a node. */
void cow_metadata_mark_levels(
	struct bs_cow_model *m, int depth, uint64_t node, uint32_t device, struct cow_set changed);
/* Blocks that no request has touched lose their mappings: `first` to `last` of a level. */
void cow_metadata_unmap(struct bs_cow_model *m, int level, uint32_t device, uint64_t first, uint64_t last);

/* The device has grown to so many bytes. */
void cow_metadata_grow(struct bs_cow_model *m, uint64_t bytes);
void cow_metadata_commit(struct bs_cow_model *m, bool snapshot);
/* The blocks of each level that a commit would write now; 0: nothing has changed. */
void cow_metadata_pending(struct bs_cow_model *m, uint64_t ret_blocks[COW_LEVELS]);
int cow_metadata_init(struct bs_cow_model *m);
void cow_metadata_deinit(struct bs_cow_model *m);

#endif
