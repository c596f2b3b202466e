/* FP8 (quantise.h): the bits of the CPU set. Two launches: the largest magnitude of at most
 * HS_QUANTISE_PARTS parts of the matrix; then every block joins the parts, and turns a tile into
 * codes and their transpose. A largest number has no order, so nothing depends on the parts. */
#include "kernels/cuda/fp8.h"

#include "kernels/quantise.h"

enum {
    WARPS = FLAT / 32,
    AHEAD = 4, /* packs that a thread has under way */
    TILE = 128 /* rows and columns of a tile: a thread turns 4 times 16 numbers */
};

#ifdef HS_CUDA_EMULATED
HS_DEVICE uint32_t bytes_of(uint32_t a, uint32_t b, uint32_t select) {
    const uint64_t both = (uint64_t)b << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++)
        out |= (uint32_t)(both >> (select >> (4 * i) & 7) * 8 & 0xff) << 8 * i;
    return out;
}
#else
HS_DEVICE uint32_t bytes_of(uint32_t a, uint32_t b, uint32_t select) {
    return __byte_perm(a, b, select);
}
#endif

HS_DEVICE uint32_t larger(uint32_t a, uint32_t b) {
    return a > b ? a : b;
}

typedef uint32_t warp_words[WARPS];

/* The largest of the block's words, to all its threads. Magnitudes are ordered as their bits are:
 * a NaN is above infinity, infinity above all numbers. */
HS_DEVICE uint32_t largest_of_block(warp_words &each, uint32_t own) {
    for (int bits = 16; bits; bits /= 2) own = larger(own, __shfl_xor_sync(0xffffffffu, own, bits));
    if (threadIdx.x % 32 == 0) each[threadIdx.x / 32] = own;
    __syncthreads();
    for (int i = 0; i < WARPS; i++) own = larger(own, each[i]);
    return own;
}

/* A warp does a row at a time. */
template <typename T>
__global__ void __launch_bounds__(FLAT)
    quantise_parts(uint32_t *part, const T *x, int64_t R, int64_t C, int64_t ldx, bool wide) {
    const int N = pack_of<T>::N;
    HS_SHARED(warp_words, each, );
    uint32_t most = 0;
    const int64_t step = (int64_t)gridDim.x * WARPS;
    for (int64_t r = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32; r < R; r += step) {
        const T *row = x + r * ldx;
        for (int64_t c = threadIdx.x % 32 * N; c < C; c += AHEAD * 32 * N) {
            lanes<N> v[AHEAD];
#pragma unroll
            for (int a = 0; a < AHEAD; a++)
                v[a] = load<N>(row + c + a * 32 * N, C - c - a * 32 * N, wide);
#pragma unroll
            for (int a = 0; a < AHEAD; a++)
#pragma unroll
                for (int i = 0; i < N; i++) most = larger(most, bits_of(v[a].x[i]) & 0x7fffffffu);
        }
    }
    most = largest_of_block(each, most);
    if (threadIdx.x == 0) part[blockIdx.x] = most;
}

/* A tile of codes, a row 128 bytes, in words; the words of a row are mixed by its group of 16 rows,
 * so that neither way of reading it meets itself in a bank. */
typedef uint4 code_tile[TILE][TILE / 16];

HS_DEVICE void store16(uint8_t *to, uint4 codes, int64_t left, bool wide) {
    if (wide && left >= 16) {
        HS_ALIGNED16(to);
        put16(to, codes);
        return;
    }
    const uint32_t w[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int i = 0; i < 16; i++)
        if (i < left) to[i] = (uint8_t)(w[i / 4] >> 8 * (i % 4));
}

