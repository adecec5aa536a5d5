/*
 * The copy-on-write model: takes the requests of a trace in order, keeps what cow_model.h describes, ends
 * epochs and transactions, and hands out counts.
 *
 * Memory: 1 KiB for each 16 times 64 smallest blocks in which one was written, some more for what lies above and
 * for metadata, and a bounded history.
 */
#include "cow_model.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"

#define MIN_SHIFT 9
#define MAX_SHIFT 30
#define MAX_RECORDS 65536

/* ---- life ---- */

static int check_sizes(const uint64_t *block_sizes, int nr)
{
	if (nr < 1)
		return bs_fail(-EINVAL, "a model needs a block size");
	for (int i = 0; i < nr; i++) {
		uint64_t size = block_sizes[i];

		if (size & (size - 1) || size < 1ull << MIN_SHIFT || size > 1ull << MAX_SHIFT)
			return bs_fail(-EINVAL,
				"a block size of %" PRIu64
				" bytes: powers of two from 512 to 1G can be modelled",
				size);
		if (i && size <= block_sizes[i - 1])
			return bs_fail(-EINVAL, "block sizes must ascend: %" PRIu64 " follows %" PRIu64, size,
				block_sizes[i - 1]);
	}
	return 0;
}

static void set_levels(struct bs_cow_model *m, const uint64_t *block_sizes, int nr)
{
	m->base_shift = __builtin_ctzll(block_sizes[0]);
	while (m->base_shift + 6 * (m->top + 1) < 63)
		m->top++;
	m->nr_sizes = nr;
	for (int i = 0; i < nr; i++) {
		m->sizes[i] = __builtin_ctzll(block_sizes[i]) - m->base_shift;
		m->wanted[m->sizes[i] / 6] |= 1 << m->sizes[i] % 6;
	}
	for (int depth = 0; depth < COW_DEPTHS; depth++)
		for (int j = 0; j < COW_LANES; j++)
			m->inside[depth][j] = (1ull << cow_shift(m, 6 * depth + j)) - 1;
}

static void set_heap_masks(struct bs_cow_model *m)
{
	for (int block = 0; block < 64; block++)
		for (int j = 1; j < 6; j++) {
			int bit = (64 + block) >> j, level = 64 >> j;

			m->heap_from[block] |= ((1ull << (2 * level - bit)) - 1) << bit;
			m->heap_to[block] |= ((1ull << (bit + 1 - level)) - 1) << level;
		}
}

static void init(struct bs_cow_model *m, const struct bs_cow_options *options)
{
	m->options = *options;
	m->snapshot_writes = options->snapshot_writes ? options->snapshot_writes : UINT64_MAX;
	m->snapshot_bytes = options->snapshot_bytes ? options->snapshot_bytes : UINT64_MAX;
	m->next_commit = m->next_snapshot = m->next_time = UINT64_MAX;
	m->epoch = 1;
	m->epochs_a_record = 1;
	cow_metadata_grow(m, options->device_bytes);
#if defined(__x86_64__)
	m->fast = __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("bmi2") &&
		  __builtin_cpu_supports("avx2");
#endif
}

int bs_cow_model_create(const uint64_t *block_sizes, int nr_sizes, const struct bs_cow_options *options,
	struct bs_cow_model **ret)
{
	int r = check_sizes(block_sizes, nr_sizes);

	if (r < 0)
		return r;
	struct bs_cow_model *m = calloc(1, sizeof(*m));
	if (!m)
		return bs_fail(-ENOMEM, "out of memory");
	set_levels(m, block_sizes, nr_sizes);
	set_heap_masks(m);
	init(m, options);
	r = cow_nodes_init(&m->nodes);
	if (r == 0)
		r = cow_metadata_init(m);
	if (r < 0) {
		bs_cow_model_destroy(m);
		return r;
	}
	*ret = m;
	return 0;
}

void bs_cow_model_destroy(struct bs_cow_model *m)
{
	if (!m)
		return;
	cow_nodes_deinit(&m->nodes);
	cow_metadata_deinit(m);
	free(m->epochs);
	free(m);
}

/* ---- nodes ---- */

