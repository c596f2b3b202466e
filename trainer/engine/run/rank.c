#include "run/rank.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "backend/load.h"
#include "core/clock.h"
#include "run/abort_words.h"
#include "run/algorithms.h"
#include "run/attempt.h"
#include "run/executor.h"
#include "run/landings.h"
#include "run/machine.h"
#include "run/plan_data.h"
#include "run/step_math.h"
#include "run/steps.h"
#include "run/weights.h"
#include "wire/frame.h"

enum {
    LEAVE_MS = 2000,  /* for the agent to take the last words */
    IN_TIME_MS = 250, /* the same, where the supervisor waits 300 ms for all */
};

/* All parts of a rank; zero-initialised, so that close_all takes whatever was opened. */
typedef struct rank {
    const hs_rank_args *args;
    const hs_backend *backend;
    hs_log log;
    hs_plan plan;
    hs_attempt_file attempt;
    hs_stop *stop;
    hs_agent_link *agent;
    hs_snapshot *snapshot;
    int restore_slot; /* -1: none */
    hs_machine machine;
    hs_shards *shards;
    hs_metrics metrics;
    hs_trace *trace;
    hs_rank_page *page;
    hs_comm_device between; /* devices; of comm */
    hs_landings landings;
    bool *direct; /* by channel */
    hs_comm *comm;
    hs_behind behind[HS_LISTS];
    hs_messages *messages;
    bool started; /* the start line was printed */
    hs_executor executor;
} rank;

static hs_status open_files(rank *r, hs_why *why) {
    HS_TRY(hs_plan_open(r->args->plan, &r->plan, why));
    HS_TRY(hs_attempt_open(r->args->attempt, &r->attempt, why));
    const hs_attempt *a = r->attempt.attempt;
    const hs_plan_config *g = r->plan.config;
    memcpy(r->log.run, a->run, sizeof r->log.run);
    r->log.epoch = a->epoch;
    if (memcmp(a->plan_digest, r->plan.header->digest, sizeof a->plan_digest) != 0) {
        return hs_fail(why, HS_E_CONFIG, "plan %s is not the one that attempt %s names",
                       r->args->plan, r->args->attempt);
    }
    if (g->mode != HS_MODE_TRAIN) {
        return hs_fail(why, HS_E_CONFIG, "plan %s is for inference, not for training",
                       r->args->plan);
    }
    if (a->ranks != g->positions * g->replicas || r->args->rank >= a->ranks) {
        return hs_fail(why, HS_E_CONFIG,
                       "rank %" PRIu32 " of %" PRIu32 " ranks; the plan has %" PRIu32
                       " positions in each of %" PRIu32 " replicas",
                       r->args->rank, a->ranks, g->positions, g->replicas);
    }
    const int64_t steps = hs_step_total(g, &r->attempt.amendments);
    if (a->start_step > steps) {
        return hs_fail(why, HS_E_CONFIG,
                       "the attempt starts after step %" PRId64 ", the run ends at %" PRId64,
                       a->start_step, steps);
    }
    if (!r->args->agent && a->start_step >= 0) {
        return hs_fail(why, HS_E_CONFIG,
                       "the attempt starts after step %" PRId64
                       ", but without an agent there are no slots to restore from",
                       a->start_step);
    }
    if (!r->args->agent && a->data_ahead) {
        return hs_fail(
            why, HS_E_CONFIG,
            "the attempt's data comes while it runs, but without an agent nobody brings it");
    }
    if (a->device_kind == HS_DEVICE_CPU && strcmp(r->args->environment->fabric, "tcp") != 0) {
        return hs_fail(why, HS_E_CONFIG,
                       "launch.fabric is '%s' (HOTSTAGE_ENGINE_FABRIC); ranks on CPUs carry their "
                       "messages over tcp alone: set launch.fabric = \"tcp\"",
                       r->args->environment->fabric);
    }
    HS_TRY(hs_backend_load(a->device_kind, &r->backend, why));
    r->executor.rank = r->args->rank;
    r->executor.position = &r->plan.positions[hs_plan_position_of(&r->plan, r->args->rank)];
    return HS_OK;
}

