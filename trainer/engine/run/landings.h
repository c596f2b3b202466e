/* Where the messages that a position of a replica sends land: the offset in the receiver's arena, for channels
 * whose sender's device writes there itself (comm/comm.h, put). Both ends read one plan: the n-th
 * send of a channel in a list meets the n-th receive of it in the same list of the other end. */
#ifndef HS_RUN_LANDINGS_H
#define HS_RUN_LANDINGS_H

#include <stdint.h>

#include "core/status.h"
#include "run/plan.h"

typedef struct hs_landings {
    uint64_t *lists[4]; /* by hs_list (executor.h), then action of that list; UINT64_MAX: no send */
} hs_landings;

/* HS_E_MEMORY; HS_E_BUG where ends do not match, which the plan's checks rule out. */
hs_status hs_landings_find(const hs_plan *plan, const hs_plan_position *position, uint32_t replica,
                           hs_landings *landings, hs_why *why);
void hs_landings_free(hs_landings *landings); /* safe on a zeroed one */

#endif
