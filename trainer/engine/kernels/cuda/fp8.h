/* FP8 on a thread: elements that a product widens, and codes of sixteen numbers. */
#ifndef HS_KERNELS_CUDA_FP8_H
#define HS_KERNELS_CUDA_FP8_H

#include "kernels/cuda/lane.h"

#include "kernels/cpu/vec_fp8.h"

struct e4m3 {
    uint8_t code;
};
struct e5m2 {
    uint8_t code;
};

HS_DEVICE float widen(e4m3 x) {
    return v_from_fp8(x.code, 0);
}
HS_DEVICE float widen(e5m2 x) {
    return v_from_fp8(x.code, 1);
}

#if !defined(HS_CUDA_EMULATED) && __CUDA_ARCH__ >= 890
/* Codes of a pair, the first in the low byte: the same that v_fp8 gives. */
HS_DEVICE uint32_t fp8_pair(float low, float high, bool e5m2) {
    uint16_t pair;
    if (e5m2)
        asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    else
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}
#else
HS_DEVICE uint32_t fp8_pair(float low, float high, bool e5m2) {
    return v_fp8(low, e5m2) | v_fp8(high, e5m2) << 8;
}
#endif

/* Sixteen codes, in order. */
HS_DEVICE uint4 fp8_codes(const lanes<16> &v, bool e5m2) {
    uint32_t w[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        w[i] = fp8_pair(v.x[4 * i], v.x[4 * i + 1], e5m2) |
               fp8_pair(v.x[4 * i + 2], v.x[4 * i + 3], e5m2) << 16;
    return uint4{w[0], w[1], w[2], w[3]};
}

#endif
