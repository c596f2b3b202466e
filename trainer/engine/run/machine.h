/* What a position needs of the machine before it can run: arena, kernels, threads, workspace,
 * linked calls. Shared by training and inference. */
#ifndef HS_RUN_MACHINE_H
#define HS_RUN_MACHINE_H

#include "core/arena.h"
#include "core/threads.h"
#include "run/linker.h"

typedef struct hs_machine {
    hs_arena arena, scratch;
    const hs_kernel_set *set;
    int threads;
    hs_pool *pool;
    hs_linked *linked;
    hs_kernel_ctx kernels;
} hs_machine;

typedef struct hs_machine_config {
    const hs_plan *plan;
    const hs_plan_position *position;
    uint32_t kernel_path;
    uint32_t threads; /* 0: the cores this process may use, divided by local_ranks, at least 1 */
    uint32_t local_ranks;
    int arena_fd; /* memfd that keeps the arena's pages beyond this process; -1: a private arena */
} hs_machine_config;

/* HS_E_UNSUPPORTED where the CPU lacks the kernel path. On failure everything is given back. */
hs_status hs_machine_create(const hs_machine_config *config, hs_machine *machine, hs_why *why);
void hs_machine_destroy(hs_machine *machine); /* safe on a zeroed machine */

#endif
