/* Ranks over TCP: one connection a directed channel, frames of wire/frame.h on it (lines.c).
 *
 * I1  After create bytes go one way only, from `from` to `to` (on a channel between replicas both ways);
 *     who closes its way has received all that it will, so a closed one means to a rank that still sends
 *     that the peer is gone. (A channel of device memory, ways.c: no bytes at all, but HS_BYE of each end.)
 * I2  A frame is whole or the communicator has failed: nothing is read or written after half a
 *     frame that does not fit.
 * I3  failed != HS_OK is final; every call then returns it without touching a socket.
 */
#include <errno.h>
#include <linux/sockios.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/uio.h>
#include <unistd.h>

#include "comm/tcp_internal.h"
#include "core/clock.h"
#include "core/files.h"
#include "core/stop.h"

hs_status hs_tcp_fail(hs_comm *comm, hs_status st, const hs_why *local, hs_why *why) {
    comm->failed = st;
    comm->failed_why = *local;
    return hs_fail(why, st, "%s", local->text);
}

hs_status hs_tcp_enter(hs_comm *comm, hs_why *why) {
    return comm->failed == HS_OK ? HS_OK : hs_fail(why, comm->failed, "%s", comm->failed_why.text);
}

void hs_tcp_doing(hs_comm *comm, const char *doing, uint32_t channel, uint32_t microbatch) {
    comm->wait =
        (hs_comm_wait){.doing = doing,
                       .channel = channel,
                       .peer = channel == UINT32_MAX ? UINT32_MAX : hs_tcp_peer(comm, channel),
                       .microbatch = microbatch,
                       .since_ns = hs_clock_ns()};
}

const char *hs_tcp_wait_text(const hs_comm_wait *w, char text[96]) {
    if (w->microbatch == UINT32_MAX)
        (void)snprintf(text, 96, "%s on channel %u", w->doing, w->channel);
    else
        (void)snprintf(text, 96, "%s of microbatch %u on channel %u", w->doing, w->microbatch,
                       w->channel);
    return text;
}

/* Waits until the channel's socket has one of `events`. deadline_ns moves with every byte, in the
 * caller. */
static hs_status await(hs_comm *comm, uint32_t channel, short events, int64_t deadline_ns,
                       hs_why *why) {
    char text[96];
    for (;;) {
        if (hs_stop_lost(comm->stop))
            return hs_fail(why, HS_E_LOST, "the supervisor says that a peer was lost (during %s)",
                           hs_tcp_wait_text(&comm->wait, text));
        if (comm->config && hs_stop_requested(comm->stop)) /* still in create */
            return hs_fail(why, HS_E_TERMINATED, "stopped on request before the first step");
        if (hs_clock_ns() >= deadline_ns)
            return hs_fail(why, HS_E_STALLED, "no byte moved for %u ms: %s with rank %u",
                           comm->patience_ms, hs_tcp_wait_text(&comm->wait, text), comm->wait.peer);
        struct pollfd polls[2] = {{.fd = comm->fds[channel], .events = events},
                                  {.fd = hs_stop_fd(comm->stop), .events = POLLIN}};
        const int n = poll(polls, 2, hs_deadline_poll_ms(deadline_ns));
        if (n < 0 && errno != EINTR) return hs_files_failed(why, "poll", errno);
        if (n > 0 && polls[0].revents) return HS_OK;
    }
}

static hs_status lost(hs_comm *comm, const char *how, hs_why *why) {
    char text[96];
    return hs_fail(why, HS_E_LOST, "rank %u is gone: %s during %s", comm->wait.peer, how,
                   hs_tcp_wait_text(&comm->wait, text));
}

hs_status hs_tcp_put(hs_comm *comm, uint32_t channel, struct iovec *parts, size_t count,
                     hs_why *why) {
    const int fd = comm->fds[channel];
    int64_t deadline_ns = hs_deadline_ns(comm->patience_ms);
    while (count) {
        const struct msghdr message = {.msg_iov = parts, .msg_iovlen = count};
        ssize_t n = sendmsg(fd, &message, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EAGAIN) {
            HS_TRY(await(comm, channel, POLLOUT | POLLRDHUP, deadline_ns, why));
            struct pollfd end = {.fd = fd, .events = POLLRDHUP};
            if (poll(&end, 1, 0) == 1 && (end.revents & POLLRDHUP)) /* I1 */
                return lost(comm, "the connection was closed", why);
            continue;
        }
        if (n < 0) return lost(comm, strerror(errno), why);
        deadline_ns = hs_deadline_ns(comm->patience_ms);
        for (; count && (size_t)n >= parts->iov_len; parts++, count--) n -= (ssize_t)parts->iov_len;
        if (count) {
            parts->iov_base = (uint8_t *)parts->iov_base + n;
            parts->iov_len -= (size_t)n;
        }
    }
    return HS_OK;
}

