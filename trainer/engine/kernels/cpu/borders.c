/* Where documents begin: a pass over a sequence, too short a work to be shared. */
#include "kernels/borders.h"

#include "kernels/args.h"

static void borders_op(hs_kernel_ctx *ctx, hs_borders_args *a) {
    const int32_t *tok = a->tok;
    int32_t *first = a->first;
    (void)ctx;
    for (int64_t b = 0; b < a->B; b++)
        for (int64_t t = 0, start = 0; t < a->T; t++) {
            first[b * a->T + t] = (int32_t)start;
            if (tok[b * a->T + t] == a->END) start = t + 1;
        }
}
