/* A position's memory, in the two spaces where it lies, and the order of what is done to it.
 *
 * The device space is the plan's arena: arena_bytes of device memory, which kernels work on. The
 * HOST space holds what the host makes or reads of it: tokens, targets and losses of every
 * microbatch, squared norms, reports and the control block. Where the device's memory is the host's
 * (backend.h, unified) the two are one, byte for byte; else HOST pieces have a second place, in
 * pinned memory, and are copied where the plan makes them (put) or reads them (get). All else meets
 * the host through a window: the memory itself, or a pinned buffer (readable, writable).
 *
 * Everything is named by its offset in the arena. This file and the linker alone count with device
 * addresses.
 *
 * Kernels run on the compute stream, copies on one stream each way. What follows from the plan:
 *
 * I1  Kernels run after every put that was issued before them.
 * I2  A get is after every kernel that was issued before it.
 * I3  A put outside of the HOST space is after every kernel that was issued before it: one may still
 *     read what was there. HOST pieces need none: what reads them on the device was issued before
 *     the last REPORT (APPLY's control block: before this one), and a REPORT waits for all of that;
 *     in inference, the answer to a request does.
 * I4  The host looks at what it got after a wait, and touches what it put after one.
 *
 * One event a dependency, none where nothing was issued since the last. Nothing allocates after
 * create. One thread. */
#ifndef HS_RUN_SPACES_H
#define HS_RUN_SPACES_H

#include <stdint.h>

#include "backend/backend.h"
#include "run/plan.h"

typedef struct hs_host_piece hs_host_piece;

typedef struct hs_spaces {
    const hs_backend *backend;
    hs_device *device; /* lent */
    uint8_t *arena;    /* device address of offset 0 */
    uint64_t bytes;

    bool news[HS_STREAMS][HS_STREAMS]; /* [a][b]: b has work that a does not follow yet */

    /* not unified */
    uint8_t *host; /* pinned: the HOST pieces, and a window each way */
    hs_host_piece *pieces;
    uint32_t piece_count;
    uint8_t *window[HS_STREAMS]; /* of IN and OUT */
    uint64_t window_bytes;
} hs_spaces;

/* Allocates the arena (fd: see backend.h) and, where memory is apart, HOST pieces and windows. plan
 * and device must outlive the spaces. HS_E_MEMORY, HS_E_IO, HS_E_DEVICE. */
hs_status hs_spaces_create(const hs_backend *backend, hs_device *device, const hs_plan *plan,
                           const hs_plan_position *position, int fd, hs_spaces *spaces,
                           hs_why *why);
void hs_spaces_destroy(hs_spaces *spaces); /* safe on a zeroed one; memory is the device's */

/* Where the host has these bytes, if one HOST piece holds them all. NULL: they are of the device
 * space. */
uint8_t *hs_spaces_host(const hs_spaces *spaces, uint64_t offset, uint64_t bytes);

/* What lies at [offset, offset + *bytes) of the device space, for the host to read or to write: the
 * memory itself, or a pinned buffer, to whose size *bytes is cut. readable gets it and waits for it;
 * writable waits until *at is free, and what the host writes there has to be put. *at holds until
 * the next call of the same. */
hs_status hs_spaces_readable(hs_spaces *spaces, uint64_t offset, uint64_t *bytes,
                             const uint8_t **at, hs_why *why);
hs_status hs_spaces_writable(hs_spaces *spaces, uint64_t offset, uint64_t *bytes, uint8_t **at,
                             hs_why *why);

/* Host to device, device to host: returns at once (I4). Memory onto itself: nothing to do. */
hs_status hs_spaces_put(hs_spaces *spaces, uint64_t offset, const void *host, uint64_t bytes,
                        hs_why *why);
hs_status hs_spaces_get(hs_spaces *spaces, uint64_t offset, void *host, uint64_t bytes,
                        hs_why *why);

/* A kernel on the compute stream (I1). */
hs_status hs_spaces_launch(hs_spaces *spaces, uint16_t kernel, const hs_args *args, hs_why *why);

/* Until all that was issued on HS_STREAM_* is done; its status. */
hs_status hs_spaces_wait(hs_spaces *spaces, int stream, hs_why *why);

#endif
