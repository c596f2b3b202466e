/* threads_drive THREADS LOCAL_RANKS CPUS CPU_MILLI MEMORY_BYTES NEEDS: hs_machine_threads. */
#include <stdio.h>
#include <stdlib.h>

#include "run/machine.h"

int main(int argc, char **argv) {
    if (argc != 7) return 64;
    const hs_plan_position position = {.bytes_by_kind = {strtoull(argv[6], NULL, 10)}};
    const hs_machine_config config = {.position = &position,
                                      .threads = (uint32_t)strtoul(argv[1], NULL, 10),
                                      .local_ranks = (uint32_t)strtoul(argv[2], NULL, 10)};
    const hs_machine_limits limits = {.cpus = strtoll(argv[3], NULL, 10),
                                      .cpu_milli = strtoll(argv[4], NULL, 10),
                                      .memory_bytes = strtoull(argv[5], NULL, 10)};
    return printf("%d\n", hs_machine_threads(&config, &limits)) < 0;
}
