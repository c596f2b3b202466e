#include "run/environment.h"

#include <stdlib.h>
#include <string.h>

enum { AWAY_MOST_S = 7 * 24 * 3600 };

hs_status hs_environment_read(hs_environment *environment, hs_why *why) {
    *environment = (hs_environment){.agent_away_ms = (int64_t)HS_AGENT_AWAY_S * 1000};
    const char *fabric = getenv("HOTSTAGE_ENGINE_FABRIC");
    if (fabric && fabric[0] && strcmp(fabric, "tcp") != 0)
        return hs_fail(why, HS_E_CONFIG,
                       "HOTSTAGE_ENGINE_FABRIC is '%.100s'; this engine carries its messages over "
                       "tcp alone: set launch.fabric = \"tcp\"",
                       fabric);
    const char *away = getenv("HOTSTAGE_ENGINE_AGENT_AWAY_S");
    if (!away || !away[0]) return HS_OK;
    char *end;
    const double seconds = strtod(away, &end);
    if (*end || !(seconds > 0 && seconds <= AWAY_MOST_S))
        return hs_fail(
            why, HS_E_CONFIG,
            "HOTSTAGE_ENGINE_AGENT_AWAY_S is '%.100s'; it is the seconds that a supervisor "
            "waits for its agent, above 0 and at most %d (%d where it is not set)",
            away, AWAY_MOST_S, HS_AGENT_AWAY_S);
    environment->agent_away_ms = (int64_t)(seconds * 1000);
    if (environment->agent_away_ms < 1) environment->agent_away_ms = 1;
    return HS_OK;
}
