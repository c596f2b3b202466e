#include "kernels/deferred.h"

#include <stdatomic.h>
#include <stdlib.h>

#include "core/ints.h"
#include "kernels/args.h"

/* What a thread of the pool does itself; on cache lines of its own. */
typedef struct part {
    int64_t next[HS_DEFERRED_CALLS]; /* item, by call */
    _Alignas(64) int first;          /* of the calls, that may have something left */
} part;

struct hs_deferred {
    int threads, count;
    hs_deferred_call calls[HS_DEFERRED_CALLS];
    bool open[HS_DEFERRED_CALLS];                 /* not finished */
    int rows;                                     /* the call that has items done ahead; -1: none */
    _Atomic uint64_t done[HS_DEFERRED_ROWS / 64]; /* its items */
    part parts[];
};

hs_deferred *hs_deferred_create(int threads) {
    const size_t bytes = sizeof(hs_deferred) + (size_t)threads * sizeof(part);
    hs_deferred *d = aligned_alloc(_Alignof(part), (bytes + 63) / 64 * 64);
    if (!d) return NULL;
    memset(d, 0, bytes);
    d->threads = threads;
    d->rows = -1;
    return d;
}

void hs_deferred_destroy(hs_deferred *d) {
    free(d);
}

bool hs_deferred_none(const hs_deferred *d) {
    return d->count == 0;
}

static int64_t items_of(const hs_deferred_call *call) {
    return hs_ceil_div(call->elements, HS_DEFERRED_ITEM);
}

/* Where a worker's part of a call begins, and where it ends. */
static int64_t begin_of(const hs_deferred *d, const hs_deferred_call *call, int worker) {
    return items_of(call) * worker / d->threads;
}

static int64_t end_of(const hs_deferred *d, const hs_deferred_call *call, int worker) {
    return begin_of(d, call, worker + 1);
}

bool hs_deferred_leave(hs_deferred *d, const hs_deferred_call *call) {
    if (!d || d->count == HS_DEFERRED_CALLS) return false;
    const int number = d->count++;
    d->calls[number] = *call;
    d->open[number] = true;
    for (int w = 0; w < d->threads; w++) {
        d->parts[w].next[number] = begin_of(d, call, w);
        d->parts[w].first = number < d->parts[w].first ? number : d->parts[w].first;
    }
    return true;
}

/* --- slices beside products --------------------------------------------------------------- */

hs_deferred_slice hs_deferred_take(hs_deferred *d, int worker) {
    part *mine = &d->parts[worker];
    for (; mine->first < d->count; mine->first++) {
        hs_deferred_call *call = &d->calls[mine->first];
        const int64_t begin = mine->next[mine->first], end = end_of(d, call, worker);
        if (!d->open[mine->first] || begin >= end) continue;
        const int64_t next = hs_min(end, begin + HS_DEFERRED_SLICE);
        mine->next[mine->first] = next;
        return (hs_deferred_slice){call, begin, next};
    }
    return (hs_deferred_slice){0};
}

/* Whether nobody did that item ahead; then the caller does it. */
static bool take_ahead(hs_deferred *d, int64_t item) {
    const uint64_t bit = UINT64_C(1) << (item % 64);
    return !(atomic_fetch_or_explicit(&d->done[item / 64], bit, memory_order_relaxed) & bit);
}

void hs_deferred_do(hs_deferred *d, const hs_deferred_slice *slice, int worker) {
    hs_deferred_call *call = slice->call;
    if (call - d->calls != d->rows) {
        call->fn(call->job, slice->begin, slice->end, worker);
        return;
    }
    for (int64_t i = slice->begin; i < slice->end; i++)
        if (take_ahead(d, i)) call->fn(call->job, i, i + 1, worker);
}

/* --- finishing ---------------------------------------------------------------------------- */

typedef struct rest {
    hs_deferred *deferred;
    int number;
} rest;

static void rest_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const rest *r = ctx;
    hs_deferred *d = r->deferred;
    for (int w = (int)begin; w < end; w++) {
        hs_deferred_slice slice = {&d->calls[r->number], d->parts[w].next[r->number], 0};
        slice.end = end_of(d, slice.call, w);
        if (slice.begin < slice.end) hs_deferred_do(d, &slice, worker);
    }
}

