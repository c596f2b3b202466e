#include "run/agent_link.h"

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/clock.h"
#include "run/message.h"
#include "wire/exit.h"

enum { RECONNECT_MS = 50, TRACE_MAX = 1024 };

/* Lines of metrics that the agent has not taken: u16 length, bytes, in a ring; the oldest make
 * room. */
typedef struct line_ring {
    uint8_t bytes[HS_LINK_METRICS_BYTES];
    size_t first, used;
    uint64_t dropped;
} line_ring;

typedef struct ready {
    bool any, unsent, final;
    int64_t step;
} ready;

struct hs_agent_link {
    const char *path;
    uint32_t rank;
    uint64_t epoch;
    const hs_log *log;
    int fd; /* -1: away */
    bool greeted;
    int64_t next_try_ns;
    const hs_snapshot *snapshot;
    /* what came */
    bool slots_came;
    int slot_fds[HS_SNAPSHOT_SLOTS_MAX], slot_count, restore;
    int64_t committed;
    /* a proposal of algorithms, while hs_agent_link_agree waits */
    const void *proposal; /* NULL: none */
    size_t proposal_bytes;
    bool proposal_unsent;
    char *agreed; /* where the answer goes */
    size_t agreed_room, agreed_bytes;
    bool agreed_came;
    int64_t agreed_code;
    /* data that comes ahead */
    bool ahead, read_unsent;
    int64_t read;  /* the step whose data this rank has read last */
    int64_t there; /* the step up to which its data is there */
    int64_t late;  /* exit code of why not further; 0: nothing is wrong */
    char late_words[HS_LINK_DATA_MAX + 1];
    /* what waits */
    line_ring metrics;
    ready readies[HS_SNAPSHOT_SLOTS_MAX];
    bool words_unsent, trace_unsent;
    char words[HS_LINK_WORDS_MAX];
    char trace[TRACE_MAX];
    char payload[HS_MSG_MAX];
};

hs_status hs_agent_link_create(const char *socket_path, uint32_t rank, uint64_t epoch,
                               const hs_log *log, hs_agent_link **out, hs_why *why) {
    *out = NULL;
    HS_TRY(hs_message_check_path(socket_path, why));
    hs_agent_link *link = calloc(1, sizeof *link);
    if (!link) return hs_fail(why, HS_E_MEMORY, "no memory for the talk with the agent");
    link->path = socket_path;
    link->rank = rank;
    link->epoch = epoch;
    link->log = log;
    link->fd = -1;
    link->restore = -1;
    link->committed = -1;
    *out = link;
    return HS_OK;
}

void hs_agent_link_destroy(hs_agent_link *link) {
    if (!link) return;
    for (int i = 0; i < link->slot_count; i++) close(link->slot_fds[i]);
    if (link->fd >= 0) close(link->fd);
    free(link);
}

/* --- the ring ---------------------------------------------------------------------------- */

static void ring_copy_in(line_ring *ring, const void *data, size_t bytes) {
    const size_t at = (ring->first + ring->used) % sizeof ring->bytes;
    const size_t head = bytes < sizeof ring->bytes - at ? bytes : sizeof ring->bytes - at;
    memcpy(ring->bytes + at, data, head);
    memcpy(ring->bytes, (const uint8_t *)data + head, bytes - head);
    ring->used += bytes;
}

static void ring_copy_out(const line_ring *ring, size_t skip, void *data, size_t bytes) {
    const size_t at = (ring->first + skip) % sizeof ring->bytes;
    const size_t head = bytes < sizeof ring->bytes - at ? bytes : sizeof ring->bytes - at;
    memcpy(data, ring->bytes + at, head);
    memcpy((uint8_t *)data + head, ring->bytes, bytes - head);
}

static uint16_t ring_length(const line_ring *ring) {
    uint16_t length;
    ring_copy_out(ring, 0, &length, sizeof length);
    return length;
}

static void ring_pop(line_ring *ring) {
    const size_t bytes = sizeof(uint16_t) + ring_length(ring);
    ring->first = (ring->first + bytes) % sizeof ring->bytes;
    ring->used -= bytes;
}

