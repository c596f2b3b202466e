/* The connecting side of the handshake: a sender's way to its receiver. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "comm/greet_internal.h"
#include "core/clock.h"

enum {
    CONNECT_MS = 3000, /* of one address */
    BACKOFF_FIRST_MS = 10,
    BACKOFF_MOST_MS = 500,
};

void hs_dial_again(hs_talk *t, const char *trouble) {
    hs_talk_drop_socket(t);
    (void)snprintf(t->trouble, sizeof t->trouble, "%s", trouble);
    if (t->at == HS_TALK_CONNECT && t->address < t->addresses.count) {
        t->at = HS_TALK_ASK; /* with addresses left: begin_connect takes the next */
        return;
    }
    t->addresses.count = 0;
    t->backoff_ms = t->backoff_ms ? t->backoff_ms * 2 : BACKOFF_FIRST_MS;
    if (t->backoff_ms > BACKOFF_MOST_MS) t->backoff_ms = BACKOFF_MOST_MS;
    t->until_ns = hs_deadline_ns(t->backoff_ms);
    t->at = HS_TALK_PAUSE;
}

static hs_status say_hello(hs_greeter *g, hs_talk *t, hs_why *why) {
    HS_TRY(hs_hello_start(g->config, t->channel, &t->mine, why));
    t->at = HS_TALK_PUT_HELLO;
    t->moved = 0;
    return hs_talk_advance(g, t, why);
}

static hs_status begin_connect(hs_greeter *g, hs_talk *t, hs_why *why) {
    while (t->address < t->addresses.count) {
        const int i = t->address++;
        hs_address_text(&t->addresses.at[i], t->peer, sizeof t->peer);
        t->fd = socket(t->addresses.at[i].ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (t->fd < 0) {
            (void)snprintf(t->trouble, sizeof t->trouble, "socket: %s", strerror(errno));
            continue;
        }
        t->at = HS_TALK_CONNECT;
        t->until_ns = hs_deadline_ns(CONNECT_MS);
        if (connect(t->fd, (const void *)&t->addresses.at[i], t->addresses.bytes[i]) == 0)
            return say_hello(g, t, why);
        if (errno == EINPROGRESS) return HS_OK;
        (void)snprintf(t->trouble, sizeof t->trouble, "%s", strerror(errno));
        hs_talk_drop_socket(t);
    }
    char trouble[sizeof t->trouble];
    memcpy(trouble, t->trouble, sizeof trouble);
    t->at = HS_TALK_ASK;
    hs_dial_again(t, trouble);
    return HS_OK;
}

hs_status hs_dial_finish(hs_greeter *g, hs_talk *t, hs_why *why) {
    int error = 0;
    socklen_t bytes = sizeof error;
    if (getsockopt(t->fd, SOL_SOCKET, SO_ERROR, &error, &bytes) != 0) error = errno;
    if (error) {
        hs_dial_again(t, strerror(error));
        return HS_OK;
    }
    return say_hello(g, t, why);
}

hs_status hs_dial_tick(hs_greeter *g, uint32_t job, hs_why *why) {
    hs_talk *t = &g->talks[job];
    const int64_t now = hs_clock_ns();
    const uint32_t to = hs_greet_peer(g->config, t->channel, true);
    if (t->at == HS_TALK_PAUSE && now >= t->until_ns) {
        HS_TRY(hs_resolver_ask(g->resolver, job, g->config->peers[to].host,
                               g->config->peers[to].port, why));
        t->at = HS_TALK_ASK;
    }
    if (t->at == HS_TALK_CONNECT && now >= t->until_ns) hs_dial_again(t, "no answer to connect");
    if (t->at != HS_TALK_ASK) return HS_OK;
    if (t->addresses.count == 0) {
        const char *error;
        if (!hs_resolver_take(g->resolver, job, &t->addresses, &error)) return HS_OK;
        t->address = 0;
        if (t->addresses.count == 0) {
            hs_dial_again(t, error);
            return HS_OK;
        }
    }
    return begin_connect(g, t, why);
}
