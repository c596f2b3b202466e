/* Attention's backward on tensor cores (flash.h): dq by blocks of queries, dk and dv by blocks of
 * keys. */
#include "kernels/cuda/flash.h"

/* TILE numbers from first on, 0 from T on, by as many threads from thread `by` on. */
HS_DEVICE void fetch_numbers(float *to, const float *from, int first, const call &c, int by) {
    const int i = (int)threadIdx.x - by;
    if (i < 0 || i >= TILE) return;
    hs_copy4(to + i, from + (first + i < c.T ? first + i : c.T - 1), first + i < c.T);
}

/* What band.first says of TILE queries from `first` on; those from T on are as the last. */
HS_DEVICE void fetch_firsts(int *to, const band &w, int b, int first, const call &c) {
    const int i = (int)threadIdx.x, t = first + i < c.T ? first + i : c.T - 1;
    if (i < TILE) hs_copy4(to + i, w.first + (int64_t)b * c.T + t, true);
}

/* Of `span` tiles of queries from `from` on those whose first query, and so another, reads a key
 * before `end`; the first of them does. */
HS_DEVICE int tiles_that_read(const band &w, const call &c, int b, int from, int span, int end) {
    int least = 1;
    while (least < span) {
        const int middle = (least + span) / 2;
        if (low_of_query(w, c, b, (from + middle) * TILE) < end)
            least = middle + 1;
        else
            span = middle;
    }
    return span;
}

/* hide_unread of the turned matrix: rows are keys from `key` on, columns queries from `query` on, of
 * which band.first says `firsts`. */
template <int M, int N>
HS_DEVICE void hide_unread_turned(float (&s)[M][N / 8][4], const band &w, const int *firsts,
                                  int query, int key) {
    const int lane = anew(lane_id());
#pragma unroll
    for (int n = 0; n < N / 8; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int column = lane % 4 * 2 + 8 * n + i;
            const int low = low_key(w.first ? firsts[column] : 0, query + column, w.window);
            const unsigned across = (unsigned)(query + column - low);
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int r = 0; r < 2; r++)
                    if ((unsigned)(key + lane / 4 + 16 * m + 8 * r - low) > across)
                        s[m][n][2 * r + i] = 0.0f;
        }
}

/* p = 2^(z to_log2 - l), l = lse log2(e); a sum's rounding must not make it larger than 1. */
HS_DEVICE float probability(float z, float to_log2, float l) {
    return two_to(hs_min(hs_max(fmaf(z, to_log2, -l), -125.0f), 0.0f), 1.0f);
}

static const float LOG2_E = 1.44269504088896341f;

/* Of an SM, at least; 0: the compiler's choice. For a band and D = 32 it chooses three, and leaves
 * a few registers in memory for it. */
constexpr int blocks_of(int D, bool BANDED) {
    return BANDED && D == 32 ? 2 : 0;
}

