/* The last layer with its loss, CHUNK rows at a time: a product, a block for each row of logits,
 * two products; of gemm.h or, under path cuda, of a library (libraries.h).
 *
 * Order of a row's sum, of this set alone: thread t of FLAT sums its elements (packs of 4 at 4 t,
 * 4 (t + FLAT), ...) in one chain; threads join 16, 8, 4, 2, 1 lanes apart, then warps ascending.
 * It depends on V alone, so CHUNK does not show. The products' order is gemm.h's.
 */
#include "kernels/cuda/by_library.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/tensor.h"

#include "kernels/classifier.h"

enum { ROW_WARPS = FLAT / 32, ROW_PACK = 4 };

/* Largest or sum over the block, to all threads. */
HS_DEVICE float row_max(float (&warps)[ROW_WARPS], float x) {
    for (int bits = 16; bits; bits /= 2) x = v_max(__shfl_xor_sync(0xffffffffu, x, bits), x);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    for (int i = 0; i < ROW_WARPS; i++) x = v_max(warps[i], x);
    return x;
}
HS_DEVICE float row_sum(float (&warps)[ROW_WARPS], float x) {
    for (int bits = 16; bits; bits /= 2) x = x + __shfl_xor_sync(0xffffffffu, x, bits);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = warps[0];
    for (int i = 1; i < ROW_WARPS; i++) sum = sum + warps[i];
    return sum;
}

/* Row blockIdx.x of a chunk: its loss and, where dlogits is there, its gradient. logits become
 * exp(logit - largest). */
template <typename T>
__global__ void __launch_bounds__(FLAT)
    classifier_row(float *loss, float *logits, T *dlogits, const int32_t *target, int64_t V,
                   float scale, bool wide) {
    const int N = ROW_PACK;
    HS_SHARED(float, largest, [ROW_WARPS]);
    HS_SHARED(float, sums, [ROW_WARPS]);
    const int64_t r = blockIdx.x;
    const int32_t own = target[r];
    float *z = logits + r * V;
    const int64_t first = (int64_t)threadIdx.x * N, step = FLAT * N;
    if (own < 0) {
        if (threadIdx.x == 0) loss[r] = 0.0f;
        if (dlogits)
            for (int64_t v = threadIdx.x; v < V; v += FLAT) narrow(0.0f, dlogits + r * V + v);
        return;
    }
    float top = z[0];
    for (int64_t v = first; v < V; v += step) {
        const lanes<N> x = load<N>(z + v, V - v, wide);
        for (int i = 0; i < N; i++)
            if (v + i < V) top = v_max(top, x.x[i]);
    }
    const float logit = z[own];
    top = row_max(largest, top);
    float sum = 0.0f;
    for (int64_t v = first; v < V; v += step) {
        lanes<N> x = load<N>(z + v, V - v, wide);
        for (int i = 0; i < N; i++)
            if (v + i < V) {
                x.x[i] = v_exp(x.x[i] - top);
                sum = sum + x.x[i];
            }
        if (dlogits) store(z + v, x, V - v, wide);
    }
    sum = row_sum(sums, sum);
    if (threadIdx.x == 0) loss[r] = (top - logit) + log1_f32(sum);
    if (!dlogits) return;
    const float factor = v_div(scale, sum);
    for (int64_t v = first; v < V; v += step) {
        const lanes<N> x = load<N>(z + v, V - v, wide);
        for (int i = 0; i < N; i++) {
            /* the target's own: p - 1 is taken before scaling */
            const float d = v + i == own ? (v_div(x.x[i], sum) - 1.0f) * scale : x.x[i] * factor;
            if (v + i < V) narrow(d, dlogits + r * V + v + i);
        }
    }
}

template <typename T>
static hs_status classifier_logits(cudaStream_t stream, float *logits, const T *x, const T *w,
                                   int64_t rows, int64_t C, int64_t V) {
    gemm<T, float> g = {};
    g.m = rows, g.n = V, g.k = C;
    g.a = gemm_side<T>{x, C, 1};
    g.b = gemm_side<T>{w, C, 1};
    g.out = logits, g.ld_out = V;
    return gemm_run(stream, g);
}

