/* The seam of the devices: memory, copies, kernels, and the order between them. run/ issues a
 * plan's work through this table and knows no device; the CPU is one implementation (cpu.c), CUDA
 * another, in a library of its own.
 *
 * Two kinds of memory. Device memory (alloc) is what kernels read and write; its address may be
 * counted on from (base + offset) and given back to this table, and the host reads and writes it
 * nowhere else, unless `unified` says that it is host memory too. Host memory (pinned, pin, or any
 * other) is the caller's to read and write, but while a copy uses it: from `copy` until a wait that
 * covers the copy.
 *
 * Streams and events. Work put on one stream (launch, copy, replay) runs in the order in which it
 * was put there; of two streams nothing is promised, but what events say: `record` marks how far a
 * stream's work has come so far, `follow` lets what is put on a stream from now on begin only when
 * the work before an event's last record is done, `wait` blocks the host until it is, `query` looks.
 * Any stream records any of the HS_EVENTS events; one can be recorded again and again; a follow, wait
 * or query means the last record before it; an event that was never recorded holds nobody up.
 *
 * Graphs. Between `capture` and `captured` what is put on that stream does not run, but becomes a
 * graph, which `replay` puts on a stream as a whole, as often as is wanted, with the same operands.
 * In between: launches on that stream, and copies between device memories; nothing else. Graphs live
 * until close. A backend without (NULL) is served by the same calls, made again.
 *
 * Statuses. launch, copy, record, follow and replay return at once and allocate nothing. What fails
 * on the device shows in a wait that covers it, or in any call before; the first failure stays, and
 * every later call returns it. HS_E_DEVICE: the device failed, or is gone, with the device's own words
 * in why. HS_E_BUG: a call that breaks this contract, where it is noticed. A backend that computes on
 * the host (the CPU) may return what failed from launch.
 *
 * One thread calls a device, from open to close; but wait and query may be called by others, for an
 * event that the one does not record meanwhile. Order of calls: open, alloc, pinned and pin, check,
 * then the others, close.
 */
#ifndef HS_BACKEND_BACKEND_H
#define HS_BACKEND_BACKEND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "backend/check.h"
#include "core/status.h"
#include "core/threads.h"
#include "kernels/kernels.h"

#define HS_BACKEND_VERSION 5u /* of hs_backend below, and of all that it is made of */

typedef struct hs_device hs_device; /* each backend has its own */
typedef struct hs_graph hs_graph;
struct hs_link_table;    /* backend/links.h */
struct hs_product_table; /* backend/products.h */

/* Kernels; messages to the device; messages from it; snapshots. */
enum { HS_STREAM_COMPUTE, HS_STREAM_IN, HS_STREAM_OUT, HS_STREAM_SAVE, HS_STREAMS };
enum { HS_EVENTS = 64 };

typedef enum hs_copy {
    HS_COPY_TO_DEVICE = 1,
    HS_COPY_FROM_DEVICE,
    HS_COPY_ON_DEVICE /* between two device memories, or a peer's that was imported */
} hs_copy;

typedef struct hs_device_config {
    uint32_t index;        /* of the machine's devices; the CPU is 0 */
    uint32_t kernel_path;  /* HS_PATH_* */
    uint64_t bytes_needed; /* device memory that will be asked for (alloc); 0: not known. What the
                            * device takes for itself comes on top */
    hs_pool *pool;         /* lent until close: threads of the host */
} hs_device_config;

/* Filled by open, valid until close; by `devices`, without what only an open device has (0 or NULL).
 * What does not apply to the CPU is 0 or "". */
typedef struct hs_device_facts {
    const char *kernels;   /* name of the kernel set; of an open device */
    size_t scratch_bytes;  /* its workspace, which the device owns; of an open device */
    char device[96];       /* "cpu", "NVIDIA H100 80GB HBM3" */
    char uuid[48];         /* "GPU-01234567-89ab-...", as nvidia-smi says it */
    char bus[16];          /* "0000:3b:00", as the kernel's log names it */
    uint32_t capability;   /* 90: compute capability 9.0 */
    uint32_t driver;       /* the CUDA that the driver is for, 13000: 13.0 */
    uint32_t runtime;      /* and the one that the backend was built with */
    uint64_t memory_bytes; /* all of the device's */
    uint64_t free_bytes;   /* what was free as it was opened */
} hs_device_facts;

