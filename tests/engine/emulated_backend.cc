/* What stands between an engine and the CUDA backend in the emulated library (tests/engine/cuda_lib.py), whose
 * hs_cuda_backend this is; the one of trainer/engine/backend/cuda goes by another name there.
 *
 * HS_EMULATED_DROP="S E N": the N-th follow (from 1) of event E by stream S is left out; HS_EMULATED_HASTE="E N": the
 * N-th wait for event E returns at once; HS_EMULATED_SLOW="E N M": it begins only when M other waits ended since the
 * N-th record of E. With HS_EMULATED_COUNTS close says on standard error, as a line of JSON, how
 * many follows (by stream, then event), waits (by event), launches, captures and replays there were, and how many bytes
 * were copied from or to memory of the host that is not pinned.
 *
 * HS_EMULATED_UNWAITED="N", HS_EMULATED_UNWRITTEN="N": the N-th wait for a value (from 1), or write of one, is left out.
 * HS_EMULATED_DIE="N": at the N-th write of a value the process is gone.
 *
 * HS_EMULATED_KERNELS=cpu: the CPU's portable kernels stand in for the .cu ones, on the same streams, and there are no
 * algorithms to choose. Either way a
 * kernel that is given an address which is not the device's is a fault. */
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/runtime.h"
extern "C" {
#include "backend/links.h"
#include "kernels/cuda/cuda.h"

const hs_backend *hs_cuda_backend_inside(void);
const hs_cuda_table *hs_emulated_kernels(void);
}

