/* The processor's mode in which denormal operands and results count as zero of their sign, for the
 * products of bf16 (gemm.h). x86 flushes a result that is denormal after rounding, as VDPBF16PS does;
 * arm64 one that is denormal before: the one result that differs is a sum that would round up to the
 * least normal number, 2^-126. */
#ifndef HS_KERNELS_CPU_FLUSH_H
#define HS_KERNELS_CPU_FLUSH_H

#include "kernels/cpu/vec.h"

#if defined(__x86_64__)

#include <xmmintrin.h>

typedef unsigned flush_mode;

VINLINE flush_mode flush_begin(void) {
    const flush_mode before = _mm_getcsr();
    _mm_setcsr(before | 0x8040); /* results, operands */
    return before;
}
VINLINE void flush_end(flush_mode before) {
    _mm_setcsr(before);
}

#elif defined(__aarch64__)

typedef uint64_t flush_mode;

VINLINE flush_mode flush_begin(void) {
    flush_mode before;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" : : "r"(before | UINT64_C(1) << 24) : "memory");
    return before;
}
VINLINE void flush_end(flush_mode before) {
    __asm__ volatile("msr fpcr, %0" : : "r"(before) : "memory");
}

#else
#error "say here how this processor counts denormal numbers as zero"
#endif

#endif
