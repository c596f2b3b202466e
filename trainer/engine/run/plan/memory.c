/* I4 and I5 of run/plan.h: the areas of a position's arena, the states in it and in a slot, and
 * references into its spaces. */

#include <inttypes.h>
#include <stdlib.h>

#include "run/plan/plan_internal.h"
#include "wire/slot.h"

static uint64_t up64(uint64_t n) {
    return (n + 63) & ~UINT64_C(63);
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
                      p->position, what, offset, bytes, p->mb_stride);
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
                      p->position, what, offset, bytes, p->arena_bytes);
    }
    return HS_OK;
}

static hs_status check_range(hs_plan_checker *c, const hs_plan_position *p, const char *what,
                             uint32_t first, uint32_t count, int section) {
    if (!hs_plan_inside(first, count, c->plan->count[section])) {
        return REFUSE(c,
                      "position %" PRIu32 ": %s %" PRIu32 "+%" PRIu32 " pass the %zu records of %s",
                      p->position, what, first, count, c->plan->count[section],
                      hs_plan_section_name(section));
    }
    return HS_OK;
}

/* I4 */
static hs_status check_position(hs_plan_checker *c, uint32_t index) {
    const hs_plan *plan = c->plan;
    const hs_plan_position *p = &plan->positions[index];
    if (p->position != index)
        return REFUSE(c, "position %" PRIu32 ": it says %" PRIu32, index, p->position);
    if (p->arena_bytes < 64 || p->arena_bytes > HS_PLAN_ARENA_MAX) {
        return REFUSE(c,
                      "position %" PRIu32 ": an arena of %" PRIu64 " bytes, outside 64..%" PRIu64,
                      index, p->arena_bytes, HS_PLAN_ARENA_MAX);
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
            areas[i].stride > HS_PLAN_ARENA_MAX / areas[i].count ||
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
    HS_TRY(check_range(c, p, "redo actions", p->first_redo, p->redos, HS_SECTION_ACTIONS));
    if (p->reserved0) return REFUSE(c, "position %" PRIu32 ": reserved is not 0", index);
    if (p->step_checks && p->control_offset == UINT64_MAX)
        return REFUSE(c, "position %" PRIu32 ": an optimistic step without a control block", index);
    HS_TRY(
        check_static_area(c, p, "foreseen control", hs_plan_foreseen(p), sizeof(hs_step_control)));
    if (p->step_prefix > p->steps || p->step_checks > p->steps - p->step_prefix) {
        return REFUSE(c,
                      "position %" PRIu32 ": a prefix of %" PRIu32 " and a check of %" PRIu32
                      " of %" PRIu32 " step actions",
                      index, p->step_prefix, p->step_checks, p->steps);
    }
    if (plan->config->mode == HS_MODE_INFER &&
        (p->tokens_offset == UINT64_MAX ||
         (p->logits_offset == UINT64_MAX) == (p->loss_offset == UINT64_MAX))) {
        return REFUSE(c,
                      "position %" PRIu32 ": inference without tokens, or not with one of logits "
                      "and losses",
                      index);
    }
    return HS_OK;
}

hs_status hs_plan_check_positions(hs_plan_checker *c) {
    for (uint32_t p = 0; p < c->plan->config->positions; p++) HS_TRY(check_position(c, p));
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
    add_area(areas, &n, hs_plan_foreseen(p), sizeof(hs_step_control), UINT32_MAX);
    add_area(areas, &n, p->logits_offset, 4u * (uint64_t)hs_plan_rows(plan) * plan->config->vocab,
             UINT32_MAX);
    for (uint32_t i = 0; i < p->states; i++) {
        const hs_plan_state *s = &plan->states[p->first_state + i];
        if (s->tensor >= plan->count[HS_SECTION_TENSORS]) {
            return REFUSE(c, "state %" PRIu32 ": tensor %" PRIu32 " of %zu", p->first_state + i,
                          s->tensor, plan->count[HS_SECTION_TENSORS]);
        }
        if (s->pieces != 1 && (s->pieces != plan->config->replicas || s->pieces == 0 ||
                               plan->tensors[s->tensor].elements <= HS_PIECE_BLOCK)) {
            return REFUSE(c,
                          "tensor %" PRIu32 " of %" PRId64 " elements in %" PRIu32
                          " pieces of %" PRIu32 " replicas; 1, or of more than %d elements as many",
                          s->tensor, plan->tensors[s->tensor].elements, s->pieces,
                          plan->config->replicas, HS_PIECE_BLOCK);
        }
        if (owners[s->tensor]) {
            return REFUSE(c, "tensor %" PRIu32 " is owned by positions %" PRIu32 " and %" PRIu32,
                          s->tensor, owners[s->tensor] - 1, p->position);
        }
        owners[s->tensor] = p->position + 1;
        const uint64_t kept = hs_plan_kept(plan, s) * 4;
        const uint64_t offsets[4] = {s->master_offset, s->m_offset, s->v_offset, s->grad_offset};
        for (int k = 0; k < 4; k++) {
            const uint64_t bytes = k < 3 ? kept : kept * s->pieces;
            if (!train && k > 0)
                break; /* inference keeps the masters alone; the others are not looked at */
            if (k == 2 && hs_state_kinds(s) < 3) continue;
            if (offsets[k] % 64 || !hs_plan_inside(offsets[k], bytes, p->arena_bytes)) {
                return REFUSE(c,
                              "tensor %" PRIu32 " at position %" PRIu32 ": %" PRIu64 "+%" PRIu64
                              " passes the arena of %" PRIu64 " bytes, or is not a multiple of 64",
                              s->tensor, p->position, offsets[k], bytes, p->arena_bytes);
            }
            add_area(areas, &n, offsets[k], bytes, s->tensor);
        }
        if (!train) continue;
        if (s->slot_offset % 64 || s->slot_offset < slot_end ||
            s->slot_offset > HS_PLAN_ARENA_MAX) {
            return REFUSE(c,
                          "tensor %" PRIu32 ": slot_offset %" PRIu64
                          ", the tensor before ends at %" PRIu64,
                          s->tensor, s->slot_offset, slot_end);
        }
        slot_end = s->slot_offset + hs_state_kinds(s) * up64(kept);
    }
    qsort(areas, n, sizeof *areas, compare_areas);
    for (size_t i = 1; i < n; i++) {
        if (areas[i].from < areas[i - 1].to) {
            return REFUSE(c,
                          "position %" PRIu32 ": areas at %" PRIu64 " (tensor %" PRId32
                          ") and %" PRIu64 " (tensor %" PRId32 ") overlap",
                          p->position, areas[i - 1].from, (int32_t)areas[i - 1].tensor,
                          areas[i].from, (int32_t)areas[i].tensor);
        }
    }
    if (train) {
        const uint64_t least = hs_plan_slot_data_offset(slot_end) + slot_end;
        if (p->slot_bytes < least || p->slot_bytes > least + 4095) {
            return REFUSE(c,
                          "position %" PRIu32 ": slot_bytes %" PRIu64 ", its states take %" PRIu64,
                          p->position, p->slot_bytes, least);
        }
    }
    return HS_OK;
}

hs_status hs_plan_check_states(hs_plan_checker *c) {
    const hs_plan *plan = c->plan;
    const size_t n = plan->count[HS_SECTION_TENSORS];
    uint32_t *owners = calloc(n, sizeof *owners);
    /* a position may own each tensor once, before a second owner is refused: 4 areas a tensor and 5
     * of its own */
    area *areas = calloc(4 * n + 6, sizeof *areas);
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

uint64_t hs_plan_space_bytes(const hs_plan_position *p, uint32_t space) {
    switch (space) {
    case HS_SPACE_STATIC:
    case HS_SPACE_PIECE:
        return p->arena_bytes;
    case HS_SPACE_ACT:
        return p->act_slots ? p->act_stride : 0;
    case HS_SPACE_MB:
        return p->mb_count ? p->mb_stride : 0;
    default:
        return 0;
    }
}

hs_status hs_plan_check_ref(const hs_plan_checker *c, const hs_plan_position *p,
                            const hs_plan_ref *ref, const char *what, size_t i) {
    if (ref->space == HS_SPACE_NONE || ref->space > HS_SPACE_PIECE) {
        return REFUSE(c, "%s %zu: no space %" PRIu32, what, i, ref->space);
    }
    const uint32_t replicas = ref->space == HS_SPACE_PIECE ? c->plan->config->replicas : 1;
    if (ref->across >= replicas) {
        return REFUSE(
            c, "%s %zu: a reference across %" PRIu32 " of %" PRIu32 " replicas, in space %" PRIu32,
            what, i, ref->across, replicas, ref->space);
    }
    if (ref->bytes > HS_PLAN_ARENA_MAX) {
        return REFUSE(c, "%s %zu: a reference of %" PRIu64 " bytes", what, i, ref->bytes);
    }
    const uint64_t limit = hs_plan_space_bytes(p, ref->space);
    if (!hs_plan_inside(ref->offset, hs_plan_span(c->plan, ref), limit)) {
        return REFUSE(c,
                      "%s %zu at position %" PRIu32 ": reference %" PRIu64 "+%" PRIu64
                      " passes its space (%" PRIu32 ") of %" PRIu64 " bytes",
                      what, i, p->position, ref->offset, hs_plan_span(c->plan, ref), ref->space,
                      limit);
    }
    return hs_plan_check_apart(c, p, ref, what, i);
}

uint64_t hs_plan_slot_data_offset(uint64_t data_bytes) {
    const uint64_t chunks = (data_bytes + HS_SLOT_CHUNK - 1) / HS_SLOT_CHUNK;
    return HS_SLOT_HEADER_BYTES + ((8 * chunks + 4095) & ~UINT64_C(4095));
}
