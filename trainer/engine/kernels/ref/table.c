#include "kernels/ref/ref_internal.h"

#define X(number, NAME, name, ...)                                                                 \
    static hs_status name(hs_kernel_ctx *ctx, const hs_args *args) {                               \
        const hs_##name##_args a = hs_##name##_args_of(args);                                      \
        (void)ctx;                                                                                 \
        hs_ref_##name(&a);                                                                         \
        return HS_OK;                                                                              \
    }
HS_KERNELS(X)
#undef X

const hs_kernel_set hs_kernels_ref = {
    .name = "ref",
    .fn =
        {
#define X(number, NAME, name, ...) [HS_K_##NAME] = name,
            HS_KERNELS(X)
#undef X
        },
};
