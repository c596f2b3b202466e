/* The choice of algorithms for products (backend/products.h): the kernels' (kernels/cuda/libraries.h), on this device's
 * stream of kernels. */
#include "backend/cuda/device.h"

extern "C" {
#include "backend/products.h"
#include "kernels/cuda/libraries.h"
}

namespace hs_cuda {

static hs_cuda_ctx compute(const hs_device *d, hs_why *why) {
    hs_cuda_ctx ctx = d->kernels;
    ctx.stream = d->streams[HS_STREAM_COMPUTE];
    ctx.why = why;
    return ctx;
}

static const char *library(hs_device *d) {
    return d->kernels.products ? hs_products_library(d->kernels.products) : NULL;
}

static hs_status need(hs_device *d, uint16_t kernel, const hs_args *args, hs_why *why) {
    const hs_cuda_ctx ctx = compute(d, why);
    return hs_products_need(d->kernels.products, &ctx, kernel, args, why);
}

static hs_status use(hs_device *d, const hs_algorithm *list, uint32_t count, hs_why *why) {
    HS_TRY(here(d, why));
    return hs_products_use(d->kernels.products, list, count, why);
}

static uint32_t missing(hs_device *d) {
    return hs_products_missing(d->kernels.products);
}

static hs_status choose(hs_device *d, hs_algorithm *list, hs_why *why) {
    HS_TRY(here(d, why));
    const hs_cuda_ctx ctx = compute(d, why);
    const hs_status st = hs_products_choose(d->kernels.products, &ctx, list, why);
    const cudaError_t error = cudaStreamSynchronize(d->streams[HS_STREAM_COMPUTE]);
    if (error != cudaSuccess) return failed(d, error, NULL, "timing products", why);
    return st;
}

const hs_product_table products = {library, need, use, missing, choose};

} // namespace hs_cuda
