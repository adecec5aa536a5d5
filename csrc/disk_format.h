/*
 * The dm-thin metadata format, version 2: every on-disk structure, its checksum salt and its limits.
 *
 * Metadata is an array of 4096-byte blocks, all integers little-endian; block 0 is the superblock. Each block
 * but data begins with a checksum (crc32c without final inversion over bytes 4..4095, xored with the salt of
 * its type) and carries its own number. The layout is that of Linux drivers/md/dm-thin-metadata.c and
 * drivers/md/persistent-data.
 */
#ifndef BS_DISK_FORMAT_H
#define BS_DISK_FORMAT_H

#include <assert.h>
#include <endian.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* One-member structs: a forgotten conversion does not compile. */
struct le32 {
	uint32_t raw;
};
struct le64 {
	uint64_t raw;
};

static inline uint32_t le32_get(struct le32 v)
{
	return le32toh(v.raw);
}
static inline uint64_t le64_get(struct le64 v)
{
	return le64toh(v.raw);
}
static inline struct le32 le32_of(uint32_t v)
{
	return (struct le32){htole32(v)};
}
static inline struct le64 le64_of(uint64_t v)
{
	return (struct le64){htole64(v)};
}

#define SECTOR_SIZE 512u
#define METADATA_BLOCK_SIZE 4096u
#define METADATA_BLOCK_SECTORS 8u
#define METADATA_MAX_BLOCKS (255ull * ENTRIES_PER_BITMAP)

#define MIN_DATA_BLOCK_SIZE 4096ull
#define MAX_DATA_BLOCK_SIZE (1ull << 30)
#define MAX_DATA_BLOCKS (1ull << 40)

/* The kernel wants multiples of 64 KiB; the user engine also takes 4, 8, 16 and 32 KiB. */
static inline bool is_data_block_size(uint64_t bytes)
{
	if (bytes < MIN_DATA_BLOCK_SIZE || bytes > MAX_DATA_BLOCK_SIZE)
		return false;
	return bytes < 65536 ? (bytes & (bytes - 1)) == 0 : bytes % 65536 == 0;
}

#define MAX_DEVICE_ID ((1u << 24) - 1)
#define MAX_TIME ((1u << 24) - 1)

/* ---- superblock */

#define SUPERBLOCK_SALT 160774u
#define SUPERBLOCK_MAGIC 27022010ull
#define SUPERBLOCK_VERSION 2u
#define SUPERBLOCK_NEEDS_CHECK 1u

struct disk_sm_root {
	struct le64 nr_blocks;
	struct le64 nr_allocated;
	struct le64 bitmap_root;    /* data: root of the index tree; metadata: the index block */
	struct le64 ref_count_root; /* overflow tree */
	uint8_t unused[96];
};
static_assert(sizeof(struct disk_sm_root) == 128, "space map root");

struct disk_superblock {
	struct le32 csum;
	struct le32 flags;
	struct le64 blocknr;
	uint8_t uuid[16];
	struct le64 magic;
	struct le32 version;
	struct le32 time;
	struct le64 trans_id;
	struct le64 held_root;
	struct disk_sm_root data_sm_root;
	struct disk_sm_root metadata_sm_root;
	struct le64 data_mapping_root;
	struct le64 device_details_root;
	struct le32 data_block_size;     /* sectors */
	struct le32 metadata_block_size; /* sectors */
	struct le64 metadata_nr_blocks;
	struct le32 compat_flags;
	struct le32 compat_ro_flags;
	struct le32 incompat_flags;
	/* The rest stays zero: a torn write of block 0 then leaves the old or the new superblock, never a
	 * mixture. */
	uint8_t zero[METADATA_BLOCK_SIZE - 364];
};
static_assert(sizeof(struct disk_superblock) == METADATA_BLOCK_SIZE, "superblock");
static_assert(offsetof(struct disk_superblock, data_sm_root) == 64, "superblock");
static_assert(offsetof(struct disk_superblock, data_mapping_root) == 320, "superblock");
static_assert(offsetof(struct disk_superblock, zero) == 364, "superblock");

/* ---- B-tree node */

#define BTREE_NODE_SALT 121107u
#define BTREE_INTERNAL 1u
#define BTREE_LEAF 2u
#define BTREE_MAX_DEPTH 12

struct disk_node {
	struct le32 csum;
	struct le32 flags;
	struct le64 blocknr;
	struct le32 nr_entries;
	struct le32 max_entries;
	struct le32 value_size;
	struct le32 padding;
	struct le64 keys[508]; /* max_entries keys, then max_entries values */
};
static_assert(sizeof(struct disk_node) == METADATA_BLOCK_SIZE, "node");

/* Entries that fit in a node, a multiple of three. */
static inline uint32_t btree_max_entries(uint32_t value_size)
{
	return (METADATA_BLOCK_SIZE - 32) / (8 + value_size) / 3 * 3;
}

/* ---- values */

struct disk_device_details {
	struct le64 mapped_blocks;
	struct le64 transaction_id;
	struct le32 creation_time;
	struct le32 snapshotted_time;
};
static_assert(sizeof(struct disk_device_details) == 24, "details");

/* A mapping: data block in the upper 40 bits, time in the lower 24. */
static inline uint64_t mapping_pack(uint64_t block, uint32_t time)
{
	return block << 24 | time;
}
static inline uint64_t mapping_block(uint64_t packed)
{
	return packed >> 24;
}
static inline uint32_t mapping_time(uint64_t packed)
{
	return packed & 0xffffff;
}

/* ---- space maps */

#define BITMAP_SALT 240779u
#define INDEX_SALT 160478u
#define ENTRIES_PER_BITMAP 16320u
#define MAX_METADATA_BITMAPS 255u

struct disk_bitmap {
	struct le32 csum;
	struct le32 unused;
	struct le64 blocknr;
	struct le64 words[510]; /* 32 two-bit entries a word */
};
static_assert(sizeof(struct disk_bitmap) == METADATA_BLOCK_SIZE, "bitmap");

struct disk_index_entry {
	struct le64 blocknr;
	struct le32 nr_free;          /* 16320 minus the nonzero entries, in the last bitmap too */
	struct le32 none_free_before; /* hint */
};
static_assert(sizeof(struct disk_index_entry) == 16, "index entry");

struct disk_metadata_index {
	struct le32 csum;
	struct le32 padding;
	struct le64 blocknr;
	struct disk_index_entry entries[MAX_METADATA_BITMAPS];
};
static_assert(sizeof(struct disk_metadata_index) == METADATA_BLOCK_SIZE, "metadata index");

/* In a two-bit entry the lower bit is the high bit of the count: raw 2 is count 1, raw 1 is count 2; 3 stands
 * for three or more, the count then lies in the overflow tree. The map is its own inverse. */
static inline uint32_t bitmap_swap(uint32_t raw)
{
	return (raw >> 1 & 1) | (raw << 1 & 2);
}

static inline uint32_t bitmap_get(const struct disk_bitmap *bitmap, uint32_t entry)
{
	return bitmap_swap(le64_get(bitmap->words[entry / 32]) >> (entry % 32 * 2) & 3);
}

static inline void bitmap_set(struct disk_bitmap *bitmap, uint32_t entry, uint32_t count)
{
	uint64_t word = le64_get(bitmap->words[entry / 32]);
	uint32_t shift = entry % 32 * 2;

	word = (word & ~(3ull << shift)) | (uint64_t)bitmap_swap(count) << shift;
	bitmap->words[entry / 32] = le64_of(word);
}

#endif
