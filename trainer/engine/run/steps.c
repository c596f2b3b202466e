#include "run/steps.h"

#include <inttypes.h>
#include <string.h>

#include "core/clock.h"
#include "data/order.h"
#include "run/executor_internal.h"
#include "run/weights.h"

/* The first skipped snapshot of an attempt, the second, the fourth: who waits for a store hears of it, not of each. */
static void tell_skipped(const hs_executor *ex) {
    const uint64_t n = ex->metrics->skipped;
    if (!ex->control.skipped || (n & (n - 1))) return;
    HS_LOG(ex->log, HS_LOG_WARN, "snapshot skipped: a rank has no free slot",
           HS_I("step", ex->control.step), HS_I("skipped", (int64_t)n),
           HS_S("mend", "its agent still reads them: is the store slow? raise checkpoint.slots or "
                        "checkpoint.persist_every"));
}

/* The first step of an attempt of which no token counts. */
static void tell_idle(const hs_executor *ex) {
    if (ex->control.counted || ex->metrics->idle != 1) return;
    HS_LOG(
        ex->log, HS_LOG_WARN, "no token of this step counts: the weights stay, the moments fade",
        HS_I("step", ex->control.step),
        HS_S("mend",
             "prompts fill whole samples: raise train.batch or train.sequence, or shorten them"));
}

/* One line from rank 0: to standard output and to the agent. */
static void tell_step(const hs_executor *ex) {
    char line[2048];
    hs_text text = hs_text_over(line, sizeof line);
    const hs_amendments *m = ex->amendments;
    hs_metrics_step(ex->metrics, &ex->control,
                    hs_order_batch(m->skips, m->skip_count, ex->control.step), &text);
    if (ex->rank != 0) return;
    tell_skipped(ex);
    tell_idle(ex);
    hs_metrics_print(&text);
    if (ex->agent) hs_agent_link_metrics(ex->agent, line);
}

/* The prefix of the step after ex->step. */
static hs_status run_prefix(hs_executor *ex, hs_which which, hs_why *why) {
    ex->step++;
    const hs_status st =
        hs_executor_run(ex, HS_LIST_STEP, 0, ex->position->step_prefix, which, why);
    if (st == HS_OK) ex->step--; /* else the last words name the step that failed */
    return st;
}

/* Whether the prefix ran on weights that AdamW did not leave. */
static bool clipped(const hs_executor *ex) {
    return ex->control.clip_scale != 1.0f;
}

/* The end of step ex->step, whose rest is done: the next one's prefix, if there is a next one, and the
 * check. */
static hs_status check(hs_executor *ex, hs_why *why) {
    const hs_plan_position *p = ex->position;
    const bool ahead = ex->step < hs_executor_last_step(ex);
    if (ahead)
        HS_TRY(run_prefix(ex, HS_ALL, why));
    else
        HS_TRY(hs_executor_run(ex, HS_LIST_STEP, 0, p->step_prefix, HS_REPORT, why));
    HS_TRY(hs_executor_run(ex, HS_LIST_STEP, p->step_prefix, p->step_checks, HS_ALL, why));
    if (!ahead || ex->control.stop || !clipped(ex)) return HS_OK;
    memset(ex->sent[(ex->step + 1) & 1], 0, sizeof ex->sent[0]); /* what the prefix sent is void */
    HS_TRY(hs_executor_run(ex, HS_LIST_REDO, 0, p->redos, HS_ALL, why));
    return run_prefix(ex, HS_AGAIN, why);
}

/* Step ex->step from behind its prefix to its end. */
static hs_status run_step(hs_executor *ex, hs_why *why) {
    const hs_plan_position *p = ex->position;
    const uint32_t before = p->step_prefix + p->step_checks;
    HS_TRY(hs_executor_run(ex, HS_LIST_STEP, before, p->steps - before, HS_ALL, why));
    if (p->step_checks) HS_TRY(check(ex, why));
    if (!ex->dump_dir) return HS_OK;
    HS_TRY(hs_messages_settle(ex->messages, why));
    return hs_weights_dump(ex->dump_dir, ex->step, HS_DUMP_WEIGHTS, ex->plan, ex->rank, ex->spaces,
                           why);
}

/* All of step ex->step once more, up to its decision, which fails it. An optimistic one's copies of weights are those of
 * the next step by now, and its tokens too. */
