/* The send/receive seam between ranks: one const table of functions a transport (tcp.c, loop.c).
 *
 * A rank makes one hs_comm from the plan's channels and the attempt file; after create every
 * channel that starts or ends at this rank is connected, greeted (wire/frame.h) and known to agree
 * on run, epoch, plan and start step. All calls come from the rank's main thread, and there is no other:
 * messages move while it is in a call.
 *
 *   post      gives a receive its place, ahead       returns at once
 *   got       waits until a channel's first n messages are in their places
 *   send      starts a message                       returns at once (but loop.c, where it says so)
 *   sent      waits until the first n that this rank sent on a channel have left their places
 *   progress  moves what can move, between pieces of work; never blocks
 *
 * Messages of a channel keep their order, each way; n counts them from create on. A place belongs to
 * the transport from post until got has returned for it, or from send (to be read) until sent has.
 *
 * Every wait has a deadline and a name, and moves all that is under way, not only what it is for. A
 * wait in which nothing moves for stall_ms returns HS_E_STALLED, a peer that is gone or that sends
 * what does not fit (sequence, length, checksum) HS_E_LOST; create HS_E_STALLED after connect_ms,
 * HS_E_BUSY where the port is taken. What fails behind a post or a send shows at the next call, whatever
 * it is for, and names its own channel, peer and microbatch. After any failure the communicator is
 * in its error state: all calls return the same status at once until it is closed.
 *
 * Why nobody blocks for ever. The plan's checker has shown that the lists pass where a send blocks
 * until its receive is posted, and a receive from its own place in the list until it is filled
 * (trainer/plan/channels.py): there is an order L of all actions of all ranks, each rank's own in its
 * order, with both ends of a message side by side. run/messages.c starts a send and posts a receive
 * at its place in the list or earlier (without waiting for anything for it), and waits for either only
 * behind its place. Say that all waits before some point of L have ended. A wait there is for
 * a message whose two ends stand earlier in L, as do those of all earlier messages of its channel: by what
 * was said both ranks are past them, so both ends are with their transports. Each of the two ranks is then in
 * a wait, in which it moves them, or will come to a call that does: so the message passes and the wait
 * ends. A rank that leaves has seen off all it began. With
 * replicas, whose lists are the same: the order of one of them, each action done in all, and an exchange (a
 * send directly followed by the receive of the same channel, wire/plan.h) where its position comes to it, is
 * such an order of all ranks; the exchange is one action of it, whose receive is posted before its send.
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
 *   TCP    post and send below, and the copies to and from host memory are the caller's
 *
 * On the first two put and take only issue: the order of put and take is that of the plan's actions
 * (which needs no buffers), the streams do the rest, and no host waits. What fails there
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

/* Channels join positions of the pipeline, in each replica, or one position of two replicas (across,
 * wire/plan.h), both ways. A peer is named by its rank wherever a process is meant (hello, log, waits).
 *
 * A message has its channel's length; on one across, of reduce, gather or norms, at most that, as both ends
 * say alike.
 *
 * All pointers stay the caller's and must outlive create; `channels`, `peers`, `log` must outlive
 * close. */
typedef struct hs_comm_config {
    const hs_attempt *attempt;       /* run, epoch, plan_digest, key, nonce, deadlines */
    const hs_attempt_rank *peers;    /* by rank, attempt->ranks of them */
    const hs_plan_channel *channels; /* from and to are positions */
    uint32_t channel_count;
    uint32_t rank;      /* this process */
    uint32_t positions; /* of the pipeline: rank = replica x positions + position */
    int64_t
        start_step; /* every rank must say the same: steps done before this attempt, 0 when fresh */
    int listen_fd;  /* tcp: a listening socket, owned by the communicator from here; -1: open one
                     * on peers[rank].port */
    struct hs_comm_loop *loop; /* loop only */
    uint32_t most; /* messages of a channel, each way, that may be under way at once; 0: one */
    struct hs_stop *stop; /* NULL: none. hs_stop_lost ends every wait at once with HS_E_LOST;
                                * hs_stop_requested ends create with HS_E_TERMINATED (there is nothing to
                                * save yet) and no other wait (the gang agrees on the step to stop at) */
    const hs_comm_device
        *device; /* NULL: all messages are of host memory. tcp only; outlives close */
    const hs_log *log;
} hs_comm_config;

/* The rank at the other end of what comes in on a channel, or goes out; UINT32_MAX where that end of the
 * channel is not at this rank. */
static inline uint32_t hs_comm_peer(const hs_plan_channel *channel, uint32_t rank,
                                    uint32_t positions, bool in) {
    const uint32_t replica = rank / positions;
    if (rank % positions != (in ? channel->to : channel->from)) return UINT32_MAX;
    return (replica ^ channel->across) * positions + (in ? channel->from : channel->to);
}

/* What the communicator waits for, or waited for last: for the watchdog's words. */
typedef struct hs_comm_wait {
    const char *doing;   /* "connect", "agree", "send" or "recv" (of a message that was not there or
                          * away when it had to be), of the device "put" or "take"; "" before the first
                          * wait */
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
    /* The next message of the channel shall come to buf: exactly `bytes`, of that microbatch. */
    hs_status (*post)(hs_comm *comm, uint32_t channel, void *buf, size_t bytes, uint32_t microbatch,
                      hs_why *why);
    hs_status (*got)(hs_comm *comm, uint32_t channel, uint64_t count, hs_why *why);
    hs_status (*send)(hs_comm *comm, uint32_t channel, const void *buf, size_t bytes,
                      uint32_t microbatch, hs_why *why);
    hs_status (*sent)(hs_comm *comm, uint32_t channel, uint64_t count, hs_why *why);
    hs_status (*progress)(hs_comm *comm, hs_why *why);
    /* What is waited for, or was last; after a failure, what failed. From any thread. */
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
    /* Sees off what was accepted by send (bounded by stall_ms), then closes and frees. NULL is fine. */
    void (*close)(hs_comm *comm);
} hs_comm_table;

extern const hs_comm_table hs_comm_tcp;
extern const hs_comm_table hs_comm_loop_table;

/* loop.c: how messages pass there. */
typedef enum hs_loop_mode {
    /* send returns when its receive was posted and filled: nothing is buffered */
    HS_LOOP_RENDEZVOUS,
    /* send returns at once, and bytes pass as late as they may: only when no rank can go on without, and
     * then those of one message that is waited for, chosen by the seed. Until then its place holds
     * poison. So runs are the same every time, and what reads or writes a place before its wait shows. */
    HS_LOOP_LATE
} hs_loop_mode;

/* The meeting place of `ranks` contexts in one process, of all replicas, each driven by a thread of its
 * own (tests). */
hs_status hs_comm_loop_create(uint32_t ranks, const hs_plan_channel *channels,
                              uint32_t channel_count, hs_loop_mode mode, uint64_t seed,
                              struct hs_comm_loop **out);
void hs_comm_loop_destroy(struct hs_comm_loop *loop);

#endif
