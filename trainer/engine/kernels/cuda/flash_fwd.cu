/* Attention's forward on tensor cores (flash.h): a block has queries of one head, keys and values
 * stream by. */
#include "kernels/cuda/flash.h"

/* What a running maximum of BANDED begins with: a row may meet columns that it reads none of, and a
 * masked score less this is no NaN. */
static const float LEAST = -3.40282347e38f;

HS_DEVICE float finite_or_nan(float x, float y) {
    return x - x == 0.0f ? y : __uint_as_float(0x7fffffffu);
}

template <int D, int M, int STEP, bool BANDED>
__global__ void __launch_bounds__(THREADS)
    flash_fwd(const call c, operand<bf16> o_, float *lse, operand<const bf16> q_,
              operand<const bf16> k_, operand<const bf16> v_, const band w) {
    HS_DYNAMIC_SHARED(memory);
    const int ROWS = WARPS * 16 * M;
    bf16 *q_tile = reinterpret_cast<bf16 *>(memory), *stage = q_tile + ROWS * D;
    int *lows = reinterpret_cast<int *>(stage + 4 * TILE * D); /* of BANDED, a row's */
    const int lane = lane_id(), warp_row = (int)threadIdx.x / 32 * 16 * M;
    const int bh = (int)blockIdx.x / c.tiles, b = bh / c.H, h = bh % c.H, g = h / (c.H / c.G);
    const int q0 = (c.tiles - 1 - (int)blockIdx.x % c.tiles) * ROWS, first = q0 + warp_row;
    const int tiles = ((q0 + ROWS < c.T ? q0 + ROWS : c.T) + TILE - 1) / TILE;
    const int64_t numbers = (int64_t)bh * c.T; /* of lse and delta, this head's */
    const rows<const bf16> q = rows_of<D>(q_, c, b, h), k = rows_of<D>(k_, c, b, g),
                           v = rows_of<D>(v_, c, b, g);
    const float floor = v_div(-125.0f, c.to_log2);
    float sum[M][D / 8][4], top[M][2], total[M][2];
    clear(sum);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) top[m][r] = BANDED ? LEAST : -INFINITY, total[m][r] = 0.0f;

    fetch<D, ROWS>(q_tile, q, q0, c);
    const int from = BANDED ? low_of_query(w, c, b, q0) / TILE : 0;
    if (BANDED && (int)threadIdx.x < ROWS)
        lows[threadIdx.x] = low_of_query(w, c, b, q0 + (int)threadIdx.x);
    fetch<D, TILE>(stage + from % 2 * (2 * TILE * D), k, from * TILE, c);
    fetch<D, TILE>(stage + from % 2 * (2 * TILE * D) + TILE * D, v, from * TILE, c);
    hs_copies_end();
    for (int j = from; j < tiles; j++) {
        const bf16 *k_tile = stage + j % 2 * (2 * TILE * D), *v_tile = k_tile + TILE * D;
        hs_copies_wait<0>();
        __syncthreads(); /* tile j is there, and nobody reads the one before it any more */
        if (j + 1 < tiles) {
            bf16 *next = stage + (j + 1) % 2 * (2 * TILE * D);
            fetch<D, TILE>(next, k, (j + 1) * TILE, c);
            fetch<D, TILE>(next + TILE * D, v, (j + 1) * TILE, c);
            hs_copies_end();
        }
#pragma unroll 1
        for (int at = 0; at < TILE; at += STEP) {
            const int k0 = j * TILE + at;
            if (k0 > first + 16 * M - 1) break; /* above the diagonal: all of the warp */
            if (BANDED && k0 + STEP <= lows[warp_row]) continue; /* before what it reads */
            float z[M][STEP / 8][4];
            clear(z);
            add_scores<D, M, STEP>(z, q_tile, warp_row, k_tile, at);
            const bool masked =
                k0 + STEP - 1 > first || (BANDED && k0 < lows[warp_row + 16 * M - 1]);
            if (masked) hide_of<M, STEP, BANDED>(z, lows + warp_row, first, k0, -INFINITY);
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    float best = top[m][r];
#pragma unroll
                    for (int n = 0; n < STEP / 8; n++)
#pragma unroll
                        for (int i = 0; i < 2; i++) best = hs_max(best, z[m][n][2 * r + i]);
                    best = hs_max(best, __shfl_xor_sync(0xffffffffu, best, 1));
                    best = hs_max(best, __shfl_xor_sync(0xffffffffu, best, 2));
#pragma unroll
                    for (int n = 0; n < STEP / 8; n++)
#pragma unroll
                        for (int i = 0; i < 2; i++) {
                            float &x = z[m][n][2 * r + i];
                            x = two_to(hs_max(x - best, floor), c.to_log2);
                        }
                    if (best != top[m][r]) { /* else the factor is exactly 1 */
                        const float shrink = two_to(hs_max(top[m][r] - best, floor), c.to_log2);
                        total[m][r] = total[m][r] * shrink;
#pragma unroll
                        for (int n = 0; n < D / 8; n++)
#pragma unroll
                            for (int i = 0; i < 2; i++)
                                sum[m][n][2 * r + i] = sum[m][n][2 * r + i] * shrink;
                        top[m][r] = best;
                    }
                }
            if (masked) hide_of<M, STEP, BANDED>(z, lows + warp_row, first, k0, 0.0f);
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    float part = 0.0f;
#pragma unroll
                    for (int n = 0; n < STEP / 8; n++)
                        part = part + z[m][n][2 * r] + z[m][n][2 * r + 1];
                    total[m][r] = total[m][r] + part;
                }
            add_rows<D, M, STEP>(sum, z, v_tile, at);
        }
    }
    float times[M][2];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float all = total[m][r];
            all = all + __shfl_xor_sync(0xffffffffu, all, 1);
            all = all + __shfl_xor_sync(0xffffffffu, all, 2);
            if (BANDED && top[m][r] == LEAST)
                top[m][r] = -INFINITY; /* of its scores none is more */
            times[m][r] = finite_or_nan(top[m][r], v_div(1.0f, all));
            const int row = first + 16 * m + 8 * r + lane / 4;
            if (lane % 4 == 0 && row < c.T)
                lse[numbers + row] = finite_or_nan(top[m][r], top[m][r] * c.scale + log1_f32(all));
        }
    put_rows<D, M>(rows_of<D>(o_, c, b, h), sum, first, c, times);
}

