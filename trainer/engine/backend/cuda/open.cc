/* From a machine to an open device, and every reason why there is none. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cuda/device.h"

extern "C" {
#include "core/clock.h"
#include "kernels/cuda/libraries.h"
}

namespace hs_cuda {

enum { CLOSE_MS = 2000 }; /* for work that may wait for a peer that is gone */

static double gib(uint64_t bytes) {
    return (double)bytes / (double)(UINT64_C(1) << 30);
}

/* Why the runtime finds no device. Asking for the driver's version needs none. */
static hs_status no_devices(cudaError_t error, hs_why *why) {
    int driver = 0, runtime = 0;
    (void)cudaDriverGetVersion(&driver);
    (void)cudaRuntimeGetVersion(&runtime);
    (void)cudaGetLastError();
    if (error == cudaErrorInsufficientDriver && driver == 0)
        return hs_fail(why, HS_E_UNSUPPORTED,
                       "there is no NVIDIA driver here: run on a machine that has one (nvidia-smi "
                       "shows it; in a container, nvidia.com/gpu asks for it), or set "
                       "parallel.device = \"cpu\"");
    if (error == cudaErrorInsufficientDriver)
        return hs_fail(
            why, HS_E_UNSUPPORTED,
            "the NVIDIA driver here is for CUDA %d.%d, this hotstage needs %d.%d: update "
            "the driver, or set parallel.device = \"cpu\"",
            driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    if (error == cudaErrorNoDevice || error == cudaSuccess)
        return hs_fail(why, HS_E_UNSUPPORTED,
                       "there is an NVIDIA driver but no CUDA device: look at nvidia-smi and at "
                       "CUDA_VISIBLE_DEVICES, or set parallel.device = \"cpu\"");
    return hs_fail(why, status_of(error), "CUDA devices cannot be counted: %s (%s)",
                   cudaGetErrorString(error), cudaGetErrorName(error));
}

static hs_status look_at(int index, hs_device_facts *facts, int *processors, hs_why *why) {
    static cudaDeviceProp p; /* a kilobyte */
    const cudaError_t error = cudaGetDeviceProperties(&p, index);
    if (error != cudaSuccess)
        return hs_fail(why, status_of(error), "CUDA device %d does not answer: %s (%s)", index,
                       cudaGetErrorString(error), cudaGetErrorName(error));
    memset(facts, 0, sizeof *facts);
    (void)snprintf(facts->device, sizeof facts->device, "%.95s", p.name);
    int at = snprintf(facts->uuid, sizeof facts->uuid, "GPU-");
    for (int i = 0; i < 16; i++)
        at += snprintf(facts->uuid + at, sizeof facts->uuid - (size_t)at, "%s%02x",
                       i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "",
                       (unsigned)(unsigned char)p.uuid.bytes[i]);
    char bus[32] = ""; /* "0000:3B:00.0" */
    if (cudaDeviceGetPCIBusId(bus, sizeof bus, index) == cudaSuccess) {
        bus[strcspn(bus, ".")] = 0;
        for (size_t i = 0; bus[i] && i + 1 < sizeof facts->bus; i++)
            facts->bus[i] = (char)(bus[i] >= 'A' && bus[i] <= 'F' ? bus[i] - 'A' + 'a' : bus[i]);
    }
    facts->capability = (uint32_t)(p.major * 10 + p.minor);
    facts->memory_bytes = p.totalGlobalMem;
    int version = 0;
    if (cudaDriverGetVersion(&version) == cudaSuccess) facts->driver = (uint32_t)version;
    if (cudaRuntimeGetVersion(&version) == cudaSuccess) facts->runtime = (uint32_t)version;
    *processors = p.multiProcessorCount;
    (void)cudaGetLastError(); /* what was not to be had is no failure, and a launch would find it */
    return HS_OK;
}

hs_status devices(hs_device_facts *list, uint32_t room, uint32_t *count, hs_why *why) {
    int found = 0, processors;
    *count = 0;
    const cudaError_t error = cudaGetDeviceCount(&found);
    if (error != cudaSuccess || found == 0) return no_devices(error, why);
    for (int i = 0; i < found && (uint32_t)i < room; i++)
        HS_TRY(look_at(i, &list[i], &processors, why));
    *count = (uint32_t)found;
    return HS_OK;
}

static hs_status check_path(uint32_t path, hs_why *why) {
    static const char *const names[] = {
#define X(number, NAME, name) name,
        HS_PATHS(X)
#undef X
    };
    if (path == HS_PATH_AUTO || path == HS_PATH_CUDA || path == HS_PATH_CUDA_EXACT) return HS_OK;
    if (path >= HS_PATH_COUNT)
        return hs_fail(why, HS_E_UNSUPPORTED,
                       "there is no kernel path %" PRIu32 "; they are numbered from 0 to %d", path,
                       HS_PATH_COUNT - 1);
    return hs_fail(why, HS_E_UNSUPPORTED,
                   "kernel path %s runs on the CPU, and this rank runs on a CUDA device; choose "
                   "launch.kernel_path auto, cuda or cuda-exact, or run on the CPU",
                   names[path]);
}

/* Why the device gives this process no context: its compute mode may say so, which is nobody's failure. */
static hs_status unavailable(hs_device *d, cudaError_t error, const char *uuid, hs_why *why) {
    int mode = cudaComputeModeDefault;
    if (cudaDeviceGetAttribute(&mode, cudaDevAttrComputeMode, d->index) != cudaSuccess ||
        mode == cudaComputeModeDefault)
        return failed(d, error, NULL, "opening it", why);
    (void)cudaGetLastError();
    const bool none = mode == cudaComputeModeProhibited;
    return hs_fail(why, HS_E_UNSUPPORTED,
                   "CUDA device %d (%s) is in compute mode %s: %s, or set the mode to default "
                   "(nvidia-smi -i %s -c DEFAULT)",
                   d->index, d->name, none ? "prohibited" : "exclusive-process",
                   none ? "use another device (HOTSTAGE_DEVICES)"
                        : "another process has it, a rank of this run perhaps; give each rank a "
                          "device of its own (HOTSTAGE_DEVICES)",
                   uuid);
}

/* The device exists, is new enough, answers, and has room. */
static hs_status choose(const hs_device_config *config, hs_device *d, hs_device_facts *facts,
                        hs_why *why) {
    uint32_t count = 0;
    HS_TRY(check_path(config->kernel_path, why));
    HS_TRY(devices(NULL, 0, &count, why));
    if (config->index >= count)
        return hs_fail(why, HS_E_UNSUPPORTED,
                       "there is no CUDA device %" PRIu32 ": this machine shows %" PRIu32
                       " (numbered from 0); look at HOTSTAGE_DEVICES and CUDA_VISIBLE_DEVICES",
                       config->index, count);
    d->index = (int)config->index;
    HS_TRY(look_at(d->index, facts, &d->processors, why));
    memcpy(d->name, facts->device, sizeof d->name);
    if (facts->capability < OLDEST)
        return hs_fail(why, HS_E_UNSUPPORTED,
                       "CUDA device %d (%s) has compute capability %u.%u; hotstage needs %d.%d (an "
                       "A100) or newer",
                       d->index, d->name, facts->capability / 10, facts->capability % 10,
                       OLDEST / 10, OLDEST % 10);
    size_t free = 0, total = 0;
    cudaError_t error = cudaSetDevice(d->index); /* makes the context: a busy device says so here */
    if (error == cudaErrorDevicesUnavailable) return unavailable(d, error, facts->uuid, why);
    if (error == cudaSuccess) error = cudaMemGetInfo(&free, &total);
    if (error != cudaSuccess) return failed(d, error, NULL, "opening it", why);
    facts->free_bytes = free;
    facts->memory_bytes = total;
    const uint64_t needed = config->bytes_needed + HS_CUDA_WORKSPACE;
    if (needed > free)
        return hs_fail(why, HS_E_MEMORY,
                       "CUDA device %d (%s) has %.2f GiB free of %.2f GiB, and this rank needs "
                       "%.2f GiB (its plan %.2f, its workspace %.2f): free the device (nvidia-smi "
                       "shows who is on it), take more stages (parallel.stages) or a smaller "
                       "train.microbatch",
                       d->index, d->name, gib(free), gib(total), gib(needed),
                       gib(config->bytes_needed), gib(HS_CUDA_WORKSPACE));
    return HS_OK;
}

/* Streams that do not wait for the default one; messages go before kernels and snapshots. */
static cudaError_t make_streams(hs_device *d) {
    int least = 0, greatest = 0;
    cudaError_t error = cudaDeviceGetStreamPriorityRange(&least, &greatest);
    for (int s = 0; error == cudaSuccess && s < HS_STREAMS; s++)
        error = cudaStreamCreateWithPriority(&d->streams[s], cudaStreamNonBlocking,
                                             s == HS_STREAM_IN || s == HS_STREAM_OUT ? greatest
                                                                                     : least);
    /* no times; a wait that does not spin */
    for (int e = 0; error == cudaSuccess && e < HS_EVENTS; e++)
        error =
            cudaEventCreateWithFlags(&d->events[e], cudaEventDisableTiming | cudaEventBlockingSync);
    return error;
}

static hs_status make(const hs_device_config *config, hs_device *d, hs_device_facts *facts,
                      hs_why *why) {
    HS_TRY(choose(config, d, facts, why));
    cudaError_t error = make_streams(d);
    if (error == cudaSuccess) error = cudaMalloc(&d->kernels.workspace, HS_CUDA_WORKSPACE);
    if (error != cudaSuccess) return failed(d, error, NULL, "opening it", why);
    d->table = hs_cuda_kernels();
    d->kernels.path = config->kernel_path == HS_PATH_CUDA_EXACT ? HS_PATH_CUDA_EXACT : HS_PATH_CUDA;
    d->kernels.capability = facts->capability;
    d->kernels.processors = (uint32_t)d->processors;
    d->kernels.workspace_bytes = HS_CUDA_WORKSPACE;
    if (d->kernels.path == HS_PATH_CUDA)
        HS_TRY(hs_products_create(d->name, facts->capability, &d->kernels.products, why));
    facts->kernels = d->kernels.path == HS_PATH_CUDA ? "cuda" : "cuda-exact";
    facts->scratch_bytes = HS_CUDA_WORKSPACE;
    return HS_OK;
}

hs_status open(const hs_device_config *config, hs_device **device, hs_device_facts *facts,
               hs_why *why) {
    *device = NULL;
    hs_device *d = static_cast<hs_device *>(calloc(1, sizeof *d));
    if (!d) return hs_fail(why, HS_E_MEMORY, "no memory for a device");
    d->capturing = -1;
    d->one_at_a_time = getenv("HOTSTAGE_CUDA_SYNC") != NULL;
    (void)pthread_mutex_init(&d->lock, NULL);
    const hs_status st = make(config, d, facts, why);
    if (st != HS_OK)
        close(d);
    else
        *device = d;
    return st;
}

/* Whether all work is done, or none will be. A device that waits for a peer that is gone is left as
 * it is: this process ends, and the driver takes back what it had. */
static bool came_to_rest(hs_device *d) {
    const int64_t until = hs_deadline_ns(CLOSE_MS);
    for (int s = 0; s < HS_STREAMS; s++) {
        cudaError_t error = cudaErrorNotReady;
        while (d->streams[s] && error == cudaErrorNotReady) {
            error = cudaStreamQuery(d->streams[s]);
            (void)cudaGetLastError();
            if (error != cudaErrorNotReady) break;
            if (hs_clock_ns() > until) return false;
            const struct timespec pause = {0, 100000};
            (void)nanosleep(&pause, NULL);
        }
    }
    return true;
}

void close(hs_device *d) {
    if (!d) return;
    if (came_to_rest(d)) {
        hs_products_destroy(d->kernels.products);
        for (hs_graph *g = d->graphs, *next; g; g = next) {
            next = g->next;
            (void)cudaGraphExecDestroy(g->exec);
            free(g);
        }
        for (int i = 0; i < d->pin_count; i++) (void)cudaHostUnregister(d->pins[i]);
        for (int i = 0; i < d->memories; i++)
            (void)(d->of_host[i] ? cudaFreeHost(d->memory[i]) : cudaFree(d->memory[i]));
        if (d->kernels.workspace) (void)cudaFree(d->kernels.workspace);
        for (int e = 0; e < HS_EVENTS; e++)
            if (d->events[e]) (void)cudaEventDestroy(d->events[e]);
        for (int s = 0; s < HS_STREAMS; s++)
            if (d->streams[s]) (void)cudaStreamDestroy(d->streams[s]);
    }
    (void)cudaGetLastError();
    (void)pthread_mutex_destroy(&d->lock);
    free(d);
}

} // namespace hs_cuda
