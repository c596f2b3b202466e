/* Which way the messages of each channel of device memory go: the talk at create, and the end.
 *
 * A rank goes through its channels in ascending order, one whole talk after the other, so the lowest
 * that is not agreed on yet has both its ends come to it: no two ranks wait for each other. So links
 * of the library are made in one order too, by one thread, before the first step.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "comm/tcp_internal.h"
#include "core/clock.h"
#include "core/stop.h"

/* A link's first message sets up the way; it is the receiver's probe that counts. */
enum { PROBE_SENT = 0, PROBE_RECEIVED = HS_PROBE_BYTES / 2 };

static hs_status put(hs_comm *comm, uint32_t channel, void *record, size_t bytes, hs_why *why) {
    struct iovec part = {.iov_base = record, .iov_len = bytes};
    return hs_tcp_put(comm, channel, &part, 1, why);
}

/* Both ends say whether they can do what was chosen; *can: both. What is missing goes to failed. */
static hs_status exchange(hs_comm *comm, uint32_t channel, hs_answer *mine, bool *can,
                          char failed[200], hs_why *why) {
    hs_answer theirs;
    mine->magic = HS_ANSWER_MAGIC;
    mine->channel = channel;
    HS_TRY(put(comm, channel, mine, sizeof *mine, why));
    HS_TRY(hs_tcp_get(comm, channel, &theirs, sizeof theirs, why));
    if (theirs.magic != HS_ANSWER_MAGIC || theirs.channel != channel || theirs.way != mine->way ||
        !memchr(theirs.why, 0, sizeof theirs.why))
        return hs_fail(why, HS_E_LOST,
                       "rank %" PRIu32 " answered for channel %" PRIu32 " and the way %s, not for "
                       "channel %" PRIu32 " and %s",
                       comm->wait.peer, theirs.channel, hs_way_name(theirs.way), channel,
                       hs_way_name(mine->way));
    *can = mine->can && theirs.can;
    if (!mine->can)
        (void)snprintf(failed, 200, "%.199s", mine->why);
    else if (!theirs.can)
        (void)snprintf(failed, 200, "rank %" PRIu32 " cannot: %.160s", comm->wait.peer, theirs.why);
    if (comm->channels[channel].to == comm->position) memcpy(mine->id, theirs.id, sizeof mine->id);
    return HS_OK;
}

/* What this end needs of the other's memory. */
static hs_status import(hs_comm *comm, uint32_t channel, const hs_offer *theirs, hs_why *why) {
    hs_ways *w = comm->ways;
    hs_way *c = &w->channels[channel];
    hs_link_memory memory;
    memcpy(&memory, theirs->flags, sizeof memory);
    HS_TRY(w->links->import_memory(w->config->device, &memory, &c->peer_flags, why));
    c->peer_flag = c->peer_flags + theirs->flag;
    if (comm->channels[channel].from != comm->position) return HS_OK;
    memcpy(&memory, theirs->memory, sizeof memory);
    HS_TRY(w->links->import_memory(w->config->device, &memory, &c->there, why));
    c->there_bytes = memory.bytes;
    return HS_OK;
}

static void forget(hs_ways *w, hs_way *c) {
    if (c->there) w->links->release(w->config->device, c->there);
    if (c->peer_flags) w->links->release(w->config->device, c->peer_flags);
    c->there = c->peer_flags = c->peer_flag = NULL;
}

static hs_status try_ipc(hs_comm *comm, uint32_t channel, const hs_offer *theirs, bool *can,
                         char failed[200], hs_why *why) {
    hs_why local = {.text = ""};
    const hs_status st = import(comm, channel, theirs, &local);
    if (st != HS_OK && st != HS_E_UNSUPPORTED) return hs_fail(why, st, "%s", local.text);
    hs_answer mine = {.way = HS_WAY_IPC, .can = st == HS_OK};
    (void)snprintf(mine.why, sizeof mine.why, "%.255s", local.text);
    HS_TRY(exchange(comm, channel, &mine, can, failed, why));
    if (!*can) forget(comm->ways, &comm->ways->channels[channel]);
    return HS_OK;
}

/* A first message over a link that has just been joined: what it needs of the library is then made. */
static hs_status probe(hs_comm *comm, uint32_t channel, bool sends, hs_why *why) {
    hs_ways *w = comm->ways;
    hs_link *link = w->channels[channel].link;
    uint8_t *at = w->flag_memory + (size_t)comm->channel_count * HS_FLAG_BYTES;
    if (sends)
        HS_TRY(w->links->send(link, HS_STREAM_OUT, at + PROBE_SENT, HS_PROBE_BYTES / 2, why));
    else
        HS_TRY(w->links->receive(link, HS_STREAM_IN, at + PROBE_RECEIVED, HS_PROBE_BYTES / 2, why));
    HS_TRY(hs_ways_await_link(comm, channel, why));
    return hs_ways_await_stream(comm, sends ? HS_STREAM_OUT : HS_STREAM_IN, why);
}

