#include "run/executor.h"

#include <inttypes.h>
#include <poll.h>
#include <string.h>

#include "core/clock.h"
#include "core/hash.h"
#include "run/executor_internal.h"
#include "run/plan_data.h"
#include "run/step_math.h"
#include "run/weights.h"

enum { SLOT_POLL_MS = 5 };

int64_t hs_executor_last_step(const hs_executor *ex) {
    const int64_t steps = hs_step_total(ex->plan->config, ex->amendments);
    const int64_t after = ex->attempt->stop_after;
    return after >= 0 && after < steps ? after : steps;
}

/* One of the plan's arrays of a number a row, of a microbatch; UINT64_MAX: this position has none. */
typedef struct rows {
    uint64_t offset, bytes;
    void *host; /* NULL: none */
} rows;

static rows rows_of(const hs_executor *ex, uint32_t microbatch, uint64_t inside) {
    const hs_plan_position *p = ex->position;
    rows r = {.offset = p->mb_offset + microbatch * p->mb_stride + inside,
              .bytes = 4 * (uint64_t)hs_plan_rows(ex->plan)};
    if (inside != UINT64_MAX) r.host = hs_spaces_host(ex->spaces, r.offset, r.bytes);
    return r;
}

/* Tokens and targets of every microbatch of step ex->step, where this position reads them. */
static hs_status fill_data(const hs_executor *ex, hs_why *why) {
    const hs_plan_config *g = ex->plan->config;
    const hs_amendments *m = ex->amendments;
    const int64_t batch = hs_order_batch(m->skips, m->skip_count, ex->step);
    const hs_order order = hs_plan_order(ex->plan);
    uint64_t sample = hs_order_first(g, hs_plan_replica_of(ex->plan, ex->rank), batch);
    for (uint32_t mb = 0; mb < g->microbatches; mb++) {
        const rows both[2] = {rows_of(ex, mb, ex->position->tokens_offset),
                              rows_of(ex, mb, ex->position->targets_offset)};
        int32_t *tokens = both[0].host, *targets = both[1].host;
        for (uint32_t b = 0; b < g->microbatch; b++, sample++) {
            HS_TRY(
                hs_shards_read(ex->shards, hs_order_sample(&order, sample), tokens, targets, why));
            if (tokens) tokens += g->sequence;
            if (targets) targets += g->sequence;
        }
        for (int k = 0; k < 2; k++)
            if (both[k].host)
                HS_TRY(hs_spaces_put(ex->spaces, both[k].offset, both[k].host, both[k].bytes, why));
    }
    return HS_OK;
}

/* Losses and squared norms come to the host: the one wait of a step. */
static hs_status fetch_sums(const hs_executor *ex, const hs_turn *turn, double **sumsq,
                            hs_why *why) {
    const hs_plan_position *p = ex->position;
    const uint64_t bytes = 8 * (uint64_t)ex->plan->count[HS_SECTION_TENSORS];
    HS_TRY(hs_spaces_begin(ex->spaces, turn, why));
    for (uint32_t m = 0; p->loss_offset != UINT64_MAX && m < ex->plan->config->microbatches; m++) {
        const rows losses = rows_of(ex, m, p->loss_offset);
        HS_TRY(hs_spaces_get(ex->spaces, losses.offset, losses.host, losses.bytes, why));
    }
    *sumsq = (double *)(void *)hs_spaces_host(ex->spaces, p->sumsq_offset, bytes);
    HS_TRY(hs_spaces_get(ex->spaces, p->sumsq_offset, *sumsq, bytes, why));
    HS_TRY(hs_spaces_end(ex->spaces, turn, why));
    return hs_spaces_wait(ex->spaces, HS_STREAM_OUT, why);
}

/* Word to the agent of a snapshot that is READY by now. */
static hs_status tell_saved(hs_executor *ex, hs_why *why) {
    bool any;
    hs_snapshot_done done;
    HS_TRY(hs_snapshot_take(ex->snapshot, &any, &done, why));
    if (any) hs_agent_link_ready(ex->agent, done.slot, done.step, done.final);
    return HS_OK;
}

