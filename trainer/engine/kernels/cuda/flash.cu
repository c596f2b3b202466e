/* Causal flash attention on tensor cores, bf16, deterministic: kernel path cuda, heads of 32, 64, 96
 * or 128. No atomics; the order of every sum depends on T, H / G and D alone.
 *
 * Every kernel has the same form. A block of 4 warps owns rows of one head: queries in flash_fwd and
 * flash_dq, keys in flash_dkv; a warp 16 M of them. They lie in shared memory (or the sums of a
 * warp's rows in its registers) for the whole block. The other side streams by in tiles of TILE
 * rows, two stages of shared memory: the next tile is copied (cp.async) while this one is worked on.
 * Of a tile a warp makes STEP columns of scores at a time, in registers: they are the accumulators
 * of one mma and, rounded to bf16, the A operand of the next, and never touch shared memory. dk and
 * dv work on the turned matrix (rows are keys) for that reason. dq and dk, dv make the scores twice,
 * 7 products in place of the 5 of a kernel that adds dq from many blocks: the price of an order.
 *
 * What bounds it (an SM of an H100: 1024 fma a cycle by mma.sync, 128 bytes of shared memory, 4
 * instructions of a warp; no device was at hand, so these are sums and not timings). Of a tile of 64
 * keys and 16 M rows a warp's two products take 2 * 64 * 16 M * D fma, and read 2 * 64 * D * 2 bytes
 * through ldmatrix: at M = 1 shared memory is as slow as the products, at M = 2 twice as fast. So
 * M = 2 wherever registers allow. Off the diagonal a score costs 13 instructions beside its products
 * (SASS of sm_90a: 6 fma, 3 adds, 2 maxima, a shift-and-add, half a rounding; 7 of them are the
 * exponential), 13 / 128 cycles an SM where its products take 2 D / 1024: as much at D = 52. So D = 32
 * is bound by the softmax, D = 64 by both about alike, D = 128 by the products. The backward's score
 * costs 10. The forward reads 2 * 64 * D * 2 bytes of keys and values for 64 * 64 M scores, nearly
 * all from L2: blocks of one head follow each other, the longest first.
 *
 * Rows of shared memory are D bf16; 16-byte chunks are swizzled so that the 8 rows of an ldmatrix
 * lie in 8 different banks (place). Rows beyond T are zeros, and what they give is not stored.
 */
#include "kernels/cuda/heads.h"
#include "kernels/cuda/tensor.h"

enum { TILE = 64, WARPS = 4, THREADS = 32 * WARPS, LEAST_SHARED = 99 << 10 };

/* Where a tile's row has its chunk of 8: rows of 8 or 16 chunks begin at one bank, of 4 or 12 at two
 * by turns. */
template <int D> HS_DEVICE int place(int row, int chunk) {
    const int across = D / 8, turned = across % 8 ? chunk ^ (row >> 1 & 3) : chunk ^ (row & 7);
    return (row * across + turned) * 8;
}

/* The place of chunk + 2 k of the row whose chunk (0 or 1) is at `at`. */
template <int D> HS_DEVICE int further(int at, int k) {
    return D % 64 ? (at ^ k % 2 * 16) + k / 2 * 32 : at ^ k * 16;
}

/* What follows is computed where it is used: the compiler must not keep a register for each of the
 * places above for the length of a loop. */
HS_DEVICE int anew(int x) {
#ifndef HS_CUDA_EMULATED
    asm volatile("" : "+r"(x));
#endif
    return x;
}

/* Of all three kernels. wide: operands allow 16-byte accesses; pairs: results may be stored two
 * numbers at a time. 32 bits: registers are what these kernels are short of. */
struct call {
    int T, H, G, tiles;
    float scale, to_log2; /* scale log2(e) */
    bool wide, pairs;
};

