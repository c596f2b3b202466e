#include <inttypes.h>

#include "kernels/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#if defined(__x86_64__)
/* These ask the CPU, and whether the system saves the registers. With CPUID itself: what
 * __builtin_cpu_supports reads is filled by a library, and that of static musl builds by zig never
 * does it. */
static uint32_t saved_registers(void) {
    uint32_t a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || !(c & bit_FMA)) return 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

static bool has(uint32_t features, uint32_t saved) {
    uint32_t a, b, c, d;
    if ((saved_registers() & saved) != saved || !__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return false;
    return (b & features) == features;
}

static bool has_avx2(void) {
    return has(bit_AVX2, 0x06);
}

static bool has_avx512(void) {
    return has(bit_AVX2 | bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL, 0xe6);
}

static bool has_avx512_bf16(void) {
    uint32_t a, b, c, d;
    return has_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & bit_AVX512BF16);
}
#endif

static const hs_kernel_set *set_of(uint32_t path) {
    if (path == HS_PATH_REF) return &hs_kernels_ref;
#if defined(__x86_64__)
    if ((path == HS_PATH_AVX512_BF16 || path == HS_PATH_AUTO) && has_avx512_bf16())
        return &hs_kernels_avx512_bf16;
    if ((path == HS_PATH_AVX512 || path == HS_PATH_AUTO) && has_avx512()) return &hs_kernels_avx512;
    if ((path == HS_PATH_AVX2 || path == HS_PATH_AUTO) && has_avx2()) return &hs_kernels_avx2;
#endif
    if (path == HS_PATH_PORTABLE || path == HS_PATH_AUTO) return &hs_kernels_portable;
    return NULL;
}

const char *hs_kernel_path_name(uint32_t path) {
    static const char *const names[] = {
#define X(number, NAME, name) [number] = (name),
        HS_PATHS(X)
#undef X
    };
    return path < HS_PATH_COUNT ? names[path] : "?";
}

bool hs_kernel_path_is_cuda(uint32_t path) {
    return path == HS_PATH_CUDA_EXACT || path == HS_PATH_CUDA;
}

hs_status hs_kernels_pick(uint32_t path, const hs_kernel_set **set, hs_why *why) {
    *set = set_of(path);
    if (*set) return HS_OK;
    if (hs_kernel_path_is_cuda(path))
        return hs_fail(
            why, HS_E_UNSUPPORTED,
            "kernel path %s runs on CUDA devices, and this rank runs on the CPU; choose "
            "launch.kernel_path auto, portable, avx2, avx512 or avx512_bf16, or run on a "
            "CUDA device",
            hs_kernel_path_name(path));
    if (path >= HS_PATH_COUNT)
        return hs_fail(why, HS_E_UNSUPPORTED,
                       "there is no kernel path %" PRIu32 "; they are numbered from 0 to %d", path,
                       HS_PATH_COUNT - 1);
    return hs_fail(why, HS_E_UNSUPPORTED,
                   "this CPU lacks kernel path %s; choose launch.kernel_path for the weakest node "
                   "of the gang, or auto",
                   hs_kernel_path_name(path));
}
