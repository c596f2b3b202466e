/* The tests' way to a device of the CUDA backend, through ctypes (tests/gpu/device_lib.py): the library, real or
 * emulated, is opened as the engine opens it, and used through its table (backend/backend.h) alone. One arena; where
 * operands lie in it the caller says. Calls return a status; hs_gpu_text has the words. */
#include <dlfcn.h>
#include <inttypes.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "backend/backend.h"
#include "backend/links.h"
#include "backend/products.h"
#include "kernels/args.h"

enum { LOADED, COMPUTED, TAKEN };

typedef struct gpu {
    const hs_backend *table;
    hs_device *device;
    hs_device_facts facts;
    uint8_t *arena, *window; /* of the device, of the host (pinned) */
    size_t arena_bytes, window_bytes;
    uint32_t products;
    char plain
        [2000]; /* those of them that a plain kernel computes: m x n x k and types, a line each */
    hs_why why;
} gpu;

static gpu the;

#define TRY(call)                                                                                  \
    do {                                                                                           \
        const hs_status status_ = (call);                                                          \
        if (status_ != HS_OK) return status_;                                                      \
    } while (0)

const char *hs_gpu_text(void) {
    return the.why.text;
}

hs_status hs_gpu_open(const char *library, uint32_t index, uint32_t path, size_t arena_bytes,
                      size_t window_bytes) {
    memset(&the, 0, sizeof the);
    void *const opened = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (!opened) return hs_fail(&the.why, HS_E_UNSUPPORTED, "%s", dlerror());
    const hs_backend *(*table)(void);
    *(void **)&table = dlsym(opened, "hs_cuda_backend");
    if (!table) return hs_fail(&the.why, HS_E_UNSUPPORTED, "%s has no hs_cuda_backend", library);
    the.table = table();
    if (the.table->version != HS_BACKEND_VERSION)
        return hs_fail(&the.why, HS_E_UNSUPPORTED, "%s is of version %u, the tests of %u", library,
                       (unsigned)the.table->version, HS_BACKEND_VERSION);
    const hs_device_config config = {
        .index = index, .kernel_path = path, .bytes_needed = arena_bytes};
    TRY(the.table->open(&config, &the.device, &the.facts, &the.why));
    TRY(the.table->alloc(the.device, arena_bytes, -1, &the.arena, &the.why));
    TRY(the.table->pinned(the.device, window_bytes, &the.window, &the.why));
    the.arena_bytes = arena_bytes;
    the.window_bytes = window_bytes;
    return HS_OK;
}

void hs_gpu_close(void) {
    if (the.device) the.table->close(the.device);
    the.device = NULL;
}

const char *hs_gpu_device(void) {
    return the.facts.device;
}
const char *hs_gpu_kernels(void) {
    return the.facts.kernels ? the.facts.kernels : "";
}

/* capability, memory, free, scratch */
void hs_gpu_facts(uint64_t out[4]) {
    out[0] = the.facts.capability;
    out[1] = the.facts.memory_bytes;
    out[2] = the.facts.free_bytes;
    out[3] = the.facts.scratch_bytes;
}

/* How many calls of a kernel are a launch at most. */
uint32_t hs_gpu_together(uint32_t kernel) {
    return the.table->together ? the.table->together((uint16_t)kernel) : 1;
}

/* Bytes between host memory and the arena; blocks. */
static hs_status move(void *host, size_t at, size_t bytes, hs_copy direction) {
    uint8_t *const device = the.arena + at;
    const int stream = direction == HS_COPY_TO_DEVICE ? HS_STREAM_IN : HS_STREAM_OUT;
    void *const to = direction == HS_COPY_TO_DEVICE ? (void *)device : host;
    TRY(the.table->copy(the.device, stream, to,
                        direction == HS_COPY_TO_DEVICE ? host : (void *)device, bytes, direction,
                        &the.why));
    TRY(the.table->record(the.device, stream, LOADED, &the.why));
    return the.table->wait(the.device, LOADED, &the.why);
}

hs_status hs_gpu_put(void *host, size_t at, size_t bytes) {
    return move(host, at, bytes, HS_COPY_TO_DEVICE);
}

