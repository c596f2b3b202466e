/* What processes on emulated devices share: memory by IPC handles, and values that streams write and
 * wait for. Memory is a memfd; a handle says whose and which, and another process opens it through
 * /proc. A value that is waited for is looked at by the waiting process alone, in its own memory.
 *
 * HS_EMULATED_LAZY: what this process's streams write as values into memory of others is seen there
 * only when the device has nothing else that it may run: the latest that the order of streams allows.
 * HS_EMULATED_HOLD="N": the N-th such value (from 1) is not written while the answer to it may come,
 * up to 20 s: if what it asks for is there already, somebody has not waited, and that is a fault of the
 * device. HS_EMULATED_SHARE=no: devices that share nothing. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "kernels/cuda/emulate_runtime.h"

using hs_emulated::call_allowed;
using hs_emulated::call_failed;

namespace {

struct handle {
    char magic[8];
    int pid, fd;
    size_t bytes;
};
const char MAGIC[8] = {'h', 's', '-', 'i', 'p', 'c', '0', '1'};

bool shares() {
    const char *text = getenv("HS_EMULATED_SHARE");
    return !text || text[0] != 'n';
}

/* --- values ------------------------------------------------------------------------------ */

struct value {
    uint32_t *at;
    uint32_t number;
};

uint32_t load(const uint32_t *at) {
    return __atomic_load_n(at, __ATOMIC_ACQUIRE);
}

bool is_there(void *closure) {
    const value *v = static_cast<value *>(closure);
    return load(v->at) == v->number;
}

int nothing(void *) {
    return 0;
}

void store(const value &v) {
    __atomic_store_n(v.at, v.number, __ATOMIC_RELEASE);
}

bool mine(const void *at) {
    void *base;
    size_t bytes;
    int fd;
    return hs_emulated::find_memory(at, &base, &bytes, &fd);
}

/* HS_EMULATED_LAZY: written, and not seen yet. */
enum { LAZY = 256 };
value lazy[LAZY];
int lazy_count;

void publish() {
    for (int i = 0; i < lazy_count; i++) store(lazy[i]);
    lazy_count = 0;
}

int write(void *closure) {
    static const bool late = getenv("HS_EMULATED_LAZY") != NULL;
    const value *v = static_cast<value *>(closure);
    if (!hs_emulated::on_device(v->at, sizeof *v->at)) return 1;
    if (!late || lazy_count == LAZY || hs_emulated::is_own(v->at)) {
        store(*v);
        return 0;
    }
    hs_emulated::when_idle(publish);
    lazy[lazy_count++] = *v;
    return 0;
}

/* HS_EMULATED_HOLD. */
struct {
    cudaStream_t stream;
    uint32_t number;
    const uint32_t *answer;
    time_t until;
} hold;
enum { HOLD_S = 20 };

bool no_answer(void *closure) {
    (void)closure;
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    if (!hold.until) hold.until = now.tv_sec + HOLD_S;
    return now.tv_sec >= hold.until || (hold.answer && load(hold.answer) == hold.number);
}

int write_held(void *closure) {
    return hold.answer && load(hold.answer) == hold.number ? 1 : write(closure);
}

bool always(void *) {
    return true;
}

} // namespace

extern "C" {

/* CUresult: 1 invalid value. */
static int wait_value(cudaStream_t stream, unsigned long long at, uint32_t number, unsigned flags) {
    const value v = {reinterpret_cast<uint32_t *>(static_cast<uintptr_t>(at)), number};
    if (flags != 1 || at % sizeof number || !mine(v.at)) return 1;
    if (stream == hold.stream && number == hold.number) hold.answer = v.at;
    return hs_emulated::enqueue_when(stream, is_there, nothing, &v, sizeof v);
}

static int write_value(cudaStream_t stream, unsigned long long at, uint32_t number,
                       unsigned flags) {
    const value v = {reinterpret_cast<uint32_t *>(static_cast<uintptr_t>(at)), number};
    if (flags != 0 || at % sizeof number) return 1;
    static int nth;
    const char *held = getenv("HS_EMULATED_HOLD");
    if (!mine(v.at) && held && ++nth == atoi(held)) {
        hold.stream = stream;
        hold.number = number;
        return hs_emulated::enqueue_when(stream, no_answer, write_held, &v, sizeof v);
    }
    return hs_emulated::enqueue_when(stream, always, write, &v, sizeof v);
}
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version,
                                             unsigned long long flags,
                                             cudaDriverEntryPointQueryResult *answer) {
    (void)flags;
    if (const cudaError_t error = call_allowed()) return error;
    *function = NULL;
    if (version >= 12000 && strcmp(symbol, "cuStreamWaitValue32") == 0)
        *function = reinterpret_cast<void *>(wait_value);
    if (version >= 12000 && strcmp(symbol, "cuStreamWriteValue32") == 0)
        *function = reinterpret_cast<void *>(write_value);
    if (answer)
        *answer = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

/* --- memory ------------------------------------------------------------------------------ */

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
    (void)device;
    if (const cudaError_t error = call_allowed()) return error;
    switch (attribute) {
    case cudaDevAttrComputeMode:
        *value = hs_emulated::compute_mode();
        return cudaSuccess;
    case cudaDevAttrIpcEventSupport:
        *value = shares();
        return cudaSuccess;
    }
    return call_failed(cudaErrorInvalidValue);
}

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *out, void *at) {
    handle h;
    void *base = NULL;
    static_assert(sizeof h <= sizeof out->reserved, "a handle");
    if (const cudaError_t error = call_allowed()) return error;
    memset(out, 0, sizeof *out);
    memcpy(h.magic, MAGIC, sizeof h.magic);
    h.pid = getpid();
    if (!hs_emulated::find_memory(at, &base, &h.bytes, &h.fd) || base != at)
        return call_failed(cudaErrorInvalidValue);
    memcpy(out, &h, sizeof h);
    return cudaSuccess;
}

cudaError_t cudaIpcOpenMemHandle(void **at, cudaIpcMemHandle_t in, unsigned flags) {
    handle h;
    char path[64];
    *at = NULL;
    if (const cudaError_t error = call_allowed()) return error;
    memcpy(&h, &in, sizeof h);
    if (flags != cudaIpcMemLazyEnablePeerAccess || memcmp(h.magic, MAGIC, sizeof h.magic) != 0)
        return call_failed(cudaErrorInvalidValue);
    if (h.pid == getpid()) return call_failed(cudaErrorInvalidResourceHandle); /* not to oneself */
    snprintf(path, sizeof path, "/proc/%d/fd/%d", h.pid, h.fd);
    const int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) return call_failed(cudaErrorMapBufferObjectFailed);
    struct stat found;
    if (fstat(fd, &found) == 0 && found.st_size == static_cast<off_t>(h.bytes))
        *at = hs_emulated::adopt(fd, h.bytes);
    close(fd);
    return *at ? cudaSuccess : call_failed(cudaErrorMapBufferObjectFailed);
}

cudaError_t cudaIpcCloseMemHandle(void *at) {
    if (const cudaError_t error = call_allowed()) return error;
    return hs_emulated::disown(at) ? cudaSuccess : call_failed(cudaErrorInvalidValue);
}
