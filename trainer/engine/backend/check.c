#include "backend/check.h"

#include <inttypes.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "backend/sheet.h"
#include "core/clock.h"
#include "core/hash.h"
#include "kernels/args.h"

enum {
    ROWS = 96,
    OUT = 128,
    INNER = 512,
    UNIT = 2 << 20, /* of memory: looked at as a whole */
    UNITS = 32,     /* at most, evenly over the arena: more than caches hold */
};

/* CRC-32C of the product's 96 x 128 floats. All fast sets give the same bits on every machine
 * (kernels/linear.h); ref rounds another sum. tests/engine/test_check.py computes both anew. */
static const uint32_t SHEET_FAST = 0x17739cef, SHEET_REF = 0xc78d7de3;

typedef struct core {
    float *y;
    void *scratch;
    uint32_t crc;
    int cpu;
    int64_t ns;
    uint64_t bad_at, bad_word, wanted; /* bad_at UINT64_MAX: memory holds */
} core;

typedef struct machine {
    const hs_kernel_set *set;
    const float *x, *w;
    size_t scratch_bytes;
    core *cores;
    uint64_t *memory;
    uint64_t words, stride; /* of a unit; from one unit to the next */
} machine;

static void multiply(void *ctx, int64_t begin, int64_t end, int worker) {
    const machine *m = ctx;
    core *me = &m->cores[worker];
    (void)begin;
    (void)end;
    hs_kernel_ctx lent = {.scratch = me->scratch, .scratch_bytes = m->scratch_bytes};
    const hs_linear_fwd_args product = {.y = me->y,
                                        .x = (void *)(uintptr_t)m->x,
                                        .w = (void *)(uintptr_t)m->w,
                                        .R = ROWS,
                                        .N = OUT,
                                        .K = INNER,
                                        .ldy = OUT,
                                        .ldx = INNER,
                                        .dtype = HS_F32};
    const hs_args args = hs_linear_fwd_args_to(&product);
    const int64_t began = hs_clock_ns();
    (void)m->set->fn[HS_K_LINEAR_FWD](&lent, &args);
    me->ns = hs_clock_ns() - began;
    me->crc = hs_crc32c(0, me->y, sizeof(float) * ROWS * OUT);
    me->cpu = sched_getcpu();
}

/* All are written, then all are read; the second pass has every bit the other way. */
static void write_and_read(void *ctx, int64_t begin, int64_t end, int worker) {
    const machine *m = ctx;
    core *me = &m->cores[worker];
    volatile uint64_t *memory = m->memory;
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t u = begin; u < end; u++)
            for (uint64_t i = 0, at = (uint64_t)u * m->stride; i < m->words; i++, at++)
                memory[at] = HS_SHEET_PATTERN(at, pass);
        for (int64_t u = begin; u < end; u++)
            for (uint64_t i = 0, at = (uint64_t)u * m->stride; i < m->words; i++, at++) {
                const uint64_t word = memory[at];
                if (word == HS_SHEET_PATTERN(at, pass) || me->bad_at != UINT64_MAX) continue;
                me->bad_at = at;
                me->bad_word = word;
                me->wanted = HS_SHEET_PATTERN(at, pass);
            }
    }
    for (int64_t u = begin; u < end; u++)
        memset(m->memory + (uint64_t)u * m->stride, 0, m->words * sizeof *m->memory);
}

static hs_status judge(const machine *m, int threads, hs_check *check, hs_why *why) {
    const uint32_t sheet = m->set == &hs_kernels_ref ? SHEET_REF : SHEET_FAST;
    int64_t slowest_ns = 1;
    for (int i = 0; i < threads; i++) {
        const core *c = &m->cores[i];
        if (c->crc != sheet)
            return hs_fail(
                why, HS_E_SICK,
                "this machine computes wrong numbers: thread %d, on CPU %d, has a product "
                "with checksum %08" PRIx32 " instead of %08" PRIx32
                " (kernels %s); take the machine out of service and test it",
                i, c->cpu, c->crc, sheet, m->set->name);
        if (c->bad_at != UINT64_MAX)
            return hs_fail(why, HS_E_SICK,
                           "this machine's memory does not hold: word %" PRIu64
                           " of the arena reads %016" PRIx64 ", %016" PRIx64
                           " was written; take the machine out of service and test it",
                           c->bad_at, c->bad_word, c->wanted);
        if (c->ns > slowest_ns) slowest_ns = c->ns;
    }
    check->gflops = 2.0 * ROWS * OUT * INNER / (double)slowest_ns;
    return HS_OK;
}

static size_t whole_lines(size_t bytes) {
    return (bytes + 63) / 64 * 64;
}

hs_status hs_check_machine(const hs_kernel_set *set, hs_pool *pool, const hs_arena *arena,
                           hs_check *check, hs_why *why) {
    const int64_t began = hs_clock_us();
    const int threads = hs_pool_threads(pool);
    const size_t of_scratch = whole_lines(hs_kernels_scratch_bytes(1));
    const size_t of_x = whole_lines(sizeof(float) * ROWS * INNER);
    const size_t of_w = whole_lines(sizeof(float) * OUT * INNER);
    const size_t of_y = whole_lines(sizeof(float) * ROWS * OUT);
    const size_t of_cores = whole_lines((size_t)threads * sizeof(core));
    const size_t unit = arena->bytes < UNIT ? arena->bytes / 8 * 8 : UNIT;
    const uint64_t there = arena->bytes / (unit ? unit : 1);
    const int64_t units = there < UNITS ? (int64_t)there : UNITS;
    *check = (hs_check){0};
    uint8_t *bytes =
        aligned_alloc(64, of_x + of_w + of_cores + (size_t)threads * (of_y + of_scratch));
    if (!bytes)
        return hs_fail(why, HS_E_MEMORY, "no memory to check %d threads before the first step",
                       threads);
    machine m = {.set = set,
                 .x = (void *)bytes,
                 .w = (void *)(bytes + of_x),
                 .scratch_bytes = of_scratch,
                 .cores = (void *)(bytes + of_x + of_w),
                 .memory = (void *)arena->base,
                 .words = unit / 8,
                 .stride = units ? there / (uint64_t)units * (unit / 8) : 0};
    uint8_t *own = bytes + of_x + of_w + of_cores;
    for (int i = 0; i < threads; i++, own += of_y + of_scratch)
        m.cores[i] = (core){.y = (void *)own, .scratch = own + of_y, .bad_at = UINT64_MAX};
    hs_sheet_fill((float *)(void *)bytes, ROWS * INNER, HS_SHEET_X);
    hs_sheet_fill((float *)(void *)(bytes + of_x), OUT * INNER, HS_SHEET_W);
    hs_parallel_for(pool, threads, multiply, &m);
    hs_parallel_for(pool, units, write_and_read, &m);
    const hs_status st = judge(&m, threads, check, why);
    free(bytes);
    check->us = hs_clock_us() - began;
    return st;
}
