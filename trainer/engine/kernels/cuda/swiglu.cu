/* SwiGLU: a thread does one pack of gates and the ups beside it. Bits of the fast CPU set. */
#include "kernels/cuda/lane.h"

#include "kernels/swiglu.h"

template <typename T>
__global__ void __launch_bounds__(FLAT)
    swiglu_fwd(T *y, const T *gu, int64_t R, int64_t F, int64_t packs, bool wide) {
    const int N = pack_of<T>::N;
    const int64_t r = quotient(flat_index(), packs), f = (flat_index() - r * packs) * N;
    const int64_t left = F - f;
    if (r >= R) return;
    lanes<N> gate = load<N>(gu + 2 * r * F + f, left, wide);
    const lanes<N> up = load<N>(gu + (2 * r + 1) * F + f, left, wide);
    for (int i = 0; i < N; i++) {
        float s, rest;
        v_sigmoid(gate.x[i], &s, &rest);
        gate.x[i] = (gate.x[i] * s) * up.x[i];
    }
    store(y + r * F + f, gate, left, wide);
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
static hs_status swiglu_fwd_op(cudaStream_t stream, const hs_swiglu_fwd_args &a) {
    const int64_t R = a.R, F = a.F, packs = hs_ceil_div(F, pack_of<T>::N);
    T *y = static_cast<T *>(a.y);
    const T *gu = static_cast<const T *>(a.gu);
    return HS_LAUNCH(swiglu_fwd, flat_blocks(R * packs), FLAT, stream, y, gu, R, F, packs,
                     wide_at(y, F) && wide_at(gu, F));
}
HS_CUDA_OP(swiglu_fwd)

template <typename T>
static hs_status swiglu_igrad_op(cudaStream_t stream, const hs_swiglu_igrad_args &a) {
    const int64_t R = a.R, F = a.F, packs = hs_ceil_div(F, pack_of<T>::N);
    T *dgu = static_cast<T *>(a.dgu);
    const T *dy = static_cast<const T *>(a.dy), *gu = static_cast<const T *>(a.gu);
    return HS_LAUNCH(swiglu_igrad, flat_blocks(R * packs), FLAT, stream, dgu, dy, gu, R, F, packs,
                     wide_at(dgu, F) && wide_at(dy, F) && wide_at(gu, F));
}
HS_CUDA_OP(swiglu_igrad)
