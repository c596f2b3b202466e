/* What runs once a step over whole tensors. Bits of the fast CPU set, sumsq too: its 16 double
 * lanes a block are 16 threads here, and the parts join by the same pairwise tree. */
#include "kernels/cuda/lane.h"

#include "kernels/optimizer.h"

extern "C" {
#include "wire/plan.h"
}

enum { FLAT_F32 = pack_of<float>::N }; /* elements of a thread where masters are walked */

/* dst + src, of a pack of numbers. */
__device__ static void add_to(float *dst, const float *src, int64_t left, bool wide) {
    const int N = FLAT_F32;
    lanes<N> x = load<N>(dst, left, wide);
    const lanes<N> y = load<N>(src, left, wide);
    for (int i = 0; i < N; i++) x.x[i] = x.x[i] + y.x[i];
    store(dst, x, left, wide);
}

__global__ void __launch_bounds__(FLAT)
    add_acc(float *dst, const float *src, int64_t n, bool wide) {
    const int64_t at = flat_index() * FLAT_F32;
    if (at < n) add_to(dst + at, src + at, n - at, wide);
}

__global__ void __launch_bounds__(FLAT) fold(float *dst, float *src, int64_t n, bool wide) {
    const int64_t at = flat_index() * FLAT_F32;
    if (at >= n) return;
    add_to(dst + at, src + at, n - at, wide);
    store(src + at, lanes<FLAT_F32>(), n - at, wide);
}

/* A block of threads does one of numbers: all of them fetch a stage, 64 bytes each, while 16 of them
 * add the one before, a chain each. */
enum { SUMSQ_PACKS = 4, SUMSQ_STAGE = SUMSQ_PACKS * FLAT * FLAT_F32 };
struct alignas(16) sumsq_stages {
    float x[2][SUMSQ_STAGE];
};

HS_DEVICE void sumsq_fetch(lanes<FLAT_F32> (&v)[SUMSQ_PACKS], const float *x, int64_t at,
                           int64_t end, bool wide) {
#pragma unroll
    for (int p = 0; p < SUMSQ_PACKS; p++) {
        const int64_t i = at + (p * FLAT + (int)threadIdx.x) * FLAT_F32;
        v[p] = load<FLAT_F32>(x + i, end - i, wide);
    }
}

__global__ void __launch_bounds__(FLAT)
    sumsq_parts(double *part, const float *x, int64_t n, bool wide) {
    HS_SHARED(sumsq_stages, stages, );
    const int64_t first = (int64_t)blockIdx.x * HS_SUMSQ_BLOCK;
    const int64_t end = min64(first + HS_SUMSQ_BLOCK, n);
    double sum = 0;
    lanes<FLAT_F32> v[SUMSQ_PACKS];
    sumsq_fetch(v, x, first, end, wide);
    int turn = 0;
    for (int64_t at = first; at < end; at += SUMSQ_STAGE, turn ^= 1) {
#pragma unroll
        for (int p = 0; p < SUMSQ_PACKS; p++)
            store(&stages.x[turn][(p * FLAT + (int)threadIdx.x) * FLAT_F32], v[p], FLAT_F32, true);
        __syncthreads(); /* and all have added what lay here two stages ago */
        sumsq_fetch(v, x, at + SUMSQ_STAGE, end, wide);
        if (threadIdx.x < LANES)
#pragma unroll 16
            for (int i = (int)threadIdx.x; i < SUMSQ_STAGE; i += LANES) {
                const double d = (double)stages.x[turn][i];
                sum = fma(d, d, sum);
            }
    }
    for (int bits = LANES / 2; bits; bits /= 2) sum = sum + __shfl_xor_sync(0xffffffffu, sum, bits);
    if (threadIdx.x == 0) part[blockIdx.x] = sum;
}

/* Neighbours join, level by level, of `from` in `tree`, which may be the same; an odd one goes up as
 * it is. One block. */
__global__ void __launch_bounds__(FLAT)
    join_pairs(double *out, const double *from, double *tree, int64_t n) {
    for (; n > 1; n = (n + 1) / 2, from = tree)
        for (int64_t base = 0; base < (n + 1) / 2; base += FLAT) {
            const int64_t i = base + threadIdx.x;
            double sum = 0;
            if (2 * i + 1 < n)
                sum = from[2 * i] + from[2 * i + 1];
            else if (2 * i < n)
                sum = from[2 * i];
            __syncthreads(); /* all have read what is now written over */
            if (2 * i < n) tree[i] = sum;
            __syncthreads(); /* and written what is read next */
        }
    if (threadIdx.x == 0) *out = from[0];
}

