/* A rank's snapshot slots (wire/slot.h): shared memory that the checkpoint agent owns and reads,
 * that this rank fills between steps and restores from. The slots outlive the rank: a crashed gang
 * starts again from them.
 *
 * Order of calls, all from the rank's main thread: create (with the plan's tables), attach (with
 * the descriptors from the agent), perhaps restore, then claim, and unclaim or begin and take as the gang decides,
 * destroy. Without attach (a rank without an agent) there are no slots: claim is false and begin
 * returns HS_E_AGAIN.
 *
 * A fill goes from begin, which takes a slot, to take, which says that it is READY. Where the arena is
 * the host's, all of it is done when begin returns. Else begin issues the device's copies and returns;
 * a thread of the snapshot's own waits for them, computes the checksums and stores READY, while the
 * next steps run. One fill at a time. destroy abandons one that is under way: its slot stays FILLING,
 * which the next rank to attach makes EMPTY, as after a crash.
 *
 * I1  A slot that the agent holds is never claimed, and one that is not claimed is never written.
 * I2  The newest READY slot (restored from, or filled last) is never written; so with two slots or
 *     more there is always one whole snapshot, whenever the rank dies.
 * I3  READY is stored after everything it stands for.
 * I4  Nothing of a fill is stored before its FILLING and generation are: a reader that saw any byte
 *     of it and then (behind a fence of its own) looks at the generation sees that too.
 *
 * Threads: copying and checksums run on the pool, or on that thread's own. Nothing allocates after
 * attach.
 */
#ifndef HS_SNAPSHOT_SNAPSHOT_H
#define HS_SNAPSHOT_SNAPSHOT_H

#include <stdbool.h>
#include <stdint.h>

#include "core/log.h"
#include "core/status.h"
#include "core/threads.h"
#include "wire/plan.h"
#include "wire/slot.h"

#define HS_SNAPSHOT_SLOTS_MAX ((int)HS_SLOTS_MAX)

typedef struct hs_snapshot hs_snapshot;
struct hs_stop;

/* How a device whose memory is apart copies between an offset of the arena and a slot. */
typedef struct hs_snapshot_device {
    void *ctx;
    /* Issues one copy. What is copied to a slot is the state as all that was issued before made it. */
    hs_status (*copy)(void *ctx, bool to_slot, uint64_t offset, uint8_t *data, uint64_t bytes,
                      hs_why *why);
    /* Ends a slot's copies. To the slot: returns at once; from it: waits until they are done. */
    hs_status (*copied)(void *ctx, bool to_slot, hs_why *why);
    /* On another thread: until the copies to a slot that were ended last are done. */
    hs_status (*wait)(void *ctx, hs_why *why);
} hs_snapshot_device;

/* states and tensors must outlive create only; arena, device, pool and log outlive the snapshot. */
typedef struct hs_snapshot_config {
    uint32_t position, replica;  /* of this rank */
    const hs_plan_state *states; /* this position's, `state_count` of them */
    uint32_t state_count;
    const hs_plan_tensor *tensors; /* the plan's table; states index it */
    uint64_t slot_bytes;           /* of the position, from the plan */
    uint8_t *arena;                /* STATIC offset 0, where the host may use it; NULL: */
    hs_snapshot_device device;     /* copies */
    const uint8_t *plan_digest;    /* 32 bytes */
    const uint8_t *what_digest;    /* 32 bytes */
    uint64_t epoch;
    hs_pool *pool; /* NULL: this thread alone */
    const hs_log *log;
} hs_snapshot_config;

/* HS_E_CONFIG where the states do not fit slot_bytes. */
hs_status hs_snapshot_create(const hs_snapshot_config *config, hs_snapshot **out, hs_why *why);
/* Nothing runs, and nothing uses the device, from here on: abandons what is under way. NULL is fine. */
void hs_snapshot_stop(hs_snapshot *snapshot);
/* The same, unmaps, and closes the descriptors. NULL is fine. */
void hs_snapshot_destroy(hs_snapshot *snapshot);

/* Maps the slots. Takes the descriptors (closes them also on failure). A slot that a dead rank left
 * half filled becomes EMPTY. HS_E_CONFIG where a slot is too small, not sealed, of another
 * position, or more than HS_SNAPSHOT_SLOTS_MAX come. */
hs_status hs_snapshot_attach(hs_snapshot *snapshot, const int *fds, int count, hs_why *why);
/* The descriptors, for an agent that was restarted; theirs stay the snapshot's. Returns how many.
 */
int hs_snapshot_fds(const hs_snapshot *snapshot, int fds[HS_SNAPSHOT_SLOTS_MAX]);

/* Where slot i lies in this process, all of it (to be pinned); NULL: there is none. */
uint8_t *hs_snapshot_memory(const hs_snapshot *snapshot, int slot, uint64_t *bytes);

/* Claims a slot for the next begin (hs_step_report.free_slot), which then needs not wait for the agent; true where
 * one is claimed. False: the agent holds them, or a fill is under way. */
bool hs_snapshot_claim(hs_snapshot *snapshot);
/* The gang does not save: what was claimed, if anything, is as it was. */
void hs_snapshot_unclaim(hs_snapshot *snapshot);
/* Whether a fill began that take has not given yet. */
bool hs_snapshot_under_way(const hs_snapshot *snapshot);

typedef struct hs_snapshot_done {
    int slot; /* begin chooses it */
    int64_t step;
    bool final, persist; /* of the attempt the last; to be stored */
} hs_snapshot_done;

/* Begins to copy the state of `what->step` done steps into the claimed slot. Where none is claimed it claims one:
 * HS_E_AGAIN where the agent holds them all. No fill may be under way. */
hs_status hs_snapshot_begin(hs_snapshot *snapshot, const hs_snapshot_done *what, hs_why *why);

/* Whether the fill that is under way is READY, and what it is; never blocks. What failed in it: the
 * device's status. */
hs_status hs_snapshot_take(hs_snapshot *snapshot, bool *any, hs_snapshot_done *done, hs_why *why);
/* Until take has something to say, if a fill is under way. HS_E_AGAIN at the deadline, HS_E_LOST. */
hs_status hs_snapshot_wait(hs_snapshot *snapshot, int64_t deadline_ns, struct hs_stop *stop,
                           hs_why *why);

/* Verifies every checksum of the slot and copies it into the arena. HS_E_RESTORE where it is not
 * READY, not of `step`, of another layout or What, or damaged; the arena's states are then garbage.
 */
hs_status hs_snapshot_restore(hs_snapshot *snapshot, int slot, int64_t step, hs_why *why);

/* What the slot holds: step, or -1 where it is not READY. */
int64_t hs_snapshot_step(const hs_snapshot *snapshot, int slot);

#endif
