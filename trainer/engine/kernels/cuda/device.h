/* What every .cu file here starts from: CUDA, or its emulator; launches; 16-byte accesses.
 *
 * Sources have no <<<>>>, no __shared__ and no float operators beyond + - * (lane.h has the rest),
 * so that nvcc with -fmad=false and a C++ compiler with -ffp-contract=off compute the same bits.
 */
#ifndef HS_KERNELS_CUDA_DEVICE_H
#define HS_KERNELS_CUDA_DEVICE_H

#ifdef HS_CUDA_EMULATED
#include "kernels/cuda/emulate.h"
#else
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#endif

#include "core/ints.h"
#include "kernels/cuda/cuda.h"

#ifndef HS_CUDA_EMULATED
#define HS_SHARED(type, name, dims) __shared__ type name dims
#define HS_LAUNCH(kernel, grid, block, stream, ...)                                                \
    (kernel<<<grid, block, 0, stream>>>(__VA_ARGS__), hs_cuda_launched())
static inline hs_status hs_cuda_launched(void) {
    return cudaPeekAtLastError() == cudaSuccess ? HS_OK : HS_E_BUG;
}
/* With dynamic shared memory, of which HS_DYNAMIC_SHARED names the first byte. Beyond 48 KiB a
 * kernel must be told so first. */
#define HS_LAUNCH_SHARED(kernel, grid, block, bytes, stream, ...)                                  \
    (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)(bytes)) !=    \
             cudaSuccess                                                                           \
         ? HS_E_BUG                                                                                \
         : (kernel<<<grid, block, bytes, stream>>>(__VA_ARGS__), hs_cuda_launched()))
#define HS_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

#define HS_DEVICE static __device__ __forceinline__

/* hs_cuda_<name> from name##_op<T>(stream, hs_<name>_args). */
#define HS_CUDA_OP(name)                                                                           \
    extern "C" hs_status hs_cuda_##name(const hs_cuda_ctx *ctx, const hs_args *args) {             \
        const cudaStream_t stream = static_cast<cudaStream_t>(ctx->stream);                        \
        const hs_##name##_args a = hs_##name##_args_of(args);                                      \
        if (args->dtype == HS_F32) return name##_op<float>(stream, a);                             \
        if (args->dtype == HS_BF16) return name##_op<bf16>(stream, a);                             \
        return HS_E_CONFIG;                                                                        \
    }

/* The same, for ops that need more of the context: from name##_op<T>(ctx, hs_<name>_args). */
#define HS_CUDA_CTX_OP(name)                                                                       \
    extern "C" hs_status hs_cuda_##name(const hs_cuda_ctx *ctx, const hs_args *args) {             \
        const hs_##name##_args a = hs_##name##_args_of(args);                                      \
        if (args->dtype == HS_F32) return name##_op<float>(ctx, a);                                \
        if (args->dtype == HS_BF16) return name##_op<bf16>(ctx, a);                                \
        return HS_E_CONFIG;                                                                        \
    }

typedef __nv_bfloat16 bf16;

/* Elements of T in 16 bytes: 4 or 8. What a thread works on at a time. */
template <typename T> struct pack_of {
    static const int N = 16 / (int)sizeof(T);
};

template <int N> struct lanes {
    float x[N];
};

HS_DEVICE float widen(float x) {
    return x;
}
HS_DEVICE float widen(bf16 x) {
    return __uint_as_float((uint32_t)__bfloat16_as_ushort(x) << 16);
}
HS_DEVICE void narrow(float x, float *to) {
    *to = x;
}
/* to nearest even; a NaN stays one with its sign and upper payload, as on the CPU */
HS_DEVICE void narrow(float x, bf16 *to) {
    *to = x == x ? __float2bfloat16_rn(x)
                 : __ushort_as_bfloat16((uint16_t)(__float_as_uint(x) >> 16 | 0x40));
}
HS_DEVICE uint32_t bits_of(float x) {
    return __float_as_uint(x);
}

/* hs_pair: two numbers rounded to bf16, to nearest even, `low` in the low half; NaN becomes 0x7fff.
 * hs_nan_seen: `seen` with 0x7fff in the halves where pair has a NaN or what is infinite. */
#ifdef HS_CUDA_EMULATED
static inline uint32_t hs_pair(float low, float high) {
    return (uint32_t)__float2bfloat16_rn(high).bits << 16 | __float2bfloat16_rn(low).bits;
}
static inline uint32_t hs_nan_seen(uint32_t seen, uint32_t pair) {
    for (uint32_t half = 0x7fff; half; half <<= 16)
        if ((pair & half) >= (half & 0x7f807f80u)) seen |= half;
    return seen;
}
#else
HS_DEVICE uint32_t hs_pair(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
/* nothing times a number is nothing, of either sign */
HS_DEVICE uint32_t hs_nan_seen(uint32_t seen, uint32_t pair) {
    uint32_t r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(pair), "r"(0), "r"(seen));
    return r;
}
#endif

