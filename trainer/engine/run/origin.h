/* Of a step whose numbers are not finite: which number was it first? Told by position 0's decision to every rank, so
 * that all of them say the same (hs_step_report, hs_step_control: origin, origin_of; both 0 where none is known).
 *
 * origin orders what may be first, the least one is:
 *   bits 63-40  0: a state tensor as the step found it; 1 + microbatch, counted over all replicas; ALL: of none
 *   bits 39-38  HS_ORIGIN_F, _B (B and I), _W; _SUM: a loss, or a tensor's squared norm
 *   bits 37-22  F: the stage; B and W: 65535 - the stage, since backward goes from the last to the first
 *   bit 0       1
 * origin_of says which number: of a call of the plan, 32 * call + operand; of a tensor, 32 * tensor + HS_ORIGIN_*.
 *
 * A report knows losses and norms, which cost nothing: the first microbatch whose loss is not finite, or else the first
 * tensor of the table whose norm is not. What was first inside of a microbatch takes a second look at the step
 * (run/steps.c), each call's results behind it: hs_look. */
#ifndef HS_RUN_ORIGIN_H
#define HS_RUN_ORIGIN_H

#include <stdint.h>

#include "core/text.h"
#include "run/linker.h"
#include "run/plan.h"

enum { HS_ORIGIN_F, HS_ORIGIN_B, HS_ORIGIN_W, HS_ORIGIN_SUM };
enum { HS_ORIGIN_WEIGHT, HS_ORIGIN_M, HS_ORIGIN_V, HS_ORIGIN_GRADIENT, HS_ORIGIN_LOSS };

typedef struct hs_origin {
    uint64_t origin;
    uint32_t of;
} hs_origin;

/* The earlier of the two; none is later than any. */
static inline hs_origin hs_origin_first(hs_origin a, hs_origin b) {
    if (!a.origin || !b.origin) return a.origin ? a : b;
    return a.origin < b.origin || (a.origin == b.origin && a.of <= b.of) ? a : b;
}

/* A loss of this microbatch of the replica. */
hs_origin hs_origin_of_loss(const hs_plan *plan, uint32_t replica, uint32_t microbatch);
/* The squared norm of this tensor's gradient. */
hs_origin hs_origin_of_norm(uint32_t tensor);

/* A second look at a step of a rank whose device's memory is the host's. */
typedef struct hs_look {
    const hs_plan *plan;
    const hs_plan_position *position;
    uint32_t replica;
    uint8_t *arena;
    const hs_linked *linked;
    hs_origin first; /* what was found so far */
} hs_look;

/* Before the step: state tensors that are not finite already; and gradients count from zero, as the optimizer, which did
 * not run, would have left them. */
void hs_look_begin(hs_look *look);
/* Behind a call (hs_linked_watch; ctx is the look): whether its results are finite. */
void hs_look_at_call(void *ctx, const hs_plan_action *action, uint32_t call);

/* ,"microbatch":2,"stage":0,"pass":"F","layer":3,"kernel":"swiglu_fwd","operand":"y","tensor":"..": those that it has.
 * "tensor": a state tensor's name; "operand" then says what of it: weight, m, v or gradient. For last words. */
void hs_origin_fields(const hs_plan *plan, hs_origin origin, hs_text *text);
/* The same for people: "first: microbatch 2, forward of stage 0: y of swiglu_fwd, layer 3"; "" where nothing is known. */
void hs_origin_say(const hs_plan *plan, hs_origin origin, hs_text *text);

#endif
