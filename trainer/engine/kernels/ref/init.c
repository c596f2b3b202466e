#include "kernels/init.h"

#include "core/rng.h"
#include "kernels/ref/ref_internal.h"

hs_status hs_ref_init_normal(hs_kernel_ctx *ctx, const hs_args *a) {
    (void)ctx;
    const hs_rng_key key =
        hs_rng_make_key((uint64_t)a->dim[2], (uint32_t)a->dim[1], HS_RNG_USE_INIT);
    for (int64_t i = 0; i < a->dim[0]; i++)
        store(a->ptr[0], acc_of(a->dtype), i,
              a->real[0] + a->real[1] * hs_rng_normal(key, (uint64_t)i));
    return HS_OK;
}

hs_status hs_ref_init_const(hs_kernel_ctx *ctx, const hs_args *a) {
    (void)ctx;
    for (int64_t i = 0; i < a->dim[0]; i++) store(a->ptr[0], acc_of(a->dtype), i, a->real[0]);
    return HS_OK;
}
