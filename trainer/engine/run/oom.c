#include "run/oom.h"

#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { TEXT_BYTES = 4096 };

#define UNLIMITED (UINT64_C(1) << 62) /* version 1 says "no limit" by a number beyond this */

static bool read_text(const char *path, char text[TEXT_BYTES]) {
    size_t bytes = 0;
    ssize_t n = 0;
    const int fd = path[0] ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0) return false;
    while (bytes < TEXT_BYTES - 1 && (n = read(fd, text + bytes, TEXT_BYTES - 1 - bytes)) > 0)
        bytes += (size_t)n;
    close(fd);
    text[bytes] = '\0';
    return n >= 0;
}

/* The group's name from lines "number:controllers:name"; memory's own line (version 1) comes before
 * that without controllers (version 2). */
static char *group_name(char *text, bool *first_version) {
    char *name = NULL, *rest = NULL;
    for (char *line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
        char *controllers = strchr(line, ':');
        char *end = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!end) continue;
        *end = '\0';
        char *each = NULL;
        for (char *word = strtok_r(controllers + 1, ",", &each); word;
             word = strtok_r(NULL, ",", &each))
            if (strcmp(word, "memory") == 0) {
                *first_version = true;
                return end + 1;
            }
        if (end == controllers + 1) name = end + 1;
    }
    *first_version = false;
    return name;
}

static bool choose(char path[512], const char *mount, const char *folder, const char *group,
                   const char *file) {
    const int n = snprintf(path, 512, "%s%s%s/%s", mount, folder, group, file);
    if (n > 0 && n < 512 && access(path, R_OK) == 0) return true;
    path[0] = '\0';
    return false;
}

void hs_oom_find(hs_oom *oom, const char *self, const char *mount) {
    char text[TEXT_BYTES];
    bool first_version = false;
    const char *group = NULL;
    memset(oom, 0, sizeof *oom);
    if (read_text(self, text)) group = group_name(text, &first_version);
    if (!group) return;
    const char *folder = first_version ? "/memory" : "";
    const char *events = first_version ? "memory.oom_control" : "memory.events";
    const char *limit = first_version ? "memory.limit_in_bytes" : "memory.max";
    const char *const groups[] = {group, ""};
    for (size_t i = 0; i < sizeof groups / sizeof *groups && !oom->events[0]; i++)
        if (choose(oom->events, mount, folder, groups[i], events))
            (void)choose(oom->limit, mount, folder, groups[i], limit);
}

int64_t hs_oom_kills(const hs_oom *oom) {
    char text[TEXT_BYTES], *rest = NULL;
    if (!read_text(oom->events, text)) return 0;
    for (char *line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest))
        if (strncmp(line, "oom_kill ", 9) == 0) return strtoll(line + 9, NULL, 10);
    return 0;
}

uint64_t hs_oom_limit(const hs_oom *oom) {
    char text[TEXT_BYTES];
    if (!read_text(oom->limit, text)) return 0;
    const uint64_t bytes = strtoull(text, NULL, 10); /* "max" is none */
    return bytes < UNLIMITED ? bytes : 0;
}
