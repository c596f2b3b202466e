#include <inttypes.h>

#include "core/cpu.h"
#include "kernels/kernels.h"

#if defined(__x86_64__)
static bool has_avx2(void) {
    uint32_t a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_FMA) && hs_cpu_has(bit_AVX2, 0, HS_CPU_YMM);
}

static bool has_avx512(void) {
    const uint32_t features = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    return has_avx2() && hs_cpu_has(features, 0, HS_CPU_ZMM);
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
#if defined(__aarch64__)
    if (path == HS_PATH_NEON || path == HS_PATH_AUTO)
        return &hs_kernels_neon; /* each of them has it */
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
            "launch.kernel_path auto, portable, avx2, avx512, avx512_bf16 or neon, or run on a "
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
