/* The numbers of a step's end, in double and by our own arithmetic, so that every machine gets the
 * same bits: learning rate, bias corrections, the sum of the losses, and position 0's decision for
 * the gang. No I/O, no clock. */
#ifndef HS_RUN_STEP_MATH_H
#define HS_RUN_STEP_MATH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/status.h"
#include "run/attempt.h"
#include "wire/plan.h"

/* The run's last step. */
int64_t hs_step_total(const hs_plan_config *config, const hs_amendments *amendments);

/* Learning rate of 1-based step s. W = warmup_steps, N = steps, D = decay_steps; where lr_start is not 0, s
 * and N are counted from it, and no run has steps before it:
 *   s <= W             lr * s / W
 *   CONSTANT           lr
 *   COSINE             over s in (W, D], D = 0 meaning N: x = (s - W) / (D - W), at most 1;
 *                      min_lr + (lr - min_lr) * (1 + cos(pi x)) / 2
 *   WSD                lr up to step N - D; then min_lr + (lr - min_lr) * (N - s) / D, at least
 *                      min_lr, where N is the run's last step as it is amended
 * times the factor that is amended for s, if any. */
double hs_step_lr(const hs_plan_config *config, const hs_amendments *amendments, int64_t step);

/* x^n by repeated squaring, n >= 0: a fixed order of multiplications. */
double hs_step_pow(double x, int64_t n);

/* Tokens of a step, of all replicas. */
uint64_t hs_step_tokens(const hs_plan_config *config);

/* Sum of the losses of rows [0, rows) of one microbatch added to *sum in ascending order; rows
 * whose target is negative are left out of *count. Returns false where a loss is not finite. */
bool hs_step_add_losses(const float *losses, const int32_t *targets, int64_t rows, double *sum,
                        uint64_t *count);

/* The control block of a step in which nothing is clipped, all is finite, and nobody saves or stops. */
void hs_step_foresee(const hs_plan_config *config, const hs_amendments *amendments, int64_t step,
                     hs_step_control *control);

typedef struct hs_step_policy {
    const hs_plan_config *config;
    const hs_amendments *amendments;
    size_t tensors;
    int64_t last_step; /* the run or the attempt ends after it */
    bool slots;        /* this gang has snapshot slots */
    bool *
        owed; /* a snapshot was to be stored and was skipped: the next one is; DECIDE reads and writes it */
} hs_step_policy;

/* Whether a snapshot is due after this step, the last one apart. */
bool hs_step_due(const hs_plan_config *config, int64_t step);

/* A balanced tree of the numbers that are added to it, a power of two of them: then sums[0] is their sum.
 * The same tree as that of a replica's gradients (fold), whose buffer of group g is popcount(g). */
typedef struct hs_step_tree {
    uint64_t count;
    double sums[32];
} hs_step_tree;

static inline void hs_step_tree_add(hs_step_tree *tree, double x) {
    int at = __builtin_popcountll(tree->count);
    tree->sums[at] = x;
    for (uint64_t bits = tree->count++; bits & 1; bits >>= 1, at--)
        tree->sums[at - 1] += tree->sums[at];
}

/* Reports are an hs_step_report and its f64 sumsq[tensors], one after the other. COMBINE: those of
 * the positions 1.. are added to position 0's, the first, in order of position: a tensor's sum of
 * squares is its owner's, the others' are 0. */
void hs_step_combine(uint8_t *reports, size_t positions, size_t tensors);

/* MERGE: a replica's combined report is added to `own`. Losses are added, which commutes, so both
 * ends of an exchange get the same bits; the sums of squares are equal already. HS_E_BUG where the
 * two are of two steps or their sums of squares differ: then their weights would. */
hs_status hs_step_merge(uint8_t *own, const uint8_t *other, size_t tensors, hs_why *why);

/* DECIDE, by a report of all positions and replicas. Norm: tensors in the table's order, plain
 * ascending adds; loss, norm and scale are of the tokens that count. Where none does the weights
 * stay, and moments fade as with a gradient of 0. A snapshot is due at multiples of
 * checkpoint_every, and taken where every rank has a slot for it; the last one of an attempt is
 * taken in any case. */
void hs_step_decide(const hs_step_policy *policy, const uint8_t *report, hs_step_control *control);

#endif
