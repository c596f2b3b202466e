/* I7 and I8 of run/plan.h: calls against the table of kernels (wire/kernels.h). */

#include <inttypes.h>
#include <string.h>

#include "kernels/kernels.h"
#include "run/plan/plan_internal.h"

static bool is_finite(double x) {
    return x - x == 0.0;
}

/* An operand that is an index or the control block is the one that was checked. */
static hs_status check_known(hs_plan_checker *c, const hs_plan_position *p,
                             const hs_plan_call *call, size_t i, int o) {
    const hs_kernel_facts *facts = hs_kernel_facts_of(call->kernel);
    const hs_operand *operand = &facts->operands[o];
    const hs_plan_ref *ref = &call->ptr[o];
    if (operand->kind == HS_KIND_CONTROL) {
        const bool either = call->kernel == HS_K_MUON_MOMENTUM; /* it changes no state */
        const bool ahead = call->kernel == HS_K_ADAMW_COPY || call->kernel == HS_K_MUON_COPY;
        if (ref->space == HS_SPACE_STATIC && ref->offset != UINT64_MAX &&
            (((either || ahead) && ref->offset == hs_plan_foreseen(p)) ||
             (!ahead && ref->offset == p->control_offset)))
            return HS_OK;
        return REFUSE(c,
                      "call %zu (%s) at position %" PRIu32 ": operand %s is not its control block",
                      i, facts->name, p->position, operand->name);
    }
    if (operand->kind != HS_KIND_TOKENS && operand->kind != HS_KIND_TARGETS) return HS_OK;
    const bool targets = operand->kind == HS_KIND_TARGETS;
    const uint64_t at = targets ? p->targets_offset : p->tokens_offset;
    const uint64_t bytes = (uint64_t)hs_plan_rows(c->plan) * 4;
    if (ref->space != HS_SPACE_MB || at == UINT64_MAX || ref->offset < at ||
        !hs_plan_inside(ref->offset - at, ref->bytes, bytes)) {
        return REFUSE(c,
                      "call %zu (%s) at position %" PRIu32 ": operand %s is not this position's %s",
                      i, facts->name, p->position, operand->name, targets ? "targets" : "tokens");
    }
    const int64_t below = hs_kernel_dim(facts, call->dim, operand->below);
    if (below < (int64_t)c->plan->config->vocab) {
        return REFUSE(c, "call %zu (%s): a vocabulary of %" PRId64 ", the plan's is %" PRIu32, i,
                      facts->name, below, c->plan->config->vocab);
    }
    return HS_OK;
}

/* Whether operand o may be absent, as the one that it goes with is. */
static bool goes_with(const hs_kernel_facts *facts, const hs_plan_call *call, int o) {
    const char *other = facts->operands[o].with;
    for (int i = 0; other && i < facts->operand_count; i++)
        if (strcmp(facts->operands[i].name, other) == 0) return call->ptr[i].space == HS_SPACE_NONE;
    return false;
}

/* I7: one call for one position; adds HS_PLAN_USES_* to *uses. */
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
            if (ref->offset || ref->bytes || ref->across) {
                return REFUSE(c, "call %zu (%s): absent operand %d is not zero", i, kernel, o);
            }
            if (used && !facts->operands[o].optional && !goes_with(facts, call, o)) {
                return REFUSE(c, "call %zu (%s): operand %d is missing", i, kernel, o);
            }
            continue;
        }
        if (!used) return REFUSE(c, "call %zu (%s): an operand %d, it takes none", i, kernel, o);
        HS_TRY(hs_plan_check_ref(c, p, ref, "call", i));
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
        const uint64_t stride = ref->space == HS_SPACE_PIECE ? ref->bytes : 0;
        if ((ref->offset | stride) % hs_operand_alignment(&facts->operands[o], call->dtype)) {
            return REFUSE(c,
                          "call %zu (%s): operand %d at %" PRIu64 " is not aligned to its elements",
                          i, kernel, o, ref->offset);
        }
        if (ref->space == HS_SPACE_ACT) *uses |= HS_PLAN_USES_ACT;
        if (ref->space == HS_SPACE_MB) *uses |= HS_PLAN_USES_MB;
        HS_TRY(check_known(c, p, call, i, o));
    }
    return hs_plan_check_call_writes(c, p, i);
}

hs_status hs_plan_check_program(hs_plan_checker *c, const hs_plan_position *p, uint32_t program) {
    if (c->program_uses[program]) return HS_OK;
    const hs_plan_program *g = &c->plan->programs[program];
    uint8_t uses = 1;
    for (uint32_t i = 0; i < g->calls; i++)
        HS_TRY(check_call(c, p, (size_t)g->first_call + i, &uses));
    c->program_uses[program] = uses;
    return HS_OK;
}
