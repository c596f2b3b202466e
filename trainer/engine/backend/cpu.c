/* The CPU as a device: its memory is the host's, streams do not exist. A call is done when it returns, but for
 * what its kernel left for later (kernels/deferred.h): that is done when something comes to its bytes, at the next
 * wait at the latest. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "backend/backend.h"
#include "core/arena.h"
#include "kernels/deferred.h"

struct hs_device {
    const hs_kernel_set *set;
    hs_kernel_ctx kernels;
    hs_arena scratch, arenas[HS_DEVICE_ARENAS];
    int count;
};

static void cpu_close(hs_device *d) {
    if (!d) return;
    for (int i = 0; i < d->count; i++) hs_arena_destroy(&d->arenas[i]);
    hs_arena_destroy(&d->scratch);
    hs_deferred_destroy(d->kernels.deferred);
    free(d);
}

static const hs_device_facts the_cpu = {.device = "cpu"};

static hs_status cpu_devices(hs_device_facts *list, uint32_t room, uint32_t *count, hs_why *why) {
    (void)why;
    *count = 1;
    if (room > 0) list[0] = the_cpu;
    return HS_OK;
}

static hs_status cpu_open(const hs_device_config *config, hs_device **device,
                          hs_device_facts *facts, hs_why *why) {
    *device = NULL;
    const hs_kernel_set *set = NULL;
    HS_TRY(hs_kernels_pick(config->kernel_path, &set, why));
    if (config->index != 0)
        return hs_fail(why, HS_E_UNSUPPORTED,
                       "there is no device %" PRIu32 ": the CPU is device 0, and the only one",
                       config->index);
    hs_device *d = calloc(1, sizeof *d);
    if (!d) return hs_fail(why, HS_E_MEMORY, "no memory for a device");
    const size_t scratch = hs_kernels_scratch_bytes(hs_pool_threads(config->pool));
    const hs_status st = hs_arena_create(scratch ? scratch : 64, &d->scratch, why);
    if (st != HS_OK) {
        cpu_close(d);
        return st;
    }
    d->set = set;
    d->kernels = (hs_kernel_ctx){.pool = config->pool,
                                 .scratch = d->scratch.base,
                                 .scratch_bytes = d->scratch.bytes,
                                 .deferred = hs_deferred_create(hs_pool_threads(config->pool))};
    if (!d->kernels.deferred) {
        cpu_close(d);
        return hs_fail(why, HS_E_MEMORY, "no memory for the list of calls that wait");
    }
    *facts = the_cpu;
    facts->kernels = set->name;
    facts->scratch_bytes = d->scratch.bytes;
    *device = d;
    return HS_OK;
}

static hs_status cpu_alloc(hs_device *d, size_t bytes, int fd, uint8_t **at, hs_why *why) {
    HS_ASSERT(d->count < HS_DEVICE_ARENAS);
    hs_arena *arena = &d->arenas[d->count];
    HS_TRY(fd < 0 ? hs_arena_create(bytes, arena, why)
                  : hs_arena_open(fd, bytes, d->kernels.pool, arena, why));
    d->count++;
    *at = arena->base;
    return HS_OK;
}

static hs_status cpu_pinned(hs_device *d, size_t bytes, uint8_t **at, hs_why *why) {
    return cpu_alloc(d, bytes, -1, at, why);
}

static hs_status cpu_pin(hs_device *d, void *at, size_t bytes, hs_why *why) {
    (void)d;
    (void)at;
    (void)bytes;
    (void)why;
    return HS_OK;
}

static hs_status cpu_check(hs_device *d, uint8_t *at, size_t bytes, hs_check *check, hs_why *why) {
    const hs_arena memory = {.base = at, .bytes = bytes};
    return hs_check_machine(d->set, d->kernels.pool, &memory, check, why);
}

static hs_status cpu_launch(hs_device *d, int stream, uint16_t kernel, const hs_args *args,
                            uint32_t count, hs_why *why) {
    (void)stream;
    (void)why; /* the linker names the call */
    HS_ASSERT(count == 1);
    hs_deferred_before(d->kernels.deferred, d->kernels.pool, kernel, args);
    return d->set->fn[kernel](&d->kernels, args);
}

static hs_status cpu_copy(hs_device *d, int stream, void *to, const void *from, size_t bytes,
                          hs_copy direction, hs_why *why) {
    (void)d;
    (void)stream;
    (void)direction;
    (void)why;
    if (to != from) memcpy(to, from, bytes);
    return HS_OK;
}

static hs_status cpu_event(hs_device *d, int stream, int event, hs_why *why) {
    (void)d;
    (void)stream;
    (void)event;
    (void)why;
    return HS_OK;
}

static hs_status cpu_wait(hs_device *d, int event, hs_why *why) {
    (void)event;
    (void)why;
    hs_deferred_settle(d->kernels.deferred, d->kernels.pool, NULL, UINT64_MAX);
    return HS_OK;
}

static void cpu_settle(hs_device *d, const void *at, size_t bytes) {
    hs_deferred_settle(d->kernels.deferred, d->kernels.pool, at, bytes);
}

static hs_status cpu_query(hs_device *d, int event, bool *done, hs_why *why) {
    (void)event;
    (void)why;
    *done = hs_deferred_none(d->kernels.deferred);
    return HS_OK;
}

const hs_backend hs_backend_cpu = {.version = HS_BACKEND_VERSION,
                                   .name = "cpu",
                                   .unified = true,
                                   .devices = cpu_devices,
                                   .open = cpu_open,
                                   .close = cpu_close,
                                   .alloc = cpu_alloc,
                                   .pinned = cpu_pinned,
                                   .pin = cpu_pin,
                                   .check = cpu_check,
                                   .launch = cpu_launch,
                                   .copy = cpu_copy,
                                   .record = cpu_event,
                                   .follow = cpu_event,
                                   .wait = cpu_wait,
                                   .query = cpu_query,
                                   .settle = cpu_settle};
