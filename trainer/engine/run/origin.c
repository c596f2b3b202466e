#include "run/origin.h"

#include <inttypes.h>
#include <stdbool.h>
#include <string.h>

#include "kernels/kernels.h"

enum { ALL = 0xffffff, STAGES = 0xffff, OPERANDS = 32, OF_STATE = 0 };
_Static_assert(HS_CALL_PTRS <= OPERANDS, "an operand's number takes 5 bits");

static uint64_t pack(uint64_t microbatches, uint64_t op, uint64_t stage) {
    return microbatches << 40 | op << 38 | stage << 22 | 1;
}

static uint64_t counted(const hs_plan *plan, uint32_t replica, uint32_t microbatch) {
    if (microbatch == UINT32_MAX) return ALL;
    const uint64_t all = (uint64_t)replica * plan->config->microbatches + microbatch;
    return all < ALL - 1 ? all + 1 : ALL - 1;
}

/* The parts of an origin. */
static uint64_t microbatches_of(uint64_t origin) {
    return origin >> 40;
}
static uint32_t op_of(uint64_t origin) {
    return origin >> 38 & 3;
}

hs_origin hs_origin_of_loss(const hs_plan *plan, uint32_t replica, uint32_t microbatch) {
    return (hs_origin){.origin = pack(counted(plan, replica, microbatch), HS_ORIGIN_SUM, 0),
                       .of = HS_ORIGIN_LOSS};
}

hs_origin hs_origin_of_norm(uint32_t tensor) {
    return (hs_origin){.origin = pack(ALL, HS_ORIGIN_SUM, 0),
                       .of = tensor * OPERANDS + HS_ORIGIN_GRADIENT};
}

/* --- the second look --------------------------------------------------------------------- */

/* Whether none of the numbers there has all bits of its exponent. */
#define FINITE(name, bits, exponent)                                                               \
    static bool name(const uint8_t *at, uint64_t bytes) {                                          \
        bool finite = true;                                                                        \
        for (uint64_t i = 0; i < bytes; i += sizeof(bits)) {                                       \
            bits x;                                                                                \
            memcpy(&x, at + i, sizeof x);                                                          \
            finite &= (x & (exponent)) != (exponent);                                              \
        }                                                                                          \
        return finite;                                                                             \
    }
FINITE(bf16_finite, uint16_t, 0x7f80u)
FINITE(f32_finite, uint32_t, 0x7f800000u)
FINITE(f64_finite, uint64_t, UINT64_C(0x7ff) << 52)

static uint8_t *place_of(const hs_look *look, const hs_plan_ref *ref, uint32_t slot,
                         uint32_t microbatch) {
    return look->arena + hs_linked_offset(look->linked, ref, slot == UINT32_MAX ? 0 : slot,
                                          microbatch == UINT32_MAX ? 0 : microbatch);
}

static void found(hs_look *look, uint64_t origin, uint32_t of) {
    look->first = hs_origin_first(look->first, (hs_origin){.origin = origin, .of = of});
}

/* Gradients are what calls add to in float32, but for the optimizers', which update state; all of it lies in STATIC. */
static void zero_gradients(const hs_look *look, const hs_plan_call *call) {
    if (call->kernel == HS_K_ADAMW || call->kernel == HS_K_MUON) return;
    const hs_kernel_facts *facts = hs_kernel_facts_of(call->kernel);
    for (int o = 0; o < facts->operand_count; o++) {
        const hs_operand *operand = &facts->operands[o];
        const hs_plan_ref *ref = &call->ptr[o];
        if (operand->role != HS_ROLE_UPDATE || operand->kind != HS_KIND_ACC) continue;
        if (ref->space != HS_SPACE_STATIC && ref->space != HS_SPACE_PIECE) continue;
        uint64_t bytes = 0;
        (void)hs_kernel_extent(call->kernel, call->dtype, call->dim, o, &bytes);
        memset(place_of(look, ref, 0, 0), 0, bytes);
    }
}

void hs_look_begin(hs_look *look) {
    const hs_plan *plan = look->plan;
    const hs_plan_position *p = look->position;
    for (uint32_t i = 0; i < p->states; i++) {
        const hs_plan_state *s = &plan->states[p->first_state + i];
        const uint64_t at[3] = {s->master_offset, s->m_offset, s->v_offset};
        for (uint32_t k = HS_ORIGIN_WEIGHT; k < hs_state_kinds(s); k++)
            if (!f32_finite(look->arena + at[k], 4 * hs_plan_kept(plan, s)))
                found(look, pack(OF_STATE, 0, 0), s->tensor * OPERANDS + k);
    }
    for (uint32_t i = 0; i < p->steps; i++) {
        const hs_plan_action *a = &plan->actions[p->first_step + i];
        if (a->kind != HS_A_RUN) continue;
        const hs_plan_program *program = &plan->programs[a->program];
        for (uint32_t k = 0; k < program->calls; k++)
            zero_gradients(look, &plan->calls[program->first_call + k]);
    }
}

