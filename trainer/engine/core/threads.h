/* A pool of threads that share one loop at a time.
 *
 * hs_parallel_for splits [0, items) into hs_pool_threads(pool) consecutive ranges that depend on
 * items and the number of threads only (the first items % threads ranges are one longer) and calls
 * fn once for each range that is not empty. The caller is worker 0 and returns when all ranges are
 * done: what workers wrote is then visible to it. Kernels split outputs only, so results never
 * depend on the number of threads.
 *
 * A worker spins for about 20 us after a loop, then sleeps on a futex. A pool of one thread creates
 * none. One loop at a time per pool, started by one thread; fn must not start another one. Nothing
 * allocates after hs_pool_create. A NULL pool stands for this thread alone.
 */
#ifndef HS_CORE_THREADS_H
#define HS_CORE_THREADS_H

#include <stdint.h>

#include "core/status.h"

#define HS_POOL_MAX_THREADS 256 /* HS_THREADS_MAX of wire/plan.h */

typedef struct hs_pool hs_pool;

/* Does items [begin, end); worker in [0, threads) is this call's own number, e.g. to pick its
 * scratch. */
typedef void (*hs_range_fn)(void *ctx, int64_t begin, int64_t end, int worker);

/* Starts threads - 1 workers. HS_E_CONFIG where threads is not in [1, HS_POOL_MAX_THREADS],
 * HS_E_MEMORY where the system has no room for another thread; *pool is then NULL. */
hs_status hs_pool_create(int threads, hs_pool **pool);

/* Joins the workers. NULL is allowed. */
void hs_pool_destroy(hs_pool *pool);

/* Threads of the pool, the caller included; 1 for NULL. */
int hs_pool_threads(const hs_pool *pool);

void hs_parallel_for(hs_pool *pool, int64_t items, hs_range_fn fn, void *ctx);

#endif
