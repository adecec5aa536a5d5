/*
 * What a write changes. It goes through the nodes that it covers at depth 0, then through those of depth 1,
 * and so on while it finds something new: a block that was not touched before in this epoch. In a node it
 * goes from level to level in the same way. Most writes touch few blocks of few levels anew, and pay for
 * those only; from the level on at which a write lies in one block, a level is one bit.
 *
 * Compiled twice, since bits take fewer instructions where the processor has them.
 */
#include "cow_model.h"

#if defined(__x86_64__)
#define FAST __attribute__((target("popcnt,bmi,bmi2,lzcnt")))
#else
#define FAST
#endif
#define INLINE static inline __attribute__((always_inline))

/* A block of which the first piece to touch it leaves `rest` bytes. */
INLINE void add_part(struct cow_sums *sums, bool hole, uint64_t rest)
{
	if (hole)
		sums->filled_bytes += rest;
	else {
		sums->copied_bytes += rest;
		sums->copied += rest > 0;
	}
}

INLINE void claim(struct cow_sums *sums, struct cow_node *n, uint64_t new, const struct cow_span *span)
{
	int w = span->word;
	uint64_t holes = new & n->hole.w[w];

	sums->allocated += __builtin_popcountll(new);
	sums->provisioned += __builtin_popcountll(holes);
	sums->superseded += __builtin_popcountll(new & n->previous.w[w]);
	if (new >> span->first & 1)
		add_part(sums, holes >> span->first & 1, span->head);
	if (new >> span->last & 1)
		add_part(sums, holes >> span->last & 1, span->tail);
	n->current.w[w] |= new;
	n->previous.w[w] &= ~new;
	n->hole.w[w] &= ~new;
}

INLINE void claim_one(struct cow_sums *sums, struct cow_node *n, int w, unsigned int bit, uint64_t rest)
{
	bool hole = n->hole.w[w] >> bit & 1;

	sums->allocated++;
	sums->provisioned += hole;
	sums->superseded += n->previous.w[w] >> bit & 1;
	add_part(sums, hole, rest);
	n->current.w[w] |= 1ull << bit;
	n->previous.w[w] &= ~(1ull << bit);
	n->hole.w[w] &= ~(1ull << bit);
}

/* Returns the number of levels, from the first on, at which a block is new. */
INLINE int write_levels(struct bs_cow_model *m, int depth, struct cow_node *n, const struct cow_ends *ends,
	struct cow_set *ret_new)
{
	struct cow_level *level = &m->levels[6 * depth];
	struct cow_span span = cow_span(m, depth, 0, ends);
	int j = 0;

	for (; j < 6 && span.first != span.last; j++, level++) {
		uint64_t new = cow_span_bits(&span) & ~n->current.w[j > 0];

		if (!new)
			return j;
		claim(&level->sums, n, new, &span);
		ret_new->w[j > 0] |= new;
		span = cow_span(m, depth, j + 1, ends);
	}
	for (; j < 6; j++, level++) {
		if (n->current.w[j > 0] >> span.first & 1)
			return j;
		claim_one(&level->sums, n, j > 0, span.first, span.head + span.tail);
		ret_new->w[j > 0] |= 1ull << span.first;
		span = cow_span(m, depth, j + 1, ends);
	}
	return 6;
}

INLINE void change_metadata(struct bs_cow_model *m, int depth, uint64_t node, uint32_t device,
	const struct cow_ends *ends, struct cow_set new, int levels)
{
	const struct cow_marked *marked = &m->marked[depth];
	uint64_t leaf = (node << 6 | ends->first) / COW_LEAF;

	if (leaf != (node << 6 | ends->last) / COW_LEAF)
		cow_metadata_mark_levels(m, depth, node, device, new);
	else if (marked->leaf != leaf || marked->device != device || marked->levels < levels)
		cow_metadata_mark(m, depth, device, leaf, levels);
}

/* Returns whether a block of the last level is new. n: the node, NULL if it is not known. */
INLINE bool write_node(
	struct bs_cow_model *m, int depth, uint64_t node, const struct cow_range *range, struct cow_node *n)
{
	struct cow_ends ends = cow_ends(m, depth, node, range);
	struct cow_set new = {{0, 0}};

	if (!n)
		n = cow_node_find(m, depth, node, range->device);
	if (!n)
		n = cow_node_add(m, depth, node, range->device);
	if (!n)
		return false;
	cow_node_begin_epoch(m, n);
	int levels = write_levels(m, depth, n, &ends, &new);
	if (!levels)
		return false;
	if (depth)
		((struct cow_inner *)n)->children |= new.w[0];
	change_metadata(m, depth, node, range->device, &ends, new, levels);
	return levels == 6;
}

INLINE void write_range(struct bs_cow_model *m, const struct cow_range *range, struct cow_node *first)
{
	int shift = m->base_shift;

	/* Most likely wanted, and on its way into the cache while depth 0 is worked on. */
	__builtin_prefetch(cow_table_slot(&m->inners, sizeof(struct cow_inner),
		cow_index(1, range->begin >> shift >> 12), range->device));
	for (int depth = 0; depth <= m->top; depth++, shift += 6) {
		uint64_t node = range->begin >> shift >> 6, last = (range->end - 1) >> shift >> 6;
		bool climb = write_node(m, depth, node, range, first);

		while (++node <= last)
			climb |= write_node(m, depth, node, range, NULL);
		if (!climb)
			return;
		first = NULL;
	}
}

FAST static void write_fast(struct bs_cow_model *m, const struct cow_range *range, struct cow_node *first)
{
	write_range(m, range, first);
}

void cow_write(struct bs_cow_model *m, const struct cow_range *range, struct cow_node *first)
{
	if (m->fast)
		write_fast(m, range, first);
	else
		write_range(m, range, first);
}