/* Of this replica's microbatches: group by group, and the groups in a balanced tree. */
static void add_losses(const hs_executor *ex, hs_step_report *report, hs_origin *first) {
    const hs_plan_config *g = ex->plan->config;
    const uint32_t of_group = g->microbatches / (g->reduction_groups / g->replicas);
    hs_step_tree tree = {.count = 0};
    bool finite = true;
    for (uint32_t m = 0; m < g->microbatches;) {
        double sum = 0.0;
        for (const uint32_t end = m + of_group; m < end; m++) {
            if (hs_step_add_losses(rows_of(ex, m, ex->position->loss_offset).host,
                                   rows_of(ex, m, ex->position->targets_offset).host,
                                   hs_plan_rows(ex->plan), &sum, &report->loss_count))
                continue;
            finite = false;
            *first = hs_origin_first(
                *first, hs_origin_of_loss(ex->plan, hs_plan_replica_of(ex->plan, ex->rank), m));
        }
        hs_step_tree_add(&tree, sum);
    }
    report->loss_sum = tree.sums[0];
    report->not_finite = !finite;
}

/* The first tensor of the table whose squared norm is not finite. */
static hs_origin first_norm(const hs_executor *ex, const double *sumsq) {
    for (uint32_t t = 0; t < ex->plan->count[HS_SECTION_TENSORS]; t++)
        if (sumsq[t] - sumsq[t] != 0.0) return hs_origin_of_norm(t);
    return (hs_origin){0};
}

/* This position's report at `out`: losses, squared norms, whether a slot is free, whether a stop
 * was asked for. */
static hs_status write_report(hs_executor *ex, const hs_turn *turn, uint8_t *out, hs_why *why) {
    const hs_plan_position *p = ex->position;
    uint32_t *sent = ex->sent[ex->step & 1];
    hs_step_report report = {.step = ex->step,
                             .position = p->position,
                             .sent_forward = sent[0],
                             .sent_backward = sent[1]};
    sent[0] = sent[1] = 0;
    double *sumsq;
    hs_stop_busy(ex->stop, true);
    const hs_status st = fetch_sums(ex, turn, &sumsq, why);
    hs_stop_busy(ex->stop, false);
    if (st != HS_OK) return st;
    hs_origin first = hs_origin_first(ex->look.first, first_norm(ex, sumsq));
    if (p->loss_offset != UINT64_MAX) add_losses(ex, &report, &first);
    report.origin = first.origin;
    report.origin_of = first.of;
    if (ex->snapshot) HS_TRY(tell_saved(ex, why));
    report.free_slot = ex->snapshot && !ex->looks && hs_step_due(ex->plan->config, ex->step) &&
                       hs_snapshot_claim(ex->snapshot);
    report.stop = hs_stop_requested(ex->stop);
    if (ex->spaces->backend->unified) report.busy_us = hs_metrics_busy_us(ex->metrics);
    memcpy(out, &report, sizeof report);
    memcpy(out + sizeof report, sumsq, 8 * ex->plan->count[HS_SECTION_TENSORS]);
    return HS_OK;
}

/* A message that leaves for another position counts in its step's report, whatever the order, so that a
 * step computed again tells whose results are other ones. Of devices it is not known. */
static void count_sent(hs_executor *ex, const hs_plan_action *a, int64_t step) {
    const uint32_t kind = ex->plan->channels[a->channel].kind;
    if (!ex->spaces->backend->unified || (kind != HS_CH_FORWARD && kind != HS_CH_BACKWARD)) return;
    const uint64_t offset = hs_linked_offset(ex->linked, &a->ref, a->slot, a->microbatch);
    const uint32_t which[2] = {a->stage, a->microbatch};
    const uint32_t crc = hs_crc32c(0, which, sizeof which);
    ex->sent[step & 1][kind == HS_CH_BACKWARD] +=
        hs_crc32c(crc, ex->spaces->arena + offset, a->ref.bytes);
}

static void decide(hs_executor *ex, const uint8_t *report) {
    const hs_step_policy policy = {.config = ex->plan->config,
                                   .amendments = ex->amendments,
                                   .tensors = ex->plan->count[HS_SECTION_TENSORS],
                                   .last_step = hs_executor_last_step(ex),
                                   .slots = ex->snapshot != NULL,
                                   .owed = &ex->owed};
    hs_step_decide(
        &policy, report,
        (void *)hs_spaces_host(ex->spaces, ex->position->control_offset, sizeof(hs_step_control)));
    if (ex->rank == 0)
        hs_metrics_evidence(ex->metrics, report, ex->plan->config->positions, policy.tensors);
}

/* A control block that the host has, for the device. */
static hs_status put_control(hs_executor *ex, const hs_turn *turn, uint64_t offset,
                             const void *block, hs_why *why) {
    HS_TRY(hs_spaces_begin(ex->spaces, turn, why));
    HS_TRY(hs_spaces_put(ex->spaces, offset, block, sizeof(hs_step_control), why));
    return hs_spaces_end(ex->spaces, turn, why);
}

