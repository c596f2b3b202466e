/* A CUDA backend (HOTSTAGE_CUDA) without CUDA, whose device is done with everything at once and does no
 * kernel: what is left of a step is what the engine itself does. It allocates nothing after open, so what a
 * preloaded malloc sees is the engine's. With HS_IDLE_PLAIN it has no graphs. At close one line of JSON on standard
 * error: how many calls of the table there were, by name. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "backend/backend.h"
#include "kernels/cuda/cuda.h"

struct hs_device {
    struct {
        void *at;
        size_t bytes;
    } memory[2 * HS_DEVICE_ARENAS];
    int count;
    uint64_t launch, copy, record, follow, wait, captured, replay;
};

static struct hs_device the_device;

static hs_status idle_devices(hs_device_facts *list, uint32_t room, uint32_t *count, hs_why *why) {
    (void)why;
    if (room) memset(list, 0, sizeof *list);
    *count = 1;
    return HS_OK;
}

static hs_status idle_open(const hs_device_config *config, hs_device **device,
                           hs_device_facts *facts, hs_why *why) {
    (void)config;
    (void)why;
    *facts = (hs_device_facts){.kernels = "idle", .device = "idle"};
    *device = &the_device;
    return HS_OK;
}

static void idle_close(hs_device *d) {
    if (!d) return;
    (void)fprintf(stderr,
                  "{\"idle\":{\"launch\":%" PRIu64 ",\"copy\":%" PRIu64 ",\"record\":%" PRIu64
                  ",\"follow\":%" PRIu64 ",\"wait\":%" PRIu64 ",\"captured\":%" PRIu64
                  ",\"replay\":%" PRIu64 "}}\n",
                  d->launch, d->copy, d->record, d->follow, d->wait, d->captured, d->replay);
    for (int i = 0; i < d->count; i++) (void)munmap(d->memory[i].at, d->memory[i].bytes);
}

static hs_status idle_pinned(hs_device *d, size_t bytes, uint8_t **at, hs_why *why) {
    HS_ASSERT(d->count < 2 * HS_DEVICE_ARENAS);
    void *map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) return hs_fail(why, HS_E_MEMORY, "no room for %zu bytes", bytes);
    d->memory[d->count].at = *at = map;
    d->memory[d->count++].bytes = bytes;
    return HS_OK;
}

static hs_status idle_alloc(hs_device *d, size_t bytes, int fd, uint8_t **at, hs_why *why) {
    (void)fd;
    return idle_pinned(d, bytes, at, why);
}

static hs_status idle_pin(hs_device *d, void *at, size_t bytes, hs_why *why) {
    (void)d;
    (void)at;
    (void)bytes;
    (void)why;
    return HS_OK;
}

static hs_status idle_check(hs_device *d, uint8_t *at, size_t bytes, hs_check *check, hs_why *why) {
    (void)d;
    (void)at;
    (void)bytes;
    (void)why;
    memset(check, 0, sizeof *check);
    return HS_OK;
}

static uint32_t idle_together(uint16_t kernel) {
#define X(NAME, name)                                                                              \
    if (kernel == HS_K_##NAME) return HS_CUDA_TOGETHER;
    HS_CUDA_TOGETHER_KERNELS(X)
#undef X
    return 1;
}

static hs_status idle_launch(hs_device *d, int stream, uint16_t kernel, const hs_args *args,
                             uint32_t count, hs_why *why) {
    (void)stream;
    (void)kernel;
    (void)args;
    (void)count;
    (void)why;
    d->launch++;
    return HS_OK;
}

static hs_status idle_copy(hs_device *d, int stream, void *to, const void *from, size_t bytes,
                           hs_copy direction, hs_why *why) {
    (void)stream;
    (void)direction;
    (void)why;
    d->copy++;
    memcpy(to, from, bytes);
    return HS_OK;
}

static hs_status idle_record(hs_device *d, int stream, int event, hs_why *why) {
    (void)stream;
    (void)event;
    (void)why;
    d->record++;
    return HS_OK;
}

static hs_status idle_follow(hs_device *d, int stream, int event, hs_why *why) {
    (void)stream;
    (void)event;
    (void)why;
    d->follow++;
    return HS_OK;
}

static hs_status idle_wait(hs_device *d, int event, hs_why *why) {
    (void)event;
    (void)why;
    (void)__atomic_add_fetch(&d->wait, 1, __ATOMIC_RELAXED);
    return HS_OK;
}

static hs_status idle_query(hs_device *d, int event, bool *done, hs_why *why) {
    (void)d;
    (void)event;
    (void)why;
    *done = true;
    return HS_OK;
}

static hs_status idle_capture(hs_device *d, int stream, hs_why *why) {
    (void)d;
    (void)stream;
    (void)why;
    return HS_OK;
}

static hs_status idle_captured(hs_device *d, int stream, hs_graph **graph, hs_why *why) {
    (void)stream;
    (void)why;
    d->captured++;
    *graph = (hs_graph *)(void *)d;
    return HS_OK;
}

static hs_status idle_replay(hs_device *d, int stream, hs_graph *graph, hs_why *why) {
    (void)stream;
    (void)graph;
    (void)why;
    d->replay++;
    return HS_OK;
}

const hs_backend *hs_cuda_backend(void);
const hs_backend *hs_cuda_backend(void) {
    static hs_backend table = {.version = HS_BACKEND_VERSION,
                               .name = "idle",
                               .devices = idle_devices,
                               .open = idle_open,
                               .close = idle_close,
                               .alloc = idle_alloc,
                               .pinned = idle_pinned,
                               .pin = idle_pin,
                               .check = idle_check,
                               .together = idle_together,
                               .launch = idle_launch,
                               .copy = idle_copy,
                               .record = idle_record,
                               .follow = idle_follow,
                               .wait = idle_wait,
                               .query = idle_query,
                               .capture = idle_capture,
                               .captured = idle_captured,
                               .replay = idle_replay};
    if (getenv("HS_IDLE_PLAIN")) table.capture = NULL;
    return &table;
}
