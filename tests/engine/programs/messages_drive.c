/* Whole ranks as threads of one process, over comm/loop.c: what each wait of run/behind.h is for.
 *
 *   messages_drive PLAN ATTEMPT rendezvous       one run
 *   messages_drive PLAN ATTEMPT late SEED        one run
 *   messages_drive PLAN ATTEMPT without SEED     runs, of each wait of the step's list in turn without it, and of
 *                                                each place that is given ahead with it one action sooner
 *
 * Lines on standard output: "sound DIGEST", of all states and the last losses; then, of each change, "wait RANK ACTION
 * MESSAGE NAME VERDICT" or "post RANK ACTION MESSAGE NAME VERDICT": "differs" (a run ended otherwise), "same".
 * "start RANK ACTION MESSAGE NAME", before which a send begins (in a run that may block: at its own place).
 * "held RANK MESSAGE MESSAGE NAME": in the sound run a wait of the list for this message of it was not over at once. */
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "backend/load.h"
#include "core/clock.h"
#include "core/hash.h"
#include "run/attempt.h"
#include "run/executor.h"
#include "run/machine.h"
#include "run/plan_data.h"
#include "run/steps.h"

enum { RANKS_MAX = 16 };

typedef struct gang {
    hs_plan plan;
    hs_attempt_file attempt;
    const hs_backend *backend;
    hs_loop_mode mode;
    uint64_t seed;
} gang;

typedef struct rank {
    const gang *g;
    struct hs_comm_loop *loop;
    uint32_t number;
    const hs_behind *behind; /* by list */
    bool *held;              /* by action of the step's list */
    hs_messages *messages;
    hs_status status;
    hs_why why;
    uint32_t crc;
    pthread_t thread;
} rank;

/* comm/loop.c, and which messages of the step's list it was waited for. */
static _Thread_local rank *self;

static hs_status note(hs_comm *comm, uint32_t kind, uint32_t channel, uint64_t count, hs_why *why) {
    hs_comm_wait wait;
    const int64_t start = hs_clock_ns();
    const hs_status st = kind == HS_A_SEND ? hs_comm_loop_table.sent(comm, channel, count, why)
                                           : hs_comm_loop_table.got(comm, channel, count, why);
    hs_comm_loop_table.last_wait(comm, &wait);
    if (wait.since_ns < start || !hs_messages_awaited(self->messages)) return st;
    const hs_plan *plan = &self->g->plan;
    const hs_plan_position *p = &plan->positions[hs_plan_position_of(plan, self->number)];
    for (uint32_t k = 0; k < p->loads; k++) {
        const hs_plan_action *a = &plan->actions[p->first_load + k];
        count -= a->kind == kind && a->channel == channel;
    }
    for (uint64_t k = 0; count > 0; k++) {
        const hs_plan_action *a = &plan->actions[p->first_step + k % p->steps];
        if (a->kind != kind || a->channel != channel || --count > 0) continue;
        self->held[k % p->steps] = true;
    }
    return st;
}

static hs_status note_sent(hs_comm *comm, uint32_t channel, uint64_t count, hs_why *why) {
    return note(comm, HS_A_SEND, channel, count, why);
}

static hs_status note_got(hs_comm *comm, uint32_t channel, uint64_t count, hs_why *why) {
    return note(comm, HS_A_RECV, channel, count, why);
}

static uint32_t digest(const gang *g, const hs_plan_position *p, const uint8_t *arena) {
    uint32_t crc = 0;
    for (uint32_t i = 0; i < p->states; i++) {
        const hs_plan_state *s = &g->plan.states[p->first_state + i];
        const uint64_t at[3] = {s->master_offset, s->m_offset, s->v_offset};
        for (int k = 0; k < 3; k++)
            crc = hs_crc32c(crc, arena + at[k], 4 * hs_plan_kept(&g->plan, s));
    }
    return hs_crc32c(crc, arena + p->control_offset, sizeof(hs_step_control));
}

