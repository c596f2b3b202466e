/* Muon but for its products, which are linear layers'; see muon.h for the exact steps. Bits of the fast
 * CPU set. */
#include "kernels/cuda/lane.h"

#include "kernels/muon.h"

extern "C" {
#include "wire/plan.h"
}

enum { MUON_F32 = pack_of<float>::N }; /* elements of a thread where all is f32 */

__global__ void __launch_bounds__(FLAT)
    muon_momentum(float *u, const float *m, const float *g, const hs_step_control *ctl,
                  float momentum, int64_t n, bool wide) {
    const int N = MUON_F32;
    const int64_t at = flat_index() * N, left = n - at;
    if (at >= n) return;
    const lanes<N> mv = load<N>(m + at, left, wide);
    lanes<N> gv = load<N>(g + at, left, wide);
    for (int i = 0; i < N; i++) {
        const float clipped = gv.x[i] * ctl->clip_scale;
        gv.x[i] = v_fma(momentum, v_fma(momentum, mv.x[i], clipped), clipped);
    }
    store(u + at, gv, left, wide);
}

__global__ void __launch_bounds__(FLAT)
    muon_scale(float *x, const double *sumsq, double eps, int64_t n, bool wide) {
    const int N = MUON_F32;
    const int64_t at = flat_index() * N, left = n - at;
    if (at >= n) return;
    const float s = (float)(1.0 / (sqrt(*sumsq) + eps));
    lanes<N> v = load<N>(x + at, left, wide);
    for (int i = 0; i < N; i++) v.x[i] = v.x[i] * s;
    store(x + at, v, left, wide);
}

__global__ void __launch_bounds__(FLAT)
    muon_poly(float *q, const float *p, float a, float b, float c, int64_t S) {
    const int64_t at = flat_index();
    if (at >= S * S) return;
    const float x = v_fma(b, p[at], c * q[at]);
    q[at] = at % (S + 1) == 0 ? x + a : x;
}

struct muon_reals {
    float momentum, scale, decay;
};

/* The step of N weights in registers. */
template <int N>
HS_DEVICE void muon_lanes(lanes<N> &w, const lanes<N> &o, const hs_step_control *ctl,
                          const muon_reals &k) {
    const float shrink = ctl->lr_decay * k.decay, step = ctl->lr_decay * k.scale;
    for (int i = 0; i < N; i++) w.x[i] = v_fnma(step, o.x[i], v_fnma(shrink, w.x[i], w.x[i]));
}

template <typename T>
__global__ void __launch_bounds__(FLAT)
    muon(float *w, float *m, float *g, const float *o, T *wc, const hs_step_control *ctl,
         const muon_reals k, int64_t n, bool wide) {
    const int N = pack_of<T>::N; /* so that wc is written 16 bytes at a time */
    const int64_t at = flat_index() * N, left = n - at;
    if (at >= n) return;
    const lanes<N> gv = load<N>(g + at, left, wide), ov = load<N>(o + at, left, wide);
    lanes<N> wv = load<N>(w + at, left, wide), mv = load<N>(m + at, left, wide);
    muon_lanes(wv, ov, ctl, k);
    for (int i = 0; i < N; i++) mv.x[i] = v_fma(k.momentum, mv.x[i], gv.x[i] * ctl->clip_scale);
    store(w + at, wv, left, wide);
    store(m + at, mv, left, wide);
    store(g + at, lanes<N>(), left, wide);
    if (wc) store(wc + at, wv, left, wide);
}

template <typename T>
__global__ void __launch_bounds__(FLAT)
    muon_copy(T *wc, const float *w, const float *o, const hs_step_control *ctl, const muon_reals k,
              int64_t n, bool wide) {
    const int N = pack_of<T>::N;
    const int64_t at = flat_index() * N, left = n - at;
    if (at >= n) return;
    const lanes<N> ov = load<N>(o + at, left, wide);
    lanes<N> wv = load<N>(w + at, left, wide);
    muon_lanes(wv, ov, ctl, k);
    store(wc + at, wv, left, wide);
}

template <typename T>
static hs_status muon_momentum_op(cudaStream_t stream, const hs_muon_momentum_args &a) {
    const int64_t n = a.n;
    float *u = static_cast<float *>(a.u);
    const float *m = static_cast<const float *>(a.m), *g = static_cast<const float *>(a.g);
    const hs_step_control *ctl = static_cast<const hs_step_control *>(a.ctl);
    return HS_LAUNCH(muon_momentum, flat_blocks(hs_ceil_div(n, MUON_F32)), FLAT, stream, u, m, g,
                     ctl, (float)a.momentum, n, wide_at(u) && wide_at(m) && wide_at(g));
}
HS_CUDA_OP(muon_momentum)

template <typename T>
static hs_status muon_scale_op(cudaStream_t stream, const hs_muon_scale_args &a) {
    const int64_t n = a.n;
    float *x = static_cast<float *>(a.x);
    return HS_LAUNCH(muon_scale, flat_blocks(hs_ceil_div(n, MUON_F32)), FLAT, stream, x,
                     static_cast<const double *>(a.sumsq), a.eps, n, wide_at(x));
}
HS_CUDA_OP(muon_scale)

template <typename T>
static hs_status muon_poly_op(cudaStream_t stream, const hs_muon_poly_args &a) {
    const int64_t S = a.S;
    return HS_LAUNCH(muon_poly, flat_blocks(S * S), FLAT, stream, static_cast<float *>(a.q),
                     static_cast<const float *>(a.p), (float)a.a, (float)a.b, (float)a.c, S);
}
HS_CUDA_OP(muon_poly)

template <typename T> static hs_status muon_op(cudaStream_t stream, const hs_muon_args &a) {
    const int64_t n = a.n;
    float *w = static_cast<float *>(a.w), *m = static_cast<float *>(a.m);
    float *g = static_cast<float *>(a.g);
    const float *o = static_cast<const float *>(a.o);
    T *wc = static_cast<T *>(a.wc);
    const hs_step_control *ctl = static_cast<const hs_step_control *>(a.ctl);
    const muon_reals k = {(float)a.momentum, (float)a.scale, (float)a.decay};
    const bool wide = wide_at(w) && wide_at(m) && wide_at(g) && wide_at(o) && wide_at(wc);
    return HS_LAUNCH(muon, flat_blocks(hs_ceil_div(n, pack_of<T>::N)), FLAT, stream, w, m, g, o, wc,
                     ctl, k, n, wide);
}
HS_CUDA_OP(muon)

template <typename T>
static hs_status muon_copy_op(cudaStream_t stream, const hs_muon_copy_args &a) {
    const int64_t n = a.n;
    const float *w = static_cast<const float *>(a.w), *o = static_cast<const float *>(a.o);
    T *wc = static_cast<T *>(a.wc);
    const hs_step_control *ctl = static_cast<const hs_step_control *>(a.ctl);
    const muon_reals k = {0, (float)a.scale, (float)a.decay};
    const bool wide = wide_at(w) && wide_at(o) && wide_at(wc);
    return HS_LAUNCH(muon_copy, flat_blocks(hs_ceil_div(n, pack_of<T>::N)), FLAT, stream, wc, w, o,
                     ctl, k, n, wide);
}
HS_CUDA_OP(muon_copy)
