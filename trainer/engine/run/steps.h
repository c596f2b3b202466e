/* The steps of an attempt, one after the other: which part of a position's step list runs when.
 *
 * A checked step is its list. An optimistic one's (plan.h, step_checks) has three parts: the prefix, the check of the
 * step before, the rest. Its rest ends on a report and on copies of the weights as AdamW will leave them if
 * nothing is clipped; the next step's prefix runs on these; the check takes the decision, runs AdamW, and
 * saves. Where it clips, the redo list sends on what AdamW made, and the prefix runs once more. Everybody
 * has the same decision, so everybody repeats the same messages.
 *
 *   first step            prefix but for its report, rest
 *   each later one        prefix, check of the step before, rest
 *   where that clips      prefix, check of the step before, redo, prefix but for report and data, rest
 *   at the end            the prefix's report, check of the last step
 *
 * A step that is not finite is computed again from the same state, on CPUs, and each call's results are looked at: so the
 * last words name the first number that is not finite (run/origin.h), and a good step pays nothing for it. Everybody has
 * the same decision, so everybody does it; it ends at the same place, where it is decided again. Not where an optimistic
 * step's data comes ahead: it may be gone from the cache by then.
 *
 * S1  Master weights, moments and gradients of a step are what its forward and backward left until its
 *     check has the decision: a step that is not finite, a stop and a snapshot find what they find in
 *     a checked step.
 * S2  A step's lines, dumps and snapshot come after its check and before the next AdamW, under its number;
 *     what runs ahead has the next one's.
 */
#ifndef HS_RUN_STEPS_H
#define HS_RUN_STEPS_H

#include <stdint.h>

#include "run/executor.h"

/* Runs steps start_step + 1 .. the last one, then sees the last snapshot committed. HS_OK: done;
 * HS_E_STOPPED: stopped on request, state saved; else what went wrong, with the instruction named
 * in why. */
hs_status hs_steps_run(hs_executor *executor, int64_t start_step, hs_why *why);

#endif
