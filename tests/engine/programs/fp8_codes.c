/* kernels/cpu/vec_fp8.h for the tests, built for each instruction set with -DHS_PATH=. n is a
 * multiple of 16. */
#include "kernels/cpu/vec.h"
#include "kernels/cpu/vec_fp8.h"

void fp8_codes(const float *x, uint8_t *codes, int64_t n, int e5m2);
void fp8_values(const uint8_t *codes, float *x, int64_t n, int e5m2);

void fp8_codes(const float *x, uint8_t *codes, int64_t n, int e5m2) {
    for (int64_t i = 0; i < n; i += LANES)
        vi_store_bytes(codes + i, e5m2 ? v_fp8(v_load(x + i), 1) : v_fp8(v_load(x + i), 0));
}

void fp8_values(const uint8_t *codes, float *x, int64_t n, int e5m2) {
    for (int64_t i = 0; i < n; i += LANES)
        v_store(x + i, e5m2 ? v_from_fp8(vi_load_bytes(codes + i), 1)
                            : v_from_fp8(vi_load_bytes(codes + i), 0));
}
