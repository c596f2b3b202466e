/* Memory, streams, events and graphs behind emulate_runtime.h. */
#include "kernels/cuda/emulate_runtime.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

extern "C" {
#include "core/hash.h"
}

using hs_emulated::on_device;

namespace {

enum { NAP_NS = 20000 }; /* where only another process can go on */
enum { PAGE = 4096 };
enum kind { KERNEL, COPY, SET, RECORD, FOLLOW, WHEN };
enum {
    ANY = 24,
    ORDERED = 4,
    STREAMS = 64,
    PIECES = 256,
    NAMES = 256,
    SEVERAL = 16,
    AT_A_LOOK = 64,
    LEFT = 1 << 16
};

struct work {
    kind is;
    const char *name;
    bool (*ready)(void *); /* of WHEN */
    int (*body)(void *);
    void *closure; /* its own copy */
    size_t closure_bytes;
    void *to;
    const void *from;
    size_t bytes;
    cudaMemcpyKind way;
    uint32_t crc; /* of what is copied to the device */
    int value;
    cudaEvent_t event;
    uint64_t ticket;
};

struct list {
    work *at; /* [first, last) of room */
    size_t first, last, room;
};

struct piece {
    char *base;
    size_t bytes;
    int fd;               /* of device memory; -1: the host's */
    bool foreign = false; /* another process's */
};

} // namespace

struct hs_emulated_stream {
    list queue;
    list *capture; /* what is put here goes there; NULL: none is made */
    bool spoilt;   /* the capture broke a rule */
    pthread_t by;
    int device;
};
struct hs_emulated_event {
    uint64_t recorded, done;
    int device;
};
struct hs_emulated_graph {
    list work;
};

namespace {

struct {
    int driver, devices, capability, mode;
    uint64_t memory, used, order, random, pin, fail[2], flip[3];
} machine;
piece own[PIECES], host[PIECES];
int owns, hosts;
cudaStream_t streams[STREAMS];
const char *loaded[NAMES];
int loaded_count;
int stream_count, captures;
uint64_t kernels_run, unpinned;
void (*idle)();
cudaError_t broken; /* stays */
char broken_text[1024];
pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
pthread_once_t once = PTHREAD_ONCE_INIT;
thread_local cudaError_t last_error;
thread_local int device_of_thread;

void numbers(const char *name, uint64_t *a, uint64_t *b, uint64_t *c = NULL) {
    unsigned long long x = 0, y = 0, z = 0;
    const char *text = getenv(name);
    const int found = text ? sscanf(text, "%llu %llu %llu", &x, &y, &z) : 0;
    if (found > 0) *a = x;
    if (found > 1 && b) *b = y;
    if (found > 2 && c) *c = z;
}

void read_switches() {
    uint64_t driver = 13000, devices = 1, capability = 90, free = 0, mode = 0;
    machine.memory = UINT64_C(8) << 30;
    machine.fail[1] = cudaErrorIllegalAddress;
    numbers("HS_EMULATED_DRIVER", &driver, NULL);
    numbers("HS_EMULATED_DEVICES", &devices, NULL);
    numbers("HS_EMULATED_CAPABILITY", &capability, NULL);
    numbers("HS_EMULATED_MEMORY", &machine.memory, NULL);
    numbers("HS_EMULATED_MODE", &mode, NULL);
    numbers("HS_EMULATED_ORDER", &machine.order, NULL);
    numbers("HS_EMULATED_PIN", &machine.pin, NULL);
    numbers("HS_EMULATED_FAIL", &machine.fail[0], &machine.fail[1]);
    numbers("HS_EMULATED_FLIP", &machine.flip[0], &machine.flip[1], &machine.flip[2]);
    free = machine.memory;
    numbers("HS_EMULATED_FREE", &free, NULL);
    machine.used = machine.memory - free;
    machine.driver = (int)driver;
    machine.devices = (int)devices;
    machine.capability = (int)capability;
    machine.mode = (int)mode;
    machine.random = machine.order;
    hs_emulated_seed(machine.order);
    hs_emulated_architecture(machine.capability);
}

/* Every call of the API holds the one lock. */
struct guard {
    guard() {
        pthread_once(&once, read_switches);
        pthread_mutex_lock(&lock);
    }
    ~guard() { pthread_mutex_unlock(&lock); }
};

cudaError_t told(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

/* What a call of the API says first where there is no device to work with. */
cudaError_t absent() {
    if (machine.driver < 13000) return cudaErrorInsufficientDriver;
    if (machine.devices == 0) return cudaErrorNoDevice;
    return broken;
}

uint64_t next_random() { /* splitmix64 */
    uint64_t z = machine.random += UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ z >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ z >> 27) * UINT64_C(0x94D049BB133111EB);
    return z ^ z >> 31;
}

void breaks(cudaError_t error, const char *text) {
    if (broken != cudaSuccess) return;
    broken = error;
    snprintf(broken_text, sizeof broken_text, "%s", text);
}

/* --- memory ------------------------------------------------------------------------------ */

void protect(int protection) {
    for (int i = 0; i < owns; i++)
        if (mprotect(own[i].base, own[i].bytes, protection) != 0) abort();
}

piece *piece_of(piece *pieces, int count, const void *at, size_t bytes) {
    for (int i = 0; i < count; i++) {
        const uintptr_t from = reinterpret_cast<uintptr_t>(pieces[i].base);
        const uintptr_t x = reinterpret_cast<uintptr_t>(at);
        if (x >= from && x - from <= pieces[i].bytes && bytes <= pieces[i].bytes - (x - from))
            return &pieces[i];
    }
    return NULL;
}

/* Whether some of these bytes are pinned; grain: of whole pages, which are what is pinned. */
bool overlaps(const void *at, size_t bytes, size_t grain) {
    if (bytes == 0) return false;
    const uintptr_t from = reinterpret_cast<uintptr_t>(at) / grain;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(at) + bytes - 1) / grain;
    for (int i = 0; i < hosts; i++) {
        const uintptr_t base = reinterpret_cast<uintptr_t>(host[i].base);
        if (from <= (base + host[i].bytes - 1) / grain && base / grain <= last) return true;
    }
    return false;
}

