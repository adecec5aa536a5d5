/*
 * Which data blocks are mapped, by any device, a bit each: what a scrub reads. Every distinct node is read once.
 * Memory: a bit a metadata block.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "blocksnap.h"
#include "error.h"
#include "metadata_reader.h"

struct mapped {
	struct metadata_reader r;
	uint8_t *seen; /* a bit each metadata block */
	uint8_t *bits; /* the caller's */
	uint64_t nr_bits;
	struct disk_node path[BTREE_MAX_DEPTH];
};

static bool set_bit(uint8_t *bits, uint64_t i)
{
	bool before = bits[i / 8] >> (i % 8) & 1;

	bits[i / 8] |= (uint8_t)(1u << i % 8);
	return before;
}

static int mark_leaf(struct mapped *m, const struct disk_node *leaf)
{
	for (uint32_t i = 0; i < node_nr(leaf); i++) {
		uint64_t block = mapping_block(node_value64(leaf, i));

		if (block >= m->nr_bits)
			return bs_fail(-EILSEQ,
				"%sthin block %" PRIu64 " is mapped to data block %" PRIu64 " of %" PRIu64,
				m->r.prefix, node_key(leaf, i), block, m->nr_bits);
		set_bit(m->bits, block);
	}
	return 0;
}

/* A node is visited once, so cycles end too. */
static int mark_tree(struct mapped *m, uint64_t block, int depth)
{
	if (block < m->r.nr_blocks && set_bit(m->seen, block))
		return 0;
	if (depth == BTREE_MAX_DEPTH)
		return bs_fail(-EILSEQ, "%sblock %" PRIu64 ": the tree is deeper than %d nodes", m->r.prefix,
			block, BTREE_MAX_DEPTH);
	struct disk_node *node = &m->path[depth];
	int err = metadata_read_block(&m->r, block, node);
	if (!err)
		err = metadata_node_check(&m->r, node, block, sizeof(uint64_t));
	if (err || node_is_leaf(node))
		return err ? err : mark_leaf(m, node);
	for (uint32_t i = 0; !err && i < node_nr(node); i++)
		err = mark_tree(m, node_value64(node, i), depth + 1);
	return err;
}

static int mark_devices(struct mapped *m)
{
	struct device_walk walk;
	struct device_entry device;
	int found = device_walk_init(&walk, &m->r);

	while (found >= 0 && (found = device_walk_next(&walk, &device)) == 1)
		found = mark_tree(m, device.root, 0);
	device_walk_deinit(&walk);
	return found;
}

int bs_metadata_mapped_blocks(const char *metadata, int held, uint8_t *bits, uint64_t nr_bits)
{
	struct mapped *m = calloc(1, sizeof(*m));

	if (!m)
		return bs_fail(-ENOMEM, "%s: out of memory", metadata);
	int err = metadata_reader_open(&m->r, metadata, held);
	m->bits = bits;
	m->nr_bits = nr_bits;
	m->seen = err ? NULL : calloc(1, m->r.nr_blocks / 8 + 1);
	if (!err && !m->seen)
		err = bs_fail(-ENOMEM, "%s: out of memory", metadata);
	if (!err)
		err = mark_devices(m);
	free(m->seen);
	metadata_reader_deinit(&m->r);
	free(m);
	return err;
}
