/* The receiving side of the handshake: the listener, and who is accepted (I3, I4). */
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "comm/greet_internal.h"
#include "core/clock.h"

enum { BACKLOG = 128 };

void hs_accept_peers(hs_greeter *g) {
    for (int i = 0; i < HS_STRANGERS; i++) { /* a bounded number a turn, so that talks go on */
        struct sockaddr_storage address;
        socklen_t bytes = sizeof address;
        const int fd =
            accept4(g->listen_fd, (void *)&address, &bytes, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) return; /* EAGAIN, or one that left again; out of descriptors: later */
        hs_talk *place = NULL, *oldest = NULL;
        for (uint32_t s = g->senders; s < hs_talks_count(g); s++) {
            hs_talk *t = &g->talks[s];
            if (t->at == HS_TALK_FREE && !place) place = t;
            if (t->at != HS_TALK_FREE && (!oldest || t->order < oldest->order)) oldest = t;
        }
        if (!place) { /* I4 */
            hs_talk_turn_away(g, oldest, "too many unfinished greetings at once");
            place = oldest;
        }
        memset(place, 0, sizeof *place);
        place->fd = fd;
        place->at = HS_TALK_GET_HELLO;
        place->order = g->arrivals++;
        place->until_ns = hs_deadline_ns(HS_GREET_MS);
        hs_address_text(&address, place->peer, sizeof place->peer);
    }
}

hs_status hs_greet_listen(const hs_comm_config *config, int *listen_fd, hs_why *why) {
    const hs_attempt_rank *self = &config->peers[config->rank];
    hs_resolver *resolver;
    hs_addresses addresses = {.count = 0};
    const char *error = "";
    *listen_fd = -1;
    HS_TRY(hs_resolver_create(1, &resolver, why));
    hs_status st = hs_resolver_ask(resolver, 0, self->host, self->port, why);
    const int64_t deadline_ns = hs_deadline_ns(config->attempt->connect_ms);
    while (st == HS_OK && !hs_resolver_take(resolver, 0, &addresses, &error)) {
        struct pollfd wait = {.fd = hs_resolver_fd(resolver), .events = POLLIN};
        (void)poll(&wait, 1, hs_deadline_poll_ms(deadline_ns));
        if (hs_clock_ns() >= deadline_ns)
            st = hs_fail(why, HS_E_STALLED, "no answer for %s", self->host);
    }
    hs_resolver_destroy(resolver);
    if (st != HS_OK) return st;
    if (addresses.count == 0)
        return hs_fail(why, HS_E_CONFIG, "rank %u's own host '%s' has no address: %s", config->rank,
                       self->host, error);
    const int fd = socket(addresses.at[0].ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) return hs_fail(why, HS_E_IO, "socket: %s", strerror(errno));
    const int yes = 1;
    (void)setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(fd, (const void *)&addresses.at[0], addresses.bytes[0]) != 0 ||
        listen(fd, BACKLOG) != 0) {
        const bool taken = errno == EADDRINUSE;
        st = hs_fail(why, taken ? HS_E_BUSY : HS_E_CONFIG, "rank %u cannot listen on %s:%u: %s%s",
                     config->rank, self->host, self->port, strerror(errno),
                     taken ? "; stop what listens there, or set launch.port_base to a free range"
                           : "");
        close(fd);
        return st;
    }
    *listen_fd = fd;
    return HS_OK;
}
