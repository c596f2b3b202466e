#include "run/supervisor.h"

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/log.h"
#include "core/rank_page.h"
#include "run/message.h"
#include "run/oom.h"
#include "run/output.h"
#include "run/spawn.h"
#include "wire/attempt.h"
#include "wire/exit.h"
#include "wire/plan.h"

enum {
    RECONNECT_MS = 50,
    LAST_WORDS_MS = 300, /* I2 */
    DRAIN_READS = 16,    /* of one stream in a row: more than a pipe holds (I5) */
    FLUSH_MS = 2000,     /* what the agent is given to take the last messages */
    LOOK_MS = 250,       /* between looks at the ranks' pages */
    STALL_MARGIN_MS = 1000,
    LISTEN_BACKLOG = 128,
    RANKS_MAX = 1024, /* of a node */
    PATH_BYTES = 4096,
};

typedef struct rank {
    uint32_t number;
    int listen_fd, out_fd, err_fd, status_fd;
    hs_rank_page *page;
    pid_t pid; /* 0: not started, or reaped */
    pid_t last_pid;
    bool reaped, exit_unsent, killed, stalled, starved;
    int64_t code;   /* of EXIT: exit code, or minus the signal */
    uint32_t ended; /* how many of the attempt ended before this one: EXITs go in that order */
    uint64_t moves;
    int64_t moved_ns;
} rank;

typedef enum phase { NONE, PREPARED, RUNNING, ENDED } phase;

typedef struct attempt {
    phase at;
    uint64_t epoch;
    uint32_t count, live, ended;
    rank *ranks;
    struct pollfd *polls; /* signals, agent, then two a rank */
    uint16_t *ports;
    bool ports_unsent, idle_unsent, refused_unsent;
    hs_why refusal;
    int refusal_code;
    int first_bad;   /* while stopping: exit code of the first rank that ended ill; 0: none */
    bool unsaved;    /* one ended with 143 */
    int64_t kill_ns; /* I2: SIGKILL for those that are left; 0: no */
    uint32_t stall_ms;
    int64_t oom_kills; /* of this container that are accounted for */
} attempt;

typedef struct supervisor {
    const char *path;
    hs_log log;
    int signal_fd, agent_fd;
    bool greeted, stopping, ending;
    bool abandoned;        /* I6 */
    int64_t agent_away_ms; /* I6 */
    int64_t away_ns;       /* I6: when the agent's time is over; 0: it is there */
    int64_t next_try_ns, look_ns, leave_ns;
    attempt attempt;
    bool pending; /* a PREPARE that waits for I1 */
    hs_msg pending_msg;
    hs_msg_prepare pending_prepare;
    hs_oom oom;
    int *arenas; /* of the local ranks, memfds: they outlive the attempts */
    uint32_t arena_count;
    hs_output output;
    char payload[HS_MSG_MAX];
} supervisor;

/* --- ranks
 * -----------------------------------------------------------------------------------------------
 */

static void close_fd(int *fd) {
    if (*fd >= 0) close(*fd);
    *fd = -1;
}

static void signal_ranks(supervisor *s, int number) {
    for (uint32_t i = 0; i < s->attempt.count; i++) {
        rank *r = &s->attempt.ranks[i];
        if (!r->pid) continue;
        if (number == SIGKILL) r->killed = true;
        (void)kill(r->pid, number);
    }
}

/* Moves what a rank wrote: what a pipe holds, never more in a row, never waiting. False at the end
 * of the stream. */
static bool drain(supervisor *s, const rank *r, int fd, int stream) {
    for (int reads = 0; reads < DRAIN_READS; reads++) {
        const ssize_t n = read(fd, s->payload, sizeof s->payload);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return errno == EAGAIN;
        if (n == 0) return false;
        hs_output_push(&s->output, s->attempt.epoch, (int32_t)r->number, stream, s->payload,
                       (size_t)n);
        hs_output_echo(stream, s->payload, (size_t)n);
    }
    return true;
}

