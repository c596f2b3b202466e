#include "run/hazards.h"

#include <stdlib.h>
#include <string.h>

#include "backend/backend.h"
#include "run/touches.h"

_Static_assert(HS_STREAM_COMPUTE == 0 && HS_STREAM_IN == 1 && HS_STREAM_OUT == 2, "turns");
_Static_assert(HS_EVENT_LISTS + HS_EVENT_COMPUTE_COUNT + HS_EVENT_IN_COUNT + HS_EVENT_OUT_COUNT <=
                       HS_EVENT_LINKS &&
                   (int)HS_EVENT_LINKS < (int)HS_EVENTS,
               "events");

enum { STREAMS = HS_TURN_STREAMS };

/* When actions touched a cell last, by stream; 0: never. */
typedef struct cell {
    uint64_t read[STREAMS], wrote[STREAMS];
} cell;

/* What is done, by stream, when something begins. */
typedef struct clock {
    uint64_t until[STREAMS];
} clock;

typedef struct finder {
    const hs_hazards_config *c;
    hs_touches *touches;
    cell *cells;
    clock *clocks; /* of the actions of the last two rounds, when they began; by time */
    clock known[STREAMS], host;
    hs_turn *turns;
    uint32_t (*earlier)[STREAMS]; /* what each action follows; UINT32_MAX: nothing */
} finder;

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
    case HS_A_CHECK:
    case HS_A_FORESEE:
        return HS_STREAM_IN;
    case HS_A_REPORT:
        return HS_STREAM_OUT;
    default:
        return -1;
    }
}

/* --- time -------------------------------------------------------------------------------- */

static void learn(clock *a, const clock *b) {
    for (int u = 0; u < STREAMS; u++)
        if (b->until[u] > a->until[u]) a->until[u] = b->until[u];
}

/* An action of `stream`, at its time; `needs` is what it must follow. */
typedef struct moment {
    finder *f;
    int stream;
    uint64_t now;
    clock needs;
} moment;

static void touch(void *ctx, uint32_t number, int how) {
    moment *m = ctx;
    cell *at = &m->f->cells[number];
    for (int u = 0; u < STREAMS; u++) {
        if (u == m->stream) continue;
        if (at->wrote[u] > m->needs.until[u]) m->needs.until[u] = at->wrote[u];
        if ((how & HS_TOUCH_WRITES) && at->read[u] > m->needs.until[u])
            m->needs.until[u] = at->read[u];
    }
    if (how & HS_TOUCH_READS) at->read[m->stream] = m->now;
    if (how & HS_TOUCH_WRITES) at->wrote[m->stream] = m->now;
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
                      .saved = a->kind == HS_A_RUN && hs_touches_state(f->touches, a->program)};
    for (int u = 0; u < STREAMS; u++) f->earlier[i][u] = UINT32_MAX;
    if (stream < 0) return;
    moment m = {.f = f, .stream = stream, .now = now};
    clock *known = &f->known[stream];
    learn(known, &f->host);
    hs_touches_each(f->touches, a, touch, &m);
    const clock needs = m.needs;
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
    uint64_t now = 0;
    for (int round = c->again ? 0 : 1; round < 2; round++) {
        for (uint32_t i = 0; i < c->count; i++) f->turns[i].record = -1;
        for (uint32_t i = 0; i < c->count; i++) take_turn(f, i, ++now);
    }
    number_events(f);
}

hs_status hs_hazards_find(const hs_hazards_config *c, hs_turn **turns, hs_why *why) {
    finder f = {.c = c};
    const size_t count = c->count;
    const hs_touches_config config = {.plan = c->plan,
                                      .position = c->position,
                                      .replica = c->replica,
                                      .first = c->first,
                                      .count = c->count};
    *turns = NULL;
    HS_TRY(hs_touches_create(&config, &f.touches, why));
    f.cells = calloc(hs_touches_cells(f.touches) + (size_t)1, sizeof *f.cells);
    f.clocks = calloc(2 * count + 1, sizeof *f.clocks);
    f.earlier = calloc(count + 1, sizeof *f.earlier);
    f.turns = calloc(count + 1, sizeof *f.turns);
    hs_status st = HS_OK;
    if (f.cells && f.clocks && f.earlier && f.turns) {
        find_turns(&f);
    } else {
        free(f.turns);
        f.turns = NULL;
        st = hs_fail(why, HS_E_MEMORY, "no memory to order a list of %zu actions", count);
    }
    hs_touches_destroy(f.touches);
    free(f.cells);
    free(f.clocks);
    free(f.earlier);
    *turns = f.turns;
    return st;
}
