/* RMSNorm: a row of lane.h is a group, of which there are R N. fwd and igrad: bits of the fast CPU
 * set. wgrad: columns.h, a group being a row of it, row r's group n the r N + n-th. */
#include "kernels/cuda/columns.h"
#include "kernels/cuda/rows.h"

#include "kernels/rmsnorm.h"

template <typename T>
__global__ void __launch_bounds__(FLAT)
    rmsnorm_fwd(T *y, float *rstd, const T *x, const float *w, int64_t R, int64_t N_, int64_t C,
                int64_t ldx, int64_t ldy, float eps, bool wide) {
    const int N = pack_of<T>::N;
    const int64_t g = row_index<T>(), end = g < R * N_ ? C : 0;
    const int64_t row = quotient(g, N_), in = (g - row * N_) * C;
    const int64_t at = row * ldx + in, to = row * ldy + in;
    lanes<N> square = {};
    for (int64_t c = row_column<T>(); c < end; c += LANES) {
        const lanes<N> v = load<N>(x + at + c, C - c, wide);
        for (int i = 0; i < N; i++) square.x[i] = v_fma(v.x[i], v.x[i], square.x[i]);
    }
    const float s = v_div(1.0f, v_sqrt(v_div(join_lanes(square), (float)C) + eps));
    for (int64_t c = row_column<T>(); c < end; c += LANES) {
        lanes<N> v = load<N>(x + at + c, C - c, wide);
        const lanes<N> wv = load<N>(w + c, C - c, wide);
        for (int i = 0; i < N; i++) v.x[i] = (v.x[i] * s) * wv.x[i];
        store(y + to + c, v, C - c, wide);
    }
    if (end && row_column<T>() == 0) rstd[g] = s;
}

template <typename T>
__global__ void __launch_bounds__(FLAT)
    rmsnorm_igrad(T *dx, const T *from, const T *dy, const T *x, const float *w, const float *rstd,
                  int64_t R, int64_t N_, int64_t C, int64_t lddx, int64_t lddy, int64_t ldx,
                  bool accumulate, bool wide) {
    const int N = pack_of<T>::N;
    const int64_t g = row_index<T>(), end = g < R * N_ ? C : 0;
    const int64_t row = quotient(g, N_), in = (g - row * N_) * C;
    const float s = end ? rstd[g] : 0.0f;
    dx += row * lddx + in, from += row * lddx + in, dy += row * lddy + in, x += row * ldx + in;
    lanes<N> sum = {};
    for (int64_t c = row_column<T>(); c < end; c += LANES) {
        const lanes<N> d = load<N>(dy + c, C - c, wide), v = load<N>(x + c, C - c, wide);
        const lanes<N> wv = load<N>(w + c, C - c, wide);
        for (int i = 0; i < N; i++) sum.x[i] = v_fma(d.x[i] * wv.x[i], v.x[i] * s, sum.x[i]);
    }
    const float mean = v_div(join_lanes(sum), (float)C);
    for (int64_t c = row_column<T>(); c < end; c += LANES) {
        lanes<N> d = load<N>(dy + c, C - c, wide);
        const lanes<N> v = load<N>(x + c, C - c, wide), wv = load<N>(w + c, C - c, wide);
        lanes<N> old = {};
        if (accumulate) old = load<N>(from + c, C - c, wide);
        for (int i = 0; i < N; i++) {
            d.x[i] = s * v_fnma(v.x[i] * s, mean, d.x[i] * wv.x[i]);
            if (accumulate) d.x[i] = d.x[i] + old.x[i];
        }
        store(dx + c, d, C - c, wide);
    }
}

