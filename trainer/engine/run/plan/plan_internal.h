/* What the files of the plan's loader share. A plan is checked room by room, in this order, and each
 * may rely on what the ones before it accepted:
 *
 *   file.c     I1       bytes, header, digest, sections: after it, the plan's tables are there
 *   tables.c   I2 I3    configuration and shards, tensors and their names
 *   memory.c   I4 I5    areas of each arena, states in it and in a slot; a reference and its space
 *   lists.c    I6 I9    programs, channels, and each position's actions in order
 *   calls.c    I7 I8    the calls of a program, when a position's list first runs it
 *   optimistic.c I11    the parts of a step that begins before the one before is checked
 *   writes.c   I10      what a call or an action writes, right after it was found to hold
 *
 * open.c calls them. Every refusal goes through hs_plan_refuse and names the record, the value and
 * the limit.
 */
#ifndef HS_RUN_PLAN_INTERNAL_H
#define HS_RUN_PLAN_INTERNAL_H

#include <stdbool.h>

#include "run/plan.h"

#define HS_PLAN_ARENA_MAX                                                                          \
    (UINT64_C(1) << 46) /* bytes of an arena, and so of whatever lies in one */

enum { HS_PLAN_STAGES = 65536 }; /* most of a plan */

/* Of which messages are counted: the lists, and of the step's its prefix by itself. */
enum { HS_PLAN_PREFIX = HS_LISTS, HS_PLAN_COUNTED };
/* What a program may use beside STATIC. */
enum { HS_PLAN_USES_ACT = 2, HS_PLAN_USES_MB = 4 };

/* Working state of the checks; `why` gets the first failure. */
typedef struct hs_plan_checker {
    hs_plan *plan;
    const char *file;
    hs_why *why;
    /* by program, for the position being checked: 0 unseen, else 1 | HS_PLAN_USES_* */
    uint8_t *program_uses;
    uint64_t *sends, *recvs; /* by channel, HS_PLAN_COUNTED of each */
    uint32_t *stage_at;      /* by stage below HS_PLAN_STAGES: 1 + its position; 0: not seen */
    uint32_t *run_for;       /* by program: 1 + 128 stage + op that it runs for; 0: not seen */
    uint64_t own_report;     /* where the position being checked combines; UINT64_MAX: not yet */
} hs_plan_checker;

#define REFUSE(c, ...) hs_plan_refuse((c), __VA_ARGS__)

/* HS_E_CONFIG, with the file and the mend around the reason. */
__attribute__((format(printf, 2, 3))) hs_status hs_plan_refuse(const hs_plan_checker *c,
                                                               const char *format, ...);

static inline bool hs_plan_inside(uint64_t offset, uint64_t bytes, uint64_t limit) {
    return offset <= limit && bytes <= limit - offset;
}

static inline bool hs_plan_is_zero(const uint8_t *bytes, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (bytes[i]) return false;
    }
    return true;
}

/* --- file.c --- */

/* The whole file, in memory that the caller frees. */
hs_status hs_plan_read(const char *path, uint8_t **bytes, size_t *size, hs_why *why);
/* I1; sets header, tables and counts of the plan. */
hs_status hs_plan_check_file(hs_plan_checker *c);
const char *hs_plan_section_name(int section);

/* --- tables.c --- */

/* I2 */
hs_status hs_plan_check_config(hs_plan_checker *c);
/* I3, for tensors. */
hs_status hs_plan_check_tensors(hs_plan_checker *c);
/* I3, for the name of whatever `what` and `i` name. */
hs_status hs_plan_check_name(hs_plan_checker *c, const char *what, size_t i, uint32_t offset,
                             uint32_t length);

/* --- memory.c --- */

/* I4 */
hs_status hs_plan_check_positions(hs_plan_checker *c);
/* I5 */
hs_status hs_plan_check_states(hs_plan_checker *c);
/* Bytes from the reference's offset on that it means in one replica or another: all of its pieces. */
static inline uint64_t hs_plan_span(const hs_plan *plan, const hs_plan_ref *ref) {
    return ref->space == HS_SPACE_PIECE ? ref->bytes * plan->config->replicas : ref->bytes;
}
/* Bytes that a reference into a space (HS_SPACE_*) may reach; 0: the position has no such space. */
uint64_t hs_plan_space_bytes(const hs_plan_position *p, uint32_t space);
/* That a reference names a space and lies in it (and I10: in no other). `what` and `i` name it. */
hs_status hs_plan_check_ref(const hs_plan_checker *c, const hs_plan_position *p,
                            const hs_plan_ref *ref, const char *what, size_t i);

/* --- lists.c --- */

/* I6, I9, and through the two below I7, I8 and I10. */
hs_status hs_plan_check_lists(hs_plan_checker *c);

/* --- optimistic.c --- */

/* I11, for a position whose actions were all accepted. */
hs_status hs_plan_check_parts(hs_plan_checker *c, const hs_plan_position *p);

/* --- calls.c --- */

/* I7 and I8 for a program on a position. Sets its program_uses; returns at once where it is set. */
hs_status hs_plan_check_program(hs_plan_checker *c, const hs_plan_position *p, uint32_t program);

/* --- writes.c --- */

/* I4: tokens, targets and losses of a microbatch do not overlap. */
hs_status hs_plan_check_rows_apart(const hs_plan_checker *c, const hs_plan_position *p);
/* I10, for a reference that lies in its space: one of STATIC or PIECE keeps out of ACT and MB. */
hs_status hs_plan_check_apart(const hs_plan_checker *c, const hs_plan_position *p,
                              const hs_plan_ref *ref, const char *what, size_t i);
/* I10, for call i, whose operands hold their extents. */
hs_status hs_plan_check_call_writes(const hs_plan_checker *c, const hs_plan_position *p, size_t i);
/* I10, for action i, whose reference lies in its space. */
hs_status hs_plan_check_action_writes(const hs_plan_checker *c, const hs_plan_position *p,
                                      size_t i);
/* The first call of a program, whose calls hold, that writes a master weight, a moment or a gradient. */
const hs_plan_call *hs_plan_writes_state(const hs_plan *plan, const hs_plan_position *p,
                                         uint32_t program);

#endif