static hs_status diverged(const hs_executor *ex, hs_why *why) {
    char words[400];
    hs_text text = hs_text_over(words, sizeof words);
    const hs_origin first = {ex->control.origin, ex->control.origin_of};
    hs_origin_say(ex->plan, first, &text);
    return hs_fail(why, HS_E_DIVERGED,
                   "step %" PRId64
                   ": loss %g, gradient norm %g, learning rate %g: not finite; nothing of "
                   "this step was applied%s",
                   ex->step, ex->control.loss, ex->control.norm, ex->control.lr, words);
}

/* Equal bits come of an equal state: what is finite now was not computed rightly before. */
static hs_status diverged_again(const hs_executor *ex, hs_why *why) {
    if (ex->control.not_finite) return diverged(ex, why);
    return hs_fail(
        why, HS_E_DIVERGED,
        "step %" PRId64 " was not finite, and computed again from the same state it is (loss %g, "
        "gradient norm %g): a machine of this gang computes or remembers wrongly; nothing "
        "of this step was applied",
        ex->step, ex->control.loss, ex->control.norm);
}

static hs_status apply(hs_executor *ex, const hs_turn *turn, uint64_t offset, const void *block,
                       hs_why *why) {
    memcpy(&ex->control, block, sizeof ex->control);
    HS_TRY(put_control(ex, turn, offset, block, why));
    if (ex->control.step != ex->step) {
        return hs_fail(why, HS_E_BUG,
                       "the control block is of step %" PRId64 ", this is step %" PRId64,
                       ex->control.step, ex->step);
    }
    if (ex->looks) return diverged_again(ex, why);
    if (ex->dump_dir) {
        HS_TRY(hs_messages_settle(ex->messages, why));
        HS_TRY(hs_weights_dump(ex->dump_dir, ex->step, HS_DUMP_GRADS, ex->plan, ex->rank,
                               ex->spaces, why));
    }
    return ex->control.not_finite ? diverged(ex, why) : HS_OK;
}

hs_status hs_executor_finish_saving(hs_executor *ex, int64_t deadline_ns, hs_why *why) {
    HS_TRY(hs_snapshot_wait(ex->snapshot, deadline_ns, ex->stop, why));
    return tell_saved(ex, why);
}

/* Of the last state, for which there may be no slot yet: the agent reads them all. Where that agent has died, the
 * next one hears from here which slots there are, and lets go of them. Messages go on: a peer that has its slot waits
 * for them no longer than stall_ms. HS_E_AGAIN: not in time. */
static hs_status wait_for_slot(hs_executor *ex, int64_t deadline_ns, hs_why *why) {
    while (!hs_snapshot_claim(ex->snapshot)) {
        if (hs_stop_lost(ex->stop))
            return hs_fail(why, HS_E_LOST,
                           "a peer was lost while this rank waited for a snapshot slot");
        if (hs_clock_ns() >= deadline_ns) return HS_E_AGAIN;
        hs_agent_link_poll(ex->agent);
        HS_TRY(hs_messages_progress(ex->messages, why));
        (void)poll(NULL, 0, SLOT_POLL_MS); /* shared memory cannot wake us */
    }
    return HS_OK;
}

hs_status hs_executor_save(hs_executor *ex, bool final, hs_why *why) {
    const hs_snapshot_done what = {
        .step = ex->step, .final = final, .persist = final || ex->control.persist};
    hs_spaces_settle(ex->spaces, 0, ex->spaces->bytes);
    if (final) {
        const int64_t ms = ex->attempt->commit_ms, deadline_ns = hs_deadline_ns(ms);
        hs_status st = hs_executor_finish_saving(ex, deadline_ns, why);
        if (st == HS_OK) st = wait_for_slot(ex, deadline_ns, why);
        if (st == HS_E_AGAIN) {
            why->text[0] = 0;
            return hs_fail(why, HS_E_LOST,
                           "no snapshot slot became free in %" PRId64
                           " ms for the last state (step %" PRId64
                           "): is the agent or the store gone?",
                           ms, ex->step);
        }
        HS_TRY(st);
    }
    hs_stop_busy(ex->stop, true);
    const hs_status st = hs_snapshot_begin(ex->snapshot, &what, why);
    hs_stop_busy(ex->stop, false);
    if (st == HS_E_AGAIN) {
        return hs_fail(why, HS_E_BUG,
                       "the gang saves step %" PRId64 ", and this rank has claimed no slot for it",
                       ex->step);
    }
    return st == HS_OK ? tell_saved(ex, why) : st;
}