/* --- path cuda -------------------------------------------------------------------------------- */

enum {
    LOSS_THREADS = 512,
    LOSS_WARPS = LOSS_THREADS / 32,
    LOSS_PACK = 8,
    LOSS_STEP = LOSS_THREADS * LOSS_PACK,
    LOSS_STAGES = 14 /* packs of a thread that shared memory may hold: rows of 57,344 */
};

/* The largest of some logits, and the sum of exp(logit - largest). */
struct loss_sum {
    float top, sum;
};

HS_DEVICE loss_sum joined(loss_sum a, loss_sum b) {
    const float top = v_max(a.top, b.top);
    return loss_sum{top, a.sum * v_exp(a.top - top) + b.sum * v_exp(b.top - top)};
}

HS_DEVICE loss_sum with_pack(loss_sum s, const lanes<LOSS_PACK> &x, int64_t left) {
    float top = s.top;
    for (int i = 0; i < LOSS_PACK; i++)
        if (i < left) top = v_max(top, x.x[i]);
    if (top > s.top) s = loss_sum{top, s.sum * v_exp(s.top - top)};
    for (int i = 0; i < LOSS_PACK; i++)
        if (i < left) s.sum = s.sum + v_exp(x.x[i] - s.top);
    return s;
}

HS_DEVICE loss_sum of_the_block(loss_sum (&warps)[LOSS_WARPS], loss_sum s) {
    for (int bits = 16; bits; bits /= 2) {
        const loss_sum other = {__shfl_xor_sync(0xffffffffu, s.top, bits),
                                __shfl_xor_sync(0xffffffffu, s.sum, bits)};
        s = threadIdx.x & (unsigned)bits ? joined(other, s) : joined(s, other);
    }
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = s;
    __syncthreads();
    s = warps[0];
    for (int i = 1; i < LOSS_WARPS; i++) s = joined(s, warps[i]);
    return s;
}

/* dlogits of a pack, whose element `own` is the target's. */
HS_DEVICE lanes<LOSS_PACK> gradient_of(lanes<LOSS_PACK> x, loss_sum s, int64_t own, float scale,
                                       float factor) {
    for (int i = 0; i < LOSS_PACK; i++) {
        const float p = v_exp(x.x[i] - s.top);
        x.x[i] = i == own ? (v_div(p, s.sum) - 1.0f) * scale : p * factor;
    }
    return x;
}

/* A row of a chunk in two passes over its logits: largest and sum together, then its gradient. The
 * order of its sum depends on V alone: a thread takes packs of 8 at 8 t, 8 (t + LOSS_THREADS), ...;
 * threads join 16, 8, 4, 2, 1 lanes apart, then warps ascending. */
template <typename T>
__global__ void __launch_bounds__(LOSS_THREADS)
    classifier_loss(float *loss, const float *logits, T *dlogits, const int32_t *target, int64_t V,
                    float scale, bool wide, bool wide_out) {
    const int N = LOSS_PACK;
    HS_SHARED(loss_sum, warps, [LOSS_WARPS]);
    const int64_t r = blockIdx.x;
    const int32_t own = target[r];
    const float *z = logits + r * V;
    const int64_t first = (int64_t)threadIdx.x * N;
    if (own < 0) {
        if (threadIdx.x == 0) loss[r] = 0.0f;
        if (dlogits)
            for (int64_t v = threadIdx.x; v < V; v += LOSS_THREADS)
                narrow(0.0f, dlogits + r * V + v);
        return;
    }
    loss_sum s = {z[0], 0.0f};
    for (int64_t v = first; v < V; v += LOSS_STEP)
        s = with_pack(s, load<N>(z + v, V - v, wide), V - v);
    const float logit = z[own]; /* dlogits may be logits */
    s = of_the_block(warps, s);
    if (threadIdx.x == 0) loss[r] = (s.top - logit) + log1_f32(s.sum);
    if (!dlogits) return;
    const float factor = v_div(scale, s.sum);
    for (int64_t v = first; v < V; v += LOSS_STEP) {
        const lanes<N> x = load<N>(z + v, V - v, wide);
        store(dlogits + r * V + v, gradient_of(x, s, own - v, scale, factor), V - v, wide_out);
    }
}

