/* A device without a device: the engine's main.c is built on it (-DHS_BACKEND=hs_backend_emulated).
 * Kernels are the CPU's; all else is as far from the CPU as backend.h allows:
 *
 *   memory    a mapping of its own, which nobody may touch but while the device works: a host that
 *             does dies of SIGSEGV
 *   work      is queued; nothing runs before a wait, and then in an order of HS_EMULATED_ORDER that
 *             the events allow: 0..23, which stream goes first, second, third and fourth where
 *             several may go; from 24 on, any, by that seed. Nothing runs beyond what the wait is for
 *   copies    to the host: where they will land is garbage (0xff) from the call on. To the device:
 *             what the host changes between call and copy is a fault
 *   statuses  come from wait alone
 *
 * HS_EMULATED_CUDA names a library of CUDA kernels that run on the CPU (kernels/cuda/emulate.h): they
 * take the place of the CPU's, threads and blocks in the same HS_EMULATED_ORDER.
 *
 * Planted faults: HS_EMULATED_DROP="S E N", the N-th follow (from 1) of event E by stream S is left
 * out; HS_EMULATED_HASTE="E N", the N-th wait for event E returns at once; HS_EMULATED_FAIL="N", the
 * N-th launch fails on the device;
 * HS_EMULATED_SLOW="E N M", the N-th wait for event E begins only
 * when M other waits ended since its N-th record. At close one line of JSON on standard error says how many follows
 * (by stream, then event), waits (by event) and launches there were. */
#include <dlfcn.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "backend/backend.h"
#include "core/hash.h"
#include "kernels/cuda/cuda.h"

enum { ANY = 24, SEVERAL = 16 };

typedef enum kind { LAUNCH, COPY, RECORD, FOLLOW } kind;

typedef struct work {
    kind kind;
    uint16_t kernel;
    bool fails;
    int event;
    uint64_t ticket;
    hs_args args;
    void *to;
    const void *from;
    size_t bytes;
    hs_copy direction;
    uint32_t crc; /* of what is copied to the device */
} work;

typedef struct queue {
    work *list; /* [first, last) of room */
    size_t first, last, room;
} queue;

typedef struct memory {
    uint8_t *base;
    size_t bytes;
} memory;

struct hs_device {
    hs_device *cpu;
    const hs_cuda_table *cuda; /* NULL: the CPU's kernels */
    memory own[HS_DEVICE_ARENAS], host[HS_DEVICE_ARENAS];
    int owns, hosts;
    queue streams[HS_STREAMS];
    uint64_t recorded[HS_EVENTS], done[HS_EVENTS]; /* tickets */
    uint64_t order, random;
    uint64_t follows[HS_STREAMS][HS_EVENTS], waits[HS_EVENTS], launches;
    uint64_t drop[3], haste[2], slow[3], fail;
    hs_status status; /* the first failure */
    hs_why why;
};

/* Up to three numbers of an environment variable; 0 where there is none. */
static void numbers(const char *name, uint64_t *a, uint64_t *b, uint64_t *c) {
    uint64_t none;
    const char *text = getenv(name);
    if (text) (void)sscanf(text, "%" SCNu64 "%" SCNu64 "%" SCNu64, a, b ? b : &none, c ? c : &none);
}

static uint64_t next_random(hs_device *d) { /* splitmix64 */
    uint64_t z = d->random += UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ z >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ z >> 27) * UINT64_C(0x94D049BB133111EB);
    return z ^ z >> 31;
}

/* --- memory ------------------------------------------------------------------------------ */

static void protect(const hs_device *d, int protection) {
    for (int i = 0; i < d->owns; i++)
        if (mprotect(d->own[i].base, d->own[i].bytes, protection) != 0) abort();
}

static hs_status map(memory *list, int *count, size_t bytes, uint8_t **at, hs_why *why) {
    HS_ASSERT(*count < HS_DEVICE_ARENAS);
    void *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) return hs_fail(why, HS_E_MEMORY, "no room for %zu bytes", bytes);
    list[(*count)++] = (memory){.base = base, .bytes = bytes};
    *at = base;
    return HS_OK;
}

static hs_status emulated_alloc(hs_device *d, size_t bytes, int fd, uint8_t **at, hs_why *why) {
    (void)fd;
    HS_TRY(map(d->own, &d->owns, bytes, at, why));
    protect(d, PROT_NONE);
    return HS_OK;
}

static hs_status emulated_pinned(hs_device *d, size_t bytes, uint8_t **at, hs_why *why) {
    return map(d->host, &d->hosts, bytes, at, why);
}

