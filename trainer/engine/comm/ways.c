/* Messages of device memory, and the wait for a device that waits for others.
 *
 * IPC. Each end of a channel has a flag in its own memory, which the other end's device writes. A
 * message's tag is its number and microbatch in 32 bits. On the receiver's IN stream: write the
 * sender's flag (the place is free), wait for its own (the message is there). On the sender's OUT
 * stream: wait for its own flag, copy, write the receiver's. Waits are for the tag itself, so a
 * message out of turn lets nobody go on.
 *
 * W1  A place is written to only after the receiver's stream said that it is free, which it says
 *     behind all that its IN stream follows.
 * W2  A flag is written again only after the wait for what it said: for the next message the other
 *     end has to have passed this one.
 * W3  What is put on the streams of a rank would run in the order in which it was put there on one
 *     stream alone: it is the order of blocking sends and receives, which the plan's checker has
 *     shown to end. So no sharing of hardware queues between streams can stop it.
 * W4  The host waits for the device by asking it, and looks at the life lines, at the request to stop
 *     and at the flags meanwhile.
 *
 * No checksum is taken of what passes between devices: the host never sees it, and the links between
 * devices have their own.
 */
#include <errno.h>
#include <inttypes.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

#include "comm/tcp_internal.h"
#include "core/clock.h"
#include "core/files.h"
#include "core/stop.h"

enum {
    SPIN_NS = 50000, /* ask without a pause, first */
    NAP_NS = 50000,  /* between looks, then */
    TAG_MICROBATCH_BITS = 12,
};

/* Two messages in a row never have one tag; 0 is what a flag says before the first. */
static uint32_t tag_of(uint64_t sequence, uint32_t microbatch) {
    return (uint32_t)(sequence + 1) << TAG_MICROBATCH_BITS |
           (microbatch & ((1u << TAG_MICROBATCH_BITS) - 1));
}

static hs_way *enter(hs_comm *comm, const char *doing, uint32_t channel, size_t bytes,
                     uint32_t microbatch) {
    HS_ASSERT(channel < comm->channel_count && comm->fds[channel] >= 0 && comm->ways);
    hs_way *c = &comm->ways->channels[channel];
    const hs_plan_channel *ch = &comm->channels[channel];
    HS_ASSERT(c->way != HS_WAY_TCP && bytes == ch->bytes);
    HS_ASSERT((doing[0] == 'p' ? ch->from : ch->to) == comm->position);
    hs_tcp_doing(comm, doing, channel, microbatch);
    c->told = tag_of(c->sequence++, microbatch);
    return c;
}

/* --- waiting for the device -------------------------------------------------------------- */

