/* The talk with the agent (I4): connecting, what waits to be said and in which order, and what the
 * agent asks for. */

#include <signal.h>
#include <string.h>
#include <unistd.h>

#include "core/clock.h"
#include "run/supervisor/supervisor_internal.h"

enum { RECONNECT_MS = 50 };

static void disconnect(hs_supervisor *s) {
    HS_LOG(&s->log, HS_LOG_WARN, "agent lost", HS_S("socket", s->path));
    hs_sup_close_fd(&s->agent_fd);
    s->greeted = false;
    s->next_try_ns = hs_deadline_ns(RECONNECT_MS);
    s->away_ns = hs_deadline_ns(s->agent_away_ms);
}

/* I4: an agent that comes anew is told what stands. */
static void restate(hs_supervisor *s) {
    hs_sup_attempt *a = &s->attempt;
    for (uint32_t i = 0; i < a->count; i++) a->ranks[i].exit_unsent = a->ranks[i].reaped;
    a->ports_unsent = a->at == HS_SUP_PREPARED && !a->devices.asking;
    a->idle_unsent = a->at == HS_SUP_ENDED && a->count;
    a->refused_unsent = a->refusal.text[0] != '\0';
}

static hs_status send_one(hs_supervisor *s, hs_msg msg, const void *payload, size_t bytes) {
    if (s->agent_fd < 0) return HS_E_LOST;
    const hs_status st = hs_message_send(s->agent_fd, &msg, payload, bytes, NULL, 0);
    if (st == HS_E_LOST) disconnect(s);
    return st;
}

static hs_sup_rank *first_unsent_exit(const hs_sup_attempt *a) {
    hs_sup_rank *first = NULL;
    for (uint32_t i = 0; i < a->count; i++) {
        hs_sup_rank *r = &a->ranks[i];
        if (r->exit_unsent && (!first || r->ended < first->ended)) first = r;
    }
    return first;
}

hs_status hs_sup_send_waiting(hs_supervisor *s) {
    hs_sup_attempt *a = &s->attempt;
    const hs_msg base = {.rank = -1, .epoch = a->epoch};
    if (!s->greeted) {
        hs_msg msg = base;
        msg.type = HS_MSG_HELLO;
        msg.a = getpid();
        msg.b = a->live;
        HS_TRY(send_one(s, msg, NULL, 0));
        s->greeted = true;
        restate(s);
    }
    for (const hs_output_piece *piece; (piece = hs_output_first(&s->output));) {
        const hs_msg msg = {
            .type = HS_MSG_OUTPUT, .rank = piece->rank, .epoch = piece->epoch, .a = piece->stream};
        HS_TRY(send_one(s, msg, piece->data, piece->bytes));
        hs_output_pop(&s->output);
    }
    if (s->output.dropped_bytes) {
        HS_LOG(&s->log, HS_LOG_WARN, "output of ranks dropped: the agent did not take it",
               HS_I("bytes", (int64_t)s->output.dropped_bytes));
        s->output.dropped_bytes = 0;
    }
    if (a->ports_unsent) {
        hs_msg msg = base;
        msg.type = HS_MSG_PORTS;
        const size_t ports = a->count * sizeof *a->ports;
        _Static_assert(HS_SUP_RANKS_MAX * sizeof *a->ports + HS_DEVICES_LINE_MAX <= HS_MSG_MAX,
                       "a PORTS fits one message");
        memcpy(s->payload, a->ports, ports);
        memcpy(s->payload + ports, a->devices.line, a->devices.bytes);
        HS_TRY(send_one(s, msg, s->payload, ports + a->devices.bytes));
        a->ports_unsent = false;
    }
    if (a->refused_unsent) {
        hs_msg msg = base;
        msg.type = HS_MSG_EXIT;
        msg.a = a->refusal_code;
        HS_TRY(send_one(s, msg, a->refusal.text, strlen(a->refusal.text)));
        a->refused_unsent = false;
    }
    for (hs_sup_rank *r; (r = first_unsent_exit(a));) {
        const hs_msg msg = {.type = HS_MSG_EXIT,
                            .rank = (int32_t)r->number,
                            .epoch = a->epoch,
                            .a = r->code,
                            .b = r->last_pid,
                            .c = r->killed ? HS_ENDED_BY_SUPERVISOR
                                           : (r->starved ? HS_ENDED_BY_OOM : HS_ENDED_ITSELF)};
        const uint64_t limit = hs_oom_limit(&s->oom);
        HS_TRY(send_one(s, msg, &limit, r->starved ? sizeof limit : 0));
        r->exit_unsent = false;
    }
    if (a->idle_unsent) {
        hs_msg msg = base;
        msg.type = HS_MSG_IDLE;
        HS_TRY(send_one(s, msg, NULL, 0));
        a->idle_unsent = false;
    }
    return HS_OK;
}

bool hs_sup_anything_waits(const hs_supervisor *s) {
    const hs_sup_attempt *a = &s->attempt;
    if (s->output.count || a->ports_unsent || a->refused_unsent || a->idle_unsent) return true;
    return first_unsent_exit(a) != NULL;
}

static void on_message(hs_supervisor *s, const hs_msg *msg, const char *payload) {
    switch (msg->type) {
    case HS_MSG_PREPARE:
        hs_sup_on_prepare(s, msg, payload);
        break;
    case HS_MSG_START:
        hs_sup_on_start(s, msg, payload);
        break;
    case HS_MSG_STOP:
        hs_sup_stop(s, SIGTERM);
        break;
    case HS_MSG_KILL:
        hs_sup_stop(s, SIGKILL);
        break;
    case HS_MSG_END:
        HS_LOG(&s->log, HS_LOG_INFO, "end");
        s->ending = true;
        hs_sup_stop(s, SIGKILL);
        break;
    default:
        HS_LOG(&s->log, HS_LOG_WARN, "a message that is not for the supervisor",
               HS_S("type", hs_message_name(msg->type)));
    }
}

void hs_sup_talk(hs_supervisor *s) {
    if (s->agent_fd < 0) {
        if (hs_clock_ns() < s->next_try_ns) return;
        s->agent_fd = hs_message_connect(s->path);
        s->next_try_ns = hs_deadline_ns(RECONNECT_MS);
        if (s->agent_fd < 0) return;
        s->away_ns = 0;
        HS_LOG(&s->log, HS_LOG_INFO, "agent connected", HS_S("socket", s->path));
    }
    while (s->agent_fd >= 0) {
        hs_msg msg;
        int fds[HS_MESSAGE_FDS_MAX], count;
        const hs_status st = hs_message_recv(s->agent_fd, &msg, s->payload, fds, &count);
        if (st == HS_E_AGAIN) break;
        for (int i = 0; i < count; i++) close(fds[i]);
        if (st != HS_OK)
            disconnect(s);
        else
            on_message(s, &msg, s->payload);
    }
    if (s->agent_fd >= 0) (void)hs_sup_send_waiting(s);
}
