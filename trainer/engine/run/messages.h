/* The messages of a position's lists: what SEND and RECV do.
 *
 * Where the device's memory is the host's, messages pass behind the work (comm/comm.h): receives get their
 * places ahead, and nobody waits for a message before an action needs it (run/behind.h); between calls
 * of kernels they move on. What fails while a program runs ends the program.
 *
 * Where it is apart, streams do that: from device to device by put and take, nobody waits here; or
 * through a window to and from the host, whose side of it is waited for at its place.
 *
 * Nothing allocates after create. One thread. */
#ifndef HS_RUN_MESSAGES_H
#define HS_RUN_MESSAGES_H

#include <stdbool.h>
#include <stdint.h>

#include "comm/comm.h"
#include "core/rank_page.h"
#include "core/stop.h"
#include "run/behind.h"
#include "run/landings.h"
#include "run/linker.h"
#include "run/metrics.h"
#include "run/plan.h"
#include "run/spaces.h"
#include "run/trace.h"

/* Which actions run of a step, or of its prefix (run/steps.h). */
typedef enum hs_which {
    HS_ALL,
    HS_NO_REPORT, /* reports that are sent are of the step before: there is none */
    HS_AGAIN,     /* nor is DATA, which is there */
    HS_NO_DATA,   /* DATA alone is left out */
    HS_REPORT     /* nothing else */
} hs_which;

bool hs_which_leaves_out(hs_which which, const hs_plan *plan, const hs_plan_action *action);

typedef struct hs_messages hs_messages;

/* All lent. */
typedef struct hs_messages_config {
    const hs_plan *plan;
    const hs_plan_position *position;
    uint32_t rank;
    hs_spaces *spaces;
    hs_linked *linked;
    const hs_comm_table *transport;
    hs_comm *comm;               /* NULL: the plan has no channels */
    const bool *direct;          /* by channel: from device to device; NULL: none */
    const hs_landings *landings; /* of such messages; NULL: none */
    const hs_behind *behind;     /* by list (hs_messages_order); NULL: memory is apart */
    hs_stop *stop;
    hs_rank_page *page; /* NULL: none */
    hs_trace *trace;    /* NULL: off */
    hs_metrics *metrics;
} hs_messages_config;

/* HS_E_MEMORY. */
hs_status hs_messages_create(const hs_messages_config *config, hs_messages **out, hs_why *why);
void hs_messages_destroy(hs_messages *messages); /* NULL is fine */

/* Of each list what its messages have to wait for, where the device's memory is the host's. The caller frees
 * them, also on failure: HS_E_MEMORY. */
hs_status hs_messages_order(const hs_plan *plan, const hs_plan_position *position, uint32_t replica,
                            hs_behind behind[HS_LISTS], hs_why *why);

/* How many messages of one channel, each way, are ever under way at once (comm.h, most). HS_E_MEMORY. */
hs_status hs_messages_most(const hs_plan *plan, const hs_plan_position *position, uint32_t *most,
                           hs_why *why);

/* What action i of the list needs of messages, in step `step`: its bytes. Then places for receives, and sends
 * that begin: before each action of what runs, also one that is left out. */
hs_status hs_messages_before(hs_messages *messages, hs_list list, uint32_t i, int64_t step,
                             hs_which which, hs_why *why);

/* A SEND or RECV, number i of the list. */
hs_status hs_messages_run(hs_messages *messages, hs_list list, uint32_t i, const hs_turn *turn,
                          hs_why *why);

/* For who waits for something else meanwhile: moves what can move, and waits for nothing. */
hs_status hs_messages_progress(hs_messages *messages, hs_why *why);

/* Sees off all messages that were begun: between two lists, at a jump in one, before anybody but its
 * actions reads memory, and at the end. */
hs_status hs_messages_settle(hs_messages *messages, hs_why *why);

/* Time that messages took between calls of kernels, so far. */
int64_t hs_messages_moved_ns(const hs_messages *messages);

/* The message that is waited for, or whose wait failed; NULL: none. For last words. */
const hs_plan_action *hs_messages_awaited(const hs_messages *messages);

/* The rank at the other end of a SEND's or RECV's channel; UINT32_MAX: another action. */
uint32_t hs_messages_peer(const hs_plan *plan, uint32_t rank, const hs_plan_action *action);

#endif
