/* The algorithms of a run's products on devices that have a choice (backend/products.h): what the run
 * has chosen already, and what is missing, chosen now and kept for the run.
 *
 * With an agent, it has brought the run's tables to <work_dir>/algorithms, whose digest the attempt
 * has; what this rank chooses goes to the agent, which answers with the run's choice: another rank
 * may have been first. Without one (a gang by hand), the ranks of a node share that file, one at a
 * time. Inference keeps nothing. */
#ifndef HS_RUN_ALGORITHMS_H
#define HS_RUN_ALGORITHMS_H

#include "core/log.h"
#include "core/status.h"
#include "core/stop.h"
#include "run/agent_link.h"
#include "run/machine.h"
#include "wire/attempt.h"

typedef struct hs_algorithms_config {
    const hs_machine *machine;
    const hs_attempt *attempt; /* NULL: inference */
    hs_agent_link *agent;      /* NULL: none */
    hs_stop *stop;             /* of an attempt */
    const hs_log *log;
} hs_algorithms_config;

/* After the check of the device and before the state is restored: its memory is zero, and stays so.
 * HS_E_CONFIG: tables that are damaged, not the attempt's, or refused by the library, and what to
 * do; HS_E_LOST: the agent does not answer. */
hs_status hs_algorithms_settle(const hs_algorithms_config *config, hs_why *why);

#endif
