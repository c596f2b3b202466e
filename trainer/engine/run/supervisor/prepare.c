/* From PREPARE and START to processes, and back: listeners, pages and arenas of an attempt, its start
 * and its end. */

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/files.h"
#include "run/spawn.h"
#include "run/supervisor/supervisor_internal.h"
#include "wire/attempt.h"

enum { LISTEN_BACKLOG = 128 };

void hs_sup_forget_attempt(hs_supervisor *s) {
    hs_sup_attempt *a = &s->attempt;
    HS_ASSERT(!a->live);
    for (uint32_t i = 0; i < a->count; i++) {
        hs_sup_rank *r = &a->ranks[i];
        hs_sup_close_fd(&r->listen_fd);
        hs_sup_close_fd(&r->out_fd);
        hs_sup_close_fd(&r->err_fd);
        hs_sup_close_fd(&r->status_fd);
        if (r->page) (void)munmap(r->page, HS_RANK_PAGE_BYTES);
    }
    hs_sup_forget_devices(&a->devices);
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
        const int code = errno;
        const char *mend = code == EADDRINUSE
                               ? "; stop what listens there, or choose another launch.port_base"
                               : "";
        st = code == EMFILE || code == ENFILE
                 ? hs_files_failed(why, "a place for a rank to listen", code)
                 : hs_fail(why, HS_E_CONFIG, "local rank %u cannot listen on %s:%u: %s%s", local,
                           bind_text, wanted, strerror(code), mend);
        hs_sup_close_fd(fd);
    } else {
        *port = ntohs(bound.ss_family == AF_INET6
                          ? ((const struct sockaddr_in6 *)(const void *)&bound)->sin6_port
                          : ((const struct sockaddr_in *)(const void *)&bound)->sin_port);
    }
    freeaddrinfo(address);
    return st;
}

static hs_status open_page(hs_sup_rank *r, hs_why *why) {
    r->status_fd = memfd_create("hotstage-rank-page", MFD_CLOEXEC);
    if (r->status_fd < 0 || ftruncate(r->status_fd, HS_RANK_PAGE_BYTES) != 0)
        return hs_files_failed(why, "a page to watch a rank", errno);
    void *map = mmap(NULL, HS_RANK_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, r->status_fd, 0);
    if (map == MAP_FAILED)
        return hs_fail(why, HS_E_MEMORY, "mmap of a rank's page: %s", strerror(errno));
    r->page = map;
    return HS_OK;
}

void hs_sup_close_arenas(hs_supervisor *s, uint32_t keep) {
    while (s->arena_count > keep) close(s->arenas[--s->arena_count]);
}

/* As many arenas as ranks: those that are there keep their pages. */
static hs_status keep_arenas(hs_supervisor *s, uint32_t count, hs_why *why) {
    hs_sup_close_arenas(s, count);
    int *arenas = realloc(s->arenas, count * sizeof *arenas);
    if (!arenas) return hs_fail(why, HS_E_MEMORY, "no memory for the table of %u arenas", count);
    s->arenas = arenas;
    while (s->arena_count < count) {
        const int fd = memfd_create("hotstage-arena", MFD_CLOEXEC);
        if (fd < 0) return hs_files_failed(why, "an arena for a rank", errno);
        s->arenas[s->arena_count++] = fd;
    }
    return HS_OK;
}

static void refuse(hs_supervisor *s, hs_status st, const hs_why *why) {
    hs_sup_attempt *a = &s->attempt;
    a->refused_unsent = true;
    a->refusal = *why;
    a->refusal_code = hs_status_exit(st);
    HS_LOG(&s->log, HS_LOG_ERROR, "attempt refused", HS_I("of_epoch", (int64_t)a->epoch),
           HS_S("why", why->text));
}

