/* The order in which a program's calls are given to a device that takes several of a kernel at once (backend.h,
 * together): such a call waits for others of its kernel until a call comes that it may not change places with, which
 * touches what it writes or writes what it touches, or until the program ends. No call changes its result. */
#ifndef HS_RUN_TOGETHER_H
#define HS_RUN_TOGETHER_H

#include <stdint.h>

#include "backend/backend.h"
#include "core/status.h"
#include "run/plan.h"

typedef struct hs_turned {
    uint32_t call;  /* of the program's */
    uint32_t count; /* from this one on are one launch; 0: it is of one that began before */
} hs_turned;

/* order: of as many as the program has calls. HS_E_MEMORY. */
hs_status hs_together_order(const hs_backend *backend, const hs_plan *plan,
                            const hs_plan_program *program, uint32_t replica, hs_turned *order,
                            hs_why *why);

#endif
