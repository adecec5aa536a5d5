/*
 * Reads and writes in a row, and what a write changes. It goes through the nodes that it covers at depth 0, then
 * through those of depth 1, and so on while it finds something new: a block that was not touched before in this
 * epoch. A write whose smallest blocks are none of them new costs one look at one cache line, which was fetched
 * while the requests before it were worked on.
 *
 * What is new in a node is counted once, after the last of the writes in a row that touch it; only what they copy
 * depends on each of them. Both are counted for its six levels at once, without branches: which levels have
 * something new is random, and a wrong guess costs more than the counting. Compiled twice, since bits take
 * fewer instructions where the processor has them.
 */
#include "cow_model.h"

#define AHEAD 8 /* requests whose nodes are on their way into the cache */

typedef uint64_t lanes __attribute__((vector_size(32), aligned(8)));

/* Block b of the first level lies in bit (lane_heap + b) >> lane_shift of the others' words. */
static const uint64_t lane_shift[COW_LANES] = {0, 1, 2, 3, 4, 5, 0, 0};
static const uint64_t lane_heap[COW_LANES] = {0, 64, 64, 64, 64, 64, 0, 0};

#define LANES(array) (*(const lanes *)(array))

/* Add what the ends of a write leave of the first and the last block of each level, where it is new: to `bytes`,
 * and if `blocks` is given the blocks not wholly covered to it. Without branches: what is new is random. */
INLINE void add_parts(const struct bs_cow_model *m, int depth, const struct cow_ends *ends,
	struct cow_set new, uint64_t *blocks, uint64_t *bytes)
{
#pragma GCC unroll 2
	for (int i = 0; i < COW_LANES; i += 4) {
		lanes word = {i ? new.w[1] : new.w[0], new.w[1], i ? 0 : new.w[1], i ? 0 : new.w[1]};
		lanes j = LANES(lane_shift + i), inside = LANES(m->inside[depth] + i);
		lanes first = (LANES(lane_heap + i) + ends->first) >> j,
		      last = (LANES(lane_heap + i) + ends->last) >> j;
		lanes new_first = -(word >> first & 1), new_last = -(word >> last & 1);
		lanes head = new_first & ends->begin & inside, tail = new_last & -ends->end & inside;
		lanes has_head = (lanes)(head != 0), has_tail = (lanes)(tail != 0);

		*(lanes *)(bytes + i) += head + tail;
		if (blocks)
			*(lanes *)(blocks + i) -=
				has_head + has_tail - (has_head & has_tail & (lanes)(first == last));
	}
}

INLINE void add_blocks(uint64_t *sums, struct cow_set set)
{
	sums[0] += __builtin_popcountll(set.w[0]);
	sums[1] += __builtin_popcountll(set.w[1] >> 32);
	sums[2] += __builtin_popcountll(set.w[1] & 0xffff0000);
	sums[3] += __builtin_popcountll(set.w[1] & 0xff00);
	sums[4] += __builtin_popcountll(set.w[1] & 0xf0);
	sums[5] += __builtin_popcountll(set.w[1] & 0xc);
}

INLINE struct cow_set set_and(struct cow_set a, struct cow_set b)
{
	return (struct cow_set){{a.w[0] & b.w[0], a.w[1] & b.w[1]}};
}

INLINE struct cow_set set_without(struct cow_set a, struct cow_set b)
{
	return (struct cow_set){{a.w[0] & ~b.w[0], a.w[1] & ~b.w[1]}};
}

/* The blocks of all levels that a write touches. */
INLINE struct cow_set touched(const struct bs_cow_model *m, const struct cow_ends *ends)
{
	return (struct cow_set){{~0ull << ends->first & ~0ull >> (63 - ends->last),
		m->heap_from[ends->first] & m->heap_to[ends->last]}};
}

/* The number of levels, from the first on, at which a set has a block, if the first one has. */
INLINE int levels_of(struct cow_set set)
{
	static const uint8_t of_bit[65] = {
		[2] = 6, 6, [4] = 5, 5, 5, 5, [8 ... 15] = 4, [16 ... 31] = 3, [32 ... 63] = 2, 1};

	return of_bit[set.w[1] ? __builtin_ctzll(set.w[1]) : 64];
}

