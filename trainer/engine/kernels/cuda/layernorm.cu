/* LayerNorm. fwd and igrad: bits of the fast CPU set, rows.h, or row_of of lane.h where
 * they are long. wgrad: columns.h. */
#include "kernels/cuda/columns.h"
#include "kernels/cuda/rows.h"

#include "kernels/layernorm.h"

template <typename T>
__global__ void __launch_bounds__(FLAT)
    layernorm_fwd(T *y, float *mean, float *rstd, const T *x, const float *w, const float *b,
                  int64_t R, int64_t C, float eps, bool wide) {
    const int N = pack_of<T>::N;
    const int64_t r = row_index<T>(), begin = r * C, end = r < R ? C : 0;
    lanes<N> sum = {}, square = {};
    for (int64_t c = row_column<T>(); c < end; c += LANES) {
        const lanes<N> v = load<N>(x + begin + c, C - c, wide);
        for (int i = 0; i < N; i++) sum.x[i] = sum.x[i] + v.x[i];
    }
    const float m = v_div(join_lanes(sum), (float)C);
    for (int64_t c = row_column<T>(); c < end; c += LANES) {
        const lanes<N> v = load<N>(x + begin + c, C - c, wide);
        for (int i = 0; i < N; i++) {
            const float d = c + i < C ? v.x[i] - m : 0.0f;
            square.x[i] = v_fma(d, d, square.x[i]);
        }
    }
    const float s = v_div(1.0f, v_sqrt(v_div(join_lanes(square), (float)C) + eps));
    for (int64_t c = row_column<T>(); c < end; c += LANES) {
        lanes<N> v = load<N>(x + begin + c, C - c, wide);
        const lanes<N> wv = load<N>(w + c, C - c, wide), bv = load<N>(b + c, C - c, wide);
        for (int i = 0; i < N; i++) v.x[i] = v_fma((v.x[i] - m) * s, wv.x[i], bv.x[i]);
        store(y + begin + c, v, C - c, wide);
    }
    if (r < R && row_column<T>() == 0) mean[r] = m, rstd[r] = s;
}

template <typename T>
__global__ void __launch_bounds__(FLAT)
    layernorm_igrad(T *dx, const T *from, const T *dy, const T *x, const float *w,
                    const float *mean, const float *rstd, int64_t R, int64_t C, bool accumulate,
                    bool wide) {
    const int N = pack_of<T>::N;
    const int64_t r = row_index<T>(), begin = r * C, end = r < R ? C : 0;
    const float m = r < R ? mean[r] : 0.0f, s = r < R ? rstd[r] : 0.0f;
    lanes<N> sum_g = {}, sum_gh = {};
    for (int64_t c = row_column<T>(); c < end; c += LANES) {
        const lanes<N> d = load<N>(dy + begin + c, C - c, wide);
        const lanes<N> v = load<N>(x + begin + c, C - c, wide), wv = load<N>(w + c, C - c, wide);
        for (int i = 0; i < N; i++) {
            const float g = d.x[i] * wv.x[i], h = c + i < C ? (v.x[i] - m) * s : 0.0f;
            sum_g.x[i] = sum_g.x[i] + g;
            sum_gh.x[i] = v_fma(g, h, sum_gh.x[i]);
        }
    }
    const float mean_g = v_div(join_lanes(sum_g), (float)C);
    const float mean_gh = v_div(join_lanes(sum_gh), (float)C);
    for (int64_t c = row_column<T>(); c < end; c += LANES) {
        lanes<N> d = load<N>(dy + begin + c, C - c, wide);
        const lanes<N> v = load<N>(x + begin + c, C - c, wide), wv = load<N>(w + c, C - c, wide);
        lanes<N> old = {};
        if (accumulate) old = load<N>(from + begin + c, C - c, wide);
        for (int i = 0; i < N; i++) {
            const float g = d.x[i] * wv.x[i], h = (v.x[i] - m) * s;
            d.x[i] = s * v_fnma(h, mean_gh, g - mean_g);
            if (accumulate) d.x[i] = d.x[i] + old.x[i];
        }
        store(dx + begin + c, d, C - c, wide);
    }
}