static void ring_push(line_ring *ring, const char *line, uint16_t length) {
    while (ring->used + sizeof length + length > sizeof ring->bytes) {
        ring_pop(ring);
        ring->dropped++;
    }
    ring_copy_in(ring, &length, sizeof length);
    ring_copy_in(ring, line, length);
}

/* --- the connection ---------------------------------------------------------------------- */

static void disconnect(hs_agent_link *link) {
    HS_LOG(link->log, HS_LOG_WARN, "agent lost", HS_S("socket", link->path));
    close(link->fd);
    link->fd = -1;
    link->greeted = false;
    link->next_try_ns = hs_deadline_ns(RECONNECT_MS);
    /* An agent that comes after this one learns the newest snapshots again; READY twice does no
     * harm. */
    for (int i = 0; i < HS_SNAPSHOT_SLOTS_MAX; i++) link->readies[i].unsent = link->readies[i].any;
    link->proposal_unsent = link->proposal != NULL;
    link->read_unsent = link->ahead; /* it takes nothing away before it knows */
}

/* HS_OK: sent. HS_E_AGAIN: later. HS_E_LOST: the connection is gone (already noted). */
static hs_status send_one(hs_agent_link *link, uint32_t type, hs_msg msg, const void *payload,
                          size_t bytes, const int *fds, int fd_count) {
    msg.type = type;
    msg.rank = (int32_t)link->rank;
    msg.epoch = link->epoch;
    const hs_status st = hs_message_send(link->fd, &msg, payload, bytes, fds, fd_count);
    if (st == HS_E_LOST) disconnect(link);
    return st;
}

static hs_status send_waiting(hs_agent_link *link) {
    if (!link->greeted) {
        int fds[HS_SNAPSHOT_SLOTS_MAX];
        const int count = link->snapshot ? hs_snapshot_fds(link->snapshot, fds) : 0;
        HS_TRY(send_one(link, HS_MSG_HELLO, (hs_msg){.a = getpid()}, NULL, 0, fds, count));
        link->greeted = true;
    }
    if (link->read_unsent) {
        HS_TRY(send_one(link, HS_MSG_DATA, (hs_msg){.a = link->read, .b = link->there}, NULL, 0,
                        NULL, 0));
        link->read_unsent = false;
    }
    for (int i = 0; i < HS_SNAPSHOT_SLOTS_MAX; i++) {
        ready *r = &link->readies[i];
        if (!r->unsent) continue;
        HS_TRY(send_one(link, HS_MSG_READY, (hs_msg){.a = i, .b = r->step, .c = r->final}, NULL, 0,
                        NULL, 0));
        r->unsent = false;
    }
    if (link->proposal_unsent) {
        HS_TRY(send_one(link, HS_MSG_ALGORITHMS, (hs_msg){.a = 0}, link->proposal,
                        link->proposal_bytes, NULL, 0));
        link->proposal_unsent = false;
    }
    while (link->metrics.used) {
        const uint16_t length = ring_length(&link->metrics);
        ring_copy_out(&link->metrics, sizeof length, link->payload, length);
        HS_TRY(send_one(link, HS_MSG_METRICS, (hs_msg){.a = 0}, link->payload, length, NULL, 0));
        ring_pop(&link->metrics);
    }
    if (link->metrics.dropped) {
        HS_LOG(link->log, HS_LOG_WARN, "metrics dropped while the agent was away",
               HS_I("lines", (int64_t)link->metrics.dropped));
        link->metrics.dropped = 0;
    }
    if (link->trace_unsent) {
        HS_TRY(send_one(link, HS_MSG_TRACE, (hs_msg){.a = 0}, link->trace, strlen(link->trace),
                        NULL, 0));
        link->trace_unsent = false;
    }
    if (link->words_unsent) {
        HS_TRY(send_one(link, HS_MSG_WORDS, (hs_msg){.a = 0}, link->words, strlen(link->words),
                        NULL, 0));
        link->words_unsent = false;
    }
    return HS_OK;
}