/* The agent's slots: asked for here, mapped when the arena is there. */
static hs_status open_agent(rank *r, int fds[HS_SNAPSHOT_SLOTS_MAX], int *count, hs_why *why) {
    *count = 0;
    r->restore_slot = -1;
    if (!r->args->agent) return HS_OK;
    return hs_agent_link_slots(r->agent, hs_deadline_ns(r->attempt.attempt->connect_ms), r->stop,
                               fds, count, &r->restore_slot, why);
}

/* What a slot holds, of a device whose memory is apart (snapshot/snapshot.h). */
static hs_status slot_copy(void *ctx, bool to_slot, uint64_t offset, uint8_t *data, uint64_t bytes,
                           hs_why *why) {
    return to_slot ? hs_spaces_save(ctx, offset, data, bytes, why)
                   : hs_spaces_put(ctx, offset, data, bytes, why);
}

static hs_status slot_copied(void *ctx, bool to_slot, hs_why *why) {
    return to_slot ? hs_spaces_saved(ctx, why) : hs_spaces_wait(ctx, HS_STREAM_IN, why);
}

static hs_status slot_wait(void *ctx, hs_why *why) {
    return hs_spaces_wait_saved(ctx, why);
}

/* Where the host does not let the slots be pinned, their copies are slow, and right. */
static void pin_slots(const rank *r) {
    const hs_spaces *spaces = &r->machine.spaces;
    uint64_t bytes;
    uint8_t *at;
    for (int i = 0; (at = hs_snapshot_memory(r->snapshot, i, &bytes)); i++) {
        hs_why why = {0};
        if (spaces->backend->pin(spaces->device, at, bytes, &why) == HS_OK) continue;
        HS_LOG(&r->log, HS_LOG_WARN, "a snapshot slot is not pinned: saving holds up the steps",
               HS_I("slot", i), HS_I("bytes", (int64_t)bytes), HS_S("why", why.text),
               HS_S("mend", "raise the limit of locked memory (ulimit -l, or the container's)"));
    }
}

static hs_status open_snapshot(rank *r, const int *fds, int count, hs_why *why) {
    const hs_plan_position *p = r->executor.position;
    hs_spaces *spaces = &r->machine.spaces;
    const hs_snapshot_config config = {
        .position = p->position,
        .replica = hs_plan_replica_of(&r->plan, r->args->rank),
        .states = r->plan.states + p->first_state,
        .state_count = p->states,
        .tensors = r->plan.tensors,
        .slot_bytes = p->slot_bytes,
        .arena = spaces->backend->unified ? spaces->arena : NULL,
        .device = {.ctx = spaces, .copy = slot_copy, .copied = slot_copied, .wait = slot_wait},
        .plan_digest = r->plan.header->digest,
        .what_digest = r->plan.config->what_digest,
        .epoch = r->attempt.attempt->epoch,
        .pool = r->machine.pool,
        .log = &r->log};
    hs_status st = hs_snapshot_create(&config, &r->snapshot, why);
    if (st != HS_OK) {
        for (int i = 0; i < count; i++) (void)close(fds[i]);
        return st;
    }
    HS_TRY(hs_snapshot_attach(r->snapshot, fds, count, why));
    hs_agent_link_keep(r->agent, r->snapshot);
    pin_slots(r);
    return HS_OK;
}