/* A call's arguments: operands at these offsets of the arena, -1 for one that is absent. */
static hs_args args_at(uint32_t dtype, const int64_t *at, const int64_t *dims,
                       const double *reals) {
    hs_args args;
    memset(&args, 0, sizeof args);
    args.dtype = dtype;
    for (int i = 0; i < HS_CALL_PTRS; i++) args.ptr[i] = at[i] < 0 ? NULL : the.arena + at[i];
    memcpy(args.dim, dims, sizeof args.dim);
    memcpy(args.real, reals, sizeof args.real);
    return args;
}

/* Products of a library have an algorithm each, chosen before the first launch that needs it; what
 * lies at the operands may be written. */
static hs_status settle(uint32_t kernel, const hs_args *args) {
    static hs_algorithm list[HS_ALGORITHMS_MAX];
    const hs_product_table *const products = the.table->products;
    if (!products || !products->library(the.device)) return HS_OK;
    TRY(products->need(the.device, (uint16_t)kernel, args, &the.why));
    const uint32_t missing = products->missing(the.device);
    if (!missing) return HS_OK;
    the.products += missing;
    TRY(products->choose(the.device, list, &the.why));
    for (uint32_t i = 0; i < missing; i++) {
        const hs_algorithm_key *key = &list[i].key;
        const size_t at = strlen(the.plain);
        if (!list[i].candidates)
            (void)snprintf(the.plain + at, sizeof the.plain - at,
                           "%" PRId64 " x %" PRId64 " x %" PRId64 " of types %d, %d into %d\n",
                           key->m, key->n, key->k, key->type_a, key->type_b, key->type_out);
    }
    return products->use(the.device, list, missing, &the.why);
}

const char *hs_gpu_plain(void) {
    return the.plain;
}

/* How many products have been settled since open: HS_ALGORITHMS_MAX at most. */
uint32_t hs_gpu_products(void) {
    return the.products;
}

/* `before` becomes the arena's first bytes, one kernel runs, `after` is what they are then. */
hs_status hs_gpu_call(uint32_t kernel, uint32_t dtype, const uint8_t *before, uint8_t *after,
                      size_t bytes, const int64_t *at, const int64_t *dims, const double *reals) {
    if (bytes > the.arena_bytes)
        return hs_fail(&the.why, HS_E_MEMORY, "%zu bytes, the arena has %zu", bytes,
                       the.arena_bytes);
    const hs_args args = args_at(dtype, at, dims, reals);
    TRY(settle(kernel, &args));
    const hs_backend *const t = the.table;
    TRY(t->copy(the.device, HS_STREAM_IN, the.arena, before, bytes, HS_COPY_TO_DEVICE, &the.why));
    TRY(t->record(the.device, HS_STREAM_IN, LOADED, &the.why));
    TRY(t->follow(the.device, HS_STREAM_COMPUTE, LOADED, &the.why));
    TRY(t->launch(the.device, HS_STREAM_COMPUTE, (uint16_t)kernel, &args, 1, &the.why));
    TRY(t->record(the.device, HS_STREAM_COMPUTE, COMPUTED, &the.why));
    TRY(t->follow(the.device, HS_STREAM_OUT, COMPUTED, &the.why));
    TRY(t->copy(the.device, HS_STREAM_OUT, after, the.arena, bytes, HS_COPY_FROM_DEVICE, &the.why));
    TRY(t->record(the.device, HS_STREAM_OUT, TAKEN, &the.why));
    return t->wait(the.device, TAKEN, &the.why);
}

/* Pins a memory file of so many bytes, as a snapshot's slot is, and copies the arena's beginning into it. */
hs_status hs_gpu_pin(size_t bytes) {
    const int fd = memfd_create("pinned", MFD_CLOEXEC);
    void *at = MAP_FAILED;
    if (fd >= 0 && ftruncate(fd, (off_t)bytes) == 0)
        at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (fd >= 0) (void)close(fd);
    if (at == MAP_FAILED) return hs_fail(&the.why, HS_E_IO, "no memory file of %zu bytes", bytes);
    TRY(the.table->pin(the.device, at, bytes, &the.why)); /* until close, as the device's own */
    return move(at, 0, bytes < the.arena_bytes ? bytes : the.arena_bytes, HS_COPY_FROM_DEVICE);
}