static void take_slots(hs_agent_link *link, const hs_msg *msg, int *fds, int count) {
    const bool wanted = !link->slots_came && !link->snapshot;
    if (!wanted || msg->a != count) {
        if (wanted)
            HS_LOG(link->log, HS_LOG_ERROR, "SLOTS says another count than it carries",
                   HS_I("says", msg->a), HS_I("carries", count));
        for (int i = 0; i < count; i++) close(fds[i]);
        return;
    }
    memcpy(link->slot_fds, fds, sizeof(int) * (size_t)count);
    link->slot_count = count;
    link->restore = (int)msg->b;
    link->slots_came = true;
}

static void take_agreed(hs_agent_link *link, const hs_msg *msg) {
    if (!link->proposal) return; /* the answer came already, over the connection before */
    link->agreed_came = true;
    link->agreed_code = msg->a;
    link->agreed_bytes = msg->bytes;
    if (msg->bytes <= link->agreed_room) memcpy(link->agreed, link->payload, msg->bytes);
}

static void take_data(hs_agent_link *link, const hs_msg *msg) {
    const size_t length = msg->bytes < HS_LINK_DATA_MAX ? msg->bytes : HS_LINK_DATA_MAX;
    if (msg->a > link->there) link->there = msg->a;
    link->late = msg->b;
    memcpy(link->late_words, link->payload, length);
    link->late_words[length] = '\0';
}

static void receive(hs_agent_link *link) {
    while (link->fd >= 0) {
        hs_msg msg;
        int fds[HS_MESSAGE_FDS_MAX], count;
        const hs_status st = hs_message_recv(link->fd, &msg, link->payload, fds, &count);
        if (st == HS_E_AGAIN) return;
        if (st != HS_OK) {
            disconnect(link);
            return;
        }
        if (msg.type == HS_MSG_SLOTS) {
            take_slots(link, &msg, fds, count);
            continue;
        }
        for (int i = 0; i < count; i++) close(fds[i]);
        if (msg.type == HS_MSG_COMMITTED) {
            if (msg.a > link->committed) link->committed = msg.a;
        } else if (msg.type == HS_MSG_ALGORITHMS) {
            take_agreed(link, &msg);
        } else if (msg.type == HS_MSG_DATA && link->ahead) {
            take_data(link, &msg);
        } else {
            HS_LOG(link->log, HS_LOG_WARN, "a message that is not for a rank",
                   HS_S("type", hs_message_name(msg.type)));
        }
    }
}

void hs_agent_link_poll(hs_agent_link *link) {
    if (!link) return;
    if (link->fd < 0) {
        if (hs_clock_ns() < link->next_try_ns) return;
        link->fd = hs_message_connect(link->path);
        link->next_try_ns = hs_deadline_ns(RECONNECT_MS);
        if (link->fd < 0) return;
        HS_LOG(link->log, HS_LOG_DEBUG, "agent connected", HS_S("socket", link->path));
    }
    receive(link);
    if (link->fd >= 0) (void)send_waiting(link); /* AGAIN and LOST: at the next call */
}

/* Sleeps until the agent, a signal, or the time of the next try calls; not past deadline_ns. */
static void doze(const hs_agent_link *link, hs_stop *stop, bool sending, int64_t deadline_ns) {
    const int64_t wake_ns =
        link->fd < 0 && link->next_try_ns < deadline_ns ? link->next_try_ns : deadline_ns;
    struct pollfd polls[2] = {
        {.fd = link->fd, .events = (short)(sending ? POLLIN | POLLOUT : POLLIN)},
        {.fd = hs_stop_fd(stop), .events = POLLIN}};
    (void)poll(polls, 2, hs_deadline_poll_ms(wake_ns));
}

static bool anything_waits(const hs_agent_link *link) {
    if (link->metrics.used || link->words_unsent || link->trace_unsent) return true;
    for (int i = 0; i < HS_SNAPSHOT_SLOTS_MAX; i++)
        if (link->readies[i].unsent) return true;
    return false;
}

/* --- what a rank calls ------------------------------------------------------------------- */

