/* What the files of the plan's loader share: plan.c (I1 to I9) and plan_writes.c (I10). */
#ifndef HS_RUN_PLAN_INTERNAL_H
#define HS_RUN_PLAN_INTERNAL_H

#include <stdbool.h>

#include "run/plan.h"

/* Working state of the checks; `why` gets the first failure. */
typedef struct hs_plan_checker {
    hs_plan *plan;
    const char *file;
    hs_why *why;
    uint8_t
        *program_uses; /* by program, for the position being checked: 0 unseen, else 1 | USES_* */
    uint64_t *sends, *recvs; /* by channel, 3 of each: init, load, step */
} hs_plan_checker;

#define REFUSE(c, ...) hs_plan_refuse((c), __VA_ARGS__)

/* HS_E_CONFIG, with the file and the mend around the reason. */
__attribute__((format(printf, 2, 3))) hs_status hs_plan_refuse(const hs_plan_checker *c,
                                                               const char *format, ...);

static inline bool hs_plan_inside(uint64_t offset, uint64_t bytes, uint64_t limit) {
    return offset <= limit && bytes <= limit - offset;
}

/* I4: tokens, targets and losses of a microbatch do not overlap. */
hs_status hs_plan_check_rows_apart(const hs_plan_checker *c, const hs_plan_position *p);

/* I10, for a reference that lies in its space: a STATIC one keeps out of the other two spaces.
 * `what` and `i` name it. */
hs_status hs_plan_check_apart(const hs_plan_checker *c, const hs_plan_position *p,
                              const hs_plan_ref *ref, const char *what, size_t i);

/* I10, for call i, whose operands hold their extents, and for action i, whose reference lies in its
 * space. */
hs_status hs_plan_check_call_writes(const hs_plan_checker *c, const hs_plan_position *p, size_t i);
hs_status hs_plan_check_action_writes(const hs_plan_checker *c, const hs_plan_position *p,
                                      size_t i);

#endif
