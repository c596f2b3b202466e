/* A rank's snapshots, told by lines on standard input; the slots are descriptors from the command
 * line.
 *
 *   snapshot_drive POSITION PLAN_DIGEST_HEX WHAT_DIGEST_HEX EPOCH THREADS SLOT_BYTES
 * ELEMENTS,ELEMENTS,... FD...
 *
 * States lie in a slot one after the other (plan.h), in the arena in reverse order, so that a wrong
 * place shows. set SEED          every element of every master, m and v gets a value of its own
 *   fill STEP FINAL (2: to be stored alone)   restore SLOT STEP   claim   unclaim   step SLOT   check SEED (the arena is what set
 * SEED made) One line of answer each: "ok ...", or "<STATUS> why".
 *
 * With SNAPSHOT_APART in the environment the arena is a device's, whose copies to a slot are done when
 * the test says so, as the arena is then:
 *   begin STEP FINAL   let (the copies are done)   fail (they fail)   take (-1: not READY)   wait
 *   copies (how many were issued)
 */
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/clock.h"
#include "snapshot/snapshot.h"

enum { STATES_MAX = 16 };

static hs_plan_state states[STATES_MAX];
static hs_plan_tensor tensors[STATES_MAX];
static int64_t kept[STATES_MAX]; /* elements of a tensor that a rank has */
static uint32_t state_count;
static uint8_t *arena;

static float value(uint32_t seed, uint32_t state, uint32_t kind, int64_t i) {
    return (float)((seed * 2654435761u + state * 40503u + kind * 977u + (uint32_t)i * 31u) %
                   1000003u);
}

static float *place(uint32_t state, uint32_t kind) {
    const uint64_t offsets[3] = {states[state].master_offset, states[state].m_offset,
                                 states[state].v_offset};
    return (float *)(void *)(arena + offsets[kind]);
}

/* Writes (set) or compares; returns how many differed. */
static int64_t walk(uint32_t seed, int set) {
    int64_t bad = 0;
    for (uint32_t s = 0; s < state_count; s++)
        for (uint32_t kind = 0; kind < 3; kind++)
            for (int64_t i = 0; i < kept[s]; i++) {
                const float want = value(seed, s, kind, i);
                if (set)
                    place(s, kind)[i] = want;
                else
                    bad += place(s, kind)[i] != want;
            }
    return bad;
}

static void lay_out(char *elements) {
    uint64_t slot = 0, total = 0;
    char *state = NULL;
    for (char *word = strtok_r(elements, ",", &state); word; word = strtok_r(NULL, ",", &state)) {
        char *end;
        const int64_t whole = strtoll(word, &end, 10), pieces = *end == '/' ? atoi(end + 1) : 1;
        kept[state_count] = (int64_t)hs_piece_elements((uint64_t)whole, (uint32_t)pieces);
        const uint64_t bytes = ((uint64_t)kept[state_count] * 4 + 63) / 64 * 64;
        tensors[state_count].elements = whole;
        states[state_count] =
            (hs_plan_state){.tensor = state_count, .pieces = (uint32_t)pieces, .slot_offset = slot};
        state_count++;
        slot += 3 * bytes;
    }
    for (uint32_t s = state_count; s-- > 0;) {
        const uint64_t bytes = ((uint64_t)kept[s] * 4 + 63) / 64 * 64;
        states[s].v_offset = total;
        states[s].m_offset = total + bytes;
        states[s].master_offset = total + 2 * bytes;
        total += 3 * bytes;
    }
    arena = calloc(1, total + 64);
}

/* --- a device ---------------------------------------------------------------------------- */

static struct {
    struct {
        uint8_t *to;
        const uint8_t *from;
        uint64_t bytes;
    } list[3 * STATES_MAX]; /* to a slot, not done yet */
    int count, issued;
    sem_t answer;
    bool failed;
} device;

static hs_status device_copy(void *ctx, bool to_slot, uint64_t offset, uint8_t *data,
                             uint64_t bytes, hs_why *why) {
    (void)ctx;
    (void)why;
    device.issued++;
    if (!to_slot) {
        memcpy(arena + offset, data, bytes);
        return HS_OK;
    }
    memset(data, 0xff, bytes);
    device.list[device.count].to = data;
    device.list[device.count].from = arena + offset;
    device.list[device.count++].bytes = bytes;
    return HS_OK;
}

static hs_status device_copied(void *ctx, bool to_slot, hs_why *why) {
    (void)ctx;
    (void)to_slot;
    (void)why;
    return HS_OK;
}

static hs_status device_wait(void *ctx, hs_why *why) {
    (void)ctx;
    while (sem_wait(&device.answer) != 0) continue;
    return device.failed ? hs_fail(why, HS_E_DEVICE, "it fell off its bus") : HS_OK;
}

static void device_answers(bool well) {
    for (int i = 0; well && i < device.count; i++)
        memcpy(device.list[i].to, device.list[i].from, device.list[i].bytes);
    device.count = 0;
    device.failed = !well;
    (void)sem_post(&device.answer);
}

