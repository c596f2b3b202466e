/* The send/receive seam between ranks: one const table of functions a transport (tcp.c, loop.c).
 *
 * A rank makes one hs_comm from the plan's channels and the attempt file; after create every
 * channel that starts or ends at this rank is connected, greeted (wire/frame.h) and known to agree
 * on run, epoch, plan and start step. Order of calls, all from the rank's main thread: create, then
 * send and recv in the order of the plan's actions, then close. The plan checker has shown that
 * this order cannot deadlock even where a send completes only when its receive is posted (loop.c
 * behaves so on purpose), so both calls may block and need no thread of their own.
 *
 * Every wait has a deadline and a name. A wait that passes stall_ms returns HS_E_STALLED, a peer
 * that is gone or that sends what does not fit (sequence, length, checksum) returns HS_E_LOST, at
 * create HS_E_STALLED after connect_ms, HS_E_BUSY where the port is taken. After any failure the
 * communicator is in its error state: send and recv return the same status at once until it is
 * closed.
 *
 * Nothing allocates after create.
 */
#ifndef HS_COMM_COMM_H
#define HS_COMM_COMM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "backend/backend.h"
#include "core/log.h"
#include "core/status.h"
#include "wire/attempt.h"
#include "wire/plan.h"

typedef struct hs_comm hs_comm; /* opaque, a transport's own */
struct hs_comm_loop;            /* loop.c: what the contexts of one process share */
struct hs_stop;                 /* core/stop.h */

/* Messages of a device's memory, where it is not the host's. A channel that carries them (forward,
 * backward, tied: hs_comm_of_device) agrees at create on one of HS_WAY_* (wire/frame.h):
 *
 *   IPC    the sender's device copies into the receiver's memory; values that streams write and
 *          wait for are credit and arrival (backend/links.h, ways.c)
 *   NCCL   the library moves the bytes
 *   TCP    send and recv below, and the copies to and from host memory are the caller's
 *
 * On the first two put and take only issue: the order of put and take is that of send and recv
 * (the plan's, which needs no buffers), the streams do the rest, and no host waits. What fails there
 * shows in await, which is how the device is waited for from create on. */
typedef struct hs_comm_device {
    const hs_backend *backend;
    hs_device *device;
    const uint8_t *arena; /* of this rank: where peers copy to, whole */
    uint64_t arena_bytes;
    uint32_t allowed;   /* ways: 1 << HS_WAY_* */
    int event;          /* of the device, the communicator's own */
    const char *fabric; /* launch.fabric, for words */
} hs_comm_device;

static inline bool hs_comm_of_device(uint32_t kind) {
    return kind != HS_CH_REPORT && kind != HS_CH_CONTROL;
}

/* Channels join positions of the pipeline, and a rank talks to the ranks of its own replica: the rank
 * at position p is first_rank + p. A peer is named by its rank wherever a process is meant (hello, log,
 * waits).
 *
 * All pointers stay the caller's and must outlive create; `channels`, `peers`, `log` must outlive
 * close. */
typedef struct hs_comm_config {
    const hs_attempt *attempt;       /* run, epoch, plan_digest, key, nonce, deadlines */
    const hs_attempt_rank *peers;    /* by rank, attempt->ranks of them */
    const hs_plan_channel *channels; /* from and to are positions */
    uint32_t channel_count;
    uint32_t rank;       /* this process */
    uint32_t first_rank; /* the rank at position 0 of this replica; 0 in the first replica */
    int64_t
        start_step; /* every rank must say the same: steps done before this attempt, 0 when fresh */
    int listen_fd;  /* tcp: a listening socket, owned by the communicator from here; -1: open one
                     * on peers[rank].port */
    struct hs_comm_loop *loop; /* loop only */
    struct hs_stop *stop;      /* NULL: none. hs_stop_lost ends every wait at once with HS_E_LOST;
                                * hs_stop_requested ends create with HS_E_TERMINATED (there is nothing to
                                * save yet) and no other wait (the gang agrees on the step to stop at) */
    const hs_comm_device
        *device; /* NULL: all messages are of host memory. tcp only; outlives close */
    const hs_log *log;
} hs_comm_config;

/* What the communicator waits for, or waited for last: for the watchdog's words. */
typedef struct hs_comm_wait {
    const char *doing;   /* "connect", "agree", "send" or "recv", of the device "put" or "take"; ""
                          * before the first wait */
    uint32_t channel;    /* UINT32_MAX: none */
    uint32_t peer;       /* rank; UINT32_MAX: none */
    uint32_t microbatch; /* UINT32_MAX: none */
    int64_t since_ns;    /* hs_clock_ns at its start */
} hs_comm_wait;

typedef struct hs_comm_table {
    const char *name;
    /* Connects everything or nothing. On failure *out is NULL and why names the channel and the
     * peer. */
    hs_status (*create)(const hs_comm_config *config, hs_comm **out, hs_why *why);
    /* Sends exactly `bytes` (= the channel's). Returns when buf may be written again. */
    hs_status (*send)(hs_comm *comm, uint32_t channel, const void *buf, size_t bytes,
                      uint32_t microbatch, hs_why *why);
    /* Receives the next message of the channel; its length and microbatch must be the ones given.
     */
    hs_status (*recv)(hs_comm *comm, uint32_t channel, void *buf, size_t bytes, uint32_t microbatch,
                      hs_why *why);
    void (*last_wait)(const hs_comm *comm, hs_comm_wait *wait);

    /* Device memory; NULL where a transport has none. way: HS_WAY_* of a channel of this rank; put
     * and take are for those that are not TCP. */
    uint32_t (*way)(const hs_comm *comm, uint32_t channel);
    /* On HS_STREAM_OUT: what was put there before is done, then the message goes from `from` to
     * `offset` of the receiver's arena, where the matching take has its place. `from` may be written
     * again when what OUT has so far is done. */
    hs_status (*put)(hs_comm *comm, uint32_t channel, const uint8_t *from, uint64_t offset,
                     size_t bytes, uint32_t microbatch, hs_why *why);
    /* On HS_STREAM_IN: when what was put there before is done, the place is free for the message;
     * what is put there from now on finds it at `to`, in this rank's arena. */
    hs_status (*take)(hs_comm *comm, uint32_t channel, uint8_t *to, size_t bytes,
                      uint32_t microbatch, hs_why *why);
    /* Until the device's event is done, like backend's wait; also ends where a peer is gone, or where
     * no message has moved for stall_ms and one is missing, as every wait here does. */
    hs_status (*await)(hs_comm *comm, int event, hs_why *why);
    /* Until every put and take is done, before a close that is no failure's. */
    hs_status (*settle)(hs_comm *comm, hs_why *why);
    /* Whether the device may wait for a peer that does not come (no settle has ended well): who closes
     * it, or waits for it, may wait for ever. */
    bool (*hangs)(const hs_comm *comm);
    /* Flushes what was accepted by send (bounded by stall_ms), then closes and frees. NULL is fine.
     */
    void (*close)(hs_comm *comm);
} hs_comm_table;

extern const hs_comm_table hs_comm_tcp;
extern const hs_comm_table hs_comm_loop_table;

/* loop.c: the meeting place of `ranks` contexts in one process, of all replicas, each driven by a
 * thread of its own (tests). */
hs_status hs_comm_loop_create(uint32_t ranks, const hs_plan_channel *channels,
                              uint32_t channel_count, struct hs_comm_loop **out);
void hs_comm_loop_destroy(struct hs_comm_loop *loop);

#endif
