#include "cow_nodes.h"

#include <assert.h>
#include <errno.h>
#include <sys/mman.h>

#include "error.h"

#define GROUP_BYTES (sizeof(struct cow_node) << COW_GROUP_BITS)
#define FIRST_BYTES (64u << 10)
#define MAX_BYTES (64u << 20)

/* At the beginning of its memory, in place of a group. */
struct cow_slab {
	struct cow_slab *next;
	size_t bytes;
};

static_assert(sizeof(struct cow_node) == 64, "a node is a cache line");
static_assert(sizeof(struct cow_slab) <= GROUP_BYTES, "a slab begins with one group's place");

int cow_nodes_init(struct cow_nodes *nodes)
{
	return cow_table_init(&nodes->groups, sizeof(struct cow_group));
}

void cow_nodes_deinit(struct cow_nodes *nodes)
{
	while (nodes->slabs) {
		struct cow_slab *slab = nodes->slabs;

		nodes->slabs = slab->next;
		munmap(slab, slab->bytes);
	}
	cow_table_deinit(&nodes->groups);
	*nodes = (struct cow_nodes){0};
}

/* As much again as there is, within limits. */
static bool add_slab(struct cow_nodes *nodes)
{
	size_t bytes = nodes->bytes < FIRST_BYTES ? FIRST_BYTES
		       : nodes->bytes > MAX_BYTES ? MAX_BYTES
						  : nodes->bytes;
	struct cow_slab *slab = cow_map(bytes);

	if (!slab)
		return false;
	*slab = (struct cow_slab){nodes->slabs, bytes};
	nodes->slabs = slab;
	nodes->bytes += bytes;
	nodes->left = bytes / GROUP_BYTES - 1;
	return true;
}

struct cow_node *cow_nodes_add(struct cow_nodes *nodes, int depth, uint64_t node, uint32_t device)
{
	struct cow_node *place = cow_nodes_place(nodes, depth, node, device);

	if (place)
		return place;
	if (!nodes->left && !add_slab(nodes))
		return NULL;
	struct cow_group *group =
		cow_table_add(&nodes->groups, cow_index(depth, node >> COW_GROUP_BITS), device, 1);
	if (!group)
		return NULL;
	group->nodes =
		(struct cow_node *)((char *)nodes->slabs + nodes->slabs->bytes - nodes->left * GROUP_BYTES);
	nodes->left--;
	return group->nodes + (node & ((1 << COW_GROUP_BITS) - 1));
}
