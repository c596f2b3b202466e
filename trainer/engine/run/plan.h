/* The plan file of wire/plan.h, read into memory of our own, checked wholly, then only read.
 *
 * The file is copied, not mapped: nobody can change or cut it after the checks. What hs_plan_open
 * accepts holds these invariants, by which the rest of the engine indexes without looking again:
 *
 * I1   header, section table, sizes and digest agree with the bytes; padding is zero
 * I2   every number of the configuration is in its range, and the shards add up to data_samples; a mixture's parts
 *      have them all, a sample at least each, and its weights' bases are what the phases before use
 * I3   names lie in the strings; tensors' names are there and unique; elements = product of the
 *      shape
 * I4   act slots and microbatch areas lie in the arena; tokens, targets and losses lie in a
 *      microbatch area and do not overlap
 * I5   every state tensor is owned exactly once, whole or in as many pieces as there are replicas;
 *      master, m, v, grad lie in STATIC, overlap neither one another nor the act, microbatch, sumsq,
 *      control and logits areas; the slot layout is dense enough to hold no overlap and slot_bytes is
 *      what slot.h says for it
 * I6   every action names a program, channel, slot and microbatch that exist, only where its kind
 *      uses them, and its reference lies in its space; messages have their channel's length; a
 *      channel joins two positions, and its sends at one end are as many as its receives at the
 *      other, in init, load, step and redo apart; one that joins two replicas is used in exchanges
 *      alone (wire/plan.h), whose two messages have one length and share no byte; a stage's actions
 *      are at one position, and a program runs for one stage and operation
 * I7   every call of a program that a position runs has a kernel, operands that lie in that
 *      position's spaces and hold the bytes that the kernel touches, and aligned to their elements
 * I8   what a kernel uses as an index is data that was checked: token and target operands point
 *      into the microbatch's tokens and targets, and the vocabulary of the call is at least the
 *      plan's; the control block that the optimizer reads is the position's, that of ADAMW_COPY and MUON_COPY the one it foresees
 * I9   reports and control blocks have their room; only position 0 combines, merges and decides
 * I10  the spaces share no byte, but PIECE, which names bytes of STATIC. What a call writes overlaps no other operand of it (but
 *      where the kernel may work in place); nothing but DATA writes tokens and targets, nothing but
 *      DECIDE or a control message the control block, nothing but SUMSQ and SUM the squared norms; no
 *      report and no message lies over a state tensor
 * I11  an optimistic step's prefix has forwards and their messages alone, both ends of each, and changes no
 *      state and no gradient; its check has what comes of the reports, and neither of them what is the
 *      other's; all positions' steps are optimistic, or none is
 */
#ifndef HS_RUN_PLAN_H
#define HS_RUN_PLAN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/status.h"
#include "wire/plan.h"

typedef struct hs_plan {
    uint8_t *bytes; /* the file; owned */
    size_t size;
    const hs_plan_header *header;
    const hs_plan_config *config;
    const char *strings;
    const hs_plan_tensor *tensors;
    const hs_plan_shard *shards;
    const hs_plan_position *positions;
    const hs_plan_state *states;
    const hs_plan_program *programs;
    const hs_plan_call *calls;
    const hs_plan_action *actions;
    const hs_plan_channel *channels;
    const hs_plan_part *parts; /* none: no mixture */
    const hs_plan_weight *weights;
    size_t count[HS_SECTION_COUNT]; /* records of each section */
} hs_plan;

/* Reads and checks. HS_E_CONFIG with the first failure named (file, section, record, value, limit),
 * or HS_E_MEMORY. On failure *plan is zero. */
hs_status hs_plan_open(const char *path, hs_plan *plan, hs_why *why);
/* The same on bytes in memory, which the plan takes over (malloc'ed) also on failure. */
hs_status hs_plan_adopt(uint8_t *bytes, size_t size, const char *name, hs_plan *plan, hs_why *why);
/* Safe on a zeroed plan. */
void hs_plan_close(hs_plan *plan);