void forget(piece *pieces, int *count, piece *p) {
    *p = pieces[--*count];
}

/* --- queues ------------------------------------------------------------------------------ */

work *put(list *q) {
    if (q->first == q->last) q->first = q->last = 0;
    if (q->last == q->room) {
        q->room = q->room ? 2 * q->room : (size_t)SEVERAL;
        q->at = static_cast<work *>(realloc(q->at, q->room * sizeof *q->at));
        if (!q->at) abort();
    }
    work *w = &q->at[q->last++];
    memset(w, 0, sizeof *w);
    return w;
}

void put_copy(list *q, const work &from) {
    work *w = put(q);
    *w = from;
    if (!from.closure) return;
    w->closure = malloc(from.closure_bytes);
    if (!w->closure) abort();
    memcpy(w->closure, from.closure, from.closure_bytes);
}

void clear(list *q) {
    for (size_t i = q->first; i < q->last; i++) free(q->at[i].closure);
    free(q->at);
    *q = list{};
}

/* Whether this thread has turned to the device of a stream or an event. */
cudaError_t here(int device) {
    return device == device_of_thread ? cudaSuccess : cudaErrorInvalidResourceHandle;
}

/* What asks or waits for a device spoils the captures of the thread that does it, whatever it asks for. */
cudaError_t may_ask() {
    cudaError_t error = cudaSuccess;
    for (int i = 0; i < stream_count; i++)
        if (streams[i]->capture && pthread_equal(streams[i]->by, pthread_self())) {
            streams[i]->spoilt = true;
            error = cudaErrorStreamCaptureUnsupported;
        }
    return error;
}

/* What is asked of an event. */
cudaError_t may_ask_of(cudaEvent_t event) {
    if (const cudaError_t error = absent()) return error;
    if (const cudaError_t error = here(event->device)) return error;
    return may_ask();
}

