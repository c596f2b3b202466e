/* Between CUDA devices of two processes: memory shared by IPC handles, values that streams wait for
 * and write (driver calls, got through the runtime: nothing links libcuda), and NCCL.
 *
 * The flags lie in device memory that is shared like the messages' own, not in registered host
 * memory, which would be legal too: a flag is written on the way that the message took, right behind it, to
 * the device that waits for it, and that device polls its own memory. A write of a value is fenced
 * for the whole system by the driver (CU_STREAM_WRITE_VALUE_DEFAULT). */
#include "backend/cuda/links.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cuda/device.h"
#include "backend/cuda/nccl.h"

extern "C" {
#include "core/clock.h"
}

/* One direction between two devices: a communicator of two ranks, of which 0 sends. */
struct hs_link {
    hs_device *device;
    nccl::comm comm;
};

namespace hs_cuda {
namespace {

/* cuda.h: CUresult is an enum of which 0 is success, CUdeviceptr unsigned long long, cuuint32_t 32 bits */
typedef int (*value_fn)(cudaStream_t stream, unsigned long long at, uint32_t value, unsigned flags);
enum : unsigned { WAIT_EQUAL = 1, WRITE_FENCED = 0 };

enum {
    DRIVER_API = 12000, /* from 12.0 on these calls have one form */
    LEAVE_MS = 2000,
    CTAS = 8, /* of a communicator, at most: messages go beside kernels that want the processors */
};

/* Of the process: a library is opened once. */
struct {
    bool looked;
    value_fn wait, write;
    cudaStream_t aside; /* for looks, on which nothing waits */
    bool nccl_looked;
    hs_status nccl_status;
    hs_why nccl_why;
    nccl::api nccl;
} found;

value_fn driver_call(const char *name) {
    void *call = NULL;
    cudaDriverEntryPointQueryResult answer;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion(name, &call, DRIVER_API, cudaEnableDefault, &answer);
    if (error != cudaSuccess || answer != cudaDriverEntryPointSuccess) call = NULL;
    (void)cudaGetLastError();
    return reinterpret_cast<value_fn>(call);
}

void look(hs_device *d) {
    (void)d;
    if (found.looked) return;
    found.looked = true;
    found.wait = driver_call("cuStreamWaitValue32");
    found.write = driver_call("cuStreamWriteValue32");
}

/* The peer's or the network's fault, the device's where it says so itself, else the call's: HS_E_DEVICE would leave the
 * machine out of later launches. */
hs_status nccl_fail(hs_device *d, nccl::comm c, nccl::result error, const char *doing,
                    hs_why *why) {
    const cudaError_t own =
        error == nccl::UNHANDLED_CUDA_ERROR ? error_of(d) : (cudaError_t)cudaSuccess;
    if (own != cudaSuccess) return failed(d, own, NULL, doing, why);
    const char *more = found.nccl.GetLastError(c);
    const bool lost = error == nccl::REMOTE_ERROR || error == nccl::SYSTEM_ERROR;
    return hs_fail(why, lost ? HS_E_LOST : HS_E_BUG, "NCCL, %s: %s%s%.300s", doing,
                   found.nccl.GetErrorString(error), more && more[0] ? ": " : "", more ? more : "");
}

hs_status facts(hs_device *d, bool use_library, hs_link_facts *f, hs_why *why) {
    memset(f, 0, sizeof *f);
    static cudaDeviceProp p; /* a kilobyte */
    HS_TRY(here(d, why));
    cudaError_t error = cudaGetDeviceProperties(&p, d->index);
    if (error != cudaSuccess) return failed(d, error, NULL, "its properties", why);
    memcpy(f->device, p.uuid.bytes, sizeof f->device);
    look(d);
    int can = 0;
    error = cudaDeviceGetAttribute(&can, cudaDevAttrIpcEventSupport, d->index);
    (void)cudaGetLastError();
    f->shares_memory = error == cudaSuccess && can && found.wait && found.write;
    if (!f->shares_memory)
        (void)snprintf(f->why, sizeof f->why, "the driver here has no %s",
                       found.wait && found.write ? "memory that processes share (CUDA IPC)"
                                                 : "streams that wait for values");
    if (!use_library) return HS_OK;
    if (!found.nccl_looked) {
        found.nccl_looked = true;
        found.nccl_status = nccl::open(&found.nccl, &found.nccl_why);
    }
    if (found.nccl_status == HS_OK)
        f->library = (uint32_t)found.nccl.version;
    else
        (void)snprintf(f->why + strlen(f->why), sizeof f->why - strlen(f->why), "%s%.150s",
                       f->why[0] ? "; " : "", found.nccl_why.text);
    return HS_OK;
}

/* --- shared memory ----------------------------------------------------------------------- */

/* The allocation in which `at` lies: handles are of whole ones. */
uint8_t *start_of(const hs_device *d, const uint8_t *at) {
    uint8_t *best = NULL;
    for (int i = 0; i < d->memories; i++) {
        uint8_t *base = static_cast<uint8_t *>(d->memory[i]);
        if (!d->of_host[i] && base <= at && base > best) best = base;
    }
    return best;
}

/* Refused by the system, not a fault of the device. */
hs_status refused(hs_device *d, cudaError_t error, const char *what, hs_why *why) {
    (void)cudaGetLastError();
    return hs_fail(why, HS_E_UNSUPPORTED, "CUDA device %d (%s) %s: %s (%s)", d->index, d->name,
                   what, cudaGetErrorString(error), cudaGetErrorName(error));
}

hs_status export_memory(hs_device *d, const uint8_t *at, uint64_t bytes, hs_link_memory *memory,
                        hs_why *why) {
    static_assert(sizeof(cudaIpcMemHandle_t) == HS_LINK_HANDLE_BYTES, "backend/links.h");
    cudaIpcMemHandle_t handle;
    HS_TRY(here(d, why));
    uint8_t *base = start_of(d, at);
    HS_ASSERT(base != NULL);
    const cudaError_t error = cudaIpcGetMemHandle(&handle, base);
    if (error != cudaSuccess) return refused(d, error, "does not share its memory", why);
    memcpy(memory->handle, &handle, sizeof handle);
    memory->offset = (uint64_t)(at - base);
    memory->bytes = bytes;
    return HS_OK;
}

/* What was opened, by the address that was given out. The same allocation opened again is the same
 * address, counted by the driver. */
struct imported {
    uint8_t *at, *base;
};
enum { IMPORTS = 4096 };
imported imports[IMPORTS];
int import_count;

hs_status import_memory(hs_device *d, const hs_link_memory *memory, uint8_t **at, hs_why *why) {
    cudaIpcMemHandle_t handle;
    void *base = NULL;
    *at = NULL;
    HS_TRY(here(d, why));
    if (import_count == IMPORTS)
        return hs_fail(why, HS_E_UNSUPPORTED, "no room for more than %d memories of peers",
                       IMPORTS);
    memcpy(&handle, memory->handle, sizeof handle);
    const cudaError_t error = cudaIpcOpenMemHandle(&base, handle, cudaIpcMemLazyEnablePeerAccess);
    if (error != cudaSuccess) return refused(d, error, "does not reach its peer's memory", why);
    *at = static_cast<uint8_t *>(base) + memory->offset;
    imports[import_count++] = imported{*at, static_cast<uint8_t *>(base)};
    return HS_OK;
}

void release(hs_device *d, uint8_t *at) {
    hs_why why = {""};
    if (here(d, &why) != HS_OK) return;
    for (int i = 0; i < import_count; i++) {
        if (imports[i].at != at) continue;
        (void)cudaIpcCloseMemHandle(imports[i].base);
        (void)cudaGetLastError();
        imports[i] = imports[--import_count];
        return;
    }
}

hs_status value(hs_device *d, int stream, const uint8_t *at, uint32_t number, bool wait,
                hs_why *why) {
    HS_TRY(sound(d, why));
    const unsigned long long address = (unsigned long long)(uintptr_t)at;
    const int result = wait ? found.wait(d->streams[stream], address, number, WAIT_EQUAL)
                            : found.write(d->streams[stream], address, number, WRITE_FENCED);
    if (result == 0) return HS_OK;
    const cudaError_t error = cudaPeekAtLastError();
    return failed(d, error == cudaSuccess ? static_cast<cudaError_t>(result) : error, NULL,
                  wait ? "a wait for a value" : "a write of a value", why);
}

hs_status wait_value(hs_device *d, int stream, const uint8_t *at, uint32_t number, hs_why *why) {
    return value(d, stream, at, number, true, why);
}

hs_status write_value(hs_device *d, int stream, uint8_t *at, uint32_t number, hs_why *why) {
    return value(d, stream, at, number, false, why);
}

hs_status peek(hs_device *d, const uint8_t *at, uint32_t *number, hs_why *why) {
    HS_TRY(here(d, why));
    cudaError_t error = cudaSuccess;
    if (!found.aside) error = cudaStreamCreateWithPriority(&found.aside, cudaStreamNonBlocking, 0);
    if (error == cudaSuccess)
        error = cudaMemcpyAsync(number, at, sizeof *number, cudaMemcpyDeviceToHost, found.aside);
    if (error == cudaSuccess) error = cudaStreamSynchronize(found.aside);
    return error == cudaSuccess ? HS_OK : failed(d, error, NULL, "a look at its memory", why);
}

/* --- NCCL -------------------------------------------------------------------------------- */

hs_status name(hs_device *d, uint8_t id[HS_LINK_ID_BYTES], hs_why *why) {
    static_assert(sizeof(nccl::id) == HS_LINK_ID_BYTES, "backend/links.h");
    nccl::id made;
    HS_TRY(here(d, why));
    const nccl::result error = found.nccl.GetUniqueId(&made);
    if (error != nccl::SUCCESS) return nccl_fail(d, NULL, error, "a name to meet under", why);
    memcpy(id, &made, sizeof made);
    return HS_OK;
}

hs_status join(hs_device *d, const uint8_t id[HS_LINK_ID_BYTES], int end, hs_link **out,
               hs_why *why) {
    nccl::id where;
    *out = NULL;
    HS_TRY(here(d, why));
    hs_link *link = static_cast<hs_link *>(calloc(1, sizeof *link));
    if (!link) return hs_fail(why, HS_E_MEMORY, "no memory for a link");
    link->device = d;
    memcpy(&where, id, sizeof where);
    nccl::config how;
    memset(&how, 0, sizeof how);
    how.size = sizeof how;
    how.magic = nccl::MAGIC;
    how.version = nccl::OLDEST;
    how.blocking = 0;
    how.cga_cluster_size = how.min_ctas = how.split_share = nccl::UNDEFINED;
    how.max_ctas = CTAS;
    const nccl::result error = found.nccl.CommInitRankConfig(&link->comm, 2, where, end, &how);
    *out = link;
    if (error == nccl::SUCCESS || error == nccl::IN_PROGRESS) return HS_OK;
    return nccl_fail(d, link->comm, error, "joining", why);
}

hs_status joined(hs_link *link, bool *done, hs_why *why) {
    nccl::result state = nccl::SUCCESS;
    *done = false;
    const nccl::result error = found.nccl.CommGetAsyncError(link->comm, &state);
    if (error != nccl::SUCCESS)
        return nccl_fail(link->device, link->comm, error, "asked how it goes", why);
    *done = state == nccl::SUCCESS;
    return state == nccl::SUCCESS || state == nccl::IN_PROGRESS
               ? HS_OK
               : nccl_fail(link->device, link->comm, state, "carrying messages", why);
}

/* In a group of one: that is where a non-blocking communicator says that it goes on by itself. */
hs_status pass(hs_link *link, int stream, const void *from, void *to, uint64_t bytes, hs_why *why) {
    hs_device *d = link->device;
    HS_TRY(here(d, why));
    cudaStream_t s = d->streams[stream];
    nccl::result error = found.nccl.GroupStart();
    if (error != nccl::SUCCESS) return nccl_fail(d, link->comm, error, "a group", why);
    const nccl::result put = from ? found.nccl.Send(from, bytes, nccl::INT8, 1, link->comm, s)
                                  : found.nccl.Recv(to, bytes, nccl::INT8, 0, link->comm, s);
    error = found.nccl.GroupEnd();
    if (put != nccl::SUCCESS && put != nccl::IN_PROGRESS) error = put;
    if (error == nccl::SUCCESS || error == nccl::IN_PROGRESS) return HS_OK;
    return nccl_fail(d, link->comm, error, from ? "a send" : "a receive", why);
}

hs_status send(hs_link *link, int stream, const void *from, uint64_t bytes, hs_why *why) {
    return pass(link, stream, from, NULL, bytes, why);
}

hs_status receive(hs_link *link, int stream, void *to, uint64_t bytes, hs_why *why) {
    return pass(link, stream, NULL, to, bytes, why);
}

void leave(hs_link *link, bool orderly) {
    if (!link) return;
    hs_why why = {""};
    bool done = !link->comm;
    if (orderly && link->comm && here(link->device, &why) == HS_OK) {
        const nccl::result error = found.nccl.CommFinalize(link->comm);
        const int64_t until = hs_deadline_ns(LEAVE_MS);
        hs_status st = error == nccl::SUCCESS || error == nccl::IN_PROGRESS ? HS_OK : HS_E_LOST;
        while (st == HS_OK && !done && hs_clock_ns() < until) {
            st = joined(link, &done, &why);
            const struct timespec pause = {0, 50000};
            if (!done) (void)nanosleep(&pause, NULL);
        }
        if (done) (void)found.nccl.CommDestroy(link->comm);
    }
    if (!done) (void)found.nccl.CommAbort(link->comm);
    free(link);
}

} // namespace

/* In the order of hs_link_table. */
const hs_link_table links = {
    HS_LINKS_VERSION, facts,       export_memory, import_memory, release,
    wait_value,       write_value, peek,          name,          join,
    joined,           send,        receive,       leave,
};

} // namespace hs_cuda