/* Rows of one head of one sequence; ld apart. */
template <typename T> struct rows {
    T *p;
    int ld;
};
template <int D, typename T> HS_DEVICE rows<T> rows_of(operand<T> x, const call &c, int b, int h) {
    return rows<T>{x.p + (int64_t)b * c.T * x.ld + h * D, (int)x.ld};
}

/* Begins to copy ROWS rows from first on; zeros from T on. Where accesses are not wide the rows are
 * there after the next barrier, as those whose copies were waited for are. */
template <int D, int ROWS>
HS_DEVICE void fetch(bf16 *to, rows<const bf16> x, int first, const call &c) {
    const int across = D / 8, count = ROWS * across / THREADS;
    static_assert(ROWS * across % THREADS == 0, "every thread copies as much");
    if (c.wide) {
#pragma unroll 2 /* as above */
        for (int i = 0; i < count; i++) {
            const int at = i * THREADS + (int)threadIdx.x, row = at / across, chunk = at % across;
            const int source = first + row < c.T ? first + row : c.T - 1;
            hs_copy16(to + place<D>(row, chunk), x.p + (int64_t)source * x.ld + chunk * 8,
                      first + row < c.T);
        }
    } else {
#pragma unroll 1
        for (int at = (int)threadIdx.x; at < ROWS * across; at += THREADS) {
            const int row = at / across, chunk = at % across;
            const bf16 *from = x.p + (int64_t)(first + row) * x.ld + chunk * 8;
            bf16 *target = to + place<D>(row, chunk);
            for (int e = 0; e < 8; e++)
                target[e] = first + row < c.T ? from[e] : __ushort_as_bfloat16(0);
        }
    }
}

/* TILE numbers from first on, 0 from T on, by as many threads from thread `by` on. */
HS_DEVICE void fetch_numbers(float *to, const float *from, int first, const call &c, int by) {
    const int i = (int)threadIdx.x - by;
    if (i < 0 || i >= TILE) return;
    hs_copy4(to + i, from + (first + i < c.T ? first + i : c.T - 1), first + i < c.T);
}

/* s += a b^T: a's rows row .. row + 16 M - 1, b's rows column .. column + N - 1. */
template <int D, int M, int N>
HS_DEVICE void add_scores(float (&s)[M][N / 8][4], const bf16 *a, int row, const bf16 *b,
                          int column) {
    const int lane = anew(lane_id());
    const int a_at = anew(place<D>(row + lane % 16, lane / 16)),
              b_at = anew(place<D>(column + lane / 16 * 8 + lane % 8, lane / 8 % 2));
#pragma unroll 2 /* all at once, and ptxas keeps too much in flight: 50 more registers */
    for (int k = 0; k < D / 16; k++) {
        uint32_t x[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) hs_ldmatrix(x[m], a + further<D>(a_at, k) + 16 * m * D);
#pragma unroll
        for (int n = 0; n < N / 16; n++) {
            uint32_t y[4];
            hs_ldmatrix(y, b + further<D>(b_at, k) + 16 * n * D);
#pragma unroll
            for (int m = 0; m < M; m++) {
                hs_mma(s[m][2 * n], x[m], y);
                hs_mma(s[m][2 * n + 1], x[m], y + 2);
            }
        }
    }
}

/* sum += f b: f rounded to bf16, its N columns are b's rows row .. row + N - 1. */
template <int D, int M, int N>
HS_DEVICE void add_rows(float (&sum)[M][D / 8][4], const float (&f)[M][N / 8][4], const bf16 *b,
                        int row) {
    const int lane = lane_id(), b_at = anew(place<D>(row + lane % 16, lane / 16));
#pragma unroll
    for (int k = 0; k < N / 16; k++) {
        uint32_t x[M][4];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float(&c)[4] = f[m][2 * k + i];
                x[m][2 * i] = hs_pair(c[0], c[1]);
                x[m][2 * i + 1] = hs_pair(c[2], c[3]);
            }
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            uint32_t y[4];
            hs_ldmatrix_trans(y, b + further<D>(b_at, n) + 16 * k * D);
#pragma unroll
            for (int m = 0; m < M; m++) {
                hs_mma(sum[m][2 * n], x[m], y);
                hs_mma(sum[m][2 * n + 1], x[m], y + 2);
            }
        }
    }
}

