/* Causal flash attention on tensor cores, bf16, deterministic: kernel path cuda, heads of 32, 64, 96
 * or 128; flash_fwd.cu and flash_igrad.cu. No atomics; the order of every sum depends on T, H / G, D
 * and what rows read alone.
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
 * Where documents lie in a sequence, or rows have a window, what a row reads begins at its first key
 * (attention.h): a band. Kernels of that kind (BANDED) are instances of their own, so that others pay
 * nothing for it. A block's first and last tile follow from its rows' first keys, and a warp passes by
 * the columns that none of its rows reads: work is that of the pairs in the band, to a tile's edges.
 * First keys lie in shared memory, and are looked at where columns cross the band's edge alone. A key
 * that a row does not read adds an exact 0 to its sums, so a row's bits depend on its place and on
 * what it reads; those of rows that read all before them are the same in both kinds.
 *
 * Rows of shared memory are D bf16; 16-byte chunks are swizzled so that the 8 rows of an ldmatrix
 * lie in 8 different banks (place). Rows beyond T are zeros, and what they give is not stored.
 */
#ifndef HS_KERNELS_CUDA_FLASH_H
#define HS_KERNELS_CUDA_FLASH_H

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

/* Of a call whose rows begin at a first key. */
struct band {
    const int32_t *first; /* of attention.h; NULL: one document */
    int window;           /* T where there is none */
};

/* The first key that query t reads; `at` is what band.first says of it, 0 where it says nothing. */
HS_DEVICE int low_key(int at, int t, int window) {
    at = at < 0 ? 0 : at < t ? at : t;
    return at > t - window + 1 ? at : t - window + 1;
}
/* Of a query of sequence b; those from T on are as the last. */
HS_DEVICE int low_of_query(const band &w, const call &c, int b, int t) {
    const int there = t < c.T ? t : c.T - 1;
    return low_key(w.first ? w.first[(int64_t)b * c.T + there] : 0, t, w.window);
}

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

/* What a query does not read becomes `value`, on both sides of its band: rows are queries, from
 * `query` on, lows their first keys, columns keys from `key` on. */
template <int M, int N>
HS_DEVICE void hide_unread(float (&s)[M][N / 8][4], const int *lows, int query, int key,
                           float value) {
    const int lane = anew(lane_id());
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = 16 * m + 8 * r + lane / 4, low = lows[row];
            const unsigned across = (unsigned)(query + row - low);
#pragma unroll
            for (int n = 0; n < N / 8; n++)
#pragma unroll
                for (int i = 0; i < 2; i++)
                    if ((unsigned)(key + lane % 4 * 2 + 8 * n + i - low) > across)
                        s[m][n][2 * r + i] = value;
        }
}

template <int M, int N, bool BANDED>
HS_DEVICE void hide_of(float (&s)[M][N / 8][4], const int *lows, int query, int key, float value) {
    if (BANDED)
        hide_unread<M, N>(s, lows, query, key, value);
    else
        hide<false, M, N>(s, query - key, value);
}

/* -------------------- launches */

/* Shared memory: `own` operands of own_rows, two stages of two tiles, and `numbers` of 4 bytes. At
 * most 97.5 KiB, so two blocks on an SM of sm_90 and sm_100 (228 KiB), one of D = 128 on sm_80's 164,
 * and every one runs where a block may have 99. */
template <int D> constexpr int bytes_of(int own_rows, int own, int numbers) {
    return (own * own_rows + 4 * TILE) * D * (int)sizeof(bf16) + numbers * 4;
}

static inline bool pairs_at(operand<bf16> x) {
    return reinterpret_cast<uintptr_t>(x.p) % 4 == 0 && x.ld % 2 == 0;
}

template <typename A> static inline call call_of(const A &a, int rows, bool wide, bool pairs) {
    return call{(int)a.T,       (int)a.H,
                (int)a.G,       (int)hs_ceil_div(a.T, rows),
                (float)a.scale, (float)(a.scale * 1.44269504088896341),
                wide,           pairs};
}

template <typename A> static inline bool is_banded(const A &a) {
    return a.first || a.WINDOW;
}
template <typename A> static inline band band_of(const A &a) {
    return band{static_cast<const int32_t *>(a.first),
                (int)(a.WINDOW && a.WINDOW < a.T ? a.WINDOW : a.T)};
}

#endif
