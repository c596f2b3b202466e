#include "run/plan.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/hash.h"
#include "kernels/kernels.h"
#include "run/plan_internal.h"
#include "wire/slot.h"

#define MAX_FILE     (UINT64_C(1) << 32)
#define MAX_ARENA    (UINT64_C(1) << 46)
#define MAX_ELEMENTS (INT64_C(1) << 42)

static const struct {
    const char *name;
    size_t bytes;
} section_kinds[HS_SECTION_COUNT] = {
    [HS_SECTION_CONFIG] = {"config", sizeof(hs_plan_config)},
    [HS_SECTION_STRINGS] = {"strings", 1},
    [HS_SECTION_TENSORS] = {"tensors", sizeof(hs_plan_tensor)},
    [HS_SECTION_SHARDS] = {"shards", sizeof(hs_plan_shard)},
    [HS_SECTION_POSITIONS] = {"positions", sizeof(hs_plan_position)},
    [HS_SECTION_STATES] = {"states", sizeof(hs_plan_state)},
    [HS_SECTION_PROGRAMS] = {"programs", sizeof(hs_plan_program)},
    [HS_SECTION_CALLS] = {"calls", sizeof(hs_plan_call)},
    [HS_SECTION_ACTIONS] = {"actions", sizeof(hs_plan_action)},
    [HS_SECTION_CHANNELS] = {"channels", sizeof(hs_plan_channel)},
};

enum { USES_ACT = 2, USES_MB = 4 };

hs_status hs_plan_refuse(const hs_plan_checker *c, const char *format, ...) {
    char text[600];
    va_list args;
    va_start(args, format);
    (void)vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return hs_fail(c->why, HS_E_CONFIG, "plan %s refused: %s; compile it again with this version",
                   c->file, text);
}

static bool is_zero(const uint8_t *bytes, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (bytes[i]) return false;
    }
    return true;
}

static uint64_t up64(uint64_t n) {
    return (n + 63) & ~UINT64_C(63);
}

static bool is_finite(double x) {
    return x - x == 0.0;
}

static bool is_in(double x, double low, double high) {
    return x >= low && x <= high;
}

/* I1 */
static hs_status check_header(hs_plan_checker *c) {
    hs_plan *plan = c->plan;
    if (plan->size < sizeof(hs_plan_header)) {
        return REFUSE(c, "%zu bytes, the header alone takes %zu", plan->size,
                      sizeof(hs_plan_header));
    }
    const hs_plan_header *header = plan->header = (const hs_plan_header *)plan->bytes;
    if (memcmp(header->magic, HS_PLAN_MAGIC, sizeof header->magic) != 0) {
        return REFUSE(c, "it does not start with the magic of a plan");
    }
    if (header->version != HS_PLAN_VERSION) {
        return REFUSE(c, "version %" PRIu32 ", this engine reads %u", header->version,
                      HS_PLAN_VERSION);
    }
    if (header->sections != HS_SECTION_COUNT) {
        return REFUSE(c, "%" PRIu32 " sections, this version has %d", header->sections,
                      HS_SECTION_COUNT);
    }
    if (header->file_bytes != plan->size) {
        return REFUSE(c, "cut or grown: %zu bytes, its header says %" PRIu64, plan->size,
                      header->file_bytes);
    }
    if (header->reserved)
        return REFUSE(c, "header: reserved is %" PRIu64 ", not 0", header->reserved);
    uint8_t digest[32];
    hs_sha256_of(plan->bytes + 64, plan->size - 64, digest);
    if (memcmp(digest, header->digest, sizeof digest) != 0) {
        return REFUSE(c, "its bytes do not have the digest that its header says");
    }
    uint64_t end = sizeof(hs_plan_header);
    for (int s = 0; s < HS_SECTION_COUNT; s++) {
        const hs_plan_section *section = &header->section[s];
        const uint64_t size = section_kinds[s].bytes;
        if (section->offset % 64 || section->offset < end || section->offset > plan->size) {
            return REFUSE(
                c, "section %s starts at %" PRIu64 ", not on a multiple of 64 in %" PRIu64 "..%zu",
                section_kinds[s].name, section->offset, end, plan->size);
        }
        if (section->count > (plan->size - section->offset) / size) {
            return REFUSE(c,
                          "section %s: %" PRIu64 " records of %" PRIu64 " bytes from %" PRIu64
                          " on pass the end at %zu",
                          section_kinds[s].name, section->count, size, section->offset, plan->size);
        }
        if (section->count > UINT32_MAX - 1) {
            return REFUSE(c, "section %s has %" PRIu64 " records, too many", section_kinds[s].name,
                          section->count);
        }
        if (!is_zero(plan->bytes + end, section->offset - end)) {
            return REFUSE(c, "padding before section %s is not zero", section_kinds[s].name);
        }
        end = section->offset + section->count * size;
        plan->count[s] = section->count;
    }
    if (!is_zero(plan->bytes + end, plan->size - end)) {
        return REFUSE(c, "bytes after the last section are not zero");
    }
    if (plan->count[HS_SECTION_CONFIG] != 1) {
        return REFUSE(c, "%zu config records, not 1", plan->count[HS_SECTION_CONFIG]);
    }
    const uint8_t *at[HS_SECTION_COUNT];
    for (int s = 0; s < HS_SECTION_COUNT; s++) at[s] = plan->bytes + header->section[s].offset;
    plan->config = (const hs_plan_config *)at[HS_SECTION_CONFIG];
    plan->strings = (const char *)at[HS_SECTION_STRINGS];
    plan->tensors = (const hs_plan_tensor *)at[HS_SECTION_TENSORS];
    plan->shards = (const hs_plan_shard *)at[HS_SECTION_SHARDS];
    plan->positions = (const hs_plan_position *)at[HS_SECTION_POSITIONS];
    plan->states = (const hs_plan_state *)at[HS_SECTION_STATES];
    plan->programs = (const hs_plan_program *)at[HS_SECTION_PROGRAMS];
    plan->calls = (const hs_plan_call *)at[HS_SECTION_CALLS];
    plan->actions = (const hs_plan_action *)at[HS_SECTION_ACTIONS];
    plan->channels = (const hs_plan_channel *)at[HS_SECTION_CHANNELS];
    return HS_OK;
}