template <int D, int M, int STEP, bool BANDED>
__global__ void __launch_bounds__(THREADS, blocks_of(D, BANDED))
    flash_dq(const call c, operand<bf16> dq_, operand<const bf16> do_, operand<const bf16> q_,
             operand<const bf16> k_, operand<const bf16> v_, const float *lse, const float *delta,
             const band w) {
    HS_DYNAMIC_SHARED(memory);
    const int ROWS = WARPS * 16 * M;
    bf16 *q_tile = reinterpret_cast<bf16 *>(memory), *do_tile = q_tile + ROWS * D,
         *stage = do_tile + ROWS * D;
    int *lows = reinterpret_cast<int *>(stage + 4 * TILE * D); /* of BANDED, a row's */
    const int lane = lane_id(), warp_row = (int)threadIdx.x / 32 * 16 * M;
    const int bh = (int)blockIdx.x / c.tiles, b = bh / c.H, h = bh % c.H, g = h / (c.H / c.G);
    const int q0 = (c.tiles - 1 - (int)blockIdx.x % c.tiles) * ROWS, first = q0 + warp_row;
    const int tiles = ((q0 + ROWS < c.T ? q0 + ROWS : c.T) + TILE - 1) / TILE;
    const int64_t numbers = (int64_t)bh * c.T; /* of lse and delta, this head's */
    const rows<const bf16> q = rows_of<D>(q_, c, b, h), k = rows_of<D>(k_, c, b, g),
                           v = rows_of<D>(v_, c, b, g), grad = rows_of<D>(do_, c, b, h);
    float sum[M][D / 8][4], l[M][2], e[M][2], times[M][2];
    clear(sum);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = first + 16 * m + 8 * r + lane / 4;
            l[m][r] = row < c.T ? lse[numbers + row] * LOG2_E : 0.0f;
            e[m][r] = row < c.T ? delta[numbers + row] : 0.0f;
            times[m][r] = c.scale;
        }

    fetch<D, ROWS>(q_tile, q, q0, c);
    fetch<D, ROWS>(do_tile, grad, q0, c);
    const int from = BANDED ? low_of_query(w, c, b, q0) / TILE : 0;
    if (BANDED && (int)threadIdx.x < ROWS)
        lows[threadIdx.x] = low_of_query(w, c, b, q0 + (int)threadIdx.x);
    fetch<D, TILE>(stage + from % 2 * (2 * TILE * D), k, from * TILE, c);
    fetch<D, TILE>(stage + from % 2 * (2 * TILE * D) + TILE * D, v, from * TILE, c);
    hs_copies_end();
    for (int j = from; j < tiles; j++) {
        const bf16 *k_tile = stage + j % 2 * (2 * TILE * D), *v_tile = k_tile + TILE * D;
        hs_copies_wait<0>();
        __syncthreads();
        if (j + 1 < tiles) {
            bf16 *next = stage + (j + 1) % 2 * (2 * TILE * D);
            fetch<D, TILE>(next, k, (j + 1) * TILE, c);
            fetch<D, TILE>(next + TILE * D, v, (j + 1) * TILE, c);
            hs_copies_end();
        }
#pragma unroll 1
        for (int at = 0; at < TILE; at += STEP) {
            const int k0 = j * TILE + at;
            if (k0 > first + 16 * M - 1) break;
            if (BANDED && k0 + STEP <= lows[warp_row]) continue;
            float z[M][STEP / 8][4], ds[M][STEP / 8][4];
            clear(z);
            clear(ds);
            add_scores<D, M, STEP>(z, q_tile, warp_row, k_tile, at);
            add_scores<D, M, STEP>(ds, do_tile, warp_row, v_tile, at);
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < STEP / 8; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const float p = probability(z[m][n][i], c.to_log2, l[m][i / 2]);
                        ds[m][n][i] = p * (ds[m][n][i] - e[m][i / 2]);
                    }
            if (k0 + STEP - 1 > first || (BANDED && k0 < lows[warp_row + 16 * M - 1]))
                hide_of<M, STEP, BANDED>(ds, lows + warp_row, first, k0, 0.0f);
            add_rows<D, M, STEP>(sum, ds, k_tile, at);
        }
    }
    put_rows<D, M>(rows_of<D>(dq_, c, b, h), sum, first, c, times);
}

