/* The CUDA backend's table, called as the engine calls it, for tests/engine/test_cuda_backend.py:
 *
 *     device_drive SCENARIO [INDEX [PATH [BYTES NEEDED]]]
 *
 * opens the backend of HOTSTAGE_CUDA (backend/load.h) and a device, does what the scenario says, and prints
 * what it saw. A failure: its words on standard error, its code. */
#include <dlfcn.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/load.h"
#include "backend/products.h"
#include "kernels/args.h"
#include "wire/attempt.h"

enum { N = 64, BYTES = 4 * N, ARENA = 1 << 16 };
enum { X = 0, Y = BYTES, Z = 2 * BYTES }; /* in the arena */
enum { PUT = 40, MADE = 41, GOT = 63 };   /* events */

static const hs_backend *backend;
static hs_device *device;
static uint8_t *arena, *host;

static hs_status put(uint64_t offset, const void *from, hs_why *why) {
    HS_TRY(
        backend->copy(device, HS_STREAM_IN, arena + offset, from, BYTES, HS_COPY_TO_DEVICE, why));
    HS_TRY(backend->record(device, HS_STREAM_IN, PUT, why));
    return backend->follow(device, HS_STREAM_COMPUTE, PUT, why);
}

static hs_status get(uint64_t offset, void *to, hs_why *why) {
    HS_TRY(backend->record(device, HS_STREAM_COMPUTE, MADE, why));
    HS_TRY(backend->follow(device, HS_STREAM_OUT, MADE, why));
    HS_TRY(
        backend->copy(device, HS_STREAM_OUT, to, arena + offset, BYTES, HS_COPY_FROM_DEVICE, why));
    HS_TRY(backend->record(device, HS_STREAM_OUT, GOT, why));
    return backend->wait(device, GOT, why);
}

static hs_status gelu(uint64_t to, uint64_t from, hs_why *why) {
    const hs_gelu_fwd_args a = {.y = arena + to, .x = arena + from, .n = N, .dtype = HS_F32};
    const hs_args args = hs_gelu_fwd_args_to(&a);
    return backend->launch(device, HS_STREAM_COMPUTE, HS_K_GELU_FWD, &args, 1, why);
}

static void fill(float *x, int round) {
    for (int i = 0; i < N; i++) x[i] = (float)(i - N / 2) / 8 + (float)round;
}

/* A graph of two kernels and a copy gives what the same calls give, with other inputs each time. */
static hs_status graph(hs_why *why) {
    float *const x = (float *)(void *)host, *const made = x + N, *const wanted = x + 2 * N;
    hs_graph *g;
    HS_TRY(gelu(Y, X, why)); /* a kernel is loaded outside of captures */
    HS_TRY(backend->capture(device, HS_STREAM_COMPUTE, why));
    HS_TRY(gelu(Y, X, why));
    HS_TRY(gelu(Y, Y, why));
    HS_TRY(backend->copy(device, HS_STREAM_COMPUTE, arena + Z, arena + Y, BYTES, HS_COPY_ON_DEVICE,
                         why));
    HS_TRY(backend->captured(device, HS_STREAM_COMPUTE, &g, why));
    int equal = 0;
    for (int round = 0; round < 3; round++) {
        fill(x, round);
        HS_TRY(put(X, x, why));
        HS_TRY(backend->replay(device, HS_STREAM_COMPUTE, g, why));
        HS_TRY(get(Z, made, why));
        HS_TRY(gelu(Y, X, why));
        HS_TRY(gelu(Y, Y, why));
        HS_TRY(get(Y, wanted, why));
        equal += memcmp(made, wanted, BYTES) == 0 && made[N - 1] != 0.0f;
    }
    (void)printf("equal %d\n", equal);
    return HS_OK;
}

/* x w^T, of which nobody asked for an algorithm. */
static hs_args product_args(void) {
    const hs_linear_fwd_args a = {.y = arena + Y,
                                  .x = arena + X,
                                  .w = arena + Z,
                                  .R = 4,
                                  .N = 8,
                                  .K = 8,
                                  .ldy = 8,
                                  .ldx = 8,
                                  .dtype = HS_F32};
    return hs_linear_fwd_args_to(&a);
}