/* Where new work of a stream goes. captured: whether a capture may hold it. */
cudaError_t next_of(cudaStream_t s, bool captured, list **where) {
    if (!s) return cudaErrorInvalidResourceHandle;
    if (const cudaError_t error = absent()) return error;
    if (const cudaError_t error = here(s->device)) return error;
    if (s->capture && !captured) {
        s->spoilt = true;
        return cudaErrorStreamCaptureUnsupported;
    }
    *where = s->capture ? s->capture : &s->queue;
    return cudaSuccess;
}

/* Whether a kernel of this name has been launched before, which loads it. load: it is now. */
bool is_loaded(const char *name, bool load) {
    for (int i = 0; i < loaded_count; i++)
        if (!strcmp(loaded[i], name)) return true;
    if (load && loaded_count < NAMES) loaded[loaded_count++] = name;
    return load;
}

/* --- running ----------------------------------------------------------------------------- */

void run_copy(const work &w) {
    const bool to = w.way != cudaMemcpyDeviceToHost, from = w.way != cudaMemcpyHostToDevice;
    char text[128];
    if ((to ? on_device(w.to, w.bytes) : !piece_of(own, owns, w.to, 1)) &&
        (from ? on_device(w.from, w.bytes) : !piece_of(own, owns, w.from, 1))) {
        if (w.way != cudaMemcpyHostToDevice || hs_crc32c(0, w.from, w.bytes) == w.crc) {
            memmove(w.to, w.from, w.bytes);
            return;
        }
        snprintf(text, sizeof text, "the host wrote over %zu bytes that were being copied",
                 w.bytes);
    } else {
        snprintf(text, sizeof text, "a copy of %zu bytes misses the device", w.bytes);
    }
    breaks(cudaErrorIllegalAddress, text);
}

void run_kernel(const work &w) {
    kernels_run++;
    if (kernels_run == machine.fail[0]) {
        breaks(static_cast<cudaError_t>(machine.fail[1]), "");
        return;
    }
    if (w.body(w.closure) != 0)
        breaks(cudaErrorLaunchFailure,
               hs_emulated_text()[0] ? hs_emulated_text() : "a kernel failed");
    if (kernels_run == machine.flip[0]) own[machine.flip[1]].base[machine.flip[2]] ^= 1;
}

void run(work *w) {
    if (w->is == RECORD) w->event->done = w->ticket;
    if (broken == cudaSuccess) {
        if (w->is == WHEN && w->body(w->closure) != 0)
            breaks(cudaErrorIllegalAddress, "what passes between processes failed");
        if (w->is == KERNEL) run_kernel(*w);
        if (w->is == COPY) run_copy(*w);
        if (w->is == SET && !on_device(w->to, w->bytes))
            breaks(cudaErrorIllegalAddress, "a fill misses the device");
        else if (w->is == SET)
            memset(w->to, w->value, w->bytes);
    }
    free(w->closure);
}

bool may_run(const hs_emulated_stream *s) {
    if (s->queue.first == s->queue.last) return false;
    const work &w = s->queue.at[s->queue.first];
    if (w.is == WHEN) return w.ready(w.closure);
    return w.is != FOLLOW || w.event->done >= w.ticket;
}

/* Whether another process can make something run. */
bool waits_outside() {
    for (int i = 0; i < stream_count; i++) {
        const list &q = streams[i]->queue;
        if (q.first < q.last && q.at[q.first].is == WHEN) return true;
    }
    return false;
}

/* The streams as they go: the first four in the order of the switch, then the others. */
void order_streams(cudaStream_t *ordered) {
    int order[ORDERED] = {0, 1, 2, 3};
    uint64_t number = machine.order < ANY ? machine.order : 0, of = ANY;
    for (int i = 0; i < ORDERED; i++) {
        of /= (uint64_t)(ORDERED - i);
        const int from = i + (int)(number / of), stream = order[from];
        number %= of;
        memmove(order + i + 1, order + i, sizeof *order * (size_t)(from - i));
        order[i] = stream;
    }
    int count = 0;
    for (int i = 0; i < ORDERED; i++)
        if (order[i] < stream_count) ordered[count++] = streams[order[i]];
    for (int i = ORDERED; i < stream_count; i++) ordered[count++] = streams[i];
}

