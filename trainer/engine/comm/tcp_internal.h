/* Inside the TCP transport: what tcp.c shares with the ways of device memory.
 *
 *   tcp.c     the connections, the talk at create, the table
 *   lines.c   messages: frames that move, piece by piece, while the rank computes or waits
 *   buffers.c how much a connection holds
 *   offer.c   what an end of a channel can do, and which way two ends choose
 *   agree.c   the talk about it, channel after channel, at create; close
 *   ways.c    messages of device memory, and the wait for the device
 */
#ifndef HS_COMM_TCP_INTERNAL_H
#define HS_COMM_TCP_INTERNAL_H

#include <poll.h>
#include <stdatomic.h>
#include <sys/uio.h>

#include "backend/links.h"
#include "comm/comm_internal.h"
#include "wire/frame.h"

/* A channel of device memory. */
typedef struct hs_way {
    uint32_t way;       /* HS_WAY_* */
    uint64_t sequence;  /* of the next message */
    uint32_t told;      /* tag of the last one issued; 0: none */
    uint8_t *flag;      /* of this end, in this device's memory: the tag that it has come to */
    uint8_t *peer_flag; /* IPC: of the other end */
    uint8_t *there;     /* IPC, sender: the receiver's arena as it is seen here */
    uint64_t there_bytes;
    uint8_t *peer_flags; /* IPC: what was imported, for release */
    hs_link *link;       /* NCCL */
    bool left;           /* the other end has said HS_BYE */
} hs_way;

/* All of them; NULL in a communicator of host memory. */
typedef struct hs_ways {
    const hs_comm_device *config;
    const hs_link_table *links;
    hs_link_facts facts;
    hs_link_memory memory, flags; /* exported */
    uint8_t *flag_memory;         /* HS_FLAG_BYTES a channel, then HS_PROBE_BYTES */
    hs_way *channels;             /* by channel */
    uint32_t joined;              /* that are not TCP */
    bool settled;                 /* every message is done */
    struct pollfd *polls;         /* the life lines, and the stop */
    uint32_t *values;             /* by channel, of flags: as last seen */
} hs_ways;

enum { HS_FLAG_BYTES = 64, HS_PROBE_BYTES = 256 };

/* A message that was begun. */
typedef struct hs_message {
    uint8_t *at; /* of a send: only read */
    uint64_t bytes;
    uint32_t microbatch;
} hs_message;

/* One way of a channel, as seen from this rank: what it was given and is not done with yet. */
typedef struct hs_line {
    uint32_t channel;
    bool in;
    uint64_t begun, ended; /* messages; the one of number `ended` is moving */
    hs_message *ring;      /* number n lies at n % most */
    uint64_t moved;        /* bytes of its frame: head, payload, end */
    uint64_t passed;       /* bytes of all frames */
    uint64_t hashed;       /* bytes of its payload that crc has */
    uint32_t crc;
    hs_frame head;
    hs_frame_end end;
} hs_line;

struct hs_comm {
    const hs_comm_config *config; /* create only */
    const hs_plan_channel *channels;
    uint32_t channel_count, rank, positions, position, stall_ms;
    uint32_t patience_ms; /* of the waits now: connect_ms at create, then stall_ms */
    const hs_log *log;
    struct hs_stop *stop;
    hs_status failed; /* I3 of tcp.c */
    hs_why failed_why;
    hs_comm_wait wait, failed_wait;
    _Atomic bool broken; /* failed_wait is written */
    int *fds;            /* by channel; -1: not ours */
    hs_line *lines[2];   /* out, in; by channel */
    uint32_t most;
    hs_message *messages; /* the lines' rings */
    hs_line **busy;       /* with messages begun and not ended */
    uint32_t busy_count;
    struct pollfd *polls; /* of the busy ones, and the stop */
    int64_t look_ns;      /* progress has nothing to do before */
    hs_ways *ways;
};

/* --- tcp.c ------------------------------------------------------------------------------- */

hs_status hs_tcp_put(hs_comm *comm, uint32_t channel, struct iovec *parts, size_t count,
                     hs_why *why);
