/* The head in blocks of the vocabulary (vocabulary.h): products by gemm.h or, under path cuda, by a
 * library (libraries.h), and between them a thread block for each row.
 *
 * Order of a block's sum, of this set alone and of both paths: thread t of FLAT sums its elements
 * (t, t + FLAT, ...) in one chain; threads join 16, 8, 4, 2, 1 lanes apart, then warps ascending. It
 * depends on the block's length alone.
 */
#include "kernels/cuda/by_library.h"
#include "kernels/cuda/gemm.h"

#include "kernels/vocabulary.h"

enum { VOCAB_WARPS = FLAT / 32 };

/* Of a row: largest logit, sum of exp(logit - it), logit of the target. */
struct row_sums {
    float top, sum, own;
};

HS_DEVICE row_sums vocab_two(row_sums a, row_sums b) {
    const float top = v_max(a.top, b.top);
    const float one = a.sum * v_exp(a.top - top), other = b.sum * v_exp(b.top - top);
    return row_sums{top, one + other, a.own + b.own};
}

HS_DEVICE float vocab_two(float a, float b) {
    return a + b;
}

/* The balanced tree over values that come one after the other, as a binary counter counts: a new one
 * joins the one before it, both join the two before them, and so on. At most one value of each level
 * waits, in registers. An array of all values would lie in local memory, of which a context takes some
 * for every thread that its device can hold: 280 MB at 1 KiB a thread, which no plan counts. */
enum { VOCAB_LEVELS = 7 }; /* HS_VOCAB_BLOCKS is 2^6 */
template <typename V> struct vocab_joins {
    V wait[VOCAB_LEVELS]; /* wait[l]: 2^l values, where bit l of count is set */
    int count;
};

template <typename V> HS_DEVICE void vocab_join(vocab_joins<V> &j, V x) {
    int carried = 1;
#pragma unroll
    for (int l = 0; l < VOCAB_LEVELS; l++)
        if (carried) {
            if (j.count >> l & 1) {
                x = vocab_two(j.wait[l], x);
            } else {
                j.wait[l] = x;
                carried = 0;
            }
        }
    j.count++;
}

/* All of them; there is one at least. */
template <typename V> HS_DEVICE V vocab_joined(const vocab_joins<V> &j) {
    V all = {};
    int some = 0;
#pragma unroll
    for (int l = 0; l < VOCAB_LEVELS; l++)
        if (j.count >> l & 1) {
            all = some ? vocab_two(j.wait[l], all) : j.wait[l];
            some = 1;
        }
    return all;
}

/* Rows of logits and what is made of them. */
template <typename T> struct vocab_rows {
    int64_t V, N, BLOCK, FIRST, P, R; /* P: parts whose sums are there; 0: what is here is all */
    float *z;                         /* [rows, V] */
    float *tops;                      /* [N, R] */
    float *sums;                      /* [3 P, R] */
    float *loss;                      /* [rows]; NULL: not wanted */
    T *dlogits;                       /* [rows, V]; NULL: not wanted */
    const int32_t *target;
    float scale;
};

/* As hs_vocab_block. */
HS_DEVICE int64_t vocab_block(int64_t b, int64_t N, int64_t BLOCK, int64_t V) {
    if (b == 0) return 0;
    return b >= N || BLOCK >= V || b * BLOCK >= V ? V : b * BLOCK;
}

typedef float vocab_tops[HS_VOCAB_BLOCKS]; /* of a row's blocks, in shared memory */

/* z of row r becomes e; the tops of its blocks and the sums of all go to every thread. */
template <typename T>
HS_DEVICE row_sums vocab_row_sums(const vocab_rows<T> &j, int64_t r, vocab_tops &tops,
                                  float (&largest)[VOCAB_WARPS], float (&sums)[VOCAB_WARPS]) {
    vocab_joins<row_sums> all = {};
    float *z = j.z + r * j.V;
    const int64_t own = j.target[r] < 0 ? -1 : j.target[r] - j.FIRST;
    const float logit = own >= 0 && own < j.V ? z[own] : 0.0f;
    for (int64_t b = 0; b < j.N; b++) {
        const int64_t begin = vocab_block(b, j.N, j.BLOCK, j.V),
                      end = vocab_block(b + 1, j.N, j.BLOCK, j.V);
        float top = __uint_as_float(0xff800000u); /* - infinity */
        for (int64_t v = begin + threadIdx.x; v < end; v += FLAT) top = v_max(top, z[v]);
        for (int bits = 16; bits; bits /= 2)
            top = v_max(__shfl_xor_sync(0xffffffffu, top, bits), top);
        if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = top;
        __syncthreads();
        for (int i = 0; i < VOCAB_WARPS; i++) top = v_max(largest[i], top);
        float sum = 0.0f;
        for (int64_t v = begin + threadIdx.x; v < end; v += FLAT) {
            z[v] = v_exp(z[v] - top);
            sum = sum + z[v];
        }
        for (int bits = 16; bits; bits /= 2) sum = sum + __shfl_xor_sync(0xffffffffu, sum, bits);
        if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
        __syncthreads();
        sum = sums[0];
        for (int i = 1; i < VOCAB_WARPS; i++) sum = sum + sums[i];
        vocab_join(all, row_sums{top, sum, own >= begin && own < end ? logit : 0.0f});
        if (threadIdx.x == 0) tops[b] = top;
    }
    __syncthreads(); /* the tops of all */
    return vocab_joined(all);
}

