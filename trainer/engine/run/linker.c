#include "run/linker.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "run/together.h"

typedef struct linked_call {
    hs_args args; /* STATIC operands and PIECEs are addresses, ACT and MB ones NULL */
    uint64_t offset[HS_CALL_PTRS]; /* of ACT and MB operands in their area */
    uint8_t space[HS_CALL_PTRS];
    uint32_t number; /* in the plan's table, for messages */
    uint16_t kernel;
    uint16_t together; /* calls of one launch from here on; 0: it is of one that begins before */
    bool moves;        /* has an ACT or MB operand */
} linked_call;

struct hs_linked {
    const hs_plan *plan;
    const hs_plan_position *position;
    uint32_t replica;
    hs_spaces *spaces;
    uint32_t *first; /* by program: index into calls */
    linked_call *calls;
    size_t count;
    uint16_t
        *graph_of;     /* by action of the step's list; NO_GRAPH: plain launches. NULL: no graphs */
    bool *launched;    /* by graph: its calls were once, plainly */
    hs_graph **graphs; /* NULL: not captured yet */
    hs_status (*between)(void *ctx, hs_why *why);
    void *between_ctx;
    void (*watch)(void *ctx, const hs_plan_action *action, uint32_t call);
    void *watch_ctx;
};

enum { NO_GRAPH = UINT16_MAX };
_Static_assert((int)HS_LINKED_GRAPHS < (int)NO_GRAPH, "numbers of graphs");

static uint64_t area(const hs_linked *linked, uint32_t space, uint32_t slot, uint32_t microbatch) {
    const hs_plan_position *p = linked->position;
    if (space == HS_SPACE_ACT) return p->act_offset + slot * p->act_stride;
    if (space == HS_SPACE_MB) return p->mb_offset + microbatch * p->mb_stride;
    return 0;
}

uint64_t hs_linked_offset(const hs_linked *linked, const hs_plan_ref *ref, uint32_t slot,
                          uint32_t microbatch) {
    const hs_plan_ref here = hs_plan_resolve(ref, linked->replica);
    return area(linked, here.space, slot, microbatch) + here.offset;
}

static void link_call(const hs_linked *linked, uint32_t number, linked_call *out) {
    const hs_plan_call *call = &linked->plan->calls[number];
    *out = (linked_call){.number = number, .kernel = call->kernel, .together = 1};
    memcpy(out->args.dim, call->dim, sizeof out->args.dim);
    memcpy(out->args.real, call->real, sizeof out->args.real);
    out->args.dtype = call->dtype;
    for (int o = 0; o < HS_CALL_PTRS; o++) {
        const hs_plan_ref ref = hs_plan_resolve(&call->ptr[o], linked->replica);
        out->space[o] = (uint8_t)ref.space;
        out->offset[o] = ref.offset;
        if (ref.space == HS_SPACE_STATIC) out->args.ptr[o] = linked->spaces->arena + ref.offset;
        out->moves |= ref.space == HS_SPACE_ACT || ref.space == HS_SPACE_MB;
    }
}

/* Marks the programs that the position's lists run; returns their calls. */
static size_t count_calls(const hs_plan *plan, const hs_plan_position *p, uint8_t *used) {
    size_t calls = 0;
    for (int list = 0; list < HS_LISTS; list++) {
        const hs_plan_range actions = hs_plan_list(p, (hs_list)list);
        for (uint32_t k = 0; k < actions.count; k++) {
            const hs_plan_action *a = &plan->actions[actions.first + k];
            if (a->kind != HS_A_RUN || used[a->program]) continue;
            used[a->program] = 1;
            calls += plan->programs[a->program].calls;
        }
    }
    return calls;
}

/* The part of an action that its addresses come from. */
typedef struct graph_key {
    uint32_t program, slot, microbatch;
} graph_key;

static graph_key key_of(const hs_linked *linked, const hs_plan_action *a) {
    graph_key key = {.program = a->program, .slot = UINT32_MAX, .microbatch = UINT32_MAX};
    const linked_call *call = &linked->calls[linked->first[a->program]];
    for (uint32_t i = 0; i < linked->plan->programs[a->program].calls; i++)
        for (int o = 0; call[i].moves && o < HS_CALL_PTRS; o++) {
            if (call[i].space[o] == HS_SPACE_ACT) key.slot = a->slot;
            if (call[i].space[o] == HS_SPACE_MB) key.microbatch = a->microbatch;
        }
    return key;
}

