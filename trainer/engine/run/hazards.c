#include "run/hazards.h"

#include <stdlib.h>
#include <string.h>

#include "backend/backend.h"
#include "kernels/kernels.h"

_Static_assert(HS_STREAM_COMPUTE == 0 && HS_STREAM_IN == 1 && HS_STREAM_OUT == 2, "turns");
_Static_assert(HS_EVENT_LISTS + HS_EVENT_COMPUTE_COUNT + HS_EVENT_IN_COUNT + HS_EVENT_OUT_COUNT <=
                       HS_EVENT_LINKS &&
                   (int)HS_EVENT_LINKS < (int)HS_EVENTS,
               "events");

enum { READS = 1, WRITES = 2, STREAMS = HS_TURN_STREAMS };

/* Bytes [begin, end) of HS_SPACE_*, there in each slot or microbatch. In a list: ascending, apart. */
typedef struct range {
    uint32_t space, instances, first_cell;
    uint64_t begin, end;
} range;

/* When actions touched one instance of a range last, by stream; 0: never. */
typedef struct cell {
    uint64_t read[STREAMS], wrote[STREAMS];
} cell;

/* What is done, by stream, when something begins. */
typedef struct clock {
    uint64_t until[STREAMS];
} clock;

typedef struct finder {
    const hs_hazards_config *c;
    range *ranges, *states;
    uint32_t range_count, state_count;
    uint8_t *program; /* [program][range]: READS | WRITES */
    uint8_t *seen;    /* [program]: 1, scanned; 2, it changes a state too */
    cell *cells;
    clock *clocks; /* of the actions of the last two rounds, when they began; by time */
    clock known[STREAMS], host;
    hs_turn *turns;
    uint32_t (*earlier)[STREAMS]; /* what each action follows; UINT32_MAX: nothing */
} finder;

/* --- ranges ------------------------------------------------------------------------------ */

static int by_place(const void *a, const void *b) {
    const range *x = a, *y = b;
    if (x->space != y->space) return x->space < y->space ? -1 : 1;
    return x->begin < y->begin ? -1 : x->begin > y->begin;
}

static void add(range *list, uint32_t *count, uint32_t space, uint64_t begin, uint64_t bytes) {
    if (begin != UINT64_MAX && bytes)
        list[(*count)++] = (range){.space = space, .begin = begin, .end = begin + bytes};
}

/* Sorted; what overlaps becomes one. */
static void merge(range *list, uint32_t *count) {
    uint32_t kept = 0;
    qsort(list, *count, sizeof *list, by_place);
    for (uint32_t i = 0; i < *count; i++) {
        range *last = kept ? &list[kept - 1] : NULL;
        if (last && last->space == list[i].space && list[i].begin < last->end) {
            if (list[i].end > last->end) last->end = list[i].end;
        } else {
            list[kept++] = list[i];
        }
    }
    *count = kept;
}

