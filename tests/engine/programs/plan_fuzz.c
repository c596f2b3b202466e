/* plan_fuzz PLAN COUNT SEED: seeded mutations of a plan, each given to the loader; a plan that it
 * takes is then linked and run.
 * plan_fuzz PLAN plant: every write of the plan is laid over everything that it must not touch, one
 * at a time; the loader must find each.
 *
 * A mutation changes one to four places: a bit, a field (4 or 8 bytes, aligned) to a telling value,
 * a copy of one record over another, or the length. The digest is computed again in nine of ten, so
 * that the deeper checks are reached. What the loader refuses must be refused by HS_E_CONFIG (or
 * HS_E_MEMORY) with a reason; what it takes must run one microbatch of the first position, with
 * tokens below the vocabulary, without leaving its memory: the arena lies between pages that may
 * not be touched; and its tokens and targets must be as they were.
 *
 * A planted reference lies in its space, holds its extent and is aligned, so that nothing but what
 * it lies over is wrong. It shares at least one element with what it lies over.
 *
 * Prints {"refused": n, "taken": n, "run": n}, or {"planted": n, "calls": n, "actions": n};
 * anything else than 0 as its exit is a failure.
 */
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "core/hash.h"
#include "run/linker.h"
#include "run/plan_data.h"

static uint64_t state;

static uint64_t next(void) {
    uint64_t z = (state += UINT64_C(0x9E3779B97F4A7C15));
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}
static uint64_t below(uint64_t n) {
    return next() % n;
}

static uint64_t telling(uint64_t old) {
    static const uint64_t values[] = {
        0,          1,         2,         3,          7,          8,
        63,         64,        65535,     65536,      1u << 20,   INT32_MAX,
        UINT32_MAX, INT64_MAX, INT64_MIN, UINT64_MAX, 1ull << 40, 0x7FF0000000000000};
    switch (below(5)) {
    case 0:
        return old + 1;
    case 1:
        return old - 1;
    case 2:
        return old ^ (1ull << below(64));
    case 3:
        return old * 2;
    default:
        return values[below(sizeof values / sizeof *values)];
    }
}

/* Records of the sections, for copies of one over another. */
static const size_t record_bytes[HS_SECTION_COUNT] = {
    sizeof(hs_plan_config),   1,
    sizeof(hs_plan_tensor),   sizeof(hs_plan_shard),
    sizeof(hs_plan_position), sizeof(hs_plan_state),
    sizeof(hs_plan_program),  sizeof(hs_plan_call),
    sizeof(hs_plan_action),   sizeof(hs_plan_channel),
    sizeof(hs_plan_part),     sizeof(hs_plan_weight)};

static void mutate(uint8_t *bytes, size_t size, const hs_plan_header *good) {
    const int section = (int)below(good->sections);
    const size_t from = good->section[section].offset, one = record_bytes[section];
    const bool whole = from + good->section[section].count * one <= size; /* of a cut file */
    const size_t count = whole ? good->section[section].count : 0;
    size_t at = count && below(8) ? from + below(count * one) : below(size);
    switch (below(6)) {
    case 0:
        bytes[at] ^= (uint8_t)(1u << below(8));
        return;
    case 1:
        if (count > 1)
            memmove(bytes + from + below(count) * one, bytes + from + below(count) * one, one);
        return;
    case 2:
    case 3: {
        uint32_t old;
        at = at / 4 * 4;
        if (at + 4 > size) return;
        memcpy(&old, bytes + at, 4);
        const uint32_t fresh = (uint32_t)telling(old);
        memcpy(bytes + at, &fresh, 4);
        return;
    }
    default: {
        uint64_t old;
        at = at / 8 * 8;
        if (at + 8 > size) return;
        memcpy(&old, bytes + at, 8);
        const uint64_t fresh = telling(old);
        memcpy(bytes + at, &fresh, 8);
        return;
    }
    }
}

/* What is read where, as far as anybody may ask, lies in the shards. */
static void read_in_order(const hs_plan *plan) {
    const hs_order order = hs_plan_order(plan);
    for (uint64_t n = 0; plan->config->mode == HS_MODE_TRAIN && n < 200; n++) {
        const uint64_t index = n < 100 ? n : next() >> (2 + below(60));
        HS_ASSERT(hs_order_sample(&order, index) < plan->config->data_samples);
    }
}

static void seal(uint8_t *bytes, size_t size) {
    if (size < sizeof(hs_plan_header)) return;
    hs_plan_header *header = (hs_plan_header *)bytes;
    hs_sha256_of(bytes + 64, size - 64, header->digest);
}

enum { MOST_ARENA = 32 << 20, PAGE = 4096 };

