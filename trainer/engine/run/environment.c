#include "run/environment.h"

#include <stdlib.h>
#include <string.h>

#include "wire/frame.h"

enum { AWAY_MOST_S = 7 * 24 * 3600 };

static hs_status read_fabric(hs_environment *environment, hs_why *why) {
    static const char *const fabrics[] = {"tcp", "infiniband", "roce", "efa", "nvl72"};
    const char *fabric = getenv("HOTSTAGE_ENGINE_FABRIC");
    if (!fabric || !fabric[0]) fabric = fabrics[0];
    environment->fabric = NULL;
    for (size_t i = 0; i < sizeof fabrics / sizeof *fabrics; i++)
        if (strcmp(fabric, fabrics[i]) == 0) environment->fabric = fabrics[i];
    if (!environment->fabric)
        return hs_fail(why, HS_E_CONFIG,
                       "HOTSTAGE_ENGINE_FABRIC is '%.100s'; it is what launch.fabric says: tcp, "
                       "infiniband, roce, efa or nvl72",
                       fabric);
    environment->ways = 1u << HS_WAY_IPC;
    environment->ways |= environment->fabric == fabrics[0] ? 1u << HS_WAY_TCP : 1u << HS_WAY_NCCL;
    return HS_OK;
}

/* "ipc,nccl": only these. */
static hs_status read_channels(hs_environment *environment, hs_why *why) {
    static const char *const names[HS_WAYS] = {"tcp", "ipc", "nccl"};
    const char *text = getenv("HOTSTAGE_ENGINE_CHANNELS");
    if (!text || !text[0]) return HS_OK;
    environment->ways = 0;
    for (const char *at = text;;) {
        const size_t length = strcspn(at, ",");
        uint32_t way = 0;
        while (way < HS_WAYS &&
               (strlen(names[way]) != length || strncmp(at, names[way], length) != 0))
            way++;
        if (way == HS_WAYS)
            return hs_fail(
                why, HS_E_CONFIG,
                "HOTSTAGE_ENGINE_CHANNELS is '%.100s'; it lists ways between devices, of "
                "ipc, nccl and tcp, with commas",
                text);
        environment->ways |= 1u << way;
        if (!at[length]) return HS_OK;
        at += length + 1;
    }
}

hs_status hs_environment_read(hs_environment *environment, hs_why *why) {
    *environment = (hs_environment){.agent_away_ms = (int64_t)HS_AGENT_AWAY_S * 1000};
    HS_TRY(read_fabric(environment, why));
    HS_TRY(read_channels(environment, why));
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
