/* A race in every kernel that shares its work out: linked with --wrap=hs_parallel_for, it makes each worker's range begin
 * one item early, so that two threads write what lies at the border. What looks for races must find it.
 */
#include "core/threads.h"

void __real_hs_parallel_for(hs_pool *pool, int64_t items, hs_range_fn fn, void *ctx);
void __wrap_hs_parallel_for(hs_pool *pool, int64_t items, hs_range_fn fn, void *ctx);

typedef struct sound {
    hs_range_fn fn;
    void *ctx;
} sound;

static void overlapping(void *ctx, int64_t begin, int64_t end, int worker) {
    const sound *s = ctx;
    s->fn(s->ctx, begin - (begin > 0), end, worker);
}

void __wrap_hs_parallel_for(hs_pool *pool, int64_t items, hs_range_fn fn, void *ctx) {
    sound s = {fn, ctx};
    __real_hs_parallel_for(pool, items, overlapping, &s);
}
