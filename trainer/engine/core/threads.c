/* The pool: a generation number that the caller bumps to start a loop, and a count of workers still
 * busy.
 *
 * I1  generation is bumped only when busy is 0, so the job fields are written while nobody reads
 *     them.
 * I2  a worker runs each generation exactly once, then takes one from busy.
 * I3  whoever sleeps on a word has announced it (sleepers, waiting) before it looks at the word a
 *     last time, and whoever changes the word looks at the announcement afterwards (both seq_cst):
 *     no wake-up is lost.
 */
#include "core/threads.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SPINS 4000

typedef struct worker {
    hs_pool *pool;
    int number;
    pthread_t thread;
} worker;

struct hs_pool {
    /* each group of words on a cache line of its own */
    _Alignas(64) _Atomic uint32_t generation; /* futex word */
    _Alignas(64) _Atomic uint32_t busy;       /* futex word */
    _Alignas(64) _Atomic uint32_t sleepers;
    _Atomic uint32_t waiting;
    _Alignas(64) hs_range_fn fn;
    void *ctx;
    int64_t items;
    int threads, started;
    int quit;
    worker workers[];
};

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void futex_wait(_Atomic uint32_t *word, uint32_t seen) {
    /* returns at once where *word != seen; spurious returns are fine, callers look again */
    syscall(SYS_futex, (void *)word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word, int count) {
    syscall(SYS_futex, (void *)word, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
}

static void run_range(const hs_pool *pool, int number) {
    int64_t each = pool->items / pool->threads, more = pool->items % pool->threads;
    int64_t begin = each * number + (number < more ? number : more);
    int64_t end = begin + each + (number < more);
    if (begin < end) pool->fn(pool->ctx, begin, end, number);
}

static uint32_t wait_generation(hs_pool *pool, uint32_t seen) {
    for (int i = 0; i < SPINS; i++) {
        uint32_t now = atomic_load_explicit(&pool->generation, memory_order_acquire);
        if (now != seen) return now;
        relax();
    }
    atomic_fetch_add(&pool->sleepers, 1);
    uint32_t now;
    while ((now = atomic_load(&pool->generation)) == seen) futex_wait(&pool->generation, seen);
    atomic_fetch_sub(&pool->sleepers, 1);
    return now;
}

static void *worker_main(void *arg) {
    worker *self = arg;
    hs_pool *pool = self->pool;
    uint32_t seen = 0;
    for (;;) {
        seen = wait_generation(pool, seen);
        if (pool->quit) return NULL;
        run_range(pool, self->number);
        if (atomic_fetch_sub(&pool->busy, 1) == 1 && atomic_load(&pool->waiting))
            futex_wake(&pool->busy, 1);
    }
}

static void start(hs_pool *pool) {
    atomic_store(&pool->busy, (uint32_t)pool->started);
    atomic_fetch_add(&pool->generation, 1);
    if (atomic_load(&pool->sleepers)) futex_wake(&pool->generation, pool->started);
}

static void wait_idle(hs_pool *pool) {
    for (int i = 0; i < SPINS; i++) {
        if (!atomic_load_explicit(&pool->busy, memory_order_acquire)) return;
        relax();
    }
    atomic_store(&pool->waiting, 1);
    uint32_t left;
    while ((left = atomic_load(&pool->busy)) != 0) futex_wait(&pool->busy, left);
    atomic_store(&pool->waiting, 0);
}

hs_status hs_pool_create(int threads, hs_pool **out) {
    *out = NULL;
    if (threads < 1 || threads > HS_POOL_MAX_THREADS) return HS_E_CONFIG;
    size_t bytes = sizeof(hs_pool) + (size_t)(threads - 1) * sizeof(worker);
    hs_pool *pool = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!pool) return HS_E_MEMORY;
    *pool = (hs_pool){.threads = threads};
    for (int i = 1; i < threads; i++) {
        worker *w = &pool->workers[i - 1];
        *w = (worker){.pool = pool, .number = i};
        if (pthread_create(&w->thread, NULL, worker_main, w) != 0) {
            hs_pool_destroy(pool);
            return HS_E_MEMORY;
        }
        pool->started++;
    }
    *out = pool;
    return HS_OK;
}

void hs_pool_destroy(hs_pool *pool) {
    if (!pool) return;
    pool->quit = 1;
    start(pool);
    for (int i = 0; i < pool->started; i++) pthread_join(pool->workers[i].thread, NULL);
    free(pool);
}

int hs_pool_threads(const hs_pool *pool) {
    return pool ? pool->threads : 1;
}

void hs_parallel_for(hs_pool *pool, int64_t items, hs_range_fn fn, void *ctx) {
    if (items <= 0) return;
    if (!pool || pool->threads == 1 || items == 1) {
        fn(ctx, 0, items, 0);
        return;
    }
    pool->fn = fn;
    pool->ctx = ctx;
    pool->items = items;
    start(pool);
    run_range(pool, 0);
    wait_idle(pool);
}