/* Whether the blocks of a node that does not exist are holes: the node above knows, or the one above it. */
static bool begins_as_hole(struct bs_cow_model *m, int depth, uint64_t node, uint32_t device)
{
	while (++depth <= m->top) {
		const struct cow_node *above = cow_node_find(m, depth, node >> 6, device);

		if (above)
			return above->hole.w[0] >> (node & 63) & 1;
		node >>= 6;
	}
	return m->options.flags & BS_COW_FRESH;
}

struct cow_node *cow_node_add(struct bs_cow_model *m, int depth, uint64_t node, uint32_t device)
{
	bool hole = begins_as_hole(m, depth, node, device);
	struct cow_node *n = cow_nodes_add(&m->nodes, depth, node, device);

	if (!n) {
		m->out_of_memory = true;
		return NULL;
	}
	n->stamp = m->epoch;
	if (hole)
		n->hole = (struct cow_set){{UINT64_MAX, UINT64_MAX}};
	return n;
}

struct cow_node *cow_node_get(struct bs_cow_model *m, int depth, uint64_t node, uint32_t device)
{
	struct cow_node *n = cow_node_find(m, depth, node, device);

	if (!n)
		return cow_node_add(m, depth, node, device);
	cow_node_begin_epoch(m, n);
	return n;
}

/* ---- epochs ---- */

static void add_epoch(struct bs_cow_epoch *to, const struct bs_cow_epoch *from)
{
	to->blocks_allocated += from->blocks_allocated;
	to->blocks_freed += from->blocks_freed;
	to->blocks_exclusive += from->blocks_exclusive;
	to->blocks_copied += from->blocks_copied;
	to->metadata_blocks += from->metadata_blocks;
}

/* What the running epoch adds to its own record, and to that of the snapshot at its beginning. */
static struct bs_cow_epoch running_epoch(const struct bs_cow_model *m, int level)
{
	const struct cow_sums *now = &m->sums[level / 6], *before = &m->before[level / 6];
	int j = level % 6;

	return (struct bs_cow_epoch){.blocks_allocated = now->allocated[j] - before->allocated[j],
		.blocks_freed = now->freed[j] - before->freed[j],
		.blocks_copied = now->copied[j] - before->copied[j],
		.metadata_blocks = m->levels[level].metadata_blocks - m->levels[level].metadata_before};
}

static struct bs_cow_epoch superseded(const struct bs_cow_model *m, int level)
{
	int d = level / 6, j = level % 6;

	return (struct bs_cow_epoch){
		.blocks_exclusive = m->sums[d].superseded[j] - m->before[d].superseded[j]};
}

static uint64_t record_of(const struct bs_cow_model *m, uint32_t epoch)
{
	return (epoch - 1) / m->epochs_a_record;
}

/* Let each record stand for twice as many epochs. */
static void halve_records(struct bs_cow_model *m)
{
	uint64_t n = m->nr_sizes;

	for (uint64_t r = 0; r < MAX_RECORDS; r += 2)
		for (uint64_t i = 0; i < n; i++) {
			struct bs_cow_epoch sum = m->epochs[r * n + i];

			add_epoch(&sum, &m->epochs[(r + 1) * n + i]);
			m->epochs[r / 2 * n + i] = sum;
		}
	memset(m->epochs + MAX_RECORDS / 2 * n, 0, MAX_RECORDS / 2 * n * sizeof(*m->epochs));
	m->epochs_a_record *= 2;
}

/* Make room for the record of the running epoch. */
static int reserve_record(struct bs_cow_model *m)
{
	uint64_t needed = record_of(m, m->epoch) + 1, capacity = m->records ? m->records * 2 : 16;

	if (needed <= m->records)
		return 0;
	if (needed > MAX_RECORDS) {
		halve_records(m);
		return 0;
	}
	struct bs_cow_epoch *epochs = realloc(m->epochs, capacity * m->nr_sizes * sizeof(*epochs));
	if (!epochs)
		return bs_fail(-ENOMEM, "out of memory");
	memset(epochs + m->records * m->nr_sizes, 0, (capacity - m->records) * m->nr_sizes * sizeof(*epochs));
	m->epochs = epochs;
	m->records = capacity;
	return 0;
}

