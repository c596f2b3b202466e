/* What a position needs of the machine before it can run: threads, a device with the position's
 * memory, linked calls. Shared by training and inference. */
#ifndef HS_RUN_MACHINE_H
#define HS_RUN_MACHINE_H

#include "backend/backend.h"
#include "core/threads.h"
#include "run/linker.h"
#include "run/spaces.h"

typedef struct hs_machine {
    const hs_backend *backend;
    hs_device *device;
    hs_device_facts facts;
    hs_spaces spaces;
    int threads;
    int cpu_threads; /* what the CPUs alone would allow: more than threads where memory is short */
    hs_pool *pool;
    hs_linked *linked;
} hs_machine;

typedef struct hs_machine_config {
    const hs_backend *backend;
    const hs_plan *plan;
    const hs_plan_position *position;
    uint32_t replica;
    uint32_t kernel_path;
    uint32_t device;  /* index, of the backend's devices on this machine */
    uint32_t threads; /* 0: see hs_machine_threads */
    uint32_t local_ranks;
    int arena_fd; /* memfd that keeps the arena's pages beyond this process; -1: a private arena */
} hs_machine_config;

/* What this process may use of the machine. */
typedef struct hs_machine_limits {
    int64_t cpus;          /* by affinity and cpuset */
    int64_t cpu_milli;     /* quota of the control group, thousandths of a CPU; 0: none */
    uint64_t memory_bytes; /* limit of the control group; 0: none */
} hs_machine_limits;

/* Threads of a rank: what the plan says, else its share of the whole CPUs that the rank may use
 * (2.5 are two: a third thread would be throttled), as far as the workspaces of more threads than
 * the plan counted (HS_THREADS_COUNTED) fit into half of what the memory limit leaves. At least 1,
 * at most HS_POOL_MAX_THREADS. */
int hs_machine_threads(const hs_machine_config *config, const hs_machine_limits *limits);

/* The kernel path that auto is on this CPU. */
const char *hs_machine_cpu_kernels(void);

/* HS_E_UNSUPPORTED where the device lacks the kernel path. On failure everything is given back. */
hs_status hs_machine_create(const hs_machine_config *config, hs_machine *machine, hs_why *why);
void hs_machine_destroy(hs_machine *machine); /* safe on a zeroed machine */

#endif
