/* What the cores can do at this moment: independent chains of fused multiply-adds in registers. Built by
 * calibrate.py.
 *
 *   calibrate          a line "THREADS" of stdin: one JSON line of stdout with FLOP/s, {"fp32", "bf16"}
 *
 * bf16: pairs of bf16 products into fp32 (vdpbf16ps) where the CPU has them, else the fp32 figure, as
 * products are widened there. The most of REPEATS turns of about 20 ms; several threads by the wall clock,
 * from before the first one begins to after the last one ended.
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>

#include "../burn.h"

#define STEPS   4000000
#define REPEATS 3
#define MOST    256

static void *burn_fp32(void *unused) {
    (void)unused;
    burn_fma(STEPS);
    return NULL;
}

#ifdef __AVX512BF16__
#include <immintrin.h>
#define PER_STEP (4.0 * LANES * (CHAINS + 4)) /* their latency is longer */
#define DOTS(X)  CHAIN(X) X(12) X(13) X(14) X(15)
#define ZERO(c)  __m512 y##c = _mm512_set1_ps(16 * c);
#define DOT(c)   y##c = _mm512_dpbf16_ps(y##c, p, q);
#define SUM(c)   total = _mm512_add_ps(total, y##c);

static void *burn_bf16(void *unused) {
    (void)unused;
    const __m512bh p = (__m512bh)_mm512_set1_epi32(0x3a803a80),
                   q = (__m512bh)_mm512_set1_epi32(0x3a803a80);
    DOTS(ZERO)
    for (int64_t s = 0; s < STEPS; s++) {
        DOTS(DOT)
        __asm__ volatile("" ::: "memory");
    }
    __m512 total = _mm512_setzero_ps();
    DOTS(SUM)
    sink = _mm512_reduce_add_ps(total);
    return NULL;
}
#else
#define PER_STEP  (2.0 * LANES * CHAINS)
#define burn_bf16 burn_fp32
#endif

static double most(int threads, void *(*burn)(void *), double operations) {
    double best = 0;
    for (int r = 0; r < REPEATS; r++) {
        pthread_t others[MOST];
        const double began = now(threads);
        for (int t = 1; t < threads; t++)
            if (pthread_create(&others[t], NULL, burn, NULL)) return 0;
        burn(NULL);
        for (int t = 1; t < threads; t++) pthread_join(others[t], NULL);
        const double rate = operations * threads / (now(threads) - began);
        if (rate > best) best = rate;
    }
    return best;
}

int main(void) {
    int threads;
    while (scanf("%d", &threads) == 1 && threads >= 1 && threads <= MOST) {
        printf("{\"fp32\": %.6g, \"bf16\": %.6g}\n",
               most(threads, burn_fp32, 2.0 * LANES * CHAINS * STEPS),
               most(threads, burn_bf16, PER_STEP * STEPS));
        fflush(stdout);
    }
    return 0;
}
