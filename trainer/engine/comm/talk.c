/* A conversation of the handshake: who says what next, and what becomes of it (I1, I2). */
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "comm/greet_internal.h"
#include "core/hash.h"

void hs_talk_drop_socket(hs_talk *t) {
    if (t->fd >= 0) close(t->fd);
    t->fd = -1;
    t->moved = 0;
}

void hs_talk_turn_away(hs_greeter *g, hs_talk *t, const char *reason) {
    HS_LOG(g->config->log, HS_LOG_WARN, "turned away", HS_S("from", t->peer), HS_S("why", reason));
    if (t->sender) {
        hs_dial_again(t, reason);
    } else {
        hs_talk_drop_socket(t);
        t->at = HS_TALK_FREE;
    }
}

/* Keepalive finds the host that is gone while nothing is on its way. No TCP_USER_TIMEOUT: it counts
 * a closed window too, and so ends the connection of a peer that only computes; what does not move
 * any more is the waits' business (tcp.c), which know the deadline and name the peer. */
static void connected(hs_greeter *g, hs_talk *t) {
    const int yes = 1, idle_s = 10, every_s = 5, times = 3;
    (void)setsockopt(t->fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    (void)setsockopt(t->fd, SOL_SOCKET, SO_KEEPALIVE, &yes, sizeof yes);
    (void)setsockopt(t->fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle_s, sizeof idle_s);
    (void)setsockopt(t->fd, IPPROTO_TCP, TCP_KEEPINTVL, &every_s, sizeof every_s);
    (void)setsockopt(t->fd, IPPROTO_TCP, TCP_KEEPCNT, &times, sizeof times);
    g->fds[t->channel] = t->fd;
    g->missing--;
    HS_LOG(g->config->log, HS_LOG_DEBUG, "channel connected", HS_I("channel", t->channel),
           HS_S("peer", t->peer));
    t->fd = -1;
    t->at = t->sender ? HS_TALK_DONE : HS_TALK_FREE;
}

/* I1: whether the channel is connected already; then this one is turned away. */
static bool connected_already(hs_greeter *g, hs_talk *t) {
    char text[128];
    if (g->fds[t->channel] < 0) return false;
    (void)snprintf(text, sizeof text,
                   "channel %u is already connected: a second process of rank %u?", t->channel,
                   t->theirs.from);
    hs_talk_turn_away(g, t, text);
    return true;
}

/* Whether their message code is the one that this attempt's key gives; else they are turned away. */
static bool holds_key(hs_greeter *g, hs_talk *t, const uint8_t expected[32], const uint8_t *mac) {
    if (hs_bytes_equal(expected, mac, 32)) return true;
    hs_talk_turn_away(g, t, "its message code is wrong: it does not hold this attempt's key");
    return false;
}

static hs_status got_hello(hs_greeter *g, hs_talk *t, hs_why *why) {
    const hs_comm_config *config = g->config;
    char text[128];
    uint8_t expected[32];
    const char *wrong = hs_hello_bad_form(&t->theirs);
    if (!wrong && !t->sender) {
        t->channel = t->theirs.channel;
        if (t->channel >= config->channel_count ||
            hs_greet_peer(config, t->channel, false) == UINT32_MAX) {
            (void)snprintf(text, sizeof text, "channel %u does not end at this rank", t->channel);
            wrong = text;
        } else if (hs_hello_start(config, t->channel, &t->mine, why) != HS_OK) {
            return HS_E_IO;
        }
    }
    if (!wrong) wrong = hs_hello_disagreement(&t->theirs, &t->mine, text, sizeof text);
    if (wrong) {
        hs_talk_turn_away(g, t, wrong);
    } else if (t->sender) {
        hs_hello_sign(config, 'R', &t->mine, &t->theirs, expected);
        if (!holds_key(g, t, expected, t->theirs.mac)) return HS_OK;
        hs_hello_sign(config, 'S', &t->mine, &t->theirs, t->mac);
        t->at = HS_TALK_PUT_MAC;
    } else if (!connected_already(g, t)) {
        hs_hello_sign(config, 'R', &t->theirs, &t->mine, t->mine.mac);
        t->at = HS_TALK_PUT_HELLO;
    }
    return HS_OK;
}

/* A phase moved all its bytes: check them and choose the next. */
static hs_status next_phase(hs_greeter *g, hs_talk *t, hs_why *why) {
    uint8_t expected[32];
    t->moved = 0;
    switch (t->at) {
    case HS_TALK_PUT_HELLO:
        t->at = t->sender ? HS_TALK_GET_HELLO : HS_TALK_GET_MAC;
        break;
    case HS_TALK_GET_HELLO:
        return got_hello(g, t, why);
    case HS_TALK_PUT_MAC:
        t->at = HS_TALK_GET_WORD;
        break;
    case HS_TALK_GET_MAC:
        hs_hello_sign(g->config, 'S', &t->theirs, &t->mine, expected);
        if (holds_key(g, t, expected, t->mac) && !connected_already(g, t)) {
            t->word = 1;
            t->at = HS_TALK_PUT_WORD;
        }
        break;
    case HS_TALK_PUT_WORD:
        if (g->fds[t->channel] >= 0) /* I1, another was faster since GET_MAC */
            hs_talk_turn_away(g, t, "another connection of its channel was faster");
        else
            connected(g, t);
        break;
    case HS_TALK_GET_WORD:
        if (t->word == 1)
            connected(g, t);
        else
            hs_talk_turn_away(g, t, "the receiver turned this rank away; its log says why");
        break;
    case HS_TALK_FREE:
    case HS_TALK_PAUSE:
    case HS_TALK_ASK:
    case HS_TALK_CONNECT:
    case HS_TALK_DONE:
        HS_ASSERT(!"a phase without bytes");
    }
    return HS_OK;
}

short hs_talk_bytes(hs_talk *t, uint8_t **at, size_t *bytes) {
    switch (t->at) {
    case HS_TALK_PUT_HELLO:
        *at = (uint8_t *)&t->mine, *bytes = sizeof t->mine;
        return POLLOUT;
    case HS_TALK_GET_HELLO:
        *at = (uint8_t *)&t->theirs, *bytes = sizeof t->theirs;
        return POLLIN;
    case HS_TALK_PUT_MAC:
        *at = t->mac, *bytes = sizeof t->mac;
        return POLLOUT;
    case HS_TALK_GET_MAC:
        *at = t->mac, *bytes = sizeof t->mac;
        return POLLIN;
    case HS_TALK_PUT_WORD:
        *at = &t->word, *bytes = 1;
        return POLLOUT;
    case HS_TALK_GET_WORD:
        *at = &t->word, *bytes = 1;
        return POLLIN;
    case HS_TALK_FREE:
    case HS_TALK_PAUSE:
    case HS_TALK_ASK:
    case HS_TALK_CONNECT:
    case HS_TALK_DONE:
        break;
    }
    *at = NULL, *bytes = 0;
    return 0;
}

/* The other end closed or broke the connection. */
static void hung_up(hs_greeter *g, hs_talk *t, const char *how) {
    if (!t->sender) {
        char reason[128];
        (void)snprintf(reason, sizeof reason, "it left in the middle of its greeting: %s", how);
        hs_talk_turn_away(g, t, reason);
        return;
    }
    /* Often a rank of an older attempt that is about to leave: quietly again, loud at the deadline.
     */
    HS_LOG(g->config->log, HS_LOG_DEBUG, "turned away by peer", HS_S("peer", t->peer),
           HS_S("why", how));
    hs_dial_again(t, "the other end closed the connection during the greeting (its log says why)");
}

hs_status hs_talk_advance(hs_greeter *g, hs_talk *t, hs_why *why) {
    for (;;) {
        uint8_t *at;
        size_t bytes;
        const short direction = hs_talk_bytes(t, &at, &bytes);
        if (!direction) return HS_OK;
        const ssize_t n = direction == POLLIN
                              ? recv(t->fd, at + t->moved, bytes - t->moved, 0)
                              : send(t->fd, at + t->moved, bytes - t->moved, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return HS_OK;
        if (n <= 0) {
            hung_up(g, t, n == 0 ? "closed" : strerror(errno));
            return HS_OK;
        }
        t->moved += (size_t)n;
        if (t->moved == bytes) HS_TRY(next_phase(g, t, why));
    }
}