static hs_status open_parts(rank *r, hs_why *why) {
    const hs_plan_config *g = r->plan.config;
    const hs_attempt *a = r->attempt.attempt;
    const hs_plan_position *p = r->executor.position;
    int fds[HS_SNAPSHOT_SLOTS_MAX], count = 0;
    HS_TRY(open_agent(r, fds, &count, why));
    const hs_machine_config config = {.backend = r->backend,
                                      .plan = &r->plan,
                                      .position = p,
                                      .replica = hs_plan_replica_of(&r->plan, r->args->rank),
                                      .kernel_path = a->kernel_path,
                                      .device = r->attempt.ranks[r->args->rank].device,
                                      .threads = g->threads,
                                      .local_ranks =
                                          hs_attempt_local_ranks(&r->attempt, r->args->rank),
                                      .arena_fd = r->args->arena_fd};
    hs_status st = hs_machine_create(&config, &r->machine, why);
    if (st != HS_OK) {
        for (int i = 0; i < count; i++) (void)close(fds[i]);
        return st;
    }
    if (r->agent) HS_TRY(open_snapshot(r, fds, count, why));
    if (p->tokens_offset != UINT64_MAX || p->targets_offset != UINT64_MAX) {
        const hs_shard_tables tables = hs_plan_shards(&r->plan);
        HS_TRY(hs_shards_open(a->data_dir, &tables, &r->shards, why));
        if (a->data_ahead) hs_agent_link_ahead(r->agent, a->start_step < 0 ? 0 : a->start_step);
    }
    if (a->trace != HS_TRACE_OFF)
        HS_TRY(
            hs_trace_create(&r->plan, r->args->rank, a->trace == HS_TRACE_CALLS, &r->trace, why));
    if (r->args->page_fd >= 0) {
        void *page =
            mmap(NULL, HS_RANK_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, r->args->page_fd, 0);
        if (page == MAP_FAILED) {
            return hs_fail(why, HS_E_IO, "the supervisor's page cannot be mapped: %s",
                           strerror(errno));
        }
        r->page = page;
    }
    hs_metrics_open(&r->metrics, a->run, a->epoch, r->args->rank, hs_step_tokens(g));
    return HS_OK;
}

/* The state to start from: a slot, verified; or a file of weights; or nothing yet (the init list
 * follows). */
static hs_status restore(rank *r, hs_why *why) {
    const int64_t start = r->attempt.attempt->start_step;
    if (start < 0) {
        return r->args->weights ? hs_weights_read(r->args->weights, &r->plan, r->executor.position,
                                                  hs_plan_replica_of(&r->plan, r->args->rank),
                                                  &r->machine.spaces, why)
                                : HS_OK;
    }
    if (r->restore_slot < 0) {
        return hs_fail(why, HS_E_RESTORE,
                       "no slot holds step %" PRId64 ", from which the attempt starts", start);
    }
    const int64_t began = hs_clock_ns();
    HS_TRY(hs_snapshot_restore(r->snapshot, r->restore_slot, start, why));
    HS_LOG(&r->log, HS_LOG_INFO, "restored", HS_I("slot", r->restore_slot), HS_I("step", start),
           HS_I("us", (hs_clock_ns() - began) / 1000));
    return HS_OK;
}

static hs_status await(void *ctx, int event, hs_why *why) {
    return hs_comm_tcp.await(ctx, event, why);
}

/* Which channels go from device to device, and that such a device is waited for as they need it. */
static hs_status take_ways(rank *r, hs_why *why) {
    const size_t count = r->plan.count[HS_SECTION_CHANNELS];
    r->direct = calloc(count + 1, sizeof *r->direct);
    if (!r->direct) return hs_fail(why, HS_E_MEMORY, "no memory for a list of channels");
    for (uint32_t c = 0; c < count; c++) r->direct[c] = hs_comm_tcp.way(r->comm, c) != HS_WAY_TCP;
    r->machine.spaces.await = await;
    r->machine.spaces.await_ctx = r->comm;
    return HS_OK;
}