static uint64_t origin_at(const hs_look *look, const hs_plan_action *a) {
    const uint64_t microbatches = counted(look->plan, look->replica, a->microbatch);
    const uint64_t stage = a->stage < STAGES ? a->stage : STAGES;
    switch (a->op) {
    case 'F':
        return pack(microbatches, HS_ORIGIN_F, stage);
    case 'B':
    case 'I':
        return pack(microbatches, HS_ORIGIN_B, STAGES - stage);
    case 'W':
        return pack(microbatches, HS_ORIGIN_W, STAGES - stage);
    default:
        return pack(ALL, HS_ORIGIN_W, 0);
    }
}

static bool operand_finite(const hs_look *look, const hs_plan_action *a, const hs_plan_call *call,
                           int o) {
    const hs_kind kind = hs_kernel_facts_of(call->kernel)->operands[o].kind;
    hs_pieces pieces;
    if (kind != HS_KIND_DT && kind != HS_KIND_ACC && kind != HS_KIND_F64) return true;
    if (hs_kernel_pieces(call->kernel, call->dtype, call->dim, o, &pieces) != HS_OK) return true;
    const uint8_t *at = place_of(look, &call->ptr[o], a->slot, a->microbatch);
    for (int64_t i = 0; i < pieces.count; i++, at += pieces.stride) {
        const uint64_t bytes = (uint64_t)pieces.bytes;
        const bool finite = kind == HS_KIND_F64                            ? f64_finite(at, bytes)
                            : kind == HS_KIND_DT && call->dtype == HS_BF16 ? bf16_finite(at, bytes)
                                                                           : f32_finite(at, bytes);
        if (!finite) return false;
    }
    return true;
}

void hs_look_at_call(void *ctx, const hs_plan_action *a, uint32_t number) {
    hs_look *look = ctx;
    const hs_plan_call *call = &look->plan->calls[number];
    const hs_kernel_facts *facts = hs_kernel_facts_of(call->kernel);
    const uint64_t origin = origin_at(look, a);
    for (int o = 0; o < facts->operand_count; o++) {
        const hs_role role = facts->operands[o].role;
        /* of one action the first call counts, whatever their numbers are */
        if (look->first.origin && look->first.origin <= origin) return;
        if (role != HS_ROLE_WRITE && role != HS_ROLE_UPDATE) continue;
        if (call->ptr[o].space == HS_SPACE_NONE || operand_finite(look, a, call, o)) continue;
        found(look, origin, number * OPERANDS + (uint32_t)o);
    }
}

/* --- words ------------------------------------------------------------------------------- */

/* What an origin means; absent: UINT32_MAX, '-', NULL. */
typedef struct meaning {
    uint32_t microbatch, stage, layer, tensor;
    char pass;
    const char *kernel, *operand;
} meaning;

/* The position whose step runs the call; NULL: none does. */
static const hs_plan_position *runs(const hs_plan *plan, uint32_t call) {
    for (size_t k = 0; k < plan->count[HS_SECTION_POSITIONS]; k++) {
        const hs_plan_position *p = &plan->positions[k];
        for (uint32_t i = 0; i < p->steps; i++) {
            const hs_plan_action *a = &plan->actions[p->first_step + i];
            if (a->kind != HS_A_RUN) continue;
            const hs_plan_program *program = &plan->programs[a->program];
            if (call - program->first_call < program->calls) return p;
        }
    }
    return NULL;
}

/* The state tensor whose gradient is added up at this STATIC offset, UINT32_MAX: none's. */
static uint32_t tensor_at(const hs_plan *plan, const hs_plan_position *p, uint64_t offset) {
    for (uint32_t i = 0; i < p->states; i++) {
        const hs_plan_state *s = &plan->states[p->first_state + i];
        if (offset >= s->grad_offset &&
            offset - s->grad_offset < 4 * hs_plan_kept(plan, s) * s->pieces)
            return s->tensor;
    }
    return UINT32_MAX;
}

/* The same, also of a group's gradient, which FOLD adds to another's (wire/plan.h, reduction_groups). */
static uint32_t gradient_at(const hs_plan *plan, const hs_plan_position *p, uint64_t offset) {
    uint32_t tensor = tensor_at(plan, p, offset);
    for (int level = 0; tensor == UINT32_MAX && level < 32; level++) {
        uint64_t next = offset;
        for (uint32_t i = 0; next == offset && i < p->steps; i++) {
            const hs_plan_action *a = &plan->actions[p->first_step + i];
            if (a->kind != HS_A_RUN) continue;
            const hs_plan_program *program = &plan->programs[a->program];
            for (uint32_t k = 0; k < program->calls; k++) {
                const hs_plan_call *c = &plan->calls[program->first_call + k];
                const hs_plan_ref *dst = &c->ptr[0], *src = &c->ptr[1];
                if (c->kernel == HS_K_FOLD && offset >= src->offset &&
                    offset - src->offset < src->bytes && dst->space == HS_SPACE_STATIC)
                    next = dst->offset + (offset - src->offset);
            }
        }
        if (next == offset) break;
        offset = next;
        tensor = tensor_at(plan, p, offset);
    }
    return tensor;
}

