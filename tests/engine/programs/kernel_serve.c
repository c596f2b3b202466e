/* Calls of kernels, asked for on standard input and answered on standard output, until that ends: how the tests reach
 * the kernels of another processor, under emulation, and this one's in a sanitizer's build (tests/engine/kernel_served.py;
 * linked with kernel_lib.c). Numbers are little-endian.
 *
 *   request   set[16], NUL-terminated; u32 kernel, dtype, threads, guard (0: none, 1: a page that may not be touched
 *             before each operand, 2: behind it); u64 bytes[HS_CALL_PTRS], 0: absent; i64 dim[HS_CALL_DIMS]; f64
 *             real[HS_CALL_REALS]; then the operands' bytes, one after the other
 *   answer    i32 status, as hs_kernel_call's; then the operands' bytes
 *
 * Kernel 0: digests. Operand 0 is the data, operand 1 takes SHA-256 with the CPU's instructions and without, then
 * CRC-32C likewise, then CRC-32, each over a first byte and the rest: 76 bytes, and 1 byte, 1 where SHA-256 has
 * instructions here. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/crc32.h"
#include "core/hash.h"
#include "kernels/kernels.h"

int hs_kernel_call(const char *set_name, uint32_t kernel, uint32_t dtype, void *const *ptrs,
                   const int64_t *dims, const double *reals, int threads);
int hs_kernel_call_guarded(const char *set_name, uint32_t kernel, uint32_t dtype, void *const *ptrs,
                           const uint64_t *bytes, const int64_t *dims, const double *reals,
                           int threads, int at_end);

typedef struct request {
    char set[16];
    uint32_t kernel, dtype, threads, guard;
    uint64_t bytes[HS_CALL_PTRS];
    int64_t dim[HS_CALL_DIMS];
    double real[HS_CALL_REALS];
} request;

enum { DIGEST_BYTES = 2 * HS_SHA256_BYTES + 3 * 4 + 1 };

static int digests(const uint8_t *data, uint64_t bytes, uint8_t *out, uint64_t room) {
    if (room != DIGEST_BYTES || !data || !bytes) return 1;
    hs_sha256 fast, plain;
    hs_sha256_init(&fast);
    hs_sha256_init_portable(&plain);
    out[DIGEST_BYTES - 1] = fast.by_instructions;
    hs_sha256 *const both[2] = {&fast, &plain};
    for (int i = 0; i < 2; i++) {
        hs_sha256_update(both[i], data, 1);
        hs_sha256_update(both[i], data + 1, bytes - 1);
        hs_sha256_final(both[i], out + i * HS_SHA256_BYTES);
    }
    const uint32_t crcs[3] = {hs_crc32c(hs_crc32c(0, data, 1), data + 1, bytes - 1),
                              hs_crc32c_portable(0, data, bytes),
                              hs_crc32(hs_crc32(0, data, 1), data + 1, bytes - 1)};
    memcpy(out + 2 * HS_SHA256_BYTES, crcs, sizeof crcs);
    return 0;
}

static int answer(const request *r, void **ptr) {
    if (r->kernel == 0) return digests(ptr[0], r->bytes[0], ptr[1], r->bytes[1]);
    if (!r->guard)
        return hs_kernel_call(r->set, r->kernel, r->dtype, ptr, r->dim, r->real, (int)r->threads);
    return hs_kernel_call_guarded(r->set, r->kernel, r->dtype, ptr, r->bytes, r->dim, r->real,
                                  (int)r->threads, r->guard == 2);
}

int main(void) {
    request r;
    while (fread(&r, sizeof r, 1, stdin) == 1) {
        void *ptr[HS_CALL_PTRS] = {0};
        for (int i = 0; i < HS_CALL_PTRS; i++) {
            if (!r.bytes[i]) continue;
            ptr[i] = aligned_alloc(64, (r.bytes[i] + 63) / 64 * 64);
            if (!ptr[i] || fread(ptr[i], 1, r.bytes[i], stdin) != r.bytes[i]) return 66;
        }
        const int32_t rc = answer(&r, ptr);
        if (fwrite(&rc, sizeof rc, 1, stdout) != 1) return 74;
        for (int i = 0; i < HS_CALL_PTRS; i++) {
            if (ptr[i] && fwrite(ptr[i], 1, r.bytes[i], stdout) != r.bytes[i]) return 74;
            free(ptr[i]);
        }
        if (fflush(stdout)) return 74;
    }
    return 0;
}