typedef struct hs_backend {
    uint32_t version; /* HS_BACKEND_VERSION */
    const char *name;
    bool unified; /* device memory is host memory: the host may use it where a wait covers the
                   * work that does, and a copy onto itself is nothing */

    /* The machine's devices, none of which is opened: *count of them, the first `room` in list.
     * HS_E_UNSUPPORTED: none, and why. */
    hs_status (*devices)(hs_device_facts *list, uint32_t room, uint32_t *count, hs_why *why);

    /* HS_E_UNSUPPORTED: no such device, or it cannot run the kernel path; HS_E_MEMORY: less memory
     * is free than is needed. On failure *device is NULL. */
    hs_status (*open)(const hs_device_config *config, hs_device **device, hs_device_facts *facts,
                      hs_why *why);
    /* Waits for all work, frees all memory. NULL is fine. */
    void (*close)(hs_device *device);

    /* Device memory, zero, aligned to 64 bytes; the device's, freed by close. fd: a memfd that keeps
     * pages beyond this process (core/arena.h), for backends whose memory is the host's; -1: none.
     * At most HS_DEVICE_ARENAS of both kinds. Blocks. HS_E_MEMORY, HS_E_IO, HS_E_DEVICE. */
    hs_status (*alloc)(hs_device *device, size_t bytes, int fd, uint8_t **at, hs_why *why);
    /* Host memory, zero, that copies run fastest from and to; else the same. */
    hs_status (*pinned)(hs_device *device, size_t bytes, uint8_t **at, hs_why *why);
    /* Host memory that others made and keep until close becomes like it; at most HS_DEVICE_PINS.
     * Close undoes it. Blocks. HS_E_MEMORY: the host allows no more. */
    hs_status (*pin)(hs_device *device, void *at, size_t bytes, hs_why *why);

    /* backend/check.h: that the device computes to the bit, and that this memory of it, which is
     * zero, before and after, gives back what was written. Blocks. HS_E_SICK, HS_E_MEMORY. */
    hs_status (*check)(hs_device *device, uint8_t *at, size_t bytes, hs_check *check, hs_why *why);

    /* How many calls of this kernel a launch may take, at most HS_TOGETHER. NULL: one. */
    uint32_t (*together)(uint16_t kernel);
    /* `count` calls of a kernel, HS_K_*, on device addresses, of one dtype; none of them touches what another writes, and
     * they may run at once. args are copied. */
    hs_status (*launch)(hs_device *device, int stream, uint16_t kernel, const hs_args *args,
                        uint32_t count, hs_why *why);
    /* What is device memory of the two sides, `direction` says. */
    hs_status (*copy)(hs_device *device, int stream, void *to, const void *from, size_t bytes,
                      hs_copy direction, hs_why *why);

    hs_status (*record)(hs_device *device, int stream, int event, hs_why *why);
    hs_status (*follow)(hs_device *device, int stream, int event, hs_why *why);
    hs_status (*wait)(hs_device *device, int event, hs_why *why);
    /* *done: whether a wait would return at once. Never blocks. */
    hs_status (*query)(hs_device *device, int event, bool *done, hs_why *why);

    /* Of a unified one: returns when no work that was issued touches these bytes any more, whatever else waits
     * (kernels/deferred.h). NULL: launch leaves none. */
    void (*settle)(hs_device *device, const void *at, size_t bytes);

    /* All three, or none: NULL. captured allocates, and the graph is the device's. */
    hs_status (*capture)(hs_device *device, int stream, hs_why *why);
    hs_status (*captured)(hs_device *device, int stream, hs_graph **graph, hs_why *why);
    hs_status (*replay)(hs_device *device, int stream, hs_graph *graph, hs_why *why);

    const struct hs_product_table *products; /* backend/products.h; NULL: nothing to choose */
    const struct hs_link_table *links;       /* between devices; NULL: none */
} hs_backend;

enum { HS_DEVICE_ARENAS = 8, HS_DEVICE_PINS = 32, HS_TOGETHER = 64 };

extern const hs_backend hs_backend_cpu;

#endif