static void end_epoch(struct bs_cow_model *m)
{
	for (int i = 0; i < m->nr_sizes; i++) {
		struct bs_cow_epoch ended = running_epoch(m, m->sizes[i]),
				    before = superseded(m, m->sizes[i]);

		add_epoch(&m->epochs[record_of(m, m->epoch) * m->nr_sizes + i], &ended);
		if (m->epoch > 1)
			add_epoch(&m->epochs[record_of(m, m->epoch - 1) * m->nr_sizes + i], &before);
	}
	for (int i = 0; i < m->nr_sizes; i++)
		m->levels[m->sizes[i]].metadata_before = m->levels[m->sizes[i]].metadata_blocks;
	memcpy(m->before, m->sums, sizeof(m->before));
	m->epoch++;
	m->writes = m->bytes = 0;
	m->dirty = false;
	m->trace.snapshots++;
}

int bs_cow_model_snapshot(struct bs_cow_model *m)
{
	int r = m->epoch == UINT32_MAX ? bs_fail(-EOVERFLOW, "more than %u snapshots", m->epoch - 1)
				       : reserve_record(m);

	if (r < 0)
		return r;
	cow_metadata_commit(m, true);
	end_epoch(m);
	return 0;
}

/* ---- time ---- */

/* The first multiple of an interval since the trace began that is later than time. */
static uint64_t next_multiple(const struct bs_cow_model *m, uint64_t interval, uint64_t time)
{
	uint64_t since, sum;

	if (!interval ||
		__builtin_mul_overflow((time - m->trace.first_time) / interval + 1, interval, &since) ||
		__builtin_add_overflow(m->trace.first_time, since, &sum))
		return UINT64_MAX;
	return sum;
}

/* The clock of the trace has reached next_time. */
static int pass_time(struct bs_cow_model *m, uint64_t time)
{
	int r = 0;

	if (time >= m->next_commit)
		cow_metadata_commit(m, false);
	if (time >= m->next_snapshot && m->dirty)
		r = bs_cow_model_snapshot(m);
	m->next_commit = next_multiple(m, m->options.commit_ns, time);
	m->next_snapshot = next_multiple(m, m->options.snapshot_ns, time);
	m->next_time = cow_minimum(m->next_commit, m->next_snapshot);
	return r;
}

/* ---- requests ---- */

static int snapshot_if_due(struct bs_cow_model *m)
{
	if (m->writes < m->snapshot_writes && m->bytes < m->snapshot_bytes)
		return 0;
	return bs_cow_model_snapshot(m);
}

static int take_write(struct bs_cow_model *m, const struct bs_request *request)
{
	struct cow_range range = {request->offset, request->offset + request->length, request->device};

	m->trace.writes++;
	m->trace.written_bytes += request->length;
	m->writes++;
	m->bytes += request->length;
	m->dirty = true;
	if (request->length)
		cow_write(m, &range);
	return snapshot_if_due(m);
}

static int take_discard(struct bs_cow_model *m, const struct bs_request *request)
{
	struct cow_range range = {request->offset, request->offset + request->length, request->device};

	m->trace.discards++;
	m->trace.discarded_bytes += request->length;
	m->dirty = true;
	if (request->length)
		cow_discard(m, &range);
	return 0;
}

static int check(const struct bs_cow_model *m, const struct bs_request *request)
{
	static const char *const names[] = {"read", "write", "discard"};

	if (request->kind == BS_REQUEST_FLUSH)
		return 0;
	if (request->kind > BS_REQUEST_FLUSH)
		return bs_fail(-EINVAL, "request %" PRIu64 " is of an unknown kind, %u", m->trace.requests,
			request->kind);
	if (request->offset > COW_MAX_END || request->length > COW_MAX_END - request->offset)
		return bs_fail(-EINVAL,
			"request %" PRIu64 ", a %s of %" PRIu64 " bytes at %" PRIu64 ", is beyond 2^63 bytes",
			m->trace.requests, names[request->kind], request->length, request->offset);
	if (request->kind == BS_REQUEST_WRITE && request->length > COW_MAX_WRITE)
		return bs_fail(-EINVAL,
			"request %" PRIu64 ", a write of %" PRIu64 " bytes, is larger than any device takes",
			m->trace.requests, request->length);
	return 0;
}

