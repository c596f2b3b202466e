/* Calls whose work waits. AdamW moves much memory and computes little, products the other way round: so a
 * kernel set may leave an AdamW call here, and products do it a slice at a time between their tiles,
 * having asked for its memory meanwhile (kernels/cpu/gemm.h). What is left of a call is done when another
 * call, the host or a peer comes to its bytes.
 *
 *   D1  Who reads or writes bytes that a waiting call touches has it finished first: `before` a kernel's
 *       call, `settle` for all others. A waiting call touches nothing that another one does.
 *   D2  The work is elementwise: which thread does a slice, when, and beside what, does not show in a bit.
 *   D3  Each thread of the pool has a part of every call, from which it alone takes slices, in order; one
 *       that it has taken it has done when the pool's loop ends. So between loops what a part has left is
 *       from its next item on.
 *
 * Of a table of embeddings the rows that are looked up are done ahead, and the rest waits for the head.
 *
 * One thread calls all but take and do, while no loop of the pool runs. Nothing allocates after create.
 */
#ifndef HS_KERNELS_DEFERRED_H
#define HS_KERNELS_DEFERRED_H

#include <stdbool.h>
#include <stdint.h>

#include "core/threads.h"
#include "kernels/kernels.h"

typedef struct hs_deferred hs_deferred;

enum {
    HS_DEFERRED_CALLS = 512,
    HS_DEFERRED_JOB = 256,   /* bytes */
    HS_DEFERRED_RANGES = 5,  /* operands of a call; */
    HS_DEFERRED_READS = 4,   /* the first of them are read */
    HS_DEFERRED_ITEM = 1024, /* elements */
    HS_DEFERRED_SLICE =
        4, /* items that are done at once: what they read fits the second-level cache */
    HS_DEFERRED_ROWS = 1 << 20, /* items of a table of embeddings */
};

typedef struct hs_deferred_range {
    const uint8_t *at; /* NULL: none */
    uint32_t element;  /* bytes; each range of a call has as many elements */
} hs_deferred_range;

typedef struct hs_deferred_call {
    hs_range_fn fn; /* does items [begin, end) of job */
    _Alignas(16) uint8_t job[HS_DEFERRED_JOB];
    int64_t elements;
    hs_deferred_range touches[HS_DEFERRED_RANGES];
} hs_deferred_call;

/* For a pool of so many threads. NULL: no memory. */
hs_deferred *hs_deferred_create(int threads);
void hs_deferred_destroy(hs_deferred *deferred); /* drops what waits; NULL is fine */

/* The call, which is copied, waits. False: there is no room, or `deferred` is NULL. */
bool hs_deferred_leave(hs_deferred *deferred, const hs_deferred_call *call);

/* Whether no call waits. */
bool hs_deferred_none(const hs_deferred *deferred);

/* Finishes the calls that touch these bytes (UINT64_MAX: all calls), on all of the pool's threads. */
void hs_deferred_settle(hs_deferred *deferred, hs_pool *pool, const void *at, uint64_t bytes);
/* The same for the operands of a kernel's call. */
void hs_deferred_before(hs_deferred *deferred, hs_pool *pool, uint16_t kernel, const hs_args *args);

typedef struct hs_deferred_slice {
    hs_deferred_call *call; /* NULL: there is none */
    int64_t begin, end;     /* items */
} hs_deferred_slice;

/* The worker's next slice, to be done by hs_deferred_do in the same loop (D3). */
hs_deferred_slice hs_deferred_take(hs_deferred *deferred, int worker);
void hs_deferred_do(hs_deferred *deferred, const hs_deferred_slice *slice, int worker);

#endif