/* A thread's place in shared memory of half a pack: neighbours lie side by side. */
HS_DEVICE float *half_pack(float *row, int pack, int half) {
    return row + ((2 * pack + half) * LOSS_THREADS + (int)threadIdx.x) * (LOSS_PACK / 2);
}

/* Copies a pack of a row of `there` elements, or nothing, as a group. */
HS_DEVICE void fetch_pack(float *row, int pack, const float *from, int64_t there) {
    const int64_t v = (int64_t)threadIdx.x * LOSS_PACK + (int64_t)pack * LOSS_STEP;
    for (int half = 0; half < 2; half++)
        if (v + 4 * half < there) hs_copy16(half_pack(row, pack, half), from + v + 4 * half, true);
    hs_copies_end();
}

HS_DEVICE lanes<LOSS_PACK> staged_pack(float *row, int pack) {
    const lanes<4> a = load<4>(half_pack(row, pack, 0), 4, true),
                   b = load<4>(half_pack(row, pack, 1), 4, true);
    lanes<LOSS_PACK> x;
    for (int i = 0; i < 4; i++) x.x[i] = a.x[i], x.x[4 + i] = b.x[i];
    return x;
}

/* classifier_loss with its row in shared memory, so that logits are read once: a block takes rows blockIdx.x,
 * blockIdx.x + gridDim.x, ..., a thread copies and reads its own packs alone. Where a pack of the gradient has been
 * made, the next row's comes into its place. V is a multiple of 4. The same sums in the same order. */
template <typename T>
__global__ void __launch_bounds__(LOSS_THREADS)
    classifier_loss_staged(float *loss, const float *logits, T *dlogits, const int32_t *target,
                           int64_t V, int64_t rows, float scale, bool wide_out) {
    HS_DYNAMIC_SHARED(bytes);
    HS_SHARED(loss_sum, warps, [2][LOSS_WARPS]);
    float *const row = reinterpret_cast<float *>(bytes);
    const int64_t first = (int64_t)threadIdx.x * LOSS_PACK;
    for (int pack = 0; pack < LOSS_STAGES; pack++)
        fetch_pack(row, pack, logits + blockIdx.x * V, V);
    int turn = 0;
    for (int64_t r = blockIdx.x; r < rows; r += gridDim.x, turn ^= 1) {
        const float *z = logits + r * V, *const next = z + gridDim.x * V;
        const int64_t next_there = r + gridDim.x < rows ? V : 0;
        const int32_t own = target[r];
        const float logit = own < 0 ? 0.0f : z[own]; /* dlogits may be logits */
        loss_sum s = {z[0], 0.0f};
#pragma unroll 1
        for (int pack = 0; pack < LOSS_STAGES; pack++) {
            hs_copies_wait<LOSS_STAGES - 1>(); /* for the oldest group; an empty one follows */
            hs_copies_end();
            const int64_t v = first + (int64_t)pack * LOSS_STEP;
            if (v < V) s = with_pack(s, staged_pack(row, pack), V - v);
        }
        s = of_the_block(warps[turn], s);
        if (threadIdx.x == 0) loss[r] = own < 0 ? 0.0f : (s.top - logit) + log1_f32(s.sum);
        const float factor = v_div(scale, s.sum);
#pragma unroll 1
        for (int pack = 0; pack < LOSS_STAGES; pack++) {
            const int64_t v = first + (int64_t)pack * LOSS_STEP;
            lanes<LOSS_PACK> x = {};
            if (v < V) x = staged_pack(row, pack);
            fetch_pack(row, pack, next, next_there);
            if (v >= V) continue;
            x = own < 0 ? lanes<LOSS_PACK>() : gradient_of(x, s, own - v, scale, factor);
            store(dlogits + r * V + v, x, V - v, wide_out);
        }
    }
}