struct adamw_reals {
    float beta1, rest1, beta2, rest2, eps, decay;
};

/* AdamW of N elements in registers: g may be changed by nobody else, w, m and v are what it makes of them. */
template <int N>
HS_DEVICE void adamw_lanes(lanes<N> &w, lanes<N> &m, lanes<N> &v, const lanes<N> &g,
                           const hs_step_control *ctl, const adamw_reals &k) {
    const float clip = ctl->clip_scale, shrink = ctl->lr_decay * k.decay;
    const float step_size = ctl->step_size, v_scale = ctl->v_scale;
    for (int i = 0; i < N; i++) {
        const float gg = g.x[i] * clip;
        m.x[i] = v_fma(k.beta1, m.x[i], k.rest1 * gg);
        v.x[i] = v_fma(k.beta2, v.x[i], (k.rest2 * gg) * gg);
        const float den = v_fma(v_sqrt(v.x[i]), v_scale, k.eps);
        const float ww = v_fnma(shrink, w.x[i], w.x[i]);
        w.x[i] = ww - v_div(step_size * m.x[i], den);
    }
}

template <typename T>
__global__ void __launch_bounds__(FLAT)
    adamw(float *w, float *m, float *v, float *g, T *wc, const hs_step_control *ctl,
          const adamw_reals k, int64_t n, bool zero, bool wide) {
    const int N = pack_of<T>::N; /* so that wc is written 16 bytes at a time */
    const int64_t at = flat_index() * N, left = n - at;
    if (at >= n) return;
    const lanes<N> gv = load<N>(g + at, left, wide);
    lanes<N> wv = load<N>(w + at, left, wide), mv = load<N>(m + at, left, wide),
             vv = load<N>(v + at, left, wide);
    adamw_lanes(wv, mv, vv, gv, ctl, k);
    store(w + at, wv, left, wide);
    store(m + at, mv, left, wide);
    store(v + at, vv, left, wide);
    if (zero) store(g + at, lanes<N>(), left, wide);
    if (wc) store(wc + at, wv, left, wide);
}

template <typename T>
__global__ void __launch_bounds__(FLAT)
    adamw_copy(T *wc, const float *w, const float *m, const float *v, const float *g,
               const hs_step_control *ctl, const adamw_reals k, int64_t n, bool wide) {
    const int N = pack_of<T>::N;
    const int64_t at = flat_index() * N, left = n - at;
    if (at >= n) return;
    const lanes<N> gv = load<N>(g + at, left, wide);
    lanes<N> wv = load<N>(w + at, left, wide), mv = load<N>(m + at, left, wide),
             vv = load<N>(v + at, left, wide);
    adamw_lanes(wv, mv, vv, gv, ctl, k);
    store(wc + at, wv, left, wide);
}

__global__ void __launch_bounds__(FLAT) zero(unsigned char *dst, int64_t bytes, bool wide) {
    const int64_t at = flat_index() * 16;
    if (wide && at + 16 <= bytes)
        *reinterpret_cast<uint4 *>(dst + at) = uint4{0, 0, 0, 0};
    else
        for (int64_t i = at; i < min64(at + 16, bytes); i++) dst[i] = 0;
}

template <typename T>
__global__ void __launch_bounds__(FLAT) cast(T *dst, const float *src, int64_t n, bool wide) {
    const int N = pack_of<T>::N;
    const int64_t at = flat_index() * N;
    if (at >= n) return;
    store(dst + at, load<N>(src + at, n - at, wide), n - at, wide);
}

template <typename T> static hs_status add_acc_op(cudaStream_t stream, const hs_add_acc_args &a) {
    const int64_t n = a.n;
    float *dst = static_cast<float *>(a.dst);
    const float *src = static_cast<const float *>(a.src);
    return HS_LAUNCH(add_acc, flat_blocks(hs_ceil_div(n, FLAT_F32)), FLAT, stream, dst, src, n,
                     wide_at(dst) && wide_at(src));
}
HS_CUDA_OP(add_acc)

template <typename T> static hs_status fold_op(cudaStream_t stream, const hs_fold_args &a) {
    const int64_t n = a.n;
    float *dst = static_cast<float *>(a.dst), *src = static_cast<float *>(a.src);
    return HS_LAUNCH(fold, flat_blocks(hs_ceil_div(n, FLAT_F32)), FLAT, stream, dst, src, n,
                     wide_at(dst) && wide_at(src));
}
HS_CUDA_OP(fold)

