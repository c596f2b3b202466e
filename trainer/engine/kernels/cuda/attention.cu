/* Causal flash attention, without tensor cores, deterministic. Order of all sums and so the bits
 * are those of the fast CPU set (kernels/cpu/attention.h): keys in blocks of TILE, those that no row
 * of a tile reads left out, with a running maximum, a block's p summed in 16 lanes (key % 16), o, dq, dk, dv one chain each;
 * in bf16 over pairs, p and ds rounded as they enter one.
 *
 * A block has TILE rows of one head (queries; for dk and dv keys) and walks the other side tile by
 * tile. Thread (y, x) = (t / 16, t % 16) has rows 4 y .. 4 y + 3 and, of a tile of scores, columns
 * x + 16 j: the 16 threads of a row are the 16 lanes. Of the result it has columns x + 16 j of a
 * slice of SLICE; wider heads take more blocks (grid y), each making its scores anew. So registers
 * and shared memory do not grow with D.
 */
#include "kernels/cuda/heads.h"

enum {
    TILE = 64,
    SLICE = 128,
    INNER = 16, /* of a product at a time */
    THREADS = 256,
    OWN = SLICE / 16 /* columns of a slice that a thread has */
};

typedef float score_tile[TILE][TILE + 1];
/* Both operands of a product of scores, or INNER rows of a slice. */
union panel {
    struct {
        float a[INNER][TILE + 1], b[INNER][TILE + 1];
    };
    float rows[INNER][SLICE];
};

/* Whether chains go over pairs, the odd one of each first. INNER is even, and a panel's rest is zero. */
template <typename T> struct chains {
    static const bool PAIRS = sizeof(T) < sizeof(float);
    HS_DEVICE int turns(int n) { return PAIRS ? (n + 1) / 2 * 2 : n; }
    HS_DEVICE int at(int turn) { return PAIRS ? turn ^ 1 : turn; }
    /* p or ds, as it enters one */
    HS_DEVICE float operand(float x) {
        if (!PAIRS) return x;
        bf16 narrowed;
        narrow(flushed(x), &narrowed);
        return widen(narrowed);
    }
    /* A zero of pairs is +0: its sign can depend on products with a masked key's 0. */
    HS_DEVICE float whole(float sum) { return PAIRS ? sum + 0.0f : sum; }
};

/* to[d][i] = h(first + i, d0 + d), 0 outside. */
template <typename T>
HS_DEVICE void fetch_turned(float (&to)[INNER][TILE + 1], head<const T> h, int64_t first,
                            int64_t rows, int64_t d0, int64_t D, bool wide) {
    const int N = pack_of<T>::N, across = INNER / N;
    const int i = threadIdx.x / across, d = (int)(threadIdx.x % across) * N;
    if (i >= TILE) return;
    const int64_t left = first + i < rows ? D - d0 - d : 0;
    const lanes<N> v = load<N>(h.p + (first + i) * h.ld + d0 + d, left, wide);
    for (int k = 0; k < N; k++) to[d + k][i] = v.x[k];
}

/* s[i][j] = row a0 + 4 y + i of a times row b0 + x + 16 j of b, a chain over d. */
template <typename T>
HS_DEVICE void scores(float (&s)[4][4], panel &p, head<const T> a, int64_t a0, head<const T> b,
                      int64_t b0, int64_t rows, int64_t D, bool wide) {
    const int y = threadIdx.x / 16 * 4, x = threadIdx.x % 16;
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) s[i][j] = 0.0f;
    for (int64_t d0 = 0; d0 < D; d0 += INNER) {
        fetch_turned(p.a, a, a0, rows, d0, D, wide);
        fetch_turned(p.b, b, b0, rows, d0, D, wide);
        __syncthreads();
        const int n = (int)min64(INNER, D - d0);
        for (int turn = 0; turn < chains<T>::turns(n); turn++) {
            const int d = chains<T>::at(turn);
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    s[i][j] = chain<chains<T>::PAIRS>(p.a[d][y + i], p.b[d][x + 16 * j], s[i][j]);
        }
        __syncthreads();
    }
}