static hs_status emulated_pin(hs_device *d, void *at, size_t bytes, hs_why *why) {
    (void)d;
    (void)at;
    (void)bytes;
    (void)why;
    return HS_OK;
}

static bool is_own(const hs_device *d, const void *at, size_t bytes) {
    for (int i = 0; i < d->owns; i++) {
        const uintptr_t from = (uintptr_t)d->own[i].base, x = (uintptr_t)at;
        if (x >= from && x - from <= d->own[i].bytes && bytes <= d->own[i].bytes - (x - from))
            return true;
    }
    return false;
}

/* --- open and close ---------------------------------------------------------------------- */

static void emulated_close(hs_device *d) {
    if (!d) return;
    (void)fprintf(stderr, "{\"emulated\":{\"follows\":[");
    for (int i = 0; i < HS_STREAMS * HS_EVENTS; i++)
        (void)fprintf(stderr, "%s%" PRIu64, i ? "," : "", d->follows[i / HS_EVENTS][i % HS_EVENTS]);
    (void)fprintf(stderr, "],\"waits\":[");
    for (int e = 0; e < HS_EVENTS; e++)
        (void)fprintf(stderr, "%s%" PRIu64, e ? "," : "", d->waits[e]);
    (void)fprintf(stderr, "],\"launches\":%" PRIu64 "}}\n", d->launches);
    for (int i = 0; i < d->owns; i++) (void)munmap(d->own[i].base, d->own[i].bytes);
    for (int i = 0; i < d->hosts; i++) (void)munmap(d->host[i].base, d->host[i].bytes);
    for (int i = 0; i < HS_STREAMS; i++) free(d->streams[i].list);
    hs_backend_cpu.close(d->cpu);
    free(d);
}

static hs_status load_cuda(hs_device *d, hs_device_facts *facts, hs_why *why) {
    const char *path = getenv("HS_EMULATED_CUDA");
    if (!path) return HS_OK;
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) return hs_fail(why, HS_E_UNSUPPORTED, "%s", dlerror());
    const hs_cuda_table *(*table)(void);
    void (*seed)(uint64_t);
    *(void **)&table = dlsym(library, "hs_cuda_kernels");
    *(void **)&seed = dlsym(library, "hs_emulated_seed");
    if (!table || !seed || table()->version != HS_CUDA_VERSION || table()->count != HS_K_COUNT)
        return hs_fail(why, HS_E_UNSUPPORTED, "%s has not the kernels of this version", path);
    seed(d->order);
    d->cuda = table();
    facts->kernels = "cuda";
    return HS_OK;
}

static hs_status emulated_open(const hs_device_config *config, hs_device **device,
                               hs_device_facts *facts, hs_why *why) {
    hs_device *d = *device = calloc(1, sizeof *d);
    if (!d) return hs_fail(why, HS_E_MEMORY, "no memory for a device");
    numbers("HS_EMULATED_ORDER", &d->order, NULL, NULL);
    numbers("HS_EMULATED_DROP", &d->drop[0], &d->drop[1], &d->drop[2]);
    numbers("HS_EMULATED_HASTE", &d->haste[0], &d->haste[1], NULL);
    numbers("HS_EMULATED_SLOW", &d->slow[0], &d->slow[1], &d->slow[2]);
    numbers("HS_EMULATED_FAIL", &d->fail, NULL, NULL);
    d->random = d->order;
    hs_status st = hs_backend_cpu.open(config, &d->cpu, facts, why);
    if (st == HS_OK) st = load_cuda(d, facts, why);
    if (st != HS_OK) {
        hs_backend_cpu.close(d->cpu);
        free(d);
        *device = NULL;
    }
    return st;
}

static hs_status emulated_check(hs_device *d, uint8_t *at, size_t bytes, hs_check *check,
                                hs_why *why) {
    protect(d, PROT_READ | PROT_WRITE);
    const hs_status st = hs_backend_cpu.check(d->cpu, at, bytes, check, why);
    protect(d, PROT_NONE);
    return st;
}

/* --- issuing ----------------------------------------------------------------------------- */

static work *put(hs_device *d, int stream) {
    queue *q = &d->streams[stream];
    if (q->first == q->last) q->first = q->last = 0;
    if (q->last == q->room) {
        q->room = q->room ? 2 * q->room : SEVERAL;
        q->list = realloc(q->list, q->room * sizeof *q->list);
        if (!q->list) abort();
    }
    work *w = &q->list[q->last++];
    memset(w, 0, sizeof *w);
    return w;
}

