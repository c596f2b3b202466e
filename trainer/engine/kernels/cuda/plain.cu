/* A product of libraries.h by gemm.h: where the library has no algorithm of one sum for it. Without
 * tensor cores, so slow; its order is gemm.h's, then the scales, bias and what is added. */
#include "kernels/cuda/fp8.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/libraries.h"

template <typename T> static gemm_side<T> plain_side(const hs_side &s) {
    const T *at = static_cast<const T *>(s.at);
    return s.across ? gemm_side<T>{at, 1, s.ld} : gemm_side<T>{at, s.ld, 1};
}

template <typename I, typename O, typename J>
static hs_status plain_product(cudaStream_t stream, const hs_product &p) {
    gemm<I, O, J> g = {};
    g.m = p.m, g.n = p.n, g.k = p.k;
    g.a = plain_side<I>(p.a), g.b = plain_side<J>(p.b);
    g.out = static_cast<O *>(p.out), g.ld_out = p.ld_out;
    g.rounded_bias = static_cast<const O *>(p.bias);
    if (!p.fresh) g.res = static_cast<const O *>(p.add), g.ld_res = p.ld_add;
    g.scale_a = p.a.scale, g.scale_b = p.b.scale;
    return gemm_run(stream, g);
}

template <typename O> static hs_status plain_of(cudaStream_t stream, const hs_product &p) {
    if (p.a.type == HS_BF16) return plain_product<bf16, O, bf16>(stream, p);
    if (p.a.type == HS_E5M2) return plain_product<e5m2, O, e4m3>(stream, p);
    return plain_product<e4m3, O, e4m3>(stream, p);
}

extern "C" hs_status hs_plain_product(const hs_cuda_ctx *ctx, const hs_product *p) {
    const cudaStream_t stream = static_cast<cudaStream_t>(ctx->stream);
    if (p->a.type == HS_F32) return plain_product<float, float, float>(stream, *p);
    return p->type_out == HS_F32 ? plain_of<float>(stream, *p) : plain_of<bf16>(stream, *p);
}