namespace {

struct {
    uint64_t follows[HS_STREAMS][HS_EVENTS], waits[HS_EVENTS], launches, captures, replays;
    uint64_t records[HS_EVENTS], ended,
        ended_at_record; /* waits that ended: now, and at HS_EMULATED_SLOW's record */
} count;
pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER; /* waits come from several threads */
pthread_cond_t one_ended = PTHREAD_COND_INITIALIZER;

void numbers(const char *name, uint64_t *a, uint64_t *b, uint64_t *c) {
    *a = *b = *c = UINT64_MAX;
    const char *text = getenv(name);
    if (text) (void)sscanf(text, "%" SCNu64 "%" SCNu64 "%" SCNu64, a, b, c);
}

const hs_backend *inside() {
    return hs_cuda_backend_inside();
}

void list(const char *name, const uint64_t *numbers, int n) {
    (void)fprintf(stderr, "\"%s\":[", name);
    for (int i = 0; i < n; i++) (void)fprintf(stderr, "%s%" PRIu64, i ? "," : "", numbers[i]);
    (void)fprintf(stderr, "],");
}

void close(hs_device *device) {
    if (device && getenv("HS_EMULATED_COUNTS")) {
        (void)fprintf(stderr, "{\"emulated\":{");
        list("follows", &count.follows[0][0], HS_STREAMS * HS_EVENTS);
        list("waits", count.waits, HS_EVENTS);
        (void)fprintf(stderr,
                      "\"launches\":%" PRIu64 ",\"captures\":%" PRIu64 ",\"replays\":%" PRIu64
                      ",\"unpinned\":%" PRIu64 "}}\n",
                      count.launches, count.captures, count.replays, hs_emulated_unpinned());
    }
    inside()->close(device);
}

hs_status launch(hs_device *device, int stream, uint16_t kernel, const hs_args *args,
                 uint32_t calls, hs_why *why) {
    count.launches++;
    return inside()->launch(device, stream, kernel, args, calls, why);
}

hs_status follow(hs_device *device, int stream, int event, hs_why *why) {
    uint64_t s, e, n;
    numbers("HS_EMULATED_DROP", &s, &e, &n);
    const uint64_t nth = ++count.follows[stream][event];
    if ((uint64_t)stream == s && (uint64_t)event == e && nth == n) return HS_OK;
    return inside()->follow(device, stream, event, why);
}

hs_status record(hs_device *device, int stream, int event, hs_why *why) {
    uint64_t e, n, others;
    numbers("HS_EMULATED_SLOW", &e, &n, &others);
    pthread_mutex_lock(&turn);
    if (++count.records[event] == n && (uint64_t)event == e) count.ended_at_record = count.ended;
    pthread_mutex_unlock(&turn);
    return inside()->record(device, stream, event, why);
}

hs_status wait(hs_device *device, int event, hs_why *why) {
    uint64_t e, n, none, slow, nth_slow, others;
    numbers("HS_EMULATED_HASTE", &e, &n, &none);
    numbers("HS_EMULATED_SLOW", &slow, &nth_slow, &others);
    pthread_mutex_lock(&turn);
    const uint64_t nth = ++count.waits[event];
    if ((uint64_t)event == slow && nth == nth_slow)
        while (count.ended < count.ended_at_record + others) pthread_cond_wait(&one_ended, &turn);
    pthread_mutex_unlock(&turn);
    const bool hasty = (uint64_t)event == e && nth == n;
    const hs_status st = hasty ? HS_OK : inside()->wait(device, event, why);
    pthread_mutex_lock(&turn);
    count.ended++;
    pthread_cond_broadcast(&one_ended);
    pthread_mutex_unlock(&turn);
    return st;
}

hs_status captured(hs_device *device, int stream, hs_graph **graph, hs_why *why) {
    count.captures++;
    return inside()->captured(device, stream, graph, why);
}

hs_status replay(hs_device *device, int stream, hs_graph *graph, hs_why *why) {
    count.replays++;
    return inside()->replay(device, stream, graph, why);
}

/* --- links ------------------------------------------------------------------------------- */

bool is_nth(const char *name, uint64_t nth) {
    uint64_t n, none, other;
    numbers(name, &n, &none, &other);
    return n == nth;
}

hs_status wait_value(hs_device *device, int stream, const uint8_t *at, uint32_t value,
                     hs_why *why) {
    static uint64_t nth;
    if (is_nth("HS_EMULATED_UNWAITED", ++nth)) return HS_OK;
    return inside()->links->wait_value(device, stream, at, value, why);
}

hs_status write_value(hs_device *device, int stream, uint8_t *at, uint32_t value, hs_why *why) {
    static uint64_t nth;
    nth++;
    if (is_nth("HS_EMULATED_DIE", nth)) (void)raise(SIGKILL);
    if (is_nth("HS_EMULATED_UNWRITTEN", nth)) return HS_OK;
    return inside()->links->write_value(device, stream, at, value, why);
}

/* --- kernels ----------------------------------------------------------------------------- */

bool of_the_device(const hs_args *args) {
    for (int o = 0; o < HS_CALL_PTRS; o++)
        if (args->ptr[o] && !hs_emulated::on_device(args->ptr[o], 1)) return false;
    return true;
}

struct call {
    uint16_t kernel;
    hs_args args;
};

int on_the_cpu(void *closure) {
    static void *scratch;
    const call *c = static_cast<call *>(closure);
    hs_kernel_ctx ctx = {NULL, NULL, hs_kernels_scratch_bytes(1), NULL};
    if (!scratch) scratch = aligned_alloc(64, (ctx.scratch_bytes + 63) / 64 * 64);
    ctx.scratch = scratch;
    return hs_kernels_portable.fn[c->kernel](&ctx, &c->args);
}

bool on_cpu() {
    const char *stand_in = getenv("HS_EMULATED_KERNELS");
    return stand_in && strcmp(stand_in, "cpu") == 0;
}

hs_status run(uint16_t kernel, const hs_cuda_ctx *ctx, const hs_args *args, uint32_t calls) {
    for (uint32_t i = 0; i < calls; i++)
        if (!of_the_device(&args[i]))
            return hs_fail(ctx->why, HS_E_BUG, "kernel %u got an address that is not the device's",
                           kernel);
    if (!on_cpu())
        return calls == 1 ? hs_cuda_kernels()->fn[kernel](ctx, args)
                          : hs_cuda_kernels()->together(kernel)(ctx, args, calls);
    for (uint32_t i = calls; i-- > 0;) { /* in any order */
        const call c = {kernel, args[i]};
        HS_TRY(hs_emulated::enqueue(static_cast<cudaStream_t>(ctx->stream), "cpu", on_the_cpu, &c,
                                    sizeof c));
    }
    return HS_OK;
}

#define X(number, NAME, name, ...)                                                                 \
    hs_status name(const hs_cuda_ctx *ctx, const hs_args *args) {                                  \
        return run(number, ctx, args, 1);                                                          \
    }
namespace kernel {
HS_KERNELS(X)
}
#undef X

#define X(NAME, name)                                                                              \
    hs_status name(const hs_cuda_ctx *ctx, const hs_args *args, uint32_t calls) {                  \
        return run(HS_K_##NAME, ctx, args, calls);                                                 \
    }
namespace together {
HS_CUDA_TOGETHER_KERNELS(X)
}
#undef X

hs_cuda_together_fn together_of(uint16_t kernel) {
    switch (kernel) {
#define X(NAME, name)                                                                              \
    case HS_K_##NAME:                                                                              \
        return together::name;
        HS_CUDA_TOGETHER_KERNELS(X)
#undef X
    default:
        return NULL;
    }
}

} // namespace

const hs_cuda_table *hs_emulated_kernels(void) {
    static const hs_cuda_table table = {
        HS_CUDA_VERSION,
        HS_K_COUNT,
        {NULL,
#define X(number, NAME, name, ...) kernel::name,
         HS_KERNELS(X)
#undef X
        },
        together_of,
    };
    return &table;
}

extern "C" const hs_backend *hs_cuda_backend(void) {
    static hs_backend table;
    table = *inside();
    table.close = close;
    table.launch = launch;
    table.follow = follow;
    table.record = record;
    table.wait = wait;
    table.captured = captured;
    table.replay = replay;
    if (on_cpu()) table.products = NULL;
    static hs_link_table links;
    links = *inside()->links;
    links.wait_value = wait_value;
    links.write_value = write_value;
    table.links = &links;
    return &table;
}
