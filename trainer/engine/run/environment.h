/* What the engine reads of its environment: HOTSTAGE_ENGINE_FABRIC, HOTSTAGE_ENGINE_CHANNELS and
 * HOTSTAGE_ENGINE_AGENT_AWAY_S, and nothing else (a backend has its own). A value that it cannot
 * honour is refused, never ignored. */
#ifndef HS_RUN_ENVIRONMENT_H
#define HS_RUN_ENVIRONMENT_H

#include <stdint.h>

#include "core/status.h"

/* How long a supervisor waits for its agent to come (again), where the environment does not say:
 * the kubelet pauses up to 300 s between two starts of a container, and an agent needs some to
 * start. */
#define HS_AGENT_AWAY_S 360

typedef struct hs_environment {
    int64_t agent_away_ms;
    const char *fabric; /* launch.fabric: "tcp", ... */
    uint32_t ways; /* of messages between devices, 1 << HS_WAY_* (wire/frame.h): ipc and, on tcp,
                         * tcp, else nccl; or what HOTSTAGE_ENGINE_CHANNELS lists */
} hs_environment;

/* HS_E_CONFIG for a fabric or a way that does not exist, and for a number that is none. */
hs_status hs_environment_read(hs_environment *environment, hs_why *why);

#endif
