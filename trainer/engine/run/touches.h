/* Which bytes the actions of one of a position's lists touch, of those that more than the compute stream
 * does: messages, tokens, targets, losses, squared norms, the control block. By microbatch and slot;
 * where two of them overlap in a space they count as one. An instance of such a range is a cell.
 *
 * A program touches what its calls' operands reach (kernels/extent.c). An action of a kind that is not
 * known here touches everything: that is slow, and never wrong. */
#ifndef HS_RUN_TOUCHES_H
#define HS_RUN_TOUCHES_H

#include <stdbool.h>
#include <stdint.h>

#include "core/status.h"
#include "run/plan.h"

enum { HS_TOUCH_READS = 1, HS_TOUCH_WRITES = 2 };

/* What an operand of a call touches, as a replica has it: the bytes that its kernel reaches, of HS_SPACE_NONE where there
 * is none. *how: HS_TOUCH_*. */
hs_plan_ref hs_touched_by(const hs_plan_call *call, int operand, uint32_t replica, int *how);

typedef struct hs_touches_config {
    const hs_plan *plan;
    const hs_plan_position *position;
    uint32_t replica;
    uint32_t first, count; /* of the plan's actions: the list */
    bool unified; /* the device's memory is the host's: APPLY and CHECK put nothing there */
} hs_touches_config;

typedef struct hs_touches hs_touches;

/* HS_E_MEMORY. */
hs_status hs_touches_create(const hs_touches_config *config, hs_touches **out, hs_why *why);
void hs_touches_destroy(hs_touches *touches); /* NULL is fine */

/* How many cells there are; they count from 0. */
uint32_t hs_touches_cells(const hs_touches *touches);

/* Calls fn for each cell that the list's action touches, with HS_TOUCH_*. A message's bytes are all in
 * one cell. */
typedef void hs_touch_fn(void *ctx, uint32_t cell, int how);
void hs_touches_each(const hs_touches *touches, const hs_plan_action *action, hs_touch_fn *fn,
                     void *ctx);

/* Whether a program of the list writes state tensors: what snapshots copy. */
bool hs_touches_state(const hs_touches *touches, uint32_t program);

#endif