/* SNAPSHOT, by what the gang has decided. */
static hs_status save_or_skip(hs_executor *ex, hs_why *why) {
    if (!ex->snapshot) return HS_OK;
    if (ex->control.snapshot)
        return hs_executor_save(ex, ex->control.stop || ex->step >= hs_executor_last_step(ex), why);
    hs_snapshot_unclaim(ex->snapshot);
    return HS_OK;
}

/* A program, or the tokens of a step: between what it follows and what follows it. */
static hs_status in_turn(hs_executor *ex, const hs_plan_action *a, const hs_turn *turn,
                         hs_why *why) {
    HS_TRY(hs_spaces_begin(ex->spaces, turn, why));
    HS_TRY(a->kind == HS_A_RUN ? hs_linked_run(ex->linked, a, why) : fill_data(ex, why));
    /* a traced action's time is that of all its work: the host leaves none for later */
    if (ex->trace) hs_spaces_settle(ex->spaces, 0, ex->spaces->bytes);
    return hs_spaces_end(ex->spaces, turn, why);
}

/* The tokens of this step are in the shards: where they come while the ranks run they may be late. Who waits for them
 * gives up before its peers give up on it: it knows why. */
static hs_status await_data(const hs_executor *ex, hs_why *why) {
    if (!ex->attempt->data_ahead) return HS_OK;
    const int64_t ms = (int64_t)ex->attempt->stall_ms * 3 / 4;
    return hs_agent_link_wait_data(ex->agent, ex->step, hs_deadline_ns(ms), ex->stop, why);
}

static hs_status run_action(hs_executor *ex, hs_list list, uint32_t i, const hs_plan_action *a,
                            hs_why *why) {
    const hs_turn *turn = ex->turns[list] ? &ex->turns[list][i] : NULL;
    const uint64_t offset = hs_linked_offset(ex->linked, &a->ref, a->slot, a->microbatch);
    hs_status st;
    switch (a->kind) {
    case HS_A_RUN:
    case HS_A_DATA:
        if (a->kind == HS_A_DATA) HS_TRY(await_data(ex, why));
        hs_stop_busy(ex->stop, true);
        st = in_turn(ex, a, turn, why);
        hs_stop_busy(ex->stop, false);
        if (a->kind == HS_A_DATA && ex->attempt->data_ahead)
            hs_agent_link_has_read(ex->agent, ex->step);
        return st;
    case HS_A_SEND:
    case HS_A_RECV:
        return hs_messages_run(ex->messages, list, i, turn, why);
    case HS_A_REPORT:
        return write_report(ex, turn, hs_spaces_host(ex->spaces, offset, a->ref.bytes), why);
    case HS_A_COMBINE:
        ex->own_report = hs_spaces_host(ex->spaces, offset, a->ref.bytes);
        hs_step_combine(ex->own_report, ex->plan->config->positions,
                        ex->plan->count[HS_SECTION_TENSORS]);
        return HS_OK;
    case HS_A_MERGE:
        return hs_step_merge(ex->own_report, hs_spaces_host(ex->spaces, offset, a->ref.bytes),
                             ex->plan->count[HS_SECTION_TENSORS], why);
    case HS_A_DECIDE:
        decide(ex, hs_spaces_host(ex->spaces, offset, a->ref.bytes));
        return HS_OK;
    case HS_A_FORESEE: {
        uint8_t *const block = hs_spaces_host(ex->spaces, offset, a->ref.bytes);
        hs_step_foresee(ex->plan->config, ex->amendments, ex->step, (void *)block);
        return put_control(ex, turn, offset, block, why);
    }
    case HS_A_APPLY:
    case HS_A_CHECK:
        return apply(ex, turn, offset, hs_spaces_host(ex->spaces, offset, a->ref.bytes), why);
    case HS_A_SNAPSHOT:
        return save_or_skip(ex, why);
    default:
        HS_ASSERT(!"an action of a kind that the loader refuses");
        return HS_E_BUG;
    }
}

hs_status hs_executor_order(hs_executor *ex, hs_why *why) {
    ex->last = HS_LISTS;
    for (int list = 0; list < HS_LISTS && !ex->spaces->backend->unified; list++) {
        const hs_plan_range actions = hs_plan_list(ex->position, (hs_list)list);
        const hs_hazards_config c = {.plan = ex->plan,
                                     .position = ex->position,
                                     .replica = hs_plan_replica_of(ex->plan, ex->rank),
                                     .first = actions.first,
                                     .count = actions.count,
                                     .again = list == HS_LIST_STEP,
                                     .direct = ex->direct};
        HS_TRY(hs_hazards_find(&c, &ex->turns[list], why));
    }
    return HS_OK;
}