/* The state letter of a process from /proc: 'T' stopped, 't' traced; '?' where it cannot be read.
 */
static char process_state(pid_t pid) {
    char path[64], text[512];
    (void)snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return '?';
    const ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    if (n <= 0) return '?';
    text[n] = '\0';
    const char *name_end = strrchr(text, ')');
    return name_end && name_end[1] == ' ' ? name_end[2] : '?';
}

static const char *action_name(uint32_t kind) {
    static const char *const names[] = {"starting", "RUN",    "SEND",  "RECV",    "DATA",
                                        "COMBINE",  "REPORT", "APPLY", "SNAPSHOT"};
    return kind < sizeof names / sizeof *names ? names[kind] : "?";
}

/* What the ranks of this node were doing, into the log: on a stall. */
static void log_pages(supervisor *s, const char *event) {
    for (uint32_t i = 0; i < s->attempt.count; i++) {
        const rank *r = &s->attempt.ranks[i];
        if (!r->page) continue;
        const char op[2] = {(char)atomic_load(&r->page->op), '\0'};
        const char state[2] = {r->pid ? process_state(r->pid) : 'X', '\0'};
        HS_LOG(&s->log, HS_LOG_WARN, event, HS_I("of", r->number), HS_S("process", state),
               HS_I("step", atomic_load(&r->page->step)),
               HS_S("action", action_name(atomic_load(&r->page->kind))),
               HS_I("index", atomic_load(&r->page->action)), HS_S("op", op),
               HS_I("microbatch", (int32_t)atomic_load(&r->page->microbatch)),
               HS_I("peer", (int32_t)atomic_load(&r->page->peer)));
    }
}

static void end_attempt(supervisor *s) {
    s->attempt.at = ENDED;
    s->attempt.idle_unsent = true;
    s->attempt.ports_unsent = false;
    s->attempt.kill_ns = 0;
    for (uint32_t i = 0; i < s->attempt.count; i++) close_fd(&s->attempt.ranks[i].listen_fd);
    HS_LOG(&s->log, HS_LOG_INFO, "idle", HS_I("of_epoch", (int64_t)s->attempt.epoch));
}

static void rank_ended(supervisor *s, rank *r, int status) {
    attempt *a = &s->attempt;
    r->code = WIFEXITED(status) ? WEXITSTATUS(status) : -(int64_t)WTERMSIG(status);
    if (r->stalled) r->code = HS_EXIT_STALLED;
    r->killed = r->killed && r->code == -SIGKILL;
    r->starved = r->code == -SIGKILL && !r->killed && hs_oom_kills(&s->oom) > a->oom_kills;
    a->oom_kills += r->starved;
    if (r->starved) (void)!ftruncate(s->arenas[r - a->ranks], 0); /* the container is short of it */
    r->pid = 0;
    r->reaped = r->exit_unsent = true;
    r->ended = a->ended++;
    a->live--;
    (void)drain(s, r, r->out_fd, STDOUT_FILENO);
    (void)drain(s, r, r->err_fd, STDERR_FILENO);
    close_fd(&r->out_fd);
    close_fd(&r->err_fd);
    const bool well =
        r->code == HS_EXIT_DONE || r->code == HS_EXIT_PREEMPTED || r->code == HS_EXIT_TERMINATED;
    a->unsaved |= r->code == HS_EXIT_TERMINATED;
    HS_LOG(&s->log, well ? HS_LOG_INFO : HS_LOG_WARN, "rank ended", HS_I("of", r->number),
           HS_I("code", r->code), HS_I("pid", r->last_pid), HS_I("killed", r->killed),
           HS_I("starved", r->starved), HS_I("of_epoch", (int64_t)a->epoch));
    if (!well && s->stopping && !a->first_bad)
        a->first_bad = r->code < 0 ? HS_EXIT_LOST : (int)r->code;
    if (r->code == HS_EXIT_STALLED) log_pages(s, "at the stall");
    if (!well && a->live && !a->kill_ns) { /* I2 */
        signal_ranks(s, SIGUSR1);
        a->kill_ns = hs_deadline_ns(LAST_WORDS_MS);
    }
    if (!a->live) end_attempt(s);
}