hs_status hs_agent_link_slots(hs_agent_link *link, int64_t deadline_ns, hs_stop *stop,
                              int fds[HS_SNAPSHOT_SLOTS_MAX], int *count, int *restore,
                              hs_why *why) {
    *count = 0;
    *restore = -1;
    if (!link) return HS_OK;
    for (;;) {
        hs_agent_link_poll(link);
        if (link->slots_came) break;
        if (hs_stop_lost(stop))
            return hs_fail(why, HS_E_LOST,
                           "a peer was lost while this rank waited for its snapshot slots");
        if (hs_stop_requested(stop))
            return hs_fail(why, HS_E_TERMINATED, "stopped on request before the first step");
        if (hs_clock_ns() >= deadline_ns)
            return hs_fail(why, HS_E_LOST,
                           "the agent at %.200s did not hand over the snapshot slots in time",
                           link->path);
        doze(link, stop, !link->greeted, deadline_ns);
    }
    memcpy(fds, link->slot_fds, sizeof(int) * (size_t)link->slot_count);
    *count = link->slot_count;
    *restore = link->restore;
    link->slot_count = 0; /* theirs now */
    return HS_OK;
}

/* HS_OK: it came. */
static hs_status wait_agreed(hs_agent_link *link, int64_t deadline_ns, hs_stop *stop, hs_why *why) {
    for (;;) {
        hs_agent_link_poll(link);
        if (link->agreed_came) return HS_OK;
        if (hs_stop_lost(stop))
            return hs_fail(why, HS_E_LOST,
                           "a peer was lost while this rank waited for the run's algorithms");
        if (hs_stop_requested(stop))
            return hs_fail(why, HS_E_TERMINATED, "stopped on request before the first step");
        if (hs_clock_ns() >= deadline_ns)
            return hs_fail(why, HS_E_LOST,
                           "the agent at %.200s did not say in time which algorithms the run has "
                           "chosen; does it reach its store?",
                           link->path);
        doze(link, stop, link->proposal_unsent, deadline_ns);
    }
}

hs_status hs_agent_link_agree(hs_agent_link *link, const void *table, size_t bytes, void *answer,
                              size_t room, size_t *came, int64_t deadline_ns, hs_stop *stop,
                              hs_why *why) {
    link->proposal = table;
    link->proposal_bytes = bytes;
    link->proposal_unsent = true;
    link->agreed = answer;
    link->agreed_room = room;
    link->agreed_came = false;
    hs_status st = wait_agreed(link, deadline_ns, stop, why);
    link->proposal = NULL;
    link->proposal_unsent = false;
    if (st == HS_OK && link->agreed_bytes > room)
        st = hs_fail(why, HS_E_BUG, "the agent's algorithms have %zu bytes, asked were %zu",
                     link->agreed_bytes, bytes);
    if (st == HS_OK && link->agreed_code != 0)
        st = hs_fail(why, HS_E_CONFIG, "%.*s", (int)link->agreed_bytes, (const char *)answer);
    *came = link->agreed_bytes;
    return st;
}

void hs_agent_link_ahead(hs_agent_link *link, int64_t step) {
    link->ahead = link->read_unsent = true;
    link->read = link->there = step;
}

void hs_agent_link_has_read(hs_agent_link *link, int64_t step) {
    link->read = step;
    link->read_unsent = true;
}

/* Why the data of a step is not there, after so long. */
static hs_status data_late(const hs_agent_link *link, int64_t step, int64_t ms, hs_why *why) {
    const hs_status st = link->late == HS_EXIT_DATA     ? HS_E_DATA
                         : link->late == HS_EXIT_CONFIG ? HS_E_CONFIG
                                                        : HS_E_LOST;
    if (link->late)
        return hs_fail(why, st,
                       "the data of step %" PRId64 " is not here after %" PRId64
                       " ms, the agent has it up to step %" PRId64 ": %s",
                       step, ms, link->there, link->late_words);
    return hs_fail(why, st,
                   "the data of step %" PRId64 " is not here after %" PRId64
                   " ms, the agent has it up to step %" PRId64
                   " and %s; is the store too slow for this node's share of the data?",
                   step, ms, link->there,
                   link->fd < 0 ? "is away" : "names no failure of its store");
}