template <int M, int N> HS_DEVICE void clear(float (&s)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) s[m][n][i] = 0.0f;
}

/* The rows of a warp that are there, times[m][half row]. */
template <int D, int M>
HS_DEVICE void put_rows(rows<bf16> x, const float (&sum)[M][D / 8][4], int first, const call &c,
                        const float (&times)[M][2]) {
    const int lane = lane_id();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = first + 16 * m + 8 * r + lane / 4;
            if (row >= c.T) continue;
            bf16 *to = x.p + (int64_t)row * x.ld + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                const uint32_t both =
                    hs_pair(sum[m][n][2 * r] * times[m][r], sum[m][n][2 * r + 1] * times[m][r]);
                if (c.pairs) {
                    *reinterpret_cast<uint32_t *>(to + 8 * n) = both;
                } else {
                    to[8 * n] = __ushort_as_bfloat16((uint16_t)(both & 0xffff));
                    to[8 * n + 1] = __ushort_as_bfloat16((uint16_t)(both >> 16));
                }
            }
        }
}

/* What lies above the diagonal becomes `value`. edge: the first row less the first column (rows are
 * queries); turned: the other way round. A pass of its own, which most tiles branch around: as a
 * choice beside each score it costs every tile two instructions a score, or a branch. */
template <bool TURNED, int M, int N>
HS_DEVICE void hide(float (&s)[M][N / 8][4], int edge, float value) {
    const int lane = lane_id(), row = lane / 4 + edge, column = lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int r = row + 16 * m + i / 2 * 8, c = column + 8 * n + i % 2;
                if (TURNED ? r > c : c > r) s[m][n][i] = value;
            }
}

HS_DEVICE float finite_or_nan(float x, float y) {
    return x - x == 0.0f ? y : __uint_as_float(0x7fffffffu);
}

/* -------------------- forward */

template <int D, int M, int STEP>
__global__ void __launch_bounds__(THREADS)
    flash_fwd(const call c, operand<bf16> o_, float *lse, operand<const bf16> q_,
              operand<const bf16> k_, operand<const bf16> v_) {
    HS_DYNAMIC_SHARED(memory);
    const int ROWS = WARPS * 16 * M;
    bf16 *q_tile = reinterpret_cast<bf16 *>(memory), *stage = q_tile + ROWS * D;
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
        for (int r = 0; r < 2; r++) top[m][r] = -INFINITY, total[m][r] = 0.0f;

    fetch<D, ROWS>(q_tile, q, q0, c);
    fetch<D, TILE>(stage, k, 0, c);
    fetch<D, TILE>(stage + TILE * D, v, 0, c);
    hs_copies_end();
    for (int j = 0; j < tiles; j++) {
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
            float z[M][STEP / 8][4];
            clear(z);
            add_scores<D, M, STEP>(z, q_tile, warp_row, k_tile, at);
            const bool masked = k0 + STEP - 1 > first;
            if (masked) hide<false, M, STEP>(z, first - k0, -INFINITY);
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
            if (masked) hide<false, M, STEP>(z, first - k0, 0.0f);
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
            times[m][r] = finite_or_nan(top[m][r], v_div(1.0f, all));
            const int row = first + 16 * m + 8 * r + lane / 4;
            if (lane % 4 == 0 && row < c.T)
                lse[numbers + row] = finite_or_nan(top[m][r], top[m][r] * c.scale + log1_f32(all));
        }
    put_rows<D, M>(rows_of<D>(o_, c, b, h), sum, first, c, times);
}

/* -------------------- backward */