/* The first range of the space that ends after `at`; the next ones follow it. */
static uint32_t find(const range *list, uint32_t count, uint32_t space, uint64_t at) {
    uint32_t low = 0, high = count;
    while (low < high) {
        const uint32_t middle = low + (high - low) / 2;
        const range *r = &list[middle];
        if (r->space > space || (r->space == space && r->end > at))
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

static bool meets(const range *list, uint32_t count, uint32_t i, uint32_t space, uint64_t end) {
    return i < count && list[i].space == space && list[i].begin < end;
}

/* The stream of an action; -1: none. */
static int stream_of(const finder *f, const hs_plan_action *a) {
    uint32_t kind;
    switch (a->kind) {
    case HS_A_RUN:
        return HS_STREAM_COMPUTE;
    case HS_A_SEND:
    case HS_A_RECV:
        kind = f->c->plan->channels[a->channel].kind;
        if (kind == HS_CH_REPORT || kind == HS_CH_CONTROL) return -1;
        return a->kind == HS_A_SEND ? HS_STREAM_OUT : HS_STREAM_IN;
    case HS_A_DATA:
    case HS_A_APPLY:
        return HS_STREAM_IN;
    case HS_A_REPORT:
        return HS_STREAM_OUT;
    default:
        return -1;
    }
}

static bool is_message(const hs_plan_action *a) {
    return a->kind == HS_A_SEND || a->kind == HS_A_RECV;
}

static void list_ranges(finder *f) {
    const hs_plan *plan = f->c->plan;
    const hs_plan_position *p = f->c->position;
    const uint64_t rows = 4 * (uint64_t)hs_plan_rows(plan);
    uint32_t *n = &f->range_count;
    add(f->ranges, n, HS_SPACE_MB, p->tokens_offset, rows);
    add(f->ranges, n, HS_SPACE_MB, p->targets_offset, rows);
    add(f->ranges, n, HS_SPACE_MB, p->loss_offset, rows);
    add(f->ranges, n, HS_SPACE_STATIC, p->sumsq_offset, 8 * plan->count[HS_SECTION_TENSORS]);
    add(f->ranges, n, HS_SPACE_STATIC, p->control_offset, sizeof(hs_step_control));
    for (uint32_t i = 0; i < f->c->count; i++) {
        const hs_plan_action *a = &plan->actions[f->c->first + i];
        const hs_plan_ref ref = hs_plan_resolve(&a->ref, f->c->replica);
        if (a->kind == HS_A_APPLY || (is_message(a) && stream_of(f, a) >= 0))
            add(f->ranges, n, ref.space, ref.offset, ref.bytes);
    }
    merge(f->ranges, n);
    for (uint32_t i = 0; i < p->states; i++) {
        const hs_plan_state *s = &plan->states[p->first_state + i];
        const uint64_t bytes = 4 * hs_plan_kept(plan, s);
        add(f->states, &f->state_count, HS_SPACE_STATIC, s->master_offset, bytes);
        add(f->states, &f->state_count, HS_SPACE_STATIC, s->m_offset, bytes);
        add(f->states, &f->state_count, HS_SPACE_STATIC, s->v_offset, bytes);
    }
    merge(f->states, &f->state_count);
}

/* How many cells there are. */
static uint32_t place_cells(finder *f) {
    const hs_plan_position *p = f->c->position;
    uint32_t cells = 0;
    for (uint32_t r = 0; r < f->range_count; r++) {
        range *x = &f->ranges[r];
        x->instances = x->space == HS_SPACE_MB    ? p->mb_count
                       : x->space == HS_SPACE_ACT ? p->act_slots
                                                  : 1;
        x->first_cell = cells;
        cells += x->instances;
    }
    return cells;
}

/* What a program touches, over all of its calls. */
static void scan_program(finder *f, uint32_t number) {
    const hs_plan *plan = f->c->plan;
    const hs_plan_program *program = &plan->programs[number];
    uint8_t *touched = f->program + (size_t)number * f->range_count;
    if (f->seen[number]) return;
    f->seen[number] = 1;
    for (uint32_t k = 0; k < program->calls; k++) {
        const hs_plan_call *call = &plan->calls[program->first_call + k];
        const hs_kernel_facts *facts = hs_kernel_facts_of(call->kernel);
        for (int o = 0; o < facts->operand_count; o++) {
            const hs_plan_ref ref = hs_plan_resolve(&call->ptr[o], f->c->replica);
            uint64_t bytes = ref.bytes;
            if (ref.space == HS_SPACE_NONE) continue;
            (void)hs_kernel_extent(call->kernel, call->dtype, call->dim, o, &bytes);
            const uint64_t end = ref.offset + bytes;
            const hs_role role = facts->operands[o].role;
            const uint8_t how =
                (uint8_t)((role == HS_ROLE_READ || role == HS_ROLE_UPDATE ? READS : 0) |
                          (role != HS_ROLE_READ ? WRITES : 0));
            uint32_t i = find(f->ranges, f->range_count, ref.space, ref.offset);
            for (; meets(f->ranges, f->range_count, i, ref.space, end); i++) touched[i] |= how;
            i = find(f->states, f->state_count, ref.space, ref.offset);
            if ((how & WRITES) && meets(f->states, f->state_count, i, ref.space, end))
                f->seen[number] |= 2;
        }
    }
}

/* --- time -------------------------------------------------------------------------------- */

static void learn(clock *a, const clock *b) {
    for (int u = 0; u < STREAMS; u++)
        if (b->until[u] > a->until[u]) a->until[u] = b->until[u];
}

/* Action `now` of `stream` touches an instance of a range: `needs` is what it must follow. */
static void touch(finder *f, uint32_t r, uint32_t instance, int how, int stream, uint64_t now,
                  clock *needs) {
    const range *x = &f->ranges[r];
    cell *at = &f->cells[x->first_cell + (x->instances > 1 ? instance : 0)];
    for (int u = 0; u < STREAMS; u++) {
        if (u == stream) continue;
        if (at->wrote[u] > needs->until[u]) needs->until[u] = at->wrote[u];
        if ((how & WRITES) && at->read[u] > needs->until[u]) needs->until[u] = at->read[u];
    }
    if (how & READS) at->read[stream] = now;
    if (how & WRITES) at->wrote[stream] = now;
}

static void touch_all(finder *f, uint32_t space, uint64_t offset, uint64_t bytes, uint32_t instance,
                      int how, int stream, uint64_t now, clock *needs) {
    if (offset == UINT64_MAX) return;
    uint32_t i = find(f->ranges, f->range_count, space, offset);
    for (; meets(f->ranges, f->range_count, i, space, offset + bytes); i++)
        touch(f, i, instance, how, stream, now, needs);
}

static void touch_action(finder *f, const hs_plan_action *a, int stream, uint64_t now,
                         clock *needs) {
    const hs_plan *plan = f->c->plan;
    const hs_plan_position *p = f->c->position;
    const uint64_t rows = 4 * (uint64_t)hs_plan_rows(plan);
    const hs_plan_ref ref = hs_plan_resolve(&a->ref, f->c->replica);
    const uint8_t *touched;
    switch (a->kind) {
    case HS_A_RUN:
        touched = f->program + (size_t)a->program * f->range_count;
        for (uint32_t r = 0; r < f->range_count; r++)
            if (touched[r])
                touch(f, r, f->ranges[r].space == HS_SPACE_MB ? a->microbatch : a->slot, touched[r],
                      stream, now, needs);
        break;
    case HS_A_DATA:
        for (uint32_t m = 0; m < p->mb_count; m++) {
            touch_all(f, HS_SPACE_MB, p->tokens_offset, rows, m, WRITES, stream, now, needs);
            touch_all(f, HS_SPACE_MB, p->targets_offset, rows, m, WRITES, stream, now, needs);
        }
        break;
    case HS_A_REPORT:
        for (uint32_t m = 0; m < p->mb_count; m++)
            touch_all(f, HS_SPACE_MB, p->loss_offset, rows, m, READS, stream, now, needs);
        touch_all(f, HS_SPACE_STATIC, p->sumsq_offset, 8 * plan->count[HS_SECTION_TENSORS], 0,
                  READS, stream, now, needs);
        break;
    default: /* SEND, RECV, APPLY */
        touch_all(f, ref.space, ref.offset, ref.bytes,
                  ref.space == HS_SPACE_MB ? a->microbatch : a->slot,
                  a->kind == HS_A_SEND ? READS : WRITES, stream, now, needs);
    }
}

/* Whether the host waits for the action before it issues another. */
static bool host_waits(const finder *f, const hs_plan_action *a) {
    return a->kind == HS_A_REPORT ||
           (a->kind == HS_A_SEND && !(f->c->direct && f->c->direct[a->channel]));
}

/* Times count from 1, through the rounds; an action's clock is kept for two of them. */
static clock *clock_of(const finder *f, uint64_t time) {
    return &f->clocks[(time - 1) % (2 * (uint64_t)f->c->count)];
}

/* Action i at time `now`: what it follows, into its turn. */
static void take_turn(finder *f, uint32_t i, uint64_t now) {
    const hs_plan_action *a = &f->c->plan->actions[f->c->first + i];
    const int stream = stream_of(f, a);
    hs_turn *turn = &f->turns[i];
    *turn = (hs_turn){.follow = {-1, -1, -1},
                      .record = turn->record,
                      .stream = (int8_t)stream,
                      .saved = a->kind == HS_A_RUN && (f->seen[a->program] & 2)};
    for (int u = 0; u < STREAMS; u++) f->earlier[i][u] = UINT32_MAX;
    if (stream < 0) return;
    clock needs = {{0}}, *known = &f->known[stream];
    learn(known, &f->host);
    touch_action(f, a, stream, now, &needs);
    clock after = *known;
    for (int u = 0; u < STREAMS; u++) {
        bool needed = needs.until[u] > known->until[u];
        for (int v = 0; v < STREAMS && needed; v++) /* the other event says it too */
            needed = v == u || needs.until[v] <= known->until[v] ||
                     clock_of(f, needs.until[v])->until[u] < needs.until[u];
        if (!needed) continue;
        const uint32_t earlier = (uint32_t)((needs.until[u] - 1) % f->c->count);
        f->earlier[i][u] = earlier;
        f->turns[earlier].record = 0; /* number_events */
        learn(&after, clock_of(f, needs.until[u]));
    }
    *known = after;
    known->until[stream] = now;
    *clock_of(f, now) = *known;
    if (host_waits(f, a)) learn(&f->host, known);
}

/* --- events ------------------------------------------------------------------------------ */

/* Numbers for what is followed; where a stream has more than numbers, a later action of it has the
 * same, and whoever follows it then waits for that one, which is as right. */
static void number_events(finder *f) {
    static const uint32_t counts[STREAMS] = {HS_EVENT_COMPUTE_COUNT, HS_EVENT_IN_COUNT,
                                             HS_EVENT_OUT_COUNT};
    uint32_t first = HS_EVENT_LISTS;
    for (uint32_t u = 0; u < STREAMS; first += counts[u++])
        for (uint32_t i = 0, recorded = 0; i < f->c->count; i++)
            if (f->turns[i].stream == (int)u && f->turns[i].record >= 0)
                f->turns[i].record = (int8_t)(first + recorded++ % counts[u]);
    for (uint32_t i = 0; i < f->c->count; i++)
        for (int u = 0; u < STREAMS; u++)
            if (f->earlier[i][u] != UINT32_MAX)
                f->turns[i].follow[u] = f->turns[f->earlier[i][u]].record;
}

static void find_turns(finder *f) {
    const hs_hazards_config *c = f->c;
    for (uint32_t i = 0; i < c->count; i++) {
        const hs_plan_action *a = &c->plan->actions[c->first + i];
        if (a->kind == HS_A_RUN) scan_program(f, a->program);
    }
    uint64_t now = 0;
    for (int round = c->again ? 0 : 1; round < 2; round++) {
        for (uint32_t i = 0; i < c->count; i++) f->turns[i].record = -1;
        for (uint32_t i = 0; i < c->count; i++) take_turn(f, i, ++now);
    }
    number_events(f);
}

hs_status hs_hazards_find(const hs_hazards_config *c, hs_turn **turns, hs_why *why) {
    finder f = {.c = c};
    const size_t count = c->count, programs = c->plan->count[HS_SECTION_PROGRAMS];
    hs_status st = HS_OK;
    f.ranges = calloc(count + 5, sizeof *f.ranges);
    f.states = calloc(3 * (size_t)c->position->states + 1, sizeof *f.states);
    f.seen = calloc(programs + 1, 1);
    f.clocks = calloc(2 * count + 1, sizeof *f.clocks);
    f.earlier = calloc(count + 1, sizeof *f.earlier);
    f.turns = calloc(count + 1, sizeof *f.turns);
    bool room = f.ranges && f.states && f.seen && f.clocks && f.earlier && f.turns;
    if (room) {
        list_ranges(&f);
        f.cells = calloc(place_cells(&f) + (size_t)1, sizeof *f.cells);
        f.program = calloc(programs * f.range_count + 1, 1);
        room = f.cells && f.program;
    }
    if (room) {
        find_turns(&f);
    } else {
        free(f.turns);
        f.turns = NULL;
        st = hs_fail(why, HS_E_MEMORY, "no memory to order a list of %zu actions", count);
    }
    free(f.ranges);
    free(f.states);
    free(f.seen);
    free(f.clocks);
    free(f.earlier);
    free(f.cells);
    free(f.program);
    *turns = f.turns;
    return st;
}