static void reap(supervisor *s) {
    int status;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
        for (uint32_t i = 0; i < s->attempt.count; i++)
            if (s->attempt.ranks[i].pid == pid) {
                rank_ended(s, &s->attempt.ranks[i], status);
                break;
            }
}

/* A rank whose process is stopped and that does not move any more (see the header). */
static void look(supervisor *s) {
    attempt *a = &s->attempt;
    const int64_t now = hs_clock_ns();
    const int64_t patience_ns = ((int64_t)a->stall_ms + STALL_MARGIN_MS) * 1000000;
    s->look_ns = now + (int64_t)LOOK_MS * 1000000;
    for (uint32_t i = 0; i < a->count; i++) {
        rank *r = &a->ranks[i];
        if (!r->pid || r->stalled) continue;
        const uint64_t moves = atomic_load(&r->page->moves);
        const char state = process_state(r->pid);
        if (moves != r->moves || (state != 'T' && state != 't')) {
            r->moves = moves;
            r->moved_ns = now;
        } else if (now - r->moved_ns >= patience_ns) {
            log_pages(s, "a stopped rank does not move");
            r->stalled = true;
            (void)kill(r->pid, SIGKILL);
        }
    }
}

/* --- an attempt -------------------------------------------------------------------------- */

static void forget_attempt(supervisor *s) {
    attempt *a = &s->attempt;
    HS_ASSERT(!a->live);
    for (uint32_t i = 0; i < a->count; i++) {
        rank *r = &a->ranks[i];
        close_fd(&r->listen_fd);
        close_fd(&r->out_fd);
        close_fd(&r->err_fd);
        close_fd(&r->status_fd);
        if (r->page) (void)munmap(r->page, HS_RANK_PAGE_BYTES);
    }
    free(a->ranks);
    free(a->polls);
    free(a->ports);
    memset(a, 0, sizeof *a);
}

