#include "core/hash.h"

#include "core/hash_x86.h"

#include <stdatomic.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <arm_acle.h>
#include <arm_neon.h>
#include <sys/auxv.h>
#endif

/* SSE4.2 and arm64's CRC extension have the instruction for CRC-32C. */
enum { HAS_ASKED = 1, HAS_SHA = 2, HAS_CRC = 4, HAS_CLMUL = 8 };

/* What this CPU can do. CPUID may trap to a hypervisor, so the answer, which never changes, is
 * kept. */
static int cpu_has(int what) {
#if defined(__x86_64__)
    static _Atomic int known;
    int has = atomic_load_explicit(&known, memory_order_relaxed);
    if (!has) {
        unsigned a, b, c, d;
        has = HAS_ASKED;
        if (__get_cpuid(1, &a, &b, &c, &d)) {
            bool sse41 = (c >> 19) & 1 && (c >> 9) & 1; /* and SSSE3 */
            if ((c >> 20) & 1) has |= HAS_CRC;
            if ((c >> 1) & 1) has |= HAS_CLMUL;
            if (sse41 && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b >> 29) & 1) has |= HAS_SHA;
        }
        atomic_store_explicit(&known, has, memory_order_relaxed);
    }
    return has & what;
#elif defined(__aarch64__)
    const unsigned long has = getauxval(AT_HWCAP); /* a look into memory */
    return (has >> 6 & 1 ? what & HAS_SHA : 0) | (has >> 7 & 1 ? what & HAS_CRC : 0);
#else
    (void)what;
    return 0;
#endif
}

/* --- SHA-256 ----------------------------------------------------------------------------- */

