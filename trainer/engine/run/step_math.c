#include "run/step_math.h"

#include <math.h>
#include <string.h>

#include "core/math.h"

static bool is_finite(double x) {
    return x - x == 0.0;
}

double hs_step_lr(const hs_plan_config *config, int64_t step) {
    const double range = config->lr - config->min_lr;
    if (step <= config->warmup_steps)
        return config->lr * (double)step / (double)config->warmup_steps;
    if (config->lr_schedule == HS_LR_COSINE) {
        const int64_t curve = config->decay_steps ? config->decay_steps : config->steps;
        if (step >= curve) return config->min_lr;
        const double x =
            (double)(step - config->warmup_steps) / (double)(curve - config->warmup_steps);
        return config->min_lr + range * ((1.0 + hs_cos(0x1.921fb54442d18p+1 * x)) * 0.5);
    }
    if (config->lr_schedule == HS_LR_WSD && config->decay_steps > 0 &&
        step > config->steps - config->decay_steps) {
        const int64_t left = step < config->steps ? config->steps - step : 0;
        return config->min_lr + range * ((double)left / (double)config->decay_steps);
    }
    return config->lr;
}

double hs_step_pow(double x, int64_t n) {
    double result = 1.0;
    for (; n > 0; n >>= 1) {
        if (n & 1) result *= x;
        x *= x;
    }
    return result;
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

void hs_step_decide(const hs_step_policy *policy, const uint8_t *reports, size_t positions,
                    hs_step_control *control) {
    const hs_plan_config *config = policy->config;
    const size_t stride = sizeof(hs_step_report) + 8 * policy->tensors;
    hs_step_report total = {0};
    bool all_free = true;
    for (size_t p = 0; p < positions; p++) {
        hs_step_report one;
        memcpy(&one, reports + p * stride, sizeof one);
        total.step = one.step;
        total.loss_sum += one.loss_sum;
        total.loss_count += one.loss_count;
        total.stop |= one.stop;
        total.not_finite |= one.not_finite;
        all_free &= one.free_slot != 0;
    }
    double sumsq = 0.0;
    for (size_t t = 0; t < policy->tensors; t++) {
        double of_tensor = 0.0;
        for (size_t p = 0; p < positions; p++) {
            double one;
            memcpy(&one, reports + p * stride + sizeof(hs_step_report) + 8 * t, sizeof one);
            of_tensor += one;
        }
        sumsq += of_tensor;
    }
    const int64_t step = total.step;
    const double norm = sqrt(sumsq);
    const double loss = total.loss_count ? total.loss_sum / (double)total.loss_count : 0.0;
    const double lr = hs_step_lr(config, step);
    const bool last = step >= policy->last_step || total.stop;
    const bool due = config->checkpoint_every > 0 && step % config->checkpoint_every == 0;
    *control = (hs_step_control){
        .step = step,
        .loss = loss,
        .norm = norm,
        .lr = lr,
        .clip_scale = config->clip > 0 && norm > config->clip ? (float)(config->clip / norm) : 1.0f,
        .step_size = (float)(lr / (1.0 - hs_step_pow(config->beta1, step))),
        .v_scale = (float)(1.0 / sqrt(1.0 - hs_step_pow(config->beta2, step))),
        .lr_decay = (float)lr,
        .snapshot = policy->slots && (last || (due && all_free)),
        .stop = total.stop,
        .not_finite = total.not_finite || !is_finite(norm) || !is_finite(loss),
        .skipped = policy->slots && due && !last && !all_free,
    };
}
