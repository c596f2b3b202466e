/* The digests of state: SHA-256 of each block of it, many at once. */
#ifndef HS_CORE_HASH_LEAVES_H
#define HS_CORE_HASH_LEAVES_H

#include <stddef.h>
#include <stdint.h>

/* What of this header and of crc32.h Python calls (checkpoint/hashes.py): one higher with each change of an argument or
 * of a structure. A library of another version is not used. */
#define HS_HASH_VERSION 1
extern const uint32_t hs_hash_version;

/* Of data that is `count` pieces in a row, of `lengths` bytes: the digest of each `block` bytes of each
 * piece (its last one may be shorter), one after the other in `leaves`; in `whole`, unless it is NULL,
 * the digest of everything. Without that, sixteen leaves, of whichever pieces, are computed side by side where
 * the CPU has AVX-512, in half the time of its SHA instructions; else two. So pieces in a row should come together. */
void hs_sha256_leaves(const void *data, const uint64_t *lengths, size_t count, size_t block,
                      uint8_t *leaves, uint8_t *whole);

typedef struct hs_sha256_chunk {
    const void *data;
    const uint64_t *lengths; /* of its pieces */
    size_t count;            /* of those */
    uint8_t *leaves, *whole; /* as above; whole is not NULL */
} hs_sha256_chunk;

/* As hs_sha256_leaves, of two chunks at once. Where the CPU has AVX-512 and SHA instructions that takes two thirds of
 * the time: both wholes are chains, which the SHA instructions follow while sixteen leaves are in the lanes. */
void hs_sha256_two_chunks(const hs_sha256_chunk chunks[2], size_t block);

#endif