/* I2: whole numbers of the configuration, each with its range. */
static hs_status check_config_numbers(hs_plan_checker *c) {
    const hs_plan_config *g = c->plan->config;
    const int64_t most = INT64_C(1) << 31;
    const bool train = g->mode == HS_MODE_TRAIN;
    const struct {
        const char *name;
        int64_t value, low, high;
    } ranges[] = {
        {"mode", g->mode, HS_MODE_TRAIN, HS_MODE_INFER},
        {"numerics_version", g->numerics_version, 1, 1},
        {"dtype", g->dtype, HS_F32, HS_BF16},
        {"positions", g->positions, 1, train ? 65536 : 1},
        {"replicas", g->replicas, 1, 1},
        {"microbatches", g->microbatches, 1, 1 << 20},
        {"microbatch", g->microbatch, 1, 1 << 20},
        {"sequence", g->sequence, 1, 1 << 24},
        {"vocab", g->vocab, 1, most},
        {"token_bytes", g->token_bytes, 2, 4},
        {"steps", g->steps, train ? 1 : 0, INT64_C(1) << 40},
        {"warmup_steps", g->warmup_steps, 0, INT64_C(1) << 40},
        {"decay_steps", g->decay_steps, 0, INT64_C(1) << 40},
        {"lr_schedule", g->lr_schedule, train ? HS_LR_CONSTANT : 0, HS_LR_WSD},
        {"threads", g->threads, 0, 1024}, /* the machine takes HS_THREADS_MAX of them */
        {"checkpoint_every", g->checkpoint_every, 0, INT64_C(1) << 40},
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
    if (g->token_bytes == 3) return REFUSE(c, "config token_bytes is 3, not 2 or 4");
    if ((int64_t)g->microbatch * g->sequence > INT64_C(1) << 31) {
        return REFUSE(c, "config: %" PRIu32 " x %" PRIu32 " rows a microbatch are more than 2^31",
                      g->microbatch, g->sequence);
    }
    return HS_OK;
}

/* I2: reals and shards. */
static hs_status check_config(hs_plan_checker *c) {
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
    if (!is_zero((const uint8_t *)g->reserved, sizeof g->reserved)) {
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
    return HS_OK;
}

static hs_status check_name(hs_plan_checker *c, const char *what, size_t i, uint32_t offset,
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

/* I3 */
static hs_status check_tensors(hs_plan_checker *c) {
    const hs_plan *plan = c->plan;
    const size_t n = plan->count[HS_SECTION_TENSORS];
    if (n == 0) return REFUSE(c, "it has no tensors");
    for (size_t i = 0; i < n; i++) {
        const hs_plan_tensor *t = &plan->tensors[i];
        HS_TRY(check_name(c, "tensor", i, t->name_offset, t->name_length));
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

/* I4: one optional array of 4-byte elements a row inside a microbatch area. */
static hs_status check_row_area(hs_plan_checker *c, const hs_plan_position *p, const char *what,
                                uint64_t offset) {
    if (offset == UINT64_MAX) return HS_OK;
    const uint64_t bytes = (uint64_t)hs_plan_rows(c->plan) * 4;
    if (offset % 4 || p->mb_count == 0 || !hs_plan_inside(offset, bytes, p->mb_stride)) {
        return REFUSE(c,
                      "position %" PRIu32 ": %s at %" PRIu64 "+%" PRIu64
                      " pass a microbatch area of %" PRIu64 " bytes",
                      p->stage, what, offset, bytes, p->mb_stride);
    }
    return HS_OK;
}

static hs_status check_static_area(hs_plan_checker *c, const hs_plan_position *p, const char *what,
                                   uint64_t offset, uint64_t bytes) {
    if (offset == UINT64_MAX) return HS_OK;
    if (offset % 8 || !hs_plan_inside(offset, bytes, p->arena_bytes)) {
        return REFUSE(c,
                      "position %" PRIu32 ": %s at %" PRIu64 "+%" PRIu64
                      " pass the arena of %" PRIu64 " bytes",
                      p->stage, what, offset, bytes, p->arena_bytes);
    }
    return HS_OK;
}

static hs_status check_range(hs_plan_checker *c, const hs_plan_position *p, const char *what,
                             uint32_t first, uint32_t count, int section) {
    if (!hs_plan_inside(first, count, c->plan->count[section])) {
        return REFUSE(
            c, "position %" PRIu32 ": %s %" PRIu32 "+%" PRIu32 " pass the %zu records of %s",
            p->stage, what, first, count, c->plan->count[section], section_kinds[section].name);
    }
    return HS_OK;
}

/* I4 */
static hs_status check_position(hs_plan_checker *c, uint32_t index) {
    const hs_plan *plan = c->plan;
    const hs_plan_position *p = &plan->positions[index];
    if (p->stage != index || p->reserved0) {
        return REFUSE(c, "position %" PRIu32 ": stage %" PRIu32 " or reserved does not hold", index,
                      p->stage);
    }
    if (p->arena_bytes < 64 || p->arena_bytes > MAX_ARENA) {
        return REFUSE(c,
                      "position %" PRIu32 ": an arena of %" PRIu64 " bytes, outside 64..%" PRIu64,
                      index, p->arena_bytes, MAX_ARENA);
    }
    const struct {
        const char *name;
        uint64_t offset, stride;
        uint32_t count;
    } areas[] = {{"act", p->act_offset, p->act_stride, p->act_slots},
                 {"microbatch", p->mb_offset, p->mb_stride, p->mb_count}};
    for (size_t i = 0; i < 2; i++) {
        if (areas[i].count == 0) continue;
        if (areas[i].offset % 64 || areas[i].stride % 64 ||
            areas[i].stride > MAX_ARENA / areas[i].count ||
            !hs_plan_inside(areas[i].offset, areas[i].stride * areas[i].count, p->arena_bytes)) {
            return REFUSE(c,
                          "position %" PRIu32 ": %s area %" PRIu64 "+%" PRIu32 "*%" PRIu64
                          " passes the arena of %" PRIu64 " bytes or is not a multiple of 64",
                          index, areas[i].name, areas[i].offset, areas[i].count, areas[i].stride,
                          p->arena_bytes);
        }
    }
    HS_TRY(check_row_area(c, p, "tokens", p->tokens_offset));
    HS_TRY(check_row_area(c, p, "targets", p->targets_offset));
    HS_TRY(check_row_area(c, p, "losses", p->loss_offset));
    HS_TRY(hs_plan_check_rows_apart(c, p));
    if (p->loss_offset != UINT64_MAX && p->targets_offset == UINT64_MAX) {
        return REFUSE(c, "position %" PRIu32 ": losses without targets", index);
    }
    if ((p->tokens_offset != UINT64_MAX || p->targets_offset != UINT64_MAX) &&
        plan->config->mode == HS_MODE_TRAIN && p->mb_count < plan->config->microbatches) {
        return REFUSE(
            c, "position %" PRIu32 ": room for %" PRIu32 " microbatches, a step has %" PRIu32,
            index, p->mb_count, plan->config->microbatches);
    }
    HS_TRY(check_static_area(c, p, "sumsq", p->sumsq_offset,
                             8u * (uint64_t)plan->count[HS_SECTION_TENSORS]));
    HS_TRY(check_static_area(c, p, "control", p->control_offset, sizeof(hs_step_control)));
    if (p->logits_offset != UINT64_MAX) {
        if (plan->config->mode != HS_MODE_INFER)
            return REFUSE(c, "position %" PRIu32 ": logits in training", index);
        /* rows < 2^31 and vocab <= 2^31: the product fits */
        HS_TRY(check_static_area(c, p, "logits", p->logits_offset,
                                 4u * (uint64_t)hs_plan_rows(plan) * plan->config->vocab));
    }
    HS_TRY(check_range(c, p, "states", p->first_state, p->states, HS_SECTION_STATES));
    HS_TRY(check_range(c, p, "init actions", p->first_init, p->inits, HS_SECTION_ACTIONS));
    HS_TRY(check_range(c, p, "load actions", p->first_load, p->loads, HS_SECTION_ACTIONS));
    HS_TRY(check_range(c, p, "step actions", p->first_step, p->steps, HS_SECTION_ACTIONS));
    if (plan->config->mode == HS_MODE_INFER &&
        (p->tokens_offset == UINT64_MAX || p->logits_offset == UINT64_MAX)) {
        return REFUSE(c, "position %" PRIu32 ": inference without tokens or logits", index);
    }
    return HS_OK;
}

typedef struct area {
    uint64_t from, to;
    uint32_t tensor; /* UINT32_MAX: none */
} area;

static int compare_areas(const void *a, const void *b) {
    const area *x = a, *y = b;
    return (x->from > y->from) - (x->from < y->from);
}

static void add_area(area *areas, size_t *n, uint64_t from, uint64_t bytes, uint32_t tensor) {
    if (from != UINT64_MAX && bytes) areas[(*n)++] = (area){from, from + bytes, tensor};
}

/* I5: room of one position's states. owners: by tensor, position + 1. */
static hs_status check_states(hs_plan_checker *c, const hs_plan_position *p, uint32_t *owners,
                              area *areas) {
    const hs_plan *plan = c->plan;
    const bool train = plan->config->mode == HS_MODE_TRAIN;
    uint64_t slot_end = 0;
    size_t n = 0;
    add_area(areas, &n, p->act_offset, p->act_stride * p->act_slots, UINT32_MAX);
    add_area(areas, &n, p->mb_offset, p->mb_stride * p->mb_count, UINT32_MAX);
    add_area(areas, &n, p->sumsq_offset, 8u * (uint64_t)plan->count[HS_SECTION_TENSORS],
             UINT32_MAX);
    add_area(areas, &n, p->control_offset, sizeof(hs_step_control), UINT32_MAX);
    add_area(areas, &n, p->logits_offset, 4u * (uint64_t)hs_plan_rows(plan) * plan->config->vocab,
             UINT32_MAX);
    for (uint32_t i = 0; i < p->states; i++) {
        const hs_plan_state *s = &plan->states[p->first_state + i];
        if (s->tensor >= plan->count[HS_SECTION_TENSORS] || s->reserved) {
            return REFUSE(c, "state %" PRIu32 ": tensor %" PRIu32 " of %zu, or reserved is not 0",
                          p->first_state + i, s->tensor, plan->count[HS_SECTION_TENSORS]);
        }
        if (owners[s->tensor]) {
            return REFUSE(c, "tensor %" PRIu32 " is owned by positions %" PRIu32 " and %" PRIu32,
                          s->tensor, owners[s->tensor] - 1, p->stage);
        }
        owners[s->tensor] = p->stage + 1;
        const uint64_t bytes = (uint64_t)plan->tensors[s->tensor].elements * 4;
        const uint64_t offsets[4] = {s->master_offset, s->m_offset, s->v_offset, s->grad_offset};
        for (int k = 0; k < 4; k++) {
            if (!train && k > 0)
                break; /* inference keeps the masters alone; the others are not looked at */
            if (offsets[k] % 64 || !hs_plan_inside(offsets[k], bytes, p->arena_bytes)) {
                return REFUSE(c,
                              "tensor %" PRIu32 " at position %" PRIu32 ": %" PRIu64 "+%" PRIu64
                              " passes the arena of %" PRIu64 " bytes, or is not a multiple of 64",
                              s->tensor, p->stage, offsets[k], bytes, p->arena_bytes);
            }
            add_area(areas, &n, offsets[k], bytes, s->tensor);
        }
        if (!train) continue;
        if (s->slot_offset % 64 || s->slot_offset < slot_end || s->slot_offset > MAX_ARENA) {
            return REFUSE(c,
                          "tensor %" PRIu32 ": slot_offset %" PRIu64
                          ", the tensor before ends at %" PRIu64,
                          s->tensor, s->slot_offset, slot_end);
        }
        slot_end = s->slot_offset + 3 * up64(bytes);
    }
    qsort(areas, n, sizeof *areas, compare_areas);
    for (size_t i = 1; i < n; i++) {
        if (areas[i].from < areas[i - 1].to) {
            return REFUSE(c,
                          "position %" PRIu32 ": areas at %" PRIu64 " (tensor %" PRId32
                          ") and %" PRIu64 " (tensor %" PRId32 ") overlap",
                          p->stage, areas[i - 1].from, (int32_t)areas[i - 1].tensor, areas[i].from,
                          (int32_t)areas[i].tensor);
        }
    }
    if (train) {
        const uint64_t least = hs_plan_slot_data_offset(slot_end) + slot_end;
        if (p->slot_bytes < least || p->slot_bytes > least + 4095) {
            return REFUSE(c,
                          "position %" PRIu32 ": slot_bytes %" PRIu64 ", its states take %" PRIu64,
                          p->stage, p->slot_bytes, least);
        }
    }
    return HS_OK;
}

/* I5 over all positions. */
static hs_status check_owners(hs_plan_checker *c) {
    const hs_plan *plan = c->plan;
    const size_t n = plan->count[HS_SECTION_TENSORS];
    uint32_t *owners = calloc(n, sizeof *owners);
    /* a position may own each tensor once, before a second owner is refused: 4 areas a tensor and 5
     * of its own */
    area *areas = calloc(4 * n + 5, sizeof *areas);
    hs_status st = HS_OK;
    if (!owners || !areas) st = hs_fail(c->why, HS_E_MEMORY, "no memory to check %zu tensors", n);
    for (uint32_t p = 0; p < plan->config->positions && st == HS_OK; p++) {
        st = check_states(c, &plan->positions[p], owners, areas);
    }
    for (size_t i = 0; i < n && st == HS_OK; i++) {
        if (!owners[i]) st = REFUSE(c, "tensor %zu is owned by no position", i);
    }
    free(owners);
    free(areas);
    return st;
}

/* Whether a reference lies in its space, for a position. `what` and `i` name it. */
static hs_status check_ref(hs_plan_checker *c, const hs_plan_position *p, const hs_plan_ref *ref,
                           const char *what, size_t i) {
    if (ref->reserved) return REFUSE(c, "%s %zu: reserved of a reference is not 0", what, i);
    const uint64_t limit = ref->space == HS_SPACE_STATIC ? p->arena_bytes
                           : ref->space == HS_SPACE_ACT  ? (p->act_slots ? p->act_stride : 0)
                           : ref->space == HS_SPACE_MB   ? (p->mb_count ? p->mb_stride : 0)
                                                         : 0;
    if (ref->space == HS_SPACE_NONE || ref->space > HS_SPACE_MB) {
        return REFUSE(c, "%s %zu: no space %" PRIu32, what, i, ref->space);
    }
    if (!hs_plan_inside(ref->offset, ref->bytes, limit)) {
        return REFUSE(c,
                      "%s %zu at position %" PRIu32 ": reference %" PRIu64 "+%" PRIu64
                      " passes its space (%" PRIu32 ") of %" PRIu64 " bytes",
                      what, i, p->stage, ref->offset, ref->bytes, ref->space, limit);
    }
    return hs_plan_check_apart(c, p, ref, what, i);
}

/* I8: an operand that is an index or the control block is the one that was checked. */
static hs_status check_known(hs_plan_checker *c, const hs_plan_position *p,
                             const hs_plan_call *call, size_t i, int o) {
    const hs_kernel_facts *facts = hs_kernel_facts_of(call->kernel);
    const hs_operand *operand = &facts->operands[o];
    const hs_plan_ref *ref = &call->ptr[o];
    if (operand->kind == HS_KIND_CONTROL) {
        if (ref->space == HS_SPACE_STATIC && ref->offset == p->control_offset) return HS_OK;
        return REFUSE(c,
                      "call %zu (%s) at position %" PRIu32 ": operand %s is not its control block",
                      i, facts->name, p->stage, operand->name);
    }
    if (operand->kind != HS_KIND_TOKENS && operand->kind != HS_KIND_TARGETS) return HS_OK;
    const bool targets = operand->kind == HS_KIND_TARGETS;
    const uint64_t at = targets ? p->targets_offset : p->tokens_offset;
    const uint64_t bytes = (uint64_t)hs_plan_rows(c->plan) * 4;
    if (ref->space != HS_SPACE_MB || at == UINT64_MAX || ref->offset < at ||
        !hs_plan_inside(ref->offset - at, ref->bytes, bytes)) {
        return REFUSE(c,
                      "call %zu (%s) at position %" PRIu32 ": operand %s is not this position's %s",
                      i, facts->name, p->stage, operand->name, targets ? "targets" : "tokens");
    }
    const int64_t below = hs_kernel_dim(facts, call->dim, operand->below);
    if (below < (int64_t)c->plan->config->vocab) {
        return REFUSE(c, "call %zu (%s): a vocabulary of %" PRId64 ", the plan's is %" PRIu32, i,
                      facts->name, below, c->plan->config->vocab);
    }
    return HS_OK;
}

/* I7: one call for one position; adds USES_* to *uses. */
static hs_status check_call(hs_plan_checker *c, const hs_plan_position *p, size_t i,
                            uint8_t *uses) {
    const hs_plan_call *call = &c->plan->calls[i];
    const hs_kernel_facts *facts = hs_kernel_facts_of(call->kernel);
    if (!facts) return REFUSE(c, "call %zu: no kernel %u", i, call->kernel);
    const char *const kernel = facts->name;
    if (call->dtype != HS_F32 && call->dtype != HS_BF16) {
        return REFUSE(c, "call %zu (%s): dtype %u", i, kernel, call->dtype);
    }
    for (int d = hs_kernel_names(facts->dims); d < HS_CALL_DIMS; d++) {
        if (call->dim[d]) return REFUSE(c, "call %zu (%s): unused dim %d is not 0", i, kernel, d);
    }
    const int reals = hs_kernel_names(facts->reals);
    for (int r = 0; r < HS_CALL_REALS; r++) {
        if (!is_finite(call->real[r]) || (r >= reals && call->real[r] != 0.0)) {
            return REFUSE(c, "call %zu (%s): real %d is %g", i, kernel, r, call->real[r]);
        }
    }
    for (int o = 0; o < HS_CALL_PTRS; o++) {
        const hs_plan_ref *ref = &call->ptr[o];
        const bool used = o < facts->operand_count;
        if (ref->space == HS_SPACE_NONE) {
            if (ref->offset || ref->bytes || ref->reserved) {
                return REFUSE(c, "call %zu (%s): absent operand %d is not zero", i, kernel, o);
            }
            if (used && !facts->operands[o].optional) {
                return REFUSE(c, "call %zu (%s): operand %d is missing", i, kernel, o);
            }
            continue;
        }
        if (!used) return REFUSE(c, "call %zu (%s): an operand %d, it takes none", i, kernel, o);
        HS_TRY(check_ref(c, p, ref, "call", i));
        uint64_t bytes = 0;
        if (hs_kernel_extent(call->kernel, call->dtype, call->dim, o, &bytes) != HS_OK) {
            return REFUSE(c, "call %zu (%s): its dims do not make sense (operand %d)", i, kernel,
                          o);
        }
        if (bytes > ref->bytes) {
            return REFUSE(c,
                          "call %zu (%s): operand %d takes %" PRIu64
                          " bytes, its reference holds %" PRIu64,
                          i, kernel, o, bytes, ref->bytes);
        }
        if (ref->offset % hs_operand_alignment(&facts->operands[o], call->dtype)) {
            return REFUSE(c,
                          "call %zu (%s): operand %d at %" PRIu64 " is not aligned to its elements",
                          i, kernel, o, ref->offset);
        }
        if (ref->space == HS_SPACE_ACT) *uses |= USES_ACT;
        if (ref->space == HS_SPACE_MB) *uses |= USES_MB;
        HS_TRY(check_known(c, p, call, i, o));
    }
    return hs_plan_check_call_writes(c, p, i);
}

static hs_status check_program(hs_plan_checker *c, const hs_plan_position *p, uint32_t program) {
    if (c->program_uses[program]) return HS_OK;
    const hs_plan_program *g = &c->plan->programs[program];
    uint8_t uses = 1;
    for (uint32_t i = 0; i < g->calls; i++)
        HS_TRY(check_call(c, p, (size_t)g->first_call + i, &uses));
    c->program_uses[program] = uses;
    return HS_OK;
}

/* I6: a SEND or RECV. `list`: 0 init, 1 load, 2 step. */
static hs_status check_message(hs_plan_checker *c, const hs_plan_position *p,
                               const hs_plan_action *a, size_t i, int list) {
    const hs_plan *plan = c->plan;
    if (a->channel >= plan->count[HS_SECTION_CHANNELS]) {
        return REFUSE(c, "action %zu: channel %" PRIu32 " of %zu", i, a->channel,
                      plan->count[HS_SECTION_CHANNELS]);
    }
    const hs_plan_channel *ch = &plan->channels[a->channel];
    if ((a->kind == HS_A_SEND ? ch->from : ch->to) != p->stage) {
        return REFUSE(c, "action %zu: channel %" PRIu32 " does not %s position %" PRIu32, i,
                      a->channel, a->kind == HS_A_SEND ? "start at" : "end at", p->stage);
    }
    if (a->ref.bytes != ch->bytes) {
        return REFUSE(
            c, "action %zu: a message of %" PRIu64 " bytes, channel %" PRIu32 " carries %" PRIu64,
            i, a->ref.bytes, a->channel, ch->bytes);
    }
    (a->kind == HS_A_SEND ? c->sends : c->recvs)[(size_t)a->channel * 3 + (size_t)list]++;
    return HS_OK;
}

/* I9: room for the blocks of the step's end; 8-byte aligned, STATIC. */
static hs_status check_block(hs_plan_checker *c, const hs_plan_action *a, size_t i,
                             uint64_t bytes) {
    if (a->ref.space != HS_SPACE_STATIC || a->ref.offset % 8 || a->ref.bytes < bytes) {
        return REFUSE(c,
                      "action %zu: its block takes %" PRIu64
                      " aligned bytes of STATIC, its reference has %" PRIu64 " at %" PRIu64,
                      i, bytes, a->ref.bytes, a->ref.offset);
    }
    return HS_OK;
}

/* I6, I9 */
static hs_status check_action(hs_plan_checker *c, const hs_plan_position *p, size_t i, int list) {
    const hs_plan *plan = c->plan;
    const hs_plan_action *a = &plan->actions[i];
    const bool message = a->kind == HS_A_SEND || a->kind == HS_A_RECV;
    const bool block = a->kind == HS_A_COMBINE || a->kind == HS_A_REPORT || a->kind == HS_A_APPLY;
    if (a->kind == 0 || a->kind >= HS_A_COUNT)
        return REFUSE(c, "action %zu: no kind %u", i, a->kind);
    if (!a->op || !strchr("FIWBO-", a->op)) return REFUSE(c, "action %zu: no op %d", i, a->op);
    if (a->reserved || a->stage != p->stage) {
        return REFUSE(c,
                      "action %zu: stage %" PRIu32 " in the list of position %" PRIu32
                      ", or reserved is not 0",
                      i, a->stage, p->stage);
    }
    if (a->microbatch != UINT32_MAX && a->microbatch >= p->mb_count) {
        return REFUSE(c, "action %zu: microbatch %" PRIu32 " of %" PRIu32, i, a->microbatch,
                      p->mb_count);
    }
    if (a->slot != UINT32_MAX && a->slot >= p->act_slots) {
        return REFUSE(c, "action %zu: slot %" PRIu32 " of %" PRIu32, i, a->slot, p->act_slots);
    }
    if ((a->kind == HS_A_RUN) != (a->program != UINT32_MAX) ||
        message != (a->channel != UINT32_MAX)) {
        return REFUSE(
            c, "action %zu: program %" PRIu32 " or channel %" PRIu32 " does not go with kind %u", i,
            a->program, a->channel, a->kind);
    }
    uint8_t uses = 0;
    if (message || block) {
        HS_TRY(check_ref(c, p, &a->ref, "action", i));
        uses = a->ref.space == HS_SPACE_ACT ? USES_ACT : a->ref.space == HS_SPACE_MB ? USES_MB : 0;
    } else if (a->ref.space || a->ref.offset || a->ref.bytes || a->ref.reserved) {
        return REFUSE(c, "action %zu: kind %u has no reference", i, a->kind);
    }
    if (a->kind == HS_A_RUN) {
        if (a->program >= plan->count[HS_SECTION_PROGRAMS]) {
            return REFUSE(c, "action %zu: program %" PRIu32 " of %zu", i, a->program,
                          plan->count[HS_SECTION_PROGRAMS]);
        }
        HS_TRY(check_program(c, p, a->program));
        uses = c->program_uses[a->program];
    }
    if (((uses & USES_ACT) && a->slot == UINT32_MAX) ||
        ((uses & USES_MB) && a->microbatch == UINT32_MAX)) {
        return REFUSE(c, "action %zu: it uses a slot or a microbatch area and names none", i);
    }
    if (message) return check_message(c, p, a, i, list);
    if (a->kind == HS_A_RUN) return HS_OK;
    if (list != 2 || plan->config->mode != HS_MODE_TRAIN) {
        return REFUSE(c, "action %zu: kind %u outside the steps of a training", i, a->kind);
    }
    switch (a->kind) {
    case HS_A_REPORT:
        if (p->sumsq_offset == UINT64_MAX)
            return REFUSE(c, "action %zu: a report without sumsq", i);
        return check_block(c, a, i, hs_plan_report_bytes(plan));
    case HS_A_COMBINE:
        if (p->stage != 0)
            return REFUSE(c, "action %zu: position %" PRIu32 " combines, not 0", i, p->stage);
        if (p->control_offset == UINT64_MAX) return REFUSE(c, "action %zu: no control block", i);
        return check_block(c, a, i, hs_plan_report_bytes(plan) * plan->config->positions);
    case HS_A_APPLY:
        return check_block(c, a, i, sizeof(hs_step_control));
    default: /* DATA, SNAPSHOT */
        return HS_OK;
    }
}

/* I6: the lists of one position. Training steps end on one report, one apply and one snapshot, in
 * that order. */
static hs_status check_lists(hs_plan_checker *c, const hs_plan_position *p) {
    const hs_plan *plan = c->plan;
    const uint32_t firsts[3] = {p->first_init, p->first_load, p->first_step};
    const uint32_t counts[3] = {p->inits, p->loads, p->steps};
    uint32_t seen[HS_A_COUNT] = {0};
    memset(c->program_uses, 0, plan->count[HS_SECTION_PROGRAMS]);
    for (int list = 0; list < 3; list++) {
        for (uint32_t k = 0; k < counts[list]; k++) {
            const size_t i = (size_t)firsts[list] + k;
            HS_TRY(check_action(c, p, i, list));
            if (list != 2) {
                HS_TRY(hs_plan_check_action_writes(c, p, i));
                continue;
            }
            const uint8_t kind = plan->actions[i].kind;
            seen[kind]++;
            const bool early = (kind == HS_A_COMBINE && !seen[HS_A_REPORT]) ||
                               (kind == HS_A_APPLY && !seen[HS_A_REPORT]) ||
                               (kind == HS_A_APPLY && p->stage == 0 && !seen[HS_A_COMBINE]) ||
                               (kind == HS_A_SNAPSHOT && !seen[HS_A_APPLY]);
            if (early) return REFUSE(c, "action %zu: kind %u comes before what it needs", i, kind);
            HS_TRY(hs_plan_check_action_writes(c, p, i));
        }
    }
    if (plan->config->mode != HS_MODE_TRAIN) return HS_OK;
    if (seen[HS_A_REPORT] != 1 || seen[HS_A_APPLY] != 1 || seen[HS_A_SNAPSHOT] != 1 ||
        seen[HS_A_COMBINE] != (p->stage == 0)) {
        return REFUSE(
            c,
            "position %" PRIu32 ": a step has %" PRIu32 " reports, %" PRIu32 " combines, %" PRIu32
            " applies and %" PRIu32 " snapshots; one each, combines at position 0 only",
            p->stage, seen[HS_A_REPORT], seen[HS_A_COMBINE], seen[HS_A_APPLY], seen[HS_A_SNAPSHOT]);
    }
    if (!seen[HS_A_DATA] && (p->tokens_offset != UINT64_MAX || p->targets_offset != UINT64_MAX)) {
        return REFUSE(c, "position %" PRIu32 ": it reads tokens and has no data action", p->stage);
    }
    return HS_OK;
}

/* I3 (names), I6, I7, I8, I9 */
static hs_status check_programs_and_lists(hs_plan_checker *c) {
    const hs_plan *plan = c->plan;
    for (size_t i = 0; i < plan->count[HS_SECTION_PROGRAMS]; i++) {
        const hs_plan_program *g = &plan->programs[i];
        HS_TRY(check_name(c, "program", i, g->name_offset, g->name_length));
        if (!hs_plan_inside(g->first_call, g->calls, plan->count[HS_SECTION_CALLS])) {
            return REFUSE(c, "program %zu: calls %" PRIu32 "+%" PRIu32 " of %zu", i, g->first_call,
                          g->calls, plan->count[HS_SECTION_CALLS]);
        }
    }
    for (size_t i = 0; i < plan->count[HS_SECTION_CHANNELS]; i++) {
        const hs_plan_channel *ch = &plan->channels[i];
        if (ch->from >= plan->config->positions || ch->to >= plan->config->positions ||
            ch->from == ch->to || ch->kind < HS_CH_FORWARD || ch->kind > HS_CH_CONTROL ||
            ch->reserved || ch->bytes == 0 || ch->bytes > MAX_ARENA) {
            return REFUSE(c,
                          "channel %zu: from %" PRIu32 " to %" PRIu32 " of %" PRIu32
                          ", kind %" PRIu32 ", %" PRIu64 " bytes",
                          i, ch->from, ch->to, plan->config->positions, ch->kind, ch->bytes);
        }
    }
    for (uint32_t p = 0; p < plan->config->positions; p++)
        HS_TRY(check_lists(c, &plan->positions[p]));
    for (size_t i = 0; i < plan->count[HS_SECTION_CHANNELS] * 3; i++) {
        if (c->sends[i] != c->recvs[i]) {
            return REFUSE(c, "channel %zu: %" PRIu64 " sends and %" PRIu64 " receives in one %s",
                          i / 3, c->sends[i], c->recvs[i],
                          (const char *const[]){"init", "load", "step"}[i % 3]);
        }
    }
    return HS_OK;
}

static hs_status check_all(hs_plan_checker *c) {
    HS_TRY(check_header(c));
    HS_TRY(check_config(c));
    HS_TRY(check_tensors(c));
    for (uint32_t p = 0; p < c->plan->config->positions; p++) HS_TRY(check_position(c, p));
    HS_TRY(check_owners(c));
    c->program_uses = calloc(c->plan->count[HS_SECTION_PROGRAMS] + 1, 1);
    c->sends = calloc(c->plan->count[HS_SECTION_CHANNELS] * 3 + 1, sizeof *c->sends);
    c->recvs = calloc(c->plan->count[HS_SECTION_CHANNELS] * 3 + 1, sizeof *c->recvs);
    if (!c->program_uses || !c->sends || !c->recvs) {
        return hs_fail(c->why, HS_E_MEMORY, "no memory to check plan %s", c->file);
    }
    return check_programs_and_lists(c);
}

hs_status hs_plan_adopt(uint8_t *bytes, size_t size, const char *file, hs_plan *plan, hs_why *why) {
    *plan = (hs_plan){.bytes = bytes, .size = size};
    hs_plan_checker c = {.plan = plan, .file = file, .why = why};
    const hs_status st = check_all(&c);
    free(c.program_uses);
    free(c.sends);
    free(c.recvs);
    if (st != HS_OK) hs_plan_close(plan);
    return st;
}

hs_status hs_plan_open(const char *path, hs_plan *plan, hs_why *why) {
    *plan = (hs_plan){0};
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat info;
    if (fd < 0 || fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
        const int code = fd < 0 ? errno : EINVAL;
        if (fd >= 0) (void)close(fd);
        return hs_fail(why, HS_E_CONFIG, "plan %s cannot be read: %s", path, strerror(code));
    }
    const size_t size = (size_t)info.st_size;
    uint8_t *bytes = NULL;
    hs_status st = HS_OK;
    if (size == 0 || size > MAX_FILE) {
        st = hs_fail(why, HS_E_CONFIG, "plan %s refused: %zu bytes, outside 1..%" PRIu64, path,
                     size, MAX_FILE);
    } else if (!(bytes = malloc(size))) {
        st = hs_fail(why, HS_E_MEMORY, "no memory for plan %s of %zu bytes", path, size);
    }
    for (size_t at = 0; st == HS_OK && at < size;) {
        const ssize_t n = read(fd, bytes + at, size - at);
        if (n > 0) {
            at += (size_t)n;
        } else if (n == 0 || errno != EINTR) {
            st = hs_fail(why, HS_E_CONFIG, "plan %s cannot be read to its end: %s", path,
                         n == 0 ? "it was cut" : strerror(errno));
        }
    }
    (void)close(fd);
    if (st != HS_OK) {
        free(bytes);
        return st;
    }
    return hs_plan_adopt(bytes, size, path, plan, why);
}

void hs_plan_close(hs_plan *plan) {
    free(plan->bytes);
    *plan = (hs_plan){0};
}

uint64_t hs_plan_slot_data_bytes(const hs_plan *plan, const hs_plan_position *position) {
    if (position->states == 0) return 0;
    const hs_plan_state *last = &plan->states[position->first_state + position->states - 1];
    return last->slot_offset + 3 * up64((uint64_t)plan->tensors[last->tensor].elements * 4);
}

uint64_t hs_plan_slot_data_offset(uint64_t data_bytes) {
    const uint64_t chunks = (data_bytes + HS_SLOT_CHUNK - 1) / HS_SLOT_CHUNK;
    return HS_SLOT_HEADER_BYTES + ((8 * chunks + 4095) & ~UINT64_C(4095));
}

void hs_plan_action_name(const hs_plan *plan, const hs_plan_action *a, char text[40]) {
    static const char *const names[HS_A_COUNT] = {"",        "run",    "SEND",  "RECV",    "data",
                                                  "combine", "report", "apply", "snapshot"};
    char number[12] = "";
    if (a->microbatch != UINT32_MAX)
        (void)snprintf(number, sizeof number, "%" PRIu32, a->microbatch);
    if (a->kind == HS_A_RUN && a->op != 'O' && a->op != '-') {
        (void)snprintf(text, 40, "%" PRIu32 "%c%s", a->stage, a->op, number);
    } else if (a->kind == HS_A_RUN) {
        const hs_plan_program *p = &plan->programs[a->program];
        (void)snprintf(text, 40, "%.*s", (int)(p->name_length < 32 ? p->name_length : 32),
                       plan->strings + p->name_offset);
    } else if (a->kind == HS_A_SEND || a->kind == HS_A_RECV) {
        static const char *const kinds[] = {"?",           "F",      "B",      "TIED_GRAD",
                                            "TIED_WEIGHT", "REPORT", "CONTROL"};
        const uint32_t kind = plan->channels[a->channel].kind;
        (void)snprintf(text, 40, "%" PRIu32 "%s_%s%s", a->stage, names[a->kind],
                       a->op != '-' && a->op != 'O' ? (const char[]){a->op, 0} : kinds[kind],
                       number);
    } else {
        (void)snprintf(text, 40, "%s", names[a->kind]);
    }
}