/* What links there are: shared memory, and the version of NCCL; the text is what is missing. */
hs_status hs_gpu_links(uint32_t out[2]) {
    hs_link_facts facts;
    TRY(the.table->links->facts(the.device, true, &facts, &the.why));
    out[0] = facts.shares_memory, out[1] = facts.library;
    (void)snprintf(the.why.text, sizeof the.why.text, "%s", facts.why);
    return HS_OK;
}

/* The arena for another process, with `word` at its beginning; and the word at the beginning of another's. */
hs_status hs_gpu_share(uint32_t word, hs_link_memory *out) {
    TRY(hs_gpu_put(&word, 0, sizeof word));
    return the.table->links->export_memory(the.device, the.arena, the.arena_bytes, out, &the.why);
}
hs_status hs_gpu_reach(const hs_link_memory *memory, uint32_t *word) {
    uint8_t *at;
    TRY(the.table->links->import_memory(the.device, memory, &at, &the.why));
    const hs_status st = the.table->links->peek(the.device, at, word, &the.why);
    the.table->links->release(the.device, at);
    return st;
}

/* A stream waits for a value that another one writes. */
hs_status hs_gpu_value(void) {
    const hs_link_table *const l = the.table->links;
    TRY(l->wait_value(the.device, HS_STREAM_IN, the.arena, 77, &the.why));
    TRY(the.table->record(the.device, HS_STREAM_IN, LOADED, &the.why));
    TRY(l->write_value(the.device, HS_STREAM_OUT, the.arena, 77, &the.why));
    return the.table->wait(the.device, LOADED, &the.why);
}

/* Another thread asks for an event and waits for it, again and again. */
typedef struct asking {
    _Atomic uint32_t times;
    atomic_bool over;
    _Atomic hs_status status;
    hs_why why;
} asking;

static void *ask(void *ctx) {
    asking *const a = ctx;
    bool done;
    while (a->status == HS_OK && !atomic_load(&a->over)) {
        a->status = the.table->query(the.device, TAKEN, &done, &a->why);
        if (a->status == HS_OK) a->status = the.table->wait(the.device, TAKEN, &a->why);
        atomic_fetch_add(&a->times, 1);
    }
    return NULL;
}

static hs_status zero(size_t at) {
    const hs_zero_args a = {.dst = the.arena + at, .bytes = 4096, .dtype = HS_F32};
    const hs_args args = hs_zero_args_to(&a);
    return the.table->launch(the.device, HS_STREAM_COMPUTE, HS_K_ZERO, &args, 1, &the.why);
}

/* Until the other thread has asked this often, or has failed. */
static void until(asking *a, uint32_t times) {
    while (atomic_load(&a->times) < times && a->status == HS_OK) (void)sched_yield();
}

static hs_status capture_beside(asking *a) {
    hs_graph *graph;
    TRY(the.table->capture(the.device, HS_STREAM_COMPUTE, &the.why));
    TRY(zero(0));
    until(a, atomic_load(&a->times) + 2); /* one of them begins and ends inside */
    TRY(zero(4096));
    TRY(the.table->captured(the.device, HS_STREAM_COMPUTE, &graph, &the.why));
    TRY(the.table->replay(the.device, HS_STREAM_COMPUTE, graph, &the.why));
    TRY(the.table->record(the.device, HS_STREAM_COMPUTE, COMPUTED, &the.why));
    return the.table->wait(the.device, COMPUTED, &the.why);
}

