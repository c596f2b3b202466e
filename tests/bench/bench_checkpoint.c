/* bench_checkpoint MIB THREADS ROUNDS HUGE: a rank's snapshots (snapshot/snapshot.h) of a state of so many MiB, beside a
 * plain memory copy of the same bytes by the same threads into memory of the same kind, in turns. HUGE: 1 where the slots
 * lie in huge pages. A line of JSON a round, in nanoseconds:
 *
 *   save     begin to READY, as the rank is held up: what it copies, sums and marks
 *   copy     memcpy, a part a thread
 *   restore  as a rank that was started anew: map the slots and the arena, verify, copy back
 *   first    a save into a slot that this process has not touched yet
 */
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core/arena.h"
#include "core/clock.h"
#include "snapshot/snapshot.h"

enum { SLOTS = 3, TENSORS = 48, HUGE_PAGE = 2 << 20 };

static hs_plan_state states[TENSORS];
static hs_plan_tensor tensors[TENSORS];
static uint64_t state_bytes, slot_bytes;
static hs_pool *pool;
static hs_log log_ = {.fd = 2, .level = HS_LOG_WARN, .rank = -1};
static const uint8_t digest[32] = {1};

static void must(bool well, const char *what) {
    if (well) return;
    perror(what);
    exit(70);
}

/* Tensors of unlike sizes, a few large and many small ones, as a model has. */
static void lay_out(uint64_t bytes) {
    for (uint32_t t = 0; t < TENSORS; t++) {
        const uint64_t share = t % 4 == 0 ? bytes / 3 / (TENSORS / 4) : 3072;
        const uint64_t elements = (share + 63) / 64 * 16, one = elements * 4;
        tensors[t].elements = (int64_t)elements;
        states[t] = (hs_plan_state){.tensor = t, .pieces = 1, .slot_offset = state_bytes};
        states[t].master_offset = state_bytes;
        states[t].m_offset = state_bytes + one;
        states[t].v_offset = state_bytes + 2 * one;
        state_bytes += 3 * one;
    }
    slot_bytes = (state_bytes + (1 << 20) + HUGE_PAGE) / HUGE_PAGE * HUGE_PAGE;
}

