/* Ranks as threads of one process, in two modes (comm.h). By rendezvous: what passes here passes on every
 * transport; an order that needs buffering stalls here. As late as may be: what a rank does before it
 * has waited for a message shows here.
 */
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "comm/comm_internal.h"
#include "core/clock.h"
#include "core/stop.h"

enum {
    SLICE_MS = 20
}; /* how often a waiting thread looks at its hs_stop, which a condition cannot wake */

enum { POISON = 0xA5 };

typedef struct end_message {
    void *at;
    uint64_t bytes;
    uint32_t microbatch;
} end_message;

/* What one end has begun. */
typedef struct side {
    uint64_t begun;
    end_message *ring; /* number n lies at n % most */
    uint32_t most;
} side;

typedef struct meeting {
    side sent, posted;
    uint64_t ended;
    bool broken; /* microbatches or lengths differed: both ends fail */
} meeting;

/* What a rank waits for: that `count` messages have passed. */
typedef struct waiter {
    meeting *at; /* NULL: it does not */
    uint32_t channel, peer;
    uint64_t count;
} waiter;

struct hs_comm_loop {
    pthread_mutex_t lock;
    pthread_cond_t moved;
    uint32_t ranks, channel_count;
    const hs_plan_channel *channels;
    uint32_t *present; /* by rank: 0 not yet, 1 there, 2 gone */
    int64_t *start_steps;
    uint64_t *epochs;
    meeting *meetings; /* by channel and sending rank */
    waiter *waiters;   /* by rank */
    hs_loop_mode mode;
    uint64_t random;
    bool stuck; /* late: everybody waits, and nothing can pass */
};

struct hs_comm {
    struct hs_comm_loop *loop;
    uint32_t rank, positions, stall_ms;
    struct hs_stop *stop;
    hs_status failed;
    hs_why failed_why;
    hs_comm_wait wait;
};

hs_status hs_comm_loop_create(uint32_t ranks, const hs_plan_channel *channels,
                              uint32_t channel_count, hs_loop_mode mode, uint64_t seed,
                              struct hs_comm_loop **out) {
    *out = NULL;
    struct hs_comm_loop *loop = calloc(1, sizeof *loop);
    if (!loop) return HS_E_MEMORY;
    loop->ranks = ranks;
    loop->channels = channels;
    loop->channel_count = channel_count;
    loop->mode = mode;
    loop->random = seed;
    loop->present = calloc((size_t)ranks + 1, sizeof *loop->present);
    loop->start_steps = calloc((size_t)ranks + 1, sizeof *loop->start_steps);
    loop->epochs = calloc((size_t)ranks + 1, sizeof *loop->epochs);
    loop->meetings = calloc((size_t)channel_count * ranks + 1, sizeof *loop->meetings);
    loop->waiters = calloc((size_t)ranks + 1, sizeof *loop->waiters);
    pthread_condattr_t monotonic;
    (void)pthread_condattr_init(&monotonic);
    (void)pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    (void)pthread_mutex_init(&loop->lock, NULL);
    (void)pthread_cond_init(&loop->moved, &monotonic);
    (void)pthread_condattr_destroy(&monotonic);
    if (!loop->present || !loop->start_steps || !loop->epochs || !loop->meetings ||
        !loop->waiters) {
        hs_comm_loop_destroy(loop);
        return HS_E_MEMORY;
    }
    *out = loop;
    return HS_OK;
}

void hs_comm_loop_destroy(struct hs_comm_loop *loop) {
    if (!loop) return;
    (void)pthread_cond_destroy(&loop->moved);
    (void)pthread_mutex_destroy(&loop->lock);
    free(loop->present);
    free(loop->start_steps);
    free(loop->epochs);
    for (size_t i = 0; loop->meetings && i < (size_t)loop->channel_count * loop->ranks; i++) {
        free(loop->meetings[i].sent.ring);
        free(loop->meetings[i].posted.ring);
    }
    free(loop->meetings);
    free(loop->waiters);
    free(loop);
}

static hs_status stalled(const hs_comm *comm, const char *how, hs_why *why) {
    return hs_fail(why, HS_E_STALLED, "%s of microbatch %d on channel %d with rank %d %s",
                   comm->wait.doing, (int)comm->wait.microbatch, (int)comm->wait.channel,
                   (int)comm->wait.peer, how);
}

