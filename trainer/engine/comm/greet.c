/* The handshake's loop: one thread, one poll, a small state machine a connection (greet_internal.h). */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "comm/greet_internal.h"
#include "core/clock.h"
#include "core/files.h"
#include "core/stop.h"

enum { SAY_EVERY_MS = 5000 }; /* what is missing, into the log */

void hs_address_text(const struct sockaddr_storage *address, char *text, size_t size) {
    char host[INET6_ADDRSTRLEN] = "?";
    if (address->ss_family == AF_INET6) {
        const struct sockaddr_in6 *in6 = (const void *)address;
        (void)inet_ntop(AF_INET6, &in6->sin6_addr, host, sizeof host);
        (void)snprintf(text, size, "[%s]:%u", host, ntohs(in6->sin6_port));
    } else {
        const struct sockaddr_in *in = (const void *)address;
        (void)inet_ntop(AF_INET, &in->sin_addr, host, sizeof host);
        (void)snprintf(text, size, "%s:%u", host, ntohs(in->sin_port));
    }
}

static void describe_missing(const hs_greeter *g, char *text, size_t size) {
    const hs_comm_config *config = g->config;
    for (uint32_t s = 0; s < g->senders; s++) {
        const hs_talk *t = &g->talks[s];
        if (t->at == HS_TALK_DONE) continue;
        const uint32_t to = hs_greet_peer(config, t->channel, true);
        (void)snprintf(text, size, "rank %u at %.100s:%u does not take channel %u; last: %s", to,
                       config->peers[to].host, config->peers[to].port, t->channel,
                       t->trouble[0]             ? t->trouble
                       : t->at > HS_TALK_CONNECT ? "connected, and it does not answer the greeting"
                                                 : "no answer yet");
        return;
    }
    for (uint32_t c = 0; c < config->channel_count; c++) {
        const uint32_t from = hs_greet_peer(config, c, false);
        if (from == UINT32_MAX || g->fds[c] >= 0) continue;
        (void)snprintf(text, size, "rank %u has not connected channel %u", from, c);
        return;
    }
    (void)snprintf(text, size, "nothing");
}

/* Fills g->polls: stop, resolver, listener, then a place a talk. Returns the earliest time to wake.
 */
static int64_t prepare_polls(hs_greeter *g, int64_t wake_ns) {
    g->polls[0] = (struct pollfd){.fd = hs_stop_fd(g->config->stop), .events = POLLIN};
    g->polls[1] =
        (struct pollfd){.fd = g->resolver ? hs_resolver_fd(g->resolver) : -1, .events = POLLIN};
    g->polls[2] = (struct pollfd){.fd = g->listen_fd, .events = POLLIN};
    for (uint32_t s = 0; s < hs_talks_count(g); s++) {
        hs_talk *t = &g->talks[s];
        uint8_t *at;
        size_t bytes;
        short events = hs_talk_bytes(t, &at, &bytes);
        if (t->at == HS_TALK_CONNECT) events = POLLOUT;
        g->polls[3 + s] = (struct pollfd){.fd = events ? t->fd : -1, .events = events};
        const bool timed = t->at == HS_TALK_PAUSE || t->at == HS_TALK_CONNECT ||
                           (!t->sender && t->at != HS_TALK_FREE);
        if (timed && t->until_ns < wake_ns) wake_ns = t->until_ns;
    }
    return wake_ns;
}

static hs_status turn(hs_greeter *g, hs_why *why) {
    for (uint32_t s = 0; s < hs_talks_count(g); s++) {
        hs_talk *t = &g->talks[s];
        const short revents = g->polls[3 + s].revents;
        if (revents && t->at == HS_TALK_CONNECT)
            HS_TRY(hs_dial_finish(g, t, why));
        else if (revents)
            HS_TRY(hs_talk_advance(g, t, why));
        if (t->sender)
            HS_TRY(hs_dial_tick(g, s, why));
        else if (t->at != HS_TALK_FREE && hs_clock_ns() >= t->until_ns) /* I3 */
            hs_talk_turn_away(g, t, "it did not finish its greeting in 2 s");
    }
    if (g->polls[2].revents) hs_accept_peers(g);
    return HS_OK;
}