/* One piece of work, of a stream whose next may run; false: none may. */
bool run_one() {
    cudaStream_t ordered[STREAMS], ready[STREAMS];
    int count = 0;
    order_streams(ordered);
    for (int i = 0; i < stream_count; i++)
        if (may_run(ordered[i])) ready[count++] = ordered[i];
    if (count == 0) return false;
    list *q = &ready[machine.order < ANY ? 0 : next_random() % (uint64_t)count]->queue;
    work w = q->at[q->first++];
    run(&w);
    return true;
}

/* Runs until `done`, which none of what may run makes true: a fault. */
template <typename Done> void run_until(Done done) {
    protect(PROT_READ | PROT_WRITE);
    while (broken == cudaSuccess && !done()) {
        if (run_one()) continue;
        if (idle) idle();
        if (!waits_outside()) {
            breaks(cudaErrorUnknown, "the device waits for ever");
            break;
        }
        const struct timespec nap = {0, NAP_NS};
        pthread_mutex_unlock(&lock); /* other threads may go on meanwhile */
        (void)nanosleep(&nap, NULL);
        pthread_mutex_lock(&lock);
        protect(PROT_READ | PROT_WRITE);
    }
    if (idle) idle();
    protect(PROT_NONE);
}

/* A query of what is not done: some progress, so that one who asks again and again gets there. */
template <typename Done> void look(Done done) {
    protect(PROT_READ | PROT_WRITE);
    for (int i = 0; i < AT_A_LOOK && broken == cudaSuccess && !done(); i++)
        if (!run_one()) break;
    if (idle) idle();
    protect(PROT_NONE);
}

} // namespace

namespace hs_emulated {

bool on_device(const void *at, size_t bytes) {
    return piece_of(own, owns, at, bytes) != NULL;
}

int enqueue(cudaStream_t stream, const char *name, int (*body)(void *), const void *closure,
            size_t bytes) {
    guard held;
    list *where = NULL;
    if (told(next_of(stream, true, &where)) != cudaSuccess) return -3;
    if (!is_loaded(name, stream->capture == NULL)) {
        stream->spoilt = true;
        (void)told(cudaErrorStreamCaptureUnsupported);
        return -3;
    }
    work *w = put(where);
    w->is = KERNEL;
    w->name = name;
    w->body = body;
    w->closure_bytes = bytes;
    w->closure = malloc(bytes);
    if (!w->closure) abort();
    memcpy(w->closure, closure, bytes);
    return 0;
}

int enqueue_when(cudaStream_t stream, bool (*ready)(void *), int (*body)(void *),
                 const void *closure, size_t bytes) {
    guard held;
    list *where = NULL;
    if (const cudaError_t error = told(next_of(stream, false, &where))) return error;
    work *w = put(where);
    w->is = WHEN;
    w->ready = ready;
    w->body = body;
    w->closure_bytes = bytes;
    w->closure = malloc(bytes);
    if (!w->closure) abort();
    memcpy(w->closure, closure, bytes);
    return 0;
}

bool find_memory(const void *at, void **base, size_t *bytes, int *fd) {
    guard held;
    const piece *p = piece_of(own, owns, at, 1);
    if (!p || p->foreign) return false;
    *base = p->base;
    *bytes = p->bytes;
    *fd = p->fd;
    return true;
}

void when_idle(void (*fn)()) {
    idle = fn;
}

bool is_own(const void *at) {
    const piece *p = piece_of(own, owns, at, 1);
    return p && !p->foreign;
}

void *adopt(int fd, size_t bytes) {
    guard held;
    if (owns == PIECES) return NULL;
    void *map = mmap(NULL, bytes, PROT_NONE, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED) return NULL;
    own[owns++] = piece{static_cast<char *>(map), bytes, -1, true};
    return map;
}

bool disown(void *base) {
    guard held;
    piece *p = piece_of(own, owns, base, 1);
    if (!p || p->base != base || !p->foreign) return false;
    munmap(p->base, p->bytes);
    forget(own, &owns, p);
    return true;
}

void leave_last_error(cudaError_t error) {
    last_error = error;
}

cudaError_t call_failed(cudaError_t error) {
    guard held;
    return told(error);
}

cudaError_t call_allowed() {
    guard held;
    return told(absent());
}

int compute_mode() {
    return machine.mode;
}

} // namespace hs_emulated