template <typename T>
__global__ void __launch_bounds__(FLAT)
    quantise_codes(uint8_t *q, uint8_t *qt, float *s, const T *x, const uint32_t *part, int parts,
                   int64_t R, int64_t C, int64_t ldx, bool e5m2, bool wide, bool wide_q,
                   bool wide_qt) {
    HS_SHARED(warp_words, each, );
    HS_SHARED(code_tile, tile, );
    const int64_t r0 = (int64_t)blockIdx.x * TILE, c0 = (int64_t)blockIdx.y * TILE;
    const int group = (int)threadIdx.x % 8, first = (int)threadIdx.x / 8;
    lanes<16> v[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int64_t r = r0 + first + 32 * i, c = c0 + 16 * group;
        v[i] = load<16>(x + r * ldx + c, r < R ? C - c : 0, wide);
    }
    uint32_t most = 0;
    for (int p = (int)threadIdx.x; p < parts; p += FLAT) most = larger(most, part[p]);
    most = largest_of_block(each, most);
    const bool finite = most < 0x7f800000u;
    const uint32_t scale = fp8_scale_bits(most, finite, e5m2);
    if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *s = __uint_as_float(scale);
    const float inverse = __uint_as_float(fp8_inverse_bits(scale));
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = first + 32 * i;
        const int64_t r = r0 + row, c = c0 + 16 * group;
#pragma unroll
        for (int j = 0; j < 16; j++) v[i].x[j] = v[i].x[j] * inverse;
        uint4 codes = fp8_codes(v[i], e5m2);
        /* all are NaN, whichever of its codes the device takes */
        if (!finite) codes = uint4{0x7f7f7f7fu, 0x7f7f7f7fu, 0x7f7f7f7fu, 0x7f7f7f7fu};
        tile[row][group ^ row / 16] = codes;
        if (r < R) store16(q + r * C + c, codes, C - c, wide_q);
    }
    if (!qt) return;
    __syncthreads();
    /* this thread's 16 rows of 4 columns, one word a row */
    const int rows = (int)threadIdx.x % 8 * 16, columns = (int)threadIdx.x / 8;
    const uint32_t *words = reinterpret_cast<const uint32_t *>(tile);
    uint32_t out[4][4];
#pragma unroll
    for (int g = 0; g < 4; g++) {
        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = rows + 4 * g + i;
            w[i] = words[row * (TILE / 4) + (columns ^ rows / 16 * 4)];
        }
        const uint32_t low01 = bytes_of(w[0], w[1], 0x5140), low23 = bytes_of(w[2], w[3], 0x5140);
        const uint32_t high01 = bytes_of(w[0], w[1], 0x7362);
        const uint32_t high23 = bytes_of(w[2], w[3], 0x7362);
        out[0][g] = bytes_of(low01, low23, 0x5410), out[1][g] = bytes_of(low01, low23, 0x7632);
        out[2][g] = bytes_of(high01, high23, 0x5410), out[3][g] = bytes_of(high01, high23, 0x7632);
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int64_t c = c0 + 4 * columns + j, r = r0 + rows;
        if (c < C)
            store16(qt + c * R + r, uint4{out[j][0], out[j][1], out[j][2], out[j][3]}, R - r,
                    wide_qt);
    }
}

template <typename T> static hs_status quantise_op(cudaStream_t stream, const hs_quantise_args &a) {
    const int64_t R = a.R, C = a.C, ldx = a.ldx;
    uint8_t *q = static_cast<uint8_t *>(a.q), *qt = static_cast<uint8_t *>(a.qt);
    float *s = static_cast<float *>(a.s);
    const T *x = static_cast<const T *>(a.x);
    uint32_t *part = static_cast<uint32_t *>(a.part);
    const bool wide = wide_at(x, ldx), e5m2 = a.E5M2 != 0;
    const int64_t rows = hs_ceil_div(R, WARPS);
    const int parts = (int)(rows < HS_QUANTISE_PARTS ? rows : HS_QUANTISE_PARTS);
    HS_TRY(HS_LAUNCH(quantise_parts, (unsigned)parts, FLAT, stream, part, x, R, C, ldx, wide));
    const dim3 grid((unsigned)hs_ceil_div(R, TILE), (unsigned)hs_ceil_div(C, TILE));
    return HS_LAUNCH(quantise_codes, grid, FLAT, stream, q, qt, s, x, part, parts, R, C, ldx, e5m2,
                     wide, wide_at(q, C), wide_at(qt, R));
}
HS_CUDA_OP(quantise)