template <typename T> HS_DEVICE void put_scores(score_tile &tile, const float (&s)[4][4]) {
    const int y = threadIdx.x / 16 * 4, x = threadIdx.x % 16;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) tile[y + i][x + 16 * j] = chains<T>::operand(s[i][j]);
}

/* sum[i][j] += over u < count of tile[4 y + i][u] h(first + u, d0 + x + 16 j), one chain. The tile
 * was put by this block just before. */
template <typename T>
HS_DEVICE void add_rows(float (&sum)[4][OWN], panel &p, const score_tile &tile, head<const T> h,
                        int64_t first, int64_t count, int64_t d0, int64_t D, bool wide) {
    const int N = pack_of<T>::N, y = threadIdx.x / 16 * 4, x = threadIdx.x % 16;
    for (int64_t u0 = 0; u0 < count; u0 += INNER) {
        for (int at = threadIdx.x; at < INNER * SLICE / N; at += THREADS) {
            const int u = at / (SLICE / N), d = at % (SLICE / N) * N;
            const int64_t left = u0 + u < count ? D - d0 - d : 0;
            const lanes<N> v = load<N>(h.p + (first + u0 + u) * h.ld + d0 + d, left, wide);
            for (int k = 0; k < N; k++) p.rows[u][d + k] = v.x[k];
        }
        __syncthreads(); /* the rows are there, and before the first the tile */
        const int n = (int)min64(INNER, count - u0);
        for (int turn = 0; turn < chains<T>::turns(n); turn++) {
            const int u = chains<T>::at(turn);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float f = tile[y + i][u0 + u];
#pragma unroll
                for (int j = 0; j < OWN; j++)
                    sum[i][j] = chain<chains<T>::PAIRS>(f, p.rows[u][x + 16 * j], sum[i][j]);
            }
        }
        __syncthreads(); /* before the panel, and after the last the tile, are written anew */
    }
}

/* h(first + 4 y + i, d0 + x + 16 j) = sum[i][j] times `times` or, where over is there, by it. */
template <typename T>
HS_DEVICE void put_rows(head<T> h, const float (&sum)[4][OWN], int64_t first, int64_t rows,
                        int64_t d0, int64_t D, float times, const float *over) {
    const int y = threadIdx.x / 16 * 4, x = threadIdx.x % 16;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < OWN; j++) {
            const int64_t row = first + y + i, d = d0 + x + 16 * j;
            const float whole = chains<T>::whole(sum[i][j]);
            const float v = over ? v_div(whole, over[i]) : whole * times;
            if (row < rows && d < D) narrow(v, h.p + row * h.ld + d);
        }
}

/* -------------------- forward */

template <typename T>
__global__ void __launch_bounds__(THREADS, 1)
    attention_fwd(const shape s, operand<T> o_, float *lse, operand<const T> q_,
                  operand<const T> k_, operand<const T> v_) {
    HS_SHARED(score_tile, tile, );
    HS_SHARED(panel, p, );
    const int y = threadIdx.x / 16 * 4, x = threadIdx.x % 16;
    const int64_t bh = blockIdx.x / s.tiles, q0 = blockIdx.x % s.tiles * TILE;
    const int64_t b = bh / s.H, h = bh % s.H, g = h / (s.H / s.G), d0 = (int64_t)blockIdx.y * SLICE;
    const head<const T> q = head_of(q_.p, q_.ld, s, b, h), k = head_of(k_.p, k_.ld, s, b, g),
                        v = head_of(v_.p, v_.ld, s, b, g);
    float sum[4][OWN] = {}, top[4], total[4] = {};
    int64_t low[4];
    for (int i = 0; i < 4; i++) {
        top[i] = least_of(s);
        low[i] = low_of(s, b, min64(q0 + y + i, s.T - 1));
    }
    for (int64_t k0 = low_of(s, b, q0) / TILE * TILE; k0 <= q0; k0 += TILE) {
        float z[4][4];
        scores(z, p, q, q0, k, k0, s.T, s.D, s.wide);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float best = top[i], lane = 0.0f;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int64_t key = k0 + x + 16 * j;
                const bool seen = low[i] <= key && key <= q0 + y + i && key < s.T;
                z[i][j] = seen ? z[i][j] * s.scale : -INFINITY;
                best = v_max(best, z[i][j]);
            }
            for (int bits = 8; bits; bits /= 2)
                best = v_max(__shfl_xor_sync(0xffffffffu, best, bits), best);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                z[i][j] = v_exp(z[i][j] - best);
                lane = lane + z[i][j];
            }
            for (int bits = 8; bits; bits /= 2)
                lane = lane + __shfl_xor_sync(0xffffffffu, lane, bits);
            if (best != top[i]) { /* else the factor is exactly 1 */
                const float shrink = exp1_f32(top[i] - best);
                total[i] = total[i] * shrink;
#pragma unroll
                for (int j = 0; j < OWN; j++) sum[i][j] = sum[i][j] * shrink;
                top[i] = best;
            }
            total[i] = total[i] + lane;
        }
        put_scores<T>(tile, z);
        add_rows(sum, p, tile, v, k0, min64(TILE, s.T - k0), d0, s.D, s.wide);
    }
    put_rows(head_of(o_.p, o_.ld, s, b, h), sum, q0, s.T, d0, s.D, 0.0f, total);
    if (x == 0 && d0 == 0)
        for (int i = 0; i < 4; i++)
            if (q0 + y + i < s.T) lse[bh * s.T + q0 + y + i] = top[i] + log1_f32(total[i]);
}

