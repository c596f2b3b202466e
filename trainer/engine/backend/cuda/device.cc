/* Memory, calls, copies, events and failures of an open device; the table. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cuda/device.h"
#include "backend/cuda/links.h"

extern "C" {
#include "core/clock.h"
}

namespace hs_cuda {

enum { SPIN_NS = 100 * 1000 }; /* a wait asks that long before it sleeps */
enum { PIECE = 2 << 20 };

/* --- failures ---------------------------------------------------------------------------- */

hs_status status_of(cudaError_t error) {
    switch (error) {
    case cudaErrorMemoryAllocation:
        return HS_E_MEMORY;
    /* Driver, device and this build do not fit each other: nothing is ill. */
    case cudaErrorStubLibrary:
    case cudaErrorInsufficientDriver:
    case cudaErrorCallRequiresNewerDriver:
    case cudaErrorNoDevice:
    case cudaErrorInvalidDevice:
    case cudaErrorInvalidKernelImage:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidPtx:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilationDisabled:
    case cudaErrorNotSupported:
    case cudaErrorCompatNotSupportedOnDevice:
    /* Neither is it where the service that shares a device among processes (MPS) takes no more. */
    case cudaErrorMpsConnectionFailed:
    case cudaErrorMpsServerNotReady:
    case cudaErrorMpsMaxClientsReached:
    case cudaErrorMpsMaxConnectionsReached:
        return HS_E_UNSUPPORTED;
    case cudaErrorInvalidValue:
    case cudaErrorInvalidConfiguration:
    case cudaErrorInvalidDevicePointer:
    case cudaErrorInvalidMemcpyDirection:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidResourceHandle:
    case cudaErrorIllegalState:
    case cudaErrorLaunchOutOfResources:
    case cudaErrorHostMemoryAlreadyRegistered:
    case cudaErrorHostMemoryNotRegistered:
    case cudaErrorNotPermitted:
    case cudaErrorStreamCaptureUnsupported:
    case cudaErrorStreamCaptureInvalidated:
    case cudaErrorStreamCaptureMerge:
    case cudaErrorStreamCaptureUnmatched:
    case cudaErrorStreamCaptureUnjoined:
    case cudaErrorStreamCaptureIsolation:
    case cudaErrorStreamCaptureImplicit:
    case cudaErrorCapturedEvent:
    case cudaErrorStreamCaptureWrongThread:
    /* What a kernel of ours, or of a library, did: the machine is not to blame, and HS_E_DEVICE would
     * leave it out of later launches. A device that is ill as well says so in the kernel's log. */
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
        return HS_E_BUG;
    default:
        return HS_E_DEVICE;
    }
}

static const char *kernel_name(uint16_t kernel) {
    switch (kernel) {
#define X(number, NAME, name, ...)                                                                 \
    case number:                                                                                   \
        return #name;
        HS_KERNELS(X)
#undef X
    default:
        return "of no number";
    }
}

static void describe(const doing *at, char *text, size_t room) {
    static const char *const streams[HS_STREAMS] = {"compute", "in", "out", "save"};
    static const char *const whats[] = {"nothing",
                                        "kernel ",
                                        "a copy to the device",
                                        "a copy to the host",
                                        "a copy on the device",
                                        "a graph of kernels"};
    (void)snprintf(text, room, " (stream %s, last given %s%s)", streams[at->stream], whats[at->is],
                   at->is == KERNEL ? kernel_name(at->kernel) : "");
}

hs_status failed(hs_device *d, cudaError_t error, const doing *at, const char *action,
                 hs_why *why) {
    char place[96] = "";
    if (at) describe(at, place, sizeof place);
    (void)cudaGetLastError();
    (void)pthread_mutex_lock(&d->lock);
    if (d->status == HS_OK) {
        const hs_status st = status_of(error);
        (void)hs_fail(&d->why, st, "CUDA device %d (%s), %s%s: %s (%s)", d->index, d->name, action,
                      place, cudaGetErrorString(error), cudaGetErrorName(error));
        __atomic_store_n(&d->status, st, __ATOMIC_RELEASE);
    }
    (void)pthread_mutex_unlock(&d->lock);
    return sound(d, why);
}

