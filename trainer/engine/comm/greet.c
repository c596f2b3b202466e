/* The handshake: one thread, one poll loop, a small state machine a connection.
 *
 * I1  A channel is connected at most once; the first conversation that ends well is it.
 * I2  What is turned away is closed and logged and changes nothing else.
 * I3  A connection that came to us and does not finish its greeting in GREET_MS is dropped. One
 *     that we opened waits as long as the deadline of all: it may lie in the queue of a rank that
 *     still restores.
 * I4  No more than STRANGERS unfinished conversations are kept; the oldest makes room.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#include "comm/comm_internal.h"
#include "core/clock.h"
#include "core/hash.h"
#include "core/stop.h"
#include "wire/frame.h"

enum {
    GREET_MS = 2000,
    CONNECT_MS = 3000, /* of one address */
    BACKOFF_FIRST_MS = 10,
    BACKOFF_MOST_MS = 500,
    SAY_EVERY_MS = 5000, /* what is missing, into the log */
    STRANGERS = 64,
    BACKLOG = 128,
};

/* phases; those of a sender left, of a receiver right; what both do stands once */
typedef enum phase {
    FREE = 0,  /* of an incoming place: nobody */
    PAUSE,     /* sender: until `until_ns`, then ASK */
    ASK,       /* sender: waits for the address */
    CONNECT,   /* sender: connect(2) is under way */
    PUT_HELLO, /* sender, then GET_HELLO; receiver, then GET_MAC */
    GET_HELLO, /* sender, then PUT_MAC; receiver, then PUT_HELLO */
    PUT_MAC,   /* sender, then GET_WORD */
    GET_MAC,   /* receiver, then PUT_WORD */
    PUT_WORD,  /* receiver, then DONE */
    GET_WORD,  /* sender, then DONE */
    DONE,
} phase;

typedef struct talk {
    int fd;
    bool sender;
    phase at;
    uint32_t channel; /* sender: known from the start; receiver: from the hello */
    size_t moved;     /* bytes of this phase */
    int64_t until_ns; /* PAUSE, CONNECT, and all of a receiver's */
    int64_t order;    /* receiver: when it came, for I4 */
    hs_hello mine, theirs;
    uint8_t mac[32];
    uint8_t word;
    /* sender only */
    hs_addresses addresses;
    int address; /* the next to try */
    int64_t backoff_ms;
    char trouble[160]; /* the last thing that went wrong */
    char peer[80];     /* address, for the log */
} talk;

typedef struct greeter {
    const hs_comm_config *config;
    int listen_fd;
    int *fds;
    uint32_t missing; /* channels of this rank that are not connected */
    hs_resolver *resolver;
    uint32_t senders;
    int64_t arrivals;
    struct pollfd *polls;
    talk *talks; /* senders first, then STRANGERS places */
} greeter;

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

static uint32_t talks_count(const greeter *g) {
    return g->senders + STRANGERS;
}

static void fill_hello(const hs_comm_config *config, uint32_t channel, hs_hello *hello) {
    const hs_attempt *attempt = config->attempt;
    memset(hello, 0, sizeof *hello);
    memcpy(hello->magic, HS_HELLO_MAGIC, sizeof hello->magic);
    hello->version = HS_HELLO_VERSION;
    hello->channel = channel;
    hello->from = config->channels[channel].from;
    hello->to = config->channels[channel].to;
    hello->epoch = attempt->epoch;
    memcpy(hello->run, attempt->run, sizeof hello->run);
    memcpy(hello->plan_digest, attempt->plan_digest, sizeof hello->plan_digest);
    memcpy(hello->gang_nonce, attempt->nonce, sizeof hello->gang_nonce);
    hello->start_step = config->start_step;
}

/* mac = HMAC(key, role | sender's hello | receiver's hello), both without their mac. */
static void sign(const hs_comm_config *config, char role, const hs_hello *sender,
                 const hs_hello *receiver, uint8_t mac[32]) {
    hs_hmac hmac;
    hs_hmac_init(&hmac, config->attempt->key, sizeof config->attempt->key);
    hs_hmac_update(&hmac, &role, 1);
    hs_hmac_update(&hmac, sender, offsetof(hs_hello, mac));
    hs_hmac_update(&hmac, receiver, offsetof(hs_hello, mac));
    hs_hmac_final(&hmac, mac);
}