/* loss and dlogits of row r; a thread wrote the e that it reads. */
template <typename T>
HS_DEVICE void vocab_row_grad(const vocab_rows<T> &j, int64_t r, const vocab_tops &tops,
                              row_sums all) {
    const float *z = j.z + r * j.V;
    const bool counts = j.target[r] >= 0;
    const int64_t own = counts ? j.target[r] - j.FIRST : -1;
    if (j.loss && threadIdx.x == 0)
        j.loss[r] = counts ? (all.top - all.own) + log1_f32(all.sum) : 0.0f;
    const float each = v_div(j.scale, all.sum);
    for (int64_t b = 0; b < j.N; b++) {
        const int64_t begin = vocab_block(b, j.N, j.BLOCK, j.V),
                      end = vocab_block(b + 1, j.N, j.BLOCK, j.V);
        const float lower = v_exp(tops[b] - all.top), factor = lower * each;
        for (int64_t v = begin + threadIdx.x; v < end; v += FLAT) {
            const float e = z[v];
            const float at_target = (v_div(e * lower, all.sum) - 1.0f) * j.scale;
            narrow(!counts ? 0.0f : v == own ? at_target : e * factor, j.dlogits + r * j.V + v);
        }
    }
}

/* Row blockIdx.x: its sums, and with dlogits its gradient too. */
template <typename T> __global__ void __launch_bounds__(FLAT) vocab_forward(const vocab_rows<T> j) {
    HS_SHARED(float, largest, [VOCAB_WARPS]);
    HS_SHARED(float, sums, [VOCAB_WARPS]);
    HS_SHARED(vocab_tops, tops, );
    const int64_t r = blockIdx.x;
    const row_sums all = vocab_row_sums(j, r, tops, largest, sums);
    if (j.dlogits) {
        vocab_row_grad(j, r, tops, all);
    } else if (threadIdx.x == 0) {
        for (int64_t b = 0; b < j.N; b++) j.tops[b * j.R + r] = tops[b];
        j.sums[r] = all.top, j.sums[j.R + r] = all.sum, j.sums[2 * j.R + r] = all.own;
    }
}

/* Row blockIdx.x: its gradient, by the sums of all parts. */
template <typename T>
__global__ void __launch_bounds__(FLAT) vocab_backward(const vocab_rows<T> j) {
    HS_SHARED(vocab_tops, tops, );
    vocab_joins<row_sums> all = {};
    const int64_t r = blockIdx.x;
    if (threadIdx.x < j.N) tops[threadIdx.x] = j.tops[threadIdx.x * j.R + r];
    for (int64_t p = 0; p < j.P; p++) {
        const float *of = j.sums + 3 * p * j.R + r;
        vocab_join(all, row_sums{of[0], of[j.R], of[2 * j.R]});
    }
    __syncthreads(); /* the tops of all */
    vocab_row_grad(j, r, tops, vocab_joined(all));
}

/* out[i] = the sum of N parts of `size` in the tree, of which `full` are not empty; an element a
 * thread. */
template <typename O>
__global__ void __launch_bounds__(FLAT)
    vocab_tree(O *out, const float *parts, int64_t N, int64_t full, int64_t size) {
    const int64_t i = flat_index();
    if (i >= size) return;
    vocab_joins<float> all = {};
    for (int64_t b = 0; b < N; b++) vocab_join(all, b < full ? parts[b * size + i] : 0.0f);
    narrow(vocab_joined(all), out + i);
}

/* --- products ------------------------------------------------------------------------------------ */

static hs_side vocab_side(const void *at, int64_t ld, bool across, uint32_t type) {
    hs_side s = {};
    s.at = at, s.ld = ld, s.across = across, s.type = type;
    return s;
}