template <typename T>
__global__ void __launch_bounds__(STAGE_THREADS)
    layernorm_fwd_staged(T *y, float *mean, float *rstd, const T *x, const float *w, const float *b,
                         int64_t R, int64_t C, float eps, bool wide) {
    const int N = pack_of<T>::N;
    HS_SHARED(row_stage<1>, stage, );
    const int64_t r = staged_row(), begin = r * C, end = r < R ? C : 0;
    T *row = staged_at<T>(stage.at[0], C);
    stage_row(row, x + begin, end, wide);
    stage_done();
    float sum = 0.0f, square = 0.0f;
#pragma unroll 8
    for (int64_t c = staged_lane(); c < end; c += LANES) sum = sum + widen(row[c]);
    const float m = v_div(join_row(sum), (float)C);
#pragma unroll 8
    for (int64_t c = staged_lane(); c < end; c += LANES) {
        const float d = widen(row[c]) - m;
        square = v_fma(d, d, square);
    }
    const float s = v_div(1.0f, v_sqrt(v_div(join_row(square), (float)C) + eps));
#pragma unroll 2
    for (int64_t c = staged_lane() * N; c < end; c += LANES * N) {
        lanes<N> v = load<N>(row + c, C - c, wide);
        const lanes<N> wv = load<N>(w + c, C - c, wide), bv = load<N>(b + c, C - c, wide);
        for (int i = 0; i < N; i++) v.x[i] = v_fma((v.x[i] - m) * s, wv.x[i], bv.x[i]);
        store(y + begin + c, v, C - c, wide);
    }
    if (r < R && staged_lane() == 0) mean[r] = m, rstd[r] = s;
}

template <typename T>
__global__ void __launch_bounds__(STAGE_THREADS)
    layernorm_igrad_staged(T *dx, const T *from, const T *dy, const T *x, const float *w,
                           const float *mean, const float *rstd, int64_t R, int64_t C,
                           bool accumulate, bool wide) {
    const int N = pack_of<T>::N;
    HS_SHARED(row_stage<2>, stage, );
    const int64_t r = staged_row(), begin = r * C, end = r < R ? C : 0;
    const float m = r < R ? mean[r] : 0.0f, s = r < R ? rstd[r] : 0.0f;
    T *row_d = staged_at<T>(stage.at[0], C), *row_x = staged_at<T>(stage.at[1], C);
    stage_row(row_d, dy + begin, end, wide);
    stage_row(row_x, x + begin, end, wide);
    stage_done();
    float sum_g = 0.0f, sum_gh = 0.0f;
#pragma unroll 8
    for (int64_t c = staged_lane(); c < end; c += LANES) {
        const float g = widen(row_d[c]) * w[c], h = (widen(row_x[c]) - m) * s;
        sum_g = sum_g + g;
        sum_gh = v_fma(g, h, sum_gh);
    }
    const float mean_g = v_div(join_row(sum_g), (float)C);
    const float mean_gh = v_div(join_row(sum_gh), (float)C);
#pragma unroll 2
    for (int64_t c = staged_lane() * N; c < end; c += LANES * N) {
        lanes<N> d = load<N>(row_d + c, C - c, wide);
        const lanes<N> v = load<N>(row_x + c, C - c, wide), wv = load<N>(w + c, C - c, wide);
        lanes<N> old = {};
        if (accumulate) old = load<N>(from + begin + c, C - c, wide);
        for (int i = 0; i < N; i++) {
            const float g = d.x[i] * wv.x[i], h = (v.x[i] - m) * s;
            d.x[i] = s * v_fnma(h, mean_gh, g - mean_g);
            if (accumulate) d.x[i] = d.x[i] + old.x[i];
        }
        store(dx + begin + c, d, C - c, wide);
    }
}

