#include "run/machine.h"

#include <inttypes.h>
#include <sched.h>

static int cores(void) {
    cpu_set_t set;
    CPU_ZERO(&set);
    return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

static hs_status open_arena(const hs_machine_config *c, hs_machine *machine, hs_why *why) {
    const size_t bytes = c->position->arena_bytes;
    return c->arena_fd < 0 ? hs_arena_create(bytes, &machine->arena, why)
                           : hs_arena_open(c->arena_fd, bytes, machine->pool, &machine->arena, why);
}

hs_status hs_machine_create(const hs_machine_config *c, hs_machine *machine, hs_why *why) {
    *machine = (hs_machine){0};
    hs_status st = HS_OK;
    machine->set = hs_kernels_pick(c->kernel_path);
    if (!machine->set) {
        return hs_fail(why, HS_E_UNSUPPORTED,
                       "this CPU lacks kernel path %" PRIu32
                       " (1 ref, 2 portable, 3 avx2, 4 avx512); choose "
                       "launch.kernel_path for the weakest node of the gang",
                       c->kernel_path);
    }
    int n = c->threads ? (int)c->threads : cores() / (int)(c->local_ranks ? c->local_ranks : 1);
    if (n > HS_POOL_MAX_THREADS) n = HS_POOL_MAX_THREADS;
    machine->threads = n < 1 ? 1 : n;
    if (hs_pool_create(machine->threads, &machine->pool) != HS_OK) {
        st = hs_fail(why, HS_E_MEMORY, "cannot start %d threads; lower parallel.threads",
                     machine->threads);
        goto failed;
    }
    HS_TRY_GOTO(st, failed, open_arena(c, machine, why));
    const size_t scratch = hs_kernels_scratch_bytes(machine->threads);
    HS_TRY_GOTO(st, failed, hs_arena_create(scratch ? scratch : 64, &machine->scratch, why));
    HS_TRY_GOTO(
        st, failed,
        hs_link(c->plan, c->position, &machine->arena, machine->set, &machine->linked, why));
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
