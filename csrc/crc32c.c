/*
 * The instruction takes 8 bytes at a latency of three cycles, so three streams run side by side and are
 * joined by multiplying with x^(8*n) mod P (one table a stream length). Without the instruction, slicing by
 * eight.
 */
#include "crc32c.h"

#include <pthread.h>
#include <stdbool.h>
#include <string.h>

#include "disk_format.h"

#define POLYNOMIAL 0x82f63b78u
/* A metadata block has 4092 checked bytes: three streams of 1360 and a tail of 12. */
#define STREAM 1360

static uint32_t slices[8][256];
/* shift_table[k][b]: the crc of byte b at position k of the register, followed by STREAM zero bytes. */
static uint32_t shift_table[4][256];
static bool has_instruction;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static uint32_t crc_slices(uint32_t crc, const unsigned char *p, size_t length)
{
	for (; length >= 8; length -= 8, p += 8) {
		uint64_t word;

		memcpy(&word, p, 8);
		word = le64toh(word) ^ crc;
		crc = 0;
		for (int i = 0; i < 8; i++)
			crc ^= slices[7 - i][word >> (8 * i) & 0xff];
	}
	while (length--)
		crc = crc >> 8 ^ slices[0][(crc ^ *p++) & 0xff];
	return crc;
}

#if defined(__x86_64__)
#define HARDWARE __attribute__((target("sse4.2")))
#define CRC_WORD(crc, word) ((uint32_t)__builtin_ia32_crc32di(crc, word))
#define CRC_BYTE(crc, byte) __builtin_ia32_crc32qi(crc, byte)
static bool detect(void)
{
	return __builtin_cpu_supports("sse4.2");
}
#elif defined(__aarch64__)
#include <arm_acle.h>
#include <sys/auxv.h>
#define HARDWARE __attribute__((target("+crc")))
#define CRC_WORD(crc, word) __crc32cd(crc, word)
#define CRC_BYTE(crc, byte) __crc32cb(crc, byte)
static bool detect(void)
{
	return getauxval(AT_HWCAP) & (1 << 7); /* HWCAP_CRC32 */
}
#else
static bool detect(void)
{
	return false;
}
#endif

#ifdef HARDWARE
static uint32_t shift_stream(uint32_t crc)
{
	return shift_table[0][crc & 0xff] ^ shift_table[1][crc >> 8 & 0xff] ^
	       shift_table[2][crc >> 16 & 0xff] ^ shift_table[3][crc >> 24];
}

HARDWARE static uint32_t crc_instruction(uint32_t crc, const unsigned char *p, size_t length)
{
	for (; length >= 3 * STREAM; length -= 3 * STREAM, p += 3 * STREAM) {
		uint32_t second = 0, third = 0;

		for (int i = 0; i < STREAM; i += 8) {
			uint64_t a, b, c;

			memcpy(&a, p + i, 8);
			memcpy(&b, p + STREAM + i, 8);
			memcpy(&c, p + 2 * STREAM + i, 8);
			crc = CRC_WORD(crc, a);
			second = CRC_WORD(second, b);
			third = CRC_WORD(third, c);
		}
		crc = shift_stream(crc) ^ second;
		crc = shift_stream(crc) ^ third;
	}
	for (; length >= 8; length -= 8, p += 8) {
		uint64_t word;

		memcpy(&word, p, 8);
		crc = CRC_WORD(crc, word);
	}
	while (length--)
		crc = CRC_BYTE(crc, *p++);
	return crc;
}
#endif

static void init_tables(void)
{
	for (int b = 0; b < 256; b++) {
		uint32_t crc = b;

		for (int bit = 0; bit < 8; bit++)
			crc = crc >> 1 ^ (crc & 1 ? POLYNOMIAL : 0);
		slices[0][b] = crc;
	}
	for (int b = 0; b < 256; b++)
		for (int i = 1; i < 8; i++)
			slices[i][b] = slices[i - 1][b] >> 8 ^ slices[0][slices[i - 1][b] & 0xff];
	static const unsigned char zeros[STREAM];
	for (int k = 0; k < 4; k++)
		for (uint32_t b = 0; b < 256; b++)
			shift_table[k][b] = crc_slices(b << (8 * k), zeros, STREAM);
	has_instruction = detect();
}

uint32_t crc32c(uint32_t crc, const void *data, size_t length)
{
	pthread_once(&once, init_tables);
#ifdef HARDWARE
	if (has_instruction)
		return crc_instruction(crc, data, length);
#endif
	return crc_slices(crc, data, length);
}

uint32_t block_checksum(const void *block, uint32_t salt)
{
	return crc32c(0xffffffffu, (const char *)block + 4, METADATA_BLOCK_SIZE - 4) ^ salt;
}
