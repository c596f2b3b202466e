/* What run/oom.h and run/cgroup.h read: oom_drive SELF MOUNT says "<kills> <limit>"; with a third
 * argument "<thousandths of a CPU> <bytes of memory>", least of the group and its parents. */
#include <inttypes.h>
#include <stdio.h>

#include "run/cgroup.h"
#include "run/oom.h"

int main(int argc, char **argv) {
    hs_oom oom;
    if (argc == 4)
        return printf("%" PRId64 " %" PRIu64 "\n", hs_cgroup_cpu_milli(argv[1], argv[2]),
                      hs_cgroup_memory(argv[1], argv[2])) < 0;
    if (argc != 3) return 64;
    hs_oom_find(&oom, argv[1], argv[2]);
    return printf("%" PRId64 " %" PRIu64 "\n", hs_oom_kills(&oom), hs_oom_limit(&oom)) < 0;
}
