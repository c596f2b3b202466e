/* I10 of run/plan.h: nothing is written where another part of the engine, or another operand of the
 * same call, counts on what is there. Every write that a plan can order is one of: a kernel's
 * operand (roles in wire/kernels.h), DATA (tokens and targets), COMBINE and MERGE (the combined
 * report), DECIDE (the control block), REPORT and RECV (their reference). */
#include <inttypes.h>

#include "kernels/kernels.h"
#include "run/plan/plan_internal.h"

static bool meet(uint64_t a, uint64_t a_bytes, uint64_t b, uint64_t b_bytes) {
    return a < b + b_bytes && b < a + a_bytes;
}

/* A place of the arena that only certain writers may touch; offset UINT64_MAX: it is not there. */
typedef struct place {
    const char *name;
    uint64_t offset, bytes;
} place;

static bool of_arena(const hs_plan_ref *ref) {
    return ref->space == HS_SPACE_STATIC || ref->space == HS_SPACE_PIECE;
}

static bool touches(const place *at, uint64_t offset, uint64_t bytes) {
    return at->offset != UINT64_MAX && meet(at->offset, at->bytes, offset, bytes);
}

static place sumsq_of(const hs_plan *plan, const hs_plan_position *p) {
    return (place){"squared norms", p->sumsq_offset,
                   8u * (uint64_t)plan->count[HS_SECTION_TENSORS]};
}

static place control_of(const hs_plan_position *p) {
    return (place){"control block", p->control_offset, sizeof(hs_step_control)};
}

static place foreseen_of(const hs_plan_position *p) {
    return (place){"foreseen control block", hs_plan_foreseen(p), sizeof(hs_step_control)};
}

/* NULL: a write there of a microbatch area reaches neither tokens nor targets. */
static const char *reaches_index(const hs_plan *plan, const hs_plan_position *p, uint64_t offset,
                                 uint64_t bytes) {
    const uint64_t rows = (uint64_t)hs_plan_rows(plan) * 4;
    const place tokens = {"tokens", p->tokens_offset, rows};
    const place targets = {"targets", p->targets_offset, rows};
    return touches(&tokens, offset, bytes)    ? tokens.name
           : touches(&targets, offset, bytes) ? targets.name
                                              : NULL;
}

hs_status hs_plan_check_rows_apart(const hs_plan_checker *c, const hs_plan_position *p) {
    const uint64_t rows = (uint64_t)hs_plan_rows(c->plan) * 4;
    const place kept[3] = {{"tokens", p->tokens_offset, rows},
                           {"targets", p->targets_offset, rows},
                           {"losses", p->loss_offset, rows}};
    for (int a = 0; a < 3; a++) {
        for (int b = a + 1; b < 3; b++) {
            if (kept[b].offset == UINT64_MAX || !touches(&kept[a], kept[b].offset, rows)) continue;
            return REFUSE(c, "position %" PRIu32 ": %s at %" PRIu64 " lie over %s at %" PRIu64,
                          p->position, kept[b].name, kept[b].offset, kept[a].name, kept[a].offset);
        }
    }
    return HS_OK;
}

hs_status hs_plan_check_apart(const hs_plan_checker *c, const hs_plan_position *p,
                              const hs_plan_ref *ref, const char *what, size_t i) {
    const uint64_t span = hs_plan_span(c->plan, ref);
    if (!of_arena(ref) || span == 0) return HS_OK;
    const place areas[2] = {{"activation slots", p->act_offset, p->act_stride * p->act_slots},
                            {"microbatch areas", p->mb_offset, p->mb_stride * p->mb_count}};
    for (int k = 0; k < 2; k++) {
        if (areas[k].bytes && touches(&areas[k], ref->offset, span)) {
            return REFUSE(c,
                          "%s %zu at position %" PRIu32 ": static reference %" PRIu64 "+%" PRIu64
                          " reaches into the %s at %" PRIu64 "+%" PRIu64,
                          what, i, p->position, ref->offset, span, areas[k].name, areas[k].offset,
                          areas[k].bytes);
        }
    }
    return HS_OK;
}