static hs_status connect_peers(rank *r, hs_why *why) {
    if (r->plan.count[HS_SECTION_CHANNELS] == 0) {
        if (r->args->listen_fd >= 0) (void)close(r->args->listen_fd);
        return HS_OK;
    }
    const hs_spaces *spaces = &r->machine.spaces;
    uint32_t most;
    HS_TRY(hs_messages_most(&r->plan, r->executor.position, &most, why));
    r->between = (hs_comm_device){.backend = spaces->backend,
                                  .device = spaces->device,
                                  .arena = spaces->arena,
                                  .arena_bytes = spaces->bytes,
                                  .allowed = r->args->environment->ways,
                                  .event = HS_EVENT_LINKS,
                                  .fabric = r->args->environment->fabric};
    if (!spaces->backend->unified)
        HS_TRY(hs_landings_find(&r->plan, r->executor.position,
                                hs_plan_replica_of(&r->plan, r->args->rank), &r->landings, why));
    const hs_comm_config config = {.attempt = r->attempt.attempt,
                                   .peers = r->attempt.ranks,
                                   .channels = r->plan.channels,
                                   .channel_count = (uint32_t)r->plan.count[HS_SECTION_CHANNELS],
                                   .rank = r->args->rank,
                                   .positions = r->plan.config->positions,
                                   .start_step = r->attempt.attempt->start_step,
                                   .listen_fd = r->args->listen_fd,
                                   .most = most,
                                   .stop = r->stop,
                                   .device = spaces->backend->unified ? NULL : &r->between,
                                   .log = &r->log};
    HS_TRY(hs_comm_tcp.create(&config, &r->comm, why));
    if (config.device) return take_ways(r, why);
    return HS_OK;
}

static hs_status fill_executor(rank *r, hs_why *why) {
    hs_executor *ex = &r->executor;
    const bool unified = r->machine.spaces.backend->unified;
    if (unified)
        HS_TRY(hs_messages_order(&r->plan, ex->position,
                                 hs_plan_replica_of(&r->plan, r->args->rank), r->behind, why));
    const hs_messages_config messages = {.plan = &r->plan,
                                         .position = ex->position,
                                         .rank = r->args->rank,
                                         .spaces = &r->machine.spaces,
                                         .linked = r->machine.linked,
                                         .transport = &hs_comm_tcp,
                                         .comm = r->comm,
                                         .direct = r->direct,
                                         .landings = &r->landings,
                                         .behind = unified ? r->behind : NULL,
                                         .stop = r->stop,
                                         .page = r->page,
                                         .trace = r->trace,
                                         .metrics = &r->metrics};
    HS_TRY(hs_messages_create(&messages, &r->messages, why));
    ex->plan = &r->plan;
    ex->attempt = r->attempt.attempt;
    ex->amendments = &r->attempt.amendments;
    ex->spaces = &r->machine.spaces;
    ex->linked = r->machine.linked;
    ex->transport = &hs_comm_tcp;
    ex->comm = r->comm;
    ex->shards = r->shards;
    ex->snapshot = r->snapshot;
    ex->agent = r->agent;
    ex->direct = r->direct;
    ex->messages = r->messages;
    ex->stop = r->stop;
    ex->page = r->page;
    ex->trace = r->trace;
    ex->metrics = &r->metrics;
    ex->dump_dir = r->args->dump_dir;
    ex->log = &r->log;
    return hs_executor_order(ex, why);
}

/* One object of rank 0, to standard output and to the agent. */
static void tell(rank *r, hs_text *text) {
    hs_metrics_print(text);
    if (r->agent) hs_agent_link_metrics(r->agent, text->at);
}

/* How many of this rank's channels of device memory go which way. */
static void tell_ways(const rank *r, hs_text *text) {
    uint32_t counts[HS_WAYS] = {0};
    const uint32_t position = r->executor.position->position;
    for (uint32_t c = 0; r->direct && c < r->plan.count[HS_SECTION_CHANNELS]; c++) {
        const hs_plan_channel *ch = &r->plan.channels[c];
        if ((ch->from == position || ch->to == position) && hs_comm_of_device(ch->kind))
            counts[hs_comm_tcp.way(r->comm, c)]++;
    }
    if (r->direct)
        hs_text_printf(text,
                       ",\"ways\":{\"ipc\":%" PRIu32 ",\"nccl\":%" PRIu32 ",\"tcp\":%" PRIu32 "}",
                       counts[HS_WAY_IPC], counts[HS_WAY_NCCL], counts[HS_WAY_TCP]);
}