extern "C" uint64_t hs_emulated_unpinned(void) {
    guard held;
    return unpinned;
}

extern "C" void hs_emulated_fail(int error) {
    guard held;
    breaks(static_cast<cudaError_t>(error), "");
}

/* --- the machine ------------------------------------------------------------------------- */

cudaError_t cudaDriverGetVersion(int *version) {
    guard held;
    *version = machine.driver;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = 13000;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count) {
    guard held;
    *count = 0;
    if (const cudaError_t error = absent()) return told(error);
    *count = machine.devices;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device) {
    guard held;
    if (const cudaError_t error = absent()) return told(error);
    if (device < 0 || device >= machine.devices) return told(cudaErrorInvalidDevice);
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "Emulated %d.%d", machine.capability / 10,
             machine.capability % 10);
    for (int i = 0; i < 16; i++) p->uuid.bytes[i] = static_cast<char>(16 * device + i);
    p->totalGlobalMem = machine.memory;
    p->major = machine.capability / 10;
    p->minor = machine.capability % 10;
    p->multiProcessorCount = 2;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *id, int room, int device) {
    guard held;
    if (const cudaError_t error = absent()) return told(error);
    if (device < 0 || device >= machine.devices) return told(cudaErrorInvalidDevice);
    snprintf(id, (size_t)room, "0000:%02X:00.0", (unsigned)(0xe0 + device));
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    guard held;
    if (const cudaError_t error = absent()) return told(error);
    if (device < 0 || device >= machine.devices) return told(cudaErrorInvalidDevice);
    if (machine.mode) return told(cudaErrorDevicesUnavailable); /* which makes its context */
    device_of_thread = device;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device) {
    *device = device_of_thread;
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    guard held;
    if (const cudaError_t error = absent()) return told(error);
    *total = machine.memory;
    *free = machine.memory - machine.used;
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void) {
    guard held;
    if (const cudaError_t error = absent()) return told(error);
    if (captures > 0) return told(cudaErrorStreamCaptureUnsupported);
    run_until([] {
        for (int i = 0; i < stream_count; i++)
            if (streams[i]->queue.first < streams[i]->queue.last) return false;
        return true;
    });
    return told(broken);
}