template <typename T>
__global__ void __launch_bounds__(columns_of<T>::THREADS)
    layernorm_wgrad(float *dw, float *db, const T *dy, const T *x, const float *mean,
                    const float *rstd, int64_t R, int64_t C, int64_t part, bool wide) {
    const int N = pack_of<T>::N, across = columns_of<T>::ACROSS;
    HS_SHARED(column_sums, sums_w, );
    HS_SHARED(column_sums, sums_b, );
    const int64_t c = (int64_t)blockIdx.x * COLUMNS + threadIdx.x % across * N;
    const int64_t first = (int64_t)blockIdx.y * part, end = c < C ? min64(first + part, R) : 0;
    lanes<N> w = {}, b = {};
#pragma unroll 4
    for (int64_t r = first + threadIdx.x / across; r < end; r += COLUMN_LANES) {
        const lanes<N> g = load<N>(dy + r * C + c, C - c, wide);
        const lanes<N> v = load<N>(x + r * C + c, C - c, wide);
        for (int i = 0; i < N; i++) {
            w.x[i] = v_fma(g.x[i], (v.x[i] - mean[r]) * rstd[r], w.x[i]);
            b.x[i] = b.x[i] + g.x[i];
        }
    }
    join_columns(sums_w, w, dw, C);
    join_columns(sums_b, b, db, C);
}

template <typename T>
static hs_status layernorm_fwd_op(cudaStream_t stream, const hs_layernorm_fwd_args &a) {
    const int64_t R = a.R, C = a.C;
    T *y = static_cast<T *>(a.y);
    float *mean = static_cast<float *>(a.mean), *rstd = static_cast<float *>(a.rstd);
    const T *x = static_cast<const T *>(a.x);
    const float *w = static_cast<const float *>(a.w);
    const float *b = static_cast<const float *>(a.b);
    const bool wide = wide_at(y, C) && wide_at(x, C) && wide_at(w) && wide_at(b);
    const int staged = staged_rows<T>(C);
    if (staged)
        return HS_LAUNCH(layernorm_fwd_staged, (unsigned)hs_ceil_div(R, staged), staged * LANES,
                         stream, y, mean, rstd, x, w, b, R, C, (float)a.eps, wide);
    return HS_LAUNCH(layernorm_fwd, (unsigned)hs_ceil_div(R, row_of<T>::ROWS), FLAT, stream, y,
                     mean, rstd, x, w, b, R, C, (float)a.eps, wide);
}
HS_CUDA_OP(layernorm_fwd)

template <typename T>
static hs_status layernorm_igrad_op(cudaStream_t stream, const hs_layernorm_igrad_args &a) {
    const int64_t R = a.R, C = a.C, ACCUM = a.ACCUM;
    T *dx = static_cast<T *>(a.dx);
    const T *from = a.old ? static_cast<const T *>(a.old) : dx;
    const T *dy = static_cast<const T *>(a.dy), *x = static_cast<const T *>(a.x);
    const float *w = static_cast<const float *>(a.w);
    const float *mean = static_cast<const float *>(a.mean);
    const float *rstd = static_cast<const float *>(a.rstd);
    const bool wide =
        wide_at(dx, C) && wide_at(from, C) && wide_at(dy, C) && wide_at(x, C) && wide_at(w);
    const int staged = staged_rows<T>(C);
    if (staged)
        return HS_LAUNCH(layernorm_igrad_staged, (unsigned)hs_ceil_div(R, staged), staged * LANES,
                         stream, dx, from, dy, x, w, mean, rstd, R, C, ACCUM != 0, wide);
    return HS_LAUNCH(layernorm_igrad, (unsigned)hs_ceil_div(R, row_of<T>::ROWS), FLAT, stream, dx,
                     from, dy, x, w, mean, rstd, R, C, ACCUM != 0, wide);
}
HS_CUDA_OP(layernorm_igrad)

template <typename T>
static hs_status layernorm_wgrad_op(const hs_cuda_ctx *ctx, const hs_layernorm_wgrad_args &a) {
    const int64_t R = a.R, C = a.C;
    float *dw = static_cast<float *>(a.dw), *db = static_cast<float *>(a.db);
    const T *dy = static_cast<const T *>(a.dy), *x = static_cast<const T *>(a.x);
    const float *mean = static_cast<const float *>(a.mean);
    const float *rstd = static_cast<const float *>(a.rstd);
    column_plan p;
    HS_TRY(plan_columns(ctx, R, C, dw, db, &p));
    HS_TRY(HS_LAUNCH(layernorm_wgrad, column_grid(p, C), columns_of<T>::THREADS,
                     static_cast<cudaStream_t>(ctx->stream), p.to[0], p.to[1], dy, x, mean, rstd, R,
                     C, p.part, wide_at(dy, C) && wide_at(x, C)));
    return finish_columns(ctx, p, dw, db, C);
}
HS_CUDA_CTX_OP(layernorm_wgrad)
