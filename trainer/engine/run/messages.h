/* The messages of a position's lists: what SEND and RECV do. From host to host they go through the
 * communicator (comm/comm.h), from device to device by put and take; of a device whose memory is apart
 * and whose channel is TCP, through a window.
 *
 * The plan's order of messages is kept. Nothing allocates after create. One thread. */
#ifndef HS_RUN_MESSAGES_H
#define HS_RUN_MESSAGES_H

#include <stdbool.h>
#include <stdint.h>

#include "comm/comm.h"
#include "core/stop.h"
#include "run/landings.h"
#include "run/linker.h"
#include "run/plan.h"
#include "run/spaces.h"

typedef enum hs_list { HS_LIST_INIT, HS_LIST_LOAD, HS_LIST_STEP, HS_LISTS } hs_list;

typedef struct hs_messages hs_messages;

/* All lent. */
typedef struct hs_messages_config {
    const hs_plan *plan;
    const hs_plan_position *position;
    hs_spaces *spaces;
    const hs_linked *linked;
    const hs_comm_table *transport;
    hs_comm *comm;               /* NULL: the plan has no channels */
    const bool *direct;          /* by channel: from device to device; NULL: none */
    const hs_landings *landings; /* of such messages; NULL: none */
    hs_stop *stop;
} hs_messages_config;

/* HS_E_MEMORY. */
hs_status hs_messages_create(const hs_messages_config *config, hs_messages **out, hs_why *why);
void hs_messages_destroy(hs_messages *messages); /* NULL is fine */

/* How many messages of one channel, each way, are ever under way at once (comm.h, most). */
uint32_t hs_messages_most(const hs_plan *plan, const hs_plan_position *position);

/* A SEND or RECV, number i of the list. */
hs_status hs_messages_run(hs_messages *messages, hs_list list, uint32_t i, const hs_turn *turn,
                          hs_why *why);

#endif
