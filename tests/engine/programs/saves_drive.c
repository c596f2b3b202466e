/* saves_drive EVERY PERSIST LAST FREE: what position 0 decides of saving, step by step. FREE: a digit a step, 1 where
 * every rank has claimed a slot, 0 where one has none, s where a stop is asked for and none has one. A line a step:
 * snapshot, persist, skipped. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "run/step_math.h"

int main(int argc, char **argv) {
    if (argc < 5) return 64;
    const hs_plan_config config = {.lr = 1.0,
                                   .beta1 = 0.9,
                                   .beta2 = 0.95,
                                   .checkpoint_every = atoi(argv[1]),
                                   .persist_every = atoi(argv[2])};
    bool owed = false;
    const hs_amendments none = {0};
    const hs_step_policy policy = {.config = &config,
                                   .amendments = &none,
                                   .last_step = atoi(argv[3]),
                                   .slots = true,
                                   .owed = &owed};
    for (int64_t step = 1; argv[4][step - 1]; step++) {
        const char word = argv[4][step - 1];
        const hs_step_report report = {.step = step, .free_slot = word == '1', .stop = word == 's'};
        hs_step_control control;
        hs_step_decide(&policy, (const uint8_t *)&report, &control);
        (void)printf("%u%u%u\n", control.snapshot, control.persist, control.skipped);
    }
    return 0;
}
