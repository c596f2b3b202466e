/* What executor.c and steps.c share. */
#ifndef HS_RUN_EXECUTOR_INTERNAL_H
#define HS_RUN_EXECUTOR_INTERNAL_H

#include "run/executor.h"

/* Actions [first, first + count) of a list, as of step ex->step. */
hs_status hs_executor_run(hs_executor *ex, hs_list list, uint32_t first, uint32_t count,
                          hs_which which, hs_why *why);

/* The number of the attempt's last step. */
int64_t hs_executor_last_step(const hs_executor *ex);

/* A slot for the state of ex->step. Not final: every rank had a free slot at the report, so a wait is
 * short (the agent just took a hold of it); a slot that stays held is left out, loudly. */
hs_status hs_executor_save(hs_executor *ex, bool final, hs_why *why);

/* Until no snapshot is under way. */
hs_status hs_executor_finish_saving(hs_executor *ex, int64_t deadline_ns, hs_why *why);

#endif
