#include "kernels/cuda/device.h"

static hs_cuda_together_fn together(uint16_t kernel) {
    switch (kernel) {
#define X(NAME, name)                                                                              \
    case HS_K_##NAME:                                                                              \
        return hs_cuda_##name##_together;
        HS_CUDA_TOGETHER_KERNELS(X)
#undef X
    default:
        return NULL;
    }
}

static const hs_cuda_table table = {
    HS_CUDA_VERSION,
    HS_K_COUNT,
    {NULL,
#define X(number, NAME, name, ...) hs_cuda_##name,
     HS_KERNELS(X)
#undef X
    },
    together,
};

static_assert(sizeof table.fn / sizeof *table.fn == HS_K_COUNT, "a gap in the kernels' numbers");

extern "C" const hs_cuda_table *hs_cuda_kernels(void) {
    return &table;
}
