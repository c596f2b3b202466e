/* What a rank asks of its machine before it trusts it with a step: that every thread's core
 * computes a matrix product to the bit, and that memory gives back what was written to it. Takes
 * tens of milliseconds. What passes a link is checked frame by frame (comm/). */
#ifndef HS_BACKEND_CHECK_H
#define HS_BACKEND_CHECK_H

#include "core/arena.h"
#include "core/threads.h"
#include "kernels/kernels.h"

typedef struct hs_check {
    double gflops; /* fp32 product of the slowest thread */
    int64_t us;    /* what the whole check took */
} hs_check;

/* The arena must be zero, and is afterwards. HS_E_SICK names the thread and the CPU, or the
 * address, what was expected and what came; HS_E_MEMORY where there is no room for the product. */
hs_status hs_check_machine(const hs_kernel_set *set, hs_pool *pool, const hs_arena *arena,
                           hs_check *check, hs_why *why);

#endif