static void digest_of(const char *hex, uint8_t digest[32]) {
    for (int i = 0; i < 32; i++) {
        unsigned byte = 0;
        (void)sscanf(hex + 2 * i, "%2x", &byte);
        digest[i] = (uint8_t)byte;
    }
}

static void answer(hs_status st, long long number, const hs_why *why) {
    if (st == HS_OK)
        (void)printf("ok %lld\n", number);
    else
        (void)printf("%s %s\n", hs_status_name(st), why->text);
    (void)fflush(stdout);
}

static hs_status take(hs_snapshot *snapshot, int *slot, hs_why *why) {
    bool any;
    hs_snapshot_done done = {.slot = -1};
    const hs_status st = hs_snapshot_take(snapshot, &any, &done, why);
    *slot = done.slot;
    return st;
}

static void serve(hs_snapshot *snapshot) {
    char line[256], word[32];
    while (fgets(line, sizeof line, stdin)) {
        long long a = 0, b = 0;
        hs_why why = {.text = ""};
        if (sscanf(line, "%31s %lld %lld", word, &a, &b) < 1) continue;
        int slot = -1;
        if (strcmp(word, "set") == 0) {
            answer(HS_OK, walk((uint32_t)a, 1), &why);
        } else if (strcmp(word, "check") == 0) {
            answer(HS_OK, walk((uint32_t)a, 0), &why);
        } else if (strcmp(word, "fill") == 0) {
            const hs_snapshot_done what = {.step = a, .final = b == 1, .persist = b != 0};
            hs_status st = hs_snapshot_begin(snapshot, &what, &why);
            if (st == HS_OK) st = take(snapshot, &slot, &why);
            answer(st, slot, &why);
        } else if (strcmp(word, "begin") == 0) {
            const hs_snapshot_done what = {.step = a, .final = b == 1, .persist = b != 0};
            answer(hs_snapshot_begin(snapshot, &what, &why), a, &why);
        } else if (strcmp(word, "let") == 0 || strcmp(word, "fail") == 0) {
            device_answers(word[0] == 'l');
            answer(HS_OK, 0, &why);
        } else if (strcmp(word, "take") == 0 || strcmp(word, "wait") == 0) {
            hs_status st = HS_OK;
            if (word[0] == 'w') st = hs_snapshot_wait(snapshot, hs_deadline_ns(20000), NULL, &why);
            if (st == HS_OK) st = take(snapshot, &slot, &why);
            answer(st, slot, &why);
        } else if (strcmp(word, "copies") == 0) {
            answer(HS_OK, device.issued, &why);
        } else if (strcmp(word, "restore") == 0) {
            answer(hs_snapshot_restore(snapshot, (int)a, b, &why), a, &why);
        } else if (strcmp(word, "claim") == 0) {
            answer(HS_OK, hs_snapshot_claim(snapshot), &why);
        } else if (strcmp(word, "unclaim") == 0) {
            hs_snapshot_unclaim(snapshot);
            answer(HS_OK, 0, &why);
        } else if (strcmp(word, "step") == 0) {
            answer(HS_OK, hs_snapshot_step(snapshot, (int)a), &why);
        }
    }
}

int main(int argc, char **argv) {
    if (argc < 8) return 64;
    uint8_t plan[32], what[32];
    int fds[HS_SNAPSHOT_SLOTS_MAX], count = 0;
    hs_pool *pool = NULL;
    hs_snapshot *snapshot = NULL;
    hs_why why = {.text = ""};
    (void)sem_init(&device.answer, 0, 0);
    unsigned position, replica = 0; /* as 2 or 2.1 */
    if (sscanf(argv[1], "%u.%u", &position, &replica) < 1) return 64;
    digest_of(argv[2], plan);
    digest_of(argv[3], what);
    lay_out(argv[7]);
    for (int i = 8; i < argc && count < HS_SNAPSHOT_SLOTS_MAX; i++) fds[count++] = atoi(argv[i]);
    const hs_log log = {.fd = 2, .level = HS_LOG_DEBUG, .rank = -1};
    const hs_snapshot_config config = {
        .position = position,
        .replica = replica,
        .states = states,
        .state_count = state_count,
        .tensors = tensors,
        .slot_bytes = strtoull(argv[6], NULL, 10),
        .arena = getenv("SNAPSHOT_APART") ? NULL : arena,
        .device = {.copy = device_copy, .copied = device_copied, .wait = device_wait},
        .plan_digest = plan,
        .what_digest = what,
        .epoch = strtoull(argv[4], NULL, 10),
        .log = &log};
    hs_snapshot_config with_pool = config;
    hs_status st = hs_pool_create(atoi(argv[5]), &pool);
    with_pool.pool = pool;
    if (st == HS_OK) st = hs_snapshot_create(&with_pool, &snapshot, &why);
    if (st == HS_OK) st = hs_snapshot_attach(snapshot, fds, count, &why);
    answer(st, count, &why);
    if (st == HS_OK) serve(snapshot);
    hs_snapshot_destroy(snapshot);
    hs_pool_destroy(pool);
    free(arena);
    return hs_status_exit(st);
}