static hs_status emulated_launch(hs_device *d, int stream, uint16_t kernel, const hs_args *args,
                                 hs_why *why) {
    (void)why;
    work *w = put(d, stream);
    w->kind = LAUNCH;
    w->kernel = kernel;
    w->args = *args;
    w->fails = ++d->launches == d->fail;
    return HS_OK;
}

static hs_status emulated_copy(hs_device *d, int stream, void *to, const void *from, size_t bytes,
                               hs_copy direction, hs_why *why) {
    (void)why;
    work *w = put(d, stream);
    w->kind = COPY;
    w->to = to;
    w->from = from;
    w->bytes = bytes;
    w->direction = direction;
    if (direction == HS_COPY_FROM_DEVICE)
        memset(to, 0xff, bytes);
    else if (direction == HS_COPY_TO_DEVICE)
        w->crc = hs_crc32c(0, from, bytes);
    return HS_OK;
}

static hs_status emulated_record(hs_device *d, int stream, int event, hs_why *why) {
    (void)why;
    work *w = put(d, stream);
    w->kind = RECORD;
    w->event = event;
    w->ticket = ++d->recorded[event];
    return HS_OK;
}

static hs_status emulated_follow(hs_device *d, int stream, int event, hs_why *why) {
    (void)why;
    const uint64_t nth = ++d->follows[stream][event];
    if ((uint64_t)stream == d->drop[0] && (uint64_t)event == d->drop[1] && nth == d->drop[2])
        return HS_OK;
    work *w = put(d, stream);
    w->kind = FOLLOW;
    w->event = event;
    w->ticket = d->recorded[event];
    return HS_OK;
}

/* --- running ----------------------------------------------------------------------------- */

static void fail(hs_device *d, hs_status st, const char *what, unsigned which) {
    if (d->status == HS_OK) d->status = hs_fail(&d->why, st, what, which);
}

static void run(hs_device *d, const work *w) {
    switch (w->kind) {
    case LAUNCH:
        for (int o = 0; o < HS_CALL_PTRS; o++)
            if (w->args.ptr[o] && !is_own(d, w->args.ptr[o], 1))
                fail(d, HS_E_BUG, "kernel %u got an address that is not the device's", w->kernel);
        if (w->fails) fail(d, HS_E_DEVICE, "the device fell off its bus in kernel %u", w->kernel);
        if (d->status != HS_OK) return;
        d->status = d->cuda ? d->cuda->fn[w->kernel](&(hs_cuda_ctx){.stream = NULL}, &w->args)
                            : hs_backend_cpu.launch(d->cpu, 0, w->kernel, &w->args, &d->why);
        return;
    case COPY:
        if ((w->direction != HS_COPY_FROM_DEVICE && !is_own(d, w->to, w->bytes)) ||
            (w->direction != HS_COPY_TO_DEVICE && !is_own(d, w->from, w->bytes)))
            fail(d, HS_E_BUG, "a copy of %u bytes misses the device", (unsigned)w->bytes);
        if (w->direction == HS_COPY_TO_DEVICE && hs_crc32c(0, w->from, w->bytes) != w->crc)
            fail(d, HS_E_BUG, "the host wrote over %u bytes that were being copied",
                 (unsigned)w->bytes);
        if (d->status == HS_OK) memcpy(w->to, w->from, w->bytes);
        return;
    case RECORD:
        d->done[w->event] = w->ticket;
        return;
    case FOLLOW:
        return;
    }
}

static bool may_run(const hs_device *d, int stream) {
    const queue *q = &d->streams[stream];
    if (q->first == q->last) return false;
    const work *w = &q->list[q->first];
    return w->kind != FOLLOW || d->done[w->event] >= w->ticket;
}

/* The streams in the order of this number, below ANY. */
static void order_of(uint64_t number, int order[HS_STREAMS]) {
    for (int i = 0; i < HS_STREAMS; i++) order[i] = i;
    for (int i = 0, of = ANY; i < HS_STREAMS; i++) {
        of /= HS_STREAMS - i;
        const int from = i + (int)(number / (uint64_t)of), stream = order[from];
        number %= (uint64_t)of;
        memmove(order + i + 1, order + i, sizeof *order * (size_t)(from - i));
        order[i] = stream;
    }
}

/* The stream whose next work runs; -1: none may. */
static int choose(hs_device *d) {
    int ready[HS_STREAMS], order[HS_STREAMS], count = 0;
    order_of(d->order < ANY ? d->order : 0, order);
    for (int i = 0; i < HS_STREAMS; i++)
        if (may_run(d, order[i])) ready[count++] = order[i];
    if (count == 0) return -1;
    return ready[d->order < ANY ? 0 : next_random(d) % (uint64_t)count];
}