static meaning of_tensor(const hs_plan *plan, uint32_t of) {
    static const char *const what[] = {"weight", "m", "v", "gradient"};
    meaning m = {UINT32_MAX, UINT32_MAX, UINT32_MAX, of / OPERANDS, '-', NULL, NULL};
    if (of % OPERANDS <= HS_ORIGIN_GRADIENT) m.operand = what[of % OPERANDS];
    if (m.tensor >= plan->count[HS_SECTION_TENSORS]) m.tensor = UINT32_MAX;
    return m;
}

static meaning of_call(const hs_plan *plan, uint64_t origin, uint32_t of) {
    static const char passes[] = "FBW-";
    const uint32_t number = of / OPERANDS, o = of % OPERANDS, stage = origin >> 22 & STAGES;
    meaning m = {UINT32_MAX, UINT32_MAX, UINT32_MAX, UINT32_MAX, passes[op_of(origin)], NULL, NULL};
    if (microbatches_of(origin) == ALL) m.pass = '-';
    if (m.pass != '-') m.stage = m.pass == 'F' ? stage : STAGES - stage;
    if (number >= plan->count[HS_SECTION_CALLS]) return m;
    const hs_plan_call *call = &plan->calls[number];
    const hs_kernel_facts *facts = hs_kernel_facts_of(call->kernel);
    if ((int)o >= facts->operand_count) return m;
    m.layer = call->layer;
    m.kernel = facts->name;
    m.operand = facts->operands[o].name;
    const hs_plan_position *p = runs(plan, number);
    const bool adds = facts->operands[o].role == HS_ROLE_UPDATE &&
                      facts->operands[o].kind == HS_KIND_ACC &&
                      call->ptr[o].space == HS_SPACE_STATIC;
    if (p && adds) m.tensor = gradient_at(plan, p, call->ptr[o].offset);
    return m;
}

static meaning meaning_of(const hs_plan *plan, hs_origin x) {
    const uint64_t microbatches = microbatches_of(x.origin);
    const bool sum = op_of(x.origin) == HS_ORIGIN_SUM;
    if (microbatches == OF_STATE || (sum && microbatches == ALL)) return of_tensor(plan, x.of);
    meaning m = {0, UINT32_MAX, UINT32_MAX, UINT32_MAX, '-', NULL, "loss"};
    if (!sum) m = of_call(plan, x.origin, x.of);
    m.microbatch = microbatches == ALL ? UINT32_MAX : (uint32_t)microbatches - 1;
    return m;
}

static void name_of(const hs_plan *plan, uint32_t tensor, char name[160]) {
    const hs_plan_tensor *t = &plan->tensors[tensor];
    const uint32_t length = t->name_length < 159 ? t->name_length : 159;
    memcpy(name, plan->strings + t->name_offset, length);
    name[length] = 0;
}

static void number(hs_text *text, const char *key, uint32_t value) {
    if (value != UINT32_MAX) hs_text_printf(text, ",\"%s\":%" PRIu32, key, value);
}

void hs_origin_fields(const hs_plan *plan, hs_origin x, hs_text *text) {
    if (!x.origin) return;
    const meaning m = meaning_of(plan, x);
    char name[160];
    number(text, "microbatch", m.microbatch);
    number(text, "stage", m.stage);
    if (m.pass != '-') hs_text_printf(text, ",\"pass\":\"%c\"", m.pass);
    number(text, "layer", m.layer);
    if (m.kernel) hs_text_printf(text, ",\"kernel\":\"%s\"", m.kernel);
    if (m.operand) hs_text_printf(text, ",\"operand\":\"%s\"", m.operand);
    if (m.tensor == UINT32_MAX) return;
    name_of(plan, m.tensor, name);
    hs_text_printf(text, ",\"tensor\":");
    hs_text_json_string(text, name);
}

void hs_origin_say(const hs_plan *plan, hs_origin x, hs_text *text) {
    static const char *const passes[] = {"forward", "backward", "gradients of weights"};
    if (!x.origin) return;
    const meaning m = meaning_of(plan, x);
    char name[160];
    hs_text_printf(text, "; the first is in");
    if (m.microbatch != UINT32_MAX) hs_text_printf(text, " microbatch %" PRIu32 ":", m.microbatch);
    if (m.stage != UINT32_MAX)
        hs_text_printf(text, " stage %" PRIu32 ", %s,", m.stage, passes[op_of(x.origin)]);
    if (m.layer != UINT32_MAX) hs_text_printf(text, " layer %" PRIu32 ",", m.layer);
    if (m.operand) hs_text_printf(text, " %s", m.operand);
    if (m.kernel) hs_text_printf(text, " of %s", m.kernel);
    if (m.tensor == UINT32_MAX) return;
    name_of(plan, m.tensor, name);
    hs_text_printf(text, m.kernel ? ", the gradient of %s" : " of %s", name);
}
