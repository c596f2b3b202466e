/* A product by a library (libraries.h), and what goes before it. */
#ifndef HS_KERNELS_CUDA_BY_LIBRARY_H
#define HS_KERNELS_CUDA_BY_LIBRARY_H

#include "kernels/cuda/device.h"
#include "kernels/cuda/libraries.h"

template <typename T>
__global__ void __launch_bounds__(FLAT) round_bias(T *to, const float *from, int64_t n) {
    const int64_t i = flat_index();
    if (i < n) narrow(from[i], to + i);
}

/* Where hs_products_of looks for a bias that is added to bf16. */
static inline hs_status rounded_bias(const hs_cuda_ctx *ctx, const void *bias, int64_t n) {
    if ((uint64_t)n * sizeof(bf16) > HS_OWN_BYTES) return HS_E_CONFIG;
    bf16 *to = reinterpret_cast<bf16 *>(HS_OWN_WORKSPACE(ctx));
    const cudaStream_t stream = static_cast<cudaStream_t>(ctx->stream);
    return HS_LAUNCH(round_bias, flat_blocks(n), FLAT, stream, to, static_cast<const float *>(bias),
                     n);
}

/* The one product of a call. */
static inline hs_status library_product(const hs_cuda_ctx *ctx, uint16_t kernel,
                                        const hs_args &args) {
    hs_product p[HS_PRODUCTS_OF_A_CALL];
    (void)hs_products_of(kernel, &args, HS_OWN_WORKSPACE(ctx), p);
    return hs_products_run(ctx->products, ctx, p);
}

#endif