/* -------------------- backward */

/* delta[b,h,t] = do . o, in the 16 lanes of lane.h's rows. */
template <typename T>
__global__ void __launch_bounds__(FLAT)
    attention_delta(const shape s, float *delta, operand<const T> do_, operand<const T> o_,
                    int64_t rows) {
    const int N = pack_of<T>::N;
    const int64_t row = row_index<T>(), bh = row / s.T, t = row % s.T, end = row < rows ? s.D : 0;
    const T *d_o = do_.p + (bh / s.H * s.T + t) * do_.ld + bh % s.H * s.D;
    const T *o = o_.p + (bh / s.H * s.T + t) * o_.ld + bh % s.H * s.D;
    lanes<N> sum = {};
    for (int64_t d = row_column<T>(); d < end; d += LANES) {
        const lanes<N> a = load<N>(d_o + d, s.D - d, s.wide), b = load<N>(o + d, s.D - d, s.wide);
        for (int i = 0; i < N; i++) sum.x[i] = v_fma(a.x[i], b.x[i], sum.x[i]);
    }
    const float all = join_lanes(sum);
    if (end && row_column<T>() == 0) delta[row] = all;
}

template <typename T>
__global__ void __launch_bounds__(THREADS, 1)
    attention_dq(const shape s, operand<T> dq_, operand<const T> do_, operand<const T> q_,
                 operand<const T> k_, operand<const T> v_, const float *lse, const float *delta) {
    HS_SHARED(score_tile, tile, );
    HS_SHARED(panel, p, );
    const int y = threadIdx.x / 16 * 4, x = threadIdx.x % 16;
    const int64_t bh = blockIdx.x / s.tiles, q0 = blockIdx.x % s.tiles * TILE;
    const int64_t b = bh / s.H, h = bh % s.H, g = h / (s.H / s.G), d0 = (int64_t)blockIdx.y * SLICE;
    const head<const T> q = head_of(q_.p, q_.ld, s, b, h), k = head_of(k_.p, k_.ld, s, b, g),
                        v = head_of(v_.p, v_.ld, s, b, g), grad = head_of(do_.p, do_.ld, s, b, h);
    float sum[4][OWN] = {};
    int64_t low[4];
    for (int i = 0; i < 4; i++) low[i] = low_of(s, b, min64(q0 + y + i, s.T - 1));
    for (int64_t k0 = low_of(s, b, q0) / TILE * TILE; k0 <= q0; k0 += TILE) {
        float z[4][4], dp[4][4];
        scores(z, p, q, q0, k, k0, s.T, s.D, s.wide);
        scores(dp, p, grad, q0, v, k0, s.T, s.D, s.wide);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int64_t row = q0 + y + i, at = bh * s.T + row;
            const float l = row < s.T ? lse[at] : 0.0f, e = row < s.T ? delta[at] : 0.0f;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float prob = v_exp(z[i][j] * s.scale - l);
                const int64_t key = k0 + x + 16 * j;
                z[i][j] = low[i] <= key && key <= row ? prob * (dp[i][j] - e) : 0.0f;
            }
        }
        put_scores<T>(tile, z);
        add_rows(sum, p, tile, k, k0, min64(TILE, s.T - k0), d0, s.D, s.wide);
    }
    put_rows(head_of(dq_.p, dq_.ld, s, b, h), sum, q0, s.T, d0, s.D, s.scale, NULL);
}

