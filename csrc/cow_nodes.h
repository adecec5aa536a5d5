/*
 * The nodes of the copy-on-write model: what it knows of 64 blocks of a level and of the five levels above.
 * They live in groups of neighbours that never move, found by a hash of groups, which is small enough to stay
 * in the cache where the nodes do not. Not thread-safe.
 */
#ifndef BS_COW_NODES_H
#define BS_COW_NODES_H

#include "cow_table.h"

#define COW_GROUP_BITS 4

struct cow_set {
	uint64_t w[2];
};

/* A cache line. */
struct cow_node {
	uint32_t stamp; /* the epoch that the sets are of; 0: the node does not exist */
	uint32_t padding;
	uint64_t children;       /* depth 1 and more: which of the 64 blocks have a node below them */
	struct cow_set current;  /* allocated in this epoch */
	struct cow_set previous; /* allocated in the epoch before and not replaced since */
	struct cow_set hole;
};

struct cow_group {
	struct cow_key key; /* cow_index() of a depth and a node of the group, over the size of a group */
	struct cow_node *nodes;
};

struct cow_slab;

#define COW_INDEX_DEPTHS 16 /* that cow_index() has bits for */

struct cow_nodes {
	struct cow_table groups;
	/* Where the last look of each depth ended: often the next one's, too. */
	struct cow_group latest[COW_INDEX_DEPTHS];
	struct cow_slab *slabs; /* the latest first: where groups come from */
	size_t left, bytes;     /* groups in the latest; bytes of all */
};

/* -ENOMEM. */
int cow_nodes_init(struct cow_nodes *nodes);
void cow_nodes_deinit(struct cow_nodes *nodes);
/* The node's place, which did not exist when cow_nodes_place() was asked. NULL when out of memory. */
struct cow_node *cow_nodes_add(struct cow_nodes *nodes, int depth, uint64_t node, uint32_t device);

static inline uint64_t cow_index(int depth, uint64_t place)
{
	return place | (uint64_t)depth << 60;
}

/* Where a look for the node begins: to be prefetched. */
static inline const void *cow_nodes_group(
	const struct cow_nodes *nodes, int depth, uint64_t node, uint32_t device)
{
	return cow_table_slot(
		&nodes->groups, sizeof(struct cow_group), cow_index(depth, node >> COW_GROUP_BITS), device);
}

/* Where the node is, or would be; NULL if there is no place for it yet. It stays where it is. */
static inline struct cow_node *cow_nodes_place(
	struct cow_nodes *nodes, int depth, uint64_t node, uint32_t device)
{
	uint64_t index = cow_index(depth, node >> COW_GROUP_BITS);
	struct cow_group *latest = &nodes->latest[depth];

	if (latest->key.index != index || latest->key.device != device || !latest->key.stamp) {
		struct cow_group *group = cow_table_find(&nodes->groups, sizeof(*group), index, device);

		if (!group)
			return NULL;
		*latest = *group;
	}
	return latest->nodes + (node & ((1 << COW_GROUP_BITS) - 1));
}

static inline size_t cow_nodes_bytes(const struct cow_nodes *nodes)
{
	return nodes->bytes + cow_table_bytes(&nodes->groups);
}

#endif
