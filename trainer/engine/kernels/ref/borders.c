#include "kernels/borders.h"

#include "kernels/ref/ref_internal.h"

void hs_ref_borders(const hs_borders_args *a) {
    const int32_t *tok = a->tok;
    int32_t *first = a->first;
    for (int64_t b = 0; b < a->B; b++)
        for (int64_t t = 0, start = 0; t < a->T; t++) {
            first[b * a->T + t] = (int32_t)start;
            if (tok[b * a->T + t] == a->END) start = t + 1;
        }
}