static hs_status square(cudaStream_t stream, void *part, const void *from, int64_t n) {
    const int64_t blocks = hs_ceil_div(n, HS_SUMSQ_BLOCK);
    const float *x = static_cast<const float *>(from);
    return HS_LAUNCH(sumsq_parts, (unsigned)blocks, FLAT, stream, static_cast<double *>(part), x, n,
                     wide_at(x));
}

static hs_status join(cudaStream_t stream, void *out, const void *from, void *tree, int64_t n) {
    return HS_LAUNCH(join_pairs, 1, FLAT, stream, static_cast<double *>(out),
                     static_cast<const double *>(from), static_cast<double *>(tree), n);
}

template <typename T> static hs_status sumsq_op(cudaStream_t stream, const hs_sumsq_args &a) {
    HS_TRY(square(stream, a.part, a.x, a.n));
    return join(stream, a.out, a.part, a.part, hs_ceil_div(a.n, HS_SUMSQ_BLOCK));
}
HS_CUDA_OP(sumsq)

template <typename T>
static hs_status sumsq_parts_op(cudaStream_t stream, const hs_sumsq_parts_args &a) {
    return square(stream, a.part, a.x, a.n);
}
HS_CUDA_OP(sumsq_parts)

template <typename T> static hs_status sum_op(cudaStream_t stream, const hs_sum_args &a) {
    return join(stream, a.out, a.part, a.tree, a.n);
}
HS_CUDA_OP(sum)

template <typename T> static hs_status adamw_op(cudaStream_t stream, const hs_adamw_args &a) {
    const int64_t n = a.n, ZERO_G = a.ZERO_G;
    float *w = static_cast<float *>(a.w), *m = static_cast<float *>(a.m);
    float *v = static_cast<float *>(a.v), *g = static_cast<float *>(a.g);
    T *wc = static_cast<T *>(a.wc);
    const hs_step_control *ctl = static_cast<const hs_step_control *>(a.ctl);
    const adamw_reals k = {(float)a.beta1,         (float)(1.0 - a.beta1), (float)a.beta2,
                           (float)(1.0 - a.beta2), (float)a.eps,           (float)a.decay};
    const bool wide = wide_at(w) && wide_at(m) && wide_at(v) && wide_at(g) && wide_at(wc);
    return HS_LAUNCH(adamw, flat_blocks(hs_ceil_div(n, pack_of<T>::N)), FLAT, stream, w, m, v, g,
                     wc, ctl, k, n, ZERO_G != 0, wide);
}
HS_CUDA_OP(adamw)

template <typename T>
static hs_status adamw_copy_op(cudaStream_t stream, const hs_adamw_copy_args &a) {
    const int64_t n = a.n;
    const float *w = static_cast<const float *>(a.w), *m = static_cast<const float *>(a.m);
    const float *v = static_cast<const float *>(a.v), *g = static_cast<const float *>(a.g);
    T *wc = static_cast<T *>(a.wc);
    const hs_step_control *ctl = static_cast<const hs_step_control *>(a.ctl);
    const adamw_reals k = {(float)a.beta1,         (float)(1.0 - a.beta1), (float)a.beta2,
                           (float)(1.0 - a.beta2), (float)a.eps,           (float)a.decay};
    const bool wide = wide_at(w) && wide_at(m) && wide_at(v) && wide_at(g) && wide_at(wc);
    return HS_LAUNCH(adamw_copy, flat_blocks(hs_ceil_div(n, pack_of<T>::N)), FLAT, stream, wc, w, m,
                     v, g, ctl, k, n, wide);
}
HS_CUDA_OP(adamw_copy)

template <typename T> static hs_status zero_op(cudaStream_t stream, const hs_zero_args &a) {
    const int64_t bytes = a.bytes;
    unsigned char *dst = static_cast<unsigned char *>(a.dst);
    return HS_LAUNCH(zero, flat_blocks(hs_ceil_div(bytes, 16)), FLAT, stream, dst, bytes,
                     wide_at(dst));
}
HS_CUDA_OP(zero)

template <typename T> static hs_status cast_op(cudaStream_t stream, const hs_cast_args &a) {
    const int64_t n = a.n;
    T *dst = static_cast<T *>(a.dst);
    const float *src = static_cast<const float *>(a.src);
    return HS_LAUNCH(cast, flat_blocks(hs_ceil_div(n, pack_of<T>::N)), FLAT, stream, dst, src, n,
                     wide_at(dst) && wide_at(src));
}
HS_CUDA_OP(cast)
