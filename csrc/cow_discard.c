/*
 * What a discard changes, from the top down: unlike a write it reaches every level, but it visits only
 * nodes that exist, and those at its two ends. Blocks that it covers whole become holes; what it covers in
 * part is zeroed as the user engine does it, which breaks sharing, or left alone as the kernel does.
 */
#include "cow_model.h"

#define ZERO_PIECE 65536 /* what the user engine zeroes at once: thin_io.c */

/* All that lies below a block of level 6 * depth, which no request has touched: it is shared with the
 * parent. */
static void unmap_untouched(struct bs_cow_model *m, int depth, uint64_t block, uint32_t device)
{
	for (int i = 0; i < m->nr_sizes && m->sizes[i] < 6 * depth; i++) {
		int level = m->sizes[i], bits = 6 * depth - level;

		m->sums[level / 6].discarded[level % 6] += 1ull << bits;
		cow_metadata_unmap(m, level, device, block << bits, ((block + 1) << bits) - 1);
	}
}

/* One of the blocks that are covered in part, mapped: the range leaves `rest` bytes of it. */
static void zero_part(
	struct cow_sums *sums, int j, struct cow_node *n, uint64_t bit, uint64_t size, uint64_t rest)
{
	uint64_t piece = cow_minimum(size - rest, ZERO_PIECE);
	int w = j > 0;

	sums->filled_bytes[j] += size - rest;
	if (n->current.w[w] & bit)
		return;
	sums->allocated[j]++;
	sums->copied[j]++;
	sums->copied_bytes[j] += size - piece;
	sums->superseded[j] += (n->previous.w[w] & bit) > 0;
	n->current.w[w] |= bit;
	n->previous.w[w] &= ~bit;
}

static void zero_parts(struct cow_sums *sums, int j, struct cow_node *n, const struct cow_span *span,
	uint64_t parts, uint64_t size)
{
	uint64_t first = parts & 1ull << span->first, last = parts & 1ull << span->last;

	if (span->first == span->last) {
		if (first)
			zero_part(sums, j, n, first, size, span->head + span->tail);
		return;
	}
	if (first)
		zero_part(sums, j, n, first, size, span->head);
	if (last)
		zero_part(sums, j, n, last, size, span->tail);
}

/* Returns the blocks whose mapping changes. */
static uint64_t discard_level(
	struct bs_cow_model *m, int depth, int j, struct cow_node *n, const struct cow_ends *ends)
{
	struct cow_span span = cow_span(m, depth, j, ends);
	struct cow_sums *sums = &m->sums[depth];
	uint64_t *current = &n->current.w[span.word], *previous = &n->previous.w[span.word];
	uint64_t *hole = &n->hole.w[span.word], before = *current;
	uint64_t parts = (uint64_t)(span.head > 0) << span.first | (uint64_t)(span.tail > 0) << span.last;
	uint64_t unmapped = cow_span_bits(&span) & ~(parts | *hole);

	sums->discarded[j] += __builtin_popcountll(unmapped);
	sums->freed[j] += __builtin_popcountll(unmapped & *current);
	sums->superseded[j] += __builtin_popcountll(unmapped & *previous);
	*hole |= unmapped;
	*current &= ~unmapped;
	*previous &= ~unmapped;
	if (!(m->options.flags & BS_COW_KEEP_PARTS))
		zero_parts(sums, j, n, &span, parts & ~*hole, m->inside[depth][j] + 1);
	return unmapped | (*current & ~before);
}

static void discard_node(struct bs_cow_model *m, int depth, uint64_t node, const struct cow_range *range);

/* Block `place` of a node, of which the range covers something. Returns whether there is a node below it
 * now. */
static bool discard_below(struct bs_cow_model *m, int depth, uint64_t node, const struct cow_node *n,
	unsigned int place, bool whole, const struct cow_range *range)
{
	uint64_t block = node << 6 | place;
	bool present = n->children >> place & 1, hole = n->hole.w[0] >> place & 1;

	if (!present && hole)
		return false;
	if (!present && whole) {
		unmap_untouched(m, depth, block, range->device);
		return false;
	}
	discard_node(m, depth - 1, block, range);
	return true;
}

static void discard_children(struct bs_cow_model *m, int depth, uint64_t node, struct cow_node *n,
	const struct cow_range *range, const struct cow_ends *ends)
{
	struct cow_span span = cow_span(m, depth, 0, ends);

	for (unsigned int place = ends->first; place <= ends->last; place++) {
		bool whole = !(place == ends->first && span.head) && !(place == ends->last && span.tail);
		bool is_there = discard_below(m, depth, node, n, place, whole, range);

		n->children |= (uint64_t)is_there << place;
	}
}

/* A node that exists, or of which the range covers a part and that is no hole. */
static void discard_node(struct bs_cow_model *m, int depth, uint64_t node, const struct cow_range *range)
{
	struct cow_ends ends = cow_ends(m, depth, node, range);
	struct cow_set changed = {{0, 0}};
	struct cow_node *n = cow_node_get(m, depth, node, range->device);

	if (!n)
		return;
	if (depth)
		discard_children(m, depth, node, n, range, &ends);
	for (int j = 0; j < 6; j++)
		changed.w[j > 0] |= discard_level(m, depth, j, n, &ends);
	cow_metadata_mark_levels(m, depth, node, range->device, changed);
}

void cow_discard(struct bs_cow_model *m, const struct cow_range *range)
{
	/* A fresh device without its top node is one hole. */
	if (m->options.flags & BS_COW_FRESH && !cow_node_find(m, m->top, 0, range->device))
		return;
	discard_node(m, m->top, 0, range);
}
