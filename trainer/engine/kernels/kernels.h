/* The seam of the kernels: one table of functions a set (ref, and the fast set compiled for three
 * instruction sets), indexed by HS_K_* of wire/kernels.h, which fixes operands, dims and reals.
 * kernels/<op>.h says what an op computes and in which order the sums are taken.
 *
 * A kernel writes only the operands that wire/kernels.h marks as outputs, touches no byte outside
 * the extents below, allocates nothing, keeps nothing between calls, and never fails for a call
 * that hs_kernel_extent accepts. Operands do not overlap except where the table says "in place" or
 * "may be".
 */
#ifndef HS_KERNELS_KERNELS_H
#define HS_KERNELS_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/status.h"
#include "wire/kernels.h"

struct hs_pool;

/* One call: wire/plan.h's hs_plan_call with addresses in place of references. An absent operand is
 * NULL. */
typedef struct hs_args {
    void *ptr[HS_CALL_PTRS];
    int64_t dim[HS_CALL_DIMS];
    double real[HS_CALL_REALS];
    uint32_t dtype; /* HS_F32, HS_BF16, or HS_F64 (ref only) */
} hs_args;

/* What a rank lends to its kernels; one call at a time. */
typedef struct hs_kernel_ctx {
    struct hs_pool *pool; /* NULL: this thread alone */
    void *scratch;        /* hs_kernels_scratch_bytes(threads), 64-byte aligned; ref needs none */
    size_t scratch_bytes;
} hs_kernel_ctx;

typedef hs_status (*hs_kernel_fn)(hs_kernel_ctx *ctx, const hs_args *args);

typedef struct hs_kernel_set {
    const char *name;
    hs_kernel_fn fn[HS_K_COUNT]; /* [0] is NULL; all others are set */
} hs_kernel_set;

extern const hs_kernel_set hs_kernels_ref; /* the oracle: double inside, any dtype, one thread */
extern const hs_kernel_set
    hs_kernels_portable; /* the fast set in plain C; same bits as the two below */
extern const hs_kernel_set hs_kernels_avx2;   /* AVX2 and FMA */
extern const hs_kernel_set hs_kernels_avx512; /* AVX-512 F, BW, DQ, VL */

/* hs_attempt.kernel_path (wire/attempt.h) to a set: 0 the best that this CPU runs, 1 ref, 2
 * portable, 3 avx2, 4 avx512. NULL: the CPU lacks it, or no such path. */
const hs_kernel_set *hs_kernels_pick(uint32_t path);

/* Workspace that every kernel of every set fits in, for each call, with this many threads. */
size_t hs_kernels_scratch_bytes(int threads);

/* Bytes that a call may touch from the start of one operand on (operand: 0 .. pointers-1 of the
 * table). Also checks the dims themselves: HS_OK only for a call that the kernels can run.
 * HS_E_CONFIG: no such kernel, dtype or operand, or a dim out of range; HS_E_OVERFLOW: beyond
 * int64. */
hs_status hs_kernel_extent(uint16_t kernel, uint16_t dtype, const int64_t dim[], int operand,
                           uint64_t *bytes);

/* True for operands that may be absent ("?" in the table). */
bool hs_kernel_operand_optional(uint16_t kernel, int operand);

#endif
