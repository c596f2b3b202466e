/* Sixteen SHA-256 in the lanes of AVX-512, and two more by the SHA instructions beside them. */
#ifndef HS_CORE_HASH_BESIDE_H
#define HS_CORE_HASH_BESIDE_H

#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__)

enum {
    HS_BESIDE_BYTES = 512
}; /* of each of the two, while each lane takes 64 bytes: as much in all */

/* `steps` times: 64 bytes more of each lane (states[i] is word i of all of their states, p where their data begin) and
 * HS_BESIDE_BYTES more of each of two digests, by their states and data. For CPUs with AVX-512F, AVX-512BW and the SHA
 * instructions. */
void hs_sha256_beside(uint32_t states[8][16], const uint8_t *const p[16], uint32_t *const two[2],
                      const uint8_t *const data[2], size_t steps);

#endif

#endif
