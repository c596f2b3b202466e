/* Instruction times of the last steps, as a Chrome trace (chrome://tracing, Perfetto): the same
 * form as the planner's drawing. One ring, allocated at start; written out once at the end, through
 * a buffer of its own. One thread. */
#ifndef HS_RUN_TRACE_H
#define HS_RUN_TRACE_H

#include <stdbool.h>
#include <stdint.h>

#include "core/status.h"
#include "run/plan.h"

#define HS_TRACE_STEPS 8 /* at most so many are kept */

typedef struct hs_trace hs_trace;

/* Of the steps that `rank` runs; with `calls` also of the kernels that they are made of. HS_E_MEMORY. */
hs_status hs_trace_create(const hs_plan *plan, uint32_t rank, bool calls, hs_trace **out,
                          hs_why *why);
void hs_trace_destroy(hs_trace *trace); /* NULL is fine */

/* One finished action of the step list (its index in the plan's table), and how much of its time went to
 * messages that moved in it: "moved_us" in its arguments. A NULL trace does nothing. */
void hs_trace_add(hs_trace *trace, int64_t step, uint32_t action, int64_t start_ns, int64_t end_ns,
                  int64_t moved_ns);

/* What a message took elsewhere than at its action: a SEND where it began, either where it was waited for. An
 * event beside that action's own, with "wait":1 in its arguments. */
void hs_trace_wait(hs_trace *trace, int64_t step, uint32_t action, int64_t start_ns,
                   int64_t end_ns);

bool hs_trace_has_calls(const hs_trace *trace); /* NULL: false */

/* A kernel's call (its index in the plan's table) of an action, beside the action's event: a thread of the
 * trace of its own, "call" in its arguments. A device that is not the host returns before it has computed. */
void hs_trace_call(hs_trace *trace, int64_t step, uint32_t action, uint32_t call, int64_t start_ns,
                   int64_t end_ns);

/* Writes the file. HS_E_IO names path and reason; nothing was added: an empty, valid trace. */
hs_status hs_trace_write(hs_trace *trace, const char *path, hs_why *why);

#endif
