/* I2 and I3 of run/plan.h: the configuration, the shards, and the tensors with their names. */

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "run/plan/plan_internal.h"
#include "wire/slot.h"

#define MAX_ELEMENTS (INT64_C(1) << 42)

static bool is_in(double x, double low, double high) {
    return x >= low && x <= high;
}

/* Whole numbers of the configuration, each with its range. */
static hs_status check_config_numbers(hs_plan_checker *c) {
    const hs_plan_config *g = c->plan->config;
    const int64_t most = INT64_C(1) << 31;
    const uint32_t numerics = g->dtype == HS_F32 ? HS_NUMERICS_F32 : HS_NUMERICS_VERSION;
    const bool train = g->mode == HS_MODE_TRAIN;
    const struct {
        const char *name;
        int64_t value, low, high;
    } ranges[] = {
        {"mode", g->mode, HS_MODE_TRAIN, HS_MODE_INFER},
        {"dtype", g->dtype, HS_F32, HS_FP8},
        {"numerics_version", g->numerics_version, HS_NUMERICS_F32, HS_NUMERICS_VERSION},
        {"positions", g->positions, 1, train ? 65536 : 1},
        {"replicas", g->replicas, 1, train ? 65536 : 1},
        {"reduction_groups", g->reduction_groups, 1, train ? 65536 : 1},
        {"microbatches", g->microbatches, 1, 1 << 20},
        {"microbatch", g->microbatch, 1, 1 << 20},
        {"sequence", g->sequence, 1, 1 << 24},
        {"vocab", g->vocab, 1, most},
        {"token_bytes", g->token_bytes, 2, 4},
        {"steps", g->steps, train ? 1 : 0, INT64_C(1) << 40},
        {"warmup_steps", g->warmup_steps, 0, INT64_C(1) << 40},
        {"decay_steps", g->decay_steps, 0, INT64_C(1) << 40},
        {"lr_start", g->lr_start, 0, train && g->steps > 0 ? g->steps - 1 : 0},
        {"lr_schedule", g->lr_schedule, train ? HS_LR_CONSTANT : 0, HS_LR_WSD},
        {"threads", g->threads, 0, 1024}, /* the machine takes HS_THREADS_MAX of them */
        {"checkpoint_every", g->checkpoint_every, 0, INT64_C(1) << 40},
        {"persist_every", g->persist_every, HS_PERSIST_LAST, INT64_C(1) << 40},
        {"slots", g->slots, 0, HS_SLOTS_MAX},
        {"data_shuffled", g->data_shuffled, 0, 1},
        {"data_block", g->data_block, train ? 1 : 0, most},
        {"data_window", g->data_window, train ? 1 : 0, most},
    };
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++) {
        if (ranges[i].value < ranges[i].low || ranges[i].value > ranges[i].high) {
            return REFUSE(c, "config %s is %" PRId64 ", outside %" PRId64 "..%" PRId64,
                          ranges[i].name, ranges[i].value, ranges[i].low, ranges[i].high);
        }
    }
    if (g->dtype > HS_BF16 && g->dtype < HS_FP8) {
        return REFUSE(c, "config dtype is %" PRIu32 ", not f32 (%d), bf16 (%d) or fp8 (%d)",
                      g->dtype, HS_F32, HS_BF16, HS_FP8);
    }
    if (g->numerics_version != numerics) {
        return REFUSE(c,
                      "config numerics_version is %" PRIu32 ", and dtype %" PRIu32 " has %" PRIu32,
                      g->numerics_version, g->dtype, numerics);
    }
    if ((g->replicas & (g->replicas - 1)) || (g->reduction_groups & (g->reduction_groups - 1)) ||
        g->reduction_groups < g->replicas ||
        g->microbatches % (g->reduction_groups / g->replicas)) {
        return REFUSE(
            c,
            "config: %" PRIu32 " reduction groups and %" PRIu32 " replicas of %" PRIu32
            " microbatches; both are powers of two, and each replica has a whole number of "
            "groups of a whole number of microbatches",
            g->reduction_groups, g->replicas, g->microbatches);
    }
    if ((uint64_t)g->positions * g->replicas > 1u << 20) {
        return REFUSE(c,
                      "config: %" PRIu32 " positions x %" PRIu32 " replicas are more than %u ranks",
                      g->positions, g->replicas, 1u << 20);
    }
    if (g->persist_every > 0 &&
        (!g->checkpoint_every || g->persist_every % g->checkpoint_every != 0)) {
        return REFUSE(
            c, "config: persist_every %" PRId64 " is no multiple of checkpoint_every %" PRId64,
            g->persist_every, g->checkpoint_every);
    }
    if (g->token_bytes == 3) return REFUSE(c, "config token_bytes is 3, not 2 or 4");
    if ((int64_t)g->microbatch * g->sequence > INT64_C(1) << 31) {
        return REFUSE(c, "config: %" PRIu32 " x %" PRIu32 " rows a microbatch are more than 2^31",
                      g->microbatch, g->sequence);
    }
    return HS_OK;
}

