/* CRC-32 (IEEE 802.3: zlib's, so that Python has it fast), and copies that are summed on their way.
 *
 * Where memory is the limit, bytes that pass the registers once are summed for nothing: 64 bytes at a time with
 * VPCLMULQDQ (what AVX-512 machines since 2019 have), 16 with PCLMULQDQ, 8 with arm64's instruction, else by a
 * table. The results are the same. Nothing allocates or blocks.
 */
#ifndef HS_CORE_CRC32_H
#define HS_CORE_CRC32_H

#include <stddef.h>
#include <stdint.h>

/* Of the data so far: start with 0, pass the last result to go on. crc("123456789") = 0xCBF43926. */
uint32_t hs_crc32(uint32_t crc, const void *data, size_t bytes);

/* The same of `from`, copied to `to` meanwhile; they do not overlap. The stores go past the caches: for what nobody
 * reads soon. */
uint32_t hs_crc32_copy(uint32_t crc, void *to, const void *from, size_t bytes);

/* The ways above by themselves, for tests: 0 the table, 1 16 bytes, 2 64 bytes. False: not on this machine. `to` may be
 * NULL. */
_Bool hs_crc32_by(int way, uint32_t *crc, void *to, const void *from, size_t bytes);

#endif