static void finish(hs_deferred *d, hs_pool *pool, int number) {
    rest r = {d, number};
    hs_parallel_for(pool, d->threads, rest_range, &r);
    d->open[number] = false;
    if (d->rows == number) d->rows = -1;
    while (d->count > 0 && !d->open[d->count - 1]) d->count--;
}

/* The first of a call's ranges that these bytes meet; NULL: none. */
static const hs_deferred_range *met(const hs_deferred_call *call, const uint8_t *at,
                                    uint64_t bytes) {
    for (int i = 0; i < HS_DEFERRED_RANGES; i++) {
        const hs_deferred_range *r = &call->touches[i];
        const uint64_t size = (uint64_t)call->elements * r->element;
        if (!r->at) continue;
        if (at < r->at ? (uint64_t)(r->at - at) < bytes : (uint64_t)(at - r->at) < size) return r;
    }
    return NULL;
}

void hs_deferred_settle(hs_deferred *d, hs_pool *pool, const void *at, uint64_t bytes) {
    for (int i = d ? d->count - 1 : -1; i >= 0; i--)
        if (d->open[i] && (bytes == UINT64_MAX || met(&d->calls[i], at, bytes))) finish(d, pool, i);
}

/* --- embeddings --------------------------------------------------------------------------- */

typedef struct lookup {
    hs_deferred *deferred;
    const hs_embed_fwd_args *embed;
    int64_t first; /* element of the call where the table begins; below 0: within the table */
} lookup;

static void lookup_range(void *ctx, int64_t begin, int64_t end, int worker) {
    const lookup *l = ctx;
    hs_deferred *d = l->deferred;
    hs_deferred_call *call = &d->calls[d->rows];
    const int32_t *tokens = l->embed->tok;
    for (int64_t r = begin; r < end; r++) {
        const int64_t row = l->first + tokens[r] * l->embed->C;
        const int64_t from = hs_max(0, row) / HS_DEFERRED_ITEM;
        const int64_t to = hs_min(call->elements, row + l->embed->C);
        for (int64_t i = from; i * HS_DEFERRED_ITEM < to; i++)
            if (take_ahead(d, i)) call->fn(call->job, i, i + 1, worker);
    }
}

/* A call that changes the table of a lookup, of which that is the range: only the rows that are looked up are done, and it
 * goes behind all others that wait, as it is needed last. False: it has to be finished. */
static bool look_up(hs_deferred *d, hs_pool *pool, int number, const hs_deferred_range *its,
                    const hs_embed_fwd_args *a) {
    const hs_deferred_call *call = &d->calls[number];
    if (items_of(call) > HS_DEFERRED_ROWS) return false;
    if (d->rows != number) {
        if (d->rows >= 0) return false;
        for (int w = 0; w < d->threads; w++)
            if (d->parts[w].next[number] != begin_of(d, call, w)) return false; /* begun */
        if (!hs_deferred_leave(d, call)) return false;
        d->open[number] = false;
        d->rows = d->count - 1;
        for (int64_t i = 0; i < items_of(call); i += 64) d->done[i / 64] = 0;
    }
    lookup l = {d, a, ((const uint8_t *)a->wte - its->at) / (int64_t)its->element};
    hs_parallel_for(pool, a->R, lookup_range, &l);
    return true;
}

void hs_deferred_before(hs_deferred *d, hs_pool *pool, uint16_t kernel, const hs_args *args) {
    if (!d || d->count == 0) return;
    const hs_kernel_facts *facts = hs_kernel_facts_of(kernel);
    const hs_embed_fwd_args embed =
        kernel == HS_K_EMBED_FWD ? hs_embed_fwd_args_of(args) : (hs_embed_fwd_args){0};
    for (int o = 0; o < facts->operand_count; o++) {
        uint64_t bytes = 0;
        if (!args->ptr[o]) continue;
        (void)hs_kernel_extent(kernel, (uint16_t)args->dtype, args->dim, o, &bytes);
        for (int i = d->count - 1; i >= 0; i--) {
            const hs_deferred_range *its =
                i < d->count && d->open[i] ? met(&d->calls[i], args->ptr[o], bytes) : NULL;
            if (its && (args->ptr[o] != embed.wte || !look_up(d, pool, i, its, &embed)))
                finish(d, pool, i);
        }
    }
}