const char *cudaGetErrorName(cudaError_t error) {
    switch (error) {
#define NAME(name)                                                                                 \
    case name:                                                                                     \
        return #name;
        NAME(cudaSuccess)
        NAME(cudaErrorInvalidValue)
        NAME(cudaErrorMemoryAllocation)
        NAME(cudaErrorInvalidConfiguration)
        NAME(cudaErrorInsufficientDriver)
        NAME(cudaErrorInvalidDeviceFunction)
        NAME(cudaErrorNoDevice)
        NAME(cudaErrorInvalidDevice)
        NAME(cudaErrorNoKernelImageForDevice)
        NAME(cudaErrorECCUncorrectable)
        NAME(cudaErrorInvalidResourceHandle)
        NAME(cudaErrorMapBufferObjectFailed)
        NAME(cudaErrorNotReady)
        NAME(cudaErrorIllegalAddress)
        NAME(cudaErrorLaunchOutOfResources)
        NAME(cudaErrorHostMemoryAlreadyRegistered)
        NAME(cudaErrorHostMemoryNotRegistered)
        NAME(cudaErrorLaunchTimeout)
        NAME(cudaErrorAssert)
        NAME(cudaErrorIllegalInstruction)
        NAME(cudaErrorMisalignedAddress)
        NAME(cudaErrorInvalidAddressSpace)
        NAME(cudaErrorInvalidPc)
        NAME(cudaErrorLaunchFailure)
        NAME(cudaErrorNotSupported)
        NAME(cudaErrorStreamCaptureUnsupported)
        NAME(cudaErrorStreamCaptureInvalidated)
        NAME(cudaErrorStreamCaptureWrongThread)
        NAME(cudaErrorInvalidDevicePointer)
        NAME(cudaErrorInvalidMemcpyDirection)
        NAME(cudaErrorStubLibrary)
        NAME(cudaErrorCallRequiresNewerDriver)
        NAME(cudaErrorInvalidPtx)
        NAME(cudaErrorJitCompilerNotFound)
        NAME(cudaErrorUnsupportedPtxVersion)
        NAME(cudaErrorJitCompilationDisabled)
        NAME(cudaErrorOperatingSystem)
        NAME(cudaErrorIllegalState)
        NAME(cudaErrorHardwareStackError)
        NAME(cudaErrorCompatNotSupportedOnDevice)
        NAME(cudaErrorStreamCaptureMerge)
        NAME(cudaErrorStreamCaptureUnmatched)
        NAME(cudaErrorStreamCaptureUnjoined)
        NAME(cudaErrorStreamCaptureIsolation)
        NAME(cudaErrorStreamCaptureImplicit)
        NAME(cudaErrorCapturedEvent)
        NAME(cudaErrorDevicesUnavailable)
        NAME(cudaErrorInvalidKernelImage)
        NAME(cudaErrorContained)
        NAME(cudaErrorNotPermitted)
        NAME(cudaErrorMpsConnectionFailed)
        NAME(cudaErrorMpsServerNotReady)
        NAME(cudaErrorMpsMaxClientsReached)
        NAME(cudaErrorMpsMaxConnectionsReached)
        NAME(cudaErrorUnknown)
#undef NAME
    }
    return "unrecognized error code";
}

const char *cudaGetErrorString(cudaError_t error) {
    if (error == broken && broken_text[0]) return broken_text;
    switch (error) {
    case cudaErrorMemoryAllocation:
        return "out of memory";
    case cudaErrorInsufficientDriver:
        return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoDevice:
        return "no CUDA-capable device is detected";
    case cudaErrorIllegalAddress:
        return "an illegal memory access was encountered";
    case cudaErrorECCUncorrectable:
        return "uncorrectable ECC error encountered";
    case cudaErrorLaunchFailure:
        return "unspecified launch failure";
    case cudaErrorNoKernelImageForDevice:
        return "no kernel image is available for execution on the device";
    default:
        return cudaGetErrorName(error);
    }
}

cudaError_t cudaGetLastError(void) {
    guard held;
    const cudaError_t error = last_error;
    if (error != broken) last_error = cudaSuccess;
    return error;
}

cudaError_t cudaPeekAtLastError(void) {
    return last_error;
}

/* --- memory ------------------------------------------------------------------------------ */

/* What waits for all work is forbidden beside a capture that is not relaxed. */
static cudaError_t may_allocate() {
    if (const cudaError_t error = absent()) return error;
    for (int i = 0; captures > 0 && i < stream_count; i++)
        if (streams[i]->capture) streams[i]->spoilt = true;
    return captures > 0 ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

cudaError_t cudaMalloc(void **at, size_t bytes) {
    guard held;
    *at = NULL;
    if (const cudaError_t error = may_allocate()) return told(error);
    if (bytes > machine.memory - machine.used || owns == PIECES)
        return told(cudaErrorMemoryAllocation);
    const size_t whole = (bytes + PAGE - 1) / PAGE * PAGE;
    const int fd = memfd_create("hs-emulated", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)whole) != 0) return told(cudaErrorMemoryAllocation);
    void *map = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED) return told(cudaErrorMemoryAllocation);
    memset(map, 0xa5, bytes < LEFT ? bytes : (size_t)LEFT); /* what was there before */
    own[owns++] = piece{static_cast<char *>(map), whole, fd};
    machine.used += whole < machine.memory - machine.used ? whole : machine.memory - machine.used;
    protect(PROT_NONE);
    *at = map;
    return cudaSuccess;
}

