/* SwiGLU: a thread does one pack of gates and the ups beside it. Bits of the fast CPU set. */
#include "kernels/cuda/lookup.h"

#include "kernels/swiglu.h"

/* 1 / (1 + e^-x): just 1/2 up to LOW; from HIGH on e^-x or e^x is the least that v_exp gives. */
struct sigmoid_of {
    static const int LOW = 0x3380, HIGH = 0x42b0; /* 2^-24, 88 */
    HS_DEVICE float of(float x) {
        float s, rest;
        v_sigmoid(x, &s, &rest);
        return s;
    }
};

template <typename T>
__global__ void __launch_bounds__(FLAT)
    swiglu_fwd(T *y, const T *gu, int64_t R, int64_t F, int64_t packs, bool wide) {
    const int N = pack_of<T>::N;
    const int64_t r = quotient(flat_index(), packs), f = (flat_index() - r * packs) * N;
    const int64_t left = F - f;
    if (r >= R) return;
    lanes<N> gate = load<N>(gu + 2 * r * F + f, left, wide);
    const lanes<N> up = load<N>(gu + (2 * r + 1) * F + f, left, wide);
    for (int i = 0; i < N; i++) gate.x[i] = (gate.x[i] * sigmoid_of::of(gate.x[i])) * up.x[i];
    store(y + r * F + f, gate, left, wide);
}

__global__ void __launch_bounds__(LOOKUP_THREADS, LOOKUP_BLOCKS)
    swiglu_fwd_lookup(bf16 *y, const bf16 *gu, int64_t n, int64_t F) {
    const int N = pack_of<bf16>::N;
    HS_SHARED(lookup<sigmoid_of>, table, );
    lookup_fill(&table);
    for (int64_t at = lookup_first(); at < n; at += lookup_step()) {
        const int64_t r = quotient(at, F);
        lanes<N> gate = load<N>(gu + at + r * F, N, true);
        const lanes<N> up = load<N>(gu + at + (r + 1) * F, N, true);
        for (int i = 0; i < N; i++) gate.x[i] = (gate.x[i] * looked_up(table, gate.x[i])) * up.x[i];
        store(y + at, gate, N, true);
    }
}

template <typename T>
__global__ void __launch_bounds__(FLAT)
    swiglu_igrad(T *dgu, const T *dy, const T *gu, int64_t R, int64_t F, int64_t packs, bool wide) {
    const int N = pack_of<T>::N;
    const int64_t r = quotient(flat_index(), packs), f = (flat_index() - r * packs) * N;
    const int64_t left = F - f;
    if (r >= R) return;
    const lanes<N> g = load<N>(dy + r * F + f, left, wide);
    lanes<N> gate = load<N>(gu + 2 * r * F + f, left, wide);
    lanes<N> up = load<N>(gu + (2 * r + 1) * F + f, left, wide);
    for (int i = 0; i < N; i++) {
        float s, rest;
        const float z = gate.x[i];
        v_sigmoid(z, &s, &rest);
        gate.x[i] = (g.x[i] * up.x[i]) * (s * v_fma(z, rest, 1.0f));
        up.x[i] = g.x[i] * (z * s);
    }
    store(dgu + 2 * r * F + f, gate, left, wide);
    store(dgu + (2 * r + 1) * F + f, up, left, wide);
}

template <typename T>
static hs_status swiglu_fwd_op(const hs_cuda_ctx *ctx, const hs_swiglu_fwd_args &a) {
    const cudaStream_t stream = static_cast<cudaStream_t>(ctx->stream);
    const int64_t R = a.R, F = a.F, packs = hs_ceil_div(F, pack_of<T>::N);
    T *y = static_cast<T *>(a.y);
    const T *gu = static_cast<const T *>(a.gu);
    const bool wide = wide_at(y, F) && wide_at(gu, F);
    if constexpr (sizeof(T) == sizeof(bf16))
        if (const unsigned blocks = wide ? lookup_blocks<sigmoid_of>(ctx, R * F) : 0)
            return HS_LAUNCH(swiglu_fwd_lookup, blocks, LOOKUP_THREADS, stream, y, gu, R * F, F);
    return HS_LAUNCH(swiglu_fwd, flat_blocks(R * packs), FLAT, stream, y, gu, R, F, packs, wide);
}
HS_CUDA_CTX_OP(swiglu_fwd)

template <typename T>
static hs_status swiglu_igrad_op(cudaStream_t stream, const hs_swiglu_igrad_args &a) {
    const int64_t R = a.R, F = a.F, packs = hs_ceil_div(F, pack_of<T>::N);
    T *dgu = static_cast<T *>(a.dgu);
    const T *dy = static_cast<const T *>(a.dy), *gu = static_cast<const T *>(a.gu);
    return HS_LAUNCH(swiglu_igrad, flat_blocks(R * packs), FLAT, stream, dgu, dy, gu, R, F, packs,
                     wide_at(dgu, F) && wide_at(dy, F) && wide_at(gu, F));
}
HS_CUDA_OP(swiglu_igrad)