static hs_status greet(hs_greeter *g, hs_why *why) {
    const hs_comm_config *config = g->config;
    const int64_t begin_ns = hs_clock_ns();
    const int64_t deadline_ns = begin_ns + (int64_t)config->attempt->connect_ms * 1000000;
    int64_t say_ns = begin_ns + (int64_t)SAY_EVERY_MS * 1000000;
    char text[400];
    for (uint32_t s = 0; s < g->senders; s++) HS_TRY(hs_dial_tick(g, s, why));
    while (g->missing) {
        if (hs_stop_lost(config->stop))
            return hs_fail(why, HS_E_LOST,
                           "a peer was lost while this rank connected to its peers");
        if (hs_stop_requested(config->stop))
            return hs_fail(why, HS_E_TERMINATED, "stopped on request before the first step");
        const int64_t now = hs_clock_ns();
        if (now >= deadline_ns) {
            describe_missing(g, text, sizeof text);
            return hs_fail(why, HS_E_STALLED, "the gang is not complete after %u ms: %s",
                           config->attempt->connect_ms, text);
        }
        if (now >= say_ns) {
            describe_missing(g, text, sizeof text);
            HS_LOG(config->log, HS_LOG_INFO, "waiting for peers", HS_I("channels", g->missing),
                   HS_S("first", text), HS_I("ms", (now - begin_ns) / 1000000));
            say_ns = now + (int64_t)SAY_EVERY_MS * 1000000;
        }
        const int64_t wake_ns = prepare_polls(g, deadline_ns < say_ns ? deadline_ns : say_ns);
        const int n = poll(g->polls, 3 + hs_talks_count(g), hs_deadline_poll_ms(wake_ns));
        if (n < 0 && errno != EINTR) return hs_files_failed(why, "poll", errno);
        if (n >= 0) HS_TRY(turn(g, why));
    }
    return HS_OK;
}

hs_status hs_greet_all(const hs_comm_config *config, int listen_fd, int *fds, hs_why *why) {
    hs_greeter g = {.config = config, .listen_fd = listen_fd, .fds = fds};
    hs_status st = HS_OK;
    for (uint32_t c = 0; c < config->channel_count; c++) {
        fds[c] = -1;
        g.senders += hs_greet_peer(config, c, true) != UINT32_MAX;
        g.receivers += hs_greet_peer(config, c, false) != UINT32_MAX;
        g.missing = g.senders + g.receivers;
    }
    g.talks = calloc(hs_talks_count(&g), sizeof *g.talks);
    g.polls = calloc(3 + (size_t)hs_talks_count(&g), sizeof *g.polls);
    if (!g.talks || !g.polls) {
        st = hs_fail(why, HS_E_MEMORY, "no memory to greet %u channels", g.missing);
        goto done;
    }
    for (uint32_t s = 0, c = 0; s < g.senders; c++) {
        if (hs_greet_peer(config, c, true) == UINT32_MAX) continue;
        g.talks[s++] = (hs_talk){.fd = -1, .sender = true, .at = HS_TALK_PAUSE, .channel = c};
    }
    for (uint32_t s = g.senders; s < hs_talks_count(&g); s++) g.talks[s].fd = -1;
    if (listen_fd >= 0) (void)fcntl(listen_fd, F_SETFL, O_NONBLOCK);
    if (g.senders) HS_TRY_GOTO(st, done, hs_resolver_create(g.senders, &g.resolver, why));
    st = greet(&g, why);
done:
    hs_resolver_destroy(g.resolver);
    for (uint32_t s = 0; g.talks && s < hs_talks_count(&g); s++)
        if (g.talks[s].fd >= 0) close(g.talks[s].fd);
    for (uint32_t c = 0; st != HS_OK && c < config->channel_count; c++) {
        if (fds[c] >= 0) close(fds[c]);
        fds[c] = -1;
    }
    if (listen_fd >= 0) close(listen_fd);
    free(g.talks);
    free(g.polls);
    return st;
}