cudaError_t cudaFree(void *at) {
    guard held;
    if (const cudaError_t error = absent()) return told(error);
    piece *p = piece_of(own, owns, at, 1);
    if (!p || p->base != at || p->foreign) return told(cudaErrorInvalidValue);
    munmap(p->base, p->bytes);
    close(p->fd);
    machine.used -= p->bytes < machine.used ? p->bytes : machine.used;
    forget(own, &owns, p);
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **at, size_t bytes, unsigned flags) {
    (void)flags;
    guard held;
    *at = NULL;
    if (const cudaError_t error = may_allocate()) return told(error);
    if (hosts == PIECES) return told(cudaErrorMemoryAllocation);
    void *map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) return told(cudaErrorMemoryAllocation);
    memset(map, 0xa5, bytes < LEFT ? bytes : (size_t)LEFT);
    host[hosts++] = piece{static_cast<char *>(map), bytes, -1};
    *at = map;
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *at) {
    guard held;
    if (const cudaError_t error = absent()) return told(error);
    piece *p = piece_of(host, hosts, at, 1);
    if (!p || p->base != at) return told(cudaErrorInvalidValue);
    munmap(p->base, p->bytes);
    forget(host, &hosts, p);
    return cudaSuccess;
}

cudaError_t cudaHostRegister(void *at, size_t bytes, unsigned flags) {
    (void)flags;
    guard held;
    if (const cudaError_t error = may_allocate()) return told(error);
    if (machine.pin) return told(static_cast<cudaError_t>(machine.pin));
    if (!at || bytes == 0) return told(cudaErrorInvalidValue);
    if (overlaps(at, bytes, PAGE)) return told(cudaErrorHostMemoryAlreadyRegistered);
    if (hosts == PIECES) return told(cudaErrorMemoryAllocation);
    host[hosts++] = piece{static_cast<char *>(at), bytes, -1};
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *at) {
    guard held;
    if (const cudaError_t error = absent()) return told(error);
    piece *p = piece_of(host, hosts, at, 1);
    if (!p || p->base != at) return told(cudaErrorHostMemoryNotRegistered);
    forget(host, &hosts, p);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind way,
                            cudaStream_t stream) {
    guard held;
    list *where = NULL;
    const cudaError_t error = next_of(stream, way == cudaMemcpyDeviceToDevice, &where);
    if (error != cudaSuccess) return told(error);
    const void *of_host = way == cudaMemcpyHostToDevice ? from : to;
    if (way != cudaMemcpyDeviceToDevice && !piece_of(host, hosts, of_host, bytes)) {
        if (overlaps(of_host, bytes, 1)) return told(cudaErrorInvalidValue);
        unpinned += bytes;
    }
    work *w = put(where);
    w->is = COPY;
    w->to = to;
    w->from = from;
    w->bytes = bytes;
    w->way = way;
    if (way == cudaMemcpyDeviceToHost && !piece_of(own, owns, to, 1)) memset(to, 0xff, bytes);
    if (way == cudaMemcpyHostToDevice && !piece_of(own, owns, from, 1))
        w->crc = hs_crc32c(0, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *at, int value, size_t bytes, cudaStream_t stream) {
    guard held;
    list *where = NULL;
    if (const cudaError_t error = next_of(stream, true, &where)) return told(error);
    work *w = put(where);
    w->is = SET;
    w->to = at;
    w->value = value;
    w->bytes = bytes;
    return cudaSuccess;
}

/* --- streams and events ------------------------------------------------------------------ */

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    (void)flags;
    (void)priority;
    guard held;
    *stream = NULL;
    if (const cudaError_t error = absent()) return told(error);
    if (stream_count == STREAMS) return told(cudaErrorMemoryAllocation);
    *stream = static_cast<cudaStream_t>(calloc(1, sizeof **stream));
    if (!*stream) abort();
    (*stream)->device = device_of_thread;
    streams[stream_count++] = *stream;
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    guard held;
    if (!stream) return told(cudaErrorInvalidResourceHandle);
    for (int i = 0; i < stream_count; i++) {
        if (streams[i] != stream) continue;
        memmove(streams + i, streams + i + 1, sizeof *streams * (size_t)(--stream_count - i));
        break;
    }
    clear(&stream->queue);
    free(stream);
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    guard held;
    list *where = NULL;
    if (const cudaError_t error = next_of(stream, false, &where)) return told(error);
    if (const cudaError_t error = may_ask()) return told(error);
    run_until([=] { return where->first == where->last; });
    return told(broken);
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
    guard held;
    list *where = NULL;
    if (const cudaError_t error = next_of(stream, false, &where)) return told(error);
    if (const cudaError_t error = may_ask()) return told(error);
    look([=] { return where->first == where->last; });
    return told(broken == cudaSuccess && where->first < where->last ? cudaErrorNotReady : broken);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    (void)flags;
    guard held;
    list *where = NULL;
    if (const cudaError_t error = next_of(stream, false, &where)) return told(error);
    work *w = put(where);
    w->is = FOLLOW;
    w->event = event;
    w->ticket = event->recorded;
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    (void)flags;
    guard held;
    *event = NULL;
    if (const cudaError_t error = absent()) return told(error);
    *event = static_cast<cudaEvent_t>(calloc(1, sizeof **event));
    if (!*event) abort();
    (*event)->device = device_of_thread;
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    guard held;
    list *where = NULL;
    if (const cudaError_t error = next_of(stream, false, &where)) return told(error);
    if (const cudaError_t error = here(event->device)) return told(error);
    work *w = put(where);
    w->is = RECORD;
    w->event = event;
    w->ticket = ++event->recorded;
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
    guard held;
    if (const cudaError_t error = may_ask_of(event)) return told(error);
    look([=] { return event->done >= event->recorded; });
    return told(broken == cudaSuccess && event->done < event->recorded ? cudaErrorNotReady
                                                                       : broken);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    guard held;
    if (const cudaError_t error = may_ask_of(event)) return told(error);
    run_until([=] { return event->done >= event->recorded; });
    return told(broken);
}