/* p = 2^(z to_log2 - l), l = lse log2(e); a sum's rounding must not make it larger than 1. */
HS_DEVICE float probability(float z, float to_log2, float l) {
    return two_to(hs_min(hs_max(fmaf(z, to_log2, -l), -125.0f), 0.0f), 1.0f);
}

static const float LOG2_E = 1.44269504088896341f;

template <int D, int M, int STEP>
__global__ void __launch_bounds__(THREADS)
    flash_dq(const call c, operand<bf16> dq_, operand<const bf16> do_, operand<const bf16> q_,
             operand<const bf16> k_, operand<const bf16> v_, const float *lse, const float *delta) {
    HS_DYNAMIC_SHARED(memory);
    const int ROWS = WARPS * 16 * M;
    bf16 *q_tile = reinterpret_cast<bf16 *>(memory), *do_tile = q_tile + ROWS * D,
         *stage = do_tile + ROWS * D;
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
    fetch<D, TILE>(stage, k, 0, c);
    fetch<D, TILE>(stage + TILE * D, v, 0, c);
    hs_copies_end();
    for (int j = 0; j < tiles; j++) {
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
            if (k0 + STEP - 1 > first) hide<false, M, STEP>(ds, first - k0, 0.0f);
            add_rows<D, M, STEP>(sum, ds, k_tile, at);
        }
    }
    put_rows<D, M>(rows_of<D>(dq_, c, b, h), sum, first, c, times);
}

