/* I6 and I9 of run/plan.h: programs and channels, and the actions of each position in order. */

#include <inttypes.h>
#include <string.h>

#include "run/plan/plan_internal.h"

/* I6: a SEND or RECV. */
static hs_status check_message(hs_plan_checker *c, const hs_plan_position *p,
                               const hs_plan_action *a, size_t i, int list) {
    const hs_plan *plan = c->plan;
    if (a->channel >= plan->count[HS_SECTION_CHANNELS]) {
        return REFUSE(c, "action %zu: channel %" PRIu32 " of %zu", i, a->channel,
                      plan->count[HS_SECTION_CHANNELS]);
    }
    const hs_plan_channel *ch = &plan->channels[a->channel];
    if ((a->kind == HS_A_SEND ? ch->from : ch->to) != p->position) {
        return REFUSE(c, "action %zu: channel %" PRIu32 " does not %s position %" PRIu32, i,
                      a->channel, a->kind == HS_A_SEND ? "start at" : "end at", p->position);
    }
    const bool shorter = ch->across && ch->kind >= HS_CH_REDUCE; /* messages of many lengths */
    if (a->ref.bytes > ch->bytes || (shorter ? a->ref.bytes == 0 : a->ref.bytes != ch->bytes)) {
        return REFUSE(
            c, "action %zu: a message of %" PRIu64 " bytes, channel %" PRIu32 " carries %" PRIu64,
            i, a->ref.bytes, a->channel, ch->bytes);
    }
    if (ch->across && ch->kind == HS_CH_REPORT && c->own_report == UINT64_MAX) {
        return REFUSE(c, "action %zu: replicas exchange reports before theirs are combined", i);
    }
    (a->kind == HS_A_SEND ? c->sends
                          : c->recvs)[(size_t)a->channel * HS_PLAN_COUNTED + (size_t)list]++;
    return HS_OK;
}

/* I6: an action of the schedule, whose stage and program exist. */
static hs_status check_stage(hs_plan_checker *c, const hs_plan_position *p, const hs_plan_action *a,
                             size_t i) {
    uint32_t *const at = &c->stage_at[a->stage];
    if (*at && *at != p->position + 1) {
        return REFUSE(c,
                      "action %zu: stage %" PRIu32 " at position %" PRIu32
                      ", it already runs at position %" PRIu32,
                      i, a->stage, p->position, *at - 1);
    }
    *at = p->position + 1;
    if (a->kind != HS_A_RUN) return HS_OK;
    uint32_t *const run = &c->run_for[a->program];
    const uint32_t here = 1 + 128 * a->stage + (uint32_t)a->op;
    if (*run && *run != here) {
        return REFUSE(c,
                      "action %zu: program %" PRIu32 " runs %c of stage %" PRIu32
                      ", it already runs %c of stage %" PRIu32,
                      i, a->program, a->op, a->stage, (char)((*run - 1) % 128), (*run - 1) / 128);
    }
    *run = here;
    return HS_OK;
}

/* I9: room for the blocks of the step's end; 8-byte aligned, STATIC. */
static hs_status check_block(hs_plan_checker *c, const hs_plan_action *a, size_t i,
                             uint64_t bytes) {
    if (a->ref.space != HS_SPACE_STATIC || a->ref.offset % 8 || a->ref.bytes < bytes) {
        return REFUSE(c,
                      "action %zu: its block takes %" PRIu64
                      " aligned bytes of STATIC, its reference has %" PRIu64 " at %" PRIu64,
                      i, bytes, a->ref.bytes, a->ref.offset);
    }
    return HS_OK;
}

/* Whether two references of actions share a byte in any replica. */
static bool share(const hs_plan *plan, const hs_plan_action *a, const hs_plan_action *b) {
    for (uint32_t replica = 0; replica < plan->config->replicas; replica++) {
        const hs_plan_ref x = hs_plan_resolve(&a->ref, replica),
                          y = hs_plan_resolve(&b->ref, replica);
        const bool same =
            x.space == y.space &&
            (x.space == HS_SPACE_STATIC || (a->slot == b->slot && a->microbatch == b->microbatch));
        if (same && x.offset < y.offset + y.bytes && y.offset < x.offset + x.bytes) return true;
    }
    return false;
}

/* I6: each send to another replica is directly followed by the receive that it goes with, of as many bytes and
 * of the same microbatch; both pass at once, so they share no byte. */