/* --- graphs ------------------------------------------------------------------------------ */

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    (void)mode;
    guard held;
    if (const cudaError_t error = absent()) return told(error);
    if (!stream || stream->capture) return told(cudaErrorInvalidValue);
    stream->capture = static_cast<list *>(calloc(1, sizeof *stream->capture));
    if (!stream->capture) abort();
    stream->spoilt = false;
    stream->by = pthread_self();
    captures++;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    guard held;
    *graph = NULL;
    if (const cudaError_t error = absent()) return told(error);
    if (!stream || !stream->capture) return told(cudaErrorInvalidValue);
    if (!pthread_equal(stream->by, pthread_self())) return told(cudaErrorStreamCaptureWrongThread);
    list *made = stream->capture;
    stream->capture = NULL;
    captures--;
    if (!stream->spoilt) {
        *graph = static_cast<cudaGraph_t>(calloc(1, sizeof **graph));
        if (!*graph) abort();
        (*graph)->work = *made;
    } else {
        clear(made);
    }
    free(made);
    return told(stream->spoilt ? cudaErrorStreamCaptureInvalidated : cudaSuccess);
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph,
                                 unsigned long long flags) {
    (void)flags;
    guard held;
    *exec = NULL;
    if (const cudaError_t error = may_allocate()) return told(error);
    *exec = static_cast<cudaGraphExec_t>(calloc(1, sizeof **exec));
    if (!*exec) abort();
    for (size_t i = graph->work.first; i < graph->work.last; i++)
        put_copy(&(*exec)->work, graph->work.at[i]);
    return cudaSuccess;
}

cudaError_t cudaGraphUpload(cudaGraphExec_t exec, cudaStream_t stream) {
    (void)exec;
    guard held;
    list *where = NULL;
    return told(next_of(stream, false, &where));
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    guard held;
    list *where = NULL;
    if (const cudaError_t error = next_of(stream, false, &where)) return told(error);
    for (size_t i = exec->work.first; i < exec->work.last; i++) put_copy(where, exec->work.at[i]);
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    guard held;
    if (graph) clear(&graph->work);
    free(graph);
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    return cudaGraphDestroy(exec);
}