/* The parts of a mixture: all shards are theirs, in order. */
static hs_status check_parts(hs_plan_checker *c) {
    const hs_plan *plan = c->plan;
    const size_t count = plan->count[HS_SECTION_PARTS];
    if (count > HS_PARTS_MAX) {
        return REFUSE(c, "%zu parts of a mixture, at most %d", count, HS_PARTS_MAX);
    }
    uint64_t shards = 0, samples = 0;
    for (size_t k = 0; k < count; k++) {
        const hs_plan_part *part = &plan->parts[k];
        if (part->reserved) return REFUSE(c, "part %zu: reserved is not 0", k);
        if (part->first_shard != shards || !part->shards ||
            part->shards > plan->count[HS_SECTION_SHARDS] - shards) {
            return REFUSE(c,
                          "part %zu: %" PRIu32 " shards from %" PRIu32
                          " on; those before end at %" PRIu64 " of %zu",
                          k, part->shards, part->first_shard, shards,
                          plan->count[HS_SECTION_SHARDS]);
        }
        shards += part->shards;
        const uint64_t end = shards < plan->count[HS_SECTION_SHARDS]
                                 ? plan->shards[shards].first_sample
                                 : plan->config->data_samples;
        if (part->first_sample != samples || !part->samples || part->samples != end - samples) {
            return REFUSE(c,
                          "part %zu: %" PRIu64 " samples from %" PRIu64
                          " on; its shards have those from %" PRIu64 " to %" PRIu64,
                          k, part->samples, part->first_sample, samples, end);
        }
        samples = end;
    }
    if (shards != plan->count[HS_SECTION_SHARDS]) {
        return REFUSE(c, "the parts have %" PRIu64 " shards of %zu", shards,
                      plan->count[HS_SECTION_SHARDS]);
    }
    return HS_OK;
}

/* A phase's weights; `before`: the phase before it, NULL: none. */
static hs_status check_phase(hs_plan_checker *c, size_t phase, const hs_plan_weight *now,
                             const hs_plan_weight *before) {
    const hs_plan *plan = c->plan;
    const size_t parts = plan->count[HS_SECTION_PARTS];
    const hs_plan_config *g = plan->config;
    const uint64_t batch = (uint64_t)g->replicas * g->microbatches * g->microbatch;
    const int64_t most = INT64_C(1) << 40;
    const int64_t low = before ? before->from_batch + 1 : 1, high = before ? most : 1;
    uint64_t cycle = 0, used = 0, cycles = 0;
    for (size_t k = 0; k < parts; k++) {
        cycle += now[k].weight;
        if (before) used += before[k].weight;
    }
    if (now->from_batch < low || now->from_batch > high) {
        return REFUSE(c, "phase %zu begins with batch %" PRId64 ", outside %" PRId64 "..%" PRId64,
                      phase, now->from_batch, low, high);
    }
    if (cycle == 0 || cycle > HS_CYCLE_MAX) {
        return REFUSE(c, "phase %zu: its weights are %" PRIu64 " in all, outside 1..%d", phase,
                      cycle, HS_CYCLE_MAX);
    }
    if (before) {
        const uint64_t batches = (uint64_t)(now->from_batch - before->from_batch);
        uint64_t places;
        if (__builtin_mul_overflow(batches, batch, &places) || places > UINT64_C(1) << 61) {
            return REFUSE(c, "phase %zu: the one before has more than 2^61 samples", phase);
        }
        cycles = (places + used - 1) / used;
    }
    for (size_t k = 0; k < parts; k++) {
        const uint64_t base = before ? before[k].base + cycles * before[k].weight : 0;
        if (now[k].part != k || now[k].from_batch != now->from_batch || now[k].base != base) {
            return REFUSE(c,
                          "phase %zu, part %zu: it says part %" PRIu32 " from batch %" PRId64
                          " and place %" PRIu64 " on, not %zu, %" PRId64 " and %" PRIu64,
                          phase, k, now[k].part, now[k].from_batch, now[k].base, k, now->from_batch,
                          base);
        }
    }
    return HS_OK;
}

static hs_status check_mixture(hs_plan_checker *c) {
    const hs_plan *plan = c->plan;
    const size_t parts = plan->count[HS_SECTION_PARTS], weights = plan->count[HS_SECTION_WEIGHTS];
    HS_TRY(check_parts(c));
    if (!weights || weights % parts || weights / parts > HS_PHASES_MAX) {
        return REFUSE(c, "%zu weights of %zu parts; there are 1 to %d phases, each with one a part",
                      weights, parts, HS_PHASES_MAX);
    }
    for (size_t p = 0; p < weights / parts; p++) {
        const hs_plan_weight *now = plan->weights + p * parts;
        HS_TRY(check_phase(c, p, now, p ? now - parts : NULL));
    }
    return HS_OK;
}

