#include "kernels/ref/ref_internal.h"

const hs_kernel_set hs_kernels_ref = {
    .name = "ref",
    .fn =
        {
#define X(number, NAME, name, ...) [HS_K_##NAME] = hs_ref_##name,
            HS_KERNELS(X)
#undef X
        },
};