/* Tiles are turned: rows are keys, columns queries. */
template <typename T>
__global__ void __launch_bounds__(THREADS, 1)
    attention_dkv(const shape s, operand<T> dk_, operand<T> dv_, operand<const T> do_,
                  operand<const T> q_, operand<const T> k_, operand<const T> v_, const float *lse,
                  const float *delta) {
    HS_SHARED(score_tile, tile, );
    HS_SHARED(panel, p, );
    const int y = threadIdx.x / 16 * 4, x = threadIdx.x % 16;
    const int64_t bg = blockIdx.x / s.tiles, k0 = blockIdx.x % s.tiles * TILE;
    const int64_t b = bg / s.G, g = bg % s.G, each = s.H / s.G, d0 = (int64_t)blockIdx.y * SLICE;
    const head<const T> k = head_of(k_.p, k_.ld, s, b, g), v = head_of(v_.p, v_.ld, s, b, g);
    float dk[4][OWN] = {}, dv[4][OWN] = {};
    for (int64_t h = g * each; h < (g + 1) * each; h++) {
        const head<const T> q = head_of(q_.p, q_.ld, s, b, h),
                            grad = head_of(do_.p, do_.ld, s, b, h);
        const float *l = lse + (b * s.H + h) * s.T, *e = delta + (b * s.H + h) * s.T;
        for (int64_t q0 = k0; q0 < s.T; q0 += TILE) {
            const int64_t queries = min64(TILE, s.T - q0);
            if (low_of(s, b, q0) >= k0 + TILE)
                break; /* nor does any later query read one of them */
            float z[4][4], ds[4][4];
            scores(z, p, k, k0, q, q0, s.T, s.D, s.wide);
            scores(ds, p, v, k0, grad, q0, s.T, s.D, s.wide);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int64_t query = q0 + x + 16 * j;
                const float lj = query < s.T ? l[query] : 0.0f, ej = query < s.T ? e[query] : 0.0f;
                const int64_t low = low_of(s, b, min64(query, s.T - 1));
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const bool seen = low <= k0 + y + i && k0 + y + i <= query;
                    const float prob = v_exp(z[i][j] * s.scale - lj);
                    ds[i][j] = seen ? prob * (ds[i][j] - ej) : 0.0f;
                    z[i][j] = seen ? prob : 0.0f;
                }
            }
            put_scores<T>(tile, z);
            add_rows(dv, p, tile, grad, q0, queries, d0, s.D, s.wide);
            put_scores<T>(tile, ds);
            add_rows(dk, p, tile, q, q0, queries, d0, s.D, s.wide);
        }
    }
    put_rows(head_of(dk_.p, dk_.ld, s, b, g), dk, k0, s.T, d0, s.D, s.scale, NULL);
    put_rows(head_of(dv_.p, dv_.ld, s, b, g), dv, k0, s.T, d0, s.D, 1.0f, NULL);
}

/* -------------------- launches */

static int64_t max64(int64_t a, int64_t b) {
    return a > b ? a : b;
}

