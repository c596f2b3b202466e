/* Whole-model files of f32 masters: every tensor in the table's order, each at the next multiple of
 * 64 bytes. What `infer` reads, what `rank --weights` starts from, and the dumps of `rank --dump`
 * (what the rank keeps of each state that its position owns, dense). */
#ifndef HS_RUN_WEIGHTS_H
#define HS_RUN_WEIGHTS_H

#include <stdint.h>

#include "core/status.h"
#include "run/plan.h"
#include "run/spaces.h"

/* Reads what a replica keeps of the masters that a position owns. HS_E_CONFIG where the file's size is
 * not the table's. */
hs_status hs_weights_read(const char *path, const hs_plan *plan, const hs_plan_position *position,
                          uint32_t replica, hs_spaces *spaces, hs_why *why);

enum { HS_DUMP_GRADS, HS_DUMP_WEIGHTS };

/* Writes <dir>/<step>-<rank>.grads or .weights: f32 of each owned state in order, of a state in pieces
 * the elements that this replica keeps. For tests. HS_E_IO. */
hs_status hs_weights_dump(const char *dir, int64_t step, int what, const hs_plan *plan,
                          uint32_t rank, hs_spaces *spaces, hs_why *why);

#endif