hs_status hs_tcp_get(hs_comm *comm, uint32_t channel, void *buffer, size_t bytes, hs_why *why) {
    uint8_t *at = buffer;
    int64_t deadline_ns = hs_deadline_ns(comm->patience_ms);
    while (bytes) {
        const ssize_t n = recv(comm->fds[channel], at, bytes, 0);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EAGAIN) {
            HS_TRY(await(comm, channel, POLLIN, deadline_ns, why));
            continue;
        }
        if (n <= 0) return lost(comm, n ? strerror(errno) : "the connection was closed", why);
        at += n;
        bytes -= (size_t)n;
        deadline_ns = hs_deadline_ns(comm->patience_ms);
    }
    return HS_OK;
}

static void tcp_last_wait(const hs_comm *comm, hs_comm_wait *wait) {
    *wait = comm->broken ? comm->failed_wait : comm->wait;
}

/* What was begun goes to the kernel; what the kernel took is on its way, and has until stall_ms to be
 * acknowledged. */
static void flush(hs_comm *comm) {
    hs_why why;
    for (uint32_t c = 0; comm->lines[0] && c < comm->channel_count; c++)
        if (comm->lines[0][c].ring &&
            hs_lines_sent(comm, c, comm->lines[0][c].begun, &why) != HS_OK)
            return;
    const int64_t deadline_ns = hs_deadline_ns(comm->stall_ms);
    for (uint32_t c = 0; c < comm->channel_count; c++) {
        if (comm->fds[c] < 0 || !hs_tcp_sends(comm, c)) continue;
        (void)shutdown(comm->fds[c], SHUT_WR);
        int left = 0;
        while (ioctl(comm->fds[c], SIOCOUTQ, &left) == 0 && left > 0 &&
               hs_clock_ns() < deadline_ns && !hs_stop_lost(comm->stop)) {
            struct pollfd end = {.fd = comm->fds[c], .events = POLLRDHUP};
            if (poll(&end, 1, 1) == 1) break; /* the other end closed: nothing more to hand over */
        }
    }
}

static uint32_t tcp_way(const hs_comm *comm, uint32_t channel) {
    return comm->ways ? comm->ways->channels[channel].way : HS_WAY_TCP;
}

static bool tcp_hangs(const hs_comm *comm) {
    return comm->ways && comm->ways->joined && !comm->ways->settled;
}

static void tcp_close(hs_comm *comm) {
    if (!comm) return;
    hs_ways_close(comm);
    if (comm->failed == HS_OK && comm->fds) flush(comm);
    for (uint32_t c = 0; comm->fds && c < comm->channel_count; c++)
        if (comm->fds[c] >= 0) close(comm->fds[c]);
    free(comm->fds);
    hs_lines_destroy(comm);
    free(comm);
}

static hs_status tcp_create(const hs_comm_config *config, hs_comm **out, hs_why *why) {
    *out = NULL;
    int listen_fd = config->listen_fd;
    bool receives = false;
    for (uint32_t c = 0; c < config->channel_count; c++)
        receives |=
            hs_comm_peer(&config->channels[c], config->rank, config->positions, true) != UINT32_MAX;
    hs_comm *comm = calloc(1, sizeof *comm);
    if (comm) comm->fds = malloc(((size_t)config->channel_count + 1) * sizeof *comm->fds);
    if (!comm || !comm->fds) {
        free(comm);
        if (listen_fd >= 0) close(listen_fd);
        return hs_fail(why, HS_E_MEMORY, "no memory for %u channels", config->channel_count);
    }
    comm->channels = config->channels;
    comm->channel_count = config->channel_count;
    comm->rank = config->rank;
    comm->positions = config->positions;
    comm->position = config->rank % config->positions;
    comm->stall_ms = config->attempt->stall_ms;
    comm->patience_ms = config->attempt->connect_ms;
    comm->config = config;
    comm->log = config->log;
    comm->stop = config->stop;
    hs_tcp_doing(comm, "connect", UINT32_MAX, UINT32_MAX);
    const int64_t since_ns = comm->wait.since_ns;
    for (uint32_t c = 0; c < comm->channel_count; c++) comm->fds[c] = -1;
    hs_status st = HS_OK;
    if (receives && listen_fd < 0) st = hs_greet_listen(config, &listen_fd, why);
    if (st == HS_OK) st = hs_greet_all(config, listen_fd, comm->fds, why);
    if (st == HS_OK) st = hs_lines_create(comm, config->most, why);
    if (st == HS_OK && config->device) st = hs_ways_create(comm, config->device, why);
    if (st != HS_OK) {
        comm->failed = st;
        tcp_close(comm);
        return st;
    }
    comm->config = NULL;
    comm->patience_ms = comm->stall_ms;
    hs_buffers_widen(comm);
    HS_LOG(comm->log, HS_LOG_INFO, "gang complete", HS_I("channels", comm->channel_count),
           HS_I("ms", (hs_clock_ns() - since_ns) / 1000000));
    *out = comm;
    return HS_OK;
}

const hs_comm_table hs_comm_tcp = {
    .name = "tcp",
    .create = tcp_create,
    .post = hs_lines_post,
    .got = hs_lines_got,
    .send = hs_lines_send,
    .sent = hs_lines_sent,
    .progress = hs_lines_progress,
    .last_wait = tcp_last_wait,
    .way = tcp_way,
    .put = hs_ways_put,
    .take = hs_ways_take,
    .await = hs_ways_await,
    .settle = hs_ways_settle,
    .hangs = tcp_hangs,
    .close = tcp_close,
};
