/* reports_drive GROUPS REPLICAS POSITIONS FILE [FAULT]: the end of a step, as the executor does it. FILE holds f64 losses,
 * those of each group in order, then f64 squared norms, one a tensor. Each replica adds its groups up, combines its
 * positions' reports, merges over the hypercube, and decides. FAULT: "step", "norm" or "nan" of replica 1 differs.
 *
 * Prints a line a replica: loss sum and norm as hexadecimal floats, count, free, stop, not finite; exit: hs_status_exit
 * of the first failure, its reason on standard error.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "run/step_math.h"

enum { MOST = 64, NUMBERS = 1 << 16 };

static double numbers[NUMBERS];

int main(int argc, char **argv) {
    if (argc < 5) return 64;
    const uint32_t groups = (uint32_t)atoi(argv[1]), replicas = (uint32_t)atoi(argv[2]);
    const uint32_t positions = (uint32_t)atoi(argv[3]);
    const char *fault = argc > 5 ? argv[5] : "";
    FILE *file = fopen(argv[4], "rb");
    if (!file || groups > MOST) return 66;
    uint64_t sizes[2] = {0}; /* losses a group, tensors */
    if (fread(sizes, sizeof *sizes, 2, file) != 2) return 66;
    const size_t rows = sizes[0], tensors = sizes[1], all = groups * rows + tensors;
    if (all > NUMBERS || fread(numbers, sizeof *numbers, all, file) != all) return 66;
    (void)fclose(file);
    const size_t bytes = sizeof(hs_step_report) + 8 * tensors;
    uint8_t *reports = calloc(replicas * positions, bytes), *before = calloc(replicas, bytes);
    if (!reports || !before) return 70;
    for (uint32_t r = 0; r < replicas; r++) {
        hs_step_tree tree = {.count = 0};
        uint8_t *const own = reports + r * positions * bytes;
        for (uint32_t g = r * (groups / replicas); g < (r + 1) * (groups / replicas); g++) {
            double sum = 0.0;
            for (size_t i = 0; i < rows; i++) sum += numbers[g * rows + i];
            hs_step_tree_add(&tree, sum);
        }
        for (uint32_t p = 0; p < positions;
             p++) { /* losses at the last, a tensor's norm at its owner */
            const bool last = p + 1 == positions;
            const hs_step_report one = {.step = 7 + (r == 1 && !strcmp(fault, "step")),
                                        .position = p,
                                        .loss_sum = last ? tree.sums[0] : 0.0,
                                        .loss_count = last ? groups / replicas * rows : 0,
                                        .free_slot = r + p != 3,
                                        .stop = r == 1 && p == 1};
            memcpy(own + p * bytes, &one, sizeof one);
            for (size_t t = 0; t < tensors; t++) {
                double sumsq = t % positions == p ? numbers[groups * rows + t] : 0.0;
                if (r == 1 && t + 1 == tensors && sumsq != 0.0) {
                    if (!strcmp(fault, "norm")) sumsq *= 1.0 + 0x1p-52;
                    if (!strcmp(fault, "nan")) sumsq = -(0.0 / 0.0);
                } else if (!strcmp(fault, "nan") && t + 1 == tensors && sumsq != 0.0) {
                    sumsq = 1.0 / 0.0;
                }
                memcpy(own + p * bytes + sizeof one + 8 * t, &sumsq, sizeof sumsq);
            }
        }
        hs_step_combine(own, positions, tensors);
    }
    for (uint32_t k = 1; k < replicas; k *= 2) {
        for (uint32_t r = 0; r < replicas; r++)
            memcpy(before + r * bytes, reports + r * positions * bytes, bytes);
        for (uint32_t r = 0; r < replicas; r++) {
            hs_why why = {0};
            const hs_status st = hs_step_merge(reports + r * positions * bytes,
                                               before + (r ^ k) * bytes, tensors, &why);
            if (st == HS_OK) continue;
            (void)fprintf(stderr, "%s\n", why.text);
            free(reports);
            free(before);
            return hs_status_exit(st);
        }
    }
    const hs_plan_config config = {.replicas = replicas,
                                   .microbatches = groups / replicas,
                                   .microbatch = 1,
                                   .sequence = (uint32_t)rows,
                                   .lr = 1.0,
                                   .beta1 = 0.9,
                                   .beta2 = 0.95,
                                   .clip = 1.0};
    bool owed = false;
    const hs_amendments none = {0};
    const hs_step_policy policy = {
        .config = &config, .amendments = &none, .tensors = tensors, .last_step = 9, .owed = &owed};
    for (uint32_t r = 0; r < replicas; r++) {
        hs_step_report total;
        hs_step_control control;
        memcpy(&total, reports + r * positions * bytes, sizeof total);
        hs_step_decide(&policy, reports + r * positions * bytes, &control);
        (void)printf("%a %a %" PRIu64 " %u %u %u\n", total.loss_sum, control.norm, total.loss_count,
                     total.free_slot, total.stop, control.not_finite);
    }
    free(reports);
    free(before);
    return 0;
}