template <typename T>
static hs_status losses(const hs_cuda_ctx *ctx, float *loss, const float *logits, T *dlogits,
                        const int32_t *target, int64_t V, int64_t rows, float scale) {
    const cudaStream_t stream = static_cast<cudaStream_t>(ctx->stream);
    const bool wide = wide_at(logits, V), wide_out = wide_at(dlogits, V);
    const int64_t bytes = hs_ceil_div(V, LOSS_STEP) * LOSS_STEP * (int64_t)sizeof(float);
    /* of a block, beside warps and what a launch takes */
    const int64_t room = (int64_t)hs_cuda_shared_bytes(ctx->capability) - 2048;
    if (!dlogits || !wide || !ctx->processors || bytes > room || V > LOSS_STAGES * LOSS_STEP)
        return HS_LAUNCH(classifier_loss, (unsigned)rows, LOSS_THREADS, stream, loss, logits,
                         dlogits, target, V, scale, wide, wide_out);
    const int64_t each = room / bytes < 4 ? room / bytes : 4;
    const int64_t blocks = each * ctx->processors < rows ? each * ctx->processors : rows;
    const auto staged = classifier_loss_staged<T>;
    return HS_LAUNCH_SHARED(staged, (unsigned)blocks, LOSS_THREADS, (size_t)bytes, stream, loss,
                            logits, dlogits, target, V, rows, scale, wide_out);
}

/* Products of hs_products_of, and the rows between them. */
template <typename T>
static hs_status by_chunks(const hs_cuda_ctx *ctx, uint16_t kernel, const hs_args &args,
                           const hs_classifier_grad_args &a) {
    hs_product all[HS_PRODUCTS_OF_A_CALL];
    (void)hs_products_of(kernel, &args, NULL, all);
    const int each = kernel == HS_K_CLASSIFIER_GRAD ? 3 : 1;
    float *logits = static_cast<float *>(a.logits);
    T *dlogits = static_cast<T *>(a.dlogits);
    for (int64_t r = 0; r < a.R; r += a.CHUNK) {
        const int64_t rows = a.R - r < a.CHUNK ? a.R - r : a.CHUNK;
        /* the products of a whole chunk come first, if there is one */
        const hs_product *p = rows < a.CHUNK && a.R >= a.CHUNK ? all + each : all;
        const T *x = static_cast<const T *>(a.x) + r * a.C;
        hs_product z = p[0];
        z.a.at = x;
        HS_TRY(hs_products_run(ctx->products, ctx, &z));
        HS_TRY(losses<T>(ctx, static_cast<float *>(a.loss) + r, logits, dlogits,
                         static_cast<const int32_t *>(a.target) + r, a.V, rows, (float)a.scale));
        if (each == 1) continue;
        hs_product dx = p[1], dw = p[2];
        dx.out = static_cast<T *>(a.dx) + r * a.C;
        dw.b.at = x, dw.fresh = r == 0 && !a.ACCUM;
        HS_TRY(hs_products_run(ctx->products, ctx, &dx));
        HS_TRY(hs_products_run(ctx->products, ctx, &dw));
    }
    return HS_OK;
}

/* --- ops ----------------------------------------------------------------------------------------- */