/* A memfd of so many bytes whose pages are all there, huge ones where asked for. */
static int memory(uint64_t bytes, bool huge) {
    const int fd = memfd_create("hotstage-bench", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    must(fd >= 0, "memfd_create");
    if (huge) {
        hs_arena arena;
        hs_why why;
        must(hs_arena_open(fd, bytes, pool, &arena, &why) == HS_OK, "hs_arena_open");
        hs_arena_destroy(&arena);
    } else {
        must(ftruncate(fd, (off_t)bytes) == 0 && posix_fallocate(fd, 0, (off_t)bytes) == 0,
             "fallocate");
    }
    must(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0, "seal");
    return fd;
}

typedef struct copy {
    uint8_t *to;
    const uint8_t *from;
    int64_t parts;
} copy;

static void copy_part(void *ctx, int64_t begin, int64_t end, int worker) {
    const copy *c = ctx;
    const uint64_t first = state_bytes / (uint64_t)c->parts * (uint64_t)begin;
    const uint64_t last =
        end == c->parts ? state_bytes : state_bytes / (uint64_t)c->parts * (uint64_t)end;
    (void)worker;
    memcpy(c->to + first, c->from + first, last - first);
}

/* A rank that is started: its arena and its slots. */
typedef struct rank {
    uint8_t *arena;
    hs_snapshot *snapshot;
} rank;

static uint8_t *map(int fd) {
    uint8_t *at = mmap(NULL, slot_bytes + HUGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(at != MAP_FAILED, "mmap");
    at += -(uintptr_t)at % HUGE_PAGE;
    at = mmap(at, slot_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
    must(at != MAP_FAILED, "mmap");
    return at;
}

static rank start(int arena_fd, const int slots[SLOTS]) {
    rank r = {.arena = map(arena_fd)};
    hs_why why = {.text = ""};
    int fds[SLOTS];
    for (int i = 0; i < SLOTS; i++) fds[i] = dup(slots[i]);
    const hs_snapshot_config config = {.states = states,
                                       .state_count = TENSORS,
                                       .tensors = tensors,
                                       .slot_bytes = slot_bytes,
                                       .arena = r.arena,
                                       .plan_digest = digest,
                                       .what_digest = digest,
                                       .epoch = 1,
                                       .pool = pool,
                                       .log = &log_};
    if (hs_snapshot_create(&config, &r.snapshot, &why) != HS_OK ||
        hs_snapshot_attach(r.snapshot, fds, SLOTS, &why) != HS_OK) {
        (void)fprintf(stderr, "%s\n", why.text);
        exit(70);
    }
    return r;
}

static int64_t save(const rank *r, int64_t step, int *slot) {
    const hs_snapshot_done what = {.step = step};
    hs_snapshot_done done;
    hs_why why;
    bool any;
    const int64_t begin = hs_clock_ns();
    must(hs_snapshot_claim(r->snapshot) && hs_snapshot_begin(r->snapshot, &what, &why) == HS_OK &&
             hs_snapshot_take(r->snapshot, &any, &done, &why) == HS_OK && any,
         "save");
    const int64_t took = hs_clock_ns() - begin;
    *slot = done.slot;
    return took;
}

static void end(rank *r) {
    hs_snapshot_destroy(r->snapshot);
    (void)munmap(r->arena, slot_bytes);
}

int main(int argc, char **argv) {
    if (argc < 5) return 64;
    lay_out(strtoull(argv[1], NULL, 10) << 20);
    must(hs_pool_create(atoi(argv[2]), &pool) == HS_OK, "threads");
    const int rounds = atoi(argv[3]);
    const bool huge = atoi(argv[4]) != 0;
    const int arena_fd = memory(slot_bytes, true), plain_fd = memory(slot_bytes, huge);
    int slots[SLOTS], slot = 0;
    for (int i = 0; i < SLOTS; i++) slots[i] = memory(slot_bytes, huge);
    rank r = start(arena_fd, slots);
    uint8_t *const plain = map(plain_fd);
    for (uint64_t i = 0; i < state_bytes; i += 8) {
        const uint64_t word = i * 0x9e3779b97f4a7c15u;
        memcpy(r.arena + i, &word, 8);
    }
    memset(plain, 1, state_bytes);
    int64_t step = 1;
    for (int i = 0; i < SLOTS; i++) (void)save(&r, step++, &slot);
    for (int round = 0; round < rounds; round++) {
        const int64_t saved = save(&r, step, &slot), begin = hs_clock_ns();
        copy c = {.to = plain, .from = r.arena, .parts = hs_pool_threads(pool)};
        hs_parallel_for(pool, c.parts, copy_part, &c);
        const int64_t copied = hs_clock_ns() - begin;
        memset(r.arena, 0, state_bytes);
        end(&r);
        const int64_t again = hs_clock_ns();
        hs_why why = {.text = ""};
        r = start(arena_fd, slots);
        const int64_t mapped = hs_clock_ns() - again;
        if (hs_snapshot_restore(r.snapshot, slot, step, &why) != HS_OK) {
            (void)fprintf(stderr, "%s\n", why.text);
            return 70;
        }
        const int64_t restored = hs_clock_ns() - again;
        must(memcmp(plain, r.arena, state_bytes) == 0, "equal bytes");
        int other;
        step++;
        const int64_t first = save(&r, step++, &other);
        (void)printf("{\"bytes\":%" PRIu64 ",\"save\":%" PRId64 ",\"copy\":%" PRId64
                     ",\"map\":%" PRId64 ",\"restore\":%" PRId64 ",\"first\":%" PRId64 "}\n",
                     state_bytes, saved, copied, mapped, restored, first);
        (void)fflush(stdout);
        for (int i = 1; i < SLOTS; i++) (void)save(&r, step++, &other);
    }
    end(&r);
    return 0;
}
