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

#include <stddef.h>
#include <stdint.h>

#include "core/log.h"
#include "core/status.h"
#include "wire/attempt.h"
#include "wire/plan.h"

typedef struct hs_comm hs_comm; /* opaque, a transport's own */
struct hs_comm_loop;            /* loop.c: what the contexts of one process share */
struct hs_stop;                 /* core/stop.h */

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
    const hs_log *log;
} hs_comm_config;

/* What the communicator waits for, or waited for last: for the watchdog's words. */
typedef struct hs_comm_wait {
    const char *doing;   /* "connect", "send" or "recv"; "" before the first wait */
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