/* Inside of a capture: a kernel's first launch; an event; a copy from the host; a capture; memory; a question and a
 * wait, of another stream's event; a product that the library's seam refuses. */
static hs_status rule(const char *what, hs_why *why) {
    hs_graph *g;
    uint8_t *more;
    bool done;
    if (strcmp(what, "kernel") != 0) HS_TRY(gelu(Y, X, why));
    HS_TRY(backend->capture(device, HS_STREAM_COMPUTE, why));
    HS_TRY(gelu(Y, X, why));
    if (strcmp(what, "event") == 0) return backend->record(device, HS_STREAM_COMPUTE, MADE, why);
    if (strcmp(what, "follow") == 0) return backend->follow(device, HS_STREAM_COMPUTE, PUT, why);
    if (strcmp(what, "capture") == 0) return backend->capture(device, HS_STREAM_OUT, why);
    if (strcmp(what, "memory") == 0) return backend->alloc(device, BYTES, -1, &more, why);
    if (strcmp(what, "query") == 0) return backend->query(device, PUT, &done, why);
    if (strcmp(what, "wait") == 0) return backend->wait(device, PUT, why);
    if (strcmp(what, "product") == 0) {
        const hs_args args = product_args();
        return backend->launch(device, HS_STREAM_COMPUTE, HS_K_LINEAR_FWD, &args, 1, why);
    }
    if (strcmp(what, "copy") == 0)
        return backend->copy(device, HS_STREAM_COMPUTE, arena, host, BYTES, HS_COPY_TO_DEVICE, why);
    /* none: another stream is free to do all of it */
    HS_TRY(backend->copy(device, HS_STREAM_IN, arena, host, BYTES, HS_COPY_TO_DEVICE, why));
    HS_TRY(backend->record(device, HS_STREAM_IN, PUT, why));
    HS_TRY(backend->captured(device, HS_STREAM_COMPUTE, &g, why));
    return backend->wait(device, PUT, why);
}

static hs_status query(hs_why *why) {
    bool done;
    int asked = 0;
    HS_TRY(backend->query(device, GOT, &done, why));
    (void)printf("never recorded %d\n", done);
    for (int i = 0; i < 200; i++) HS_TRY(gelu(Y, X, why));
    HS_TRY(backend->record(device, HS_STREAM_COMPUTE, GOT, why));
    for (done = false; !done; asked++) HS_TRY(backend->query(device, GOT, &done, why));
    (void)printf("asked %s\n", asked > 1 ? "several times" : "once");
    return gelu(Y, X, why); /* what a query left behind is no failure of a launch */
}

/* The second half of memory that others made, and then what overlaps it. */
static hs_status pin(hs_why *why) {
    uint8_t *const made = aligned_alloc(4096, 2 * 4096);
    if (!made) return HS_E_MEMORY;
    fill((float *)(void *)(made + 4096), 0);
    hs_status st = backend->pin(device, made + 4096, 4096, why);
    if (st == HS_E_MEMORY) { /* its copies are slow, and right */
        (void)printf("%s\n", why->text);
        why->text[0] = 0;
        st = HS_OK;
    }
    if (st == HS_OK) st = put(X, made + 4096, why);
    if (st == HS_OK) st = get(X, made + 4096 + BYTES, why);
    if (st == HS_OK)
        (void)printf("equal %d\n", memcmp(made + 4096, made + 4096 + BYTES, BYTES) == 0);
    if (st == HS_OK) st = backend->pin(device, made, 2 * 4096, why);
    backend->close(device);
    device = NULL;
    free(made);
    return st;
}

