/* Whole-model files of f32 masters: every tensor in the table's order, each at the next multiple of
 * 64 bytes. What `infer` reads, what `rank --weights` starts from, and the per-position dumps of
 * `rank --dump` (owned states only, dense). */
#ifndef HS_RUN_WEIGHTS_H
#define HS_RUN_WEIGHTS_H

#include <stdint.h>

#include "core/status.h"
#include "run/plan.h"
#include "run/spaces.h"

/* Reads the masters that a position owns. HS_E_CONFIG where the file's size is not the table's. */
hs_status hs_weights_read(const char *path, const hs_plan *plan, const hs_plan_position *position,
                          hs_spaces *spaces, hs_why *why);

enum { HS_DUMP_GRADS, HS_DUMP_WEIGHTS };

/* Writes <dir>/<step>-<position>.grads or .weights: f32 of each owned state in order. For tests.
 * HS_E_IO. */
hs_status hs_weights_dump(const char *dir, int64_t step, int what, const hs_plan *plan,
                          const hs_plan_position *position, hs_spaces *spaces, hs_why *why);

#endif