static hs_status open_listener(const hs_msg_prepare *prepare, uint32_t local, int *fd,
                               uint16_t *port, hs_why *why) {
    char service[16], bind_text[sizeof prepare->bind + 1];
    const uint32_t wanted = prepare->port_base ? prepare->port_base + local : 0;
    memcpy(bind_text, prepare->bind, sizeof prepare->bind);
    bind_text[sizeof prepare->bind] = '\0';
    if (wanted > 65535)
        return hs_fail(why, HS_E_CONFIG, "port %u (port_base %u + local rank %u) is beyond 65535",
                       wanted, prepare->port_base, local);
    (void)snprintf(service, sizeof service, "%u", wanted);
    const struct addrinfo hints = {.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV | AI_PASSIVE,
                                   .ai_family = AF_UNSPEC,
                                   .ai_socktype = SOCK_STREAM};
    struct addrinfo *address = NULL;
    const int error = getaddrinfo(bind_text[0] ? bind_text : NULL, service, &hints, &address);
    if (error)
        return hs_fail(why, HS_E_CONFIG, "'%s' is no address to listen on: %s", bind_text,
                       gai_strerror(error));
    hs_status st = HS_OK;
    struct sockaddr_storage bound;
    socklen_t bytes = sizeof bound;
    const int yes = 1;
    *fd = socket(address->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (*fd < 0 || setsockopt(*fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes) != 0 ||
        bind(*fd, address->ai_addr, address->ai_addrlen) != 0 || listen(*fd, LISTEN_BACKLOG) != 0 ||
        getsockname(*fd, (void *)&bound, &bytes) != 0) {
        const char *mend = errno == EADDRINUSE
                               ? "; stop what listens there, or choose another launch.port_base"
                               : "";
        st = hs_fail(why, HS_E_CONFIG, "local rank %u cannot listen on %s:%u: %s%s", local,
                     bind_text, wanted, strerror(errno), mend);
        close_fd(fd);
    } else {
        *port = ntohs(bound.ss_family == AF_INET6
                          ? ((const struct sockaddr_in6 *)(const void *)&bound)->sin6_port
                          : ((const struct sockaddr_in *)(const void *)&bound)->sin_port);
    }
    freeaddrinfo(address);
    return st;
}

static hs_status open_page(rank *r, hs_why *why) {
    r->status_fd = memfd_create("hotstage-rank-page", MFD_CLOEXEC);
    if (r->status_fd < 0 || ftruncate(r->status_fd, HS_RANK_PAGE_BYTES) != 0)
        return hs_fail(why, HS_E_IO, "a page to watch a rank: %s", strerror(errno));
    void *map = mmap(NULL, HS_RANK_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, r->status_fd, 0);
    if (map == MAP_FAILED)
        return hs_fail(why, HS_E_MEMORY, "mmap of a rank's page: %s", strerror(errno));
    r->page = map;
    return HS_OK;
}

static void close_arenas(supervisor *s, uint32_t keep) {
    while (s->arena_count > keep) close(s->arenas[--s->arena_count]);
}

/* As many arenas as ranks: those that are there keep their pages. */
static hs_status keep_arenas(supervisor *s, uint32_t count, hs_why *why) {
    close_arenas(s, count);
    int *arenas = realloc(s->arenas, count * sizeof *arenas);
    if (!arenas) return hs_fail(why, HS_E_MEMORY, "no memory for the table of %u arenas", count);
    s->arenas = arenas;
    while (s->arena_count < count) {
        const int fd = memfd_create("hotstage-arena", MFD_CLOEXEC);
        if (fd < 0) return hs_fail(why, HS_E_IO, "an arena for a rank: %s", strerror(errno));
        s->arenas[s->arena_count++] = fd;
    }
    return HS_OK;
}

static void refuse(supervisor *s, hs_status st, const hs_why *why) {
    attempt *a = &s->attempt;
    a->refused_unsent = true;
    a->refusal = *why;
    a->refusal_code = hs_status_exit(st);
    HS_LOG(&s->log, HS_LOG_ERROR, "attempt refused", HS_I("of_epoch", (int64_t)a->epoch),
           HS_S("why", why->text));
}

static hs_status open_attempt(attempt *a, const hs_msg_prepare *prepare, hs_why *why) {
    const uint32_t count = prepare->local_ranks;
    if (count == 0 || count > RANKS_MAX)
        return hs_fail(why, HS_E_CONFIG, "an attempt with %u ranks on a node; 1 to %d are possible",
                       count, RANKS_MAX);
    a->ranks = calloc(count, sizeof *a->ranks);
    a->polls = calloc(2 + 2 * (size_t)count, sizeof *a->polls);
    a->ports = calloc(count, sizeof *a->ports);
    if (!a->ranks || !a->polls || !a->ports)
        return hs_fail(why, HS_E_MEMORY, "no memory for the table of %u ranks", count);
    a->count = count;
    for (uint32_t i = 0; i < count; i++)
        a->ranks[i].listen_fd = a->ranks[i].out_fd = a->ranks[i].err_fd = a->ranks[i].status_fd =
            -1;
    for (uint32_t i = 0; i < count; i++) {
        HS_TRY(open_listener(prepare, i, &a->ranks[i].listen_fd, &a->ports[i], why));
        HS_TRY(open_page(&a->ranks[i], why));
    }
    return HS_OK;
}

static void prepare_attempt(supervisor *s, const hs_msg *msg, const hs_msg_prepare *prepare) {
    attempt *a = &s->attempt;
    hs_why why = {.text = ""};
    forget_attempt(s);
    a->epoch = msg->epoch;
    hs_status st = open_attempt(a, prepare, &why);
    if (st == HS_OK) st = keep_arenas(s, a->count, &why);
    if (st != HS_OK) {
        forget_attempt(s);
        a->epoch = msg->epoch;
        a->at = ENDED;
        refuse(s, st, &why);
        return;
    }
    a->at = PREPARED;
    a->ports_unsent = true;
    HS_LOG(&s->log, HS_LOG_INFO, "prepared", HS_I("of_epoch", (int64_t)a->epoch),
           HS_I("ranks", a->count));
}

static void on_prepare(supervisor *s, const hs_msg *msg, const char *payload) {
    attempt *a = &s->attempt;
    if (msg->bytes != sizeof(hs_msg_prepare)) {
        HS_LOG(&s->log, HS_LOG_ERROR, "a PREPARE of the wrong size", HS_I("bytes", msg->bytes));
        return;
    }
    if (s->stopping || s->ending) return;
    if (a->at != NONE && msg->epoch <= a->epoch) { /* an agent that was restarted asks again */
        a->ports_unsent = a->at == PREPARED && msg->epoch == a->epoch;
        return;
    }
    hs_msg_prepare prepare;
    memcpy(&prepare, payload, sizeof prepare);
    if (a->live) { /* I1 */
        s->pending = true;
        s->pending_msg = *msg;
        s->pending_prepare = prepare;
        signal_ranks(s, SIGKILL);
    } else {
        prepare_attempt(s, msg, &prepare);
    }
}

static uint32_t read_stall_ms(const char *attempt_path) {
    hs_attempt header;
    const int fd = open(attempt_path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return 0;
    const ssize_t n = read(fd, &header, sizeof header);
    close(fd);
    const bool holds = n == (ssize_t)sizeof header &&
                       memcmp(header.magic, HS_ATTEMPT_MAGIC, sizeof header.magic) == 0 &&
                       header.version == HS_ATTEMPT_VERSION;
    return holds ? header.stall_ms : 0; /* the ranks refuse a file that does not hold */
}

static hs_status start_ranks(supervisor *s, const hs_msg *msg, const char *attempt_path,
                             const char *plan_path, hs_why *why) {
    attempt *a = &s->attempt;
    a->oom_kills = hs_oom_kills(&s->oom);
    for (uint32_t i = 0; i < a->count; i++) {
        rank *r = &a->ranks[i];
        r->number = (uint32_t)msg->a + i;
        const hs_spawn spawn = {.plan_path = plan_path,
                                .attempt_path = attempt_path,
                                .socket_path = s->path,
                                .rank = r->number,
                                .listen_fd = r->listen_fd,
                                .status_fd = r->status_fd,
                                .arena_fd = s->arenas[i]};
        HS_TRY(hs_spawn_rank(&spawn, &r->pid, &r->out_fd, &r->err_fd, why));
        r->last_pid = r->pid;
        r->moved_ns = hs_clock_ns();
        a->live++;
        close_fd(&r->listen_fd); /* the rank's alone now: it dies with the rank */
        HS_LOG(&s->log, HS_LOG_INFO, "rank started", HS_I("of", r->number), HS_I("pid", r->pid),
               HS_I("of_epoch", (int64_t)a->epoch));
    }
    return HS_OK;
}

static void on_start(supervisor *s, const hs_msg *msg, const char *payload) {
    attempt *a = &s->attempt;
    hs_why why = {.text = ""};
    if (s->stopping || s->ending) return;
    if (msg->epoch == a->epoch && (a->at == RUNNING || a->at == ENDED)) return; /* said twice */
    const char *attempt_path = payload;
    const size_t first = strnlen(payload, msg->bytes);
    const char *plan_path = payload + first + 1;
    const bool paths = first < msg->bytes && first + 1 < msg->bytes &&
                       strnlen(plan_path, msg->bytes - first - 1) < msg->bytes - first - 1;
    if (a->at != PREPARED || msg->epoch != a->epoch || msg->b != a->count || msg->a < 0 || !paths) {
        HS_LOG(&s->log, HS_LOG_ERROR, "a START that fits no PREPARE",
               HS_I("of_epoch", (int64_t)msg->epoch), HS_I("prepared", (int64_t)a->epoch),
               HS_I("ranks", msg->b), HS_I("prepared_ranks", a->count));
        return;
    }
    a->at = RUNNING;
    a->ports_unsent = false;
    a->stall_ms = read_stall_ms(attempt_path);
    s->look_ns = hs_deadline_ns(LOOK_MS);
    const hs_status st = start_ranks(s, msg, attempt_path, plan_path, &why);
    if (st == HS_OK) return;
    refuse(s, st, &why);
    if (a->live)
        signal_ranks(s, SIGKILL);
    else
        end_attempt(s);
}

static void stop_now(supervisor *s) {
    if (s->attempt.at == PREPARED)
        end_attempt(s);
    else
        signal_ranks(s, SIGKILL);
}

static void stop_gently(supervisor *s) {
    if (s->attempt.at == PREPARED)
        end_attempt(s);
    else
        signal_ranks(s, SIGTERM);
}

/* --- the agent --------------------------------------------------------------------------- */

static void disconnect(supervisor *s) {
    HS_LOG(&s->log, HS_LOG_WARN, "agent lost", HS_S("socket", s->path));
    close_fd(&s->agent_fd);
    s->greeted = false;
    s->next_try_ns = hs_deadline_ns(RECONNECT_MS);
    s->away_ns = hs_deadline_ns(s->agent_away_ms);
}

/* I4: an agent that comes anew is told what stands. */
static void restate(supervisor *s) {
    attempt *a = &s->attempt;
    for (uint32_t i = 0; i < a->count; i++) a->ranks[i].exit_unsent = a->ranks[i].reaped;
    a->ports_unsent = a->at == PREPARED;
    a->idle_unsent = a->at == ENDED && a->count;
    a->refused_unsent = a->refusal.text[0] != '\0';
}

static hs_status send_one(supervisor *s, hs_msg msg, const void *payload, size_t bytes) {
    if (s->agent_fd < 0) return HS_E_LOST;
    const hs_status st = hs_message_send(s->agent_fd, &msg, payload, bytes, NULL, 0);
    if (st == HS_E_LOST) disconnect(s);
    return st;
}

static rank *first_unsent_exit(const attempt *a) {
    rank *first = NULL;
    for (uint32_t i = 0; i < a->count; i++) {
        rank *r = &a->ranks[i];
        if (r->exit_unsent && (!first || r->ended < first->ended)) first = r;
    }
    return first;
}

/* Output first, then what ended, then IDLE: the agent has a rank's last lines before it hears of
 * its end. */
static hs_status send_waiting(supervisor *s) {
    attempt *a = &s->attempt;
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
        HS_TRY(send_one(s, msg, a->ports, a->count * sizeof *a->ports));
        a->ports_unsent = false;
    }
    if (a->refused_unsent) {
        hs_msg msg = base;
        msg.type = HS_MSG_EXIT;
        msg.a = a->refusal_code;
        HS_TRY(send_one(s, msg, a->refusal.text, strlen(a->refusal.text)));
        a->refused_unsent = false;
    }
    for (rank *r; (r = first_unsent_exit(a));) {
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

static bool anything_waits(const supervisor *s) {
    const attempt *a = &s->attempt;
    if (s->output.count || a->ports_unsent || a->refused_unsent || a->idle_unsent) return true;
    return first_unsent_exit(a) != NULL;
}

static void on_message(supervisor *s, const hs_msg *msg, const char *payload) {
    switch (msg->type) {
    case HS_MSG_PREPARE:
        on_prepare(s, msg, payload);
        break;
    case HS_MSG_START:
        on_start(s, msg, payload);
        break;
    case HS_MSG_STOP:
        stop_gently(s);
        break;
    case HS_MSG_KILL:
        stop_now(s);
        break;
    case HS_MSG_END:
        HS_LOG(&s->log, HS_LOG_INFO, "end");
        s->ending = true;
        stop_now(s);
        break;
    default:
        HS_LOG(&s->log, HS_LOG_WARN, "a message that is not for the supervisor",
               HS_S("type", hs_message_name(msg->type)));
    }
}

static void talk(supervisor *s) {
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
    if (s->agent_fd >= 0) (void)send_waiting(s);
}

/* --- the loop ---------------------------------------------------------------------------- */

static void take_signals(supervisor *s) {
    struct signalfd_siginfo info;
    while (read(s->signal_fd, &info, sizeof info) == (ssize_t)sizeof info) {
        if (info.ssi_signo == SIGCHLD) continue; /* reap looks at all of them */
        HS_LOG(&s->log, HS_LOG_INFO, "asked to stop", HS_I("signal", info.ssi_signo));
        s->stopping = true;
        stop_gently(s);
    }
    reap(s);
}

static void earlier(int64_t *wake_ns, int64_t ns) {
    if (ns < *wake_ns) *wake_ns = ns;
}

static void wait_for_something(supervisor *s, struct pollfd *polls) {
    const attempt *a = &s->attempt;
    int64_t wake_ns = INT64_MAX;
    nfds_t n = 2;
    polls[0] = (struct pollfd){.fd = s->signal_fd, .events = POLLIN};
    polls[1] = (struct pollfd){
        .fd = s->agent_fd,
        .events = (short)(anything_waits(s) || !s->greeted ? POLLIN | POLLOUT : POLLIN)};
    for (uint32_t i = 0; i < a->count; i++) {
        polls[n++] = (struct pollfd){.fd = a->ranks[i].out_fd, .events = POLLIN};
        polls[n++] = (struct pollfd){.fd = a->ranks[i].err_fd, .events = POLLIN};
    }
    if (s->agent_fd < 0) earlier(&wake_ns, s->next_try_ns);
    if (s->away_ns) earlier(&wake_ns, s->away_ns);
    if (a->kill_ns) earlier(&wake_ns, a->kill_ns);
    if (a->live && a->stall_ms) earlier(&wake_ns, s->look_ns);
    if (s->leave_ns) earlier(&wake_ns, s->leave_ns);
    (void)poll(polls, n, wake_ns == INT64_MAX ? -1 : hs_deadline_poll_ms(wake_ns));
    for (uint32_t i = 0; i < a->count; i++) {
        rank *r = &a->ranks[i];
        if (r->out_fd >= 0 && polls[2 + 2 * i].revents && !drain(s, r, r->out_fd, STDOUT_FILENO))
            close_fd(&r->out_fd);
        if (r->err_fd >= 0 && polls[3 + 2 * i].revents && !drain(s, r, r->err_fd, STDERR_FILENO))
            close_fd(&r->err_fd);
    }
}

/* I6 */
static void leave_for_want_of_an_agent(supervisor *s) {
    attempt *a = &s->attempt;
    HS_LOG(&s->log, HS_LOG_ERROR, "no agent: this node ends", HS_S("socket", s->path),
           HS_I("waited_ms", s->agent_away_ms), HS_I("live_ranks", a->live),
           HS_S("why",
                "nothing that its ranks do would be saved; HOTSTAGE_ENGINE_AGENT_AWAY_S sets "
                "how long an agent may be away"));
    s->stopping = s->abandoned = true;
    s->away_ns = 0;
    if (a->at == PREPARED) end_attempt(s);
    if (!a->live) return;
    signal_ranks(s, SIGUSR1);
    if (!a->kill_ns) a->kill_ns = hs_deadline_ns(LAST_WORDS_MS);
}

static void tick(supervisor *s) {
    attempt *a = &s->attempt;
    const int64_t now = hs_clock_ns();
    take_signals(s);
    if (s->away_ns && now >= s->away_ns && !s->abandoned) leave_for_want_of_an_agent(s);
    if (a->kill_ns && now >= a->kill_ns) {
        signal_ranks(s, SIGKILL);
        a->kill_ns = hs_deadline_ns(LAST_WORDS_MS);
    }
    if (a->live && a->stall_ms && now >= s->look_ns) look(s);
    if (s->pending && !a->live && !s->stopping && !s->ending) {
        /* The agent hears the end of the last attempt before the ports of the next. */
        if (s->agent_fd >= 0) (void)send_waiting(s);
        s->pending = false;
        prepare_attempt(s, &s->pending_msg, &s->pending_prepare);
    }
    talk(s);
}

static int run(supervisor *s) {
    struct pollfd two[2];
    for (;;) {
        wait_for_something(s, s->attempt.polls ? s->attempt.polls : two);
        tick(s);
        if (!(s->stopping || s->ending) || s->attempt.live) continue;
        if (s->abandoned && s->agent_fd < 0) break;
        if (!s->leave_ns) s->leave_ns = hs_deadline_ns(FLUSH_MS);
        if (!anything_waits(s) || hs_clock_ns() >= s->leave_ns) break;
    }
    const attempt *a = &s->attempt;
    const int code = s->ending                 ? HS_EXIT_DONE
                     : s->abandoned            ? HS_EXIT_LOST
                     : a->first_bad            ? a->first_bad
                     : a->ended && !a->unsaved ? HS_EXIT_PREEMPTED
                                               : HS_EXIT_TERMINATED;
    HS_LOG(&s->log, HS_LOG_INFO, "supervisor leaves", HS_I("code", code));
    return code;
}

int hs_supervisor_main(const char *socket_path, int64_t agent_away_ms) {
    hs_why why = {.text = ""};
    supervisor *s = calloc(1, sizeof *s);
    if (!s) return HS_EXIT_CONFIG;
    s->path = socket_path;
    s->log = (hs_log){.fd = STDERR_FILENO, .level = HS_LOG_INFO, .rank = -1};
    s->agent_fd = -1;
    hs_oom_find(&s->oom, "/proc/self/cgroup", "/sys/fs/cgroup");
    int code = HS_EXIT_CONFIG;
    sigset_t set, blocked;
    (void)sigemptyset(&set);
    (void)sigaddset(&set, SIGTERM);
    (void)sigaddset(&set, SIGINT);
    (void)sigaddset(&set, SIGCHLD);
    blocked = set;
    (void)sigaddset(&blocked, SIGUSR1); /* a child inherits this: I2's word waits for its hs_stop */
    (void)signal(SIGPIPE, SIG_IGN);
    (void)signal(SIGCHLD, SIG_DFL); /* inherited as ignored, ends would never be seen */
    (void)signal(SIGTERM, SIG_DFL);
    if (hs_message_check_path(socket_path, &why) != HS_OK) {
        HS_LOG(&s->log, HS_LOG_ERROR, "refused", HS_S("why", why.text));
    } else if (sigprocmask(SIG_BLOCK, &blocked, NULL) != 0 ||
               (s->signal_fd = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC)) < 0) {
        HS_LOG(&s->log, HS_LOG_ERROR, "signalfd", HS_S("why", strerror(errno)));
        code = HS_EXIT_BUG;
    } else {
        HS_LOG(&s->log, HS_LOG_INFO, "supervisor", HS_I("pid", getpid()),
               HS_S("agent", socket_path));
        s->agent_away_ms = agent_away_ms;
        s->away_ns = hs_deadline_ns(agent_away_ms);
        code = run(s);
        forget_attempt(s);
        close_arenas(s, 0);
        free(s->arenas);
        close_fd(&s->agent_fd);
        close(s->signal_fd);
    }
    free(s);
    return code;
}
