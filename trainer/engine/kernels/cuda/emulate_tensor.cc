/* What a warp's tensor cores do, behind tensor.h: layouts as the PTX manual gives them. */
#include "kernels/cuda/tensor.h"

namespace hs_emulated {

extern uint64_t conflicts, products;

static float half_of(uint32_t pair, int i) {
    return __uint_as_float(i ? pair & 0xffff0000u : pair << 16);
}

void mma_bf16(void *const *lanes) {
    float a[16][16], b[16][8];
    products++;
    for (int lane = 0; lane < 32; lane++) {
        const mma_record *r = static_cast<const mma_record *>(lanes[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 8; i++)
            a[g + (i / 2 % 2 ? 8 : 0)][2 * t + i % 2 + (i < 4 ? 0 : 8)] =
                half_of(r->a[i / 2], i % 2);
        for (int i = 0; i < 4; i++)
            b[2 * t + i % 2 + (i < 2 ? 0 : 8)][g] = half_of(r->b[i / 2], i % 2);
    }
    for (int lane = 0; lane < 32; lane++) {
        const mma_record *r = static_cast<const mma_record *>(lanes[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; i++) {
            const int row = g + (i < 2 ? 0 : 8), column = 2 * t + i % 2;
            float sum = r->c[i];
            for (int k = 0; k < 16; k++) sum = sum + a[row][k] * b[k][column]; /* exact products */
            r->c[i] = sum;
        }
    }
}

void ldmatrix(void *const *lanes) {
    const ldmatrix_record *first = static_cast<const ldmatrix_record *>(lanes[0]);
    bool conflict = false;
    for (int m = 0; m < first->count; m++) {
        uint16_t x[8][8];
        unsigned banks = 0;
        for (int row = 0; row < 8; row++) {
            const void *at = static_cast<const ldmatrix_record *>(lanes[8 * m + row])->row;
            memcpy(x[row], at, 16);
            banks |= 1u << reinterpret_cast<uintptr_t>(at) / 16 % 8;
        }
        conflict |= banks != 0xff;
        for (int lane = 0; lane < 32; lane++) {
            const ldmatrix_record *r = static_cast<const ldmatrix_record *>(lanes[lane]);
            const int g = lane / 4, t = lane % 4;
            const uint16_t low = r->trans ? x[2 * t][g] : x[g][2 * t];
            const uint16_t high = r->trans ? x[2 * t + 1][g] : x[g][2 * t + 1];
            r->to[m] = (uint32_t)high << 16 | low;
        }
    }
    conflicts += conflict;
}

} // namespace hs_emulated