hs_status sound(hs_device *d, hs_why *why) {
    const hs_status st = __atomic_load_n(&d->status, __ATOMIC_ACQUIRE);
    return st == HS_OK ? HS_OK : hs_fail(why, st, "%s", d->why.text);
}

hs_status here(hs_device *d, hs_why *why) {
    HS_TRY(sound(d, why));
    const cudaError_t error = cudaSetDevice(d->index);
    return error == cudaSuccess ? HS_OK : failed(d, error, NULL, "turning to it", why);
}

cudaError_t error_of(const hs_device *d) {
    (void)cudaGetLastError();
    if (d->capturing >= 0) return cudaSuccess;
    const cudaError_t error = cudaStreamQuery(d->streams[HS_STREAM_SAVE]);
    (void)cudaGetLastError();
    return error == cudaErrorNotReady ? cudaSuccess : error;
}

/* --- memory ------------------------------------------------------------------------------ */

/* For memory that does not come: not a failure for good. */
static hs_status no_room(hs_device *d, cudaError_t error, size_t bytes, const char *what,
                         hs_why *why) {
    size_t free = 0, total = 0;
    if (error != cudaErrorMemoryAllocation) return failed(d, error, NULL, what, why);
    (void)cudaGetLastError(); /* a launch would find it */
    (void)cudaMemGetInfo(&free, &total);
    return hs_fail(why, HS_E_MEMORY,
                   "CUDA device %d (%s), %s: %zu bytes are not to be had; the device has %zu free "
                   "of %zu",
                   d->index, d->name, what, bytes, free, total);
}

static void keep(hs_device *d, void *at, bool of_host) {
    d->memory[d->memories] = at;
    d->of_host[d->memories++] = of_host;
}

/* Memory comes as it was left: zeroed here. What cudaMalloc gives is aligned to 256 bytes; whole
 * pieces of PIECE are an allocation of the driver's own, as sharing it with a process needs. */