template <typename T>
static hs_status classifier_fwd_op(const hs_cuda_ctx *ctx, const hs_classifier_fwd_args &a) {
    if (hs_by_library(ctx)) {
        hs_classifier_grad_args g = {};
        g.loss = a.loss, g.x = a.x, g.w = a.w, g.target = a.target, g.logits = a.logits;
        g.R = a.R, g.C = a.C, g.V = a.V, g.CHUNK = a.CHUNK;
        return by_chunks<T>(ctx, HS_K_CLASSIFIER_FWD, hs_classifier_fwd_args_to(&a), g);
    }
    const cudaStream_t stream = static_cast<cudaStream_t>(ctx->stream);
    const int64_t R = a.R, C = a.C, V = a.V, CHUNK = a.CHUNK;
    float *logits = static_cast<float *>(a.logits);
    const T *w = static_cast<const T *>(a.w);
    T *no_gradient = NULL;
    for (int64_t r = 0; r < R; r += CHUNK) {
        const int64_t rows = R - r < CHUNK ? R - r : CHUNK;
        const T *x = static_cast<const T *>(a.x) + r * C;
        float *loss = static_cast<float *>(a.loss) + r;
        const int32_t *target = static_cast<const int32_t *>(a.target) + r;
        HS_TRY(classifier_logits(stream, logits, x, w, rows, C, V));
        HS_TRY(HS_LAUNCH(classifier_row, (unsigned)rows, FLAT, stream, loss, logits, no_gradient,
                         target, V, 0.0f, wide_at(logits, V)));
    }
    return HS_OK;
}
HS_CUDA_CTX_OP(classifier_fwd)

template <typename T>
static hs_status classifier_grad_op(const hs_cuda_ctx *ctx, const hs_classifier_grad_args &a) {
    if (hs_by_library(ctx))
        return by_chunks<T>(ctx, HS_K_CLASSIFIER_GRAD, hs_classifier_grad_args_to(&a), a);
    const cudaStream_t stream = static_cast<cudaStream_t>(ctx->stream);
    const int64_t R = a.R, C = a.C, V = a.V, CHUNK = a.CHUNK;
    float *logits = static_cast<float *>(a.logits);
    T *dlogits = static_cast<T *>(a.dlogits);
    const T *w = static_cast<const T *>(a.w);
    for (int64_t r = 0; r < R; r += CHUNK) {
        const int64_t rows = R - r < CHUNK ? R - r : CHUNK;
        const T *x = static_cast<const T *>(a.x) + r * C;
        float *loss = static_cast<float *>(a.loss) + r;
        const int32_t *target = static_cast<const int32_t *>(a.target) + r;
        HS_TRY(classifier_logits(stream, logits, x, w, rows, C, V));
        HS_TRY(HS_LAUNCH(classifier_row, (unsigned)rows, FLAT, stream, loss, logits, dlogits,
                         target, V, (float)a.scale, wide_at(logits, V)));
        gemm<T, T> dx = {};
        dx.m = rows, dx.n = C, dx.k = V;
        dx.a = gemm_side<T>{dlogits, V, 1};
        dx.b = gemm_side<T>{w, 1, C};
        dx.out = static_cast<T *>(a.dx) + r * C, dx.ld_out = C;
        HS_TRY(gemm_run(stream, dx));
        gemm<T, float> dw = {};
        dw.m = V, dw.n = C, dw.k = rows;
        dw.a = gemm_side<T>{dlogits, 1, V};
        dw.b = gemm_side<T>{x, 1, C};
        dw.out = static_cast<float *>(a.dw), dw.ld_out = C;
        dw.from_old = r > 0 || a.ACCUM;
        HS_TRY(gemm_run(stream, dw));
    }
    return HS_OK;
}
HS_CUDA_CTX_OP(classifier_grad)

template <typename T> static hs_status logits_op(const hs_cuda_ctx *ctx, const hs_logits_args &a) {
    if (hs_by_library(ctx)) {
        hs_product p[HS_PRODUCTS_OF_A_CALL];
        const hs_args args = hs_logits_args_to(&a);
        (void)hs_products_of(HS_K_LOGITS, &args, NULL, p);
        return hs_products_run(ctx->products, ctx, p);
    }
    const cudaStream_t stream = static_cast<cudaStream_t>(ctx->stream);
    const int64_t R = a.R, C = a.C, V = a.V;
    return classifier_logits(stream, static_cast<float *>(a.logits), static_cast<const T *>(a.x),
                             static_cast<const T *>(a.w), R, C, V);
}
HS_CUDA_CTX_OP(logits)
