/* Rotary embedding, in place: a thread turns one pack of pairs. Bits of the fast CPU set.
 *
 * The table is made once a run, by the host, with the same functions in double as the CPU's
 * (core/math.c), and handed over as arguments of launches, 4 KB each: no staging memory, no wait,
 * the same bits. */
#include "kernels/cuda/lane.h"

#include "kernels/rope.h"

extern "C" {
#include "core/math.h"
}

enum { TABLE_PART = 960 }; /* floats that fit a launch's arguments */

struct table_part {
    float x[TABLE_PART];
};

__global__ void __launch_bounds__(TABLE_PART)
    rope_table_put(float *tab, const table_part part, int count) {
    if ((int)threadIdx.x < count) tab[threadIdx.x] = part.x[threadIdx.x];
}

template <typename T>
__global__ void __launch_bounds__(FLAT)
    rope_turn(T *x, const float *tab, const int32_t *starts, int64_t R, int64_t T_, int64_t N_,
              int64_t D, int64_t ldx, float sign, int64_t packs, bool wide) {
    const int N = pack_of<T>::N;
    const int64_t half = D / 2, head = quotient(flat_index(), packs);
    const int64_t i0 = (flat_index() - head * packs) * N, r = quotient(head, N_), left = half - i0;
    if (r >= R) return;
    const int64_t t = r - quotient(r, T_) * T_;
    T *first = x + r * ldx + (head - r * N_) * D + i0;
    lanes<N> p = load<N>(first, left, wide), q = load<N>(first + half, left, wide);
    const lanes<2 * N> pairs =
        load<2 * N>(tab + 2 * ((t - hs_first_of(starts, r, t)) * half + i0), 2 * left, wide);
    for (int i = 0; i < N; i++) {
        const float c = pairs.x[2 * i], s = pairs.x[2 * i + 1] * sign;
        const float a = p.x[i], b = q.x[i];
        p.x[i] = v_fnma(b, s, a * c);
        q.x[i] = v_fma(a, s, b * c);
    }
    store(first, p, left, wide);
    store(first + half, q, left, wide);
}

template <typename T>
static hs_status rope_table_op(cudaStream_t stream, const hs_rope_table_args &a) {
    const int64_t T_ = a.T, D = a.D, half = D / 2, all = T_ * D;
    float *tab = static_cast<float *>(a.tab);
    for (int64_t first = 0; first < all; first += TABLE_PART) {
        table_part part;
        const int count =
            (int)(all - first < (int64_t)TABLE_PART ? all - first : (int64_t)TABLE_PART);
        for (int k = 0; k < count; k += 2) {
            const int64_t t = (first + k) / 2 / half, i = (first + k) / 2 % half;
            const double power = hs_pow(a.base, 2.0 * (double)i / (double)D);
            part.x[k] = (float)hs_cos((double)t / power);
            part.x[k + 1] = (float)hs_sin((double)t / power);
        }
        float *to = tab + first;
        HS_TRY(HS_LAUNCH(rope_table_put, 1, TABLE_PART, stream, to, part, count));
    }
    return HS_OK;
}
HS_CUDA_OP(rope_table)

template <typename T, typename Args>
static hs_status turn(cudaStream_t stream, const Args &a, float sign) {
    const int64_t R = a.R, T_ = a.T, N = a.N, D = a.D, ldx = a.ldx;
    const int64_t packs = hs_ceil_div(D / 2, pack_of<T>::N);
    T *x = static_cast<T *>(a.x);
    const float *tab = static_cast<const float *>(a.tab);
    const int32_t *starts = static_cast<const int32_t *>(a.first);
    const bool wide = wide_at(x, ldx) && wide_at(x, D / 2) && wide_at(tab, D);
    return HS_LAUNCH(rope_turn, flat_blocks(R * N * packs), FLAT, stream, x, tab, starts, R, T_, N,
                     D, ldx, sign, packs, wide);
}

template <typename T> static hs_status rope_fwd_op(cudaStream_t stream, const hs_rope_fwd_args &a) {
    return turn<T>(stream, a, 1.0f);
}
HS_CUDA_OP(rope_fwd)

template <typename T>
static hs_status rope_igrad_op(cudaStream_t stream, const hs_rope_igrad_args &a) {
    return turn<T>(stream, a, -1.0f);
}
HS_CUDA_OP(rope_igrad)