/* NULL where the hello fits `expected` (ours for that channel), else why it does not. */
static const char *disagreement(const hs_hello *hello, const hs_hello *expected, char *text,
                                size_t size) {
    if (memcmp(hello->run, expected->run, sizeof hello->run) != 0) {
        (void)snprintf(text, size, "it is of the run '%.63s'", hello->run);
    } else if (hello->epoch != expected->epoch) {
        (void)snprintf(text, size, "its epoch is %llu, this attempt's is %llu",
                       (unsigned long long)hello->epoch, (unsigned long long)expected->epoch);
    } else if (memcmp(hello->plan_digest, expected->plan_digest, sizeof hello->plan_digest) != 0) {
        (void)snprintf(text, size, "it runs another plan");
    } else if (memcmp(hello->gang_nonce, expected->gang_nonce, sizeof hello->gang_nonce) != 0) {
        (void)snprintf(text, size, "it belongs to another gang of this epoch");
    } else if (hello->channel != expected->channel || hello->from != expected->from ||
               hello->to != expected->to) {
        (void)snprintf(text, size, "it says channel %u from rank %u to %u, not %u from %u to %u",
                       hello->channel, hello->from, hello->to, expected->channel, expected->from,
                       expected->to);
    } else if (hello->start_step != expected->start_step) {
        (void)snprintf(text, size, "it starts after step %lld, this rank after %lld",
                       (long long)hello->start_step, (long long)expected->start_step);
    } else {
        return NULL;
    }
    return text;
}

static const char *bad_form(const hs_hello *hello) {
    if (memcmp(hello->magic, HS_HELLO_MAGIC, sizeof hello->magic) != 0)
        return "it does not speak this protocol";
    if (hello->version != HS_HELLO_VERSION) return "its handshake is of another version";
    return NULL;
}

/* --- what becomes of a talk -------------------------------------------------------------- */

static void drop_socket(talk *t) {
    if (t->fd >= 0) close(t->fd);
    t->fd = -1;
    t->moved = 0;
}

/* A sender tries again: the next address at once, all of them again after a pause, resolved anew.
 */
static void try_again(talk *t, const char *trouble) {
    drop_socket(t);
    (void)snprintf(t->trouble, sizeof t->trouble, "%s", trouble);
    if (t->at == CONNECT && t->address < t->addresses.count) {
        t->at = ASK; /* with addresses left: begin_connect takes the next */
        return;
    }
    t->addresses.count = 0;
    t->backoff_ms = t->backoff_ms ? t->backoff_ms * 2 : BACKOFF_FIRST_MS;
    if (t->backoff_ms > BACKOFF_MOST_MS) t->backoff_ms = BACKOFF_MOST_MS;
    t->until_ns = hs_deadline_ns(t->backoff_ms);
    t->at = PAUSE;
}

/* I2: what does not belong here. */
static void turn_away(greeter *g, talk *t, const char *reason) {
    HS_LOG(g->config->log, HS_LOG_WARN, "turned away", HS_S("from", t->peer), HS_S("why", reason));
    if (t->sender) {
        try_again(t, reason);
    } else {
        drop_socket(t);
        t->at = FREE;
    }
}

/* Keepalive finds the host that is gone while nothing is on its way. No TCP_USER_TIMEOUT: it counts
 * a closed window too, and so ends the connection of a peer that only computes; what does not move
 * any more is the waits' business (tcp.c), which know the deadline and name the peer. */
static void connected(greeter *g, talk *t) {
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
    t->at = t->sender ? DONE : FREE;
}

static hs_status start_hello(talk *t, const hs_comm_config *config, hs_why *why) {
    fill_hello(config, t->channel, &t->mine);
    if (getrandom(t->mine.nonce, sizeof t->mine.nonce, 0) != (ssize_t)sizeof t->mine.nonce)
        return hs_fail(why, HS_E_IO, "getrandom: %s", strerror(errno));
    return HS_OK;
}

