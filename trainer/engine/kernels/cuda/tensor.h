/* Tensor cores and what feeds them, sm_80 and later: inline PTX here, functions of the same names in
 * the emulator. bf16 operands, f32 accumulators; no wgmma or tcgen05, so one source for every
 * architecture.
 *
 * Fragments (PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type"), lane l, g = l/4,
 * t = l%4; a register of A and B holds two neighbours along k, the lower one in the low half:
 *   A  16 x 16  a[0] row g, k 2t; a[1] row g+8, k 2t; a[2] row g, k 2t+8; a[3] row g+8, k 2t+8
 *   B  16 x 8   b[0] k 2t, column g; b[1] k 2t+8, column g
 *   C  16 x 8   c[0], c[1] row g, columns 2t, 2t+1; c[2], c[3] row g+8
 * So two neighbouring C of one product, rounded to bf16, are an A of the next (hs_pair).
 * ldmatrix reads 8 x 8 matrices: lane 8 i + j names row j (16 bytes) of matrix i, and gets of it row
 * g, elements 2t, 2t+1; with trans elements (2t, g), (2t+1, g).
 *
 * A warp operation is called by all 32 lanes. A copy has landed for its thread after the wait that
 * covers its group, for the block after a barrier behind that.
 */
#ifndef HS_KERNELS_CUDA_TENSOR_H
#define HS_KERNELS_CUDA_TENSOR_H

#include "kernels/cuda/device.h"

#ifdef HS_CUDA_EMULATED

namespace hs_emulated {
struct mma_record {
    float *c;
    const uint32_t *a, *b;
};
struct ldmatrix_record {
    const void *row;
    uint32_t *to;
    int count;
    bool trans;
};
void mma_bf16(void *const *lanes);
void ldmatrix(void *const *lanes);
} // namespace hs_emulated

/* c += A B */
static inline void hs_mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t *b, HS_AT) {
    hs_emulated::mma_record r = {c, a, b};
    hs_emulated::together(HS_SITE, hs_emulated::MMA, hs_emulated::mma_bf16, &r);
}
template <int N> static inline void hs_ldmatrix(uint32_t (&to)[N], const void *row, HS_AT) {
    if (threadIdx.x % 32 < 8 * N) hs_emulated::aligned16(row, HS_SITE);
    hs_emulated::ldmatrix_record r = {row, to, N, false};
    hs_emulated::together(HS_SITE, hs_emulated::LDMATRIX, hs_emulated::ldmatrix, &r);
}
template <int N> static inline void hs_ldmatrix_trans(uint32_t (&to)[N], const void *row, HS_AT) {
    if (threadIdx.x % 32 < 8 * N) hs_emulated::aligned16(row, HS_SITE);
    hs_emulated::ldmatrix_record r = {row, to, N, true};
    hs_emulated::together(HS_SITE, hs_emulated::LDMATRIX, hs_emulated::ldmatrix, &r);
}
static inline void hs_copy16(void *to, const void *from, bool there, HS_AT) {
    hs_emulated::copy_async(HS_SITE, to, from, 16, there ? 16 : 0);
}
static inline void hs_copy4(void *to, const void *from, bool there, HS_AT) {
    hs_emulated::copy_async(HS_SITE, to, from, 4, there ? 4 : 0);
}
static inline void hs_copies_end() {
    hs_emulated::copy_commit();
}
template <int LEFT> static inline void hs_copies_wait(HS_AT) {
    hs_emulated::copy_wait(HS_SITE, LEFT);
}
/* max.NaN, min.NaN: the GPU's own NaN where either is one; +0 is above -0 */
static inline float hs_max(float a, float b) {
    if (a != a || b != b) return __uint_as_float(0x7fffffffu);
    return a == b ? (__float_as_uint(a) >> 31 ? b : a) : a > b ? a : b;
}
static inline float hs_min(float a, float b) {
    if (a != a || b != b) return __uint_as_float(0x7fffffffu);
    return a == b ? (__float_as_uint(a) >> 31 ? a : b) : a < b ? a : b;
}

#else

HS_DEVICE uint32_t hs_shared_at(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}
HS_DEVICE void hs_mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t *b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
HS_DEVICE void hs_ldmatrix(uint32_t (&to)[1], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(to[0])
                 : "r"(hs_shared_at(row))
                 : "memory");
}
HS_DEVICE void hs_ldmatrix(uint32_t (&to)[2], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(hs_shared_at(row))
                 : "memory");
}
HS_DEVICE void hs_ldmatrix(uint32_t (&to)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(hs_shared_at(row))
                 : "memory");
}
HS_DEVICE void hs_ldmatrix_trans(uint32_t (&to)[1], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(to[0])
                 : "r"(hs_shared_at(row))
                 : "memory");
}
HS_DEVICE void hs_ldmatrix_trans(uint32_t (&to)[2], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(hs_shared_at(row))
                 : "memory");
}
HS_DEVICE void hs_ldmatrix_trans(uint32_t (&to)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(hs_shared_at(row))
                 : "memory");
}
/* 16 bytes to shared memory past L1, zeros where they are not there (`from` is not read then). */
HS_DEVICE void hs_copy16(void *to, const void *from, bool there) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(hs_shared_at(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(there ? 16 : 0)
                 : "memory");
}
HS_DEVICE void hs_copy4(void *to, const void *from, bool there) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(hs_shared_at(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(there ? 4 : 0)
                 : "memory");
}
/* The copies that this thread has begun become a group. */
HS_DEVICE void hs_copies_end() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
/* All of this thread's groups but the LEFT youngest have landed. */
template <int LEFT> HS_DEVICE void hs_copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}
HS_DEVICE float hs_max(float a, float b) {
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}
HS_DEVICE float hs_min(float a, float b) {
    float r;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}

#endif

HS_DEVICE int lane_id() {
    return (int)(threadIdx.x % 32);
}

/* 2^(x c) for x c in [-125, 127): x c as the nearest integer and a fraction, whose power is a
 * polynomial of degree 4 that is 1 at 0. Within 3e-6 of the true value, 600 times less than rounding
 * it to bf16 takes. 8 instructions (fma, add, fma, 4 fma, shift-and-add) at the full rate of 128 a
 * cycle and SM; ex2.approx has an eighth of that and bits that are nobody's promise. A NaN gives one,
 * or a number that is infinity as bf16: neither passes unseen through a product. */
HS_DEVICE float two_to(float x, float c) {
    const float magic = 12582912.0f; /* 1.5 2^23: adding it leaves the integer in the low bits */
    const float t = fmaf(x, c, magic), f = fmaf(x, c, -(t - magic));
    float p = 0.00958285294f;
    p = fmaf(p, f, 0.0559064262f);
    p = fmaf(p, f, 0.240240991f);
    p = fmaf(p, f, 0.693124175f);
    p = fmaf(p, f, 1.0f);
    return __uint_as_float(__float_as_uint(p) + (__float_as_uint(t) << 23));
}

#endif