/* Rows are keys, columns queries. */
template <int D, int M, int STEP>
__global__ void __launch_bounds__(THREADS)
    flash_dkv(const call c, operand<bf16> dk_, operand<bf16> dv_, operand<const bf16> do_,
              operand<const bf16> q_, operand<const bf16> k_, operand<const bf16> v_,
              const float *lse, const float *delta) {
    HS_DYNAMIC_SHARED(memory);
    const int ROWS = WARPS * 16 * M, STAGE = 2 * TILE * D + 4 * TILE; /* bf16: q, do, l, e */
    bf16 *k_tile = reinterpret_cast<bf16 *>(memory), *v_tile = k_tile + ROWS * D,
         *stage = v_tile + ROWS * D;
    const int lane = lane_id(), warp_row = (int)threadIdx.x / 32 * 16 * M;
    const int bg = (int)blockIdx.x / c.tiles, b = bg / c.G, g = bg % c.G, each = c.H / c.G;
    const int k0 = (int)blockIdx.x % c.tiles * ROWS, first = k0 + warp_row;
    const int from = k0 / TILE, span = (c.T + TILE - 1) / TILE - from;
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
    };

    fetch<D, ROWS>(k_tile, k, k0, c);
    fetch<D, ROWS>(v_tile, v, k0, c);
    fetch_stage(0);
    hs_copies_end();
    for (int t = 0; t < each * span; t++) {
        const bf16 *q_tile = stage + t % 2 * STAGE, *do_tile = q_tile + TILE * D;
        const float *numbers = reinterpret_cast<const float *>(q_tile + 2 * TILE * D);
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
            if (q0 < first + 16 * M - 1) hide<true, M, STEP>(p, first - q0, 0.0f);
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
template <int D> struct form {
    static const int FWD_M = 2, FWD_STEP = D > 64 ? 32 : 64;
    static const int DQ_M = D > 64 ? 1 : 2, DQ_STEP = D > 64 ? 64 : 32;
    static const int DKV_M = D > 64 ? 1 : 2, DKV_STEP = 32;
};

/* Shared memory: `own` operands of own_rows, and two stages of two tiles. At most 97 KiB, so two
 * blocks on an SM of sm_90 and sm_100 (228 KiB), one of D = 128 on sm_80's 164, and every one runs
 * where a block may have 99. */
template <int D> constexpr int bytes_of(int own_rows, int own) {
    return (own * own_rows + 4 * TILE) * D * (int)sizeof(bf16);
}

static bool pairs_at(operand<bf16> x) {
    return reinterpret_cast<uintptr_t>(x.p) % 4 == 0 && x.ld % 2 == 0;
}

bool hs_cuda_flash_takes(int64_t D, double scale, int64_t largest) {
    const float to_log2 = (float)(scale * 1.44269504088896341);
    return (D == 32 || D == 64 || D == 96 || D == 128) && to_log2 > 1e-30f && to_log2 < 1e30f &&
           largest < (INT64_C(1) << 30);
}

template <typename A> static call call_of(const A &a, int rows, bool wide, bool pairs) {
    return call{(int)a.T,       (int)a.H,
                (int)a.G,       (int)hs_ceil_div(a.T, rows),
                (float)a.scale, (float)(a.scale * 1.44269504088896341),
                wide,           pairs};
}

template <int D> static hs_status forward(cudaStream_t stream, const hs_attention_fwd_args &a) {
    const int M = form<D>::FWD_M, ROWS = WARPS * 16 * M;
    constexpr int bytes = bytes_of<D>(ROWS, 1);
    static_assert(bytes <= LEAST_SHARED, "fits everywhere");
    const operand<bf16> o = operand_of<bf16>(a.y, a.ldy);
    const operand<const bf16> q = operand_of<const bf16>(a.q, a.ldq),
                              k = operand_of<const bf16>(a.k, a.ldk),
                              v = operand_of<const bf16>(a.v, a.ldv);
    const bool wide = wide_rows(q, D) && wide_rows(k, D) && wide_rows(v, D);
    const call c = call_of(a, ROWS, wide, pairs_at(o));
    const auto flash_fwd_of = flash_fwd<D, M, form<D>::FWD_STEP>;
    return HS_LAUNCH_SHARED(flash_fwd_of, (unsigned)(a.B * a.H * c.tiles), THREADS, bytes, stream,
                            c, o, static_cast<float *>(a.lse), q, k, v);
}

template <int D> static hs_status backward(cudaStream_t stream, const hs_attention_igrad_args &a) {
    const int ROWS = WARPS * 16 * form<D>::DQ_M, KEYS = WARPS * 16 * form<D>::DKV_M;
    constexpr int dq_bytes = bytes_of<D>(ROWS, 2),
                  dkv_bytes = bytes_of<D>(KEYS, 2) + 4 * TILE * (int)sizeof(float);
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
    HS_TRY(hs_cuda_attention_delta(stream, a));
    const auto flash_dq_of = flash_dq<D, form<D>::DQ_M, form<D>::DQ_STEP>;
    HS_TRY(HS_LAUNCH_SHARED(flash_dq_of, (unsigned)(a.B * a.H * queries.tiles), THREADS, dq_bytes,
                            stream, queries, dq, grad, q, k, v, lse, delta));
    const auto flash_dkv_of = flash_dkv<D, form<D>::DKV_M, form<D>::DKV_STEP>;
    return HS_LAUNCH_SHARED(flash_dkv_of, (unsigned)(a.B * a.G * keys.tiles), THREADS, dkv_bytes,
                            stream, keys, dk, dv, grad, q, k, v, lse, delta);
}

hs_status hs_cuda_flash_fwd(cudaStream_t stream, const hs_attention_fwd_args &a) {
    return a.D == 32   ? forward<32>(stream, a)
           : a.D == 64 ? forward<64>(stream, a)
           : a.D == 96 ? forward<96>(stream, a)
                       : forward<128>(stream, a);
}

hs_status hs_cuda_flash_igrad(cudaStream_t stream, const hs_attention_igrad_args &a) {
    return a.D == 32   ? backward<32>(stream, a)
           : a.D == 64 ? backward<64>(stream, a)
           : a.D == 96 ? backward<96>(stream, a)
                       : backward<128>(stream, a);
}
