/* The seam of the kernels: one table of functions a set (ref, and the fast set compiled for four
 * instruction sets), indexed by HS_K_* of wire/kernels.h, which fixes operands, dims and reals.
 * kernels/<op>.h says what an op computes and in which order the sums are taken.
 *
 * A kernel writes only the operands that wire/kernels.h says it writes, touches no byte outside
 * the extents below, allocates nothing, keeps nothing between calls but what waits in
 * hs_kernel_ctx.deferred, and never fails for a call that hs_kernel_extent accepts. What it writes overlaps no other operand except where the table
 * says MAY_BE.
 */
#ifndef HS_KERNELS_KERNELS_H
#define HS_KERNELS_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/status.h"
#include "wire/kernels.h"

struct hs_deferred;
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
    struct hs_deferred *deferred; /* what may wait (kernels/deferred.h); NULL: nothing does */
} hs_kernel_ctx;

typedef hs_status (*hs_kernel_fn)(hs_kernel_ctx *ctx, const hs_args *args);

typedef struct hs_kernel_set {
    const char *name;
    hs_kernel_fn fn[HS_K_COUNT]; /* [0] is NULL; all others are set */
} hs_kernel_set;

extern const hs_kernel_set hs_kernels_ref; /* the oracle: double inside, any dtype, one thread */
extern const hs_kernel_set
    hs_kernels_portable;                    /* the fast set in plain C; same bits as those below */
extern const hs_kernel_set hs_kernels_avx2; /* AVX2 and FMA */
extern const hs_kernel_set hs_kernels_avx512;      /* AVX-512 F, BW, DQ, VL */
extern const hs_kernel_set hs_kernels_avx512_bf16; /* and BF16 */
extern const hs_kernel_set hs_kernels_neon;        /* arm64 */

/* HS_PATH_* to its set on this CPU. HS_E_UNSUPPORTED: the CPU lacks it, it is one of CUDA devices, or
 * there is no such path; why names what to choose instead. */
hs_status hs_kernels_pick(uint32_t path, const hs_kernel_set **set, hs_why *why);
/* As launch.kernel_path has it; "?" where there is no such path. */
const char *hs_kernel_path_name(uint32_t path);
/* Whether it is a path of CUDA devices. */
bool hs_kernel_path_is_cuda(uint32_t path);

/* Workspace that every kernel of every set fits in, for each call, with this many threads. */
size_t hs_kernels_scratch_bytes(int threads);

/* What the table of wire/kernels.h says of an operand and of a kernel. */
typedef enum hs_role { HS_ROLE_READ = 1, HS_ROLE_WRITE, HS_ROLE_UPDATE, HS_ROLE_SCRATCH } hs_role;
typedef enum hs_kind {
    HS_KIND_DT = 1,
    HS_KIND_ACC,
    HS_KIND_F64,
    HS_KIND_BYTE,
    HS_KIND_TOKENS,
    HS_KIND_TARGETS,
    HS_KIND_CONTROL,
    HS_KIND_PLACES
} hs_kind;

typedef struct hs_operand {
    const char *name;
    const char *rows, *columns, *ld; /* of names in the kernel's dims */
    const char *below;               /* TOKENS, TARGETS: the dim that bounds them */
    const char *may_be;              /* the operand that it may be; NULL: none */
    const char *with; /* the operand where that is absent it may be too; NULL: none */
    hs_role role;
    hs_kind kind;
    bool optional;
} hs_operand;

typedef struct hs_kernel_facts {
    const char *name;
    const char *dims, *reals;                 /* their names, ", " between two */
    const char *one_or_zero;                  /* the dim that is a switch; "": none */
    const char *holds;                        /* of dims, beside that */
    int sizes;                                /* dims from the first on that are above 0 */
    uint16_t input_gradient, weight_gradient; /* HS_K_*; HS_K_NONE: it has none */
    const char *passes;                       /* the operand whose gradient is the output's; "" */
    const char *products, *again, *each;      /* of a call's work */
    int operand_count;
    const hs_operand *operands;
} hs_kernel_facts;

/* What a call does: multiply-adds of the mathematics' matrix products, of products computed again,
 * and other operations. */
typedef struct hs_work {
    int64_t products, again, each;
} hs_work;

/* NULL: no such kernel. */
const hs_kernel_facts *hs_kernel_facts_of(uint32_t kernel);

/* What a call of a kernel does. HS_E_OVERFLOW: beyond int64. The dims must be valid. */
hs_status hs_kernel_work(uint16_t kernel, const int64_t dim[], hs_work *work);

/* How many names a list of the facts holds. */
int hs_kernel_names(const char *names);

/* The value of the dim of that name; 0 where the kernel has none. */
int64_t hs_kernel_dim(const hs_kernel_facts *facts, const int64_t dim[], const char *name);

/* Bytes that an operand of a call may touch from its start on. Also checks the dims themselves:
 * HS_OK only for a call that the kernels can run. HS_E_CONFIG: no such kernel, dtype or operand, or
 * a dim out of range; HS_E_OVERFLOW: beyond int64. */
hs_status hs_kernel_extent(uint16_t kernel, uint16_t dtype, const int64_t dim[], int operand,
                           uint64_t *bytes);

/* An operand's bytes that a kernel touches: `count` equal pieces of `bytes`, each `stride` after the last. */
typedef struct hs_pieces {
    int64_t count, bytes, stride;
} hs_pieces;

/* The same bytes without what lies between rows. Fails as hs_kernel_extent does. */
hs_status hs_kernel_pieces(uint16_t kernel, uint16_t dtype, const int64_t dim[], int operand,
                           hs_pieces *out);

/* What an operand's start must be a multiple of, in bytes. */
uint64_t hs_operand_alignment(const hs_operand *operand, uint16_t dtype);

/* Whether two operands of a call that starts them at byte at_a and at_b of one memory share memory
 * that the kernel touches in both, against the table: one of them is written, and they are not the
 * same memory where MAY_BE allows it. Rows of equal distance are compared exactly (columns of one
 * buffer do not overlap); of different distances, whole. The extents must hold and lie below 2^62.
 */
bool hs_kernel_clash(uint16_t kernel, uint16_t dtype, const int64_t dim[], int a, uint64_t at_a,
                     int b, uint64_t at_b);

#endif
