#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/files.h"
#include "core/stop.h"
#include "snapshot/snapshot_internal.h"

enum { SUM_THREADS = 4 };

/* gcc's thread sanitizer knows no fences (and refuses to compile them). */
static void fence(void) {
#ifndef __SANITIZE_THREAD__
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

/* The slot to fill next: an EMPTY one, else the one with the oldest snapshot; -1: none (I1, I2). */
static int choose(const hs_snapshot *s) {
    int best = -1;
    for (int i = 0; i < s->count; i++) {
        const hs_slot_header *header = hs_snapshot_header(s, i);
        if (i == s->newest || hs_snapshot_load(&header->hold)) continue;
        if (hs_snapshot_load(&header->state) == HS_SLOT_EMPTY) return i;
        const hs_slot_header *old = best < 0 ? NULL : hs_snapshot_header(s, best);
        if (!old || header->epoch < old->epoch ||
            (header->epoch == old->epoch && header->step < old->step))
            best = i;
    }
    return best;
}

/* Against an agent that takes hold of it at the same moment: each side writes its own word and then reads
 * the other's, so at least one of them sees the other. */
bool hs_snapshot_claim(hs_snapshot *s) {
    if (s->under_way) return false;
    for (int tries = 0; s->claimed < 0 && tries < 2 * HS_SNAPSHOT_SLOTS_MAX; tries++) {
        const int i = choose(s);
        if (i < 0) break;
        hs_slot_header *header = hs_snapshot_header(s, i);
        hs_snapshot_store(&header->claim, 1);
        if (!hs_snapshot_load(&header->hold))
            s->claimed = i;
        else
            hs_snapshot_store(&header->claim, 0);
    }
    return s->claimed >= 0;
}

void hs_snapshot_unclaim(hs_snapshot *s) {
    if (s->claimed >= 0) hs_snapshot_store(&hs_snapshot_header(s, s->claimed)->claim, 0);
    s->claimed = -1;
}

/* I4: from here on the claimed slot is nobody's to read. Returns which it is. */
static int open_slot(hs_snapshot *s) {
    const int i = s->claimed;
    hs_slot_header *header = hs_snapshot_header(s, i);
    hs_snapshot_store(&header->state, HS_SLOT_FILLING);
    memcpy(header->magic, HS_SLOT_MAGIC, sizeof header->magic);
    header->version = HS_SLOT_VERSION;
    header->position = s->position;
    header->replica = s->replica;
    __atomic_store_n(&header->generation, header->generation + 1, __ATOMIC_SEQ_CST);
    fence();
    hs_snapshot_unclaim(s); /* FILLING says more */
    return i;
}

/* I3: data and sums are there. */
static void close_slot(const hs_snapshot *s, const hs_snapshot_done *what) {
    hs_slot_header *header = hs_snapshot_header(s, what->slot);
    header->step = what->step;
    header->epoch = s->epoch;
    header->data_offset = s->data_offset;
    header->data_bytes = s->data_bytes;
    header->chunks = s->chunks;
    memcpy(header->plan_digest, s->plan_digest, sizeof header->plan_digest);
    memcpy(header->what_digest, s->what_digest, sizeof header->what_digest);
    header->checksum_kind = HS_SLOT_SUM_CRC32;
    header->final = what->final;
    header->persist = what->persist;
    header->header_crc = hs_snapshot_header_crc(s, what->slot);
    hs_snapshot_store(&header->state, HS_SLOT_READY);
}

/* Copies (or finds copied), sums, closes. */
static void sum_and_close(hs_snapshot *s, hs_pool *pool) {
    hs_chunks chunks = {
        .snapshot = s, .slot = s->fill.what.slot, .to_slot = true, .bad = INT64_MAX};
    hs_parallel_for(pool, (int64_t)s->chunks, hs_snapshot_chunks, &chunks);
    if (!atomic_load(&s->abandon)) close_slot(s, &s->fill.what);
}

/* --- the thread that ends fills ---------------------------------------------------------- */

/* The fill is this thread's from RUNS to ENDED. */
static void *end_fills(void *ctx) {
    hs_snapshot *s = ctx;
    (void)pthread_mutex_lock(&s->lock);
    while (!s->quit) {
        if (s->fill.state != HS_FILL_RUNS) {
            (void)pthread_cond_wait(&s->wake, &s->lock);
            continue;
        }
        (void)pthread_mutex_unlock(&s->lock);
        hs_why why = {0};
        const hs_status st = s->device.wait(s->device.ctx, &why);
        if (st == HS_OK) sum_and_close(s, s->sums);
        (void)pthread_mutex_lock(&s->lock);
        s->fill.status = st;
        s->fill.why = why;
        s->fill.state = HS_FILL_ENDED;
        const uint64_t one = 1;
        (void)!write(s->ended_fd, &one, sizeof one);
    }
    (void)pthread_mutex_unlock(&s->lock);
    return NULL;
}

hs_status hs_snapshot_start_filling(hs_snapshot *s, hs_why *why) {
    if (s->arena || s->threaded) return HS_OK;
    const int threads = hs_pool_threads(s->pool);
    s->ended_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (s->ended_fd < 0) return hs_files_failed(why, "an event of snapshots", errno);
    hs_status st = hs_pool_create(threads < SUM_THREADS ? threads : SUM_THREADS, &s->sums);
    if (st == HS_OK && pthread_mutex_init(&s->lock, NULL) != 0) st = HS_E_MEMORY;
    if (st != HS_OK) return hs_fail(why, st, "no memory for the threads that end snapshots");
    if (pthread_cond_init(&s->wake, NULL) == 0) {
        s->threaded = pthread_create(&s->thread, NULL, end_fills, s) == 0;
        if (!s->threaded) (void)pthread_cond_destroy(&s->wake);
    }
    if (s->threaded) return HS_OK;
    (void)pthread_mutex_destroy(&s->lock);
    return hs_fail(why, HS_E_MEMORY, "cannot start the thread that ends snapshots");
}

void hs_snapshot_stop(hs_snapshot *s) {
    if (!s) return;
    atomic_store(&s->abandon, true); /* leaves the slot FILLING */
    if (s->threaded) {
        (void)pthread_mutex_lock(&s->lock);
        s->quit = true;
        (void)pthread_cond_signal(&s->wake);
        (void)pthread_mutex_unlock(&s->lock);
        (void)pthread_join(s->thread, NULL);
        (void)pthread_cond_destroy(&s->wake);
        (void)pthread_mutex_destroy(&s->lock);
    }
    s->threaded = false;
    hs_pool_destroy(s->sums);
    s->sums = NULL;
    if (s->ended_fd >= 0) close(s->ended_fd);
    s->ended_fd = -1;
}

/* --- what the rank's thread calls -------------------------------------------------------- */

/* Hands the fill to the other thread, or ends it. */
static void go_to(hs_snapshot *s, hs_fill_state state) {
    if (s->threaded) (void)pthread_mutex_lock(&s->lock);
    s->fill.state = state;
    if (s->threaded) {
        (void)pthread_cond_signal(&s->wake);
        (void)pthread_mutex_unlock(&s->lock);
    }
}

static hs_status copy_pieces(const hs_snapshot *s, int slot, hs_why *why) {
    uint8_t *data = s->slots[slot].map + s->data_offset;
    for (uint32_t i = 0; i < s->piece_count; i++) {
        const hs_piece *p = &s->pieces[i];
        HS_TRY(s->device.copy(s->device.ctx, true, p->offset, data + p->at, p->bytes, why));
    }
    return s->device.copied(s->device.ctx, true, why);
}

hs_status hs_snapshot_begin(hs_snapshot *s, const hs_snapshot_done *what, hs_why *why) {
    HS_ASSERT(!s->under_way);
    const int64_t begin_ns = hs_clock_ns();
    if (!hs_snapshot_claim(s))
        return hs_fail(why, HS_E_AGAIN,
                       "none of the %d snapshot slots is free: the agent still reads them",
                       s->count);
    const int slot = open_slot(s);
    s->under_way = true;
    s->fill.what = *what;
    s->fill.what.slot = slot;
    s->fill.begin_ns = begin_ns;
    s->fill.status = HS_OK;
    if (s->arena) {
        sum_and_close(s, s->pool);
        go_to(s, HS_FILL_ENDED);
        return HS_OK;
    }
    HS_TRY(copy_pieces(s, slot, why)); /* on failure the slot stays FILLING, which nobody reads */
    go_to(s, HS_FILL_RUNS);
    return HS_OK;
}

/* What ended, if it did. */
static bool ended(hs_snapshot *s) {
    if (!s->threaded) return s->fill.state == HS_FILL_ENDED;
    (void)pthread_mutex_lock(&s->lock);
    const bool yes = s->fill.state == HS_FILL_ENDED;
    (void)pthread_mutex_unlock(&s->lock);
    return yes;
}

hs_status hs_snapshot_take(hs_snapshot *s, bool *any, hs_snapshot_done *done, hs_why *why) {
    *any = false;
    if (!s->under_way || !ended(s)) return HS_OK;
    uint64_t count;
    if (s->threaded) (void)!read(s->ended_fd, &count, sizeof count);
    s->under_way = false;
    go_to(s, HS_FILL_NONE);
    if (s->fill.status != HS_OK)
        return hs_fail(why, s->fill.status, "the snapshot of step %lld: %s",
                       (long long)s->fill.what.step, s->fill.why.text);
    s->newest = s->fill.what.slot;
    *done = s->fill.what;
    *any = true;
    HS_LOG(s->log, HS_LOG_DEBUG, "snapshot", HS_I("step", done->step), HS_I("slot", done->slot),
           HS_I("us", (hs_clock_ns() - s->fill.begin_ns) / 1000));
    return HS_OK;
}

bool hs_snapshot_under_way(const hs_snapshot *s) {
    return s->under_way;
}

hs_status hs_snapshot_wait(hs_snapshot *s, int64_t deadline_ns, struct hs_stop *stop, hs_why *why) {
    while (s->under_way && !ended(s)) {
        if (hs_stop_lost(stop))
            return hs_fail(why, HS_E_LOST, "a peer was lost while this rank saved its state");
        if (hs_clock_ns() >= deadline_ns)
            return hs_fail(why, HS_E_AGAIN, "the snapshot of step %lld is not done in time",
                           (long long)s->fill.what.step);
        struct pollfd polls[2] = {{.fd = s->ended_fd, .events = POLLIN},
                                  {.fd = hs_stop_fd(stop), .events = POLLIN}};
        (void)poll(polls, 2, hs_deadline_poll_ms(deadline_ns));
    }
    return HS_OK;
}