/* The library has no second try: what fails here ends the attempt, and says with whom. */
static hs_status join(hs_comm *comm, uint32_t channel, hs_why *why) {
    hs_ways *w = comm->ways;
    hs_way *c = &w->channels[channel];
    const bool sends = comm->channels[channel].from == comm->position;
    hs_answer mine = {.way = HS_WAY_NCCL, .can = 1};
    char failed[200];
    bool can = false;
    if (sends) HS_TRY(w->links->name(w->config->device, mine.id, why));
    HS_TRY(exchange(comm, channel, &mine, &can, failed, why));
    if (!can) return hs_fail(why, HS_E_LOST, "%s", failed);
    HS_TRY(w->links->join(w->config->device, mine.id, sends ? 0 : 1, &c->link, why));
    HS_TRY(hs_ways_await_link(comm, channel, why));
    return probe(comm, channel, sends, why);
}

static hs_status agree(hs_comm *comm, uint32_t channel, hs_why *why) {
    hs_ways *w = comm->ways;
    hs_offer mine, theirs;
    char failed[200] = "", text[200];
    uint32_t except = 0, way;
    hs_tcp_doing(comm, "agree", channel, UINT32_MAX);
    hs_offer_fill(comm, channel, &mine);
    HS_TRY(put(comm, channel, &mine, sizeof mine, why));
    HS_TRY(hs_tcp_get(comm, channel, &theirs, sizeof theirs, why));
    const char *wrong = hs_offer_wrong(comm, channel, &theirs, text, sizeof text);
    if (wrong)
        return hs_fail(why, HS_E_LOST,
                       "rank %" PRIu32 " and this one do not agree on channel "
                       "%" PRIu32 ": %s",
                       comm->wait.peer, channel, wrong);
    HS_TRY(hs_offer_choose(comm, channel, &mine, &theirs, except, failed, &way, why));
    if (way == HS_WAY_IPC) {
        bool can = false;
        HS_TRY(try_ipc(comm, channel, &theirs, &can, failed, why));
        if (!can) {
            except |= UINT32_C(1) << HS_WAY_IPC;
            HS_TRY(hs_offer_choose(comm, channel, &mine, &theirs, except, failed, &way, why));
        }
    }
    if (way == HS_WAY_NCCL) {
        hs_why local = {.text = ""};
        const hs_status st = join(comm, channel, &local);
        if (st != HS_OK)
            return hs_fail(why, st, "channel %" PRIu32 " with rank %" PRIu32 " over NCCL: %s",
                           channel, hs_tcp_peer(comm, channel), local.text);
    }
    w->channels[channel].way = way;
    w->joined += way != HS_WAY_TCP;
    if (way == HS_WAY_TCP)
        HS_LOG(comm->log, HS_LOG_WARN, "messages of the device pass through the host",
               HS_I("channel", channel), HS_I("peer", comm->wait.peer), HS_S("way", "tcp"),
               HS_S("ipc", failed[0]     ? failed
                           : mine.why[0] ? mine.why
                                         : theirs.why));
    else
        HS_LOG(comm->log, HS_LOG_INFO, "channel of device memory", HS_I("channel", channel),
               HS_I("peer", comm->wait.peer), HS_S("way", hs_way_name(way)));
    return HS_OK;
}

/* What this device can share: where it cannot, that is said in offers, and no failure. */
static hs_status open(hs_comm *comm, hs_why *why) {
    hs_ways *w = comm->ways;
    const hs_comm_device *d = w->config;
    const hs_backend *b = d->backend;
    const size_t bytes = (size_t)comm->channel_count * HS_FLAG_BYTES + HS_PROBE_BYTES;
    if (!w->links) {
        (void)snprintf(w->facts.why, sizeof w->facts.why, "the backend %s joins no devices",
                       b->name);
        return HS_OK;
    }
    if (w->links->version != HS_LINKS_VERSION)
        return hs_fail(why, HS_E_UNSUPPORTED,
                       "the backend's links have version %" PRIu32
                       ", this engine needs %u: install both from one release",
                       w->links->version, HS_LINKS_VERSION);
    HS_TRY(b->alloc(d->device, bytes, -1, &w->flag_memory, why));
    for (uint32_t c = 0; c < comm->channel_count; c++)
        w->channels[c].flag = w->flag_memory + (size_t)c * HS_FLAG_BYTES;
    HS_TRY(w->links->facts(d->device, d->allowed & 1u << HS_WAY_NCCL, &w->facts, why));
    if (!(d->allowed & 1u << HS_WAY_IPC)) w->facts.shares_memory = 0;
    if (!w->facts.shares_memory) return HS_OK;
    hs_why local = {.text = ""};
    hs_status st = w->links->export_memory(d->device, d->arena, d->arena_bytes, &w->memory, &local);
    if (st == HS_OK)
        st = w->links->export_memory(d->device, w->flag_memory, bytes, &w->flags, &local);
    if (st == HS_E_UNSUPPORTED) {
        w->facts.shares_memory = 0;
        (void)snprintf(w->facts.why, sizeof w->facts.why, "%.159s", local.text);
        return HS_OK;
    }
    return st == HS_OK ? HS_OK : hs_fail(why, st, "%s", local.text);
}

