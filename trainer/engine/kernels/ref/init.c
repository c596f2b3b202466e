#include "kernels/init.h"

#include "core/rng.h"
#include "kernels/ref/ref_internal.h"

void hs_ref_init_normal(const hs_init_normal_args *a) {
    const hs_rng_key key = hs_rng_make_key((uint64_t)a->SEED, (uint32_t)a->TENSOR, HS_RNG_USE_INIT);
    for (int64_t i = 0; i < a->n; i++)
        store(a->w, acc_of(a->dtype), i, a->mean + a->std * hs_rng_normal(key, (uint64_t)i));
}

void hs_ref_init_const(const hs_init_const_args *a) {
    for (int64_t i = 0; i < a->n; i++) store(a->w, acc_of(a->dtype), i, a->value);
}
