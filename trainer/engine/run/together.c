#include "run/together.h"

#include <stdbool.h>
#include <stdlib.h>

#include "run/touches.h"

/* Bytes [begin, end) of a space that a call touches. A program's calls are of one slot and one microbatch. */
typedef struct range {
    uint64_t begin, end;
    uint32_t space;
    bool writes;
} range;

typedef struct touched {
    range ranges[HS_CALL_PTRS];
    int count;
} touched;

/* Calls of one kernel and dtype that wait. No two that wait may be told apart by their order. */
typedef struct waiting {
    uint32_t kernel, dtype, count;
    uint32_t calls[HS_TOGETHER];
} waiting;

enum { KINDS = 16 };

typedef struct turning {
    const touched *touched; /* by call */
    waiting kinds[KINDS];
    hs_turned *order;
    uint32_t given;
} turning;

static touched touched_by(const hs_plan_call *call, uint32_t replica) {
    touched t = {.count = 0};
    for (int o = 0; o < hs_kernel_facts_of(call->kernel)->operand_count; o++) {
        int how;
        const hs_plan_ref ref = hs_touched_by(call, o, replica, &how);
        if (ref.space == HS_SPACE_NONE) continue;
        t.ranges[t.count++] = (range){.begin = ref.offset,
                                      .end = ref.offset + ref.bytes,
                                      .space = ref.space,
                                      .writes = how & HS_TOUCH_WRITES};
    }
    return t;
}

static bool meet(const touched *a, const touched *b) {
    for (int i = 0; i < a->count; i++)
        for (int j = 0; j < b->count; j++) {
            const range *x = &a->ranges[i], *y = &b->ranges[j];
            if ((x->writes || y->writes) && x->space == y->space && x->begin < y->end &&
                y->begin < x->end)
                return true;
        }
    return false;
}

static void give(turning *t, const uint32_t *calls, uint32_t count) {
    for (uint32_t i = 0; i < count; i++)
        t->order[t->given++] = (hs_turned){.call = calls[i], .count = i ? 0 : count};
}

static void give_waiting(turning *t, waiting *w) {
    give(t, w->calls, w->count);
    w->count = 0;
}

static void give_what_meets(turning *t, uint32_t call) {
    for (waiting *w = t->kinds; w < t->kinds + KINDS; w++)
        for (uint32_t i = 0; i < w->count; i++)
            if (meet(&t->touched[w->calls[i]], &t->touched[call])) give_waiting(t, w);
}

/* Where calls of its kind wait: with others, or in the first free place. */
static waiting *place_of(turning *t, const hs_plan_call *call) {
    waiting *free_place = NULL;
    for (waiting *w = t->kinds; w < t->kinds + KINDS; w++) {
        if (w->count && w->kernel == call->kernel && w->dtype == call->dtype) return w;
        if (!w->count && !free_place) free_place = w;
    }
    if (!free_place) give_waiting(t, free_place = t->kinds);
    free_place->kernel = call->kernel;
    free_place->dtype = call->dtype;
    return free_place;
}

hs_status hs_together_order(const hs_backend *backend, const hs_plan *plan,
                            const hs_plan_program *program, uint32_t replica, hs_turned *order,
                            hs_why *why) {
    touched *all = malloc((program->calls + (size_t)1) * sizeof *all);
    turning t = {.touched = all, .order = order};
    if (!all) return hs_fail(why, HS_E_MEMORY, "no memory for the order of a program's calls");
    for (uint32_t i = 0; i < program->calls; i++) {
        const hs_plan_call *call = &plan->calls[program->first_call + i];
        const uint32_t most = backend->together(call->kernel);
        all[i] = touched_by(call, replica);
        give_what_meets(&t, i);
        if (most <= 1) {
            give(&t, &i, 1);
            continue;
        }
        waiting *w = place_of(&t, call);
        w->calls[w->count++] = i;
        if (w->count == most) give_waiting(&t, w);
    }
    for (waiting *w = t.kinds; w < t.kinds + KINDS; w++) give_waiting(&t, w);
    free(all);
    return HS_OK;
}
