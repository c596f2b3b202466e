#include "run/touches.h"

#include <stdlib.h>

#include "kernels/kernels.h"

/* Bytes [begin, end) of HS_SPACE_*, there in each slot or microbatch. In a list: ascending, apart. */
typedef struct range {
    uint32_t space, instances, first_cell;
    uint64_t begin, end;
} range;

struct hs_touches {
    hs_touches_config c;
    range *ranges, *states;
    uint32_t range_count, state_count, cells;
    uint8_t *program;              /* [program][range]: HS_TOUCH_* */
    uint8_t *seen;                 /* [program]: 1, scanned; 2, it changes a state too */
    uint8_t *of_state;             /* [range]: it shares bytes with a state */
    const hs_plan_action *combine; /* where position 0's report lies; NULL: none here */
};

/* --- ranges ------------------------------------------------------------------------------ */

static int by_place(const void *a, const void *b) {
    const range *x = a, *y = b;
    if (x->space != y->space) return x->space < y->space ? -1 : 1;
    return x->begin < y->begin ? -1 : x->begin > y->begin;
}

static void add(range *list, uint32_t *count, uint32_t space, uint64_t begin, uint64_t bytes) {
    if (begin != UINT64_MAX && bytes)
        list[(*count)++] = (range){.space = space, .begin = begin, .end = begin + bytes};
}

/* Sorted; what overlaps becomes one. */
static void merge(range *list, uint32_t *count) {
    uint32_t kept = 0;
    qsort(list, *count, sizeof *list, by_place);
    for (uint32_t i = 0; i < *count; i++) {
        range *last = kept ? &list[kept - 1] : NULL;
        if (last && last->space == list[i].space && list[i].begin < last->end) {
            if (list[i].end > last->end) last->end = list[i].end;
        } else {
            list[kept++] = list[i];
        }
    }
    *count = kept;
}