static hs_status check_exchange(hs_plan_checker *c, size_t i, const hs_plan_action *before,
                                const hs_plan_action *a) {
    const hs_plan_channel *channels = c->plan->channels;
    const bool open = before && before->kind == HS_A_SEND && channels[before->channel].across;
    const bool across = a && hs_plan_is_message(a) && channels[a->channel].across;
    const bool closes = across && a->kind == HS_A_RECV;
    if (open != closes || (open && before->channel != a->channel)) {
        return REFUSE(c,
                      "action %zu: a send to another replica and the receive from it do not follow "
                      "one another",
                      i);
    }
    if (open && (before->ref.bytes != a->ref.bytes || before->microbatch != a->microbatch ||
                 share(c->plan, before, a))) {
        return REFUSE(c,
                      "action %zu: an exchange sends %" PRIu64 " bytes of microbatch %" PRId32
                      " and receives %" PRIu64 " of %" PRId32 ", or into what it sends",
                      i, before->ref.bytes, (int32_t)before->microbatch, a->ref.bytes,
                      (int32_t)a->microbatch);
    }
    return HS_OK;
}

/* I9: what position 0 makes of the reports. */
static hs_status check_decision(hs_plan_checker *c, const hs_plan_position *p,
                                const hs_plan_action *a, size_t i) {
    const uint64_t report = hs_plan_report_bytes(c->plan);
    if (p->position != 0) {
        return REFUSE(c, "action %zu: position %" PRIu32 " combines, merges or decides, not 0", i,
                      p->position);
    }
    if (p->control_offset == UINT64_MAX) return REFUSE(c, "action %zu: no control block", i);
    if (a->kind == HS_A_COMBINE) {
        c->own_report = a->ref.offset;
        return check_block(c, a, i, report * c->plan->config->positions);
    }
    HS_TRY(check_block(c, a, i, report));
    const bool own =
        a->ref.offset < c->own_report + report && c->own_report < a->ref.offset + report;
    if (c->own_report == UINT64_MAX ||
        (a->kind == HS_A_DECIDE ? a->ref.offset != c->own_report : own)) {
        return REFUSE(
            c, "action %zu: kind %u of the report at %" PRIu64 ", position 0 combines at %" PRIu64,
            i, a->kind, a->ref.offset, c->own_report);
    }
    return HS_OK;
}

/* I6, I9 */
static hs_status check_action(hs_plan_checker *c, const hs_plan_position *p, size_t i, int list) {
    const hs_plan *plan = c->plan;
    const hs_plan_action *a = &plan->actions[i];
    const bool message = hs_plan_is_message(a);
    const bool block = a->kind == HS_A_COMBINE || a->kind == HS_A_REPORT || a->kind == HS_A_APPLY ||
                       a->kind >= HS_A_MERGE;
    if (a->kind == 0 || a->kind >= HS_A_COUNT)
        return REFUSE(c, "action %zu: no kind %u", i, a->kind);
    if (!a->op || !strchr("FIWBO-", a->op)) return REFUSE(c, "action %zu: no op %d", i, a->op);
    /* a stage may be at any position; what a position does as a whole says the position */
    const bool scheduled = strchr("FIWB", a->op) != NULL;
    if (a->reserved || (scheduled ? a->stage >= HS_PLAN_STAGES : a->stage != p->position)) {
        return REFUSE(c,
                      "action %zu: stage %" PRIu32 " in the list of position %" PRIu32
                      ", or reserved is not 0",
                      i, a->stage, p->position);
    }
    if (a->microbatch != UINT32_MAX && a->microbatch >= p->mb_count) {
        return REFUSE(c, "action %zu: microbatch %" PRIu32 " of %" PRIu32, i, a->microbatch,
                      p->mb_count);
    }
    if (a->slot != UINT32_MAX && a->slot >= p->act_slots) {
        return REFUSE(c, "action %zu: slot %" PRIu32 " of %" PRIu32, i, a->slot, p->act_slots);
    }
    if ((a->kind == HS_A_RUN) != (a->program != UINT32_MAX) ||
        message != (a->channel != UINT32_MAX)) {
        return REFUSE(
            c, "action %zu: program %" PRIu32 " or channel %" PRIu32 " does not go with kind %u", i,
            a->program, a->channel, a->kind);
    }
    uint8_t uses = 0;
    if (message || block) {
        HS_TRY(hs_plan_check_ref(c, p, &a->ref, "action", i));
        uses = a->ref.space == HS_SPACE_ACT  ? HS_PLAN_USES_ACT
               : a->ref.space == HS_SPACE_MB ? HS_PLAN_USES_MB
                                             : 0;
    } else if (a->ref.space || a->ref.offset || a->ref.bytes || a->ref.across) {
        return REFUSE(c, "action %zu: kind %u has no reference", i, a->kind);
    }
    if (a->kind == HS_A_RUN) {
        if (a->program >= plan->count[HS_SECTION_PROGRAMS]) {
            return REFUSE(c, "action %zu: program %" PRIu32 " of %zu", i, a->program,
                          plan->count[HS_SECTION_PROGRAMS]);
        }
        HS_TRY(hs_plan_check_program(c, p, a->program));
        uses = c->program_uses[a->program];
    }
    if (scheduled) HS_TRY(check_stage(c, p, a, i));
    if (((uses & HS_PLAN_USES_ACT) && a->slot == UINT32_MAX) ||
        ((uses & HS_PLAN_USES_MB) && a->microbatch == UINT32_MAX)) {
        return REFUSE(c, "action %zu: it uses a slot or a microbatch area and names none", i);
    }
    if (message) return check_message(c, p, a, i, list);
    if (a->kind == HS_A_RUN) return HS_OK;
    if (list != HS_LIST_STEP || plan->config->mode != HS_MODE_TRAIN) {
        return REFUSE(c, "action %zu: kind %u outside the steps of a training", i, a->kind);
    }
    switch (a->kind) {
    case HS_A_REPORT:
        if (p->sumsq_offset == UINT64_MAX)
            return REFUSE(c, "action %zu: a report without sumsq", i);
        return check_block(c, a, i, hs_plan_report_bytes(plan));
    case HS_A_COMBINE:
    case HS_A_MERGE:
    case HS_A_DECIDE:
        return check_decision(c, p, a, i);
    case HS_A_APPLY:
    case HS_A_CHECK:
    case HS_A_FORESEE:
        return check_block(c, a, i, sizeof(hs_step_control));
    default: /* DATA, SNAPSHOT */
        return HS_OK;
    }
}

