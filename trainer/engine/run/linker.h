/* From a checked plan to code and addresses: each call of the programs that a position runs, with
 * its kernel's function and its STATIC operands resolved once, at start-up. ACT and MB operands get
 * their base added when the call runs, because they depend on the action's slot and microbatch.
 *
 * The plan has been checked (run/plan.h, I1-I9), so nothing here can point outside the arena. One
 * thread. */
#ifndef HS_RUN_LINKER_H
#define HS_RUN_LINKER_H

#include <stdint.h>

#include "core/arena.h"
#include "core/status.h"
#include "kernels/kernels.h"
#include "run/plan.h"

typedef struct hs_linked hs_linked;

/* plan, position and kernels must outlive the result; the arena holds position->arena_bytes.
 * HS_E_MEMORY. */
hs_status hs_link(const hs_plan *plan, const hs_plan_position *position, const hs_arena *arena,
                  const hs_kernel_set *kernels, hs_linked **out, hs_why *why);
void hs_linked_destroy(hs_linked *linked); /* NULL is fine */

/* Runs a program's calls in order. slot and microbatch as in the action (UINT32_MAX: none). A
 * kernel that fails is named in why. Allocates nothing. */
hs_status hs_linked_run(const hs_linked *linked, uint32_t program, uint32_t slot,
                        uint32_t microbatch, hs_kernel_ctx *ctx, hs_why *why);

/* Address of a reference of this position. */
void *hs_linked_address(const hs_linked *linked, const hs_plan_ref *ref, uint32_t slot,
                        uint32_t microbatch);

#endif