static hs_status run(rank *r, hs_machine *machine, hs_shards **shards, hs_comm **comm,
                     hs_messages **messages, hs_why *why) {
    const gang *g = r->g;
    const hs_plan_config *config = g->plan.config;
    const hs_plan_position *p = &g->plan.positions[hs_plan_position_of(&g->plan, r->number)];
    const uint32_t replica = hs_plan_replica_of(&g->plan, r->number);
    const hs_machine_config of_machine = {.backend = g->backend,
                                          .plan = &g->plan,
                                          .position = p,
                                          .replica = replica,
                                          .kernel_path = g->attempt.attempt->kernel_path,
                                          .threads = 1,
                                          .local_ranks = 1,
                                          .arena_fd = -1};
    HS_TRY(hs_machine_create(&of_machine, machine, why));
    const hs_shard_tables tables = hs_plan_shards(&g->plan);
    if (p->tokens_offset != UINT64_MAX || p->targets_offset != UINT64_MAX)
        HS_TRY(hs_shards_open(g->attempt.attempt->data_dir, &tables, shards, why));
    uint32_t most;
    HS_TRY(hs_messages_most(&g->plan, p, &most, why));
    const hs_comm_config of_comm = {.attempt = g->attempt.attempt,
                                    .peers = g->attempt.ranks,
                                    .channels = g->plan.channels,
                                    .channel_count = (uint32_t)g->plan.count[HS_SECTION_CHANNELS],
                                    .rank = r->number,
                                    .positions = config->positions,
                                    .start_step = -1,
                                    .listen_fd = -1,
                                    .loop = r->loop,
                                    .most = most};
    HS_TRY(hs_comm_loop_table.create(&of_comm, comm, why));
    hs_metrics metrics;
    hs_metrics_open(&metrics, g->attempt.attempt->run, 1, r->number, 1);
    hs_comm_table table = hs_comm_loop_table;
    table.sent = note_sent;
    table.got = note_got;
    const hs_messages_config of_messages = {.plan = &g->plan,
                                            .position = p,
                                            .rank = r->number,
                                            .spaces = &machine->spaces,
                                            .linked = machine->linked,
                                            .transport = &table,
                                            .comm = *comm,
                                            .behind = r->behind,
                                            .metrics = &metrics};
    HS_TRY(hs_messages_create(&of_messages, messages, why));
    r->messages = *messages;
    const hs_log log = {.fd = 2, .level = HS_LOG_ERROR, .rank = (int32_t)r->number};
    const hs_amendments none = {0};
    hs_executor ex = {.plan = &g->plan,
                      .amendments = &none,
                      .position = p,
                      .rank = r->number,
                      .attempt = g->attempt.attempt,
                      .spaces = &machine->spaces,
                      .linked = machine->linked,
                      .transport = &hs_comm_loop_table,
                      .comm = *comm,
                      .messages = *messages,
                      .shards = *shards,
                      .metrics = &metrics,
                      .log = &log};
    HS_TRY(hs_executor_order(&ex, why));
    HS_TRY(hs_executor_prepare(&ex, HS_LIST_INIT, why));
    HS_TRY(hs_executor_prepare(&ex, HS_LIST_LOAD, why));
    const hs_status st = hs_steps_run(&ex, 0, why);
    r->crc = digest(g, p, machine->spaces.arena);
    hs_metrics_close(&metrics);
    return st;
}

static void *drive(void *argument) {
    rank *r = self = argument;
    hs_machine machine = {0};
    hs_shards *shards = NULL;
    hs_comm *comm = NULL;
    hs_messages *messages = NULL;
    r->status = run(r, &machine, &shards, &comm, &messages, &r->why);
    hs_comm_loop_table.close(comm);
    hs_messages_destroy(messages);
    hs_shards_close(shards);
    hs_machine_destroy(&machine);
    return NULL;
}