/* What no kernel may write at all, and the squared norms, which SUMSQ alone does. */
static hs_status check_operand_write(const hs_plan_checker *c, const hs_plan_position *p, size_t i,
                                     int o) {
    const hs_plan_call *call = &c->plan->calls[i];
    const hs_kernel_facts *facts = hs_kernel_facts_of(call->kernel);
    const hs_plan_ref *ref = &call->ptr[o];
    uint64_t bytes = 0;
    HS_TRY(hs_kernel_extent(call->kernel, call->dtype, call->dim, o, &bytes));
    const char *over = NULL;
    if (ref->space == HS_SPACE_MB) over = reaches_index(c->plan, p, ref->offset, bytes);
    if (ref->space == HS_SPACE_PIECE) bytes = hs_plan_span(c->plan, ref);
    if (of_arena(ref)) {
        const place control = control_of(p), sumsq = sumsq_of(c->plan, p),
                    foreseen = foreseen_of(p);
        const bool norm = (call->kernel == HS_K_SUMSQ || call->kernel == HS_K_SUM) &&
                          facts->operands[o].role == HS_ROLE_WRITE;
        if (touches(&control, ref->offset, bytes)) over = control.name;
        if (touches(&foreseen, ref->offset, bytes)) over = foreseen.name;
        if (!norm && touches(&sumsq, ref->offset, bytes)) over = sumsq.name;
    }
    if (!over) return HS_OK;
    return REFUSE(c,
                  "call %zu (%s) at position %" PRIu32 ": it writes %s at %" PRIu64 "+%" PRIu64
                  " of space %" PRIu32 ", over the %s",
                  i, facts->name, p->position, facts->operands[o].name, ref->offset, bytes,
                  ref->space, over);
}

/* Whether two operands of a call share a byte that they must not, in any replica. */
static bool clash(const hs_plan *plan, const hs_plan_call *call, int a, int b) {
    const hs_plan_ref *x = &call->ptr[a], *y = &call->ptr[b];
    if (x->space != HS_SPACE_PIECE && y->space != HS_SPACE_PIECE) {
        return x->space == y->space &&
               hs_kernel_clash(call->kernel, call->dtype, call->dim, a, x->offset, b, y->offset);
    }
    if (!of_arena(x) || !of_arena(y) ||
        !meet(x->offset, hs_plan_span(plan, x), y->offset, hs_plan_span(plan, y)))
        return false;
    for (uint32_t replica = 0; replica < plan->config->replicas; replica++) {
        const uint64_t at = hs_plan_resolve(x, replica).offset;
        const uint64_t other = hs_plan_resolve(y, replica).offset;
        if (hs_kernel_clash(call->kernel, call->dtype, call->dim, a, at, b, other)) return true;
    }
    return false;
}

hs_status hs_plan_check_call_writes(const hs_plan_checker *c, const hs_plan_position *p, size_t i) {
    const hs_plan_call *call = &c->plan->calls[i];
    const hs_kernel_facts *facts = hs_kernel_facts_of(call->kernel);
    for (int a = 0; a < facts->operand_count; a++) {
        const hs_plan_ref *x = &call->ptr[a];
        if (x->space == HS_SPACE_NONE || facts->operands[a].role == HS_ROLE_READ) continue;
        HS_TRY(check_operand_write(c, p, i, a));
        for (int b = 0; b < facts->operand_count; b++) {
            const hs_plan_ref *y = &call->ptr[b];
            /* else two spaces share no byte (hs_plan_check_apart) */
            if (b == a || !clash(c->plan, call, a, b)) continue;
            return REFUSE(c,
                          "call %zu (%s) at position %" PRIu32 ": it writes %s at %" PRIu64
                          " of space %" PRIu32 ", over its operand %s at %" PRIu64,
                          i, facts->name, p->position, facts->operands[a].name, x->offset, x->space,
                          facts->operands[b].name, y->offset);
        }
    }
    return HS_OK;
}