#ifdef HS_CUDA_EMULATED
#define HS_ALIGNED16(p) hs_emulated::aligned16(p, hs_emulated::site{__FILE__, __LINE__})
#else
#define HS_ALIGNED16(p) (void)(p)
#endif

HS_DEVICE void unpack(uint4 words, float *x, float) {
    x[0] = __uint_as_float(words.x), x[1] = __uint_as_float(words.y);
    x[2] = __uint_as_float(words.z), x[3] = __uint_as_float(words.w);
}
HS_DEVICE void unpack(uint4 words, float *x, bf16) {
    const uint32_t w[4] = {words.x, words.y, words.z, words.w};
    for (int i = 0; i < 4; i++) {
        x[2 * i] = __uint_as_float(w[i] << 16);
        x[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
    }
}
HS_DEVICE uint4 packed(const float *x, float) {
    return uint4{bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3])};
}
/* A NaN among them, which is rare, is rounded as narrow does it. */
HS_DEVICE uint4 packed(const float *x, bf16) {
    uint32_t w[4], seen = 0;
    for (int i = 0; i < 4; i++) {
        w[i] = hs_pair(x[2 * i], x[2 * i + 1]);
        seen = hs_nan_seen(seen, w[i]);
    }
    if (seen & 0x7fff7fffu)
        for (int i = 0; i < 4; i++) {
            bf16 low, high;
            narrow(x[2 * i], &low);
            narrow(x[2 * i + 1], &high);
            w[i] = (uint32_t)__bfloat16_as_ushort(high) << 16 | __bfloat16_as_ushort(low);
        }
    return uint4{w[0], w[1], w[2], w[3]};
}

/* 16 bytes to the device's memory at p, as one access. A struct's four words become one where the compiler has an
 * address in sight, else four, each of which takes as many of the cache's writes. */
#ifdef HS_CUDA_EMULATED
HS_DEVICE void put16(void *p, uint4 x) {
    *static_cast<uint4 *>(p) = x;
}
#else
HS_DEVICE void put16(void *p, uint4 x) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)),
                 "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}
#endif

/* N elements from p on, of which `left` are there (the rest reads as 0). wide: p is a multiple of
 * 16 bytes. N is a multiple of pack_of<T>::N. */
template <int N, typename T> HS_DEVICE lanes<N> load(const T *p, int64_t left, bool wide) {
    const int W = pack_of<T>::N;
    lanes<N> r;
    if (wide && left >= N) {
#pragma unroll
        for (int i = 0; i < N; i += W) {
            HS_ALIGNED16(p + i);
            unpack(*reinterpret_cast<const uint4 *>(p + i), r.x + i, T());
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) r.x[i] = i < left ? widen(p[i]) : 0.0f;
    }
    return r;
}

/* Of the device's memory. */
template <int N, typename T>
HS_DEVICE void store(T *p, const lanes<N> &v, int64_t left, bool wide) {
    const int W = pack_of<T>::N;
    if (wide && left >= N) {
#pragma unroll
        for (int i = 0; i < N; i += W) {
            HS_ALIGNED16(p + i);
            put16(p + i, packed(v.x + i, T()));
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i++)
            if (i < left) narrow(v.x[i], p + i);
    }
}

/* Host side: whether 16-byte accesses may be used at p, and multiples of `step` elements on. */
template <typename T> static inline bool wide_at(const T *p, int64_t step = 0) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0 && step * (int64_t)sizeof(T) % 16 == 0;
}

HS_DEVICE int64_t min64(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* a / b; neither is below 0. A division of 64 bits is a loop on a GPU: taken where it must be. */
HS_DEVICE int64_t quotient(int64_t a, int64_t b) {
    if (b == 1) return a;
    return ((uint64_t)(a | b) >> 32) ? a / b : (int64_t)((uint32_t)a / (uint32_t)b);
}

/* Host side: shared memory that a block may have, by CUDA's programming guide. */
static inline int64_t hs_cuda_shared_bytes(uint32_t capability) {
    const bool large = capability >= 90 && capability < 120,
               ampere = capability == 80 || capability == 87;
    return (int64_t)(large ? 227 : ampere ? 163 : 99) << 10;
}

/* Elementwise kernels: blocks of FLAT threads, a thread does one pack. */
enum { FLAT = 256 };
static inline unsigned flat_blocks(int64_t items) {
    return (unsigned)hs_ceil_div(items, FLAT);
}
HS_DEVICE int64_t flat_index() {
    return (int64_t)blockIdx.x * FLAT + threadIdx.x;
}

#endif
