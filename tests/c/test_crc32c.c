#include "crc32c.h"
#include "disk_format.h"
#include "test.h"

static void test_known_vectors(void)
{
	static const unsigned char zeros[METADATA_BLOCK_SIZE];

	CHECK_EQ(crc32c(0xffffffffu, "123456789", 9) ^ 0xffffffffu, 0xe3069283u);
	/* Anchors of the format: the checksum of an otherwise zero block of each type. */
	CHECK_EQ(block_checksum(zeros, SUPERBLOCK_SALT), 0x58cfd397u);
	CHECK_EQ(block_checksum(zeros, BTREE_NODE_SALT), 0x58cc7e82u);
	CHECK_EQ(block_checksum(zeros, BITMAP_SALT), 0x58ce0b1au);
	CHECK_EQ(block_checksum(zeros, INDEX_SALT), 0x58cfd54fu);
}

static void test_any_split_gives_the_same_crc(void)
{
	unsigned char data[10000];
	uint64_t seed = 1;

	for (size_t i = 0; i < sizeof(data); i++)
		data[i] = test_random(&seed);
	uint32_t bitwise = 0xffffffffu;
	for (size_t i = 0; i < sizeof(data); i++) {
		bitwise ^= data[i];
		for (int bit = 0; bit < 8; bit++)
			bitwise = bitwise >> 1 ^ (bitwise & 1 ? 0x82f63b78u : 0);
	}
	CHECK_EQ(crc32c(0xffffffffu, data, sizeof(data)), bitwise);
	for (int i = 0; i < 200; i++) {
		size_t cut = test_random(&seed) % sizeof(data);

		CHECK_EQ(crc32c(crc32c(0xffffffffu, data, cut), data + cut, sizeof(data) - cut), bitwise);
	}
}

int main(void)
{
	RUN(test_known_vectors);
	RUN(test_any_split_gives_the_same_crc);
	return 0;
}