/* A state tensor that STATIC bytes reach; NULL: none. */
static const hs_plan_state *reaches_state(const hs_plan *plan, const hs_plan_position *p,
                                          uint64_t offset, uint64_t bytes) {
    for (uint32_t i = 0; i < p->states; i++) {
        const hs_plan_state *s = &plan->states[p->first_state + i];
        const uint64_t kept = hs_plan_kept(plan, s) * 4;
        const uint64_t at[4] = {s->master_offset, s->m_offset, s->v_offset, s->grad_offset};
        for (int k = 0; k < 4; k++) {
            if (k > 0 && plan->config->mode != HS_MODE_TRAIN) break;
            if (k == 2 && hs_state_kinds(s) < 3) continue;
            if (meet(at[k], k < 3 ? kept : kept * s->pieces, offset, bytes)) return s;
        }
    }
    return NULL;
}

const hs_plan_call *hs_plan_writes_state(const hs_plan *plan, const hs_plan_position *p,
                                         uint32_t program) {
    const hs_plan_program *g = &plan->programs[program];
    for (uint32_t i = 0; i < g->calls; i++) {
        const hs_plan_call *call = &plan->calls[g->first_call + i];
        const hs_kernel_facts *facts = hs_kernel_facts_of(call->kernel);
        for (int o = 0; o < facts->operand_count; o++) {
            const hs_plan_ref *ref = &call->ptr[o];
            if (facts->operands[o].role != HS_ROLE_READ && of_arena(ref) &&
                reaches_state(plan, p, ref->offset, hs_plan_span(plan, ref)))
                return call;
        }
    }
    return NULL;
}

hs_status hs_plan_check_action_writes(const hs_plan_checker *c, const hs_plan_position *p,
                                      size_t i) {
    const hs_plan_action *a = &c->plan->actions[i];
    const hs_plan_ref *ref = &a->ref;
    if ((a->kind == HS_A_APPLY || a->kind == HS_A_CHECK) && ref->offset != p->control_offset) {
        return REFUSE(c, "action %zu: it applies what is not position %" PRIu32 "'s control block",
                      i, p->position);
    }
    if (a->kind == HS_A_FORESEE && ref->offset != hs_plan_foreseen(p)) {
        return REFUSE(c, "action %zu: what it foresees lies elsewhere than position %" PRIu32 "'s",
                      i, p->position);
    }
    if (a->kind != HS_A_RECV && a->kind != HS_A_REPORT && a->kind != HS_A_COMBINE) return HS_OK;
    const char *over = NULL;
    if (ref->space == HS_SPACE_MB) over = reaches_index(c->plan, p, ref->offset, ref->bytes);
    const uint64_t span = hs_plan_span(c->plan, ref);
    if (of_arena(ref)) {
        const place control = control_of(p), sumsq = sumsq_of(c->plan, p),
                    foreseen = foreseen_of(p);
        const bool order = a->kind == HS_A_RECV &&
                           a->channel < c->plan->count[HS_SECTION_CHANNELS] &&
                           c->plan->channels[a->channel].kind == HS_CH_CONTROL &&
                           ref->offset == control.offset && ref->bytes == control.bytes;
        if (!order && touches(&control, ref->offset, span)) over = control.name;
        if (touches(&sumsq, ref->offset, span)) over = sumsq.name;
        if (touches(&foreseen, ref->offset, span)) over = foreseen.name;
        if (reaches_state(c->plan, p, ref->offset, span)) over = "state of a tensor";
    }
    if (!over) return HS_OK;
    return REFUSE(c,
                  "action %zu at position %" PRIu32 ": kind %u at %" PRIu64 "+%" PRIu64
                  " of space %" PRIu32 " lies over the %s",
                  i, p->position, a->kind, ref->offset, span, ref->space, over);
}
