/* order_drive REPLICAS MICROBATCHES MICROBATCH STEPS [FIRST-LAST ...]: by step and replica, its first sample. The rest:
 * batches that are skipped. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "data/order.h"

int main(int argc, char **argv) {
    hs_attempt_skip skips[16];
    const uint32_t count = argc > 5 ? (uint32_t)argc - 5 : 0;
    if (argc < 5 || count > 16) return 64;
    for (uint32_t i = 0; i < count; i++) {
        char *rest;
        skips[i].first = strtoll(argv[5 + i], &rest, 10);
        skips[i].last = strtoll(rest + 1, NULL, 10);
    }
    const hs_plan_config config = {.replicas = (uint32_t)atoi(argv[1]),
                                   .microbatches = (uint32_t)atoi(argv[2]),
                                   .microbatch = (uint32_t)atoi(argv[3])};
    for (int64_t step = 1; step <= atoi(argv[4]); step++)
        for (uint64_t replica = 0; replica < config.replicas; replica++)
            (void)printf("%" PRIu64 "\n",
                         hs_order_first(&config, replica, hs_order_batch(skips, count, step)));
    return 0;
}