/* Any request. */
static int take(struct bs_cow_model *m, const struct bs_request *request)
{
	int r = check(m, request);

	if (r == 0 && request->time >= m->next_time)
		r = pass_time(m, request->time);
	if (r < 0)
		return r;
	m->trace.requests++;
	if (request->kind == BS_REQUEST_FLUSH) {
		m->trace.flushes++;
		cow_metadata_commit(m, false);
		return 0;
	}
	if (request->offset + request->length > m->trace.highest_byte) {
		m->trace.highest_byte = request->offset + request->length;
		if (m->trace.highest_byte >= m->grows_at)
			cow_metadata_grow(m, m->trace.highest_byte);
	}
	if (request->kind == BS_REQUEST_WRITE)
		return take_write(m, request);
	if (request->kind == BS_REQUEST_DISCARD)
		return take_discard(m, request);
	m->trace.reads++;
	m->trace.read_bytes += request->length;
	return 0;
}

static void begin(struct bs_cow_model *m, uint64_t time)
{
	m->trace.first_time = time;
	m->next_commit = next_multiple(m, m->options.commit_ns, time);
	m->next_snapshot = next_multiple(m, m->options.snapshot_ns, time);
	m->next_time = cow_minimum(m->next_commit, m->next_snapshot);
}

int bs_cow_model_feed(struct bs_cow_model *m, const struct bs_request *requests, uint64_t count)
{
	int r = 0;

	if (count && !m->trace.requests)
		begin(m, requests[0].time);
	for (uint64_t i = 0; r == 0 && i < count;) {
		uint64_t n = cow_take_transfers(m, requests + i, count - i);

		r = n ? snapshot_if_due(m) : take(m, &requests[i]);
		i += n ? n : 1;
		if (r == 0)
			m->trace.last_time = requests[i - 1].time;
		if (m->out_of_memory)
			r = bs_fail(-ENOMEM, "out of memory after %" PRIu64 " requests", m->trace.requests);
	}
	return r;
}

/* ---- results ---- */

void bs_cow_model_trace(const struct bs_cow_model *m, struct bs_cow_trace *ret)
{
	*ret = m->trace;
	ret->memory_bytes = sizeof(*m) + m->records * m->nr_sizes * sizeof(*m->epochs) +
			    cow_nodes_bytes(&m->nodes) + cow_table_bytes(&m->marks);
}

int bs_cow_model_results(struct bs_cow_model *m, struct bs_cow_result *out, int capacity)
{
	uint64_t pending[COW_LEVELS];

	cow_metadata_pending(m, pending);
	for (int i = 0; i < m->nr_sizes && i < capacity; i++) {
		int level = m->sizes[i];
		int j = level % 6;
		const struct cow_sums *sums = &m->sums[level / 6];

		out[i] = (struct bs_cow_result){
			.block_size = 1ull << cow_shift(m, level),
			.blocks_provisioned = sums->provisioned[j],
			.blocks_copied = sums->copied[j],
			.blocks_overwritten = sums->allocated[j] - sums->provisioned[j] - sums->copied[j],
			.blocks_discarded = sums->discarded[j],
			.blocks_freed = sums->freed[j],
			.copied_bytes = sums->copied_bytes[j],
			.zero_filled_bytes = sums->filled_bytes[j],
			.metadata_blocks = m->levels[level].metadata_blocks + pending[level],
			.commits = m->levels[level].commits + (pending[level] > 0),
		};
	}
	return m->nr_sizes;
}

int bs_cow_model_epochs(
	struct bs_cow_model *m, int size, uint64_t begin, struct bs_cow_epoch *out, int capacity)
{
	uint64_t last = record_of(m, m->epoch), pending[COW_LEVELS];
	int n = 0;

	if (size < 0 || size >= m->nr_sizes)
		return bs_fail(-EINVAL, "the model has %d block sizes", m->nr_sizes);
	int level = m->sizes[size];
	cow_metadata_pending(m, pending);
	for (; n < capacity && begin <= last; n++, begin++) {
		out[n] = (struct bs_cow_epoch){0};
		if (begin < m->records)
			out[n] = m->epochs[begin * m->nr_sizes + size];
		if (m->epoch > 1 && begin == record_of(m, m->epoch - 1)) {
			struct bs_cow_epoch before = superseded(m, level);

			add_epoch(&out[n], &before);
		}
		if (begin == last) {
			struct bs_cow_epoch running = running_epoch(m, level);

			running.blocks_exclusive = running.blocks_allocated - running.blocks_freed;
			running.metadata_blocks += pending[level];
			add_epoch(&out[n], &running);
		}
	}
	return n;
}

uint64_t bs_cow_model_epochs_a_record(const struct bs_cow_model *m)
{
	return m->epochs_a_record;
}
