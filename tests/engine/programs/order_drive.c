/* order_drive REPLICAS MICROBATCHES MICROBATCH STEPS: by step and replica, its first sample. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "data/order.h"

int main(int argc, char **argv) {
    if (argc != 5) return 64;
    const hs_plan_config config = {.replicas = (uint32_t)atoi(argv[1]),
                                   .microbatches = (uint32_t)atoi(argv[2]),
                                   .microbatch = (uint32_t)atoi(argv[3])};
    for (int64_t step = 1; step <= atoi(argv[4]); step++)
        for (uint64_t replica = 0; replica < config.replicas; replica++)
            (void)printf("%" PRIu64 "\n", hs_order_first(&config, replica, step));
    return 0;
}