/* A phase moved all its bytes: check them and choose the next. */
static hs_status next_phase(greeter *g, talk *t, hs_why *why) {
    const hs_comm_config *config = g->config;
    char text[128];
    const char *wrong = NULL;
    uint8_t expected[32];
    t->moved = 0;
    switch (t->at) {
    case PUT_HELLO:
        t->at = t->sender ? GET_HELLO : GET_MAC;
        break;
    case GET_HELLO:
        wrong = bad_form(&t->theirs);
        if (!wrong && !t->sender) {
            t->channel = t->theirs.channel;
            if (t->channel >= config->channel_count ||
                config->channels[t->channel].to != config->rank) {
                (void)snprintf(text, sizeof text, "channel %u does not end at this rank",
                               t->channel);
                wrong = text;
            } else if (start_hello(t, config, why) != HS_OK) {
                return HS_E_IO;
            }
        }
        if (!wrong) wrong = disagreement(&t->theirs, &t->mine, text, sizeof text);
        if (wrong) {
            turn_away(g, t, wrong);
        } else if (t->sender) {
            sign(config, 'R', &t->mine, &t->theirs, expected);
            if (!hs_bytes_equal(expected, t->theirs.mac, sizeof expected)) {
                turn_away(g, t, "its message code is wrong: it does not hold this attempt's key");
                break;
            }
            sign(config, 'S', &t->mine, &t->theirs, t->mac);
            t->at = PUT_MAC;
        } else if (g->fds[t->channel] >= 0) { /* I1 */
            (void)snprintf(text, sizeof text,
                           "channel %u is already connected: a second process of rank %u?",
                           t->channel, t->theirs.from);
            turn_away(g, t, text);
        } else {
            sign(config, 'R', &t->theirs, &t->mine, t->mine.mac);
            t->at = PUT_HELLO;
        }
        break;
    case PUT_MAC:
        t->at = GET_WORD;
        break;
    case GET_MAC:
        sign(config, 'S', &t->theirs, &t->mine, expected);
        if (!hs_bytes_equal(expected, t->mac, sizeof expected)) {
            turn_away(g, t, "its message code is wrong: it does not hold this attempt's key");
        } else if (g->fds[t->channel] >= 0) { /* I1 */
            (void)snprintf(text, sizeof text,
                           "channel %u is already connected: a second process of rank %u?",
                           t->channel, t->theirs.from);
            turn_away(g, t, text);
        } else {
            t->word = 1;
            t->at = PUT_WORD;
        }
        break;
    case PUT_WORD:
        if (g->fds[t->channel] >= 0) /* I1, another was faster since GET_MAC */
            turn_away(g, t, "another connection of its channel was faster");
        else
            connected(g, t);
        break;
    case GET_WORD:
        if (t->word == 1)
            connected(g, t);
        else
            turn_away(g, t, "the receiver turned this rank away; its log says why");
        break;
    case FREE:
    case PAUSE:
    case ASK:
    case CONNECT:
    case DONE:
        HS_ASSERT(!"a phase without bytes");
    }
    return HS_OK;
}

/* The bytes of a phase, and their direction: POLLIN, POLLOUT, or 0 where it has none. */
static short phase_bytes(talk *t, uint8_t **at, size_t *bytes) {
    switch (t->at) {
    case PUT_HELLO:
        *at = (uint8_t *)&t->mine, *bytes = sizeof t->mine;
        return POLLOUT;
    case GET_HELLO:
        *at = (uint8_t *)&t->theirs, *bytes = sizeof t->theirs;
        return POLLIN;
    case PUT_MAC:
        *at = t->mac, *bytes = sizeof t->mac;
        return POLLOUT;
    case GET_MAC:
        *at = t->mac, *bytes = sizeof t->mac;
        return POLLIN;
    case PUT_WORD:
        *at = &t->word, *bytes = 1;
        return POLLOUT;
    case GET_WORD:
        *at = &t->word, *bytes = 1;
        return POLLIN;
    case FREE:
    case PAUSE:
    case ASK:
    case CONNECT:
    case DONE:
        break;
    }
    *at = NULL, *bytes = 0;
    return 0;
}

/* The other end closed or broke the connection. */
static void hung_up(greeter *g, talk *t, const char *how) {
    if (!t->sender) {
        char reason[128];
        (void)snprintf(reason, sizeof reason, "it left in the middle of its greeting: %s", how);
        turn_away(g, t, reason);
        return;
    }
    /* Often a rank of an older attempt that is about to leave: quietly again, loud at the deadline.
     */
    HS_LOG(g->config->log, HS_LOG_DEBUG, "turned away by peer", HS_S("peer", t->peer),
           HS_S("why", how));
    try_again(t, "the other end closed the connection during the greeting (its log says why)");
}

