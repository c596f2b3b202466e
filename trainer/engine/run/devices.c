#include "run/devices.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "backend/backend.h"
#include "backend/load.h"
#include "core/text.h"
#include "wire/attempt.h"

enum { DEVICES_MAX = 64 /* of a machine */ };

static void one(hs_text *line, uint32_t index, const hs_device_facts *facts) {
    hs_text_printf(line, "%s{\"index\":%" PRIu32 ",\"name\":", index ? "," : "", index);
    hs_text_json_string(line, facts->device);
    hs_text_printf(line, ",\"uuid\":");
    hs_text_json_string(line, facts->uuid);
    hs_text_printf(line, ",\"bus\":");
    hs_text_json_string(line, facts->bus);
    hs_text_printf(line, ",\"capability\":%" PRIu32 ",\"memory\":%" PRIu64 "}", facts->capability,
                   facts->memory_bytes);
}

hs_status hs_devices_print(hs_why *why) {
    static hs_device_facts list[DEVICES_MAX];
    static char buffer[HS_DEVICES_LINE_MAX];
    hs_text line = hs_text_over(buffer, sizeof buffer);
    uint32_t count = 0;
    const hs_backend *cuda = NULL;
    hs_why none = {.text = ""};
    hs_status st = hs_backend_load(HS_DEVICE_CUDA, &cuda, &none);
    if (st == HS_OK) st = cuda->devices(list, DEVICES_MAX, &count, &none);
    if (st != HS_OK) count = 0;
    if (count > DEVICES_MAX)
        return hs_fail(why, HS_E_CONFIG,
                       "this machine has %" PRIu32 " CUDA devices; %d are possible: let "
                       "CUDA_VISIBLE_DEVICES name some",
                       count, DEVICES_MAX);
    hs_text_printf(&line, "{\"devices\":[");
    for (uint32_t i = 0; i < count; i++) one(&line, i, &list[i]);
    hs_text_printf(&line, "],\"why\":");
    hs_text_json_string(&line, count ? "" : none.text);
    hs_text_printf(&line, ",\"driver\":%s,\"chosen\":",
                   access("/dev/nvidiactl", F_OK) == 0 ? "true" : "false");
    const char *chosen = getenv("HOTSTAGE_DEVICES");
    if (chosen)
        hs_text_json_string(&line, chosen);
    else
        hs_text_printf(&line, "null");
    hs_text_printf(&line, "}");
    if (line.over)
        return hs_fail(why, HS_E_CONFIG,
                       "the list of devices has more than %d bytes; shorten HOTSTAGE_DEVICES",
                       HS_DEVICES_LINE_MAX);
    return puts(line.at) < 0 ? hs_fail(why, HS_E_IO, "standard output cannot be written") : HS_OK;
}