/* Rows are keys, columns queries. */
template <int D, int M, int STEP, bool BANDED>
__global__ void __launch_bounds__(THREADS, blocks_of(D, BANDED))
    flash_dkv(const call c, operand<bf16> dk_, operand<bf16> dv_, operand<const bf16> do_,
              operand<const bf16> q_, operand<const bf16> k_, operand<const bf16> v_,
              const float *lse, const float *delta, const band w) {
    HS_DYNAMIC_SHARED(memory);
    const int ROWS = WARPS * 16 * M, STAGE = 2 * TILE * D + (BANDED ? 6 : 4) * TILE;
    /* a stage, in bf16: q, do, l, e, and of BANDED what is said of first keys */
    bf16 *k_tile = reinterpret_cast<bf16 *>(memory), *v_tile = k_tile + ROWS * D,
         *stage = v_tile + ROWS * D;
    const int lane = lane_id(), warp_row = (int)threadIdx.x / 32 * 16 * M;
    const int bg = (int)blockIdx.x / c.tiles, b = bg / c.G, g = bg % c.G, each = c.H / c.G;
    const int k0 = (int)blockIdx.x % c.tiles * ROWS, first = k0 + warp_row;
    const int from = k0 / TILE;
    int span = (c.T + TILE - 1) / TILE - from; /* tiles of queries, from the diagonal on */
    const rows<const bf16> k = rows_of<D>(k_, c, b, g), v = rows_of<D>(v_, c, b, g);
    float dk[M][D / 8][4], dv[M][D / 8][4], times[M][2];
    clear(dk);
    clear(dv);

    /* the t-th tile: heads of the group ascending, of each the tiles from the diagonal on */
    const auto fetch_stage = [&](int t) {
        bf16 *to = stage + t % 2 * STAGE;
        float *numbers = reinterpret_cast<float *>(to + 2 * TILE * D);
        const int h = g * each + t / span, q0 = (from + t % span) * TILE;
        const int64_t at = ((int64_t)b * c.H + h) * c.T;
        fetch<D, TILE>(to, rows_of<D>(q_, c, b, h), q0, c);
        fetch<D, TILE>(to + TILE * D, rows_of<D>(do_, c, b, h), q0, c);
        fetch_numbers(numbers, lse + at, q0, c, 0);
        fetch_numbers(numbers + TILE, delta + at, q0, c, TILE);
        if (BANDED && w.first)
            fetch_firsts(reinterpret_cast<int *>(numbers + 2 * TILE), w, b, q0, c);
    };

    fetch<D, ROWS>(k_tile, k, k0, c);
    fetch<D, ROWS>(v_tile, v, k0, c);
    if (BANDED) span = tiles_that_read(w, c, b, from, span, k0 + ROWS);
    fetch_stage(0);
    hs_copies_end();
    for (int t = 0; t < each * span; t++) {
        const bf16 *q_tile = stage + t % 2 * STAGE, *do_tile = q_tile + TILE * D;
        const float *numbers = reinterpret_cast<const float *>(q_tile + 2 * TILE * D);
        const int *firsts = reinterpret_cast<const int *>(numbers + 2 * TILE);
        hs_copies_wait<0>();
        __syncthreads();
        if (t + 1 < each * span) {
            fetch_stage(t + 1);
            hs_copies_end();
        }
#pragma unroll 1
        for (int at = 0; at < TILE; at += STEP) {
            const int q0 = (from + t % span) * TILE + at;
            if (q0 + STEP - 1 < first) continue; /* above the diagonal: all of the warp */
            if (BANDED && first + 16 * M <= low_key(w.first ? firsts[at] : 0, q0, w.window))
                break; /* nor does a later query read one of the warp's keys */
            float p[M][STEP / 8][4], ds[M][STEP / 8][4];
            clear(p);
            add_scores<D, M, STEP>(p, k_tile, warp_row, q_tile, at);
#pragma unroll
            for (int n = 0; n < STEP / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float l = numbers[at + 8 * n + lane % 4 * 2 + i % 2] * LOG2_E;
#pragma unroll
                    for (int m = 0; m < M; m++) p[m][n][i] = probability(p[m][n][i], c.to_log2, l);
                }
            if (BANDED) {
                if (q0 < first + 16 * M - 1 ||
                    first < low_key(w.first ? firsts[at + STEP - 1] : 0, q0 + STEP - 1, w.window))
                    hide_unread_turned<M, STEP>(p, w, firsts + at, q0, first);
            } else if (q0 < first + 16 * M - 1) {
                hide<true, M, STEP>(p, first - q0, 0.0f);
            }
            clear(ds);
            add_scores<D, M, STEP>(ds, v_tile, warp_row, do_tile, at);
            add_rows<D, M, STEP>(dv, p, do_tile, at);
#pragma unroll
            for (int n = 0; n < STEP / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float e = numbers[TILE + at + 8 * n + lane % 4 * 2 + i % 2];
#pragma unroll
                    for (int m = 0; m < M; m++) ds[m][n][i] = p[m][n][i] * (ds[m][n][i] - e);
                }
            add_rows<D, M, STEP>(dk, ds, q_tile, at);
        }
    }
#pragma unroll
    for (int m = 0; m < M; m++) times[m][0] = times[m][1] = c.scale;
    put_rows<D, M>(rows_of<D>(dk_, c, b, g), dk, first, c, times);
#pragma unroll
    for (int m = 0; m < M; m++) times[m][0] = times[m][1] = 1.0f;
    put_rows<D, M>(rows_of<D>(dv_, c, b, g), dv, first, c, times);
}

