/* A rank's snapshots, told by lines on standard input; the slots are descriptors from the command
 * line.
 *
 *   snapshot_drive POSITION PLAN_DIGEST_HEX WHAT_DIGEST_HEX EPOCH THREADS SLOT_BYTES
 * ELEMENTS,ELEMENTS,... FD...
 *
 * States lie in a slot one after the other (plan.h), in the arena in reverse order, so that a wrong
 * place shows. set SEED          every element of every master, m and v gets a value of its own
 *   fill STEP FINAL   restore SLOT STEP     can     step SLOT     check SEED (the arena is what set
 * SEED made) One line of answer each: "ok ...", or "<STATUS> why".
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "snapshot/snapshot.h"

enum { STATES_MAX = 16 };

static hs_plan_state states[STATES_MAX];
static hs_plan_tensor tensors[STATES_MAX];
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
            for (int64_t i = 0; i < tensors[s].elements; i++) {
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
        const uint64_t bytes = (strtoull(word, NULL, 10) * 4 + 63) / 64 * 64;
        tensors[state_count].elements = (int64_t)strtoull(word, NULL, 10);
        states[state_count] = (hs_plan_state){.tensor = state_count, .slot_offset = slot};
        state_count++;
        slot += 3 * bytes;
    }
    for (uint32_t s = state_count; s-- > 0;) {
        const uint64_t bytes = ((uint64_t)tensors[s].elements * 4 + 63) / 64 * 64;
        states[s].v_offset = total;
        states[s].m_offset = total + bytes;
        states[s].master_offset = total + 2 * bytes;
        total += 3 * bytes;
    }
    arena = calloc(1, total + 64);
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
            const hs_status st = hs_snapshot_fill(snapshot, a, b != 0, 0, NULL, &slot, &why);
            answer(st, slot, &why);
        } else if (strcmp(word, "restore") == 0) {
            answer(hs_snapshot_restore(snapshot, (int)a, b, &why), a, &why);
        } else if (strcmp(word, "can") == 0) {
            answer(HS_OK, hs_snapshot_can_fill(snapshot), &why);
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
    digest_of(argv[2], plan);
    digest_of(argv[3], what);
    lay_out(argv[7]);
    for (int i = 8; i < argc && count < HS_SNAPSHOT_SLOTS_MAX; i++) fds[count++] = atoi(argv[i]);
    const hs_log log = {.fd = 2, .level = HS_LOG_DEBUG, .rank = -1};
    const hs_snapshot_config config = {.position = (uint32_t)atoi(argv[1]),
                                       .states = states,
                                       .state_count = state_count,
                                       .tensors = tensors,
                                       .slot_bytes = strtoull(argv[6], NULL, 10),
                                       .arena = arena,
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