static hs_status advance(greeter *g, talk *t, hs_why *why) {
    for (;;) {
        uint8_t *at;
        size_t bytes;
        const short direction = phase_bytes(t, &at, &bytes);
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

/* --- a sender's way to its receiver ------------------------------------------------------ */

static hs_status say_hello(greeter *g, talk *t, hs_why *why) {
    HS_TRY(start_hello(t, g->config, why));
    t->at = PUT_HELLO;
    t->moved = 0;
    return advance(g, t, why);
}

static hs_status begin_connect(greeter *g, talk *t, hs_why *why) {
    while (t->address < t->addresses.count) {
        const int i = t->address++;
        hs_address_text(&t->addresses.at[i], t->peer, sizeof t->peer);
        t->fd = socket(t->addresses.at[i].ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (t->fd < 0) {
            (void)snprintf(t->trouble, sizeof t->trouble, "socket: %s", strerror(errno));
            continue;
        }
        t->at = CONNECT;
        t->until_ns = hs_deadline_ns(CONNECT_MS);
        if (connect(t->fd, (const void *)&t->addresses.at[i], t->addresses.bytes[i]) == 0)
            return say_hello(g, t, why);
        if (errno == EINPROGRESS) return HS_OK;
        (void)snprintf(t->trouble, sizeof t->trouble, "%s", strerror(errno));
        drop_socket(t);
    }
    char trouble[sizeof t->trouble];
    memcpy(trouble, t->trouble, sizeof trouble);
    t->at = ASK;
    try_again(t, trouble);
    return HS_OK;
}

static hs_status finish_connect(greeter *g, talk *t, hs_why *why) {
    int error = 0;
    socklen_t bytes = sizeof error;
    if (getsockopt(t->fd, SOL_SOCKET, SO_ERROR, &error, &bytes) != 0) error = errno;
    if (error) {
        try_again(t, strerror(error));
        return HS_OK;
    }
    return say_hello(g, t, why);
}

/* Moves a sender that waits for time or for an address. */
static hs_status tick_sender(greeter *g, uint32_t job, hs_why *why) {
    talk *t = &g->talks[job];
    const int64_t now = hs_clock_ns();
    const uint32_t to = g->config->channels[t->channel].to;
    if (t->at == PAUSE && now >= t->until_ns) {
        HS_TRY(hs_resolver_ask(g->resolver, job, g->config->peers[to].host,
                               g->config->peers[to].port, why));
        t->at = ASK;
    }
    if (t->at == CONNECT && now >= t->until_ns) try_again(t, "no answer to connect");
    if (t->at != ASK) return HS_OK;
    if (t->addresses.count == 0) {
        const char *error;
        if (!hs_resolver_take(g->resolver, job, &t->addresses, &error)) return HS_OK;
        t->address = 0;
        if (t->addresses.count == 0) {
            try_again(t, error);
            return HS_OK;
        }
    }
    return begin_connect(g, t, why);
}

/* --- the receiver's door ----------------------------------------------------------------- */

static void let_in(greeter *g) {
    for (int i = 0; i < STRANGERS; i++) { /* a bounded number a turn, so that talks go on */
        struct sockaddr_storage address;
        socklen_t bytes = sizeof address;
        const int fd =
            accept4(g->listen_fd, (void *)&address, &bytes, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) return; /* EAGAIN, or one that left again; out of descriptors: later */
        talk *place = NULL, *oldest = NULL;
        for (uint32_t s = g->senders; s < talks_count(g); s++) {
            talk *t = &g->talks[s];
            if (t->at == FREE && !place) place = t;
            if (t->at != FREE && (!oldest || t->order < oldest->order)) oldest = t;
        }
        if (!place) { /* I4 */
            turn_away(g, oldest, "too many unfinished greetings at once");
            place = oldest;
        }
        memset(place, 0, sizeof *place);
        place->fd = fd;
        place->at = GET_HELLO;
        place->order = g->arrivals++;
        place->until_ns = hs_deadline_ns(GREET_MS);
        hs_address_text(&address, place->peer, sizeof place->peer);
    }
}

/* --- the loop ---------------------------------------------------------------------------- */

static void describe_missing(const greeter *g, char *text, size_t size) {
    const hs_comm_config *config = g->config;
    for (uint32_t s = 0; s < g->senders; s++) {
        const talk *t = &g->talks[s];
        if (t->at == DONE) continue;
        const uint32_t to = config->channels[t->channel].to;
        (void)snprintf(text, size, "rank %u at %.100s:%u does not take channel %u; last: %s", to,
                       config->peers[to].host, config->peers[to].port, t->channel,
                       t->trouble[0]     ? t->trouble
                       : t->at > CONNECT ? "connected, and it does not answer the greeting"
                                         : "no answer yet");
        return;
    }
    for (uint32_t c = 0; c < config->channel_count; c++) {
        if (config->channels[c].to != config->rank || g->fds[c] >= 0) continue;
        (void)snprintf(text, size, "rank %u has not connected channel %u", config->channels[c].from,
                       c);
        return;
    }
    (void)snprintf(text, size, "nothing");
}

/* Fills g->polls: stop, resolver, listener, then a place a talk. Returns the earliest time to wake.
 */
static int64_t prepare_polls(greeter *g, int64_t wake_ns) {
    g->polls[0] = (struct pollfd){.fd = hs_stop_fd(g->config->stop), .events = POLLIN};
    g->polls[1] =
        (struct pollfd){.fd = g->resolver ? hs_resolver_fd(g->resolver) : -1, .events = POLLIN};
    g->polls[2] = (struct pollfd){.fd = g->listen_fd, .events = POLLIN};
    for (uint32_t s = 0; s < talks_count(g); s++) {
        talk *t = &g->talks[s];
        uint8_t *at;
        size_t bytes;
        short events = phase_bytes(t, &at, &bytes);
        if (t->at == CONNECT) events = POLLOUT;
        g->polls[3 + s] = (struct pollfd){.fd = events ? t->fd : -1, .events = events};
        const bool timed = t->at == PAUSE || t->at == CONNECT || (!t->sender && t->at != FREE);
        if (timed && t->until_ns < wake_ns) wake_ns = t->until_ns;
    }
    return wake_ns;
}

static hs_status turn(greeter *g, hs_why *why) {
    for (uint32_t s = 0; s < talks_count(g); s++) {
        talk *t = &g->talks[s];
        const short revents = g->polls[3 + s].revents;
        if (revents && t->at == CONNECT)
            HS_TRY(finish_connect(g, t, why));
        else if (revents)
            HS_TRY(advance(g, t, why));
        if (t->sender)
            HS_TRY(tick_sender(g, s, why));
        else if (t->at != FREE && hs_clock_ns() >= t->until_ns) /* I3 */
            turn_away(g, t, "it did not finish its greeting in 2 s");
    }
    if (g->polls[2].revents) let_in(g);
    return HS_OK;
}

static hs_status greet(greeter *g, hs_why *why) {
    const hs_comm_config *config = g->config;
    const int64_t begin_ns = hs_clock_ns();
    const int64_t deadline_ns = begin_ns + (int64_t)config->attempt->connect_ms * 1000000;
    int64_t say_ns = begin_ns + (int64_t)SAY_EVERY_MS * 1000000;
    char text[400];
    for (uint32_t s = 0; s < g->senders; s++) HS_TRY(tick_sender(g, s, why));
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
        const int n = poll(g->polls, 3 + talks_count(g), hs_deadline_poll_ms(wake_ns));
        if (n < 0 && errno != EINTR) return hs_fail(why, HS_E_IO, "poll: %s", strerror(errno));
        if (n >= 0) HS_TRY(turn(g, why));
    }
    return HS_OK;
}

hs_status hs_greet_all(const hs_comm_config *config, int listen_fd, int *fds, hs_why *why) {
    greeter g = {.config = config, .listen_fd = listen_fd, .fds = fds};
    hs_status st = HS_OK;
    for (uint32_t c = 0; c < config->channel_count; c++) {
        fds[c] = -1;
        g.senders += config->channels[c].from == config->rank;
        g.missing +=
            config->channels[c].from == config->rank || config->channels[c].to == config->rank;
    }
    g.talks = calloc(talks_count(&g), sizeof *g.talks);
    g.polls = calloc(3 + (size_t)talks_count(&g), sizeof *g.polls);
    if (!g.talks || !g.polls) {
        st = hs_fail(why, HS_E_MEMORY, "no memory to greet %u channels", g.missing);
        goto done;
    }
    for (uint32_t s = 0, c = 0; s < g.senders; c++) {
        if (config->channels[c].from != config->rank) continue;
        g.talks[s++] = (talk){.fd = -1, .sender = true, .at = PAUSE, .channel = c};
    }
    for (uint32_t s = g.senders; s < talks_count(&g); s++) g.talks[s].fd = -1;
    if (listen_fd >= 0) (void)fcntl(listen_fd, F_SETFL, O_NONBLOCK);
    if (g.senders) HS_TRY_GOTO(st, done, hs_resolver_create(g.senders, &g.resolver, why));
    st = greet(&g, why);
done:
    hs_resolver_destroy(g.resolver);
    for (uint32_t s = 0; g.talks && s < talks_count(&g); s++)
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
