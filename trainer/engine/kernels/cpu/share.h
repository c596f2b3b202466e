/* How the fast kernels cut their outputs among the threads. Cuts never show in a result: every
 * output element has one owner and its sums run in the order of its contract. */
#ifndef HS_KERNELS_CPU_SHARE_H
#define HS_KERNELS_CPU_SHARE_H

#include "core/ints.h"
#include "core/threads.h"
#include "kernels/args.h"

/* Below this many elements a loop is not worth waking threads for. */
#define SHARE_FROM 16384

/* fn over rows of `width` elements each */
static inline void share_rows(hs_kernel_ctx *ctx, int64_t rows, int64_t width, hs_range_fn fn,
                              void *job) {
    hs_parallel_for(rows * width < SHARE_FROM ? NULL : ctx->pool, rows, fn, job);
}

/* Columns and flat arrays are cut on borders of this many elements. */
#define SHARE_COLUMNS 64
#define SHARE_FLAT    4096

/* Sums down columns take so many rows at a time. */
#define SHARE_ROWS 4

/* fn over blocks of SHARE_COLUMNS columns of `rows` rows */
static inline void share_columns(hs_kernel_ctx *ctx, int64_t rows, int64_t columns, hs_range_fn fn,
                                 void *job) {
    hs_parallel_for(rows * columns < SHARE_FROM ? NULL : ctx->pool,
                    hs_ceil_div(columns, SHARE_COLUMNS), fn, job);
}

/* fn over blocks of SHARE_FLAT elements */
static inline void share_flat(hs_kernel_ctx *ctx, int64_t n, hs_range_fn fn, void *job) {
    hs_parallel_for(n < SHARE_FROM ? NULL : ctx->pool, hs_ceil_div(n, SHARE_FLAT), fn, job);
}

#endif