/* Fills position 0's tokens and targets from `state`, or says whether they are still so. */
static bool index_data(const hs_plan *plan, uint8_t *base, bool fill) {
    const hs_plan_position *p = &plan->positions[0];
    const uint64_t areas[2] = {p->tokens_offset, p->targets_offset};
    for (uint32_t m = 0; m < p->mb_count; m++) {
        for (int k = 0; k < 2; k++) {
            if (areas[k] == UINT64_MAX) continue;
            int32_t *tokens = (int32_t *)(base + p->mb_offset + m * p->mb_stride + areas[k]);
            for (int64_t r = 0; r < hs_plan_rows(plan); r++) {
                const int32_t token = (int32_t)below(plan->config->vocab);
                if (fill) tokens[r] = token;
                if (tokens[r] != token) return false;
            }
        }
    }
    return true;
}

struct hs_device {
    void *scratch;
    size_t scratch_bytes;
};

static hs_status launch(hs_device *d, int stream, uint16_t kernel, const hs_args *args,
                        uint32_t count, hs_why *why) {
    hs_kernel_ctx ctx = {.scratch = d->scratch, .scratch_bytes = d->scratch_bytes};
    (void)stream;
    (void)count; /* 1 */
    (void)why;
    return hs_kernels_portable.fn[kernel](&ctx, args);
}

static const hs_backend here = {.version = HS_BACKEND_VERSION, .unified = true, .launch = launch};

/* One microbatch of position 0, then the optimizer's programs: every program that its step list
 * runs, once. */
static bool run_plan(const hs_plan *plan) {
    const hs_plan_position *p = &plan->positions[0];
    if (p->arena_bytes > MOST_ARENA) return false;
    const size_t room = (p->arena_bytes + PAGE - 1) / PAGE * PAGE;
    uint8_t *map = mmap(NULL, room + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED || mprotect(map + PAGE, room, PROT_READ | PROT_WRITE) != 0) abort();
    /* against the end of the mapping, as far as 64-byte alignment lets it */
    uint8_t *base = map + PAGE + (room - p->arena_bytes) / 64 * 64;
    const size_t scratch_bytes = hs_kernels_scratch_bytes(1) + 64;
    uint8_t *scratch = aligned_alloc(64, (scratch_bytes + 63) / 64 * 64);
    hs_linked *linked = NULL;
    hs_why why = {0};
    hs_device device = {.scratch = scratch, .scratch_bytes = scratch_bytes};
    hs_spaces spaces = {.backend = &here, .device = &device, .arena = base};
    if (!scratch || hs_link(plan, p, plan->config->replicas - 1, &spaces, &linked, &why) != HS_OK)
        abort();
    const uint64_t seed = state;
    (void)index_data(plan, base, true);
    uint8_t *done = calloc(plan->count[HS_SECTION_PROGRAMS] + 1, 1);
    const uint32_t firsts[4] = {p->first_init, p->first_load, p->first_step, p->first_redo};
    const uint32_t counts[4] = {p->inits, p->loads, p->steps, p->redos};
    for (int list = 0; list < 4; list++) {
        const hs_hazards_config order = {.plan = plan,
                                         .position = p,
                                         .replica = plan->config->replicas - 1,
                                         .first = firsts[list],
                                         .count = counts[list],
                                         .again = list == 2};
        hs_turn *turns;
        if (hs_hazards_find(&order, &turns, &why) != HS_OK) abort();
        free(turns);
        for (uint32_t i = 0; i < counts[list]; i++) {
            const hs_plan_action *a = &plan->actions[firsts[list] + i];
            if (a->kind != HS_A_RUN || done[a->program]++) continue;
            (void)hs_linked_run(linked, a, &why);
        }
    }
    state = seed;
    if (!index_data(plan, base, false)) {
        (void)fprintf(stderr, "a plan that was taken wrote over its tokens or targets\n");
        exit(1);
    }
    free(done);
    hs_linked_destroy(linked);
    free(scratch);
    (void)munmap(map, room + 2 * PAGE);
    return true;
}

/* --- planted writes ---------------------------------------------------------------------- */

typedef struct garden {
    const uint8_t *good;
    size_t size;
    hs_plan plan; /* of the good bytes */
    uint64_t calls, actions;
    bool missed;
} garden;