/* splitmix64 */
static uint64_t next_random(struct hs_comm_loop *loop) {
    uint64_t z = loop->random += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

/* One turn of waiting, lock held: HS_OK to look again, else why the wait ends. */
static hs_status wait_turn(hs_comm *comm, int64_t deadline_ns, hs_why *why) {
    if (hs_stop_lost(comm->stop))
        return hs_fail(why, HS_E_LOST, "the supervisor says that a peer was lost");
    const int64_t now = hs_clock_ns();
    if (now >= deadline_ns) return stalled(comm, "passed its deadline", why);
    int64_t until_ns = now + (int64_t)SLICE_MS * 1000000;
    if (until_ns > deadline_ns) until_ns = deadline_ns;
    const struct timespec until = {.tv_sec = until_ns / 1000000000,
                                   .tv_nsec = until_ns % 1000000000};
    (void)pthread_cond_timedwait(&comm->loop->moved, &comm->loop->lock, &until);
    return HS_OK;
}

static hs_status enter(const hs_comm *comm, hs_why *why) {
    return comm->failed == HS_OK ? HS_OK : hs_fail(why, comm->failed, "%s", comm->failed_why.text);
}

static hs_status leave(hs_comm *comm, hs_status st, const hs_why *local, hs_why *why) {
    if (st == HS_OK) return HS_OK;
    comm->failed = st;
    comm->failed_why = *local;
    return hs_fail(why, st, "%s", local->text);
}

/* UINT32_MAX: that end is not at this rank. */
static uint32_t peer_of(const hs_comm *comm, bool in, uint32_t channel) {
    HS_ASSERT(channel < comm->loop->channel_count);
    return hs_comm_peer(&comm->loop->channels[channel], comm->rank, comm->positions, in);
}

/* Where one way of a channel meets, by its receiving or sending end at this rank. */
static meeting *meeting_of(const hs_comm *comm, bool in, uint32_t channel) {
    const uint32_t peer = peer_of(comm, in, channel);
    HS_ASSERT(peer < comm->loop->ranks);
    return &comm->loop->meetings[(size_t)channel * comm->loop->ranks + (in ? peer : comm->rank)];
}

/* Lock held. Both ends of the next message are there. */
static bool meets(const meeting *m) {
    return !m->broken && m->sent.begun > m->ended && m->posted.begun > m->ended;
}

/* Lock held. The next message passes, or breaks its channel. */
static void pass(struct hs_comm_loop *loop, meeting *m) {
    const end_message *from = &m->sent.ring[m->ended % m->sent.most];
    const end_message *to = &m->posted.ring[m->ended % m->posted.most];
    m->broken = from->microbatch != to->microbatch || from->bytes != to->bytes;
    if (!m->broken) memcpy(to->at, from->at, to->bytes);
    m->ended += !m->broken;
    (void)pthread_cond_broadcast(&loop->moved);
}

static hs_status broken(const hs_comm *comm, bool in, uint32_t channel, const meeting *m,
                        hs_why *why) {
    const end_message *sent = &m->sent.ring[m->ended % m->sent.most];
    const end_message *posted = &m->posted.ring[m->ended % m->posted.most];
    return hs_fail(why, HS_E_LOST,
                   "rank %u, channel %u: %llu bytes of microbatch %d were sent, %llu of %d awaited",
                   peer_of(comm, in, channel), channel, (unsigned long long)sent->bytes,
                   (int)sent->microbatch, (unsigned long long)posted->bytes,
                   (int)posted->microbatch);
}

/* Lock held, HS_LOOP_LATE. Nobody can go on: one message passes that somebody waits for. */
static void pass_one(struct hs_comm_loop *loop) {
    uint32_t can = 0;
    for (int pick = 0; pick < 2; pick++) {
        uint32_t chosen = can ? (uint32_t)(next_random(loop) % can) : 0;
        for (uint32_t r = 0; r < loop->ranks; r++) {
            const waiter *w = &loop->waiters[r];
            if (!w->at || !meets(w->at)) continue;
            if (!pick) can++;
            if (pick && chosen-- == 0) {
                pass(loop, w->at);
                return;
            }
        }
    }
    loop->stuck = true;
    (void)pthread_cond_broadcast(&loop->moved);
}

/* Lock held. The message can never come. */
static bool deserted(const struct hs_comm_loop *loop, const waiter *w) {
    return loop->present[w->peer] == 2 && !meets(w->at);
}

/* Lock held. Whether each rank that has not left waits, and for a message that may still pass. */
static bool all_wait(const struct hs_comm_loop *loop) {
    for (uint32_t r = 0; r < loop->ranks; r++) {
        const waiter *w = &loop->waiters[r];
        if (loop->present[r] == 2) continue;
        if (!w->at || w->at->ended >= w->count || w->at->broken || deserted(loop, w)) return false;
    }
    return true;
}

static hs_status wait_for(hs_comm *comm, bool in, uint32_t channel, uint64_t count, hs_why *why) {
    hs_why local = {.text = ""};
    struct hs_comm_loop *loop = comm->loop;
    meeting *m = meeting_of(comm, in, channel);
    waiter *w = &loop->waiters[comm->rank];
    const int64_t deadline_ns = hs_deadline_ns(comm->stall_ms);
    hs_status st = HS_OK;
    (void)pthread_mutex_lock(&loop->lock);
    const side *mine = in ? &m->posted : &m->sent;
    HS_ASSERT(mine->ring && count <= mine->begun);
    if (m->ended < count) {
        comm->wait = (hs_comm_wait){.doing = in ? "recv" : "send",
                                    .channel = channel,
                                    .peer = peer_of(comm, in, channel),
                                    .microbatch = mine->ring[(count - 1) % mine->most].microbatch,
                                    .since_ns = hs_clock_ns()};
        *w = (waiter){
            .at = m, .channel = channel, .peer = peer_of(comm, in, channel), .count = count};
    }
    while (st == HS_OK && m->ended < count) {
        if (m->broken)
            st = broken(comm, in, channel, m, &local);
        else if (deserted(loop, w))
            st = hs_fail(&local, HS_E_LOST, "rank %u is gone (%s on channel %u)", comm->wait.peer,
                         comm->wait.doing, channel);
        else if (loop->stuck)
            st = stalled(comm, "can never pass: every rank waits", &local);
        else if (loop->mode == HS_LOOP_LATE && all_wait(loop))
            pass_one(loop);
        else
            st = wait_turn(comm, deadline_ns, &local);
    }
    *w = (waiter){.at = NULL};
    (void)pthread_mutex_unlock(&loop->lock);
    return leave(comm, st, &local, why);
}

static hs_status begin(hs_comm *comm, bool in, uint32_t channel, void *at, size_t bytes,
                       uint32_t microbatch, hs_why *why) {
    HS_TRY(enter(comm, why));
    struct hs_comm_loop *loop = comm->loop;
    meeting *m = meeting_of(comm, in, channel);
    HS_ASSERT(hs_comm_length(&loop->channels[channel], bytes));
    if (in && loop->mode == HS_LOOP_LATE) memset(at, POISON, bytes);
    (void)pthread_mutex_lock(&loop->lock);
    side *mine = in ? &m->posted : &m->sent;
    HS_ASSERT(mine->begun - m->ended < mine->most);
    mine->ring[mine->begun++ % mine->most] =
        (end_message){.at = at, .bytes = bytes, .microbatch = microbatch};
    if (loop->mode == HS_LOOP_RENDEZVOUS && meets(m)) pass(loop, m);
    (void)pthread_mutex_unlock(&loop->lock);
    return HS_OK;
}

static hs_status loop_post(hs_comm *comm, uint32_t channel, void *buf, size_t bytes,
                           uint32_t microbatch, hs_why *why) {
    return begin(comm, true, channel, buf, bytes, microbatch, why);
}

static hs_status loop_got(hs_comm *comm, uint32_t channel, uint64_t count, hs_why *why) {
    HS_TRY(enter(comm, why));
    return wait_for(comm, true, channel, count, why);
}

static hs_status loop_sent(hs_comm *comm, uint32_t channel, uint64_t count, hs_why *why) {
    HS_TRY(enter(comm, why));
    return wait_for(comm, false, channel, count, why);
}

static hs_status loop_send(hs_comm *comm, uint32_t channel, const void *buf, size_t bytes,
                           uint32_t microbatch, hs_why *why) {
    HS_TRY(begin(comm, false, channel, (void *)(uintptr_t)buf, bytes, microbatch, why));
    /* an exchange's two ends send at once: the pair of messages is what meets */
    return comm->loop->mode == HS_LOOP_LATE || comm->loop->channels[channel].across
               ? HS_OK
               : wait_for(comm, false, channel, meeting_of(comm, false, channel)->sent.begun, why);
}

static hs_status loop_progress(hs_comm *comm, hs_why *why) {
    return enter(comm, why);
}

static void loop_last_wait(const hs_comm *comm, hs_comm_wait *wait) {
    *wait = comm->wait;
}

static void loop_close(hs_comm *comm) {
    if (!comm) return;
    (void)pthread_mutex_lock(&comm->loop->lock);
    for (uint32_t c = 0; c < comm->loop->channel_count; c++) {
        for (int in = 0; in < 2; in++) { /* its memory goes */
            if (peer_of(comm, in == 1, c) == UINT32_MAX) continue;
            meeting *m = meeting_of(comm, in == 1, c);
            *(in ? &m->posted.begun : &m->sent.begun) = m->ended;
        }
    }
    comm->loop->present[comm->rank] = 2;
    (void)pthread_cond_broadcast(&comm->loop->moved);
    (void)pthread_mutex_unlock(&comm->loop->lock);
    free(comm);
}

/* Room for what this rank begins. */
static hs_status open_sides(hs_comm *comm, uint32_t most) {
    for (uint32_t c = 0; c < comm->loop->channel_count; c++) {
        for (int in = 0; in < 2; in++) {
            if (peer_of(comm, in == 1, c) == UINT32_MAX) continue;
            meeting *m = meeting_of(comm, in == 1, c);
            side *mine = in ? &m->posted : &m->sent;
            mine->most = most ? most : 1;
            mine->ring = calloc(mine->most, sizeof *mine->ring);
            if (!mine->ring) return HS_E_MEMORY;
        }
    }
    return HS_OK;
}

/* Lock held. The first rank that is not there, or `ranks` when all are. */
static uint32_t first_missing(const struct hs_comm_loop *loop) {
    for (uint32_t r = 0; r < loop->ranks; r++)
        if (loop->present[r] == 0) return r;
    return loop->ranks;
}

static hs_status loop_create(const hs_comm_config *config, hs_comm **out, hs_why *why) {
    *out = NULL;
    struct hs_comm_loop *loop = config->loop;
    HS_ASSERT(loop && config->rank < loop->ranks);
    hs_comm *comm = calloc(1, sizeof *comm);
    if (!comm) return hs_fail(why, HS_E_MEMORY, "no memory for a communicator");
    comm->loop = loop;
    comm->rank = config->rank;
    comm->positions = config->positions;
    comm->stall_ms = config->attempt->stall_ms;
    comm->stop = config->stop;
    comm->wait = (hs_comm_wait){.doing = "connect",
                                .channel = UINT32_MAX,
                                .peer = UINT32_MAX,
                                .microbatch = UINT32_MAX,
                                .since_ns = hs_clock_ns()};
    const int64_t deadline_ns = hs_deadline_ns(config->attempt->connect_ms);
    hs_status st = HS_OK;
    (void)pthread_mutex_lock(&loop->lock);
    if (loop->present[config->rank] != 0) {
        st = hs_fail(why, HS_E_REFUSED, "rank %u is already there", config->rank);
        (void)pthread_mutex_unlock(&loop->lock);
        free(comm);
        return st;
    }
    if (open_sides(comm, config->most) != HS_OK) {
        st = hs_fail(why, HS_E_MEMORY, "no memory for the messages of rank %u", config->rank);
        (void)pthread_mutex_unlock(&loop->lock);
        free(comm);
        return st;
    }
    loop->present[config->rank] = 1;
    loop->start_steps[config->rank] = config->start_step;
    loop->epochs[config->rank] = config->attempt->epoch;
    (void)pthread_cond_broadcast(&loop->moved);
    while (st == HS_OK && (comm->wait.peer = first_missing(loop)) < loop->ranks)
        st = wait_turn(comm, deadline_ns, why);
    for (uint32_t r = 0; st == HS_OK && r < loop->ranks; r++)
        if (loop->start_steps[r] != config->start_step || loop->epochs[r] != config->attempt->epoch)
            st = hs_fail(why, HS_E_REFUSED,
                         "rank %u starts after step %lld of epoch %llu, rank %u after %lld", r,
                         (long long)loop->start_steps[r], (unsigned long long)loop->epochs[r],
                         config->rank, (long long)config->start_step);
    (void)pthread_mutex_unlock(&loop->lock);
    if (st != HS_OK) {
        loop_close(comm);
        return st;
    }
    *out = comm;
    return HS_OK;
}

const hs_comm_table hs_comm_loop_table = {
    .name = "loop",
    .create = loop_create,
    .post = loop_post,
    .got = loop_got,
    .send = loop_send,
    .sent = loop_sent,
    .progress = loop_progress,
    .last_wait = loop_last_wait,
    .close = loop_close,
};