/* The step that an action is of: a report that leaves in a prefix is of the step before. */
static int64_t step_of(const hs_executor *ex, hs_list list, uint32_t i, hs_which which,
                       const hs_plan_action *a) {
    const bool ahead = list == HS_LIST_STEP && i < ex->position->step_prefix && which == HS_ALL;
    return ex->step - (ahead && !hs_which_leaves_out(HS_REPORT, ex->plan, a));
}

hs_status hs_executor_run(hs_executor *ex, hs_list list, uint32_t from, uint32_t count,
                          hs_which which, hs_why *why) {
    const hs_plan_range actions = hs_plan_list(ex->position, list);
    /* what follows what was found for a list that is run from its first action to its last */
    if (ex->last != list || ex->next != from) {
        HS_TRY(hs_spaces_join(ex->spaces, why));
        HS_TRY(hs_messages_settle(ex->messages, why));
    }
    ex->last = list;
    ex->next = which == HS_ALL ? (from + count) % (actions.count ? actions.count : 1) : UINT32_MAX;
    for (uint32_t i = from; i < from + count; i++) {
        const hs_plan_action *a = ex->at = &ex->plan->actions[actions.first + i];
        if (hs_stop_was_lost(ex->stop)) /* a report looked for a request to stop, and took this */
            return hs_fail(why, HS_E_LOST, "the supervisor says that a peer was lost");
        HS_TRY(hs_messages_before(ex->messages, list, i, ex->step, which, why));
        if (hs_which_leaves_out(which, ex->plan, a)) continue;
        const int64_t step = step_of(ex, list, i, which, a);
        hs_rank_page_set(ex->page, step, i, a->kind, a->op, a->microbatch,
                         hs_messages_peer(ex->plan, ex->rank, a));
        const int64_t start = hs_clock_ns(), moved = hs_messages_moved_ns(ex->messages);
        if (a->kind == HS_A_SEND) count_sent(ex, a, step);
        ex->call_step = step;
        ex->call_ns = start;
        const hs_status st = run_action(ex, list, i, a, why);
        const int64_t end = hs_clock_ns();
        hs_metrics_add(ex->metrics, a, end - start);
        if (list >= HS_LIST_STEP)
            hs_trace_add(ex->trace, step, actions.first + i, start, end,
                         hs_messages_moved_ns(ex->messages) - moved);
        if (st != HS_OK) return st;
    }
    ex->at = NULL;
    return HS_OK;
}

hs_status hs_executor_prepare(hs_executor *ex, hs_list list, hs_why *why) {
    return hs_executor_run(ex, list, 0, hs_plan_list(ex->position, list).count, HS_ALL, why);
}

void hs_executor_leave(hs_executor *ex, int64_t ms) {
    hs_why why = {0};
    if (ex->snapshot && hs_snapshot_under_way(ex->snapshot) &&
        hs_snapshot_wait(ex->snapshot, hs_deadline_ns(ms), NULL, &why) == HS_OK)
        (void)tell_saved(ex, &why);
}

void hs_executor_where(const hs_executor *ex, hs_text *text) {
    hs_text_printf(text, ",\"step\":%" PRId64, ex->step);
    const hs_plan_action *awaited = hs_messages_awaited(ex->messages);
    const hs_plan_action *at = awaited ? awaited : ex->at;
    if (at) {
        char name[40];
        hs_plan_action_name(ex->plan, at, name);
        hs_text_printf(text, ",\"action\":");
        hs_text_json_string(text, name);
        if (at->microbatch != UINT32_MAX && !ex->control.not_finite) {
            hs_text_printf(text, ",\"microbatch\":%" PRIu32, at->microbatch);
        }
    }
    if (ex->control.not_finite)
        hs_origin_fields(ex->plan, (hs_origin){ex->control.origin, ex->control.origin_of}, text);
    else if (ex->looks)
        hs_text_printf(text, ",\"again\":\"finite\"");
    hs_comm_wait wait = {.doing = "", .peer = UINT32_MAX};
    if (ex->comm) ex->transport->last_wait(ex->comm, &wait);
    if (wait.doing[0] && wait.peer != UINT32_MAX) {
        hs_text_printf(text, ",\"doing\":\"%s\",\"peer\":%" PRIu32 ",\"waited_us\":%" PRId64,
                       wait.doing, wait.peer, (hs_clock_ns() - wait.since_ns) / 1000);
    }
}