/* The plan with one reference moved; `at` points into the good plan's bytes. */
static void plant(garden *g, const hs_plan_ref *at, uint32_t space, uint64_t offset,
                  const hs_plan_position *p, const char *what, size_t number, const char *over) {
    const uint64_t limit = space == HS_SPACE_STATIC ? p->arena_bytes
                           : space == HS_SPACE_ACT  ? (p->act_slots ? p->act_stride : 0)
                                                    : (p->mb_count ? p->mb_stride : 0);
    if (offset > limit || at->bytes > limit - offset) return;
    uint8_t *bytes = malloc(g->size);
    if (!bytes) abort();
    memcpy(bytes, g->good, g->size);
    hs_plan_ref *ref = (hs_plan_ref *)(bytes + ((const uint8_t *)at - g->plan.bytes));
    ref->space = space;
    ref->across = 0;
    ref->offset = offset;
    seal(bytes, g->size);
    hs_plan plan;
    hs_why why = {0};
    *(what[0] == 'c' ? &g->calls : &g->actions) += 1;
    if (hs_plan_adopt(bytes, g->size, "planted", &plan, &why) == HS_E_CONFIG && why.text[0]) return;
    (void)fprintf(stderr, "%s %zu of position %u: %u:%" PRIu64 " over %s was taken\n", what, number,
                  p->position, space, offset, over);
    hs_plan_close(&plan);
    g->missed = true;
}

/* Over the places that this write must not touch whatever the call is. */
static void plant_over_places(garden *g, const hs_plan_ref *at, const hs_plan_position *p,
                              const char *what, size_t number, bool norms) {
    const struct {
        const char *name;
        uint64_t offset;
    } rows[] = {{"tokens", p->tokens_offset}, {"targets", p->targets_offset}};
    for (int k = 0; k < 2; k++) {
        if (rows[k].offset == UINT64_MAX) continue;
        plant(g, at, HS_SPACE_MB, rows[k].offset, p, what, number, rows[k].name);
        for (uint32_t m = 0; m < p->mb_count; m++)
            plant(g, at, HS_SPACE_STATIC, p->mb_offset + m * p->mb_stride + rows[k].offset, p, what,
                  number, rows[k].name);
    }
    if (p->act_slots)
        plant(g, at, HS_SPACE_STATIC, p->act_offset, p, what, number, "activation slots");
    if (p->control_offset != UINT64_MAX)
        plant(g, at, HS_SPACE_STATIC, p->control_offset, p, what, number, "the control block");
    if (hs_plan_foreseen(p) != UINT64_MAX)
        plant(g, at, HS_SPACE_STATIC, hs_plan_foreseen(p), p, what, number, "what is foreseen");
    if (p->sumsq_offset != UINT64_MAX && norms)
        plant(g, at, HS_SPACE_STATIC, p->sumsq_offset, p, what, number, "squared norms");
}

static void plant_call(garden *g, const hs_plan_position *p, size_t number) {
    const hs_plan_call *call = &g->plan.calls[number];
    const hs_kernel_facts *facts = hs_kernel_facts_of(call->kernel);
    for (int a = 0; a < facts->operand_count; a++) {
        const hs_plan_ref *x = &call->ptr[a];
        const hs_operand *out = &facts->operands[a];
        if (x->space == HS_SPACE_NONE || out->role == HS_ROLE_READ) continue;
        const bool norm =
            (call->kernel == HS_K_SUMSQ || call->kernel == HS_K_SUM) && out->role == HS_ROLE_WRITE;
        plant_over_places(g, x, p, "call", number, !norm);
        const uint64_t element = hs_operand_alignment(out, call->dtype);
        uint64_t mine = 0;
        if (hs_kernel_extent(call->kernel, call->dtype, call->dim, a, &mine) != HS_OK) abort();
        for (int b = 0; b < facts->operand_count; b++) {
            /* as the last replica has it, which is enough */
            const hs_plan_ref there = hs_plan_resolve(&call->ptr[b], g->plan.config->replicas - 1);
            const hs_plan_ref *y = &there;
            uint64_t theirs = 0;
            if (b == a || y->space == HS_SPACE_NONE) continue;
            if (hs_kernel_extent(call->kernel, call->dtype, call->dim, b, &theirs) != HS_OK)
                abort();
            const uint64_t last = (y->offset + theirs - 1) / element * element;
            const hs_operand *other = &facts->operands[b];
            const bool in_place = (out->may_be && !strcmp(out->may_be, other->name)) ||
                                  (other->may_be && !strcmp(other->may_be, out->name));
            if (y->offset % element == 0 && !in_place)
                plant(g, x, y->space, y->offset, p, "call", number, facts->operands[b].name);
            if (last != y->offset)
                plant(g, x, y->space, last, p, "call", number, facts->operands[b].name);
            if (y->offset % element == 0 && y->offset + element >= mine && mine > element)
                plant(g, x, y->space, y->offset + element - mine, p, "call", number,
                      facts->operands[b].name);
        }
    }
}

