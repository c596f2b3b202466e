/* The digests of state: SHA-256 of each block of it, many at once. */
#ifndef HS_CORE_HASH_LEAVES_H
#define HS_CORE_HASH_LEAVES_H

#include <stddef.h>
#include <stdint.h>

/* Of data that is `count` pieces in a row, of `lengths` bytes: the digest of each `block` bytes of each
 * piece (its last one may be shorter), one after the other in `leaves`; in `whole`, unless it is NULL,
 * the digest of everything. Without that, sixteen leaves, of whichever pieces, are computed side by side where
 * the CPU has AVX-512, in half the time of its SHA instructions; else two. So pieces in a row should come together. */
void hs_sha256_leaves(const void *data, const uint64_t *lengths, size_t count, size_t block,
                      uint8_t *leaves, uint8_t *whole);

#endif
