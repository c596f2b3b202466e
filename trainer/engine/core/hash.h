/* Digests and checksums: SHA-256 (FIPS 180-4), HMAC-SHA256 (RFC 2104), CRC-32C (Castagnoli, RFC
 * 3720).
 *
 * SHA-256 uses the SHA instructions and CRC-32C the CRC ones where the CPU (x86-64, arm64) has them; the
 * results are the same. Input may come in any pieces. Nothing allocates or blocks; a context belongs to one
 * thread at a time and is plain memory (copy it to fork a digest). A context that held a key is
 * cleared by _final.
 */
#ifndef HS_CORE_HASH_H
#define HS_CORE_HASH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define HS_SHA256_BYTES 32

typedef struct hs_sha256 {
    uint32_t state[8];
    uint64_t bytes;       /* taken so far */
    uint8_t block[64];    /* the first bytes % 64 of it wait for more */
    bool by_instructions; /* the CPU's own for SHA-256 */
} hs_sha256;

void hs_sha256_init(hs_sha256 *sha);
void hs_sha256_update(hs_sha256 *sha, const void *data, size_t bytes);
/* Ends the digest; init starts another. */
void hs_sha256_final(hs_sha256 *sha, uint8_t digest[HS_SHA256_BYTES]);
/* All three in one. */
void hs_sha256_of(const void *data, size_t bytes, uint8_t digest[HS_SHA256_BYTES]);

extern const uint32_t hs_sha256_k[64]; /* the constants of the rounds */

/* As many bytes more of each of two digests: side by side where the CPU has the instructions, in about the
 * time of one. */
void hs_sha256_update_both(hs_sha256 *sha[2], const uint8_t *const data[2], size_t bytes);

typedef struct hs_hmac {
    hs_sha256 inner, outer;
} hs_hmac;

void hs_hmac_init(hs_hmac *mac, const void *key, size_t key_bytes);
void hs_hmac_update(hs_hmac *mac, const void *data, size_t bytes);
void hs_hmac_final(hs_hmac *mac, uint8_t digest[HS_SHA256_BYTES]);
void hs_hmac_of(const void *key, size_t key_bytes, const void *data, size_t bytes,
                uint8_t digest[HS_SHA256_BYTES]);

/* True if the first `bytes` bytes agree; takes as long whether or where they differ (for MACs). */
bool hs_bytes_equal(const void *a, const void *b, size_t bytes);

/* CRC-32C of the data so far: start with 0, pass the last result to go on. crc("123456789") =
 * 0xE3069283. */
uint32_t hs_crc32c(uint32_t crc, const void *data, size_t bytes);

/* The plain C halves of the above, for tests and machines without the instructions. */
void hs_sha256_init_portable(hs_sha256 *sha);
uint32_t hs_crc32c_portable(uint32_t crc, const void *data, size_t bytes);

#endif