INLINE void change_metadata(
	struct bs_cow_model *m, int depth, uint64_t node, uint32_t device, struct cow_set new)
{
	uint64_t block = node << 6, leaf = (block | __builtin_ctzll(new.w[0])) / COW_LEAF;

	if (leaf == (block | (63 - __builtin_clzll(new.w[0]))) / COW_LEAF)
		cow_metadata_mark(m, depth, device, leaf, levels_of(new));
	else
		cow_metadata_mark_levels(m, depth, node, device, new);
}

/* Writes in a row to one node: their new blocks are counted when another node has its turn. Until then those that
 * were holes, or of the epoch before, are so still. */
struct visit {
	struct cow_node *n; /* NULL: nothing yet */
	uint64_t node;
	uint32_t device;
	struct cow_set before; /* was current */
};

INLINE void end_visit(struct bs_cow_model *m, int depth, const struct visit *visit)
{
	struct cow_sums *sums = &m->sums[depth];
	struct cow_node *n = visit->n;
	struct cow_set new = set_without(n->current, visit->before);
	struct cow_set holes = set_and(new, n->hole), superseded = set_and(new, n->previous);

	if (!new.w[0])
		return;
	add_blocks(sums->allocated, new);
	if (superseded.w[0] | superseded.w[1]) {
		add_blocks(sums->superseded, superseded);
		n->previous = set_without(n->previous, new);
	}
	if (holes.w[0] | holes.w[1]) {
		add_blocks(sums->provisioned, holes);
		n->hole = set_without(n->hole, new);
	}
	if (depth)
		n->children |= new.w[0];
	change_metadata(m, depth, visit->node, visit->device, new);
}

/* n: the node if it is known, else NULL. Returns NULL when out of memory. */
INLINE struct cow_node *begin_visit(struct bs_cow_model *m, int depth, uint64_t node, uint32_t device,
	struct cow_node *n, struct visit *visit)
{
	if (visit->n && visit->node == node && visit->device == device)
		return visit->n;
	if (!n)
		n = cow_node_find(m, depth, node, device);
	if (!n)
		n = cow_node_add(m, depth, node, device);
	if (!n)
		return NULL;
	if (visit->n)
		end_visit(m, depth, visit);
	cow_node_begin_epoch(m, n);
	*visit = (struct visit){n, node, device, n->current};
	return n;
}

/* Returns whether a block of the last level is new. */
INLINE bool write_node(struct bs_cow_model *m, int depth, uint64_t node, const struct cow_range *range,
	struct cow_node *n, struct visit *visit)
{
	struct cow_ends ends = cow_ends(m, depth, node, range);
	struct cow_sums *sums = &m->sums[depth];

	n = begin_visit(m, depth, node, range->device, n, visit);
	if (!n)
		return false;
	struct cow_set new = set_without(touched(m, &ends), n->current), holes = set_and(new, n->hole);
	if (!new.w[0])
		return false;
	add_parts(m, depth, &ends, set_without(new, holes), sums->copied, sums->copied_bytes);
	if (holes.w[0] | holes.w[1])
		add_parts(m, depth, &ends, holes, NULL, sums->filled_bytes);
	n->current.w[0] |= new.w[0];
	n->current.w[1] |= new.w[1];
	return new.w[1] & 0xc;
}

INLINE void write_range(
	struct bs_cow_model *m, const struct cow_range *range, struct cow_node *first, struct visit *visits)
{
	int shift = m->base_shift;

	for (int depth = 0; depth <= m->top; depth++, shift += 6) {
		uint64_t node = range->begin >> shift >> 6, last = (range->end - 1) >> shift >> 6;
		bool climb = write_node(m, depth, node, range, first, &visits[depth]);

		while (++node <= last)
			climb |= write_node(m, depth, node, range, NULL, &visits[depth]);
		if (!climb)
			return;
		first = NULL;
	}
}