static bool ours(const hs_comm *comm, uint32_t channel) {
    return comm->fds[channel] >= 0 && hs_comm_of_device(comm->channels[channel].kind) &&
           !comm->channels[channel].across;
}

/* Between replicas both ends put before they take. On one hardware queue that would wait for ever where a put
 * waits for the credit that the other end's take gives (W3 of ways.c), so these messages go over TCP. */
static hs_status look_across(const hs_comm *comm, hs_why *why) {
    const hs_comm_device *d = comm->ways->config;
    uint32_t count = 0;
    for (uint32_t c = 0; c < comm->channel_count; c++)
        count += comm->fds[c] >= 0 && hs_comm_of_device(comm->channels[c].kind) &&
                 comm->channels[c].across;
    if (count && !(d->allowed & 1u << HS_WAY_TCP))
        return hs_fail(why, HS_E_CONFIG,
                       "messages between replicas go over tcp alone in this version, which "
                       "launch.fabric = \"%s\" rules out; set launch.fabric = \"tcp\", or "
                       "parallel.replicas = 1",
                       d->fabric);
    if (count)
        HS_LOG(comm->log, HS_LOG_WARN, "messages between replicas pass through the host",
               HS_I("channels", count), HS_S("way", "tcp"));
    return HS_OK;
}

hs_status hs_ways_create(hs_comm *comm, const hs_comm_device *config, hs_why *why) {
    hs_ways *w = comm->ways = calloc(1, sizeof *w);
    if (w) {
        w->config = config;
        w->links = config->backend->links;
        w->channels = calloc((size_t)comm->channel_count + 1, sizeof *w->channels);
        w->polls = calloc((size_t)comm->channel_count + 1, sizeof *w->polls);
        w->values = calloc((size_t)comm->channel_count + 1, sizeof *w->values);
    }
    if (!w || !w->channels || !w->polls || !w->values)
        return hs_fail(why, HS_E_MEMORY, "no memory for the ways of %u channels",
                       comm->channel_count);
    HS_TRY(open(comm, why));
    HS_TRY(look_across(comm, why));
    uint32_t counts[HS_WAYS] = {0};
    for (uint32_t c = 0; c < comm->channel_count; c++) {
        if (!ours(comm, c)) continue;
        HS_TRY(agree(comm, c, why));
        counts[w->channels[c].way]++;
    }
    HS_LOG(comm->log, HS_LOG_INFO, "ways of device memory", HS_I("ipc", counts[HS_WAY_IPC]),
           HS_I("nccl", counts[HS_WAY_NCCL]), HS_I("tcp", counts[HS_WAY_TCP]));
    return HS_OK;
}

/* No peer may use this rank's memory when it goes, nor this rank a peer's. */
static void part(hs_comm *comm) {
    hs_ways *w = comm->ways;
    const int64_t deadline_ns = hs_deadline_ns(comm->stall_ms);
    const uint8_t bye = HS_BYE;
    for (uint32_t c = 0; c < comm->channel_count; c++) {
        if (w->channels[c].way == HS_WAY_TCP) continue;
        forget(w, &w->channels[c]);
        (void)send(comm->fds[c], &bye, 1, MSG_NOSIGNAL | MSG_DONTWAIT);
    }
    for (uint32_t c = 0; c < comm->channel_count; c++) {
        if (w->channels[c].way == HS_WAY_TCP || w->channels[c].left) continue;
        uint8_t theirs;
        struct pollfd polls[2] = {{.fd = comm->fds[c], .events = POLLIN},
                                  {.fd = hs_stop_fd(comm->stop), .events = POLLIN}};
        while (hs_clock_ns() < deadline_ns && !hs_stop_lost(comm->stop)) {
            if (poll(polls, 2, hs_deadline_poll_ms(deadline_ns)) > 0 && polls[0].revents) break;
        }
        (void)recv(comm->fds[c], &theirs, 1, MSG_DONTWAIT); /* so that closing resets nothing */
    }
}

void hs_ways_close(hs_comm *comm) {
    hs_ways *w = comm->ways;
    if (!w) return;
    const bool orderly = w->settled;
    for (uint32_t c = 0; (orderly || comm->config) && w->channels && c < comm->channel_count; c++)
        if (w->channels[c].link) w->links->leave(w->channels[c].link, orderly);
    if (orderly) part(comm);
    free(w->channels);
    free(w->polls);
    free(w->values);
    free(w);
    comm->ways = NULL;
}
