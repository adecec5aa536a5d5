/* CRC-32C (Castagnoli, reflected polynomial 0x82F63B78), by the CPU's instruction where it has one. */
#ifndef BS_CRC32C_H
#define BS_CRC32C_H

#include <stddef.h>
#include <stdint.h>

/* Continue crc over data; no inversion at either end. */
uint32_t crc32c(uint32_t crc, const void *data, size_t length);

/* Checksum of a metadata block: bytes 4..4095, started with all ones, xored with the salt of the block's
 * type. */
uint32_t block_checksum(const void *block, uint32_t salt);

#endif
