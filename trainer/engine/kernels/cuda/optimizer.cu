/* What runs once a step over whole tensors. Bits of the fast CPU set, sumsq too: its 16 double
 * lanes a block are 16 threads here, and the parts join by the same pairwise tree. */
#include "kernels/cuda/lane.h"
#include "kernels/cuda/together.h"

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

struct squared {
    double *part;
    const float *x;
    int64_t n;
    bool wide;
};

__global__ void __launch_bounds__(FLAT) sumsq_parts(const __grid_constant__ calls<squared> all) {
    HS_SHARED(sumsq_stages, stages, );
    int64_t block;
    const squared &c = all.call[call_of_block(all, block)];
    const float *const x = c.x;
    const bool wide = c.wide;
    const int64_t first = block * HS_SUMSQ_BLOCK;
    const int64_t end = min64(first + HS_SUMSQ_BLOCK, c.n);
    double sum = 0;
    lanes<FLAT_F32> v[SUMSQ_PACKS];
    sumsq_fetch(v, x, first, end, wide);
    int turn = 0;
    for (int64_t at = first; at < end; at += SUMSQ_STAGE, turn ^= 1) {
#pragma unroll
        for (int p = 0; p < SUMSQ_PACKS; p++)
            *reinterpret_cast<uint4 *>(&stages.x[turn][(p * FLAT + (int)threadIdx.x) * FLAT_F32]) =
                packed(v[p].x, float());
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
    if (threadIdx.x == 0) c.part[block] = sum;
}

struct joined_pairs {
    double *out;
    const double *from;
    double *tree;
    int64_t n;
};

/* Neighbours join, level by level, of `from` in `tree`, which may be the same; an odd one goes up as
 * it is. A block a call. */
__global__ void __launch_bounds__(FLAT)
    join_pairs(const __grid_constant__ calls<joined_pairs> all) {
    const joined_pairs &c = all.call[blockIdx.x];
    const double *from = c.from;
    double *const tree = c.tree;
    int64_t n = c.n;
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
    if (threadIdx.x == 0) *c.out = from[0];
}

/* What calls that go together share. */
struct adamw_reals {
    const hs_step_control *ctl;
    float beta1, rest1, beta2, rest2, eps;
};

template <typename T> struct updated {
    float *w, *m, *v, *g;
    T *wc;
    int64_t n;
    float decay;
    bool zero, wide;
};

/* AdamW of N elements in registers: g may be changed by nobody else, w, m and v are what it makes of them. */
template <int N>
HS_DEVICE void adamw_lanes(lanes<N> &w, lanes<N> &m, lanes<N> &v, const lanes<N> &g,
                           const adamw_reals &k, float decay) {
    const float clip = k.ctl->clip_scale, shrink = k.ctl->lr_decay * decay;
    const float step_size = k.ctl->step_size, v_scale = k.ctl->v_scale;
    for (int i = 0; i < N; i++) {
        const float gg = g.x[i] * clip;
        m.x[i] = v_fma(k.beta1, m.x[i], k.rest1 * gg);
        v.x[i] = v_fma(k.beta2, v.x[i], (k.rest2 * gg) * gg);
        const float den = v_fma(v_sqrt(v.x[i]), v_scale, k.eps);
        const float ww = v_fnma(shrink, w.x[i], w.x[i]);
        w.x[i] = ww - v_div(step_size * m.x[i], den);
    }
}

/* copy: only wc is written. */
template <typename T, bool copy>
__global__ void __launch_bounds__(FLAT)
    adamw(const __grid_constant__ calls<updated<T>> all, const adamw_reals k) {
    const int N = pack_of<T>::N; /* so that wc is written 16 bytes at a time */
    int64_t block;
    const updated<T> &c = all.call[call_of_block(all, block)];
    const int64_t at = (block * FLAT + threadIdx.x) * N, left = c.n - at;
    const bool wide = c.wide;
    if (left <= 0) return;
    const lanes<N> gv = load<N>(c.g + at, left, wide);
    lanes<N> wv = load<N>(c.w + at, left, wide), mv = load<N>(c.m + at, left, wide),
             vv = load<N>(c.v + at, left, wide);
    adamw_lanes(wv, mv, vv, gv, k, c.decay);
    if (!copy) {
        store(c.w + at, wv, left, wide);
        store(c.m + at, mv, left, wide);
        store(c.v + at, vv, left, wide);
        if (c.zero) store(c.g + at, lanes<N>(), left, wide);
    }
    if (copy || c.wc) store(c.wc + at, wv, left, wide);
}

struct zeroed {
    unsigned char *dst;
    int64_t bytes;
    bool wide;
};

__global__ void __launch_bounds__(FLAT) zero(const __grid_constant__ calls<zeroed> all) {
    int64_t block;
    const zeroed &c = all.call[call_of_block(all, block)];
    const int64_t at = (block * FLAT + threadIdx.x) * 16;
    if (c.wide && at + 16 <= c.bytes)
        put16(c.dst + at, uint4{0, 0, 0, 0});
    else
        for (int64_t i = at; i < min64(at + 16, c.bytes); i++) c.dst[i] = 0;
}

template <typename T> struct narrowed {
    T *dst;
    const float *src;
    int64_t n;
    bool wide;
};

template <typename T>
__global__ void __launch_bounds__(FLAT) cast(const __grid_constant__ calls<narrowed<T>> all) {
    const int N = pack_of<T>::N;
    int64_t block;
    const narrowed<T> &c = all.call[call_of_block(all, block)];
    const int64_t at = (block * FLAT + threadIdx.x) * N, left = c.n - at;
    if (left <= 0) return;
    store(c.dst + at, load<N>(c.src + at, left, c.wide), left, c.wide);
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

static void square(calls<squared> &all, void *part, const void *from, int64_t n) {
    const float *x = static_cast<const float *>(from);
    add_call(all, squared{static_cast<double *>(part), x, n, wide_at(x)},
             hs_ceil_div(n, HS_SUMSQ_BLOCK));
}

static void join(calls<joined_pairs> &all, void *out, const void *from, void *tree, int64_t n) {
    add_call(all,
             joined_pairs{static_cast<double *>(out), static_cast<const double *>(from),
                          static_cast<double *>(tree), n},
             1);
}

template <typename T>
static hs_status sumsq_op(cudaStream_t stream, const hs_args *args, uint32_t count) {
    calls<squared> all = {};
    calls<joined_pairs> joins = {};
    for (uint32_t i = 0; i < count; i++) {
        const hs_sumsq_args a = hs_sumsq_args_of(&args[i]);
        square(all, a.part, a.x, a.n);
        join(joins, a.out, a.part, a.part, hs_ceil_div(a.n, HS_SUMSQ_BLOCK));
    }
    HS_TRY(HS_LAUNCH(sumsq_parts, all.blocks, FLAT, stream, all));
    return HS_LAUNCH(join_pairs, joins.blocks, FLAT, stream, joins);
}
HS_CUDA_TOGETHER_OP(sumsq)

template <typename T>
static hs_status sumsq_parts_op(cudaStream_t stream, const hs_args *args, uint32_t count) {
    calls<squared> all = {};
    for (uint32_t i = 0; i < count; i++) {
        const hs_sumsq_parts_args a = hs_sumsq_parts_args_of(&args[i]);
        square(all, a.part, a.x, a.n);
    }
    return HS_LAUNCH(sumsq_parts, all.blocks, FLAT, stream, all);
}
HS_CUDA_TOGETHER_OP(sumsq_parts)

template <typename T>
static hs_status sum_op(cudaStream_t stream, const hs_args *args, uint32_t count) {
    calls<joined_pairs> joins = {};
    for (uint32_t i = 0; i < count; i++) {
        const hs_sum_args a = hs_sum_args_of(&args[i]);
        join(joins, a.out, a.part, a.tree, a.n);
    }
    return HS_LAUNCH(join_pairs, joins.blocks, FLAT, stream, joins);
}
HS_CUDA_TOGETHER_OP(sum)

/* adamw_copy writes wc alone, and is told the other operands in another order. */
static hs_adamw_args update_of(const hs_args *args, bool copy) {
    if (!copy) return hs_adamw_args_of(args);
    const hs_adamw_copy_args a = hs_adamw_copy_args_of(args);
    return hs_adamw_args{a.w, a.m,     a.v,     a.g,   a.wc,    a.ctl,  a.n,
                         0,   a.beta1, a.beta2, a.eps, a.decay, a.dtype};
}

static bool share_reals(const hs_adamw_args &a, const hs_adamw_args &b) {
    return a.ctl == b.ctl && a.beta1 == b.beta1 && a.beta2 == b.beta2 && a.eps == b.eps;
}

template <typename T, bool copy>
static hs_status update(cudaStream_t stream, const hs_args *args, uint32_t count) {
    uint32_t i = 0;
    while (i < count) {
        const hs_adamw_args a = update_of(&args[i], copy);
        const adamw_reals k = {static_cast<const hs_step_control *>(a.ctl),
                               (float)a.beta1,
                               (float)(1.0 - a.beta1),
                               (float)a.beta2,
                               (float)(1.0 - a.beta2),
                               (float)a.eps};
        calls<updated<T>> all = {};
        for (; i < count; i++) {
            const hs_adamw_args b = update_of(&args[i], copy);
            if (!share_reals(a, b)) break;
            updated<T> u = {static_cast<float *>(b.w),
                            static_cast<float *>(b.m),
                            static_cast<float *>(b.v),
                            static_cast<float *>(b.g),
                            static_cast<T *>(b.wc),
                            b.n,
                            (float)b.decay,
                            b.ZERO_G != 0,
                            false};
            u.wide = wide_at(u.w) && wide_at(u.m) && wide_at(u.v) && wide_at(u.g) && wide_at(u.wc);
            add_call(all, u, flat_blocks(hs_ceil_div(b.n, pack_of<T>::N)));
        }
        static_assert(sizeof all + sizeof k <= 4096, "arguments of a kernel");
        HS_TRY(HS_LAUNCH((adamw<T, copy>), all.blocks, FLAT, stream, all, k));
    }
    return HS_OK;
}

template <typename T>
static hs_status adamw_op(cudaStream_t stream, const hs_args *args, uint32_t count) {
    return update<T, false>(stream, args, count);
}
HS_CUDA_TOGETHER_OP(adamw)

template <typename T>
static hs_status adamw_copy_op(cudaStream_t stream, const hs_args *args, uint32_t count) {
    return update<T, true>(stream, args, count);
}
HS_CUDA_TOGETHER_OP(adamw_copy)

template <typename T>
static hs_status zero_op(cudaStream_t stream, const hs_args *args, uint32_t count) {
    calls<zeroed> all = {};
    for (uint32_t i = 0; i < count; i++) {
        const hs_zero_args a = hs_zero_args_of(&args[i]);
        unsigned char *dst = static_cast<unsigned char *>(a.dst);
        add_call(all, zeroed{dst, a.bytes, wide_at(dst)}, flat_blocks(hs_ceil_div(a.bytes, 16)));
    }
    return HS_LAUNCH(zero, all.blocks, FLAT, stream, all);
}
HS_CUDA_TOGETHER_OP(zero)

template <typename T>
static hs_status cast_op(cudaStream_t stream, const hs_args *args, uint32_t count) {
    calls<narrowed<T>> all = {};
    for (uint32_t i = 0; i < count; i++) {
        const hs_cast_args a = hs_cast_args_of(&args[i]);
        T *dst = static_cast<T *>(a.dst);
        const float *src = static_cast<const float *>(a.src);
        add_call(all, narrowed<T>{dst, src, a.n, wide_at(dst) && wide_at(src)},
                 flat_blocks(hs_ceil_div(a.n, pack_of<T>::N)));
    }
    return HS_LAUNCH((cast<T>), all.blocks, FLAT, stream, all);
}
HS_CUDA_TOGETHER_OP(cast)
