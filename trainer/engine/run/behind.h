/* How the messages of a list overlap with what it computes, on a device whose memory is the host's: worked
 * out once from the plan, so that a step looks nothing up.
 *
 * A receive gets its place as soon as nothing of the list needs the bytes there any more, at its own
 * place in the list at the latest, and in the order of its channel. It has to be complete when the first
 * action touches its bytes. A send begins as soon as its bytes are made, likewise: the list has it where a
 * rank that cannot send behind its work would have to wait least, which is often long after. It has to be
 * complete when the first action writes its bytes; either when its own action comes again. The list of a
 * step is run again and again: that action may be of the next run, and then no wait is left behind in this
 * one.
 *
 * B1  Whatever is waited for stands earlier in the list, or in the run before (comm/comm.h says why that
 *     cannot block for ever). A place that is given ahead is waited for by nothing. The receive of an
 *     exchange has its place before its send begins, whatever else lies in the range of both: the two
 *     share no byte (run/plan.h, I6), and waiting for the send first would wait for the other end's.
 * B2  No place is given, and no send begun, ahead over the start of a run, nor over a place at which the
 *     list may be entered or left (run/steps.h): where an optimistic step's prefix ends, where its check does, and
 *     behind the decision, with which a step that is not finite begins again. */
#ifndef HS_RUN_BEHIND_H
#define HS_RUN_BEHIND_H

#include <stdbool.h>
#include <stdint.h>

#include "core/status.h"
#include "run/touches.h"

/* By action of the list, both: numbers of its actions. Of action i those from first[i] to before
 * first[i + 1]. */
typedef struct hs_behind_part {
    uint32_t *first, *action;
} hs_behind_part;

typedef struct hs_behind {
    uint32_t count;
    hs_behind_part waits;  /* messages that are complete before action i begins; then */
    hs_behind_part posts;  /* receives that get their places before it begins; then */
    hs_behind_part starts; /* sends that begin before it does */
} hs_behind;

/* again: the list runs again and again. HS_E_MEMORY. */
hs_status hs_behind_find(const hs_touches_config *config, bool again, hs_behind *behind,
                         hs_why *why);
void hs_behind_free(hs_behind *behind); /* safe on a zeroed one */

#endif
