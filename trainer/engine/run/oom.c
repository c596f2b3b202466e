#include "run/oom.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "run/cgroup.h"

#define UNLIMITED (UINT64_C(1) << 62) /* version 1 says "no limit" by a number beyond this */

static bool choose(char path[512], const char *folder, size_t length, const char *file) {
    const int n = snprintf(path, 512, "%.*s/%s", (int)length, folder, file);
    if (n > 0 && n < 512 && access(path, R_OK) == 0) return true;
    path[0] = '\0';
    return false;
}

void hs_oom_find(hs_oom *oom, const char *self, const char *mount) {
    hs_cgroup group;
    memset(oom, 0, sizeof *oom);
    hs_cgroup_find(&group, "memory", self, mount);
    if (!group.folder[0]) return;
    const char *events = group.first_version ? "memory.oom_control" : "memory.events";
    const char *limit = group.first_version ? "memory.limit_in_bytes" : "memory.max";
    const size_t lengths[] = {strlen(group.folder), group.root};
    for (size_t i = 0; i < 2 && !oom->events[0]; i++)
        if (choose(oom->events, group.folder, lengths[i], events))
            (void)choose(oom->limit, group.folder, lengths[i], limit);
}

int64_t hs_oom_kills(const hs_oom *oom) {
    char text[HS_CGROUP_TEXT], *rest = NULL;
    if (!hs_cgroup_read(oom->events, text)) return 0;
    for (char *line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest))
        if (strncmp(line, "oom_kill ", 9) == 0) return strtoll(line + 9, NULL, 10);
    return 0;
}

uint64_t hs_oom_limit(const hs_oom *oom) {
    char text[HS_CGROUP_TEXT];
    if (!hs_cgroup_read(oom->limit, text)) return 0;
    const uint64_t bytes = strtoull(text, NULL, 10); /* "max" is none */
    return bytes < UNLIMITED ? bytes : 0;
}