/* rank = replica x positions + position: which position a process fills, and in which replica of the
 * pipeline. */
static inline uint32_t hs_plan_position_of(const hs_plan *plan, uint32_t rank) {
    return rank % plan->config->positions;
}
static inline uint32_t hs_plan_replica_of(const hs_plan *plan, uint32_t rank) {
    return rank / plan->config->positions;
}

/* The lists of actions of a position. */
typedef enum hs_list { HS_LIST_INIT, HS_LIST_LOAD, HS_LIST_STEP, HS_LIST_REDO, HS_LISTS } hs_list;

/* Of the plan's actions: those of a list. */
typedef struct hs_plan_range {
    uint32_t first, count;
} hs_plan_range;

static inline hs_plan_range hs_plan_list(const hs_plan_position *p, hs_list list) {
    const hs_plan_range lists[HS_LISTS] = {{p->first_init, p->inits},
                                           {p->first_load, p->loads},
                                           {p->first_step, p->steps},
                                           {p->first_redo, p->redos}};
    return lists[list];
}

static inline bool hs_plan_is_message(const hs_plan_action *action) {
    return action->kind == HS_A_SEND || action->kind == HS_A_RECV;
}

/* The reference as a replica has it: a PIECE is the STATIC bytes that it means there. */
static inline hs_plan_ref hs_plan_resolve(const hs_plan_ref *ref, uint32_t replica) {
    hs_plan_ref here = *ref;
    if (ref->space != HS_SPACE_PIECE) return here;
    here.space = HS_SPACE_STATIC;
    here.offset += (replica ^ ref->across) * ref->bytes;
    here.across = 0;
    return here;
}

/* Elements that a replica keeps of a tensor, with those that pad them. */
static inline uint64_t hs_plan_kept(const hs_plan *plan, const hs_plan_state *state) {
    return hs_piece_elements((uint64_t)plan->tensors[state->tensor].elements, state->pieces);
}
/* Those of them that the tensor has: `count` of them, which may be 0, from `first` on in the tensor, and
 * so in the buffer of its gradient. */
typedef struct hs_plan_share {
    uint64_t first, count;
} hs_plan_share;

static inline hs_plan_share hs_plan_share_of(const hs_plan *plan, const hs_plan_state *state,
                                             uint32_t replica) {
    const uint64_t elements = (uint64_t)plan->tensors[state->tensor].elements;
    const uint64_t kept = hs_plan_kept(plan, state),
                   first = state->pieces == 1 ? 0 : replica * kept;
    const uint64_t left = first < elements ? elements - first : 0;
    return (hs_plan_share){.first = first, .count = left < kept ? left : kept};
}

/* Where the control block lies that a position foresees; UINT64_MAX: it foresees none. */
static inline uint64_t hs_plan_foreseen(const hs_plan_position *position) {
    return position->step_checks && position->control_offset != UINT64_MAX
               ? position->control_offset + HS_PLAN_FORESEEN
               : UINT64_MAX;
}

/* Rows of a microbatch, B*T. */
static inline int64_t hs_plan_rows(const hs_plan *plan) {
    return (int64_t)plan->config->microbatch * plan->config->sequence;
}

/* Bytes of a slot before its data: header and checksums (slot.h). */
uint64_t hs_plan_slot_data_offset(uint64_t data_bytes);

/* Bytes of one position's report: hs_step_report, then f64 sumsq[tensors]. */
static inline uint64_t hs_plan_report_bytes(const hs_plan *plan) {
    return sizeof(hs_step_report) + 8u * (uint64_t)plan->count[HS_SECTION_TENSORS];
}

/* "2F0", "SEND_F3", "optimizer": what a trace, a log line or last words call an action. At most 39
 * characters. */
void hs_plan_action_name(const hs_plan *plan, const hs_plan_action *action, char name[40]);

#endif
