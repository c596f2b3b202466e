#include "kernels/delay.h"

static void delay_op(hs_kernel_ctx *ctx, const hs_delay_args *a) {
    (void)ctx;
    hs_delay_ns(a->NS);
}
