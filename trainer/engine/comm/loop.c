/* Ranks as threads of one process, strictly by rendezvous: a send completes only when its receive
 * is posted and filled. What passes here passes on every transport; an order that needs buffering
 * stalls here.
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

typedef struct meeting {
    void *buffer; /* of the posted receive; NULL: none is posted */
    size_t bytes;
    uint32_t microbatch;
    bool filled; /* the sender has come; the receiver may go */
    bool broken; /* lengths or microbatches differed: both fail */
} meeting;

struct hs_comm_loop {
    pthread_mutex_t lock;
    pthread_cond_t moved;
    uint32_t ranks, channel_count;
    const hs_plan_channel *channels;
    uint32_t *present; /* by rank: 0 not yet, 1 there, 2 gone */
    int64_t *start_steps;
    uint64_t *epochs;
    meeting *meetings; /* by channel and replica: meeting_of */
};

struct hs_comm {
    struct hs_comm_loop *loop;
    uint32_t rank, first_rank, stall_ms;
    struct hs_stop *stop;
    hs_status failed;
    hs_why failed_why;
    hs_comm_wait wait;
};

hs_status hs_comm_loop_create(uint32_t ranks, const hs_plan_channel *channels,
                              uint32_t channel_count, struct hs_comm_loop **out) {
    *out = NULL;
    struct hs_comm_loop *loop = calloc(1, sizeof *loop);
    if (!loop) return HS_E_MEMORY;
    loop->ranks = ranks;
    loop->channels = channels;
    loop->channel_count = channel_count;
    loop->present = calloc((size_t)ranks + 1, sizeof *loop->present);
    loop->start_steps = calloc((size_t)ranks + 1, sizeof *loop->start_steps);
    loop->epochs = calloc((size_t)ranks + 1, sizeof *loop->epochs);
    loop->meetings = calloc((size_t)channel_count * ranks + 1, sizeof *loop->meetings);
    pthread_condattr_t monotonic;
    (void)pthread_condattr_init(&monotonic);
    (void)pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    (void)pthread_mutex_init(&loop->lock, NULL);
    (void)pthread_cond_init(&loop->moved, &monotonic);
    (void)pthread_condattr_destroy(&monotonic);
    if (!loop->present || !loop->start_steps || !loop->epochs || !loop->meetings) {
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
    free(loop->meetings);
    free(loop);
}

/* One turn of waiting, lock held: HS_OK to look again, else why the wait ends. */
static hs_status wait_turn(hs_comm *comm, int64_t deadline_ns, hs_why *why) {
    if (hs_stop_lost(comm->stop))
        return hs_fail(why, HS_E_LOST, "the supervisor says that a peer was lost");
    const int64_t now = hs_clock_ns();
    if (now >= deadline_ns)
        return hs_fail(why, HS_E_STALLED,
                       "%s of microbatch %d on channel %d with rank %d passed its deadline",
                       comm->wait.doing, (int)comm->wait.microbatch, (int)comm->wait.channel,
                       (int)comm->wait.peer);
    int64_t until_ns = now + (int64_t)SLICE_MS * 1000000;
    if (until_ns > deadline_ns) until_ns = deadline_ns;
    const struct timespec until = {.tv_sec = until_ns / 1000000000,
                                   .tv_nsec = until_ns % 1000000000};
    (void)pthread_cond_timedwait(&comm->loop->moved, &comm->loop->lock, &until);
    return HS_OK;
}

static hs_status peer_gone(const hs_comm *comm, hs_why *why) {
    if (comm->loop->present[comm->wait.peer] != 2) return HS_OK;
    return hs_fail(why, HS_E_LOST, "rank %u is gone (%s on channel %u)", comm->wait.peer,
                   comm->wait.doing, comm->wait.channel);
}

static hs_status enter(hs_comm *comm, const char *doing, uint32_t channel, size_t bytes,
                       uint32_t microbatch, hs_why *why) {
    if (comm->failed != HS_OK) return hs_fail(why, comm->failed, "%s", comm->failed_why.text);
    HS_ASSERT(channel < comm->loop->channel_count);
    const hs_plan_channel *ch = &comm->loop->channels[channel];
    const bool sends = doing[0] == 's';
    HS_ASSERT(comm->first_rank + (sends ? ch->from : ch->to) == comm->rank && bytes == ch->bytes);
    comm->wait = (hs_comm_wait){.doing = doing,
                                .channel = channel,
                                .peer = comm->first_rank + (sends ? ch->to : ch->from),
                                .microbatch = microbatch,
                                .since_ns = hs_clock_ns()};
    return HS_OK;
}

/* Where a channel's two ranks of this replica meet. */
static meeting *meeting_of(const hs_comm *comm, uint32_t channel) {
    return &comm->loop->meetings[(size_t)channel * comm->loop->ranks + comm->first_rank];
}

static hs_status leave(hs_comm *comm, hs_status st, const hs_why *local, hs_why *why) {
    if (st == HS_OK) return HS_OK;
    comm->failed = st;
    comm->failed_why = *local;
    return hs_fail(why, st, "%s", local->text);
}

static hs_status loop_send(hs_comm *comm, uint32_t channel, const void *buf, size_t bytes,
                           uint32_t microbatch, hs_why *why) {
    hs_why local = {.text = ""};
    HS_TRY(enter(comm, "send", channel, bytes, microbatch, why));
    meeting *m = meeting_of(comm, channel);
    const int64_t deadline_ns = hs_deadline_ns(comm->stall_ms);
    hs_status st = HS_OK;
    (void)pthread_mutex_lock(&comm->loop->lock);
    while (st == HS_OK && (!m->buffer || m->filled)) {
        st = peer_gone(comm, &local);
        if (st == HS_OK) st = wait_turn(comm, deadline_ns, &local);
    }
    if (st == HS_OK) {
        if (m->bytes != bytes || m->microbatch != microbatch) {
            m->broken = true;
            st = hs_fail(&local, HS_E_LOST,
                         "channel %u: sent %zu bytes of microbatch %u, %zu of %u were awaited",
                         channel, bytes, microbatch, m->bytes, m->microbatch);
        } else {
            memcpy(m->buffer, buf, bytes);
        }
        m->filled = true;
        (void)pthread_cond_broadcast(&comm->loop->moved);
    }
    (void)pthread_mutex_unlock(&comm->loop->lock);
    return leave(comm, st, &local, why);
}

static hs_status loop_recv(hs_comm *comm, uint32_t channel, void *buf, size_t bytes,
                           uint32_t microbatch, hs_why *why) {
    hs_why local = {.text = ""};
    HS_TRY(enter(comm, "recv", channel, bytes, microbatch, why));
    meeting *m = meeting_of(comm, channel);
    const int64_t deadline_ns = hs_deadline_ns(comm->stall_ms);
    hs_status st = HS_OK;
    (void)pthread_mutex_lock(&comm->loop->lock);
    *m = (meeting){.buffer = buf, .bytes = bytes, .microbatch = microbatch};
    (void)pthread_cond_broadcast(&comm->loop->moved);
    while (st == HS_OK && !m->filled) {
        st = peer_gone(comm, &local);
        if (st == HS_OK) st = wait_turn(comm, deadline_ns, &local);
    }
    if (st == HS_OK && m->broken)
        st = hs_fail(&local, HS_E_LOST, "channel %u: what came was not microbatch %u of %zu bytes",
                     channel, microbatch, bytes);
    *m = (meeting){.buffer = NULL};
    (void)pthread_mutex_unlock(&comm->loop->lock);
    return leave(comm, st, &local, why);
}

static void loop_last_wait(const hs_comm *comm, hs_comm_wait *wait) {
    *wait = comm->wait;
}

static void loop_close(hs_comm *comm) {
    if (!comm) return;
    (void)pthread_mutex_lock(&comm->loop->lock);
    comm->loop->present[comm->rank] = 2;
    (void)pthread_cond_broadcast(&comm->loop->moved);
    (void)pthread_mutex_unlock(&comm->loop->lock);
    free(comm);
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
    comm->first_rank = config->first_rank;
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
    .send = loop_send,
    .recv = loop_recv,
    .last_wait = loop_last_wait,
    .close = loop_close,
};