INLINE void end_visits(struct bs_cow_model *m, const struct visit *visits)
{
	for (int depth = 0; depth <= m->top && visits[depth].n; depth++)
		end_visit(m, depth, &visits[depth]);
}

/* Nothing is to be done if every smallest block of the range was written in this epoch. n: the place of the node
 * where the range begins, NULL if it is not known. */
INLINE void apply_write(
	struct bs_cow_model *m, const struct cow_range *range, struct cow_node *n, struct visit *visits)
{
	uint64_t first = range->begin >> m->base_shift, last = (range->end - 1) >> m->base_shift;
	uint64_t mask = ~0ull << (first & 63) & ~0ull >> (63 - (last & 63));

	if (first >> 6 != last >> 6 || !n || n->stamp != m->epoch || mask & ~n->current.w[0])
		write_range(m, range, n && n->stamp ? n : NULL, visits);
}

INLINE void fetch_group(const struct bs_cow_model *m, const struct bs_request *request)
{
	uint64_t node = request->offset >> m->base_shift >> 6;

	if (request->kind == BS_REQUEST_WRITE)
		__builtin_prefetch(cow_nodes_group(&m->nodes, 0, node, request->device));
}

/* The place of the node where a write begins, on its way into the cache. */
INLINE struct cow_node *fetch(struct bs_cow_model *m, const struct bs_request *request)
{
	uint64_t node = request->offset >> m->base_shift >> 6;

	if (request->kind != BS_REQUEST_WRITE)
		return NULL;
	struct cow_node *place = cow_nodes_place(&m->nodes, 0, node, request->device);
	__builtin_prefetch(place);
	return place;
}

INLINE uint64_t take_transfers(struct bs_cow_model *m, const struct bs_request *requests, uint64_t count)
{
	uint64_t highest = m->trace.highest_byte, limit = cow_minimum(m->grows_at - 1, COW_MAX_END), i = 0;
	uint64_t bytes = 0, writes = 0, written = 0;
	uint64_t most = m->snapshot_writes - m->writes, most_bytes = m->snapshot_bytes - m->bytes;
	struct cow_node *places[AHEAD];
	struct visit visits[COW_DEPTHS] = {0};

	for (uint64_t k = 0; k < cow_minimum(AHEAD, count); k++)
		places[k] = fetch(m, &requests[k]);
	for (; i < count; i++) {
		const struct bs_request *r = &requests[i];
		struct cow_range range = {r->offset, r->offset + r->length, r->device};
		struct cow_node *place = places[i % AHEAD];

		if (r->kind > BS_REQUEST_WRITE || r->length - 1 >= COW_MAX_WRITE || r->time >= m->next_time ||
			r->offset >= limit || range.end > limit)
			break;
		if (i + 2 * AHEAD < count)
			fetch_group(m, r + 2 * AHEAD);
		if (i + AHEAD < count)
			places[i % AHEAD] = fetch(m, r + AHEAD);
		highest = range.end > highest ? range.end : highest;
		bytes += r->length;
		if (r->kind != BS_REQUEST_WRITE)
			continue;
		written += r->length;
		apply_write(m, &range, place, visits);
		if (++writes >= most || written >= most_bytes) {
			i++;
			break;
		}
	}
	end_visits(m, visits);
	m->trace.highest_byte = highest;
	m->trace.requests += i;
	m->trace.reads += i - writes;
	m->trace.read_bytes += bytes - written;
	m->trace.writes += writes;
	m->trace.written_bytes += written;
	m->writes += writes;
	m->bytes += written;
	m->dirty |= writes > 0;
	return i;
}

FAST static uint64_t take_fast(struct bs_cow_model *m, const struct bs_request *requests, uint64_t count)
{
	return take_transfers(m, requests, count);
}

uint64_t cow_take_transfers(struct bs_cow_model *m, const struct bs_request *requests, uint64_t count)
{
	return m->fast ? take_fast(m, requests, count) : take_transfers(m, requests, count);
}

void cow_write(struct bs_cow_model *m, const struct cow_range *range)
{
	struct visit visits[COW_DEPTHS] = {0};

	write_range(m, range, NULL, visits);
	end_visits(m, visits);
}
