/*
 * A small pool built block by block, without the code that writes pools: six devices that share a root, a
 * leaf and data blocks up to three ways. image_open puts it in a memory file whose path the walks take.
 *
 *   device 1, 3, 4 -> R1 -> A (thin 0..99 -> data 0..99), B (thin 100..199 -> data 100..199)
 *   device 2       -> R2 -> A, C (thin 100..199 -> data 200..299, time 1)
 *   device 5, 6    -> a leaf each (thin 100..102 -> data 100..102)
 */
#ifndef THIN_IMAGE_H
#define THIN_IMAGE_H

#include <sys/mman.h>
#include <unistd.h>

#include "crc32c.h"
#include "disk_format.h"
#include "test.h"

#define IMAGE_BLOCKS 64
#define IMAGE_DATA_BLOCKS 400
#define IMAGE_DEVICES 6

struct image {
	union {
		uint8_t bytes[METADATA_BLOCK_SIZE];
		struct disk_superblock superblock;
		struct disk_node node;
		struct disk_bitmap bitmap;
		struct disk_metadata_index index;
	} blocks[IMAGE_BLOCKS];
	uint32_t salts[IMAGE_BLOCKS]; /* 0: not used */
	uint32_t counts[IMAGE_BLOCKS];
	uint32_t data_counts[IMAGE_DATA_BLOCKS];
	uint32_t used;
	uint32_t device_2_root, leaf_b, leaf_c; /* to be damaged */
	int fd;
	char path[32];
};

static inline uint32_t image_block(struct image *im, uint32_t salt)
{
	im->salts[im->used] = salt;
	im->blocks[im->used].bitmap.blocknr = le64_of(im->used);
	return im->used++;
}

static inline uint32_t image_node(struct image *im, uint32_t flags, uint32_t value_size)
{
	uint32_t block = image_block(im, BTREE_NODE_SALT);
	struct disk_node *node = &im->blocks[block].node;

	node->flags = le32_of(flags);
	node->value_size = le32_of(value_size);
	node->max_entries = le32_of(btree_max_entries(value_size));
	return block;
}

static inline void image_add(struct image *im, uint32_t block, uint64_t key, const void *value)
{
	struct disk_node *node = &im->blocks[block].node;
	uint32_t nr = le32_get(node->nr_entries), size = le32_get(node->value_size);

	node->keys[nr] = le64_of(key);
	memcpy((char *)(node->keys + le32_get(node->max_entries)) + nr * size, value, size);
	node->nr_entries = le32_of(nr + 1);
}

static inline void image_add_child(struct image *im, uint32_t block, uint64_t key, uint32_t child)
{
	struct le64 value = le64_of(child);

	image_add(im, block, key, &value);
	im->counts[child]++;
}

static inline uint32_t image_leaf(
	struct image *im, uint64_t thin, uint64_t data, uint32_t length, uint32_t time)
{
	uint32_t block = image_node(im, BTREE_LEAF, 8);

	for (uint32_t i = 0; i < length; i++) {
		struct le64 value = le64_of(mapping_pack(data + i, time));

		image_add(im, block, thin + i, &value);
		im->data_counts[data + i]++;
	}
	return block;
}

static inline uint32_t image_internal(struct image *im, uint32_t first, uint32_t second)
{
	uint32_t block = image_node(im, BTREE_INTERNAL, 8);

	image_add_child(im, block, 0, first);
	image_add_child(im, block, 100, second);
	return block;
}

static inline void image_devices(struct image *im)
{
	uint32_t a = image_leaf(im, 0, 0, 100, 0);
	uint32_t b = im->leaf_b = image_leaf(im, 100, 100, 100, 0);
	uint32_t c = im->leaf_c = image_leaf(im, 100, 200, 100, 1);
	uint32_t shared = image_internal(im, a, b);
	uint32_t own = im->device_2_root = image_internal(im, a, c);
	uint32_t roots[IMAGE_DEVICES] = {
		shared, own, shared, shared, image_leaf(im, 100, 100, 3, 0), image_leaf(im, 100, 100, 3, 0)};
	static const uint32_t times[IMAGE_DEVICES][2] = {{0, 3}, {1, 1}, {2, 2}, {3, 3}, {1, 1}, {1, 1}};
	uint32_t top = image_node(im, BTREE_LEAF, 8), details = image_node(im, BTREE_LEAF, 24);

	for (uint32_t i = 0; i < IMAGE_DEVICES; i++) {
		struct disk_device_details value = {
			.mapped_blocks = le64_of(i < 4 ? 200 : 3),
			.transaction_id = le64_of(i),
			.creation_time = le32_of(times[i][0]),
			.snapshotted_time = le32_of(times[i][1]),
		};

		image_add_child(im, top, i + 1, roots[i]);
		image_add(im, details, i + 1, &value);
	}
	im->blocks[0].superblock.data_mapping_root = le64_of(top);
	im->blocks[0].superblock.device_details_root = le64_of(details);
	im->counts[top]++;
	im->counts[details]++;
}