_Alignas(16) const uint32_t hs_sha256_k[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static uint32_t rotate_right(uint32_t x, int n) {
    return x >> n | x << (32 - n);
}

static void sha_blocks_portable(uint32_t state[8], const uint8_t *data, size_t blocks) {
    uint32_t w[64];
    for (; blocks; blocks--, data += 64) {
        for (int i = 0; i < 16; i++)
            w[i] = (uint32_t)data[4 * i] << 24 | (uint32_t)data[4 * i + 1] << 16 |
                   (uint32_t)data[4 * i + 2] << 8 | data[4 * i + 3];
        for (int i = 16; i < 64; i++) {
            uint32_t s0 = rotate_right(w[i - 15], 7) ^ rotate_right(w[i - 15], 18) ^ w[i - 15] >> 3;
            uint32_t s1 = rotate_right(w[i - 2], 17) ^ rotate_right(w[i - 2], 19) ^ w[i - 2] >> 10;
            w[i] = w[i - 16] + s0 + w[i - 7] + s1;
        }
        uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
        uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
        for (int i = 0; i < 64; i++) {
            uint32_t s1 = rotate_right(e, 6) ^ rotate_right(e, 11) ^ rotate_right(e, 25);
            uint32_t s0 = rotate_right(a, 2) ^ rotate_right(a, 13) ^ rotate_right(a, 22);
            uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + hs_sha256_k[i] + w[i];
            uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
            h = g;
            g = f;
            f = e;
            e = d + t1;
            d = c;
            c = b;
            b = a;
            a = t1 + t2;
        }
        state[0] += a;
        state[1] += b;
        state[2] += c;
        state[3] += d;
        state[4] += e;
        state[5] += f;
        state[6] += g;
        state[7] += h;
    }
}

#if defined(__x86_64__)
#define ROUNDS(i, w0, w1, w2, w3)                                                                  \
    HALF(i, abef, cdgh, sum, w0, w1, w3)                                                           \
    OTHER_HALF(i, abef, cdgh, sum, w0, w3)

NI void sha_blocks_ni(uint32_t state[8], const uint8_t *data, size_t blocks) {
    __m128i abef, cdgh, sum;
    ni_begin(state, &abef, &cdgh);
    for (; blocks; blocks--, data += 64) {
        const __m128i abef_old = abef, cdgh_old = cdgh;
        __m128i a = ni_words(data, 0), b = ni_words(data, 1);
        __m128i c = ni_words(data, 2), d = ni_words(data, 3);
        ROUNDS(0, a, b, c, d)
        ROUNDS(1, b, c, d, a)
        ROUNDS(2, c, d, a, b)
        ROUNDS(3, d, a, b, c)
        ROUNDS(4, a, b, c, d)
        ROUNDS(5, b, c, d, a)
        ROUNDS(6, c, d, a, b)
        ROUNDS(7, d, a, b, c)
        ROUNDS(8, a, b, c, d)
        ROUNDS(9, b, c, d, a)
        ROUNDS(10, c, d, a, b)
        ROUNDS(11, d, a, b, c)
        ROUNDS(12, a, b, c, d)
        ROUNDS(13, b, c, d, a)
        ROUNDS(14, c, d, a, b)
        ROUNDS(15, d, a, b, c)
        abef = _mm_add_epi32(abef, abef_old);
        cdgh = _mm_add_epi32(cdgh, cdgh_old);
    }
    ni_end(state, abef, cdgh);
}

/* Two digests at once: each instruction of one waits for the one before it, and two of them fit into that
 * time. */
NI void sha_blocks_ni_twice(uint32_t *states[2], const uint8_t *data[2], size_t blocks) {
    __m128i abef, cdgh, sum, abef2, cdgh2, sum2; /* of the first, of the second */
    const uint8_t *p = data[0], *q = data[1];
    ni_begin(states[0], &abef, &cdgh);
    ni_begin(states[1], &abef2, &cdgh2);
    for (; blocks; blocks--, p += 64, q += 64) {
        const __m128i abef_old = abef, cdgh_old = cdgh, abef2_old = abef2, cdgh2_old = cdgh2;
        __m128i a = ni_words(p, 0), b = ni_words(p, 1), c = ni_words(p, 2), d = ni_words(p, 3);
        __m128i e = ni_words(q, 0), f = ni_words(q, 1), g = ni_words(q, 2), h = ni_words(q, 3);
        ROUNDS_TWICE(0, a, b, c, d, e, f, g, h)
        ROUNDS_TWICE(1, b, c, d, a, f, g, h, e)
        ROUNDS_TWICE(2, c, d, a, b, g, h, e, f)
        ROUNDS_TWICE(3, d, a, b, c, h, e, f, g)
        ROUNDS_TWICE(4, a, b, c, d, e, f, g, h)
        ROUNDS_TWICE(5, b, c, d, a, f, g, h, e)
        ROUNDS_TWICE(6, c, d, a, b, g, h, e, f)
        ROUNDS_TWICE(7, d, a, b, c, h, e, f, g)
        ROUNDS_TWICE(8, a, b, c, d, e, f, g, h)
        ROUNDS_TWICE(9, b, c, d, a, f, g, h, e)
        ROUNDS_TWICE(10, c, d, a, b, g, h, e, f)
        ROUNDS_TWICE(11, d, a, b, c, h, e, f, g)
        ROUNDS_TWICE(12, a, b, c, d, e, f, g, h)
        ROUNDS_TWICE(13, b, c, d, a, f, g, h, e)
        ROUNDS_TWICE(14, c, d, a, b, g, h, e, f)
        ROUNDS_TWICE(15, d, a, b, c, h, e, f, g)
        abef = _mm_add_epi32(abef, abef_old);
        cdgh = _mm_add_epi32(cdgh, cdgh_old);
        abef2 = _mm_add_epi32(abef2, abef2_old);
        cdgh2 = _mm_add_epi32(cdgh2, cdgh2_old);
    }
    ni_end(states[0], abef, cdgh);
    ni_end(states[1], abef2, cdgh2);
}
#elif defined(__aarch64__)
#if defined(__clang__)
#define ARM_SHA __attribute__((target("+sha2")))
#else /* gcc's header asks for all of that extension */
#define ARM_SHA __attribute__((target("+crypto")))
#endif

/* Four rounds an instruction pair; word i of the schedule is in w[i / 4 % 4]. */
ARM_SHA static void sha_blocks_arm(uint32_t state[8], const uint8_t *data, size_t blocks) {
    uint32x4_t abcd = vld1q_u32(state), efgh = vld1q_u32(state + 4);
    for (; blocks; blocks--, data += 64) {
        const uint32x4_t abcd_old = abcd, efgh_old = efgh;
        uint32x4_t w[4];
        for (int i = 0; i < 4; i++)
            w[i] = vreinterpretq_u32_u8(vrev32q_u8(vld1q_u8(data + 16 * i)));
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            const uint32x4_t k = vaddq_u32(w[i & 3], vld1q_u32(hs_sha256_k + 4 * i));
            const uint32x4_t before = abcd;
            abcd = vsha256hq_u32(abcd, efgh, k);
            efgh = vsha256h2q_u32(efgh, before, k);
            if (i < 12)
                w[i & 3] = vsha256su1q_u32(vsha256su0q_u32(w[i & 3], w[(i + 1) & 3]),
                                           w[(i + 2) & 3], w[(i + 3) & 3]);
        }
        abcd = vaddq_u32(abcd, abcd_old);
        efgh = vaddq_u32(efgh, efgh_old);
    }
    vst1q_u32(state, abcd);
    vst1q_u32(state + 4, efgh);
}
#endif