static void tell(const gang *g, const char *what, uint32_t n, uint32_t i, uint32_t message,
                 const char *verdict) {
    const hs_plan_position *p = &g->plan.positions[hs_plan_position_of(&g->plan, n)];
    char name[40];
    hs_plan_action_name(&g->plan, &g->plan.actions[p->first_step + message], name);
    (void)printf("%s %u %u %u %s %s\n", what, n, i, message, name, verdict);
}

/* All ranks, from the start to the end; what they came to. Differs where anything does. */
static uint32_t play(const gang *g, hs_behind (*behind)[HS_LISTS], bool loud) {
    const uint32_t ranks = g->attempt.attempt->ranks;
    rank all[RANKS_MAX];
    struct hs_comm_loop *loop;
    if (hs_comm_loop_create(ranks, g->plan.channels, (uint32_t)g->plan.count[HS_SECTION_CHANNELS],
                            g->mode, g->seed, &loop) != HS_OK)
        exit(70);
    for (uint32_t n = 0; n < ranks; n++) {
        const uint32_t steps = g->plan.positions[hs_plan_position_of(&g->plan, n)].steps;
        all[n] = (rank){.g = g,
                        .loop = loop,
                        .number = n,
                        .behind = behind[n],
                        .held = calloc(steps + 1, sizeof *all[n].held)};
        if (!all[n].held) exit(70);
        if (pthread_create(&all[n].thread, NULL, drive, &all[n]) != 0) exit(70);
    }
    uint32_t crc = 0;
    for (uint32_t n = 0; n < ranks; n++) {
        (void)pthread_join(all[n].thread, NULL);
        if (all[n].status != HS_OK && loud)
            (void)fprintf(stderr, "rank %u: %s: %s\n", n, hs_status_name(all[n].status),
                          all[n].why.text);
        crc = hs_crc32c(crc, &all[n].status, sizeof all[n].status);
        crc = hs_crc32c(crc, &all[n].crc, sizeof all[n].crc);
        const hs_plan_position *p = &g->plan.positions[hs_plan_position_of(&g->plan, n)];
        for (uint32_t i = 0; loud && i < p->steps; i++)
            if (all[n].held[i]) tell(g, "held", n, i, i, "");
        free(all[n].held);
    }
    hs_comm_loop_destroy(loop);
    return crc;
}

static const char *verdict(const gang *g, hs_behind (*behind)[HS_LISTS], uint32_t sound) {
    return play(g, behind, false) == sound ? "same" : "differs";
}

/* The part without element k; it is where action *i has it. */
static uint32_t take_out(hs_behind *b, hs_behind_part *part, uint32_t k, uint32_t *i) {
    const uint32_t action = part->action[k], all = part->first[b->count];
    for (*i = 0; part->first[*i + 1] <= k;) ++*i;
    for (uint32_t j = *i + 1; j <= b->count; j++) part->first[j]--;
    memmove(part->action + k, part->action + k + 1, (all - k - 1) * sizeof *part->action);
    return action;
}

static void put_in(hs_behind *b, hs_behind_part *part, uint32_t k, uint32_t i, uint32_t action) {
    const uint32_t all = part->first[b->count];
    memmove(part->action + k + 1, part->action + k, (all - k) * sizeof *part->action);
    part->action[k] = action;
    for (uint32_t j = i + 1; j <= b->count; j++) part->first[j]++;
}

/* Each wait taken out, and put back. */
static void without_waits(const gang *g, hs_behind (*behind)[HS_LISTS], uint32_t sound) {
    for (uint32_t n = 0; n < g->attempt.attempt->ranks; n++) {
        hs_behind *b = &behind[n][HS_LIST_STEP];
        for (uint32_t k = 0, all = b->waits.first[b->count]; k < all; k++) {
            uint32_t i;
            const uint32_t message = take_out(b, &b->waits, k, &i);
            tell(g, "wait", n, i, message, verdict(g, behind, sound));
            put_in(b, &b->waits, k, i, message);
        }
    }
}

