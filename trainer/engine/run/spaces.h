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
 * Kernels run on the compute stream, messages to the device on IN, from it on OUT, snapshots on SAVE.
 *
 * I1  An action of a list begins after the earlier ones that touch its bytes, on whatever stream, one of
 *     the two writing (run/hazards.h says which; begin, end). After no other: a message does not wait
 *     for programs that have nothing to do with it.
 * I2  A list begins after all that was issued before it, unless it is a step's that follows a step (join);
 *     what is read or written outside of lists is after all kernels before it (after).
 * I3  The copies of a snapshot run after all kernels issued before it, and whatever changes what they copy
 *     runs after them: its next writer follows them, the host does not wait (save, saved).
 * I4  The host looks at what it got after a wait, and touches what it put after one. HOST pieces need
 *     none of their own: what reads them on the device was issued before the last REPORT (APPLY's
 *     control block: before this one), and a REPORT waits for all of that; in inference, the answer
 *     to a request does. A window is waited for when its turn comes again.
 *
 * Nothing allocates after create. One thread; but saved may be waited for by another. */
#ifndef HS_RUN_SPACES_H
#define HS_RUN_SPACES_H

#include <stdint.h>

#include "backend/backend.h"
#include "run/hazards.h"
#include "run/plan.h"

typedef struct hs_host_piece hs_host_piece;

enum { HS_WINDOWS = 2 }; /* to the device; one comes from it */

typedef struct hs_spaces {
    const hs_backend *backend;
    hs_device *device; /* lent */
    uint8_t *arena;    /* device address of offset 0 */
    uint64_t bytes;

    bool news[HS_STREAMS][HS_STREAMS]; /* [a][b]: b has work that a does not follow yet */
    /* how the device is waited for by the thread that issues, where it may wait for peers itself
     * (comm.h, await); NULL: as the backend does */
    hs_status (*await)(void *ctx, int event, hs_why *why);
    void *await_ctx;
    bool saving; /* I3: a snapshot's copies that nobody followed yet */

    /* not unified */
    uint8_t *host; /* pinned: the HOST pieces, and the windows */
    uint64_t host_bytes;
    hs_host_piece *pieces;
    uint32_t piece_count;
    uint8_t *in_window[HS_WINDOWS], *out_window; /* the ones of IN take turns */
    uint32_t in_turn;
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

/* --- in a list --- */

/* What the action's stream is given from now on follows what its turn names (I1, I3); then, behind it, the
 * event that others follow. Turn NULL, or a device that is the host's: nothing. */
hs_status hs_spaces_begin(hs_spaces *spaces, const hs_turn *turn, hs_why *why);
hs_status hs_spaces_end(hs_spaces *spaces, const hs_turn *turn, hs_why *why);
/* I2: every stream goes on after every other. */
hs_status hs_spaces_join(hs_spaces *spaces, hs_why *why);

/* Host to device on IN, device to host on OUT: returns at once (I4). Memory onto itself: nothing. */
hs_status hs_spaces_put(hs_spaces *spaces, uint64_t offset, const void *host, uint64_t bytes,
                        hs_why *why);
hs_status hs_spaces_get(hs_spaces *spaces, uint64_t offset, void *host, uint64_t bytes,
                        hs_why *why);

/* A pinned buffer that holds any message of the position: the next one to put, free (waits for its last
 * put); the one to get into. Not unified only. */
hs_status hs_spaces_in_window(hs_spaces *spaces, uint8_t **at, hs_why *why);
uint8_t *hs_spaces_out_window(hs_spaces *spaces);

/* The address of a message that goes to or from another device, and that something of it is put on the
 * stream now (comm.h, put and take). */
uint8_t *hs_spaces_message(hs_spaces *spaces, int stream, uint64_t offset);

/* Calls of a kernel (backend.h, launch), or a captured program, on the compute stream. */
hs_status hs_spaces_launch(hs_spaces *spaces, uint16_t kernel, const hs_args *args, uint32_t count,
                           hs_why *why);
hs_status hs_spaces_replay(hs_spaces *spaces, hs_graph *graph, hs_why *why);

/* Before the host or a peer reads or writes these bytes of a device that is the host's: nothing that was launched touches
 * them any more (backend.h, settle). Of other devices copies follow the kernels: nothing. */
void hs_spaces_settle(hs_spaces *spaces, uint64_t offset, uint64_t bytes);

/* Until all that was issued on HS_STREAM_* is done; its status. */
hs_status hs_spaces_wait(hs_spaces *spaces, int stream, hs_why *why);

/* --- outside of lists --- */

/* What is put on `stream` from now on runs after all that was put on `before` so far. */
hs_status hs_spaces_after(hs_spaces *spaces, int stream, int before, hs_why *why);

/* What lies at [offset, offset + *bytes) of the device space, for the host to read or to write: the
 * memory itself, or a pinned buffer, to whose size *bytes is cut. readable gets it and waits for it;
 * writable waits until *at is free, and what the host writes there has to be put. *at holds until
 * the next call of the same. */
hs_status hs_spaces_readable(hs_spaces *spaces, uint64_t offset, uint64_t *bytes,
                             const uint8_t **at, hs_why *why);
hs_status hs_spaces_writable(hs_spaces *spaces, uint64_t offset, uint64_t *bytes, uint8_t **at,
                             hs_why *why);

/* --- snapshots (I3; not unified only) --- */

/* The first of a snapshot's copies is behind all kernels so far; each is on SAVE; saved ends them. */
hs_status hs_spaces_save(hs_spaces *spaces, uint64_t offset, void *host, uint64_t bytes,
                         hs_why *why);
hs_status hs_spaces_saved(hs_spaces *spaces, hs_why *why);
/* From any thread: waits until they are done. No other snapshot may begin meanwhile. */
hs_status hs_spaces_wait_saved(const hs_spaces *spaces, hs_why *why);

#endif
