/* GELU. Bits of the fast CPU set (kernels/cpu/gelu.c says why there is no tanh). */
#include "kernels/cuda/lane.h"

#include "kernels/gelu.h"

HS_DEVICE void gelu_sigmoid(float x, float *cut, float *square, float *s, float *rest) {
    const float two_a = (float)(2 * HS_GELU_A);
    *cut = v_min(12.0f, v_max(-12.0f, x));
    *square = *cut * *cut;
    const float z = (*cut * two_a) * v_fma(*square, (float)HS_GELU_B, 1.0f);
    v_sigmoid(z, s, rest);
}

template <typename T>
__global__ void __launch_bounds__(FLAT) gelu_fwd(T *y, const T *x, int64_t n, bool wide) {
    const int N = pack_of<T>::N;
    const int64_t at = flat_index() * N;
    if (at >= n) return;
    lanes<N> v = load<N>(x + at, n - at, wide);
    for (int i = 0; i < N; i++) {
        float cut, square, s, rest;
        gelu_sigmoid(v.x[i], &cut, &square, &s, &rest);
        v.x[i] = v.x[i] * s;
    }
    store(y + at, v, n - at, wide);
}

template <typename T>
__global__ void __launch_bounds__(FLAT)
    gelu_igrad(T *dx, const T *dy, const T *x, int64_t n, bool wide) {
    const int N = pack_of<T>::N;
    const float two_a = (float)(2 * HS_GELU_A), six_ab = (float)(6 * HS_GELU_A * HS_GELU_B);
    const int64_t at = flat_index() * N;
    if (at >= n) return;
    lanes<N> v = load<N>(x + at, n - at, wide), g = load<N>(dy + at, n - at, wide);
    for (int i = 0; i < N; i++) {
        float cut, square, s, rest;
        gelu_sigmoid(v.x[i], &cut, &square, &s, &rest);
        const float dz = v_fma(square, six_ab, two_a);
        g.x[i] = g.x[i] * v_fma(cut * (s * rest), dz, s);
    }
    store(dx + at, g, n - at, wide);
}

template <typename T> static hs_status gelu_fwd_op(cudaStream_t stream, const hs_gelu_fwd_args &a) {
    const int64_t n = a.n;
    T *y = static_cast<T *>(a.y);
    const T *x = static_cast<const T *>(a.x);
    return HS_LAUNCH(gelu_fwd, flat_blocks(hs_ceil_div(n, pack_of<T>::N)), FLAT, stream, y, x, n,
                     wide_at(y) && wide_at(x));
}
HS_CUDA_OP(gelu_fwd)

template <typename T>
static hs_status gelu_igrad_op(cudaStream_t stream, const hs_gelu_igrad_args &a) {
    const int64_t n = a.n;
    T *dx = static_cast<T *>(a.dx);
    const T *dy = static_cast<const T *>(a.dy), *x = static_cast<const T *>(a.x);
    return HS_LAUNCH(gelu_igrad, flat_blocks(hs_ceil_div(n, pack_of<T>::N)), FLAT, stream, dx, dy,
                     x, n, wide_at(dx) && wide_at(dy) && wide_at(x));
}
HS_CUDA_OP(gelu_igrad)
