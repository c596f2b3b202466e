/* I11 of run/plan.h: what stands in which part of an optimistic step's list, so that run/steps.c may run
 * the prefix before the step before is checked, and run it again. */
#include <inttypes.h>

#include "run/plan/plan_internal.h"

/* The kind of an action's channel, HS_CH_*; 0: it is no message. *across: between replicas. */
static uint32_t channel_of(const hs_plan *plan, const hs_plan_action *a, bool *across) {
    *across = false;
    if (!hs_plan_is_message(a)) return 0;
    *across = plan->channels[a->channel].across > 0;
    return plan->channels[a->channel].kind;
}

/* Forwards, the tokens that they read, and the report of the step before. */
static bool in_prefix(const hs_plan *plan, const hs_plan_action *a) {
    bool across;
    const uint32_t channel = channel_of(plan, a, &across);
    if (channel == HS_CH_REPORT) return !across && a->kind == HS_A_SEND;
    return channel == HS_CH_FORWARD || a->kind == HS_A_DATA ||
           (a->kind == HS_A_RUN && a->op == 'F');
}

/* What comes of the reports, as far as the snapshot. */
static bool in_check(const hs_plan *plan, const hs_plan_action *a) {
    bool across;
    const uint32_t channel = channel_of(plan, a, &across);
    switch (a->kind) {
    case HS_A_SEND:
    case HS_A_RECV:
        return channel == HS_CH_CONTROL ||
               (channel == HS_CH_REPORT && (across || a->kind == HS_A_RECV));
    case HS_A_COMBINE:
    case HS_A_MERGE:
    case HS_A_DECIDE:
    case HS_A_CHECK:
    case HS_A_SNAPSHOT:
        return true;
    default:
        return a->kind == HS_A_RUN && a->op == 'O';
    }
}

/* What is neither, but programs. */
static bool in_rest(const hs_plan *plan, const hs_plan_action *a) {
    bool across;
    const uint32_t channel = channel_of(plan, a, &across);
    if (channel) return channel != HS_CH_CONTROL && channel != HS_CH_REPORT;
    return a->kind == HS_A_RUN || a->kind == HS_A_REPORT || a->kind == HS_A_FORESEE;
}

/* What the optimizer made goes where it belongs. */
static bool in_redo(const hs_plan *plan, const hs_plan_action *a) {
    bool across;
    const uint32_t channel = channel_of(plan, a, &across);
    if (channel) return channel == HS_CH_TIED_WEIGHT || channel == HS_CH_GATHER;
    return a->kind == HS_A_RUN && a->op == 'O';
}

static hs_status check_part(hs_plan_checker *c, const hs_plan_position *p, const char *name,
                            uint32_t first, uint32_t count,
                            bool (*in)(const hs_plan *, const hs_plan_action *)) {
    for (uint32_t k = 0; k < count; k++) {
        if (in(c->plan, &c->plan->actions[first + k])) continue;
        return REFUSE(c, "action %" PRIu32 ": kind %u has no place in the %s of position %" PRIu32,
                      first + k, c->plan->actions[first + k].kind, name, p->position);
    }
    return HS_OK;
}

/* No gradient is added to before the optimizer has used it, and messages are repeated at both ends. */
static hs_status check_prefix(hs_plan_checker *c, const hs_plan_position *p) {
    for (uint32_t k = 0; k < p->step_prefix; k++) {
        const hs_plan_action *a = &c->plan->actions[p->first_step + k];
        bool across;
        if (channel_of(c->plan, a, &across) == HS_CH_FORWARD)
            (a->kind == HS_A_SEND
                 ? c->sends
                 : c->recvs)[(size_t)a->channel * HS_PLAN_COUNTED + HS_PLAN_PREFIX]++;
        if (a->kind == HS_A_RUN && hs_plan_writes_state(c->plan, p, a->program)) {
            return REFUSE(c,
                          "action %" PRIu32
                          ": it changes state or gradients in the prefix of position %" PRIu32,
                          p->first_step + k, p->position);
        }
    }
    return HS_OK;
}

hs_status hs_plan_check_parts(hs_plan_checker *c, const hs_plan_position *p) {
    const hs_plan_position *first = &c->plan->positions[0];
    if ((p->step_checks > 0) != (first->step_checks > 0) ||
        (!p->step_checks && (p->step_prefix || p->redos))) {
        return REFUSE(c,
                      "position %" PRIu32 ": a prefix of %" PRIu32 ", a check of %" PRIu32
                      " and a redo of %" PRIu32
                      " actions; all positions' steps are checked ones, without, or none is",
                      p->position, p->step_prefix, p->step_checks, p->redos);
    }
    if (!p->step_checks) return HS_OK;
    const uint32_t before = p->step_prefix + p->step_checks;
    HS_TRY(check_part(c, p, "prefix", p->first_step, p->step_prefix, in_prefix));
    HS_TRY(check_part(c, p, "check", p->first_step + p->step_prefix, p->step_checks, in_check));
    HS_TRY(check_part(c, p, "rest", p->first_step + before, p->steps - before, in_rest));
    HS_TRY(check_part(c, p, "redo", p->first_redo, p->redos, in_redo));
    return check_prefix(c, p);
}
