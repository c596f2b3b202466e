/* What follows what between the streams of a device, for one of a position's lists of actions:
 * worked out once from the plan, so that a step issues the events it needs and no other.
 *
 * Each action works on one stream: RUN on COMPUTE; RECV, DATA, APPLY, CHECK and FORESEE on IN; SEND and REPORT on OUT; a
 * message of the HOST space and COMBINE on none. Two actions of two streams that touch the same
 * bytes, one of them writing, run in the plan's order: the later follows an event that is recorded
 * behind the earlier. Of that all is left out that holds anyway: what an event that is followed
 * already had behind it, and what the host has waited for (a REPORT; a SEND that leaves through the
 * host). So a message waits for the program that made it, a buffer for the program or the message
 * that read it last, and neither for anything else.
 *
 * Which bytes: run/touches.h. State tensors are of two streams only where a snapshot copies them, which
 * not every step does: `saved` marks who must wait for that.
 *
 * The list of a step is run again and again: what an action follows may be of the step before. */
#ifndef HS_RUN_HAZARDS_H
#define HS_RUN_HAZARDS_H

#include <stdbool.h>
#include <stdint.h>

#include "core/status.h"
#include "run/plan.h"

enum { HS_TURN_STREAMS = 3 }; /* COMPUTE, IN, OUT */

/* The events of a device (backend.h, HS_EVENTS) and who records them. */
enum {
    HS_EVENT_STREAM = 0, /* + HS_STREAM_*: all of a stream so far */
    HS_EVENT_WINDOW = 4, /* + 0, 1: of a window, free again */
    HS_EVENT_LISTS = 8,  /* from here on, hazards'; more actions than numbers take turns */
    HS_EVENT_COMPUTE_COUNT = 20,
    HS_EVENT_IN_COUNT = 16,
    HS_EVENT_OUT_COUNT = 12,
    HS_EVENT_LINKS = 56 /* from here on, those of channels between devices */
};

/* One action's. */
typedef struct hs_turn {
    int8_t follow[HS_TURN_STREAMS]; /* an event of that stream, to follow first; -1: none */
    int8_t record;                  /* an event to record behind it; -1: none */
    int8_t stream;                  /* HS_STREAM_* of the three; -1: none */
    bool saved;                     /* it changes what snapshots copy */
} hs_turn;

typedef struct hs_hazards_config {
    const hs_plan *plan;
    const hs_plan_position *position;
    uint32_t replica;
    uint32_t first, count; /* of the plan's actions */
    bool again;            /* the list runs again and again */
    /* by channel: its messages go from device to device, on the stream; NULL: none do, the host
     * waits for what it sends */
    const bool *direct;
} hs_hazards_config;

/* By action of the list, count of them. The caller frees it. HS_E_MEMORY. */
hs_status hs_hazards_find(const hs_hazards_config *config, hs_turn **turns, hs_why *why);

#endif
