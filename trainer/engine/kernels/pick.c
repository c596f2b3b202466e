#include "kernels/kernels.h"

/* The numbers of hs_attempt.kernel_path (wire/attempt.h). */
enum { PATH_AUTO = 0, PATH_REF = 1, PATH_PORTABLE = 2, PATH_AVX2 = 3, PATH_AVX512 = 4 };

#if defined(__x86_64__)
/* These ask the CPU and whether the system saves the registers. */
static bool has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static bool has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const hs_kernel_set *hs_kernels_pick(uint32_t path) {
    if (path == PATH_REF) return &hs_kernels_ref;
#if defined(__x86_64__)
    if ((path == PATH_AVX512 || path == PATH_AUTO) && has_avx512()) return &hs_kernels_avx512;
    if ((path == PATH_AVX2 || path == PATH_AUTO) && has_avx2()) return &hs_kernels_avx2;
#endif
    if (path == PATH_PORTABLE || path == PATH_AUTO) return &hs_kernels_portable;
    return NULL;
}