/* Each place given one action sooner than it is, where it is given behind one. */
static void sooner(const gang *g, hs_behind (*behind)[HS_LISTS], uint32_t sound) {
    for (uint32_t n = 0; n < g->attempt.attempt->ranks; n++) {
        hs_behind *b = &behind[n][HS_LIST_STEP];
        for (uint32_t k = 0, all = b->posts.first[b->count]; k < all; k++) {
            uint32_t i;
            const uint32_t message = take_out(b, &b->posts, k, &i);
            if (i > 0) {
                const uint32_t place = b->posts.first[i];
                put_in(b, &b->posts, place, i - 1, message);
                tell(g, "post", n, i, message, verdict(g, behind, sound));
                (void)take_out(b, &b->posts, place, &i);
                i++;
            }
            put_in(b, &b->posts, k, i, message);
        }
    }
}

/* A send that blocks until it is received stands where the plan has it. */
static void where_listed(const gang *g, hs_behind (*behind)[HS_LISTS]) {
    for (uint32_t n = 0; n < g->attempt.attempt->ranks; n++) {
        const hs_plan_position *p = &g->plan.positions[hs_plan_position_of(&g->plan, n)];
        for (int list = 0; list < HS_LISTS; list++) {
            hs_behind *b = &behind[n][list];
            const uint32_t first = hs_plan_list(p, (hs_list)list).first;
            for (uint32_t i = 0, k = 0; i < b->count; i++) {
                b->starts.first[i] = k;
                if (g->plan.actions[first + i].kind == HS_A_SEND) b->starts.action[k++] = i;
                b->starts.first[i + 1] = k;
            }
        }
    }
}

/* When each send begins. */
static void tell_starts(const gang *g, hs_behind (*behind)[HS_LISTS]) {
    for (uint32_t n = 0; n < g->attempt.attempt->ranks; n++) {
        const hs_behind *b = &behind[n][HS_LIST_STEP];
        for (uint32_t i = 0; i < b->count; i++)
            for (uint32_t k = b->starts.first[i]; k < b->starts.first[i + 1]; k++)
                tell(g, "start", n, i, b->starts.action[k], "");
    }
}

int main(int argc, char **argv) {
    static gang g;
    static hs_behind behind[RANKS_MAX][HS_LISTS];
    hs_why why = {.text = ""};
    if (argc < 4 || hs_plan_open(argv[1], &g.plan, &why) != HS_OK ||
        hs_attempt_open(argv[2], &g.attempt, &why) != HS_OK ||
        hs_backend_load(HS_DEVICE_CPU, &g.backend, &why) != HS_OK) {
        (void)fprintf(stderr, "%s\n", why.text);
        return 64;
    }
    const uint32_t ranks = g.attempt.attempt->ranks;
    g.mode = strcmp(argv[3], "rendezvous") == 0 ? HS_LOOP_RENDEZVOUS : HS_LOOP_LATE;
    g.seed = argc > 4 ? (uint64_t)atoll(argv[4]) : 0;
    for (uint32_t n = 0; n < ranks; n++)
        if (hs_messages_order(&g.plan, &g.plan.positions[hs_plan_position_of(&g.plan, n)],
                              hs_plan_replica_of(&g.plan, n), behind[n], &why) != HS_OK)
            return 70;
    const int out = dup(STDOUT_FILENO), null = open("/dev/null", O_WRONLY | O_CLOEXEC);
    FILE *told = fdopen(out, "w");
    (void)dup2(null, STDOUT_FILENO); /* rank 0 tells its steps there */
    stdout = told;
    tell_starts(&g, behind);
    if (g.mode == HS_LOOP_RENDEZVOUS) where_listed(&g, behind);
    const uint32_t sound = play(&g, behind, true);
    (void)printf("sound %08x\n", sound);
    if (strcmp(argv[3], "without") == 0) {
        without_waits(&g, behind, sound);
        sooner(&g, behind, sound);
    }
    (void)fflush(stdout);
    for (uint32_t n = 0; n < ranks; n++)
        for (int list = 0; list < HS_LISTS; list++) hs_behind_free(&behind[n][list]);
    hs_attempt_close(&g.attempt);
    hs_plan_close(&g.plan);
    return 0;
}
