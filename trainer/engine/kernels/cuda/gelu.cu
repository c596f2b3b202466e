/* GELU. Bits of the fast CPU set (kernels/cpu/gelu.c says why there is no tanh). */
#include "kernels/cuda/lookup.h"

#include "kernels/gelu.h"

HS_DEVICE void gelu_sigmoid(float x, float *cut, float *square, float *s, float *rest) {
    const float two_a = (float)(2 * HS_GELU_A);
    *cut = v_min(12.0f, v_max(-12.0f, x));
    *square = *cut * *cut;
    const float z = (*cut * two_a) * v_fma(*square, (float)HS_GELU_B, 1.0f);
    v_sigmoid(z, s, rest);
}

/* y = x gate(x) */
HS_DEVICE float gelu_gate(float x) {
    float cut, square, s, rest;
    gelu_sigmoid(x, &cut, &square, &s, &rest);
    return s;
}
/* dx = dy slope(x) */
HS_DEVICE float gelu_slope(float x) {
    const float two_a = (float)(2 * HS_GELU_A), six_ab = (float)(6 * HS_GELU_A * HS_GELU_B);
    float cut, square, s, rest;
    gelu_sigmoid(x, &cut, &square, &s, &rest);
    return v_fma(cut * (s * rest), v_fma(square, six_ab, two_a), s);
}

/* Up to LOW the gate is so near 1/2 that y, rounded to bf16, is x / 2, and the slope is just 1/2; from 12 on,
 * where x is cut, both are those of 12. */
struct gate_of {
    static const int LOW = 0x3aa0, HIGH = 0x4140; /* 0.00122, 12 */
    HS_DEVICE float of(float x) { return gelu_gate(x); }
};
struct slope_of {
    static const int LOW = 0x3280, HIGH = 0x4140; /* 2^-26, 12 */
    HS_DEVICE float of(float x) { return gelu_slope(x); }
};

template <typename T>
__global__ void __launch_bounds__(FLAT) gelu_fwd(T *y, const T *x, int64_t n, bool wide) {
    const int N = pack_of<T>::N;
    const int64_t at = flat_index() * N;
    if (at >= n) return;
    lanes<N> v = load<N>(x + at, n - at, wide);
    for (int i = 0; i < N; i++) v.x[i] = v.x[i] * gelu_gate(v.x[i]);
    store(y + at, v, n - at, wide);
}

__global__ void __launch_bounds__(LOOKUP_THREADS, LOOKUP_BLOCKS)
    gelu_fwd_lookup(bf16 *y, const bf16 *x, int64_t n) {
    const int N = pack_of<bf16>::N;
    HS_SHARED(lookup<gate_of>, table, );
    lookup_fill(&table);
    for (int64_t at = lookup_first(); at < n; at += lookup_step()) {
        lanes<N> v = load<N>(x + at, n - at, true);
        for (int i = 0; i < N; i++) v.x[i] = v.x[i] * looked_up(table, v.x[i]);
        store(y + at, v, n - at, true);
    }
}

template <typename T>
__global__ void __launch_bounds__(FLAT)
    gelu_igrad(T *dx, const T *dy, const T *x, int64_t n, bool wide) {
    const int N = pack_of<T>::N;
    const int64_t at = flat_index() * N;
    if (at >= n) return;
    lanes<N> v = load<N>(x + at, n - at, wide), g = load<N>(dy + at, n - at, wide);
    for (int i = 0; i < N; i++) g.x[i] = g.x[i] * gelu_slope(v.x[i]);
    store(dx + at, g, n - at, wide);
}

__global__ void __launch_bounds__(LOOKUP_THREADS, LOOKUP_BLOCKS)
    gelu_igrad_lookup(bf16 *dx, const bf16 *dy, const bf16 *x, int64_t n) {
    const int N = pack_of<bf16>::N;
    HS_SHARED(lookup<slope_of>, table, );
    lookup_fill(&table);
    for (int64_t at = lookup_first(); at < n; at += lookup_step()) {
        lanes<N> v = load<N>(x + at, n - at, true), g = load<N>(dy + at, n - at, true);
        for (int i = 0; i < N; i++) {
            const float slope = looked_up(table, v.x[i]);
            g.x[i] = g.x[i] * (v.x[i] == v.x[i] ? slope : v.x[i]);
        }
        store(dx + at, g, n - at, true);
    }
}

template <typename T>
static hs_status gelu_fwd_op(const hs_cuda_ctx *ctx, const hs_gelu_fwd_args &a) {
    const cudaStream_t stream = static_cast<cudaStream_t>(ctx->stream);
    const int64_t n = a.n;
    T *y = static_cast<T *>(a.y);
    const T *x = static_cast<const T *>(a.x);
    const bool wide = wide_at(y) && wide_at(x);
    if constexpr (sizeof(T) == sizeof(bf16))
        if (const unsigned blocks = wide ? lookup_blocks<gate_of>(ctx, n) : 0)
            return HS_LAUNCH(gelu_fwd_lookup, blocks, LOOKUP_THREADS, stream, y, x, n);
    return HS_LAUNCH(gelu_fwd, flat_blocks(hs_ceil_div(n, pack_of<T>::N)), FLAT, stream, y, x, n,
                     wide);
}
HS_CUDA_CTX_OP(gelu_fwd)

template <typename T>
static hs_status gelu_igrad_op(const hs_cuda_ctx *ctx, const hs_gelu_igrad_args &a) {
    const cudaStream_t stream = static_cast<cudaStream_t>(ctx->stream);
    const int64_t n = a.n;
    T *dx = static_cast<T *>(a.dx);
    const T *dy = static_cast<const T *>(a.dy), *x = static_cast<const T *>(a.x);
    const bool wide = wide_at(dx) && wide_at(dy) && wide_at(x);
    if constexpr (sizeof(T) == sizeof(bf16))
        if (const unsigned blocks = wide ? lookup_blocks<slope_of>(ctx, n) : 0)
            return HS_LAUNCH(gelu_igrad_lookup, blocks, LOOKUP_THREADS, stream, dx, dy, x, n);
    return HS_LAUNCH(gelu_igrad, flat_blocks(hs_ceil_div(n, pack_of<T>::N)), FLAT, stream, dx, dy,
                     x, n, wide);
}
HS_CUDA_CTX_OP(gelu_igrad)