static void sha_blocks(hs_sha256 *sha, const uint8_t *data, size_t blocks) {
#if defined(__x86_64__)
    if (sha->by_instructions) {
        sha_blocks_ni(sha->state, data, blocks);
        return;
    }
#elif defined(__aarch64__)
    if (sha->by_instructions) {
        sha_blocks_arm(sha->state, data, blocks);
        return;
    }
#endif
    sha_blocks_portable(sha->state, data, blocks);
}

void hs_sha256_init_portable(hs_sha256 *sha) {
    static const uint32_t start[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    memset(sha, 0, sizeof *sha);
    memcpy(sha->state, start, sizeof start);
}

void hs_sha256_init(hs_sha256 *sha) {
    hs_sha256_init_portable(sha);
    sha->by_instructions = cpu_has(HAS_SHA) != 0;
}

void hs_sha256_update(hs_sha256 *sha, const void *data, size_t bytes) {
    const uint8_t *p = data;
    if (!bytes) return;
    size_t waiting = sha->bytes % 64;
    sha->bytes += bytes;
    if (waiting) {
        size_t take = 64 - waiting < bytes ? 64 - waiting : bytes;
        memcpy(sha->block + waiting, p, take);
        p += take;
        bytes -= take;
        if (waiting + take < 64) return;
        sha_blocks(sha, sha->block, 1);
    }
    sha_blocks(sha, p, bytes / 64);
    if (bytes % 64) memcpy(sha->block, p + bytes / 64 * 64, bytes % 64);
}

void hs_sha256_final(hs_sha256 *sha, uint8_t digest[HS_SHA256_BYTES]) {
    uint64_t bits = sha->bytes * 8;
    size_t waiting = sha->bytes % 64;
    sha->block[waiting++] = 0x80;
    if (waiting > 56) {
        memset(sha->block + waiting, 0, 64 - waiting);
        sha_blocks(sha, sha->block, 1);
        waiting = 0;
    }
    memset(sha->block + waiting, 0, 56 - waiting);
    for (int i = 0; i < 8; i++) sha->block[56 + i] = (uint8_t)(bits >> (56 - 8 * i));
    sha_blocks(sha, sha->block, 1);
    for (int i = 0; i < 32; i++) digest[i] = (uint8_t)(sha->state[i / 4] >> (24 - 8 * (i % 4)));
}

void hs_sha256_of(const void *data, size_t bytes, uint8_t digest[HS_SHA256_BYTES]) {
    hs_sha256 sha;
    hs_sha256_init(&sha);
    hs_sha256_update(&sha, data, bytes);
    hs_sha256_final(&sha, digest);
}

void hs_sha256_update_both(hs_sha256 *sha[2], const uint8_t *const data[2], size_t bytes) {
    size_t done[2] = {0, 0};
#if defined(__x86_64__)
    size_t first[2], least = bytes;
    for (int l = 0; l < 2; l++) {
        first[l] = (64 - sha[l]->bytes % 64) % 64;
        size_t left = first[l] < bytes ? bytes - first[l] : 0;
        if (left < least) least = left;
    }
    if (sha[0]->by_instructions && sha[1]->by_instructions && least >= 64) {
        size_t blocks = least / 64;
        uint32_t *states[2];
        const uint8_t *from[2];
        for (int l = 0; l < 2; l++) {
            hs_sha256_update(sha[l], data[l], first[l]);
            states[l] = sha[l]->state;
            from[l] = data[l] + first[l];
            sha[l]->bytes += 64 * blocks;
            done[l] = first[l] + 64 * blocks;
        }
        sha_blocks_ni_twice(states, from, blocks);
    }
#endif
    for (int l = 0; l < 2; l++) hs_sha256_update(sha[l], data[l] + done[l], bytes - done[l]);
}

/* --- HMAC-SHA256 ------------------------------------------------------------------------- */

void hs_hmac_init(hs_hmac *mac, const void *key, size_t key_bytes) {
    uint8_t block[64] = {0};
    if (key_bytes > sizeof block)
        hs_sha256_of(key, key_bytes, block);
    else if (key_bytes)
        memcpy(block, key, key_bytes);
    for (size_t i = 0; i < sizeof block; i++) block[i] ^= 0x36;
    hs_sha256_init(&mac->inner);
    hs_sha256_update(&mac->inner, block, sizeof block);
    for (size_t i = 0; i < sizeof block; i++) block[i] ^= 0x36 ^ 0x5c;
    hs_sha256_init(&mac->outer);
    hs_sha256_update(&mac->outer, block, sizeof block);
    explicit_bzero(block, sizeof block);
}

void hs_hmac_update(hs_hmac *mac, const void *data, size_t bytes) {
    hs_sha256_update(&mac->inner, data, bytes);
}

void hs_hmac_final(hs_hmac *mac, uint8_t digest[HS_SHA256_BYTES]) {
    uint8_t inner[HS_SHA256_BYTES];
    hs_sha256_final(&mac->inner, inner);
    hs_sha256_update(&mac->outer, inner, sizeof inner);
    hs_sha256_final(&mac->outer, digest);
    explicit_bzero(mac, sizeof *mac);
}

void hs_hmac_of(const void *key, size_t key_bytes, const void *data, size_t bytes,
                uint8_t digest[HS_SHA256_BYTES]) {
    hs_hmac mac;
    hs_hmac_init(&mac, key, key_bytes);
    hs_hmac_update(&mac, data, bytes);
    hs_hmac_final(&mac, digest);
}

bool hs_bytes_equal(const void *a, const void *b, size_t bytes) {
    const volatile uint8_t *p = a, *q = b;
    uint8_t difference = 0;
    for (size_t i = 0; i < bytes; i++) difference |= (uint8_t)(p[i] ^ q[i]);
    return difference == 0;
}

/* --- CRC-32C ----------------------------------------------------------------------------- */

/* crc_table[i]: the remainder of the byte i, polynomial 0x82F63B78 (reflected). */
static const uint32_t crc_table[256] = {
    0x00000000, 0xf26b8303, 0xe13b70f7, 0x1350f3f4, 0xc79a971f, 0x35f1141c, 0x26a1e7e8, 0xd4ca64eb,
    0x8ad958cf, 0x78b2dbcc, 0x6be22838, 0x9989ab3b, 0x4d43cfd0, 0xbf284cd3, 0xac78bf27, 0x5e133c24,
    0x105ec76f, 0xe235446c, 0xf165b798, 0x030e349b, 0xd7c45070, 0x25afd373, 0x36ff2087, 0xc494a384,
    0x9a879fa0, 0x68ec1ca3, 0x7bbcef57, 0x89d76c54, 0x5d1d08bf, 0xaf768bbc, 0xbc267848, 0x4e4dfb4b,
    0x20bd8ede, 0xd2d60ddd, 0xc186fe29, 0x33ed7d2a, 0xe72719c1, 0x154c9ac2, 0x061c6936, 0xf477ea35,
    0xaa64d611, 0x580f5512, 0x4b5fa6e6, 0xb93425e5, 0x6dfe410e, 0x9f95c20d, 0x8cc531f9, 0x7eaeb2fa,
    0x30e349b1, 0xc288cab2, 0xd1d83946, 0x23b3ba45, 0xf779deae, 0x05125dad, 0x1642ae59, 0xe4292d5a,
    0xba3a117e, 0x4851927d, 0x5b016189, 0xa96ae28a, 0x7da08661, 0x8fcb0562, 0x9c9bf696, 0x6ef07595,
    0x417b1dbc, 0xb3109ebf, 0xa0406d4b, 0x522bee48, 0x86e18aa3, 0x748a09a0, 0x67dafa54, 0x95b17957,
    0xcba24573, 0x39c9c670, 0x2a993584, 0xd8f2b687, 0x0c38d26c, 0xfe53516f, 0xed03a29b, 0x1f682198,
    0x5125dad3, 0xa34e59d0, 0xb01eaa24, 0x42752927, 0x96bf4dcc, 0x64d4cecf, 0x77843d3b, 0x85efbe38,
    0xdbfc821c, 0x2997011f, 0x3ac7f2eb, 0xc8ac71e8, 0x1c661503, 0xee0d9600, 0xfd5d65f4, 0x0f36e6f7,
    0x61c69362, 0x93ad1061, 0x80fde395, 0x72966096, 0xa65c047d, 0x5437877e, 0x4767748a, 0xb50cf789,
    0xeb1fcbad, 0x197448ae, 0x0a24bb5a, 0xf84f3859, 0x2c855cb2, 0xdeeedfb1, 0xcdbe2c45, 0x3fd5af46,
    0x7198540d, 0x83f3d70e, 0x90a324fa, 0x62c8a7f9, 0xb602c312, 0x44694011, 0x5739b3e5, 0xa55230e6,
    0xfb410cc2, 0x092a8fc1, 0x1a7a7c35, 0xe811ff36, 0x3cdb9bdd, 0xceb018de, 0xdde0eb2a, 0x2f8b6829,
    0x82f63b78, 0x709db87b, 0x63cd4b8f, 0x91a6c88c, 0x456cac67, 0xb7072f64, 0xa457dc90, 0x563c5f93,
    0x082f63b7, 0xfa44e0b4, 0xe9141340, 0x1b7f9043, 0xcfb5f4a8, 0x3dde77ab, 0x2e8e845f, 0xdce5075c,
    0x92a8fc17, 0x60c37f14, 0x73938ce0, 0x81f80fe3, 0x55326b08, 0xa759e80b, 0xb4091bff, 0x466298fc,
    0x1871a4d8, 0xea1a27db, 0xf94ad42f, 0x0b21572c, 0xdfeb33c7, 0x2d80b0c4, 0x3ed04330, 0xccbbc033,
    0xa24bb5a6, 0x502036a5, 0x4370c551, 0xb11b4652, 0x65d122b9, 0x97baa1ba, 0x84ea524e, 0x7681d14d,
    0x2892ed69, 0xdaf96e6a, 0xc9a99d9e, 0x3bc21e9d, 0xef087a76, 0x1d63f975, 0x0e330a81, 0xfc588982,
    0xb21572c9, 0x407ef1ca, 0x532e023e, 0xa145813d, 0x758fe5d6, 0x87e466d5, 0x94b49521, 0x66df1622,
    0x38cc2a06, 0xcaa7a905, 0xd9f75af1, 0x2b9cd9f2, 0xff56bd19, 0x0d3d3e1a, 0x1e6dcdee, 0xec064eed,
    0xc38d26c4, 0x31e6a5c7, 0x22b65633, 0xd0ddd530, 0x0417b1db, 0xf67c32d8, 0xe52cc12c, 0x1747422f,
    0x49547e0b, 0xbb3ffd08, 0xa86f0efc, 0x5a048dff, 0x8ecee914, 0x7ca56a17, 0x6ff599e3, 0x9d9e1ae0,
    0xd3d3e1ab, 0x21b862a8, 0x32e8915c, 0xc083125f, 0x144976b4, 0xe622f5b7, 0xf5720643, 0x07198540,
    0x590ab964, 0xab613a67, 0xb831c993, 0x4a5a4a90, 0x9e902e7b, 0x6cfbad78, 0x7fab5e8c, 0x8dc0dd8f,
    0xe330a81a, 0x115b2b19, 0x020bd8ed, 0xf0605bee, 0x24aa3f05, 0xd6c1bc06, 0xc5914ff2, 0x37faccf1,
    0x69e9f0d5, 0x9b8273d6, 0x88d28022, 0x7ab90321, 0xae7367ca, 0x5c18e4c9, 0x4f48173d, 0xbd23943e,
    0xf36e6f75, 0x0105ec76, 0x12551f82, 0xe03e9c81, 0x34f4f86a, 0xc69f7b69, 0xd5cf889d, 0x27a40b9e,
    0x79b737ba, 0x8bdcb4b9, 0x988c474d, 0x6ae7c44e, 0xbe2da0a5, 0x4c4623a6, 0x5f16d052, 0xad7d5351,
};

uint32_t hs_crc32c_portable(uint32_t crc, const void *data, size_t bytes) {
    const uint8_t *p = data;
    crc = ~crc;
    for (; bytes; bytes--) crc = crc_table[(crc ^ *p++) & 0xff] ^ crc >> 8;
    return ~crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2,crc32"))) static uint32_t crc32c_sse42(uint32_t crc, const uint8_t *p,
                                                                     size_t bytes) {
    uint64_t c = ~crc, word;
    for (; bytes >= 8; bytes -= 8, p += 8) {
        memcpy(&word, p, 8);
        c = _mm_crc32_u64(c, word);
    }
    uint32_t tail = (uint32_t)c;
    for (; bytes; bytes--) tail = _mm_crc32_u8(tail, *p++);
    return ~tail;
}

enum { LANE_BYTES = 4096 };

/* The remainder with as many zeros behind it as `by` says: x^(8 n - 33) mod P for n bytes, reflected (the
 * instruction's own 32 zeros, and the bit that a product of reflected factors is short of, are the 33). */
__attribute__((target("sse4.2,crc32,pclmul"))) static uint64_t crc_moved(uint64_t crc,
                                                                         uint32_t by) {
    const __m128i product =
        _mm_clmulepi64_si128(_mm_cvtsi64_si128((int64_t)crc), _mm_cvtsi64_si128((int64_t)by), 0);
    return _mm_crc32_u64(0, (uint64_t)_mm_cvtsi128_si64(product));
}

/* Three pieces side by side: the instruction takes three cycles, and one can start in each. */
__attribute__((target("sse4.2,crc32,pclmul"))) static uint32_t
crc32c_lanes(uint32_t crc, const uint8_t *p, size_t bytes) {
    uint64_t first = (uint32_t)~crc;
    for (; bytes >= 3 * LANE_BYTES; bytes -= 3 * LANE_BYTES, p += 3 * LANE_BYTES) {
        uint64_t second = 0, third = 0, word;
        for (size_t i = 0; i < LANE_BYTES; i += 8) {
            memcpy(&word, p + i, 8);
            first = _mm_crc32_u64(first, word);
            memcpy(&word, p + LANE_BYTES + i, 8);
            second = _mm_crc32_u64(second, word);
            memcpy(&word, p + 2 * LANE_BYTES + i, 8);
            third = _mm_crc32_u64(third, word);
        }
        first = crc_moved(first, 0x54a86326) ^ crc_moved(second, 0x82f89c77) ^ third;
    }
    return crc32c_sse42(~(uint32_t)first, p, bytes);
}
#elif defined(__aarch64__)
__attribute__((target("+crc"))) static uint32_t crc32c_arm(uint32_t crc, const uint8_t *p,
                                                           size_t bytes) {
    crc = ~crc;
    for (uint64_t word; bytes >= 8; bytes -= 8, p += 8) {
        memcpy(&word, p, 8);
        crc = __crc32cd(crc, word);
    }
    for (; bytes; bytes--) crc = __crc32cb(crc, *p++);
    return ~crc;
}
#endif

uint32_t hs_crc32c(uint32_t crc, const void *data, size_t bytes) {
#if defined(__x86_64__)
    if (cpu_has(HAS_CRC) && cpu_has(HAS_CLMUL)) return crc32c_lanes(crc, data, bytes);
    if (cpu_has(HAS_CRC)) return crc32c_sse42(crc, data, bytes);
#elif defined(__aarch64__)
    if (cpu_has(HAS_CRC)) return crc32c_arm(crc, data, bytes);
#endif
    return hs_crc32c_portable(crc, data, bytes);
}
