/*
 * B-trees of the dm-thin format: 64-bit keys, values of one size, copy-on-write through the transaction
 * manager.
 *
 * A tree is its root's block number; functions that change it take the number and put the new one there.
 * Values are the bytes as on disk. A node shared by several trees is copied when it is changed; what it
 * refers to is then counted once more, for leaves by the owner's inc. The owner counts a value that it
 * inserts, overwrites or looks up itself; only btree_remove and btree_delete call dec.
 *
 * Not thread-safe. After an error the transaction can only be abandoned, except for look-ups.
 */
#ifndef BS_BTREE_H
#define BS_BTREE_H

#include <stdbool.h>
#include <stdint.h>

#include "transaction_manager.h"

#define BTREE_MAX_VALUE_SIZE 24

struct btree {
	struct transaction_manager *tm;
	uint32_t value_size;
	/* May be NULL: values refer to nothing. */
	int (*inc)(void *context, const void *value);
	int (*dec)(void *context, const void *value);
	void *context;
};

int btree_create(const struct btree *tree, uint64_t *ret_root);
/* 1 found, 0 absent. */
int btree_lookup(const struct btree *tree, uint64_t root, uint64_t key, void *ret_value);
/* The same; ret_shared tells whether a node on the path (the root included) has more than one reference, in
 * the running transaction or, for a root of the committed state, in that state. */
int btree_lookup_shared(const struct btree *tree, uint64_t root, uint64_t key, bool committed,
	void *ret_value, bool *ret_shared);
/* Set the value of key; ret_added (may be NULL): the key was not there. */
int btree_insert(const struct btree *tree, uint64_t *root, uint64_t key, const void *value, bool *ret_added);
/* 1 removed, 0 absent. */
int btree_remove(const struct btree *tree, uint64_t *root, uint64_t key);
/* Drop one reference to a whole tree. */
int btree_delete(const struct btree *tree, uint64_t root);
/* Entries with begin <= key <= last, ascending, at most capacity; returns their number. */
int btree_scan(const struct btree *tree, uint64_t root, uint64_t begin, uint64_t last, uint64_t *ret_keys,
	void *ret_values, int capacity);
/* The number of a tree's nodes; leaves are not read but the first of each parent. */
int btree_count_nodes(const struct btree *tree, uint64_t root, uint64_t *ret);
/* A new node of ascending entries, for trees that are built bottom up (leaf: values are the tree's, else block
 * numbers). What the entries refer to is the caller's to count. */
int btree_write_node(const struct btree *tree, bool leaf, const uint64_t *keys, const void *values,
	uint32_t nr, uint64_t *ret);

#endif