/* A thread that waits for a snapshot while this one makes a graph. */
hs_status hs_gpu_beside(void) {
    asking a = {.status = HS_OK};
    pthread_t thread;
    TRY(zero(0)); /* loaded outside of a capture */
    TRY(the.table->copy(the.device, HS_STREAM_SAVE, the.window, the.arena, the.window_bytes,
                        HS_COPY_FROM_DEVICE, &the.why));
    TRY(the.table->record(the.device, HS_STREAM_SAVE, TAKEN, &the.why));
    if (pthread_create(&thread, NULL, ask, &a) != 0)
        return hs_fail(&the.why, HS_E_MEMORY, "no thread");
    until(&a, 1);
    const hs_status st = capture_beside(&a);
    atomic_store(&a.over, true);
    (void)pthread_join(thread, NULL);
    if (a.status != HS_OK)
        return hs_fail(&the.why, a.status, "the thread beside a capture: %s", a.why.text);
    return st;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Seconds of `rounds` times the call on each of `sets` sets of offsets, as one graph where the device has graphs: what
 * the host takes to launch is left out where it is shorter. */
hs_status hs_gpu_time(uint32_t kernel, uint32_t dtype, uint32_t sets, const int64_t *at,
                      const int64_t *dims, const double *reals, uint32_t rounds, double *seconds) {
    const hs_backend *const t = the.table;
    hs_graph *graph = NULL;
    const hs_args first = args_at(dtype, at, dims, reals);
    TRY(settle(kernel, &first));
    double began = 0;
    for (int pass = 0; pass < 2; pass++) { /* the first one warms up, launch by launch */
        if (pass && t->capture) {
            TRY(t->capture(the.device, HS_STREAM_COMPUTE, &the.why));
            for (uint32_t s = 0; s < sets; s++) {
                const hs_args args = args_at(dtype, at + s * HS_CALL_PTRS, dims, reals);
                TRY(t->launch(the.device, HS_STREAM_COMPUTE, (uint16_t)kernel, &args, 1, &the.why));
            }
            TRY(t->captured(the.device, HS_STREAM_COMPUTE, &graph, &the.why));
            TRY(t->replay(the.device, HS_STREAM_COMPUTE, graph, &the.why));
            TRY(t->record(the.device, HS_STREAM_COMPUTE, COMPUTED, &the.why));
            TRY(t->wait(the.device, COMPUTED, &the.why));
        }
        began = now();
        for (uint32_t round = 0; round < (pass ? rounds : 1); round++) {
            if (graph) {
                TRY(t->replay(the.device, HS_STREAM_COMPUTE, graph, &the.why));
                continue;
            }
            for (uint32_t s = 0; s < sets; s++) {
                const hs_args args = args_at(dtype, at + s * HS_CALL_PTRS, dims, reals);
                TRY(t->launch(the.device, HS_STREAM_COMPUTE, (uint16_t)kernel, &args, 1, &the.why));
            }
        }
        TRY(t->record(the.device, HS_STREAM_COMPUTE, COMPUTED, &the.why));
        TRY(t->wait(the.device, COMPUTED, &the.why));
    }
    *seconds = now() - began;
    return HS_OK;
}

/* Seconds of `rounds` copies of `bytes`: HS_COPY_TO_DEVICE and _FROM_DEVICE with the pinned window, HS_COPY_ON_DEVICE from
 * the arena's beginning to its middle. */
hs_status hs_gpu_copy_time(int direction, size_t bytes, uint32_t rounds, double *seconds) {
    const size_t room = direction == HS_COPY_ON_DEVICE ? the.arena_bytes / 2 : the.window_bytes;
    if (bytes > room || bytes > the.arena_bytes)
        return hs_fail(&the.why, HS_E_MEMORY, "%zu bytes, there is room for %zu", bytes, room);
    uint8_t *const half = the.arena + the.arena_bytes / 2;
    const int stream = direction == HS_COPY_ON_DEVICE   ? HS_STREAM_COMPUTE
                       : direction == HS_COPY_TO_DEVICE ? HS_STREAM_IN
                                                        : HS_STREAM_OUT;
    void *const to = direction == HS_COPY_FROM_DEVICE ? the.window
                     : direction == HS_COPY_TO_DEVICE ? the.arena
                                                      : half;
    const void *const from = direction == HS_COPY_TO_DEVICE ? the.window : the.arena;
    double began = 0;
    for (int pass = 0; pass < 2; pass++) {
        began = now();
        for (uint32_t round = 0; round < (pass ? rounds : 1); round++)
            TRY(the.table->copy(the.device, stream, to, from, bytes, (hs_copy)direction, &the.why));
        TRY(the.table->record(the.device, stream, TAKEN, &the.why));
        TRY(the.table->wait(the.device, TAKEN, &the.why));
    }
    *seconds = now() - began;
    return HS_OK;
}