/* Actions of equal keys share a graph. */
static hs_status number_graphs(hs_linked *linked, hs_why *why) {
    const hs_plan_position *p = linked->position;
    graph_key *keys = calloc(HS_LINKED_GRAPHS, sizeof *keys);
    uint32_t count = 0, calls = 0;
    linked->graph_of = malloc((p->steps + (size_t)1) * sizeof *linked->graph_of);
    linked->launched = calloc(HS_LINKED_GRAPHS, sizeof *linked->launched);
    linked->graphs = calloc(HS_LINKED_GRAPHS, sizeof *linked->graphs);
    if (!keys || !linked->graph_of || !linked->launched || !linked->graphs) {
        free(keys);
        return hs_fail(why, HS_E_MEMORY, "no memory for the table of graphs");
    }
    for (uint32_t i = 0; i < p->steps; i++) {
        const hs_plan_action *a = &linked->plan->actions[p->first_step + i];
        linked->graph_of[i] = NO_GRAPH;
        if (a->kind != HS_A_RUN || linked->plan->programs[a->program].calls < 2) continue;
        const graph_key key = key_of(linked, a);
        uint32_t k = 0;
        while (k < count && memcmp(&keys[k], &key, sizeof key) != 0) k++;
        if (k == count) {
            const uint32_t more = linked->plan->programs[a->program].calls;
            if (count == HS_LINKED_GRAPHS || more > HS_LINKED_GRAPH_CALLS - calls) continue;
            keys[count++] = key;
            calls += more;
        }
        linked->graph_of[i] = (uint16_t)k;
    }
    free(keys);
    return HS_OK;
}

static hs_status order_calls(const hs_linked *linked, const hs_plan_program *program,
                             hs_turned *order, hs_why *why) {
    const hs_backend *backend = linked->spaces->backend;
    if (backend->together)
        return hs_together_order(backend, linked->plan, program, linked->replica, order, why);
    for (uint32_t i = 0; i < program->calls; i++) order[i] = (hs_turned){.call = i, .count = 1};
    return HS_OK;
}

hs_status hs_link(const hs_plan *plan, const hs_plan_position *position, uint32_t replica,
                  hs_spaces *spaces, hs_linked **out, hs_why *why) {
    *out = NULL;
    const size_t programs = plan->count[HS_SECTION_PROGRAMS];
    uint8_t *used = calloc(programs + 1, 1);
    hs_linked *linked = calloc(1, sizeof *linked);
    hs_turned *order = NULL;
    if (!used || !linked) goto no_memory;
    *linked = (hs_linked){.plan = plan, .position = position, .replica = replica, .spaces = spaces};
    const size_t calls = linked->count = count_calls(plan, position, used);
    linked->first = calloc(programs + 1, sizeof *linked->first);
    linked->calls = calloc(calls + 1, sizeof *linked->calls);
    order = calloc(calls + 1, sizeof *order);
    if (!linked->first || !linked->calls || !order) goto no_memory;
    uint32_t next = 0;
    bool sleeps = false;
    hs_status st = HS_OK;
    for (size_t p = 0; st == HS_OK && p < programs; p++) {
        if (!used[p]) continue;
        linked->first[p] = next;
        st = order_calls(linked, &plan->programs[p], order, why);
        for (uint32_t i = 0; st == HS_OK && i < plan->programs[p].calls; i++) {
            linked_call *call = &linked->calls[next++];
            link_call(linked, plan->programs[p].first_call + order[i].call, call);
            call->together = (uint16_t)order[i].count;
            sleeps = sleeps || call->kernel == HS_K_DELAY;
        }
    }
    free(used);
    free(order);
    if (st == HS_OK && spaces->backend->capture) {
        st = sleeps ? hs_fail(why, HS_E_CONFIG,
                              "kernel delay sleeps, which a device cannot; run the plan on CPUs "
                              "(parallel.device = \"cpu\"), or compile it without delays")
                    : number_graphs(linked, why);
    }
    if (st != HS_OK) {
        hs_linked_destroy(linked);
        return st;
    }
    *out = linked;
    return HS_OK;

no_memory:
    free(used);
    free(order);
    hs_linked_destroy(linked);
    return hs_fail(why, HS_E_MEMORY, "no memory to link the plan's calls");
}

