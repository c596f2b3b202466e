#include "run/machine.h"

#include <errno.h>
#include <inttypes.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>

#include "kernels/kernels.h"
#include "run/cgroup.h"

enum { CPUS_FIRST = 1024, CPUS_MOST = 1 << 20 };

_Static_assert(HS_POOL_MAX_THREADS == HS_THREADS_MAX, "wire/plan.h");

static const char self[] = "/proc/self/cgroup", mount[] = "/sys/fs/cgroup";

/* CPUs that this process may run on (affinity, cpuset). */
static int64_t cpus(void) {
    for (int most = CPUS_FIRST; most <= CPUS_MOST; most *= 2) {
        cpu_set_t *set = CPU_ALLOC((size_t)most);
        if (!set) break;
        const size_t bytes = CPU_ALLOC_SIZE((size_t)most);
        CPU_ZERO_S(bytes, set);
        const int failed = sched_getaffinity(0, bytes, set) ? errno : 0;
        const int64_t found = failed ? 0 : CPU_COUNT_S(bytes, set);
        CPU_FREE(set);
        if (!failed) return found;
        if (failed != EINVAL) break; /* EINVAL: the machine has more */
    }
    return 1;
}

static uint64_t needs_of(const hs_plan_position *p) {
    uint64_t sum = 0; /* for show in the file, so any number may stand there */
    for (int k = 0; k < HS_MEMORY_KINDS; k++)
        if (k != HS_MEMORY_SLOTS && p->bytes_by_kind[k] < UINT64_C(1) << 50)
            sum += p->bytes_by_kind[k];
    return sum;
}

int hs_machine_threads(const hs_machine_config *c, const hs_machine_limits *limits) {
    const int64_t ranks = c->local_ranks ? c->local_ranks : 1;
    int64_t n = c->threads;
    if (!n) {
        n = limits->cpus;
        if (limits->cpu_milli && limits->cpu_milli / 1000 < n) n = limits->cpu_milli / 1000;
        n /= ranks;
        if (limits->memory_bytes) {
            const uint64_t each = limits->memory_bytes / (uint64_t)ranks,
                           needs = needs_of(c->position);
            const uint64_t left = each > needs ? (each - needs) / 2 : 0; /* the rest: page cache */
            const int64_t room = HS_THREADS_COUNTED + (int64_t)(left / hs_kernels_scratch_bytes(1));
            if (room < n) n = room;
        }
    }
    if (n > HS_POOL_MAX_THREADS) n = HS_POOL_MAX_THREADS;
    return n < 1 ? 1 : (int)n;
}

/* What the plan's memory of a device is for, behind what the device said of its room. */
static void add_kinds(const hs_plan_position *position, hs_why *why) {
    static const char *const kinds[] = {"weights", "moments", "gradients", "activations",
                                        "scratch"}; /* the first ones of bytes_by_kind */
    if (!why) return;
    size_t at = strlen(why->text);
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds && at < sizeof why->text; i++) {
        const int n = snprintf(why->text + at, sizeof why->text - at, "%s%s %.2f",
                               i ? ", " : "; the plan in GiB: ", kinds[i],
                               (double)position->bytes_by_kind[i] / (1 << 30));
        at += n > 0 ? (size_t)n : 0;
    }
}

const char *hs_machine_cpu_kernels(void) {
    const hs_kernel_set *set = NULL;
    return hs_kernels_pick(HS_PATH_AUTO, &set, NULL) == HS_OK ? set->name : "none";
}

hs_status hs_machine_create(const hs_machine_config *c, hs_machine *machine, hs_why *why) {
    *machine = (hs_machine){.backend = c->backend};
    hs_status st = HS_OK;
    HS_ASSERT(c->backend->version == HS_BACKEND_VERSION);
    hs_machine_limits limits = {.cpus = cpus(),
                                .cpu_milli = hs_cgroup_cpu_milli(self, mount),
                                .memory_bytes = hs_cgroup_memory(self, mount)};
    machine->threads = hs_machine_threads(c, &limits);
    limits.memory_bytes = 0;
    machine->cpu_threads = hs_machine_threads(c, &limits);
    if (hs_pool_create(machine->threads, &machine->pool) != HS_OK) {
        st = hs_fail(why, HS_E_MEMORY, "cannot start %d threads; lower parallel.threads",
                     machine->threads);
        goto failed;
    }
    const hs_device_config device = {.index = c->device,
                                     .kernel_path = c->kernel_path,
                                     .bytes_needed = c->position->arena_bytes,
                                     .pool = machine->pool};
    st = c->backend->open(&device, &machine->device, &machine->facts, why);
    if (st == HS_E_MEMORY) add_kinds(c->position, why);
    if (st != HS_OK) goto failed;
    HS_TRY_GOTO(st, failed,
                hs_spaces_create(c->backend, machine->device, c->plan, c->position, c->arena_fd,
                                 &machine->spaces, why));
    HS_TRY_GOTO(st, failed,
                hs_link(c->plan, c->position, c->replica, &machine->spaces, &machine->linked, why));
    return HS_OK;

failed:
    hs_machine_destroy(machine);
    return st;
}

void hs_machine_destroy(hs_machine *machine) {
    hs_linked_destroy(machine->linked);
    hs_spaces_destroy(&machine->spaces);
    if (machine->device) machine->backend->close(machine->device);
    hs_pool_destroy(machine->pool);
    *machine = (hs_machine){0};
}