static hs_status emulated_wait(hs_device *d, int event, hs_why *why) {
    if (++d->waits[event] == d->haste[1] && (uint64_t)event == d->haste[0]) return HS_OK;
    protect(d, PROT_READ | PROT_WRITE);
    while (d->done[event] < d->recorded[event]) {
        const int stream = choose(d);
        if (stream < 0) {
            fail(d, HS_E_BUG, "event %u waits for ever", (unsigned)event);
            break;
        }
        queue *q = &d->streams[stream];
        run(d, &q->list[q->first++]);
    }
    protect(d, PROT_NONE);
    return d->status == HS_OK ? HS_OK
                              : hs_fail(why, d->status, "%s",
                                        d->why.text[0] ? d->why.text : hs_status_text(d->status));
}

/* Looking makes a little progress, so that one who looks again and again gets there. */
static hs_status emulated_query(hs_device *d, int event, bool *done, hs_why *why) {
    const int stream = d->done[event] < d->recorded[event] ? choose(d) : -1;
    if (stream >= 0) {
        protect(d, PROT_READ | PROT_WRITE);
        queue *q = &d->streams[stream];
        run(d, &q->list[q->first++]);
        protect(d, PROT_NONE);
    }
    *done = d->done[event] >= d->recorded[event];
    return d->status == HS_OK ? HS_OK
                              : hs_fail(why, d->status, "%s",
                                        d->why.text[0] ? d->why.text : hs_status_text(d->status));
}

static hs_status emulated_devices(hs_device_facts *list, uint32_t room, uint32_t *count,
                                  hs_why *why) {
    return hs_backend_cpu.devices(list, room, count, why);
}

/* Threads take turns, call by call (a wait or query may come from another). */
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t ended = PTHREAD_COND_INITIALIZER;
static uint64_t ends,
    slow_from; /* waits that ended: by now, when the slow one's event was recorded */

#define IN_TURN(call)                                                                              \
    (void)pthread_mutex_lock(&turn);                                                               \
    const hs_status st = (call);                                                                   \
    (void)pthread_mutex_unlock(&turn);                                                             \
    return st

static hs_status turn_launch(hs_device *d, int stream, uint16_t kernel, const hs_args *args,
                             hs_why *why) {
    IN_TURN(emulated_launch(d, stream, kernel, args, why));
}
static hs_status turn_copy(hs_device *d, int stream, void *to, const void *from, size_t bytes,
                           hs_copy direction, hs_why *why) {
    IN_TURN(emulated_copy(d, stream, to, from, bytes, direction, why));
}
static hs_status turn_record(hs_device *d, int stream, int event, hs_why *why) {
    if ((uint64_t)event == d->slow[0] && d->recorded[event] + 1 == d->slow[1]) slow_from = ends;
    IN_TURN(emulated_record(d, stream, event, why));
}
static hs_status turn_follow(hs_device *d, int stream, int event, hs_why *why) {
    IN_TURN(emulated_follow(d, stream, event, why));
}
static hs_status turn_wait(hs_device *d, int event, hs_why *why) {
    (void)pthread_mutex_lock(&turn);
    if ((uint64_t)event == d->slow[0] && d->waits[event] + 1 == d->slow[1])
        while (ends < slow_from + d->slow[2]) (void)pthread_cond_wait(&ended, &turn);
    const hs_status st = emulated_wait(d, event, why);
    ends++;
    (void)pthread_cond_broadcast(&ended);
    (void)pthread_mutex_unlock(&turn);
    return st;
}
static hs_status turn_query(hs_device *d, int event, bool *done, hs_why *why) {
    IN_TURN(emulated_query(d, event, done, why));
}

#define TABLE(one)                                                                                 \
    {.version = HS_BACKEND_VERSION,                                                                \
     .name = "emulated",                                                                           \
     .unified = (one),                                                                             \
     .devices = emulated_devices,                                                                  \
     .open = emulated_open,                                                                        \
     .close = emulated_close,                                                                      \
     .alloc = emulated_alloc,                                                                      \
     .pinned = emulated_pinned,                                                                    \
     .pin = emulated_pin,                                                                          \
     .check = emulated_check,                                                                      \
     .launch = turn_launch,                                                                        \
     .copy = turn_copy,                                                                            \
     .record = turn_record,                                                                        \
     .follow = turn_follow,                                                                        \
     .wait = turn_wait,                                                                            \
     .query = turn_query}

const hs_backend hs_backend_emulated = TABLE(false);

/* Says that its memory is the host's: an engine that believes it touches what it must not. */
const hs_backend hs_backend_lying = TABLE(true);