template <typename T>
static hs_status attention_fwd_op(const hs_cuda_ctx *ctx, const hs_attention_fwd_args &a) {
    const cudaStream_t stream = static_cast<cudaStream_t>(ctx->stream);
    const int64_t largest = max64(max64(a.T, a.ldq), max64(a.ldk, max64(a.ldv, a.ldy)));
    if (ctx->path == HS_PATH_CUDA && sizeof(T) == sizeof(bf16) &&
        hs_cuda_flash_takes(a.D, a.scale, largest))
        return hs_cuda_flash_fwd(stream, a);
    const int64_t D = a.D, tiles = hs_ceil_div(a.T, TILE);
    const operand<T> o = operand_of<T>(a.y, a.ldy);
    float *lse = static_cast<float *>(a.lse);
    const operand<const T> q = operand_of<const T>(a.q, a.ldq), k = operand_of<const T>(a.k, a.ldk),
                           v = operand_of<const T>(a.v, a.ldv);
    const bool wide = wide_rows(q, D) && wide_rows(k, D) && wide_rows(v, D);
    const int32_t *first = static_cast<const int32_t *>(a.first);
    const shape s = {a.T, a.H, a.G, D, tiles, (float)a.scale, wide, first, a.WINDOW};
    const dim3 grid((unsigned)(a.B * a.H * tiles), (unsigned)hs_ceil_div(D, SLICE));
    return HS_LAUNCH(attention_fwd, grid, THREADS, stream, s, o, lse, q, k, v);
}
HS_CUDA_CTX_OP(attention_fwd)

template <typename T>
static hs_status delta_of(cudaStream_t stream, const hs_attention_igrad_args &a) {
    const int64_t rows = a.B * a.H * a.T;
    const operand<const T> grad = operand_of<const T>(a.dy, a.lddy),
                           o = operand_of<const T>(a.y, a.ldy);
    const bool wide = wide_rows(grad, a.D) && wide_rows(o, a.D);
    const shape s = {a.T, a.H, a.G, a.D, 0, 0.0f, wide, NULL, 0};
    return HS_LAUNCH(attention_delta, (unsigned)hs_ceil_div(rows, row_of<T>::ROWS), FLAT, stream, s,
                     static_cast<float *>(a.delta), grad, o, rows);
}
hs_status hs_cuda_attention_delta(cudaStream_t stream, const hs_attention_igrad_args &a) {
    return delta_of<bf16>(stream, a);
}

template <typename T>
static hs_status attention_igrad_op(const hs_cuda_ctx *ctx, const hs_attention_igrad_args &a) {
    const cudaStream_t stream = static_cast<cudaStream_t>(ctx->stream);
    const int64_t largest = max64(max64(max64(a.T, a.ldq), max64(a.ldk, a.ldv)),
                                  max64(max64(a.lddy, a.lddq), max64(a.lddk, a.lddv)));
    if (ctx->path == HS_PATH_CUDA && sizeof(T) == sizeof(bf16) &&
        hs_cuda_flash_takes(a.D, a.scale, largest))
        return hs_cuda_flash_igrad(stream, a);
    const int64_t D = a.D, tiles = hs_ceil_div(a.T, TILE);
    const operand<T> dq = operand_of<T>(a.dq, a.lddq), dk = operand_of<T>(a.dk, a.lddk),
                     dv = operand_of<T>(a.dv, a.lddv);
    const operand<const T> grad = operand_of<const T>(a.dy, a.lddy),
                           q = operand_of<const T>(a.q, a.ldq), k = operand_of<const T>(a.k, a.ldk),
                           v = operand_of<const T>(a.v, a.ldv);
    const float *lse = static_cast<const float *>(a.lse);
    const float *delta = static_cast<const float *>(a.delta);
    const bool wide = wide_rows(grad, D) && wide_rows(q, D) && wide_rows(k, D) && wide_rows(v, D);
    const int32_t *first = static_cast<const int32_t *>(a.first);
    const shape s = {a.T, a.H, a.G, D, tiles, (float)a.scale, wide, first, a.WINDOW};
    const unsigned slices = (unsigned)hs_ceil_div(D, SLICE);
    const dim3 queries((unsigned)(a.B * a.H * tiles), slices),
        keys((unsigned)(a.B * a.G * tiles), slices);
    HS_TRY(delta_of<T>(stream, a));
    HS_TRY(HS_LAUNCH(attention_dq, queries, THREADS, stream, s, dq, grad, q, k, v, lse, delta));
    return HS_LAUNCH(attention_dkv, keys, THREADS, stream, s, dk, dv, grad, q, k, v, lse, delta);
}
HS_CUDA_CTX_OP(attention_igrad)