hs_status hs_agent_link_wait_data(hs_agent_link *link, int64_t step, int64_t deadline_ns,
                                  hs_stop *stop, hs_why *why) {
    if (step <= link->there) return HS_OK;
    const int64_t began_ns = hs_clock_ns();
    for (;;) {
        hs_agent_link_poll(link);
        if (step <= link->there) return HS_OK;
        if (hs_stop_lost(stop))
            return hs_fail(why, HS_E_LOST,
                           "a peer was lost while this rank waited for the data of step %" PRId64,
                           step);
        const int64_t now_ns = hs_clock_ns();
        if (now_ns >= deadline_ns || link->late == HS_EXIT_DATA)
            return data_late(link, step, (now_ns - began_ns) / 1000000, why);
        doze(link, stop, link->read_unsent, deadline_ns);
    }
}

void hs_agent_link_keep(hs_agent_link *link, const hs_snapshot *snapshot) {
    if (link) link->snapshot = snapshot;
}

void hs_agent_link_metrics(hs_agent_link *link, const char *json) {
    if (!link) return;
    const size_t length = strlen(json);
    if (length > HS_LINK_METRICS_MAX)
        HS_LOG(link->log, HS_LOG_ERROR, "a line of metrics is too long",
               HS_I("bytes", (int64_t)length), HS_I("limit", HS_LINK_METRICS_MAX));
    else
        ring_push(&link->metrics, json, (uint16_t)length);
    hs_agent_link_poll(link);
}

void hs_agent_link_ready(hs_agent_link *link, int slot, int64_t step, bool final) {
    if (!link) return;
    HS_ASSERT(slot >= 0 && slot < HS_SNAPSHOT_SLOTS_MAX);
    link->readies[slot] = (ready){.any = true, .unsent = true, .final = final, .step = step};
    hs_agent_link_poll(link);
}

void hs_agent_link_words(hs_agent_link *link, const char *json) {
    if (!link) return;
    const size_t length = strlen(json);
    const size_t kept = length < sizeof link->words - 1 ? length : sizeof link->words - 1;
    memcpy(link->words, json, kept);
    link->words[kept] = '\0';
    link->words_unsent = true;
    hs_agent_link_poll(link);
}

void hs_agent_link_trace(hs_agent_link *link, const char *path) {
    if (!link) return;
    const size_t length = strlen(path);
    if (length >= sizeof link->trace) {
        HS_LOG(link->log, HS_LOG_ERROR, "the trace's path is too long",
               HS_I("bytes", (int64_t)length));
        return;
    }
    memcpy(link->trace, path, length + 1);
    link->trace_unsent = true;
    hs_agent_link_poll(link);
}

hs_status hs_agent_link_wait_committed(hs_agent_link *link, int64_t step, int64_t deadline_ns,
                                       hs_stop *stop, hs_why *why) {
    if (!link) return HS_OK;
    for (;;) {
        hs_agent_link_poll(link);
        if (link->committed >= step) return HS_OK;
        if (hs_stop_lost(stop))
            return hs_fail(why, HS_E_LOST,
                           "a peer was lost while this rank waited for the commit of step %lld",
                           (long long)step);
        if (hs_clock_ns() >= deadline_ns)
            return hs_fail(why, HS_E_LOST,
                           "step %lld was not committed in time; its snapshot is in memory only",
                           (long long)step);
        doze(link, stop, anything_waits(link), deadline_ns);
    }
}

int hs_agent_link_socket(const hs_agent_link *link) {
    return link->greeted ? link->fd : -1;
}

bool hs_agent_link_leave(hs_agent_link *link, int64_t deadline_ns) {
    if (!link) return true;
    for (;;) {
        hs_agent_link_poll(link);
        if (!anything_waits(link)) return true;
        if (hs_clock_ns() >= deadline_ns) return false;
        doze(link, NULL, true, deadline_ns);
    }
}