static void tell_start(rank *r, int64_t start_step, const hs_check *check) {
    HS_LOG(&r->log, HS_LOG_INFO, "started", HS_S("kernel_path", r->machine.facts.kernels),
           HS_I("threads", r->machine.threads), HS_I("start_step", start_step),
           HS_I("check_mflops", (int64_t)(check->gflops * 1000)), HS_I("check_us", check->us),
           HS_I("arena_bytes", (int64_t)r->machine.spaces.bytes),
           HS_I("staging_bytes", (int64_t)r->machine.spaces.host_bytes));
    if (r->machine.threads < r->machine.cpu_threads)
        HS_LOG(&r->log, HS_LOG_WARN,
               "fewer threads than CPUs: the memory limit has no room for their workspaces",
               HS_I("threads", r->machine.threads), HS_I("cpus", r->machine.cpu_threads),
               HS_S("mend", "raise launch.resources.memory, or set parallel.threads"));
    r->started = true;
    if (r->args->rank != 0) return;
    char line[1024];
    hs_text text = hs_text_over(line, sizeof line);
    hs_metrics_event(&r->metrics, "start", &text);
    hs_text_printf(&text,
                   ",\"kernel_path\":\"%s\",\"threads\":%d,\"start_step\":%" PRId64
                   ",\"arena_bytes\":%" PRIu64,
                   r->machine.facts.kernels, r->machine.threads, start_step,
                   r->machine.spaces.bytes);
    tell_ways(r, &text);
    hs_text_printf(&text, "}");
    tell(r, &text);
}

static void say_last(rank *r, hs_status st, const hs_why *why);
static void write_trace(rank *r);

/* In hs_stop's second thread, while this rank computes: the last words, and the end. */
static void leave_in_the_middle(void *ctx) {
    rank *r = ctx;
    hs_why why = {0};
    (void)hs_fail(&why, HS_E_LOST,
                  "the supervisor says that a peer was lost, while this rank computed");
    write_trace(r);
    say_last(r, HS_E_LOST, &why);
    if (r->agent) (void)hs_agent_link_leave(r->agent, hs_deadline_ns(IN_TIME_MS));
    (void)fflush(stdout);
    _exit(hs_status_exit(HS_E_LOST));
}

static hs_status run(rank *r, hs_why *why) {
    HS_TRY(open_files(r, why));
    if (hs_stop_create(&r->stop) != HS_OK) {
        return hs_fail(why, HS_E_IO, "cannot make a descriptor for signals: %s", strerror(errno));
    }
    if (r->args->agent)
        HS_TRY(hs_agent_link_create(r->args->agent, r->args->rank, r->attempt.attempt->epoch,
                                    &r->log, &r->agent, why));
    hs_abort_words_arm(r->args->rank, r->attempt.attempt->epoch, r->agent, &r->executor.step);
    HS_TRY(hs_stop_watch(r->stop, leave_in_the_middle, r, why));
    hs_check check;
    HS_TRY(open_parts(r, why));
    hs_stop_busy(r->stop, true);
    const hs_spaces *spaces = &r->machine.spaces;
    hs_status st =
        spaces->backend->check(spaces->device, spaces->arena, spaces->bytes, &check, why);
    hs_stop_busy(r->stop, false);
    HS_TRY(st);
    const hs_algorithms_config algorithms = {.machine = &r->machine,
                                             .attempt = r->attempt.attempt,
                                             .agent = r->agent,
                                             .stop = r->stop,
                                             .log = &r->log};
    HS_TRY(hs_algorithms_settle(&algorithms, why));
    hs_stop_busy(r->stop, true);
    st = restore(r, why);
    hs_stop_busy(r->stop, false);
    HS_TRY(st);
    HS_TRY(connect_peers(r, why));
    HS_TRY(fill_executor(r, why));
    const int64_t start = r->attempt.attempt->start_step;
    hs_metrics_begin(&r->metrics);
    if (start < 0 && !r->args->weights) {
        HS_TRY(hs_executor_prepare(&r->executor, HS_LIST_INIT, why));
    }
    HS_TRY(hs_executor_prepare(&r->executor, HS_LIST_LOAD, why));
    tell_start(r, start < 0 ? 0 : start, &check);
    st = hs_steps_run(&r->executor, start < 0 ? 0 : start, why);
    if (r->comm && (st == HS_OK || st == HS_E_STOPPED)) HS_TRY(hs_comm_tcp.settle(r->comm, why));
    return st;
}