/* The other end of a channel: whether it is still there, or left as it should. */
static hs_status look_at_line(hs_comm *comm, uint32_t channel, hs_why *why) {
    hs_way *c = &comm->ways->channels[channel];
    uint8_t byte;
    const ssize_t n = recv(comm->fds[channel], &byte, 1, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return HS_OK;
    const uint32_t peer = hs_tcp_peer(comm, channel);
    if (n == 1 && byte == HS_BYE) {
        c->left = true;
        return HS_OK;
    }
    comm->wait.channel = channel;
    comm->wait.peer = peer;
    if (n == 1)
        return hs_fail(why, HS_E_LOST,
                       "rank %" PRIu32 " sent bytes on channel %" PRIu32
                       ", whose messages go by %s",
                       peer, channel, hs_way_name(c->way));
    return hs_fail(
        why, HS_E_LOST,
        "rank %" PRIu32 " is gone: %s while this rank's device waited (channel %" PRIu32 ", %s)",
        peer, n ? strerror(errno) : "the connection was closed", channel, hs_way_name(c->way));
}

/* Sleeps a little, or until a line or the stop has something to say. */
static hs_status look(hs_comm *comm, int64_t nap_ns, hs_why *why) {
    hs_ways *w = comm->ways;
    if (hs_stop_lost(comm->stop))
        return hs_fail(why, HS_E_LOST,
                       "the supervisor says that a peer was lost (while this rank's device ran)");
    if (comm->config && hs_stop_requested(comm->stop)) /* still in create */
        return hs_fail(why, HS_E_TERMINATED, "stopped on request before the first step");
    for (uint32_t c = 0; c < comm->channel_count; c++) {
        const hs_way *way = &w->channels[c];
        const bool line = (way->way != HS_WAY_TCP || way->link) && !way->left;
        w->polls[c] = (struct pollfd){.fd = line ? comm->fds[c] : -1, .events = POLLIN};
    }
    w->polls[comm->channel_count] = (struct pollfd){.fd = hs_stop_fd(comm->stop), .events = POLLIN};
    const struct timespec nap = {.tv_nsec = nap_ns};
    const int n = ppoll(w->polls, comm->channel_count + 1, &nap, NULL);
    if (n < 0 && errno != EINTR) return hs_files_failed(why, "poll", errno);
    for (uint32_t c = 0; n > 0 && c < comm->channel_count; c++)
        if (w->polls[c].revents) HS_TRY(look_at_line(comm, c, why));
    for (uint32_t c = 0; c < comm->channel_count; c++) {
        bool done = false;
        if (w->channels[c].link) HS_TRY(w->links->joined(w->channels[c].link, &done, why));
    }
    return HS_OK;
}

/* *moved: whether a flag has changed since the last time; *missing: a channel whose last message is
 * not there yet, UINT32_MAX where there is none. */
static hs_status look_at_flags(hs_comm *comm, bool *moved, uint32_t *missing, hs_why *why) {
    hs_ways *w = comm->ways;
    *moved = false;
    *missing = UINT32_MAX;
    for (uint32_t c = comm->channel_count; c-- > 0;) {
        const hs_way *way = &w->channels[c];
        if (!way->told) continue;
        uint32_t value = 0;
        HS_TRY(w->links->peek(w->config->device, way->flag, &value, why));
        *moved |= value != w->values[c];
        w->values[c] = value;
        if (value != way->told) *missing = c;
    }
    return HS_OK;
}

static hs_status stalled(hs_comm *comm, uint32_t channel, hs_why *why) {
    const hs_way *way = &comm->ways->channels[channel];
    const bool sends = comm->channels[channel].from == comm->position;
    const uint32_t mask = (1u << TAG_MICROBATCH_BITS) - 1, has = comm->ways->values[channel];
    hs_tcp_doing(comm, sends ? "put" : "take", channel, way->told & mask);
    return hs_fail(why, HS_E_STALLED,
                   "no message moved for %" PRIu32 " ms: channel %" PRIu32 " %s rank %" PRIu32
                   " has come to message %" PRIu32 " (microbatch %" PRIu32 "), and waits for "
                   "%" PRIu32 " (microbatch %" PRIu32 ")",
                   comm->patience_ms, channel, sends ? "to" : "from", comm->wait.peer,
                   has >> TAG_MICROBATCH_BITS, has & mask, way->told >> TAG_MICROBATCH_BITS,
                   way->told & mask);
}

typedef struct patience {
    int64_t start_ns, deadline_ns, look_ns;
} patience;

static patience patience_of(const hs_comm *comm) {
    const int64_t now = hs_clock_ns(), all = (int64_t)comm->patience_ms * 1000000;
    return (patience){.start_ns = now, .deadline_ns = now + all, .look_ns = now + all / 4};
}

/* A turn of a wait (W4). A device that only computes may take its time. */
static hs_status turn(hs_comm *comm, patience *p, bool link, hs_why *why) {
    const int64_t now = hs_clock_ns();
    if (now - p->start_ns < SPIN_NS) {
        (void)sched_yield();
        return HS_OK;
    }
    HS_TRY(look(comm, NAP_NS, why));
    if (now < p->look_ns) return HS_OK;
    const int64_t all = (int64_t)comm->patience_ms * 1000000;
    bool moved = false;
    uint32_t missing;
    HS_TRY(look_at_flags(comm, &moved, &missing, why));
    if (moved || (missing == UINT32_MAX && !link)) p->deadline_ns = now + all;
    p->look_ns = now + all / 4 < p->deadline_ns ? now + all / 4 : p->deadline_ns;
    if (now < p->deadline_ns) return HS_OK;
    if (missing != UINT32_MAX) return stalled(comm, missing, why);
    return hs_fail(why, HS_E_STALLED, "NCCL was not done after %" PRIu32 " ms", comm->patience_ms);
}

static hs_status await_event(hs_comm *comm, int event, hs_why *why) {
    const hs_comm_device *d = comm->ways->config;
    if (comm->ways->joined == 0 && !comm->config) return d->backend->wait(d->device, event, why);
    for (patience p = patience_of(comm);;) {
        bool done = false;
        HS_TRY(d->backend->query(d->device, event, &done, why));
        if (done) return HS_OK;
        HS_TRY(turn(comm, &p, comm->config != NULL, why));
    }
}

hs_status hs_ways_await(hs_comm *comm, int event, hs_why *why) {
    hs_why local = {.text = ""};
    HS_TRY(hs_tcp_enter(comm, why));
    const hs_status st = await_event(comm, event, &local);
    return st == HS_OK ? HS_OK : hs_tcp_fail(comm, st, &local, why);
}

hs_status hs_ways_await_stream(hs_comm *comm, int stream, hs_why *why) {
    const hs_comm_device *d = comm->ways->config;
    HS_TRY(d->backend->record(d->device, stream, d->event, why));
    return hs_ways_await(comm, d->event, why);
}

hs_status hs_ways_await_link(hs_comm *comm, uint32_t channel, hs_why *why) {
    hs_ways *w = comm->ways;
    for (patience p = patience_of(comm);;) {
        bool done = false;
        HS_TRY(w->links->joined(w->channels[channel].link, &done, why));
        if (done) return HS_OK;
        HS_TRY(turn(comm, &p, true, why));
    }
}

hs_status hs_ways_settle(hs_comm *comm, hs_why *why) {
    if (!comm->ways || !comm->ways->joined) return HS_OK;
    HS_TRY(hs_ways_await_stream(comm, HS_STREAM_IN, why));
    HS_TRY(hs_ways_await_stream(comm, HS_STREAM_OUT, why));
    comm->ways->settled = true;
    return HS_OK;
}

/* --- messages ---------------------------------------------------------------------------- */

static hs_status put(hs_comm *comm, uint32_t channel, const hs_way *c, const uint8_t *from,
                     uint64_t offset, size_t bytes, hs_why *why) {
    const hs_ways *w = comm->ways;
    hs_device *device = w->config->device;
    if (c->way == HS_WAY_NCCL) {
        HS_TRY(w->links->send(c->link, HS_STREAM_OUT, from, bytes, why));
        HS_TRY(hs_ways_await_link(comm, channel, why));
        return w->links->write_value(device, HS_STREAM_OUT, c->flag, c->told, why);
    }
    if (offset > c->there_bytes || bytes > c->there_bytes - offset)
        return hs_fail(why, HS_E_BUG, "a message of %zu bytes misses the memory of rank %" PRIu32,
                       bytes, comm->wait.peer);
    HS_TRY(w->links->wait_value(device, HS_STREAM_OUT, c->flag, c->told, why)); /* W1 */
    HS_TRY(w->config->backend->copy(device, HS_STREAM_OUT, c->there + offset, from, bytes,
                                    HS_COPY_ON_DEVICE, why));
    return w->links->write_value(device, HS_STREAM_OUT, c->peer_flag, c->told, why);
}

static hs_status take(hs_comm *comm, uint32_t channel, const hs_way *c, uint8_t *to, size_t bytes,
                      hs_why *why) {
    const hs_ways *w = comm->ways;
    hs_device *device = w->config->device;
    if (c->way == HS_WAY_NCCL) {
        HS_TRY(w->links->receive(c->link, HS_STREAM_IN, to, bytes, why));
        HS_TRY(hs_ways_await_link(comm, channel, why));
        return w->links->write_value(device, HS_STREAM_IN, c->flag, c->told, why);
    }
    HS_TRY(w->links->write_value(device, HS_STREAM_IN, c->peer_flag, c->told, why));
    return w->links->wait_value(device, HS_STREAM_IN, c->flag, c->told, why);
}

hs_status hs_ways_put(hs_comm *comm, uint32_t channel, const uint8_t *from, uint64_t offset,
                      size_t bytes, uint32_t microbatch, hs_why *why) {
    hs_why local = {.text = ""};
    HS_TRY(hs_tcp_enter(comm, why));
    const hs_way *c = enter(comm, "put", channel, bytes, microbatch);
    const hs_status st = put(comm, channel, c, from, offset, bytes, &local);
    return st == HS_OK ? HS_OK : hs_tcp_fail(comm, st, &local, why);
}

hs_status hs_ways_take(hs_comm *comm, uint32_t channel, uint8_t *to, size_t bytes,
                       uint32_t microbatch, hs_why *why) {
    hs_why local = {.text = ""};
    HS_TRY(hs_tcp_enter(comm, why));
    const hs_way *c = enter(comm, "take", channel, bytes, microbatch);
    const hs_status st = take(comm, channel, c, to, bytes, &local);
    return st == HS_OK ? HS_OK : hs_tcp_fail(comm, st, &local, why);
}