/* A library refuses a product because the device has failed, of which nobody was told. */
static hs_status library(hs_why *why) {
    const char *const name = getenv("HOTSTAGE_CUDA");
    void *const opened = name ? dlopen(name, RTLD_NOW | RTLD_LOCAL) : NULL;
    void (*fail)(int error);
    *(void **)&fail = opened ? dlsym(opened, "hs_emulated_fail") : NULL;
    if (!fail) return hs_fail(why, HS_E_USAGE, "HOTSTAGE_CUDA names no emulated library");
    const hs_args args = product_args();
    const hs_product_table *const products = backend->products;
    hs_algorithm chosen;
    HS_TRY(products->need(device, HS_K_LINEAR_FWD, &args, why));
    HS_TRY(products->choose(device, &chosen, why));
    HS_TRY(products->use(device, &chosen, 1, why));
    HS_TRY(backend->launch(device, HS_STREAM_COMPUTE, HS_K_LINEAR_FWD, &args, 1, why));
    fail(214);
    return backend->launch(device, HS_STREAM_COMPUTE, HS_K_LINEAR_FWD, &args, 1, why);
}

static hs_status check(hs_why *why) {
    hs_check found;
    float *const x = (float *)(void *)host;
    HS_TRY(backend->check(device, arena, ARENA, &found, why));
    fill(x, 1);
    HS_TRY(get(X, x, why));
    int zeros = 0;
    for (int i = 0; i < N; i++) zeros += x[i] == 0.0f;
    (void)printf("zeros %d, %s\n", zeros,
                 found.gflops > 0 && found.us >= 0 ? "timed" : "not timed");
    return HS_OK;
}

/* After the first failure every call returns it. */
static hs_status fails(hs_why *why) {
    hs_why again[4] = {0};
    bool done;
    for (int i = 0; i < 8; i++) HS_TRY(gelu(Y, X, why));
    const hs_status st = get(Y, host, why);
    const hs_status others[4] = {
        gelu(Y, X, &again[0]), backend->query(device, GOT, &done, &again[1]),
        backend->record(device, HS_STREAM_SAVE, PUT, &again[2]), put(X, host, &again[3])};
    int same = 0;
    for (int i = 0; i < 4; i++) same += others[i] == st && strcmp(again[i].text, why->text) == 0;
    (void)printf("same %d\n", same);
    return st;
}

static hs_status run(const char *scenario, const hs_device_config *config, hs_why *why) {
    hs_device_facts facts;
    HS_TRY(hs_backend_load(HS_DEVICE_CUDA, &backend, why));
    HS_TRY(backend->open(config, &device, &facts, why));
    (void)printf("%s, %s, %s, %s, %u, %u, %u, %" PRIu64 " of %" PRIu64 "\n", facts.kernels,
                 facts.device, facts.uuid, facts.bus, facts.capability, facts.driver, facts.runtime,
                 facts.free_bytes, facts.memory_bytes);
    HS_TRY(backend->alloc(device, ARENA, -1, &arena, why));
    HS_TRY(backend->pinned(device, ARENA, &host, why));
    if (strcmp(scenario, "graph") == 0) return graph(why);
    if (strncmp(scenario, "rule-", 5) == 0) return rule(scenario + 5, why);
    if (strcmp(scenario, "query") == 0) return query(why);
    if (strcmp(scenario, "pin") == 0) return pin(why);
    if (strcmp(scenario, "library") == 0) return library(why);
    if (strcmp(scenario, "check") == 0) return check(why);
    if (strcmp(scenario, "fails") == 0) return fails(why);
    return strcmp(scenario, "open") == 0 ? HS_OK : HS_E_USAGE;
}

int main(int argc, char **argv) {
    uint64_t numbers[3] = {0, HS_PATH_AUTO, 0};
    hs_why why = {0};
    for (int i = 2; i < argc && i < 5; i++) numbers[i - 2] = strtoull(argv[i], NULL, 10);
    const hs_device_config config = {.index = (uint32_t)numbers[0],
                                     .kernel_path = (uint32_t)numbers[1],
                                     .bytes_needed = numbers[2]};
    const hs_status st = argc > 1 ? run(argv[1], &config, &why) : HS_E_USAGE;
    if (device) backend->close(device);
    if (st != HS_OK) (void)fprintf(stderr, "%s: %s\n", hs_status_name(st), why.text);
    return hs_status_exit(st);
}
