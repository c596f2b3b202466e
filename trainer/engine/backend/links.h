/* What joins two devices of two processes, part of a backend's table (backend.h, links): comm/ carries
 * messages of device memory with it, and knows no device.
 *
 * Two ways. Shared memory: a process exports an allocation, its peer on the same machine imports it,
 * copies into it, and tells so by a value that a stream writes and another stream waits for. Or a
 * link: a library (NCCL) that moves bytes between two devices, on any two machines, and adds nothing.
 *
 * Calls come from the device's thread; those that put work on a stream return at once and follow
 * backend.h in their statuses. Nothing here knows messages: sequence, order and credit are comm's.
 */
#ifndef HS_BACKEND_LINKS_H
#define HS_BACKEND_LINKS_H

#include "backend/backend.h"

#define HS_LINKS_VERSION 1u /* of the table below */

enum { HS_LINK_HANDLE_BYTES = 64, HS_LINK_ID_BYTES = 128 };

/* Device memory as another process of this machine can find it. Travels as bytes. */
typedef struct hs_link_memory {
    uint8_t handle[HS_LINK_HANDLE_BYTES]; /* of a whole allocation */
    uint64_t offset;                      /* in it */
    uint64_t bytes;
} hs_link_memory;

typedef struct hs_link_facts {
    uint8_t device[16];     /* its UUID: equal for two processes on one device */
    uint32_t shares_memory; /* 1: it can export, import, and wait for values */
    uint32_t library;       /* version of the library of links as it counts (NCCL 2.28.9: 22809);
                             * 0: none */
    char why[160];          /* where one of the two is 0: what is missing */
} hs_link_facts;

typedef struct hs_link hs_link; /* one direction between two devices, through the library */

typedef struct hs_link_table {
    uint32_t version; /* HS_LINKS_VERSION */

    /* use_library: opens it, which takes time; else facts->library is 0. */
    hs_status (*facts)(hs_device *device, bool use_library, hs_link_facts *facts, hs_why *why);

    /* --- shared memory --- */

    /* `at` lies in what alloc of this device gave, and what is exported is seen whole by who
     * imports it. HS_E_UNSUPPORTED: this system does not share it; why says so. */
    hs_status (*export_memory)(hs_device *device, const uint8_t *at, uint64_t bytes,
                               hs_link_memory *memory, hs_why *why);
    /* Memory of another process, until release; the same allocation may be imported again. Turns access between two devices on. HS_E_UNSUPPORTED: this system, or these two
     * devices, do not; why says so. */
    hs_status (*import_memory)(hs_device *device, const hs_link_memory *memory, uint8_t **at,
                               hs_why *why);
    /* What import_memory gave, once no work uses it: before its owner frees it. */
    void (*release)(hs_device *device, uint8_t *at);
    /* What is put on the stream from now on begins when *at is `value`: equal, not past it. `at` is
     * of this device's own memory, aligned to 4; who writes it need not be known. */
    hs_status (*wait_value)(hs_device *device, int stream, const uint8_t *at, uint32_t value,
                            hs_why *why);
    /* Writes *at when all that was put on the stream before is done, and seen by whoever sees the
     * value. `at`: own memory, or imported. */
    hs_status (*write_value)(hs_device *device, int stream, uint8_t *at, uint32_t value,
                             hs_why *why);
    /* *at as it is now, whatever the streams wait for. For the words of a wait that is too long.
     * Blocks for some microseconds. */
    hs_status (*peek)(hs_device *device, const uint8_t *at, uint32_t *value, hs_why *why);

    /* --- links of the library --- */

    /* The name under which two processes meet, made by one of them. */
    hs_status (*name)(hs_device *device, uint8_t id[HS_LINK_ID_BYTES], hs_why *why);
    /* Begins to join: `end` 0 sends, 1 receives. Does not wait for the peer; `joined` says when it
     * is done. HS_E_LOST: the library says that the peer, or the way to it, is gone. */
    hs_status (*join)(hs_device *device, const uint8_t id[HS_LINK_ID_BYTES], int end,
                      hs_link **link, hs_why *why);
    /* *done: whether what was begun on this link (join, send, receive) is taken by the library.
     * HS_E_LOST as above, also of what was sent before. Never blocks. */
    hs_status (*joined)(hs_link *link, bool *done, hs_why *why);
    /* A message, on a stream; nothing else before `joined` says done. */
    hs_status (*send)(hs_link *link, int stream, const void *from, uint64_t bytes, hs_why *why);
    hs_status (*receive)(hs_link *link, int stream, void *to, uint64_t bytes, hs_why *why);
    /* Frees it. orderly: all that was put on streams is done, and so it is at the peer, or will be;
     * waits for the library, at most some seconds. Else what is on streams is given up. */
    void (*leave)(hs_link *link, bool orderly);
} hs_link_table;

#endif
