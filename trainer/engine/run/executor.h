/* One loop that runs a position's lists of actions. It knows instructions, not models and not
 * devices: order, memory and messages are the plan's, run/spaces.h makes them a device's work. All
 * parts are made by run/rank.c and lent to it; it allocates nothing.
 *
 * I1  Actions are issued in the plan's order, from one thread (the CPU's kernels use the pool). On a device
 *     apart each is behind what its turn names (run/hazards.h), and inside a step the host waits for the
 *     device where it reads what the device made, at REPORT, once, and for messages that pass through it
 *     (SEND; RECV, where its window is still being copied); nowhere else. On the CPU messages pass behind
 *     the actions (run/messages.h): an action waits for those whose bytes it touches. What a kernel left for
 *     later is finished before the host, a snapshot or a message comes to its bytes (spaces.h, settle).
 * I2  A step's optimizer runs only after position 0's control block of that step was taken (APPLY, or
 *     CHECK, which the next step's prefix comes before: run/steps.h), and not at all where the block
 *     says that the numbers are not finite.
 * I3  A snapshot holds the state of a whole step: SNAPSHOT comes after the optimizer, by the same
 *     control block on every rank. A device copies it while the next step runs, as far as its optimizer
 *     (run/spaces.h, I3); the agent hears of it when it is READY. Every rank claims its slot for it before it
 *     reports, so that what the gang decides every rank can do, at once; where one has none, all skip it. The
 *     last one of an attempt is never skipped: it waits for a slot, and is awaited.
 */
#ifndef HS_RUN_EXECUTOR_H
#define HS_RUN_EXECUTOR_H

#include <stdint.h>

#include "comm/comm.h"
#include "core/rank_page.h"
#include "core/stop.h"
#include "core/text.h"
#include "data/shards.h"
#include "run/agent_link.h"
#include "run/attempt.h"
#include "run/linker.h"
#include "run/messages.h"
#include "run/metrics.h"
#include "run/origin.h"
#include "run/plan.h"
#include "run/spaces.h"
#include "run/trace.h"
#include "snapshot/snapshot.h"

typedef struct hs_executor {
    /* lent, set before the first call */
    const hs_plan *plan;
    const hs_plan_position *position; /* that this rank fills */
    uint32_t rank;
    const hs_attempt *attempt;
    const hs_amendments *amendments;
    hs_spaces *spaces;
    hs_linked *linked;
    const hs_comm_table *transport;
    hs_comm *comm;      /* NULL: the plan has no channels */
    const bool *direct; /* by channel: from device to device (comm.h, put, take); NULL: none */
    hs_messages *messages;
    const hs_shards *shards; /* NULL: no DATA action here */
    hs_snapshot *snapshot;   /* NULL: no agent, no slots */
    hs_agent_link *agent;    /* NULL: no agent */
    hs_stop *stop;
    hs_rank_page *page; /* NULL: none */
    hs_trace *trace;    /* NULL: off */
    hs_metrics *metrics;
    const char *dump_dir; /* NULL: off */
    const hs_log *log;

    /* its own; turns: by list and action, NULL: the device is the host. The rank frees them */
    hs_turn *turns[HS_LISTS];
    hs_list last;             /* the list that ran last; HS_LISTS: none */
    uint32_t next;            /* its action that would be next */
    int64_t step;             /* steps done; inside a step the number of that step */
    const hs_plan_action *at; /* being run; NULL: none */
    uint8_t *own_report;      /* position 0: where the last COMBINE left the positions' */
    hs_step_control control;  /* taken by the last APPLY or CHECK */
    bool owed;                /* position 0: hs_step_policy */
    uint32_t sent[2][2];      /* by step & 1: what was sent forward and backward in it */
    bool looks;               /* a step that was not finite is computed again (run/steps.h) */
    hs_look look;
    int64_t call_step,
        call_ns; /* of the next kernel's call in a trace: its step, when the last ended */
} hs_executor;

/* What follows what on the device, before the first call of the others. HS_E_MEMORY. */
hs_status hs_executor_order(hs_executor *executor, hs_why *why);

/* Runs the init or load list (step 0 of the last words). */
hs_status hs_executor_prepare(hs_executor *executor, hs_list list, hs_why *why);

/* After a failure: a snapshot that is under way is finished, for at most so long, and told; else it is
 * nothing. */
void hs_executor_leave(hs_executor *executor, int64_t ms);

/* Adds ,"step":..,"action":..,"microbatch":..,"peer":..,"waited_us":.. of where it is: for last
 * words. */
void hs_executor_where(const hs_executor *executor, hs_text *text);

#endif
