/* What an x86 CPU has, asked with CPUID itself: what __builtin_cpu_supports reads is filled by a library, and
 * that of static musl builds by zig never does it. CPUID may trap to a hypervisor: who asks often keeps the
 * answer. */
#ifndef HS_CORE_CPU_H
#define HS_CORE_CPU_H

#if defined(__x86_64__)

#include <cpuid.h>
#include <stdbool.h>
#include <stdint.h>

enum {
    HS_CPU_YMM = 0x06,
    HS_CPU_ZMM = 0xe6
}; /* registers that the system saves, with narrower ones */

/* Whether leaf 7 has all of these bits in EBX and in ECX, and the system saves these registers. */
static inline bool hs_cpu_has(uint32_t ebx, uint32_t ecx, uint32_t saved) {
    uint32_t a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & saved) == saved && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & ebx) == ebx &&
           (c & ecx) == ecx;
}

#endif

#endif
