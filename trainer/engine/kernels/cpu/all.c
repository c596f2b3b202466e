/* The fast CPU kernels, one file to compile, once a path:
 *
 *   object      -DHS_PATH=    flags beside the common ones
 *   portable    portable      (none)
 *   avx2        avx2          -mavx2 -mfma -mf16c
 *   avx512      avx512        -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mavx2
 *   avx512_bf16 avx512_bf16   those and -mavx512bf16
 *   neon        neon          (none; arm64)
 *
 * Common: -std=c11 -D_GNU_SOURCE -O2 -ffp-contract=off, never -ffast-math; include path
 * trainer/engine; link with -lm -pthread. Each gives one table, hs_kernels_<HS_PATH>; the portable
 * one also hs_kernels_scratch_bytes. A machine has the portable path and those of its processor
 * (hs_kernels_pick knows).
 *
 * Bits: all tables, gcc and clang, and any number of threads give equal results (vec.h says
 * why); a row of a result does not depend on how many rows there are.
 * tests/engine/test_kernels_cpu.py and test_attention_cpu.py hold them to it.
 */
#include "kernels/args.h"

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/vec.h"
#include "kernels/cpu/vec_fp8.h"
#include "kernels/cpu/vec_math.h"

#include "kernels/cpu/attention_fwd.c"
#include "kernels/cpu/attention_igrad.c"
#include "kernels/cpu/borders.c"
#include "kernels/cpu/classifier.c"
#include "kernels/cpu/delay.c"
#include "kernels/cpu/embed.c"
#include "kernels/cpu/gelu.c"
#include "kernels/cpu/init.c"
#include "kernels/cpu/layernorm.c"
#include "kernels/cpu/linear.c"
#include "kernels/cpu/linear8.c"
#include "kernels/cpu/muon.c"
#include "kernels/cpu/optimizer.c"
#include "kernels/cpu/quantise.c"
#include "kernels/cpu/rmsnorm.c"
#include "kernels/cpu/rope.c"
#include "kernels/cpu/swiglu.c"
#include "kernels/cpu/vocabulary.c"

/* Every op behind one check: f64 belongs to ref. */
#define X(number, NAME, name, ...)                                                                 \
    static hs_status name(hs_kernel_ctx *ctx, const hs_args *args) {                               \
        if (args->dtype != HS_F32 && args->dtype != HS_BF16) return HS_E_CONFIG;                   \
        hs_##name##_args a = hs_##name##_args_of(args);                                            \
        name##_op(ctx, &a);                                                                        \
        return HS_OK;                                                                              \
    }
HS_KERNELS(X)
#undef X

#define TABLE_OF(path) HS_VEC_CAT(hs_kernels_, path)
#define TEXT_OF2(path) #path
#define TEXT_OF(path)  TEXT_OF2(path)

const hs_kernel_set TABLE_OF(HS_PATH) = {
    .name = TEXT_OF(HS_PATH),
    .fn =
        {
#define X(number, NAME, name, ...) [HS_K_##NAME] = name,
            HS_KERNELS(X)
#undef X
        },
};

#if HS_VEC == 0
size_t hs_kernels_scratch_bytes(int threads) {
    return (size_t)threads * WORKER_FLOATS * sizeof(float);
}
#endif