/* out[m,n], of k: by the library, or by gemm.h. */
template <typename T> static hs_status vocab_product(const hs_cuda_ctx *ctx, const hs_product &p) {
    if (hs_by_library(ctx)) return hs_products_run(ctx->products, ctx, &p);
    gemm<T, float> g = {};
    g.m = p.m, g.n = p.n, g.k = p.k;
    g.a = p.a.across ? gemm_side<T>{static_cast<const T *>(p.a.at), 1, p.a.ld}
                     : gemm_side<T>{static_cast<const T *>(p.a.at), p.a.ld, 1};
    g.b = p.b.across ? gemm_side<T>{static_cast<const T *>(p.b.at), 1, p.b.ld}
                     : gemm_side<T>{static_cast<const T *>(p.b.at), p.b.ld, 1};
    g.out = static_cast<float *>(p.out), g.ld_out = p.ld_out;
    g.from_old = p.add && !p.fresh;
    return gemm_run(static_cast<cudaStream_t>(ctx->stream), g);
}

static hs_product vocab_logits(const void *x, const void *w, void *logits, int64_t rows, int64_t C,
                               int64_t V, uint32_t type) {
    hs_product p = {};
    p.m = rows, p.n = V, p.k = C;
    p.a = vocab_side(x, C, false, type), p.b = vocab_side(w, C, false, type);
    p.out = logits, p.ld_out = V, p.type_out = HS_F32;
    return p;
}

/* What block b gives for dx. */
static hs_product vocab_dx(const hs_vocab_part_args &a, int64_t b, int64_t rows) {
    const int64_t size = a.dtype == HS_F32 ? 4 : 2;
    const int64_t begin = hs_vocab_block(b, a.N, a.BLOCK, a.V),
                  end = hs_vocab_block(b + 1, a.N, a.BLOCK, a.V);
    hs_product p = {};
    p.m = rows, p.n = a.C, p.k = end - begin;
    p.a = vocab_side(static_cast<const char *>(a.dlogits) + begin * size, a.V, false, a.dtype);
    p.b = vocab_side(static_cast<const char *>(a.w) + begin * a.C * size, a.C, true, a.dtype);
    p.out = static_cast<float *>(a.parts) + b * rows * a.C;
    p.ld_out = a.C, p.type_out = HS_F32;
    return p;
}

static hs_product vocab_dw(const hs_vocab_part_args &a, const void *x, int64_t rows) {
    hs_product p = {};
    p.m = a.V, p.n = a.C, p.k = rows;
    p.a = vocab_side(a.dlogits, a.V, true, a.dtype), p.b = vocab_side(x, a.C, true, a.dtype);
    p.out = a.dw, p.ld_out = a.C, p.type_out = HS_F32;
    p.add = a.dw, p.ld_add = a.C;
    p.fresh = !a.ACCUM && x == a.x; /* the first chunk's */
    return p;
}

static hs_vocab_part_args vocab_as_part(const hs_vocab_head_args &a) {
    hs_vocab_part_args g = {};
    g.loss = a.loss, g.dx = a.dx, g.dw = a.dw, g.x = a.x, g.w = a.w, g.target = a.target;
    g.dlogits = a.dlogits, g.parts = a.parts;
    g.R = a.R, g.C = a.C, g.V = a.V, g.CHUNK = a.CHUNK, g.N = a.N, g.BLOCK = a.BLOCK, g.ALL = a.V;
    g.scale = a.scale, g.dtype = a.dtype, g.ACCUM = a.ACCUM;
    return g;
}

static int vocab_products_of(const hs_vocab_part_args &a, void *logits, int64_t rows,
                             hs_product *out) {
    int n = 0;
    if (logits) out[n++] = vocab_logits(a.x, a.w, logits, rows, a.C, a.V, a.dtype);
    for (int64_t b = 0; b < a.N; b++) {
        out[n] = vocab_dx(a, b, rows);
        n += out[n].k > 0;
    }
    out[n++] = vocab_dw(a, a.x, rows);
    return n;
}

extern "C" int hs_vocab_products(uint16_t kernel, const hs_args *args,
                                 hs_product out[HS_PRODUCTS_OF_A_CALL]) {
    if (kernel == HS_K_VOCAB_SUMS) {
        const hs_vocab_sums_args a = hs_vocab_sums_args_of(args);
        out[0] = vocab_logits(a.x, a.w, a.e, a.R, a.C, a.V, a.dtype);
        return 1;
    }
    const bool whole = kernel == HS_K_VOCAB_HEAD;
    const hs_vocab_part_args a =
        whole ? vocab_as_part(hs_vocab_head_args_of(args)) : hs_vocab_part_args_of(args);
    void *logits = whole ? hs_vocab_head_args_of(args).logits : NULL;
    int n = 0;
    if (a.R >= a.CHUNK) n += vocab_products_of(a, logits, a.CHUNK, out);
    if (a.R % a.CHUNK) n += vocab_products_of(a, logits, a.R % a.CHUNK, out + n);
    return n;
}