hs_status hs_tcp_get(hs_comm *comm, uint32_t channel, void *buffer, size_t bytes, hs_why *why);
/* Notes what is waited for from now on. */
void hs_tcp_doing(hs_comm *comm, const char *doing, uint32_t channel, uint32_t microbatch);
/* HS_OK, or what it failed with before (I3). */
hs_status hs_tcp_enter(hs_comm *comm, hs_why *why);
/* The error state, for good. */
hs_status hs_tcp_fail(hs_comm *comm, hs_status st, const hs_why *local, hs_why *why);

/* "recv of microbatch 3 on channel 1", or without the microbatch where the message has none. */
const char *hs_tcp_wait_text(const hs_comm_wait *wait, char text[96]);

static inline bool hs_tcp_sends(const hs_comm *comm, size_t channel) {
    return comm->channels[channel].from == comm->position;
}
static inline bool hs_tcp_receives(const hs_comm *comm, size_t channel) {
    return comm->channels[channel].to == comm->position;
}

static inline uint32_t hs_tcp_peer(const hs_comm *comm, uint32_t channel) {
    return hs_comm_peer(&comm->channels[channel], comm->rank, comm->positions,
                        !hs_tcp_sends(comm, channel));
}

/* --- lines.c ----------------------------------------------------------------------------- */

/* After the handshake. HS_E_MEMORY. */
hs_status hs_lines_create(hs_comm *comm, uint32_t most, hs_why *why);
void hs_lines_destroy(hs_comm *comm);
hs_status hs_lines_post(hs_comm *comm, uint32_t channel, void *buf, size_t bytes,
                        uint32_t microbatch, hs_why *why);
hs_status hs_lines_got(hs_comm *comm, uint32_t channel, uint64_t count, hs_why *why);
hs_status hs_lines_send(hs_comm *comm, uint32_t channel, const void *buf, size_t bytes,
                        uint32_t microbatch, hs_why *why);
hs_status hs_lines_sent(hs_comm *comm, uint32_t channel, uint64_t count, hs_why *why);
hs_status hs_lines_progress(hs_comm *comm, hs_why *why);

/* --- buffers.c --------------------------------------------------------------------------- */

/* Room for a message in the kernel, at most HS_BUFFER_MOST, as far as the machine allows; logs where that
 * is less. */
void hs_buffers_widen(const hs_comm *comm);

/* --- offer.c ----------------------------------------------------------------------------- */

void hs_offer_fill(const hs_comm *comm, uint32_t channel, hs_offer *offer);
/* NULL where it is an offer for this channel from its other end; else why not. */
const char *hs_offer_wrong(const hs_comm *comm, uint32_t channel, const hs_offer *offer, char *text,
                           size_t size);
/* The rule, the same at both ends: IPC before NCCL before TCP, of what both may and can do, without
 * `except` (1 << HS_WAY_*). HS_E_CONFIG names both ranks and the mend. */
hs_status hs_offer_choose(const hs_comm *comm, uint32_t channel, const hs_offer *mine,
                          const hs_offer *theirs, uint32_t except, const char *failed,
                          uint32_t *way, hs_why *why);
const char *hs_way_name(uint32_t way);

/* --- agree.c ----------------------------------------------------------------------------- */

hs_status hs_ways_create(hs_comm *comm, const hs_comm_device *config, hs_why *why);
/* After a settle that went well: tells the peers, and waits until they have told, so that no memory goes
 * while a peer has it imported. Else it tells nobody, and they are right to miss this rank. */
void hs_ways_close(hs_comm *comm);

/* --- ways.c ------------------------------------------------------------------------------ */

hs_status hs_ways_put(hs_comm *comm, uint32_t channel, const uint8_t *from, uint64_t offset,
                      size_t bytes, uint32_t microbatch, hs_why *why);
hs_status hs_ways_take(hs_comm *comm, uint32_t channel, uint8_t *to, size_t bytes,
                       uint32_t microbatch, hs_why *why);
hs_status hs_ways_await(hs_comm *comm, int event, hs_why *why);
hs_status hs_ways_settle(hs_comm *comm, hs_why *why);
/* The same as await for what one stream has so far, and for a link's own work. */
hs_status hs_ways_await_stream(hs_comm *comm, int stream, hs_why *why);
hs_status hs_ways_await_link(hs_comm *comm, uint32_t channel, hs_why *why);

#endif