template <typename T>
__global__ void __launch_bounds__(STAGE_THREADS)
    rmsnorm_fwd_staged(T *y, float *rstd, const T *x, const float *w, int64_t R, int64_t N_,
                       int64_t C, int64_t ldx, int64_t ldy, float eps, bool wide) {
    const int N = pack_of<T>::N;
    HS_SHARED(row_stage<1>, stage, );
    const int64_t g = staged_row(), end = g < R * N_ ? C : 0;
    const int64_t row = quotient(g, N_), in = (g - row * N_) * C;
    T *staged = staged_at<T>(stage.at[0], C);
    stage_row(staged, x + row * ldx + in, end, wide);
    stage_done();
    float square = 0.0f;
#pragma unroll 8
    for (int64_t c = staged_lane(); c < end; c += LANES) {
        const float v = widen(staged[c]);
        square = v_fma(v, v, square);
    }
    const float s = v_div(1.0f, v_sqrt(v_div(join_row(square), (float)C) + eps));
    y += row * ldy + in;
#pragma unroll 2
    for (int64_t c = staged_lane() * N; c < end; c += LANES * N) {
        lanes<N> v = load<N>(staged + c, C - c, wide);
        const lanes<N> wv = load<N>(w + c, C - c, wide);
        for (int i = 0; i < N; i++) v.x[i] = (v.x[i] * s) * wv.x[i];
        store(y + c, v, C - c, wide);
    }
    if (end && staged_lane() == 0) rstd[g] = s;
}

template <typename T>
__global__ void __launch_bounds__(STAGE_THREADS)
    rmsnorm_igrad_staged(T *dx, const T *from, const T *dy, const T *x, const float *w,
                         const float *rstd, int64_t R, int64_t N_, int64_t C, int64_t lddx,
                         int64_t lddy, int64_t ldx, bool accumulate, bool wide) {
    const int N = pack_of<T>::N;
    HS_SHARED(row_stage<2>, stage, );
    const int64_t g = staged_row(), end = g < R * N_ ? C : 0;
    const int64_t row = quotient(g, N_), in = (g - row * N_) * C;
    const float s = end ? rstd[g] : 0.0f;
    T *row_d = staged_at<T>(stage.at[0], C), *row_x = staged_at<T>(stage.at[1], C);
    stage_row(row_d, dy + row * lddy + in, end, wide);
    stage_row(row_x, x + row * ldx + in, end, wide);
    stage_done();
    float sum = 0.0f;
#pragma unroll 8
    for (int64_t c = staged_lane(); c < end; c += LANES)
        sum = v_fma(widen(row_d[c]) * w[c], widen(row_x[c]) * s, sum);
    const float mean = v_div(join_row(sum), (float)C);
    dx += row * lddx + in, from += row * lddx + in;
#pragma unroll 2
    for (int64_t c = staged_lane() * N; c < end; c += LANES * N) {
        lanes<N> d = load<N>(row_d + c, C - c, wide);
        const lanes<N> v = load<N>(row_x + c, C - c, wide), wv = load<N>(w + c, C - c, wide);
        lanes<N> old = {};
        if (accumulate) old = load<N>(from + c, C - c, wide);
        for (int i = 0; i < N; i++) {
            d.x[i] = s * v_fnma(v.x[i] * s, mean, d.x[i] * wv.x[i]);
            if (accumulate) d.x[i] = d.x[i] + old.x[i];
        }
        store(dx + c, d, C - c, wide);
    }
}

template <typename T>
__global__ void __launch_bounds__(columns_of<T>::THREADS)
    rmsnorm_wgrad(float *dw, const T *dy, const T *x, const float *rstd, int64_t R, int64_t N_,
                  int64_t C, int64_t lddy, int64_t ldx, int64_t part, bool wide) {
    const int N = pack_of<T>::N, across = columns_of<T>::ACROSS;
    HS_SHARED(column_sums, sums, );
    const int64_t c = (int64_t)blockIdx.x * COLUMNS + threadIdx.x % across * N;
    const int64_t first = (int64_t)blockIdx.y * part;
    const int64_t end = c < C ? min64(first + part, R * N_) : 0;
    lanes<N> w = {};
#pragma unroll 4
    for (int64_t g = first + threadIdx.x / across; g < end; g += COLUMN_LANES) {
        const int64_t row = quotient(g, N_), in = (g - row * N_) * C + c;
        const lanes<N> d = load<N>(dy + row * lddy + in, C - c, wide);
        const lanes<N> v = load<N>(x + row * ldx + in, C - c, wide);
        for (int i = 0; i < N; i++) w.x[i] = v_fma(d.x[i], v.x[i] * rstd[g], w.x[i]);
    }
    join_columns(sums, w, dw, C);
}