static hs_status alloc(hs_device *d, size_t bytes, int fd, uint8_t **at, hs_why *why) {
    (void)fd;
    void *memory = NULL;
    HS_ASSERT(d->memories < HS_DEVICE_ARENAS);
    HS_TRY(sound(d, why));
    cudaError_t error =
        cudaMalloc(&memory, bytes ? (bytes + PIECE - 1) / PIECE * PIECE : (size_t)PIECE);
    if (error != cudaSuccess) return no_room(d, error, bytes, "memory of the device", why);
    keep(d, memory, false);
    cudaStream_t stream = d->streams[HS_STREAM_COMPUTE];
    error = cudaMemsetAsync(memory, 0, bytes, stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
    if (error != cudaSuccess) return failed(d, error, NULL, "zeroing its memory", why);
    *at = static_cast<uint8_t *>(memory);
    return HS_OK;
}

static hs_status pinned(hs_device *d, size_t bytes, uint8_t **at, hs_why *why) {
    void *memory = NULL;
    HS_ASSERT(d->memories < HS_DEVICE_ARENAS);
    HS_TRY(sound(d, why));
    const cudaError_t error = cudaHostAlloc(&memory, bytes ? bytes : 1, cudaHostAllocDefault);
    if (error == cudaErrorMemoryAllocation) {
        (void)cudaGetLastError();
        return hs_fail(
            why, HS_E_MEMORY,
            "the system has no %zu bytes of memory that can be pinned for CUDA device %d: "
            "raise the memory limit of the container",
            bytes, d->index);
    }
    if (error != cudaSuccess) return failed(d, error, NULL, "pinned memory of the host", why);
    keep(d, memory, true);
    memset(memory, 0, bytes);
    *at = static_cast<uint8_t *>(memory);
    return HS_OK;
}

static hs_status pin(hs_device *d, void *at, size_t bytes, hs_why *why) {
    HS_ASSERT(d->pin_count < HS_DEVICE_PINS);
    HS_TRY(sound(d, why));
    const cudaError_t error = cudaHostRegister(at, bytes, cudaHostRegisterDefault);
    if (error == cudaSuccess) {
        d->pins[d->pin_count++] = at;
        return HS_OK;
    }
    if (error == cudaErrorHostMemoryAlreadyRegistered || error_of(d) != cudaSuccess)
        return failed(d, error, NULL, "pinning memory of the host", why);
    return hs_fail(why, HS_E_MEMORY,
                   "the system does not pin %zu bytes of memory for CUDA device %d: %s (%s); raise "
                   "the memory limit of the container, and the limit of locked memory (ulimit -l)",
                   bytes, d->index, cudaGetErrorString(error), cudaGetErrorName(error));
}

/* --- work -------------------------------------------------------------------------------- */

/* After a call that put something on a stream. */
static hs_status put(hs_device *d, int stream, doing what, cudaError_t error, hs_why *why) {
    d->last[stream] = what;
    if (error == cudaSuccess && d->one_at_a_time && d->capturing < 0)
        error = cudaStreamSynchronize(d->streams[stream]);
    return error == cudaSuccess ? HS_OK : failed(d, error, &what, "giving it work", why);
}

static uint32_t together(uint16_t kernel) {
    static_assert((int)HS_CUDA_TOGETHER <= (int)HS_TOGETHER, "calls of a launch");
    return hs_cuda_kernels()->together(kernel) ? HS_CUDA_TOGETHER : 1;
}

static hs_status launch(hs_device *d, int stream, uint16_t kernel, const hs_args *args,
                        uint32_t count, hs_why *why) {
    HS_TRY(sound(d, why));
    hs_cuda_ctx ctx = d->kernels;
    ctx.stream = d->streams[stream];
    ctx.why = why;
    const doing what = {stream, KERNEL, kernel};
    const hs_status st = count == 1 ? d->table->fn[kernel](&ctx, args)
                                    : d->table->together(kernel)(&ctx, args, count);
    const cudaError_t error = cudaPeekAtLastError();
    if (st == HS_OK || error != cudaSuccess) return put(d, stream, what, error, why);
    /* a library has a runtime of its own: what it refused may be the device's failure */
    const cudaError_t own = error_of(d);
    if (own != cudaSuccess) {
        if (why) why->text[0] = 0; /* the library's words */
        return put(d, stream, what, own, why);
    }
    return hs_fail(why, st, "kernel %s on CUDA device %d (%s): %s", kernel_name(kernel), d->index,
                   d->name, hs_status_text(st));
}

/* From pageable memory a copy may keep the host waiting, and is right all the same. */
static hs_status copy(hs_device *d, int stream, void *to, const void *from, size_t bytes,
                      hs_copy direction, hs_why *why) {
    static const cudaMemcpyKind ways[] = {cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost,
                                          cudaMemcpyDeviceToDevice};
    static const what whats[] = {TO_DEVICE, FROM_DEVICE, ON_DEVICE};
    const int way = direction - HS_COPY_TO_DEVICE;
    HS_TRY(sound(d, why));
    if (bytes == 0) return HS_OK;
    const cudaError_t error = cudaMemcpyAsync(to, from, bytes, ways[way], d->streams[stream]);
    return put(d, stream, doing{stream, whats[way], 0}, error, why);
}

/* In a capture an event would become a part of the graph, and its waiters part of the capture. */
static hs_status outside(hs_device *d, int stream, hs_why *why) {
    HS_TRY(sound(d, why));
    return d->capturing == stream
               ? hs_fail(why, HS_E_BUG, "an event of stream %d inside of a capture", stream)
               : HS_OK;
}

static hs_status record(hs_device *d, int stream, int event, hs_why *why) {
    HS_TRY(outside(d, stream, why));
    const cudaError_t error = cudaEventRecord(d->events[event], d->streams[stream]);
    d->before[event] = d->last[stream];
    d->before[event].stream = stream;
    return error == cudaSuccess ? HS_OK : failed(d, error, &d->before[event], "an event", why);
}

static hs_status follow(hs_device *d, int stream, int event, hs_why *why) {
    HS_TRY(outside(d, stream, why));
    const cudaError_t error = cudaStreamWaitEvent(d->streams[stream], d->events[event], 0);
    return error == cudaSuccess ? HS_OK : failed(d, error, &d->last[stream], "an event", why);
}

/* cudaErrorNotReady is an answer, but stays the thread's last error, which launches look at. */
static cudaError_t ask(cudaEvent_t event) {
    const cudaError_t error = cudaEventQuery(event);
    if (error == cudaErrorNotReady) (void)cudaGetLastError();
    return error;
}

/* Asks for a while, as what is waited for is often done soon and a thread that sleeps wakes late;
 * then sleeps. */
static hs_status wait(hs_device *d, int event, hs_why *why) {
    HS_TRY(here(d, why));
    const int64_t until = hs_clock_ns() + SPIN_NS;
    cudaError_t error = ask(d->events[event]);
    while (error == cudaErrorNotReady && hs_clock_ns() < until) error = ask(d->events[event]);
    if (error == cudaErrorNotReady) error = cudaEventSynchronize(d->events[event]);
    if (error != cudaSuccess) return failed(d, error, &d->before[event], "waited for", why);
    return HS_OK;
}

static hs_status query(hs_device *d, int event, bool *done, hs_why *why) {
    *done = false;
    HS_TRY(here(d, why));
    const cudaError_t error = ask(d->events[event]);
    *done = error == cudaSuccess;
    if (error == cudaSuccess || error == cudaErrorNotReady) return HS_OK;
    return failed(d, error, &d->before[event], "asked for", why);
}

/* --- graphs ------------------------------------------------------------------------------ */

/* Thread-local: what this thread does that a capture forbids (to allocate, to wait for a device)
 * spoils it, and other threads may go on. */
static hs_status capture(hs_device *d, int stream, hs_why *why) {
    HS_TRY(sound(d, why));
    if (d->capturing >= 0)
        return hs_fail(why, HS_E_BUG, "a capture of stream %d inside of another", stream);
    const cudaError_t error =
        cudaStreamBeginCapture(d->streams[stream], cudaStreamCaptureModeThreadLocal);
    if (error != cudaSuccess) return failed(d, error, &d->last[stream], "a capture", why);
    d->capturing = stream;
    return HS_OK;
}

static hs_status captured(hs_device *d, int stream, hs_graph **graph, hs_why *why) {
    *graph = NULL;
    if (d->capturing != stream)
        return hs_fail(why, HS_E_BUG, "no capture of stream %d to end", stream);
    d->capturing = -1;
    cudaGraph_t made = NULL;
    hs_graph *g = static_cast<hs_graph *>(calloc(1, sizeof *g));
    cudaError_t error = cudaStreamEndCapture(d->streams[stream], &made);
    if (error == cudaSuccess && g) error = cudaGraphInstantiate(&g->exec, made, 0);
    if (made) (void)cudaGraphDestroy(made);
    if (!g) return hs_fail(why, HS_E_MEMORY, "no memory for a graph");
    if (error != cudaSuccess) {
        free(g);
        return failed(d, error, &d->last[stream], "a graph", why);
    }
    g->next = d->graphs;
    d->graphs = g;
    /* else the first replay does it, inside of a step */
    error = cudaGraphUpload(g->exec, d->streams[stream]);
    if (error != cudaSuccess) return failed(d, error, &d->last[stream], "a graph", why);
    *graph = g;
    return HS_OK;
}

static hs_status replay(hs_device *d, int stream, hs_graph *graph, hs_why *why) {
    HS_TRY(sound(d, why));
    const cudaError_t error = cudaGraphLaunch(graph->exec, d->streams[stream]);
    return put(d, stream, doing{stream, GRAPH, 0}, error, why);
}

} // namespace hs_cuda

/* In the order of hs_backend: C++ of this age names no fields. */
static const hs_backend table = {
    HS_BACKEND_VERSION,
    "cuda",
    false,
    hs_cuda::devices,
    hs_cuda::open,
    hs_cuda::close,
    hs_cuda::alloc,
    hs_cuda::pinned,
    hs_cuda::pin,
    hs_cuda::check,
    hs_cuda::together,
    hs_cuda::launch,
    hs_cuda::copy,
    hs_cuda::record,
    hs_cuda::follow,
    hs_cuda::wait,
    hs_cuda::query,
    nullptr, /* settle */
    hs_cuda::capture,
    hs_cuda::captured,
    hs_cuda::replay,
    &hs_cuda::products,
    &hs_cuda::links,
};

extern "C" __attribute__((visibility("default"))) const hs_backend *hs_cuda_backend(void) {
    return &table;
}
