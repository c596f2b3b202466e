#include "run/machine.h"

#include <inttypes.h>
#include <sched.h>

static int cores(void) {
    cpu_set_t set;
    CPU_ZERO(&set);
    return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

hs_status hs_machine_create(const hs_plan *plan, const hs_plan_position *position,
                            uint32_t kernel_path, uint32_t threads, uint32_t local_ranks,
                            hs_machine *machine, hs_why *why) {
    *machine = (hs_machine){0};
    hs_status st = HS_OK;
    machine->set = hs_kernels_pick(kernel_path);
    if (!machine->set) {
        return hs_fail(why, HS_E_UNSUPPORTED,
                       "this CPU lacks kernel path %" PRIu32
                       " (1 ref, 2 portable, 3 avx2, 4 avx512); choose "
                       "launch.kernel_path for the weakest node of the gang",
                       kernel_path);
    }
    int n = threads ? (int)threads : cores() / (int)(local_ranks ? local_ranks : 1);
    if (n > HS_POOL_MAX_THREADS) n = HS_POOL_MAX_THREADS;
    machine->threads = n < 1 ? 1 : n;
    HS_TRY_GOTO(st, failed, hs_arena_create(position->arena_bytes, &machine->arena, why));
    if (hs_pool_create(machine->threads, &machine->pool) != HS_OK) {
        st = hs_fail(why, HS_E_MEMORY, "cannot start %d threads; lower parallel.threads",
                     machine->threads);
        goto failed;
    }
    const size_t scratch = hs_kernels_scratch_bytes(machine->threads);
    HS_TRY_GOTO(st, failed, hs_arena_create(scratch ? scratch : 64, &machine->scratch, why));
    HS_TRY_GOTO(st, failed,
                hs_link(plan, position, &machine->arena, machine->set, &machine->linked, why));
    machine->kernels = (hs_kernel_ctx){.pool = machine->pool,
                                       .scratch = machine->scratch.base,
                                       .scratch_bytes = machine->scratch.bytes};
    return HS_OK;

failed:
    hs_machine_destroy(machine);
    return st;
}

void hs_machine_destroy(hs_machine *machine) {
    hs_linked_destroy(machine->linked);
    hs_pool_destroy(machine->pool);
    hs_arena_destroy(&machine->scratch);
    hs_arena_destroy(&machine->arena);
    *machine = (hs_machine){0};
}