/* The overflow tree of some counts, and their bitmap. */
static inline void image_map(
	struct image *im, const uint32_t *counts, uint32_t nr, uint32_t overflow, uint32_t bitmap)
{
	for (uint32_t i = 0; i < nr; i++) {
		struct le32 value = le32_of(counts[i]);

		if (counts[i] >= 3)
			image_add(im, overflow, i, &value);
		bitmap_set(&im->blocks[bitmap].bitmap, i, counts[i] < 3 ? counts[i] : 3);
	}
}

static inline struct disk_index_entry image_index_entry(uint32_t bitmap, const uint32_t *counts, uint32_t nr)
{
	uint32_t used = 0;

	for (uint32_t i = 0; i < nr; i++)
		used += counts[i] > 0;
	return (struct disk_index_entry){le64_of(bitmap), le32_of(ENTRIES_PER_BITMAP - used), le32_of(0)};
}

static inline struct disk_sm_root image_sm_root(
	uint32_t nr, const struct disk_index_entry *entry, uint32_t root, uint32_t overflow)
{
	return (struct disk_sm_root){
		.nr_blocks = le64_of(nr),
		.nr_allocated = le64_of(ENTRIES_PER_BITMAP - le32_get(entry->nr_free)),
		.bitmap_root = le64_of(root),
		.ref_count_root = le64_of(overflow),
	};
}

static inline void image_space_maps(struct image *im)
{
	struct disk_superblock *sb = &im->blocks[0].superblock;
	uint32_t data_overflow = image_node(im, BTREE_LEAF, 4), overflow = image_node(im, BTREE_LEAF, 4);
	uint32_t data_index = image_node(im, BTREE_LEAF, 16), index = image_block(im, INDEX_SALT);
	uint32_t data_bitmap = image_block(im, BITMAP_SALT), bitmap = image_block(im, BITMAP_SALT);
	const uint32_t own[] = {data_overflow, overflow, data_index, index, data_bitmap, bitmap};

	for (size_t i = 0; i < sizeof(own) / sizeof(*own); i++)
		im->counts[own[i]]++;
	image_map(im, im->data_counts, IMAGE_DATA_BLOCKS, data_overflow, data_bitmap);
	image_map(im, im->counts, IMAGE_BLOCKS, overflow, bitmap);
	struct disk_index_entry data_entry =
		image_index_entry(data_bitmap, im->data_counts, IMAGE_DATA_BLOCKS);
	struct disk_index_entry entry = image_index_entry(bitmap, im->counts, IMAGE_BLOCKS);
	image_add(im, data_index, 0, &data_entry);
	im->blocks[index].index.entries[0] = entry;
	sb->data_sm_root = image_sm_root(IMAGE_DATA_BLOCKS, &data_entry, data_index, data_overflow);
	sb->metadata_sm_root = image_sm_root(IMAGE_BLOCKS, &entry, index, overflow);
}

static inline struct image *image_create(void)
{
	struct image *im = calloc(1, sizeof(*im));

	CHECK(im);
	image_block(im, SUPERBLOCK_SALT);
	im->counts[0] = 1;
	struct disk_superblock *sb = &im->blocks[0].superblock;
	sb->magic = le64_of(SUPERBLOCK_MAGIC);
	sb->version = le32_of(SUPERBLOCK_VERSION);
	sb->time = le32_of(3);
	sb->trans_id = le64_of(9);
	sb->data_block_size = le32_of(128);
	sb->metadata_block_size = le32_of(METADATA_BLOCK_SECTORS);
	sb->metadata_nr_blocks = le64_of(IMAGE_BLOCKS);
	image_devices(im);
	image_space_maps(im);
	im->fd = memfd_create("metadata", MFD_CLOEXEC);
	CHECK(im->fd >= 0);
	snprintf(im->path, sizeof(im->path), "/proc/self/fd/%d", im->fd);
	return im;
}

static inline void image_destroy(struct image *im)
{
	close(im->fd);
	free(im);
}

/* Bring the memory file up to date, all checksums right. */
static inline void image_write(struct image *im)
{
	for (uint32_t i = 0; i < im->used; i++)
		im->blocks[i].node.csum = le32_of(block_checksum(&im->blocks[i], im->salts[i]));
	CHECK_EQ(pwrite(im->fd, im->blocks, sizeof(im->blocks), 0), (ssize_t)sizeof(im->blocks));
}

/* What a walk wrote to a memory file; the caller frees it. */
static inline char *text_of(int fd)
{
	off_t size = lseek(fd, 0, SEEK_END);
	char *text = calloc(1, (size_t)size + 1);

	CHECK(text);
	CHECK_EQ(pread(fd, text, (size_t)size, 0), size);
	close(fd);
	return text;
}

#endif