/* What this rank says when it leaves: to the log, to the agent, and rank 0 on standard output. */
static void say_last(rank *r, hs_status st, const hs_why *why) {
    char words[4096];
    hs_text text = hs_text_over(words, sizeof words);
    const int code = hs_status_exit(st);
    if (st != HS_OK) {
        hs_text_printf(&text, "{\"code\":%d,\"status\":\"%s\",\"why\":", code, hs_status_name(st));
        hs_text_json_string(&text, why->text[0] ? why->text : hs_status_text(st));
        if (r->plan.bytes) hs_executor_where(&r->executor, &text);
        hs_text_printf(&text, "}");
        if (r->agent) hs_agent_link_words(r->agent, words);
    }
    if (st != HS_OK) {
        HS_LOG(&r->log, st == HS_E_STOPPED || st == HS_E_TERMINATED ? HS_LOG_INFO : HS_LOG_ERROR,
               "last words", HS_I("code", code), HS_S("words", words));
    }
    if (!r->started || r->args->rank != 0) return;
    char line[1024];
    text = hs_text_over(line, sizeof line);
    hs_metrics_event(&r->metrics, "end", &text);
    hs_text_printf(&text, ",\"code\":%d,\"step\":%" PRId64 "}", code, r->executor.step);
    tell(r, &text);
}

static void write_trace(rank *r) {
    if (!r->trace) return;
    char path[4200];
    (void)snprintf(path, sizeof path, "%s/trace-%" PRIu32 ".json", r->attempt.attempt->work_dir,
                   r->args->rank);
    hs_why why = {0};
    if (hs_trace_write(r->trace, path, &why) != HS_OK) {
        HS_LOG(&r->log, HS_LOG_WARN, "no trace", HS_S("why", why.text));
    } else if (r->agent) {
        hs_agent_link_trace(r->agent, path);
    }
}

/* The last words leave before the channels close, so that the cause is known before the peers see
 * its effect. */
static void close_all(rank *r, hs_status st) {
    if (r->agent) (void)hs_agent_link_leave(r->agent, hs_deadline_ns(LEAVE_MS));
    const bool hangs = r->comm && hs_comm_tcp.hangs(r->comm);
    hs_comm_tcp.close(r->comm);
    if (hangs) { /* the device may wait for a peer for ever, and whoever waits for the device */
        (void)fflush(stdout);
        _exit(hs_status_exit(st));
    }
    hs_abort_words_disarm();
    hs_agent_link_destroy(r->agent);
    hs_snapshot_stop(
        r->snapshot); /* it uses the device, which has its slots pinned until it closes */
    if (r->page) (void)munmap(r->page, HS_RANK_PAGE_BYTES);
    if (r->metrics.run) hs_metrics_close(&r->metrics);
    hs_trace_destroy(r->trace);
    hs_shards_close(r->shards);
    hs_machine_destroy(&r->machine);
    hs_snapshot_destroy(r->snapshot);
    for (int list = 0; list < HS_LISTS; list++) {
        free(r->executor.turns[list]);
        hs_behind_free(&r->behind[list]);
    }
    hs_messages_destroy(r->messages);
    hs_landings_free(&r->landings);
    free(r->direct);
    hs_stop_destroy(r->stop);
    hs_attempt_close(&r->attempt);
    hs_plan_close(&r->plan);
}

hs_status hs_rank_run(const hs_rank_args *args, hs_why *why) {
    rank r = {.args = args, .restore_slot = -1};
    r.log = (hs_log){.fd = STDERR_FILENO, .level = HS_LOG_INFO, .rank = (int32_t)args->rank};
    const hs_status st = run(&r, why);
    write_trace(&r);
    say_last(&r, st, why);
    hs_executor_leave(&r.executor, IN_TIME_MS); /* behind the words, which may have little time */
    close_all(&r, st);
    return st;
}