void hs_linked_destroy(hs_linked *linked) {
    if (!linked) return;
    free(linked->first);
    free(linked->calls);
    free(linked->graph_of);
    free(linked->launched);
    free(linked->graphs); /* which the device has */
    free(linked);
}

static hs_args resolved(const linked_call *call, uint8_t *act, uint8_t *mb) {
    hs_args args = call->args;
    for (int o = 0; call->moves && o < HS_CALL_PTRS; o++) {
        if (call->space[o] == HS_SPACE_ACT) args.ptr[o] = act + call->offset[o];
        if (call->space[o] == HS_SPACE_MB) args.ptr[o] = mb + call->offset[o];
    }
    return args;
}

hs_status hs_linked_each(const hs_linked *linked,
                         hs_status (*each)(void *ctx, uint16_t kernel, const hs_args *args,
                                           hs_why *why),
                         void *ctx, hs_why *why) {
    uint8_t *const base = linked->spaces->arena;
    for (size_t i = 0; i < linked->count; i++) {
        const hs_args args = resolved(&linked->calls[i], base + area(linked, HS_SPACE_ACT, 0, 0),
                                      base + area(linked, HS_SPACE_MB, 0, 0));
        HS_TRY(each(ctx, linked->calls[i].kernel, &args, why));
    }
    return HS_OK;
}

static hs_status issue(const hs_linked *linked, const hs_plan_action *a, hs_why *why) {
    const linked_call *call = &linked->calls[linked->first[a->program]];
    const uint32_t count = linked->plan->programs[a->program].calls;
    uint8_t *const base = linked->spaces->arena;
    uint8_t *const act = base + area(linked, HS_SPACE_ACT, a->slot == UINT32_MAX ? 0 : a->slot, 0);
    uint8_t *const mb =
        base + area(linked, HS_SPACE_MB, 0, a->microbatch == UINT32_MAX ? 0 : a->microbatch);
    for (const linked_call *const end = call + count; call < end; call += call->together) {
        hs_args args[HS_TOGETHER];
        for (uint32_t i = 0; i < call->together; i++) args[i] = resolved(&call[i], act, mb);
        const hs_status st =
            hs_spaces_launch(linked->spaces, call->kernel, args, call->together, why);
        if (st != HS_OK) {
            return hs_fail(why, st, "kernel %u of call %u failed: %s", call->kernel, call->number,
                           hs_status_text(st));
        }
        if (linked->watch) {
            hs_spaces_settle(linked->spaces, 0, linked->spaces->bytes);
            linked->watch(linked->watch_ctx, a, call->number);
        }
        if (linked->between) HS_TRY(linked->between(linked->between_ctx, why));
    }
    return HS_OK;
}

void hs_linked_between(hs_linked *linked, hs_status (*between)(void *ctx, hs_why *why), void *ctx) {
    linked->between = between;
    linked->between_ctx = ctx;
}

void hs_linked_watch(hs_linked *linked,
                     void (*watch)(void *ctx, const hs_plan_action *action, uint32_t call),
                     void *ctx) {
    linked->watch = watch;
    linked->watch_ctx = ctx;
}

hs_status hs_linked_run(hs_linked *linked, const hs_plan_action *a, hs_why *why) {
    hs_spaces *spaces = linked->spaces;
    const size_t at = (size_t)(a - linked->plan->actions) - linked->position->first_step;
    const uint16_t number = linked->graph_of && at < linked->position->steps ? linked->graph_of[at]
                                                                             : (uint16_t)NO_GRAPH;
    if (number == NO_GRAPH || !linked->launched[number]) {
        if (number != NO_GRAPH) linked->launched[number] = true;
        return issue(linked, a, why);
    }
    hs_graph **graph = &linked->graphs[number];
    if (!*graph) {
        HS_TRY(spaces->backend->capture(spaces->device, HS_STREAM_COMPUTE, why));
        HS_TRY(issue(linked, a, why));
        HS_TRY(spaces->backend->captured(spaces->device, HS_STREAM_COMPUTE, graph, why));
    }
    return hs_spaces_replay(spaces, *graph, why);
}