/* -------------------- launches */

/* 16-row pieces of a warp, and columns of scores in registers, by kernel: what leaves no register in
 * memory (out/cuda/kernels.json). */
template <int D, bool BANDED> struct form {
    static const int DQ_M = D > 64 ? 1 : 2, DQ_STEP = D > 64 ? 64 : 32;
    static const int DKV_M = D > 64 ? 1 : 2, DKV_STEP = 32;
};

template <int D, bool BANDED>
static hs_status backward(cudaStream_t stream, const hs_attention_igrad_args &a) {
    const int ROWS = WARPS * 16 * form<D, BANDED>::DQ_M, KEYS = WARPS * 16 * form<D, BANDED>::DKV_M;
    constexpr int dq_bytes = bytes_of<D>(ROWS, 2, BANDED ? ROWS : 0),
                  dkv_bytes = bytes_of<D>(KEYS, 2, (BANDED ? 6 : 4) * TILE);
    static_assert(dq_bytes <= LEAST_SHARED && dkv_bytes <= LEAST_SHARED, "fits everywhere");
    const operand<bf16> dq = operand_of<bf16>(a.dq, a.lddq), dk = operand_of<bf16>(a.dk, a.lddk),
                        dv = operand_of<bf16>(a.dv, a.lddv);
    const operand<const bf16> grad = operand_of<const bf16>(a.dy, a.lddy),
                              q = operand_of<const bf16>(a.q, a.ldq),
                              k = operand_of<const bf16>(a.k, a.ldk),
                              v = operand_of<const bf16>(a.v, a.ldv);
    const float *lse = static_cast<const float *>(a.lse);
    const float *delta = static_cast<const float *>(a.delta);
    const bool wide = wide_rows(grad, D) && wide_rows(q, D) && wide_rows(k, D) && wide_rows(v, D);
    const call queries = call_of(a, ROWS, wide, pairs_at(dq)),
               keys = call_of(a, KEYS, wide, pairs_at(dk) && pairs_at(dv));
    const band w = band_of(a);
    HS_TRY(hs_cuda_attention_delta(stream, a));
    const auto flash_dq_of = flash_dq<D, form<D, BANDED>::DQ_M, form<D, BANDED>::DQ_STEP, BANDED>;
    HS_TRY(HS_LAUNCH_SHARED(flash_dq_of, (unsigned)(a.B * a.H * queries.tiles), THREADS, dq_bytes,
                            stream, queries, dq, grad, q, k, v, lse, delta, w));
    const auto flash_dkv_of =
        flash_dkv<D, form<D, BANDED>::DKV_M, form<D, BANDED>::DKV_STEP, BANDED>;
    return HS_LAUNCH_SHARED(flash_dkv_of, (unsigned)(a.B * a.G * keys.tiles), THREADS, dkv_bytes,
                            stream, keys, dk, dv, grad, q, k, v, lse, delta, w);
}

template <int D>
static hs_status backward_of(cudaStream_t stream, const hs_attention_igrad_args &a) {
    return is_banded(a) ? backward<D, true>(stream, a) : backward<D, false>(stream, a);
}

hs_status hs_cuda_flash_igrad(cudaStream_t stream, const hs_attention_igrad_args &a) {
    return a.D == 32   ? backward_of<32>(stream, a)
           : a.D == 64 ? backward_of<64>(stream, a)
           : a.D == 96 ? backward_of<96>(stream, a)
                       : backward_of<128>(stream, a);
}