static hs_status compute_again(hs_executor *ex, hs_why *why) {
    const hs_plan_position *p = ex->position;
    const uint32_t before = p->step_prefix + p->step_checks;
    memset(ex->sent[ex->step & 1], 0, sizeof ex->sent[0]);
    ex->last = HS_LISTS;
    if (!p->step_checks) return hs_executor_run(ex, HS_LIST_STEP, 0, p->steps, HS_NO_DATA, why);
    HS_TRY(hs_executor_prepare(ex, HS_LIST_LOAD, why));
    HS_TRY(hs_executor_run(ex, HS_LIST_STEP, 0, p->step_prefix, HS_NO_REPORT, why));
    HS_TRY(hs_executor_run(ex, HS_LIST_STEP, before, p->steps - before, HS_ALL, why));
    HS_TRY(hs_executor_run(ex, HS_LIST_STEP, 0, p->step_prefix, HS_REPORT, why));
    return hs_executor_run(ex, HS_LIST_STEP, p->step_prefix, p->step_checks, HS_ALL, why);
}

/* Behind a decision that step ex->step is not finite: HS_E_DIVERGED, and why with the first number that is not. */
static hs_status look_again(hs_executor *ex, hs_why *why) {
    const bool gone = ex->position->step_checks && ex->attempt->data_ahead;
    if (!ex->spaces->backend->unified || gone) return HS_E_DIVERGED;
    ex->looks = true;
    ex->look = (hs_look){.plan = ex->plan,
                         .position = ex->position,
                         .replica = hs_plan_replica_of(ex->plan, ex->rank),
                         .arena = ex->spaces->arena,
                         .linked = ex->linked};
    hs_look_begin(&ex->look);
    hs_linked_watch(ex->linked, hs_look_at_call, &ex->look);
    hs_why again = {0};
    const hs_status st = compute_again(ex, &again);
    hs_linked_watch(ex->linked, NULL, NULL);
    if (st == HS_E_DIVERGED) {
        *why = again;
    } else {
        ex->looks = false;
        HS_LOG(ex->log, HS_LOG_WARN,
               "the step could not be computed again, to find what was not finite first",
               HS_I("step", ex->step), HS_S("why", again.text));
    }
    return HS_E_DIVERGED;
}

/* Behind a call (hs_linked_watch), of a host: it ends now, and began when the one before it ended. */
static void trace_call(void *ctx, const hs_plan_action *action, uint32_t call) {
    hs_executor *ex = ctx;
    const int64_t now = hs_clock_ns();
    hs_trace_call(ex->trace, ex->call_step, (uint32_t)(action - ex->plan->actions), call,
                  ex->call_ns, now);
    ex->call_ns = now;
}

hs_status hs_steps_run(hs_executor *ex, int64_t start_step, hs_why *why) {
    const int64_t last = hs_executor_last_step(ex);
    ex->step = start_step;
    bool saved = false, stopped = false;
    if (hs_trace_has_calls(ex->trace) && ex->spaces->backend->unified)
        hs_linked_watch(ex->linked, trace_call, ex);
    hs_metrics_begin(ex->metrics);
    if (ex->step < last && ex->position->step_checks) HS_TRY(run_prefix(ex, HS_NO_REPORT, why));
    while (ex->step < last && !stopped) {
        ex->step++;
        const hs_status st = run_step(ex, why);
        if (st == HS_E_DIVERGED) return look_again(ex, why);
        HS_TRY(st);
        tell_step(ex);
        if (ex->agent) hs_agent_link_poll(ex->agent);
        hs_metrics_begin(ex->metrics);
        stopped = ex->control.stop && ex->step < last;
        saved = true;
    }
    HS_TRY(hs_messages_settle(ex->messages, why));
    hs_spaces_settle(ex->spaces, 0, ex->spaces->bytes);
    if (!ex->snapshot) return stopped ? HS_E_STOPPED : HS_OK;
    /* An attempt that starts where the run ends: its gang died between the last step and the
     * commit. */
    const int64_t deadline_ns = hs_deadline_ns(ex->attempt->commit_ms);
    if (!saved) HS_TRY(hs_executor_save(ex, true, why));
    const hs_status st = hs_executor_finish_saving(ex, deadline_ns, why);
    if (st == HS_E_AGAIN) {
        why->text[0] = 0;
        return hs_fail(why, HS_E_LOST,
                       "the device did not copy the state of step %" PRId64 " in time", ex->step);
    }
    HS_TRY(st);
    HS_TRY(hs_agent_link_wait_committed(ex->agent, ex->step, deadline_ns, ex->stop, why));
    return stopped ? HS_E_STOPPED : HS_OK;
}