/* dx into out and dw, of `rows` rows whose dlogits are there. */
template <typename T, typename O>
static hs_status vocab_headients(const hs_cuda_ctx *ctx, const hs_vocab_part_args &a, const T *x,
                                 O *out, int64_t rows) {
    const cudaStream_t stream = static_cast<cudaStream_t>(ctx->stream);
    float *parts = static_cast<float *>(a.parts);
    int64_t full = 0;
    for (int64_t b = 0; b < a.N; b++) {
        const hs_product p = vocab_dx(a, b, rows);
        if (!p.k) continue;
        HS_TRY(vocab_product<T>(ctx, p));
        full = b + 1;
    }
    HS_TRY(HS_LAUNCH(vocab_tree, flat_blocks(rows * a.C), FLAT, stream, out, parts, a.N, full,
                     rows * a.C));
    return vocab_product<T>(ctx, vocab_dw(a, x, rows));
}

/* --- ops ----------------------------------------------------------------------------------------- */

template <typename T>
static hs_status vocab_head_op(const hs_cuda_ctx *ctx, const hs_vocab_head_args &a) {
    const hs_vocab_part_args g = vocab_as_part(a);
    for (int64_t r = 0; r < a.R; r += a.CHUNK) {
        const int64_t rows = a.R - r < a.CHUNK ? a.R - r : a.CHUNK;
        const T *x = static_cast<const T *>(a.x) + r * a.C;
        vocab_rows<T> j = {};
        j.V = a.V, j.N = a.N, j.BLOCK = a.BLOCK, j.scale = (float)a.scale;
        j.z = static_cast<float *>(a.logits), j.loss = static_cast<float *>(a.loss) + r;
        j.dlogits = static_cast<T *>(a.dlogits);
        j.target = static_cast<const int32_t *>(a.target) + r;
        HS_TRY(vocab_product<T>(ctx, vocab_logits(x, a.w, a.logits, rows, a.C, a.V, a.dtype)));
        HS_TRY(HS_LAUNCH(vocab_forward, (unsigned)rows, FLAT,
                         static_cast<cudaStream_t>(ctx->stream), j));
        HS_TRY(vocab_headients<T>(ctx, g, x, static_cast<T *>(a.dx) + r * a.C, rows));
    }
    return HS_OK;
}
HS_CUDA_CTX_OP(vocab_head)

template <typename T>
static hs_status vocab_sums_op(const hs_cuda_ctx *ctx, const hs_vocab_sums_args &a) {
    vocab_rows<T> j = {};
    j.V = a.V, j.N = a.N, j.BLOCK = a.BLOCK, j.FIRST = a.FIRST, j.R = a.R;
    j.z = static_cast<float *>(a.e), j.tops = static_cast<float *>(a.tops);
    j.sums = static_cast<float *>(a.sums), j.target = static_cast<const int32_t *>(a.target);
    HS_TRY(vocab_product<T>(ctx, vocab_logits(a.x, a.w, a.e, a.R, a.C, a.V, a.dtype)));
    return HS_LAUNCH(vocab_forward, (unsigned)a.R, FLAT, static_cast<cudaStream_t>(ctx->stream), j);
}
HS_CUDA_CTX_OP(vocab_sums)

template <typename T>
static hs_status vocab_part_op(const hs_cuda_ctx *ctx, const hs_vocab_part_args &a) {
    for (int64_t r = 0; r < a.R; r += a.CHUNK) {
        const int64_t rows = a.R - r < a.CHUNK ? a.R - r : a.CHUNK;
        vocab_rows<T> j = {};
        j.V = a.V, j.N = a.N, j.BLOCK = a.BLOCK, j.FIRST = a.FIRST, j.P = a.P, j.R = a.R;
        j.z = static_cast<float *>(a.e) + r * a.V, j.tops = static_cast<float *>(a.tops) + r;
        j.sums = static_cast<float *>(a.sums) + r;
        j.loss = a.loss ? static_cast<float *>(a.loss) + r : NULL;
        j.dlogits = static_cast<T *>(a.dlogits), j.scale = (float)a.scale;
        j.target = static_cast<const int32_t *>(a.target) + r;
        HS_TRY(HS_LAUNCH(vocab_backward, (unsigned)rows, FLAT,
                         static_cast<cudaStream_t>(ctx->stream), j));
        HS_TRY(vocab_headients<T>(ctx, a, static_cast<const T *>(a.x) + r * a.C,
                                  static_cast<float *>(a.dx) + r * a.C, rows));
    }
    return HS_OK;
}
HS_CUDA_CTX_OP(vocab_part)