/* Whether an action of a step's list comes before what it needs; seen: how many of each kind come before
 * it. An optimistic step's reports are of two steps (optimistic.c). */
static bool is_early(const hs_plan_position *p, uint8_t kind, const uint32_t *seen) {
    const bool decides = p->position == 0;
    switch (kind) {
    case HS_A_COMBINE:
        return !p->step_checks && !seen[HS_A_REPORT];
    case HS_A_MERGE:
        return seen[HS_A_DECIDE] > 0;
    case HS_A_APPLY:
        return !seen[HS_A_REPORT] || (decides && !seen[HS_A_DECIDE]);
    case HS_A_CHECK:
        return decides && !seen[HS_A_DECIDE];
    case HS_A_FORESEE:
        return !seen[HS_A_REPORT];
    case HS_A_SNAPSHOT:
        return !seen[HS_A_APPLY] && !seen[HS_A_CHECK];
    default:
        return false;
    }
}

/* I6: the lists of one position. A training step has one report, one control block to take and one
 * snapshot; a checked one in that order. */
static hs_status check_lists(hs_plan_checker *c, const hs_plan_position *p) {
    const hs_plan *plan = c->plan;
    uint32_t seen[HS_A_COUNT] = {0};
    memset(c->program_uses, 0, plan->count[HS_SECTION_PROGRAMS]);
    c->own_report = UINT64_MAX;
    for (int list = 0; list < HS_LISTS; list++) {
        const hs_plan_range actions = hs_plan_list(p, (hs_list)list);
        for (uint32_t k = 0; k < actions.count; k++) {
            const size_t i = (size_t)actions.first + k;
            HS_TRY(check_action(c, p, i, list));
            HS_TRY(check_exchange(c, i, k ? &plan->actions[i - 1] : NULL, &plan->actions[i]));
            if (list != HS_LIST_STEP) {
                HS_TRY(hs_plan_check_action_writes(c, p, i));
                continue;
            }
            const uint8_t kind = plan->actions[i].kind;
            if (is_early(p, kind, seen))
                return REFUSE(c, "action %zu: kind %u comes before what it needs", i, kind);
            seen[kind]++;
            HS_TRY(hs_plan_check_action_writes(c, p, i));
        }
        if (actions.count) {
            const size_t last = (size_t)actions.first + actions.count - 1;
            HS_TRY(check_exchange(c, last, &plan->actions[last], NULL));
        }
    }
    if (plan->config->mode != HS_MODE_TRAIN) return HS_OK;
    const bool ahead = p->step_checks > 0;
    if (seen[HS_A_REPORT] != 1 || seen[HS_A_APPLY] != !ahead || seen[HS_A_CHECK] != ahead ||
        seen[HS_A_FORESEE] != ahead || seen[HS_A_SNAPSHOT] != 1 ||
        seen[HS_A_COMBINE] != (p->position == 0) || seen[HS_A_DECIDE] != (p->position == 0)) {
        return REFUSE(c,
                      "position %" PRIu32 ": a step has %" PRIu32 " reports, %" PRIu32
                      " combines, %" PRIu32 " decisions, %" PRIu32 " applies and %" PRIu32
                      " snapshots; one each, combines and decisions at position 0 only; an "
                      "optimistic one a check (%" PRIu32
                      ") in place of the apply, and foresees (%" PRIu32 ")",
                      p->position, seen[HS_A_REPORT], seen[HS_A_COMBINE], seen[HS_A_DECIDE],
                      seen[HS_A_APPLY], seen[HS_A_SNAPSHOT], seen[HS_A_CHECK], seen[HS_A_FORESEE]);
    }
    if (p->position == 0 &&
        (seen[HS_A_MERGE] > 16 || 1u << seen[HS_A_MERGE] != plan->config->replicas)) {
        return REFUSE(c, "position 0: %" PRIu32 " reports are merged, of %" PRIu32 " replicas",
                      seen[HS_A_MERGE], plan->config->replicas);
    }
    HS_TRY(hs_plan_check_parts(c, p));
    if (!seen[HS_A_DATA] && (p->tokens_offset != UINT64_MAX || p->targets_offset != UINT64_MAX)) {
        return REFUSE(c, "position %" PRIu32 ": it reads tokens and has no data action",
                      p->position);
    }
    return HS_OK;
}

