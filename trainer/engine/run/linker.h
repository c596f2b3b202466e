/* From a checked plan to kernels and device addresses: each call of the programs that a position
 * runs, with its STATIC and PIECE operands resolved once, at start-up. ACT and MB operands get their base added
 * when the call is issued, because they depend on the action's slot and microbatch.
 *
 * The plan has been checked (run/plan.h, I1-I9), so nothing here can point outside the arena. One
 * thread. */
#ifndef HS_RUN_LINKER_H
#define HS_RUN_LINKER_H

#include <stdint.h>

#include "core/status.h"
#include "run/plan.h"
#include "run/spaces.h"

typedef struct hs_linked hs_linked;

enum { HS_LINKED_GRAPHS = 1024, HS_LINKED_GRAPH_CALLS = 1 << 16 };

/* Of a rank of that replica. plan, position and spaces must outlive the result. HS_E_MEMORY. */
hs_status hs_link(const hs_plan *plan, const hs_plan_position *position, uint32_t replica,
                  hs_spaces *spaces, hs_linked **out, hs_why *why);
void hs_linked_destroy(hs_linked *linked); /* NULL is fine */

/* Issues the calls of a RUN action's program in order, those that may be one launch together (together.h). A call that
 * fails at once is named in why; others show at a wait. A device that has graphs gets the calls of a step's action one by one the first time (what
 * a library or driver loads at its first launch may not be loaded inside of a capture), the second
 * time captured, and from then on as one graph, of at most HS_LINKED_GRAPHS for HS_LINKED_GRAPH_CALLS
 * calls (programs of one call, and what comes beyond that in the list of a step, are issued each
 * time). Allocates nothing but the device's graphs, in the second step. */
hs_status hs_linked_run(hs_linked *linked, const hs_plan_action *action, hs_why *why);

/* Called behind each call that is issued, unless it is captured; what it fails with ends the program. NULL:
 * nothing, as at first. */
void hs_linked_between(hs_linked *linked, hs_status (*between)(void *ctx, hs_why *why), void *ctx);

/* Called behind each call that is issued, when it is done, with the action and the call's number in the plan. NULL:
 * nothing, as at first. */
void hs_linked_watch(hs_linked *linked,
                     void (*watch)(void *ctx, const hs_plan_action *action, uint32_t call),
                     void *ctx);

/* Each call of the position's programs once, with ACT and MB operands in the first slot and microbatch.
 * Ends at the first failure. */
hs_status hs_linked_each(const hs_linked *linked,
                         hs_status (*each)(void *ctx, uint16_t kernel, const hs_args *args,
                                           hs_why *why),
                         void *ctx, hs_why *why);

/* Offset in the arena of a reference of this position. */
uint64_t hs_linked_offset(const hs_linked *linked, const hs_plan_ref *ref, uint32_t slot,
                          uint32_t microbatch);

#endif
