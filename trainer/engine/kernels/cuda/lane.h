/* One lane of the CPU's virtual vector (kernels/cpu/vec.h), so that kernels/cpu/vec_math.h, whose
 * functions the fast CPU set computes with, is compiled for a GPU thread as it stands: the same
 * polynomials, the same bits. max, min and select_lt as vec.h says. */
#ifndef HS_KERNELS_CUDA_LANE_H
#define HS_KERNELS_CUDA_LANE_H

#include "kernels/cuda/device.h"

#define HS_KERNELS_CPU_VEC_H /* in its place: */
#define VINLINE              HS_DEVICE
#define LANES                16
typedef float vf;
typedef uint32_t vi;

VINLINE vf v_zero() {
    return 0.0f;
}
VINLINE vf v_set1(float x) {
    return x;
}
VINLINE void v_store(float *p, vf x) {
    *p = x;
}
VINLINE vf v_add(vf a, vf b) {
    return a + b;
}
VINLINE vf v_sub(vf a, vf b) {
    return a - b;
}
VINLINE vf v_mul(vf a, vf b) {
    return a * b;
}
VINLINE vf v_div(vf a, vf b) {
    return __fdiv_rn(a, b);
}
VINLINE vf v_fma(vf a, vf b, vf c) {
    return fmaf(a, b, c);
}
VINLINE vf v_fnma(vf a, vf b, vf c) {
    return fmaf(-a, b, c);
}
VINLINE vf v_sqrt(vf a) {
    return __fsqrt_rn(a);
}
VINLINE vf v_max(vf a, vf b) {
    return a > b ? a : b;
}
VINLINE vf v_min(vf a, vf b) {
    return a < b ? a : b;
}
VINLINE vf v_select_lt(vf a, vf b, vf x, vf y) {
    return a < b ? x : y;
}
VINLINE vi v_bits(vf x) {
    return __float_as_uint(x);
}
VINLINE vf v_from_bits(vi x) {
    return __uint_as_float(x);
}
VINLINE vi vi_set1(uint32_t x) {
    return x;
}
VINLINE vi vi_add(vi a, vi b) {
    return a + b;
}
VINLINE vi vi_sub(vi a, vi b) {
    return a - b;
}
VINLINE vi vi_and(vi a, vi b) {
    return a & b;
}
VINLINE vi vi_or(vi a, vi b) {
    return a | b;
}
VINLINE vi vi_xor(vi a, vi b) {
    return a ^ b;
}
VINLINE vi vi_shl(vi a, int count) {
    return a << count;
}
VINLINE vi vi_shr(vi a, int count) {
    return a >> count;
}

#include "kernels/cpu/vec_math.h"

/* A denormal number is zero of its sign. */
HS_DEVICE float flushed(float x) {
    return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x;
}

/* fma where denormal operands and results are zero of their sign. What is denormal is said after
 * rounding to 24 bits, as x86 has it: below 2^-126 - 2^-151. */
HS_DEVICE float fma_flushed(float a, float b, float c) {
#ifdef __CUDA_ARCH__
    float sum;
    asm("fma.rn.ftz.f32 %0, %1, %2, %3;" : "=f"(sum) : "f"(a), "f"(b), "f"(c));
    return sum;
#else
    a = flushed(a), b = flushed(b), c = flushed(c);
    const float sum = fmaf(a, b, c);
    if (!(fabsf(sum) <= 0x1p-126f)) return sum;
    /* near the edge: the product is exact in double, and so is the sum but for bits far below */
    const double exact = (double)a * (double)b + (double)c;
    return fabs(exact) < 0x1p-126 - 0x1p-151 ? copysignf(0.0f, sum) : sum;
#endif
}

/* A step of a chain of products (kernels/cpu/gemm.h): over pairs denormal numbers count as zero. */
template <bool pairs> HS_DEVICE float chain(float a, float b, float c) {
    return pairs ? fma_flushed(a, b, c) : v_fma(a, b, c);
}

/* Rows whose sums have the 16-lane order of the CPU (lane = column % 16, each a chain, joined 8, 4,
 * 2, 1): 16 / pack threads side by side do a row, each with the chains of its pack's columns. */
template <typename T> struct row_of {
    static const int N = pack_of<T>::N;
    static const int THREADS = LANES / N;   /* of a row: 4 or 2 */
    static const int ROWS = FLAT / THREADS; /* of a block of FLAT threads */
};

template <typename T> HS_DEVICE int64_t row_index() {
    return (int64_t)blockIdx.x * row_of<T>::ROWS + threadIdx.x / row_of<T>::THREADS;
}
/* The first column of this thread's packs. */
template <typename T> HS_DEVICE int64_t row_column() {
    return (int64_t)(threadIdx.x % row_of<T>::THREADS) * row_of<T>::N;
}

/* The sum of a row's 16 chains, to all its threads. Every thread of the warp calls it. */
HS_DEVICE float join_lanes(lanes<4> s) {
    for (int bits = 2; bits; bits /= 2)
        for (int i = 0; i < 4; i++) s.x[i] = s.x[i] + __shfl_xor_sync(0xffffffffu, s.x[i], bits);
    return (s.x[0] + s.x[2]) + (s.x[1] + s.x[3]);
}
HS_DEVICE float join_lanes(lanes<8> s) {
    for (int i = 0; i < 8; i++) s.x[i] = s.x[i] + __shfl_xor_sync(0xffffffffu, s.x[i], 1);
    for (int i = 0; i < 4; i++) s.x[i] = s.x[i] + s.x[i + 4];
    return (s.x[0] + s.x[2]) + (s.x[1] + s.x[3]);
}

#endif