template <typename T>
static hs_status rmsnorm_fwd_op(cudaStream_t stream, const hs_rmsnorm_fwd_args &a) {
    const int64_t R = a.R, N = a.N, C = a.C, ldx = a.ldx, ldy = a.ldy;
    T *y = static_cast<T *>(a.y);
    float *rstd = static_cast<float *>(a.rstd);
    const T *x = static_cast<const T *>(a.x);
    const float *w = static_cast<const float *>(a.w);
    const bool wide = wide_at(y, ldy) && wide_at(x, ldx) && wide_at(x, C) && wide_at(w);
    const int staged = staged_rows<T>(C);
    if (staged)
        return HS_LAUNCH(rmsnorm_fwd_staged, (unsigned)hs_ceil_div(R * N, staged), staged * LANES,
                         stream, y, rstd, x, w, R, N, C, ldx, ldy, (float)a.eps, wide);
    return HS_LAUNCH(rmsnorm_fwd, (unsigned)hs_ceil_div(R * N, row_of<T>::ROWS), FLAT, stream, y,
                     rstd, x, w, R, N, C, ldx, ldy, (float)a.eps, wide);
}
HS_CUDA_OP(rmsnorm_fwd)

template <typename T>
static hs_status rmsnorm_igrad_op(cudaStream_t stream, const hs_rmsnorm_igrad_args &a) {
    const int64_t R = a.R, N = a.N, C = a.C;
    const int64_t lddx = a.lddx, lddy = a.lddy, ldx = a.ldx, ACCUM = a.ACCUM;
    T *dx = static_cast<T *>(a.dx);
    const T *from = a.old ? static_cast<const T *>(a.old) : dx;
    const T *dy = static_cast<const T *>(a.dy), *x = static_cast<const T *>(a.x);
    const float *w = static_cast<const float *>(a.w);
    const float *rstd = static_cast<const float *>(a.rstd);
    const bool wide = wide_at(dx, lddx) && wide_at(from, lddx) && wide_at(dy, lddy) &&
                      wide_at(x, ldx) && wide_at(x, C) && wide_at(w);
    const int staged = staged_rows<T>(C);
    if (staged)
        return HS_LAUNCH(rmsnorm_igrad_staged, (unsigned)hs_ceil_div(R * N, staged), staged * LANES,
                         stream, dx, from, dy, x, w, rstd, R, N, C, lddx, lddy, ldx, ACCUM != 0,
                         wide);
    return HS_LAUNCH(rmsnorm_igrad, (unsigned)hs_ceil_div(R * N, row_of<T>::ROWS), FLAT, stream, dx,
                     from, dy, x, w, rstd, R, N, C, lddx, lddy, ldx, ACCUM != 0, wide);
}
HS_CUDA_OP(rmsnorm_igrad)

template <typename T>
static hs_status rmsnorm_wgrad_op(const hs_cuda_ctx *ctx, const hs_rmsnorm_wgrad_args &a) {
    const int64_t R = a.R, N = a.N, C = a.C, lddy = a.lddy, ldx = a.ldx;
    float *dw = static_cast<float *>(a.dw);
    const T *dy = static_cast<const T *>(a.dy), *x = static_cast<const T *>(a.x);
    const float *rstd = static_cast<const float *>(a.rstd);
    const bool wide = wide_at(dy, lddy) && wide_at(x, ldx) && wide_at(x, C);
    column_plan p;
    HS_TRY(plan_columns(ctx, R * N, C, dw, NULL, &p));
    HS_TRY(HS_LAUNCH(rmsnorm_wgrad, column_grid(p, C), columns_of<T>::THREADS,
                     static_cast<cudaStream_t>(ctx->stream), p.to[0], dy, x, rstd, R, N, C, lddy,
                     ldx, p.part, wide));
    return finish_columns(ctx, p, dw, NULL, C);
}
HS_CUDA_CTX_OP(rmsnorm_wgrad)