static void plant_action(garden *g, const hs_plan_position *p, size_t number) {
    const hs_plan_action *a = &g->plan.actions[number];
    if (a->kind == HS_A_RUN) {
        const hs_plan_program *program = &g->plan.programs[a->program];
        for (uint32_t i = 0; i < program->calls; i++)
            plant_call(g, p, (size_t)program->first_call + i);
    }
    if (a->kind != HS_A_RECV && a->kind != HS_A_REPORT) return;
    const bool order = a->kind == HS_A_RECV && g->plan.channels[a->channel].kind == HS_CH_CONTROL;
    if (!order) plant_over_places(g, &a->ref, p, "action", number, true);
    for (uint32_t i = 0; i < p->states; i++) {
        const hs_plan_state *s = &g->plan.states[p->first_state + i];
        const uint64_t at[4] = {s->master_offset, s->m_offset, s->v_offset, s->grad_offset};
        for (int k = 0; k < 4; k++)
            plant(g, &a->ref, HS_SPACE_STATIC, at[k], p, "action", number, "a state tensor");
    }
}

static int plant_all(const uint8_t *good, size_t size) {
    garden g = {.good = good, .size = size};
    uint8_t *bytes = malloc(size);
    hs_why why = {0};
    if (!bytes) return 1;
    memcpy(bytes, good, size);
    if (hs_plan_adopt(bytes, size, "good", &g.plan, &why) != HS_OK) {
        (void)fprintf(stderr, "%s\n", why.text);
        return 1;
    }
    for (uint32_t n = 0; n < g.plan.config->positions; n++) {
        const hs_plan_position *p = &g.plan.positions[n];
        const uint32_t firsts[4] = {p->first_init, p->first_load, p->first_step, p->first_redo};
        const uint32_t counts[4] = {p->inits, p->loads, p->steps, p->redos};
        uint8_t *done = calloc(g.plan.count[HS_SECTION_PROGRAMS] + 1, 1);
        for (int list = 0; list < 4; list++) {
            for (uint32_t i = 0; i < counts[list]; i++) {
                const hs_plan_action *a = &g.plan.actions[firsts[list] + i];
                if (a->kind == HS_A_RUN && done[a->program]++) continue;
                plant_action(&g, p, (size_t)firsts[list] + i);
            }
        }
        free(done);
    }
    hs_plan_close(&g.plan);
    (void)printf("{\"planted\": %" PRIu64 ", \"calls\": %" PRIu64 ", \"actions\": %" PRIu64 "}\n",
                 g.calls + g.actions, g.calls, g.actions);
    return g.missed;
}

int main(int argc, char **argv) {
    if (argc < 3) return 64;
    FILE *file = fopen(argv[1], "rb");
    if (!file) return 66;
    (void)fseek(file, 0, SEEK_END);
    const size_t size = (size_t)ftell(file);
    rewind(file);
    uint8_t *good = malloc(size);
    if (!good || fread(good, 1, size, file) != size) return 66;
    (void)fclose(file);
    if (strcmp(argv[2], "plant") == 0) {
        const int code = plant_all(good, size);
        free(good);
        return code;
    }
    if (argc != 4) return 64;
    const uint64_t count = strtoull(argv[2], NULL, 10);
    uint64_t refused = 0, taken = 0, ran = 0;
    for (uint64_t n = 0; n < count; n++) {
        state = strtoull(argv[3], NULL, 10) * UINT64_C(1000003) + n;
        size_t length = below(20) ? size : below(size + 1);
        uint8_t *bytes = malloc(length ? length : 1); /* its own block: a read past it is seen */
        memcpy(bytes, good, length);
        for (uint64_t k = 1 + below(4); k > 0 && length > 8; k--)
            mutate(bytes, length, (const hs_plan_header *)good);
        if (length < size && length >= sizeof(hs_plan_header) && below(2)) {
            ((hs_plan_header *)bytes)->file_bytes = length;
        }
        if (below(10)) seal(bytes, length);
        hs_plan plan;
        hs_why why = {0};
        const hs_status st = hs_plan_adopt(bytes, length, "fuzz", &plan, &why);
        if (st == HS_OK) {
            taken++;
            read_in_order(&plan);
            ran += run_plan(&plan);
            hs_plan_close(&plan);
        } else if ((st == HS_E_CONFIG || st == HS_E_MEMORY) && why.text[0]) {
            refused++;
        } else {
            (void)fprintf(stderr, "mutation %" PRIu64 ": status %d without a reason\n", n, st);
            return 1;
        }
    }
    free(good);
    (void)printf("{\"refused\": %" PRIu64 ", \"taken\": %" PRIu64 ", \"run\": %" PRIu64 "}\n",
                 refused, taken, ran);
    return 0;
}
