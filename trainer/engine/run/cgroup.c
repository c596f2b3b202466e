#include "run/cgroup.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define UNLIMITED (UINT64_C(1) << 62) /* version 1 says "no limit" by a number beyond this */

bool hs_cgroup_read(const char *path, char text[HS_CGROUP_TEXT]) {
    size_t bytes = 0;
    ssize_t n = 0;
    const int fd = path[0] ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0) return false;
    while (bytes < HS_CGROUP_TEXT - 1 &&
           (n = read(fd, text + bytes, HS_CGROUP_TEXT - 1 - bytes)) > 0)
        bytes += (size_t)n;
    close(fd);
    text[bytes] = '\0';
    return n >= 0;
}

static bool holds_word(const char *words, const char *word) {
    const size_t length = strlen(word);
    for (const char *at = words; *at; at += *at == ',') {
        const size_t n = strcspn(at, ",");
        if (n == length && memcmp(at, word, n) == 0) return true;
        at += n;
    }
    return false;
}

/* Takes "<mount><hierarchy><name>", else "<mount><hierarchy>"; false where neither is a folder. */
static bool take(hs_cgroup *group, const char *mount, const char *hierarchy, const char *name) {
    const char *const names[] = {name, ""};
    for (int i = 0; i < 2; i++) {
        if (strstr(names[i], "..")) continue; /* outside of what this namespace shows */
        const size_t bare = strlen(names[i]) > 1 ? strlen(names[i]) : 0; /* "/" is the root */
        const int n = snprintf(group->folder, sizeof group->folder, "%s%s%.*s", mount, hierarchy,
                               (int)bare, names[i]);
        group->root = strlen(mount) + strlen(hierarchy);
        if (n > 0 && (size_t)n < sizeof group->folder && access(group->folder, X_OK) == 0)
            return true;
    }
    group->folder[0] = '\0';
    return false;
}

/* Lines are "number:controllers:name"; the controller's own line (version 1) comes before that
 * without controllers (version 2). */
void hs_cgroup_find(hs_cgroup *group, const char *controller, const char *self, const char *mount) {
    char text[HS_CGROUP_TEXT], folder[128], *rest = NULL;
    char *name = NULL, *controllers = NULL;
    memset(group, 0, sizeof *group);
    if (!hs_cgroup_read(self, text)) return;
    for (char *line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
        char *words = strchr(line, ':');
        char *end = words ? strchr(words + 1, ':') : NULL;
        if (!end) continue;
        *end = '\0';
        if (holds_word(words + 1, controller)) {
            group->first_version = true;
            name = end + 1;
            controllers = words + 1;
            break;
        }
        if (end == words + 1) name = end + 1;
    }
    if (!name) return;
    if (!group->first_version) {
        (void)take(group, mount, "", name);
        return;
    }
    (void)snprintf(folder, sizeof folder, "/%s", controllers);
    if (take(group, mount, folder, name)) return;
    (void)snprintf(folder, sizeof folder, "/%s", controller);
    (void)take(group, mount, folder, name);
}

/* Reads a file of the group's folder or of one of its parents: `up` of them. False: beyond the
 * root. *there: whether the file could be read. */
static bool look(const hs_cgroup *group, int up, const char *file, char text[HS_CGROUP_TEXT],
                 bool *there) {
    char path[640];
    size_t length = strlen(group->folder);
    for (; up > 0; up--) {
        if (length <= group->root) return false;
        while (length > group->root && group->folder[length - 1] != '/') length--;
        if (length > group->root) length--;
    }
    (void)snprintf(path, sizeof path, "%.*s/%s", (int)length, group->folder, file);
    *there = hs_cgroup_read(path, text);
    return true;
}

/* quota / period in thousandths; 0: none. A quota is at least one thousandth. */
static int64_t milli(int64_t quota, int64_t period) {
    if (quota <= 0 || period <= 0 || quota > INT64_MAX / 1000) return 0;
    const int64_t found = quota * 1000 / period;
    return found ? found : 1;
}

int64_t hs_cgroup_cpu_milli(const char *self, const char *mount) {
    hs_cgroup group;
    char text[HS_CGROUP_TEXT];
    int64_t least = 0;
    bool there;
    hs_cgroup_find(&group, "cpu", self, mount);
    if (!group.folder[0]) return 0;
    const char *const file = group.first_version ? "cpu.cfs_quota_us" : "cpu.max";
    for (int up = 0; look(&group, up, file, text, &there); up++) {
        char *end = text;
        int64_t quota = there ? strtoll(text, &end, 10) : 0, period = 0; /* "max": 0 */
        if (group.first_version)
            period = look(&group, up, "cpu.cfs_period_us", text, &there) && there
                         ? strtoll(text, NULL, 10)
                         : 0;
        else if (there)
            period = strtoll(end, NULL, 10);
        const int64_t found = milli(quota, period);
        if (found && (!least || found < least)) least = found;
    }
    return least;
}

uint64_t hs_cgroup_memory(const char *self, const char *mount) {
    hs_cgroup group;
    char text[HS_CGROUP_TEXT];
    uint64_t least = 0;
    bool there;
    hs_cgroup_find(&group, "memory", self, mount);
    if (!group.folder[0]) return 0;
    const char *const file = group.first_version ? "memory.limit_in_bytes" : "memory.max";
    for (int up = 0; look(&group, up, file, text, &there); up++) {
        const uint64_t bytes = there ? strtoull(text, NULL, 10) : 0; /* "max" is none */
        if (bytes && bytes < UNLIMITED && (!least || bytes < least)) least = bytes;
    }
    return least;
}
