/* The control group (the container) of this process, in both of the kernel's versions, and what it
 * allows: CPU time. run/oom.h reads what it did with memory.
 *
 * A container mostly sees its own group as the mount's root, while its name is the machine's: the
 * group by its name comes first, then the root. Limits hold for all that is below a group, so the
 * least of the group's own and its parents' counts. `self` is /proc/self/cgroup, `mount`
 * /sys/fs/cgroup, elsewhere in tests. */
#ifndef HS_RUN_CGROUP_H
#define HS_RUN_CGROUP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define HS_CGROUP_TEXT 4096

typedef struct hs_cgroup {
    char folder[512];   /* of the group; empty: not to be had here */
    size_t root;        /* length of the mount's part of it */
    bool first_version; /* of the controller asked for */
} hs_cgroup;

void hs_cgroup_find(hs_cgroup *group, const char *controller, const char *self, const char *mount);

/* Reads a small file. False where it cannot be read. */
bool hs_cgroup_read(const char *path, char text[HS_CGROUP_TEXT]);

/* Thousandths of a CPU that the group may use, least of it and its parents; 0: no limit. */
int64_t hs_cgroup_cpu_milli(const char *self, const char *mount);

/* Bytes that the group may use, least of it and its parents; 0: no limit. */
uint64_t hs_cgroup_memory(const char *self, const char *mount);

#endif
