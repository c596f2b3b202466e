/* What run/oom.h reads: oom_drive SELF MOUNT says "<kills> <limit>". */
#include <inttypes.h>
#include <stdio.h>

#include "run/oom.h"

int main(int argc, char **argv) {
    hs_oom oom;
    if (argc != 3) return 64;
    hs_oom_find(&oom, argv[1], argv[2]);
    return printf("%" PRId64 " %" PRIu64 "\n", hs_oom_kills(&oom), hs_oom_limit(&oom)) < 0;
}