/* -------------------- launches */

bool hs_cuda_flash_takes(int64_t D, double scale, int64_t largest) {
    const float to_log2 = (float)(scale * 1.44269504088896341);
    return (D == 32 || D == 64 || D == 96 || D == 128) && to_log2 > 1e-30f && to_log2 < 1e30f &&
           largest < (INT64_C(1) << 30);
}

template <int D, bool BANDED>
static hs_status forward(cudaStream_t stream, const hs_attention_fwd_args &a) {
    /* 16-row pieces of a warp, and columns of scores in registers: what leaves no register in memory
     * (out/cuda/kernels.json) */
    constexpr int M = 2, STEP = D > 64 ? 32 : 64;
    constexpr int ROWS = WARPS * 16 * M, bytes = bytes_of<D>(ROWS, 1, BANDED ? ROWS : 0);
    static_assert(bytes <= LEAST_SHARED, "fits everywhere");
    const operand<bf16> o = operand_of<bf16>(a.y, a.ldy);
    const operand<const bf16> q = operand_of<const bf16>(a.q, a.ldq),
                              k = operand_of<const bf16>(a.k, a.ldk),
                              v = operand_of<const bf16>(a.v, a.ldv);
    const bool wide = wide_rows(q, D) && wide_rows(k, D) && wide_rows(v, D);
    const call c = call_of(a, ROWS, wide, pairs_at(o));
    const auto flash_fwd_of = flash_fwd<D, M, STEP, BANDED>;
    return HS_LAUNCH_SHARED(flash_fwd_of, (unsigned)(a.B * a.H * c.tiles), THREADS, bytes, stream,
                            c, o, static_cast<float *>(a.lse), q, k, v, band_of(a));
}

template <int D> static hs_status forward_of(cudaStream_t stream, const hs_attention_fwd_args &a) {
    return is_banded(a) ? forward<D, true>(stream, a) : forward<D, false>(stream, a);
}

hs_status hs_cuda_flash_fwd(cudaStream_t stream, const hs_attention_fwd_args &a) {
    return a.D == 32   ? forward_of<32>(stream, a)
           : a.D == 64 ? forward_of<64>(stream, a)
           : a.D == 96 ? forward_of<96>(stream, a)
                       : forward_of<128>(stream, a);
}
