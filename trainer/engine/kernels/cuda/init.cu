/* Initial values: a thread makes the four normals of one Philox block (core/rng.h). Bits of the
 * fast CPU set (kernels/cpu/init.c): the same words, Box-Muller in f32 with the same functions. */
#include "kernels/cuda/lane.h"

#include "kernels/init.h"

/* HS_RNG_USE_INIT and hs_rng_make_key of core/rng.h, whose functions nvcc takes for the host's. */
static void init_key(uint64_t seed, uint32_t tensor, uint32_t *k0, uint32_t *k1) {
    *k0 = (uint32_t)seed ^ tensor * 0x9E3779B9u;
    *k1 = (uint32_t)(seed >> 32) ^ 1u;
}

HS_DEVICE void box_muller(uint32_t a, uint32_t b, float *even, float *odd) {
    float f, e, s, c;
    v_log_split(v_from_u32(a + 1) * 0x1p-32f, &f, &e);
    const float from_one = v_from_u32(a ^ 0xffffffffu) * -0x1p-32f;
    const float far = v_from_u32(a), limit = 0x1.6a09e6p+31f; /* sqrt(1/2) 2^32 */
    f = v_select_lt(far, limit, f, from_one);
    e = v_select_lt(far, limit, e, 0.0f);
    const float r = v_sqrt(-2.0f * v_log_core(f, e));
    v_sincos_turn(b, &s, &c);
    *even = r * c;
    *odd = r * s;
}

__global__ void __launch_bounds__(FLAT)
    init_normal(float *w, int64_t n, uint32_t k0, uint32_t k1, float mean, float std, bool wide) {
    const int64_t quad = flat_index(), at = 4 * quad;
    if (at >= n) return;
    uint32_t c0 = (uint32_t)quad, c1 = (uint32_t)((uint64_t)quad >> 32), c2 = 0, c3 = 0;
    for (int round = 0; round < 10; round++) {
        const uint32_t ah = __umulhi(0xD2511F53u, c0), al = 0xD2511F53u * c0;
        const uint32_t bh = __umulhi(0xCD9E8D57u, c2), bl = 0xCD9E8D57u * c2;
        c0 = bh ^ c1 ^ k0;
        c2 = ah ^ c3 ^ k1;
        c1 = bl;
        c3 = al;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    lanes<4> x;
    box_muller(c0, c1, &x.x[0], &x.x[1]);
    box_muller(c2, c3, &x.x[2], &x.x[3]);
    for (int i = 0; i < 4; i++) x.x[i] = v_fma(x.x[i], std, mean);
    store(w + at, x, n - at, wide);
}

__global__ void __launch_bounds__(FLAT) init_const(float *w, int64_t n, float value, bool wide) {
    const int64_t at = flat_index() * 4;
    if (at >= n) return;
    store(w + at, lanes<4>{{value, value, value, value}}, n - at, wide);
}

template <typename T>
static hs_status init_normal_op(cudaStream_t stream, const hs_init_normal_args &a) {
    const int64_t n = a.n, TENSOR = a.TENSOR, SEED = a.SEED;
    float *w = static_cast<float *>(a.w);
    uint32_t k0, k1;
    init_key((uint64_t)SEED, (uint32_t)TENSOR, &k0, &k1);
    return HS_LAUNCH(init_normal, flat_blocks(hs_ceil_div(n, 4)), FLAT, stream, w, n, k0, k1,
                     (float)a.mean, (float)a.std, wide_at(w));
}
HS_CUDA_OP(init_normal)

template <typename T>
static hs_status init_const_op(cudaStream_t stream, const hs_init_const_args &a) {
    const int64_t n = a.n;
    float *w = static_cast<float *>(a.w);
    return HS_LAUNCH(init_const, flat_blocks(hs_ceil_div(n, 4)), FLAT, stream, w, n, (float)a.value,
                     wide_at(w));
}
HS_CUDA_OP(init_const)