/* Reals, shards and a mixture. */
hs_status hs_plan_check_config(hs_plan_checker *c) {
    const hs_plan *plan = c->plan;
    const hs_plan_config *g = plan->config;
    HS_TRY(check_config_numbers(c));
    if (g->positions != plan->count[HS_SECTION_POSITIONS]) {
        return REFUSE(c, "config says %" PRIu32 " positions, the table has %zu", g->positions,
                      plan->count[HS_SECTION_POSITIONS]);
    }
    if (!is_in(g->lr, 0, 1e6) || !is_in(g->min_lr, 0, g->lr) || !is_in(g->clip, 0, 1e30) ||
        !is_in(g->beta1, 0, 0.999999999) || !is_in(g->beta2, 0, 0.999999999)) {
        return REFUSE(c, "config: lr %g, min_lr %g, clip %g, beta1 %g or beta2 %g is out of range",
                      g->lr, g->min_lr, g->clip, g->beta1, g->beta2);
    }
    if (g->reserved0 || !hs_plan_is_zero((const uint8_t *)g->reserved, sizeof g->reserved)) {
        return REFUSE(c, "config: reserved is not zero");
    }
    uint64_t samples = 0;
    for (size_t s = 0; s < plan->count[HS_SECTION_SHARDS]; s++) {
        const hs_plan_shard *shard = &plan->shards[s];
        if (shard->tokens > UINT64_C(1) << 50) {
            return REFUSE(c, "shard %zu: %" PRIu64 " tokens", s, shard->tokens);
        }
        if (shard->first_sample != samples) {
            return REFUSE(c, "shard %zu: first_sample %" PRIu64 ", the shards before have %" PRIu64,
                          s, shard->first_sample, samples);
        }
        samples += shard->tokens ? (shard->tokens - 1) / g->sequence : 0;
        if (samples > UINT64_C(1) << 52) return REFUSE(c, "shard %zu: more than 2^52 samples", s);
    }
    if (g->data_samples != samples) {
        return REFUSE(c, "config: data_samples is %" PRIu64 ", the shards have %" PRIu64,
                      g->data_samples, samples);
    }
    if (g->mode == HS_MODE_TRAIN && samples == 0) {
        return REFUSE(c, "the shards hold no sample of %" PRIu32 " tokens", g->sequence);
    }
    if (plan->count[HS_SECTION_PARTS]) return check_mixture(c);
    return HS_OK;
}

hs_status hs_plan_check_name(hs_plan_checker *c, const char *what, size_t i, uint32_t offset,
                             uint32_t length) {
    if (!hs_plan_inside(offset, length, c->plan->count[HS_SECTION_STRINGS])) {
        return REFUSE(c,
                      "%s %zu: its name at %" PRIu32 "+%" PRIu32 " passes the %zu bytes of strings",
                      what, i, offset, length, c->plan->count[HS_SECTION_STRINGS]);
    }
    return HS_OK;
}

typedef struct name {
    const char *at;
    uint32_t length;
    uint32_t tensor;
} name;

static int compare_names(const void *a, const void *b) {
    const name *x = a, *y = b;
    const uint32_t n = x->length < y->length ? x->length : y->length;
    const int by_bytes = memcmp(x->at, y->at, n);
    return by_bytes ? by_bytes : (x->length > y->length) - (x->length < y->length);
}

hs_status hs_plan_check_tensors(hs_plan_checker *c) {
    const hs_plan *plan = c->plan;
    const size_t n = plan->count[HS_SECTION_TENSORS];
    if (n == 0) return REFUSE(c, "it has no tensors");
    for (size_t i = 0; i < n; i++) {
        const hs_plan_tensor *t = &plan->tensors[i];
        HS_TRY(hs_plan_check_name(c, "tensor", i, t->name_offset, t->name_length));
        if (t->name_length == 0) return REFUSE(c, "tensor %zu has no name", i);
        if (t->rank < 1 || t->rank > 4) return REFUSE(c, "tensor %zu: rank %" PRIu32, i, t->rank);
        if (t->decay > 1 || t->reserved)
            return REFUSE(c, "tensor %zu: decay or reserved out of range", i);
        int64_t elements = 1;
        for (uint32_t d = 0; d < 4; d++) {
            if (t->shape[d] < 1 || (d >= t->rank && t->shape[d] != 1) ||
                t->shape[d] > MAX_ELEMENTS / elements) {
                return REFUSE(c, "tensor %zu: size %" PRId64 " of dimension %" PRIu32, i,
                              t->shape[d], d);
            }
            elements *= t->shape[d];
        }
        if (elements != t->elements) {
            return REFUSE(c, "tensor %zu: %" PRId64 " elements, its shape has %" PRId64, i,
                          t->elements, elements);
        }
    }
    name *names = calloc(n, sizeof *names);
    if (!names) return hs_fail(c->why, HS_E_MEMORY, "no memory to check %zu tensor names", n);
    for (size_t i = 0; i < n; i++) {
        names[i] = (name){plan->strings + plan->tensors[i].name_offset,
                          plan->tensors[i].name_length, (uint32_t)i};
    }
    qsort(names, n, sizeof *names, compare_names);
    hs_status st = HS_OK;
    for (size_t i = 1; i < n && st == HS_OK; i++) {
        if (compare_names(&names[i - 1], &names[i]) == 0) {
            st = REFUSE(c, "tensors %" PRIu32 " and %" PRIu32 " have one name", names[i - 1].tensor,
                        names[i].tensor);
        }
    }
    free(names);
    return st;
}