hs_status hs_plan_check_lists(hs_plan_checker *c) {
    const hs_plan *plan = c->plan;
    for (size_t i = 0; i < plan->count[HS_SECTION_PROGRAMS]; i++) {
        const hs_plan_program *g = &plan->programs[i];
        HS_TRY(hs_plan_check_name(c, "program", i, g->name_offset, g->name_length));
        if (!hs_plan_inside(g->first_call, g->calls, plan->count[HS_SECTION_CALLS])) {
            return REFUSE(c, "program %zu: calls %" PRIu32 "+%" PRIu32 " of %zu", i, g->first_call,
                          g->calls, plan->count[HS_SECTION_CALLS]);
        }
    }
    for (size_t i = 0; i < plan->count[HS_SECTION_CHANNELS]; i++) {
        const hs_plan_channel *ch = &plan->channels[i];
        if (ch->from >= plan->config->positions || ch->to >= plan->config->positions ||
            (ch->from == ch->to) != (ch->across > 0) || ch->kind < HS_CH_FORWARD ||
            ch->kind >= HS_CH_COUNT || ch->bytes == 0 || ch->bytes > HS_PLAN_ARENA_MAX) {
            return REFUSE(c,
                          "channel %zu: from %" PRIu32 " to %" PRIu32 " of %" PRIu32
                          ", kind %" PRIu32 ", %" PRIu64 " bytes, across %" PRIu32,
                          i, ch->from, ch->to, plan->config->positions, ch->kind, ch->bytes,
                          ch->across);
        }
        if (ch->across >= plan->config->replicas ||
            (ch->across ? ch->kind != HS_CH_REPORT && ch->kind < HS_CH_REDUCE
                        : ch->kind >= HS_CH_REDUCE) ||
            (ch->across && ch->kind == HS_CH_REPORT && ch->from != 0)) {
            return REFUSE(c,
                          "channel %zu: kind %" PRIu32 " at position %" PRIu32 " across %" PRIu32
                          " of %" PRIu32 " replicas",
                          i, ch->kind, ch->from, ch->across, plan->config->replicas);
        }
    }
    for (uint32_t p = 0; p < plan->config->positions; p++)
        HS_TRY(check_lists(c, &plan->positions[p]));
    for (size_t i = 0; i < plan->count[HS_SECTION_CHANNELS] * HS_PLAN_COUNTED; i++) {
        if (c->sends[i] != c->recvs[i]) {
            return REFUSE(c, "channel %zu: %" PRIu64 " sends and %" PRIu64 " receives in one %s",
                          i / HS_PLAN_COUNTED, c->sends[i], c->recvs[i],
                          (const char *const[]){"init", "load", "step", "redo",
                                                "prefix"}[i % HS_PLAN_COUNTED]);
        }
    }
    return HS_OK;
}