static hs_status open_attempt(hs_sup_attempt *a, const hs_msg_prepare *prepare, hs_why *why) {
    const uint32_t count = prepare->local_ranks;
    if (count == 0 || count > HS_SUP_RANKS_MAX)
        return hs_fail(why, HS_E_CONFIG, "an attempt with %u ranks on a node; 1 to %d are possible",
                       count, HS_SUP_RANKS_MAX);
    a->ranks = calloc(count, sizeof *a->ranks);
    a->polls = calloc(3 + 2 * (size_t)count, sizeof *a->polls);
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

static void prepare_attempt(hs_supervisor *s, const hs_msg *msg, const hs_msg_prepare *prepare) {
    hs_sup_attempt *a = &s->attempt;
    hs_why why = {.text = ""};
    hs_sup_forget_attempt(s);
    a->epoch = msg->epoch;
    hs_status st = open_attempt(a, prepare, &why);
    if (st == HS_OK) st = keep_arenas(s, a->count, &why);
    if (st != HS_OK) {
        hs_sup_forget_attempt(s);
        a->epoch = msg->epoch;
        a->at = HS_SUP_ENDED;
        refuse(s, st, &why);
        return;
    }
    a->at = HS_SUP_PREPARED;
    if (msg->a) hs_sup_ask_devices(s);
    a->ports_unsent = !a->devices.asking;
    HS_LOG(&s->log, HS_LOG_INFO, "prepared", HS_I("of_epoch", (int64_t)a->epoch),
           HS_I("ranks", a->count));
}

void hs_sup_on_prepare(hs_supervisor *s, const hs_msg *msg, const char *payload) {
    hs_sup_attempt *a = &s->attempt;
    if (msg->bytes != sizeof(hs_msg_prepare)) {
        HS_LOG(&s->log, HS_LOG_ERROR, "a PREPARE of the wrong size", HS_I("bytes", msg->bytes));
        return;
    }
    if (s->stopping || s->ending) return;
    if (a->at != HS_SUP_NONE &&
        msg->epoch <= a->epoch) { /* an agent that was restarted asks again */
        a->ports_unsent = a->at == HS_SUP_PREPARED && msg->epoch == a->epoch && !a->devices.asking;
        return;
    }
    hs_msg_prepare prepare;
    memcpy(&prepare, payload, sizeof prepare);
    if (a->live) { /* I1 */
        s->pending = true;
        s->pending_msg = *msg;
        s->pending_prepare = prepare;
        hs_sup_signal_ranks(s, SIGKILL);
    } else {
        prepare_attempt(s, msg, &prepare);
    }
}

void hs_sup_prepare_pending(hs_supervisor *s) {
    s->pending = false;
    prepare_attempt(s, &s->pending_msg, &s->pending_prepare);
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

static hs_status start_ranks(hs_supervisor *s, const hs_msg *msg, const char *attempt_path,
                             const char *plan_path, hs_why *why) {
    hs_sup_attempt *a = &s->attempt;
    a->oom_kills = hs_oom_kills(&s->oom);
    for (uint32_t i = 0; i < a->count; i++) {
        hs_sup_rank *r = &a->ranks[i];
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
        hs_sup_close_fd(&r->listen_fd); /* the rank's alone now: it dies with the rank */
        HS_LOG(&s->log, HS_LOG_INFO, "rank started", HS_I("of", r->number), HS_I("pid", r->pid),
               HS_I("of_epoch", (int64_t)a->epoch));
    }
    return HS_OK;
}

void hs_sup_on_start(hs_supervisor *s, const hs_msg *msg, const char *payload) {
    hs_sup_attempt *a = &s->attempt;
    hs_why why = {.text = ""};
    if (s->stopping || s->ending) return;
    if (msg->epoch == a->epoch && (a->at == HS_SUP_RUNNING || a->at == HS_SUP_ENDED))
        return; /* said twice */
    const char *attempt_path = payload;
    const size_t first = strnlen(payload, msg->bytes);
    const char *plan_path = payload + first + 1;
    const bool paths = first < msg->bytes && first + 1 < msg->bytes &&
                       strnlen(plan_path, msg->bytes - first - 1) < msg->bytes - first - 1;
    if (a->at != HS_SUP_PREPARED || msg->epoch != a->epoch || msg->b != a->count || msg->a < 0 ||
        !paths) {
        HS_LOG(&s->log, HS_LOG_ERROR, "a START that fits no PREPARE",
               HS_I("of_epoch", (int64_t)msg->epoch), HS_I("prepared", (int64_t)a->epoch),
               HS_I("ranks", msg->b), HS_I("prepared_ranks", a->count));
        return;
    }
    a->at = HS_SUP_RUNNING;
    a->ports_unsent = false;
    a->stall_ms = read_stall_ms(attempt_path);
    s->look_ns = hs_deadline_ns(HS_SUP_LOOK_MS);
    const hs_status st = start_ranks(s, msg, attempt_path, plan_path, &why);
    if (st == HS_OK) return;
    refuse(s, st, &why);
    if (a->live)
        hs_sup_signal_ranks(s, SIGKILL);
    else
        hs_sup_end_attempt(s);
}

void hs_sup_stop(hs_supervisor *s, int number) {
    if (s->attempt.at == HS_SUP_PREPARED)
        hs_sup_end_attempt(s);
    else
        hs_sup_signal_ranks(s, number);
}

void hs_sup_end_attempt(hs_supervisor *s) {
    s->attempt.at = HS_SUP_ENDED;
    s->attempt.idle_unsent = true;
    s->attempt.ports_unsent = false;
    s->attempt.kill_ns = 0;
    for (uint32_t i = 0; i < s->attempt.count; i++) hs_sup_close_fd(&s->attempt.ranks[i].listen_fd);
    HS_LOG(&s->log, HS_LOG_INFO, "idle", HS_I("of_epoch", (int64_t)s->attempt.epoch));
}
