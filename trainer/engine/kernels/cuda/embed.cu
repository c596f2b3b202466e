/* Embedding. Bits of the fast CPU set, wgrad too: a token's row of dwte is one chain over the
 * occurrences, ascending. No atomics: the block of a token's first occurrence walks all the others.
 */
#include "kernels/cuda/lane.h"

#include "kernels/embed.h"

enum { WALKERS = 128 };

/* Which row of a table a row of y takes: its token's, or that of its place in its document. */
struct token_of {
    const int32_t *tok;
    __device__ int64_t operator()(int64_t r) const { return tok[r]; }
};
struct place_of {
    const int32_t *first;
    int64_t T;
    __device__ int64_t operator()(int64_t r) const {
        const int64_t t = r - quotient(r, T) * T;
        return t - hs_first_of(first, r, t);
    }
};

template <typename T>
__global__ void __launch_bounds__(FLAT)
    embed_fwd(T *y, const int32_t *tok, const T *wte, const T *wpe, const place_of of, int64_t R,
              int64_t C, int64_t packs, bool wide) {
    const int N = pack_of<T>::N;
    const int64_t r = quotient(flat_index(), packs), c = (flat_index() - r * packs) * N;
    const int64_t left = C - c;
    if (r >= R) return;
    lanes<N> v = load<N>(wte + tok[r] * C + c, left, wide);
    if (wpe) {
        const lanes<N> p = load<N>(wpe + of(r) * C + c, left, wide);
        for (int i = 0; i < N; i++) v.x[i] = v.x[i] + p.x[i];
    }
    store(y + r * C + c, v, left, wide);
}

/* Block (r, j): the j-th WALKERS packs of columns of the table's row that row r takes. apart: its
 * rows are added up by themselves, then to what is there. */
template <typename T, typename Of>
__global__ void __launch_bounds__(WALKERS)
    embed_wgrad_rows(float *dw, const T *dy, const Of of, int64_t R, int64_t C, bool wide,
                     bool apart) {
    const int N = pack_of<T>::N, warps = WALKERS / 32;
    HS_SHARED(int, seen, );
    HS_SHARED(unsigned, hits, [warps]);
    const int64_t r = blockIdx.x, c = ((int64_t)blockIdx.y * WALKERS + threadIdx.x) * N;
    const int64_t own = of(r);
    if (threadIdx.x == 0) seen = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < r; i += WALKERS)
        if (of(i) == own) seen = 1; /* whoever writes, writes 1 */
    __syncthreads();
    if (seen) return; /* the whole block: an earlier row takes it too */
    lanes<N> sum = {};
    if (!apart) sum = load<N>(dw + own * C + c, C - c, wide);
    for (int64_t base = r; base < R; base += WALKERS) {
        const int64_t i = base + threadIdx.x;
        const unsigned word = __ballot_sync(0xffffffffu, i < R && of(i) == own);
        if (threadIdx.x % 32 == 0) hits[threadIdx.x / 32] = word;
        __syncthreads();
        for (int warp = 0; warp < warps; warp++)
            for (unsigned rest = hits[warp]; rest; rest &= rest - 1) {
                const int64_t row = base + warp * 32 + __ffs((int)rest) - 1;
                const lanes<N> g = load<N>(dy + row * C + c, C - c, wide);
                for (int k = 0; k < N; k++) sum.x[k] = sum.x[k] + g.x[k];
            }
        __syncthreads(); /* before hits is written anew */
    }
    if (apart) {
        const lanes<N> old = load<N>(dw + own * C + c, C - c, wide);
        for (int k = 0; k < N; k++) sum.x[k] = old.x[k] + sum.x[k];
    }
    store(dw + own * C + c, sum, C - c, wide);
}

template <typename T>
__global__ void __launch_bounds__(FLAT)
    embed_wgrad_positions(float *dwpe, const T *dy, int64_t R, int64_t C, int64_t T_, int64_t packs,
                          bool wide) {
    const int N = pack_of<T>::N;
    const int64_t t = quotient(flat_index(), packs), c = (flat_index() - t * packs) * N;
    const int64_t left = C - c;
    if (t >= T_) return;
    lanes<N> sum = load<N>(dwpe + t * C + c, left, wide);
    for (int64_t r = t; r < R; r += T_) {
        const lanes<N> g = load<N>(dy + r * C + c, left, wide);
        for (int i = 0; i < N; i++) sum.x[i] = sum.x[i] + g.x[i];
    }
    store(dwpe + t * C + c, sum, left, wide);
}

template <typename T>
static hs_status embed_fwd_op(cudaStream_t stream, const hs_embed_fwd_args &a) {
    const int64_t R = a.R, C = a.C;
    const int64_t packs = hs_ceil_div(C, pack_of<T>::N);
    T *y = static_cast<T *>(a.y);
    const int32_t *tok = static_cast<const int32_t *>(a.tok);
    const T *wte = static_cast<const T *>(a.wte), *wpe = static_cast<const T *>(a.wpe);
    const place_of of = {static_cast<const int32_t *>(a.first), a.T};
    const bool wide = wide_at(y, C) && wide_at(wte, C) && wide_at(wpe, C);
    return HS_LAUNCH(embed_fwd, flat_blocks(R * packs), FLAT, stream, y, tok, wte, wpe, of, R, C,
                     packs, wide);
}
HS_CUDA_OP(embed_fwd)

/* Of embed_wgrad, and, where `apart`, of embed_wgrad_tied, which has these arguments too. */
template <typename T, typename Args>
static hs_status embed_gradients(cudaStream_t stream, const Args &a, bool apart) {
    const int64_t R = a.R, C = a.C, T_ = a.T;
    const int64_t packs = hs_ceil_div(C, pack_of<T>::N);
    float *dwte = static_cast<float *>(a.dwte), *dwpe = static_cast<float *>(a.dwpe);
    const T *dy = static_cast<const T *>(a.dy);
    const token_of tokens = {static_cast<const int32_t *>(a.tok)};
    const place_of places = {static_cast<const int32_t *>(a.first), T_};
    const bool wide = wide_at(dwte, C) && wide_at(dwpe, C) && wide_at(dy, C);
    const dim3 grid((unsigned)R, (unsigned)hs_ceil_div(packs, WALKERS));
    HS_TRY(HS_LAUNCH(embed_wgrad_rows, grid, WALKERS, stream, dwte, dy, tokens, R, C, wide, apart));
    if (!dwpe) return HS_OK;
    if (places.first)
        return HS_LAUNCH(embed_wgrad_rows, grid, WALKERS, stream, dwpe, dy, places, R, C, wide,
                         false);
    return HS_LAUNCH(embed_wgrad_positions, flat_blocks(T_ * packs), FLAT, stream, dwpe, dy, R, C,
                     T_, packs, wide);
}

template <typename T>
static hs_status embed_wgrad_op(cudaStream_t stream, const hs_embed_wgrad_args &a) {
    return embed_gradients<T>(stream, a, false);
}
HS_CUDA_OP(embed_wgrad)

template <typename T>
static hs_status embed_wgrad_tied_op(cudaStream_t stream, const hs_embed_wgrad_tied_args &a) {
    return embed_gradients<T>(stream, a, true);
}
HS_CUDA_OP(embed_wgrad_tied)
