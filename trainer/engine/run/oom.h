/* What the kernel's OOM killer did in the control group (the container) of this process.
 *
 * Version 2 counts in memory.events and limits by memory.max, version 1 in memory.oom_control and
 * by memory.limit_in_bytes. A container mostly sees its own group as the mount's root, while its
 * name is the machine's: the group by its name comes first, then the root. */
#ifndef HS_RUN_OOM_H
#define HS_RUN_OOM_H

#include <stdint.h>

typedef struct hs_oom {
    char events[512], limit[512]; /* paths; empty: not to be had here */
} hs_oom;

/* Finds the files; `self` is /proc/self/cgroup, `mount` /sys/fs/cgroup, elsewhere in tests. */
void hs_oom_find(hs_oom *oom, const char *self, const char *mount);

/* How many processes of the group were killed so far; 0 where nothing counts them. */
int64_t hs_oom_kills(const hs_oom *oom);

/* Bytes that the group may use; 0 where there is no limit, or none that can be read. */
uint64_t hs_oom_limit(const hs_oom *oom);

#endif
