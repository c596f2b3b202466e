#include "run/step_math.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "core/math.h"
#include "run/origin.h"

static bool is_finite(double x) {
    return x - x == 0.0;
}

int64_t hs_step_total(const hs_plan_config *config, const hs_amendments *amendments) {
    return amendments->steps ? amendments->steps : config->steps;
}

/* By the schedule alone, of its step s and its last step; the curve of a cosine stays where the plan has it. */
static double scheduled(const hs_plan_config *config, int64_t total, int64_t step) {
    const double range = config->lr - config->min_lr;
    if (step <= config->warmup_steps)
        return config->lr * (double)step / (double)config->warmup_steps;
    if (config->lr_schedule == HS_LR_COSINE) {
        const int64_t curve =
            config->decay_steps ? config->decay_steps : config->steps - config->lr_start;
        if (step >= curve) return config->min_lr;
        const double x =
            (double)(step - config->warmup_steps) / (double)(curve - config->warmup_steps);
        return config->min_lr + range * ((1.0 + hs_cos(0x1.921fb54442d18p+1 * x)) * 0.5);
    }
    if (config->lr_schedule == HS_LR_WSD && config->decay_steps > 0 &&
        step > total - config->decay_steps) {
        const int64_t left = step < total ? total - step : 0;
        return config->min_lr + range * ((double)left / (double)config->decay_steps);
    }
    return config->lr;
}

double hs_step_lr(const hs_plan_config *config, const hs_amendments *amendments, int64_t step) {
    const int64_t start = config->lr_start;
    double lr = scheduled(config, hs_step_total(config, amendments) - start,
                          step > start ? step - start : 1);
    uint32_t next = 0;
    while (next < amendments->rate_count && amendments->rates[next].step <= step) next++;
    if (next) lr *= amendments->rates[next - 1].factor;
    return lr;
}

double hs_step_pow(double x, int64_t n) {
    double result = 1.0;
    for (; n > 0; n >>= 1) {
        if (n & 1) result *= x;
        x *= x;
    }
    return result;
}

uint64_t hs_step_tokens(const hs_plan_config *config) {
    return (uint64_t)config->replicas * config->microbatches * config->microbatch *
           config->sequence;
}

bool hs_step_add_losses(const float *losses, const int32_t *targets, int64_t rows, double *sum,
                        uint64_t *count) {
    bool finite = true;
    for (int64_t r = 0; r < rows; r++) {
        const double loss = (double)losses[r];
        finite &= is_finite(loss);
        *sum += loss;
        *count += targets[r] >= 0;
    }
    return finite;
}

static double sumsq_of(const uint8_t *report, size_t tensor) {
    double x;
    memcpy(&x, report + sizeof(hs_step_report) + 8 * tensor, sizeof x);
    return x;
}

static void add_report(hs_step_report *to, const uint8_t *report) {
    hs_step_report one;
    memcpy(&one, report, sizeof one);
    to->loss_sum += one.loss_sum;
    to->loss_count += one.loss_count;
    to->stop |= one.stop;
    to->not_finite |= one.not_finite;
    to->free_slot &= one.free_slot;
    const hs_origin first = hs_origin_first((hs_origin){to->origin, to->origin_of},
                                            (hs_origin){one.origin, one.origin_of});
    to->origin = first.origin;
    to->origin_of = first.of;
}

void hs_step_combine(uint8_t *reports, size_t positions, size_t tensors) {
    const size_t stride = sizeof(hs_step_report) + 8 * tensors;
    hs_step_report total;
    memcpy(&total, reports, sizeof total);
    for (size_t p = 1; p < positions; p++) add_report(&total, reports + p * stride);
    memcpy(reports, &total, sizeof total);
    for (size_t t = 0; t < tensors; t++) {
        double sum = 0.0;
        for (size_t p = 0; p < positions; p++) sum += sumsq_of(reports + p * stride, t);
        memcpy(reports + sizeof total + 8 * t, &sum, sizeof sum);
    }
}

hs_status hs_step_merge(uint8_t *own, const uint8_t *other, size_t tensors, hs_why *why) {
    hs_step_report total, theirs;
    memcpy(&total, own, sizeof total);
    memcpy(&theirs, other, sizeof theirs);
    if (total.step != theirs.step) {
        return hs_fail(why, HS_E_BUG, "a replica reports step %" PRId64 ", this is step %" PRId64,
                       theirs.step, total.step);
    }
    for (size_t t = 0; t < tensors; t++) {
        const double a = sumsq_of(own, t), b = sumsq_of(other, t);
        if (a == b || (!is_finite(a) && !is_finite(b))) continue;
        return hs_fail(why, HS_E_BUG,
                       "the squared norm of the gradient of tensor %zu is %.17g, another replica "
                       "has %.17g: one of them computes or communicates wrongly",
                       t, a, b);
    }
    add_report(&total, other);
    memcpy(own, &total, sizeof total);
    return HS_OK;
}

void hs_step_foresee(const hs_plan_config *config, const hs_amendments *amendments, int64_t step,
                     hs_step_control *control) {
    const double lr = hs_step_lr(config, amendments, step);
    *control = (hs_step_control){
        .step = step,
        .lr = lr,
        .clip_scale = 1.0f,
        .step_size = (float)(lr / (1.0 - hs_step_pow(config->beta1, step))),
        .v_scale = (float)(1.0 / sqrt(1.0 - hs_step_pow(config->beta2, step))),
        .lr_decay = (float)lr,
    };
}

bool hs_step_due(const hs_plan_config *config, int64_t step) {
    return config->checkpoint_every > 0 && step % config->checkpoint_every == 0;
}

void hs_step_decide(const hs_step_policy *policy, const uint8_t *report, hs_step_control *control) {
    const hs_plan_config *config = policy->config;
    hs_step_report total;
    memcpy(&total, report, sizeof total);
    const bool all_free = total.free_slot != 0;
    double sumsq = 0.0;
    for (size_t t = 0; t < policy->tensors; t++) sumsq += sumsq_of(report, t);
    const int64_t step = total.step;
    /* gradients are of the sum of the losses over `tokens`; 1 where all of them count */
    const uint64_t tokens = hs_step_tokens(config);
    const double scale = total.loss_count ? (double)tokens / (double)total.loss_count : 0.0;
    const double norm = scale * sqrt(sumsq);
    const double loss = total.loss_count ? total.loss_sum / (double)total.loss_count : 0.0;
    const bool last = step >= policy->last_step || total.stop;
    const bool due = hs_step_due(config, step);
    const int64_t persist = config->persist_every;
    const bool owed = *policy->owed || (due && (!persist || (persist > 0 && step % persist == 0)));
    hs_step_foresee(config, policy->amendments, step, control);
    control->loss = loss;
    control->norm = norm;
    control->counted = total.loss_count;
    const bool clips = config->clip > 0 && norm > config->clip;
    control->clip_scale = (float)(scale * (clips ? config->clip / norm : 1.0));
    if (!total.loss_count) control->step_size = control->lr_decay = 0.0f;
    control->snapshot = policy->slots && (last || (due && all_free));
    control->stop = total.stop;
    control->not_finite = total.not_finite || !is_finite(norm) || !is_finite(loss);
    control->origin = total.origin;
    control->origin_of = total.origin_of;
    control->skipped = policy->slots && due && !last && !all_free;
    control->persist = control->snapshot && (last || owed);
    *policy->owed = owed && !control->snapshot;
}