/* The first range of the space that ends after `at`; the next ones follow it. */
static uint32_t find(const range *list, uint32_t count, uint32_t space, uint64_t at) {
    uint32_t low = 0, high = count;
    while (low < high) {
        const uint32_t middle = low + (high - low) / 2;
        const range *r = &list[middle];
        if (r->space > space || (r->space == space && r->end > at))
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

static bool meets(const range *list, uint32_t count, uint32_t i, uint32_t space, uint64_t end) {
    return i < count && list[i].space == space && list[i].begin < end;
}

/* The host reads or writes a control block. */
static bool is_control(const hs_plan_action *a) {
    return a->kind == HS_A_APPLY || a->kind == HS_A_CHECK || a->kind == HS_A_FORESEE;
}

static void list_ranges(hs_touches *t) {
    const hs_plan *plan = t->c.plan;
    const hs_plan_position *p = t->c.position;
    const uint64_t rows = 4 * (uint64_t)hs_plan_rows(plan);
    uint32_t *n = &t->range_count;
    add(t->ranges, n, HS_SPACE_MB, p->tokens_offset, rows);
    add(t->ranges, n, HS_SPACE_MB, p->targets_offset, rows);
    add(t->ranges, n, HS_SPACE_MB, p->loss_offset, rows);
    add(t->ranges, n, HS_SPACE_STATIC, p->sumsq_offset, 8 * plan->count[HS_SECTION_TENSORS]);
    add(t->ranges, n, HS_SPACE_STATIC, p->control_offset, sizeof(hs_step_control));
    for (uint32_t i = 0; i < t->c.count; i++) {
        const hs_plan_action *a = &plan->actions[t->c.first + i];
        const hs_plan_ref ref = hs_plan_resolve(&a->ref, t->c.replica);
        if (a->kind == HS_A_COMBINE) t->combine = a;
        if (is_control(a) || hs_plan_is_message(a))
            add(t->ranges, n, ref.space, ref.offset, ref.bytes);
    }
    merge(t->ranges, n);
    for (uint32_t i = 0; i < p->states; i++) {
        const hs_plan_state *s = &plan->states[p->first_state + i];
        const uint64_t bytes = 4 * hs_plan_kept(plan, s);
        add(t->states, &t->state_count, HS_SPACE_STATIC, s->master_offset, bytes);
        add(t->states, &t->state_count, HS_SPACE_STATIC, s->m_offset, bytes);
        add(t->states, &t->state_count, HS_SPACE_STATIC, s->v_offset, bytes);
    }
    merge(t->states, &t->state_count);
}

static void place_cells(hs_touches *t) {
    const hs_plan_position *p = t->c.position;
    for (uint32_t r = 0; r < t->range_count; r++) {
        range *x = &t->ranges[r];
        x->instances = x->space == HS_SPACE_MB    ? p->mb_count
                       : x->space == HS_SPACE_ACT ? p->act_slots
                                                  : 1;
        x->first_cell = t->cells;
        t->cells += x->instances;
        const uint32_t s = find(t->states, t->state_count, x->space, x->begin);
        t->of_state[r] = meets(t->states, t->state_count, s, x->space, x->end);
    }
}

hs_plan_ref hs_touched_by(const hs_plan_call *call, int operand, uint32_t replica, int *how) {
    const hs_role role = hs_kernel_facts_of(call->kernel)->operands[operand].role;
    hs_plan_ref ref = hs_plan_resolve(&call->ptr[operand], replica);
    *how = (role == HS_ROLE_READ || role == HS_ROLE_UPDATE ? HS_TOUCH_READS : 0) |
           (role != HS_ROLE_READ ? HS_TOUCH_WRITES : 0);
    if (ref.space != HS_SPACE_NONE)
        (void)hs_kernel_extent(call->kernel, call->dtype, call->dim, operand, &ref.bytes);
    return ref;
}

/* What a program touches, over all of its calls. */
static void scan_program(hs_touches *t, uint32_t number) {
    const hs_plan *plan = t->c.plan;
    const hs_plan_program *program = &plan->programs[number];
    uint8_t *touched = t->program + (size_t)number * t->range_count;
    if (t->seen[number]) return;
    t->seen[number] = 1;
    for (uint32_t k = 0; k < program->calls; k++) {
        const hs_plan_call *call = &plan->calls[program->first_call + k];
        const hs_kernel_facts *facts = hs_kernel_facts_of(call->kernel);
        for (int o = 0; o < facts->operand_count; o++) {
            int how;
            const hs_plan_ref ref = hs_touched_by(call, o, t->c.replica, &how);
            if (ref.space == HS_SPACE_NONE) continue;
            const uint64_t end = ref.offset + ref.bytes;
            uint32_t i = find(t->ranges, t->range_count, ref.space, ref.offset);
            for (; meets(t->ranges, t->range_count, i, ref.space, end); i++)
                touched[i] |= (uint8_t)how;
            i = find(t->states, t->state_count, ref.space, ref.offset);
            if ((how & HS_TOUCH_WRITES) && meets(t->states, t->state_count, i, ref.space, end))
                t->seen[number] |= 2;
        }
    }
}

/* --- touching ---------------------------------------------------------------------------- */

typedef struct visit {
    const hs_touches *t;
    hs_touch_fn *fn;
    void *ctx;
} visit;

static void touch(const visit *v, uint32_t r, uint32_t instance, int how) {
    const range *x = &v->t->ranges[r];
    v->fn(v->ctx, x->first_cell + (x->instances > 1 ? instance : 0), how);
}

static void touch_all(const visit *v, uint32_t space, uint64_t offset, uint64_t bytes,
                      uint32_t instance, int how) {
    if (offset == UINT64_MAX) return;
    uint32_t i = find(v->t->ranges, v->t->range_count, space, offset);
    for (; meets(v->t->ranges, v->t->range_count, i, space, offset + bytes); i++)
        touch(v, i, instance, how);
}

static void touch_ref(const visit *v, const hs_plan_action *a, int how) {
    const hs_plan_ref ref = hs_plan_resolve(&a->ref, v->t->c.replica);
    touch_all(v, ref.space, ref.offset, ref.bytes,
              ref.space == HS_SPACE_MB ? a->microbatch : a->slot, how);
}

static void touch_program(const visit *v, const hs_plan_action *a) {
    const uint8_t *touched = v->t->program + (size_t)a->program * v->t->range_count;
    for (uint32_t r = 0; r < v->t->range_count; r++)
        if (touched[r])
            touch(v, r, v->t->ranges[r].space == HS_SPACE_MB ? a->microbatch : a->slot, touched[r]);
}

static void touch_states(const visit *v) {
    for (uint32_t r = 0; r < v->t->range_count; r++)
        if (v->t->of_state[r]) touch(v, r, 0, HS_TOUCH_READS);
}

static void touch_everything(const visit *v) {
    for (uint32_t cell = 0; cell < v->t->cells; cell++)
        v->fn(v->ctx, cell, HS_TOUCH_READS | HS_TOUCH_WRITES);
}

void hs_touches_each(const hs_touches *t, const hs_plan_action *a, hs_touch_fn *fn, void *ctx) {
    const visit v = {.t = t, .fn = fn, .ctx = ctx};
    const hs_plan_position *p = t->c.position;
    const uint64_t rows = 4 * (uint64_t)hs_plan_rows(t->c.plan);
    const int both = HS_TOUCH_READS | HS_TOUCH_WRITES;
    switch (a->kind) {
    case HS_A_RUN:
        touch_program(&v, a);
        break;
    case HS_A_SEND:
        touch_ref(&v, a, HS_TOUCH_READS);
        break;
    case HS_A_RECV:
        touch_ref(&v, a, HS_TOUCH_WRITES);
        break;
    case HS_A_FORESEE:
        touch_ref(&v, a, HS_TOUCH_WRITES);
        break;
    case HS_A_APPLY:
    case HS_A_CHECK:
        touch_ref(&v, a, t->c.unified ? HS_TOUCH_READS : HS_TOUCH_WRITES);
        break;
    case HS_A_DATA:
        for (uint32_t m = 0; m < p->mb_count; m++) {
            touch_all(&v, HS_SPACE_MB, p->tokens_offset, rows, m, HS_TOUCH_WRITES);
            touch_all(&v, HS_SPACE_MB, p->targets_offset, rows, m, HS_TOUCH_WRITES);
        }
        break;
    case HS_A_REPORT:
        for (uint32_t m = 0; m < p->mb_count; m++)
            touch_all(&v, HS_SPACE_MB, p->loss_offset, rows, m, HS_TOUCH_READS);
        touch_all(&v, HS_SPACE_STATIC, p->sumsq_offset, 8 * t->c.plan->count[HS_SECTION_TENSORS], 0,
                  HS_TOUCH_READS);
        touch_ref(&v, a, HS_TOUCH_WRITES);
        break;
    case HS_A_COMBINE:
        touch_ref(&v, a, both);
        break;
    case HS_A_MERGE:
        touch_ref(&v, a, HS_TOUCH_READS);
        if (t->combine) touch_ref(&v, t->combine, both);
        break;
    case HS_A_DECIDE:
        touch_ref(&v, a, HS_TOUCH_READS);
        touch_all(&v, HS_SPACE_STATIC, p->control_offset, sizeof(hs_step_control), 0,
                  HS_TOUCH_WRITES);
        break;
    case HS_A_SNAPSHOT:
        touch_states(&v);
        break;
    default:
        touch_everything(&v);
    }
}

uint32_t hs_touches_cells(const hs_touches *t) {
    return t->cells;
}

bool hs_touches_state(const hs_touches *t, uint32_t program) {
    return t->seen[program] & 2;
}

hs_status hs_touches_create(const hs_touches_config *config, hs_touches **out, hs_why *why) {
    *out = NULL;
    const size_t count = config->count, programs = config->plan->count[HS_SECTION_PROGRAMS];
    hs_touches *t = calloc(1, sizeof *t);
    if (!t) goto no_memory;
    t->c = *config;
    t->ranges = calloc(count + 5, sizeof *t->ranges);
    t->of_state = calloc(count + 5, sizeof *t->of_state);
    t->states = calloc(3 * (size_t)config->position->states + 1, sizeof *t->states);
    t->seen = calloc(programs + 1, sizeof *t->seen);
    if (!t->ranges || !t->of_state || !t->states || !t->seen) goto no_memory;
    list_ranges(t);
    place_cells(t);
    t->program = calloc(programs * t->range_count + 1, sizeof *t->program);
    if (!t->program) goto no_memory;
    for (uint32_t i = 0; i < config->count; i++) {
        const hs_plan_action *a = &config->plan->actions[config->first + i];
        if (a->kind == HS_A_RUN) scan_program(t, a->program);
    }
    *out = t;
    return HS_OK;

no_memory:
    hs_touches_destroy(t);
    return hs_fail(why, HS_E_MEMORY, "no memory for what a list of %zu actions touches", count);
}

void hs_touches_destroy(hs_touches *t) {
    if (!t) return;
    free(t->ranges);
    free(t->of_state);
    free(t->states);
    free(t->seen);
    free(t->program);
    free(t);
}
