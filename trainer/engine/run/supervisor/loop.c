/* The process: signals, the one poll, what is due, and the code that it leaves with. */

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/files.h"
#include "run/machine.h"
#include "run/supervisor.h"
#include "run/supervisor/supervisor_internal.h"
#include "wire/exit.h"

enum { FLUSH_MS = 2000 }; /* what the agent is given to take the last messages */

static void take_signals(hs_supervisor *s) {
    struct signalfd_siginfo info;
    while (read(s->signal_fd, &info, sizeof info) == (ssize_t)sizeof info) {
        if (info.ssi_signo == SIGCHLD) continue; /* reap looks at all of them */
        HS_LOG(&s->log, HS_LOG_INFO, "asked to stop", HS_I("signal", info.ssi_signo));
        s->stopping = true;
        hs_sup_stop(s, SIGTERM);
    }
    hs_sup_reap(s);
}

static void earlier(int64_t *wake_ns, int64_t ns) {
    if (ns < *wake_ns) *wake_ns = ns;
}

static void wait_for_something(hs_supervisor *s, struct pollfd *polls) {
    const hs_sup_attempt *a = &s->attempt;
    int64_t wake_ns = INT64_MAX;
    nfds_t n = 3;
    polls[0] = (struct pollfd){.fd = s->signal_fd, .events = POLLIN};
    polls[1] = (struct pollfd){
        .fd = s->agent_fd,
        .events = (short)(hs_sup_anything_waits(s) || !s->greeted ? POLLIN | POLLOUT : POLLIN)};
    polls[2] = (struct pollfd){.fd = a->devices.asking ? a->devices.fd : -1, .events = POLLIN};
    for (uint32_t i = 0; i < a->count; i++) {
        polls[n++] = (struct pollfd){.fd = a->ranks[i].out_fd, .events = POLLIN};
        polls[n++] = (struct pollfd){.fd = a->ranks[i].err_fd, .events = POLLIN};
    }
    if (s->agent_fd < 0) earlier(&wake_ns, s->next_try_ns);
    if (s->away_ns) earlier(&wake_ns, s->away_ns);
    if (a->kill_ns) earlier(&wake_ns, a->kill_ns);
    if (a->live && a->stall_ms) earlier(&wake_ns, s->look_ns);
    if (a->devices.asking) earlier(&wake_ns, a->devices.deadline_ns);
    if (s->leave_ns) earlier(&wake_ns, s->leave_ns);
    (void)poll(polls, n, wake_ns == INT64_MAX ? -1 : hs_deadline_poll_ms(wake_ns));
    for (uint32_t i = 0; i < a->count; i++) {
        hs_sup_rank *r = &a->ranks[i];
        if (r->out_fd >= 0 && polls[3 + 2 * i].revents &&
            !hs_sup_drain(s, r, r->out_fd, STDOUT_FILENO))
            hs_sup_close_fd(&r->out_fd);
        if (r->err_fd >= 0 && polls[4 + 2 * i].revents &&
            !hs_sup_drain(s, r, r->err_fd, STDERR_FILENO))
            hs_sup_close_fd(&r->err_fd);
    }
}

/* I6 */
static void leave_for_want_of_an_agent(hs_supervisor *s) {
    hs_sup_attempt *a = &s->attempt;
    HS_LOG(&s->log, HS_LOG_ERROR, "no agent: this node ends", HS_S("socket", s->path),
           HS_I("waited_ms", s->agent_away_ms), HS_I("live_ranks", a->live),
           HS_S("why",
                "nothing that its ranks do would be saved; HOTSTAGE_ENGINE_AGENT_AWAY_S sets "
                "how long an agent may be away"));
    s->stopping = s->abandoned = true;
    s->away_ns = 0;
    if (a->at == HS_SUP_PREPARED) hs_sup_end_attempt(s);
    if (a->live) hs_sup_ask_last_words(s);
}

static void tick(hs_supervisor *s) {
    hs_sup_attempt *a = &s->attempt;
    const int64_t now = hs_clock_ns();
    take_signals(s);
    if (s->away_ns && now >= s->away_ns && !s->abandoned) leave_for_want_of_an_agent(s);
    if (a->kill_ns && now >= a->kill_ns) hs_sup_kill_late(s);
    if (a->live && a->stall_ms && now >= s->look_ns) hs_sup_look(s);
    if (s->pending && !a->live && !s->stopping && !s->ending) {
        /* The agent hears the end of the last attempt before the ports of the next. */
        if (s->agent_fd >= 0) (void)hs_sup_send_waiting(s);
        hs_sup_prepare_pending(s);
    }
    hs_sup_hear_devices(s);
    hs_sup_talk(s);
}

static int run(hs_supervisor *s) {
    struct pollfd few[3];
    for (;;) {
        wait_for_something(s, s->attempt.polls ? s->attempt.polls : few);
        tick(s);
        if (!(s->stopping || s->ending) || s->attempt.live) continue;
        if (s->abandoned && s->agent_fd < 0) break;
        if (!s->leave_ns) s->leave_ns = hs_deadline_ns(FLUSH_MS);
        if (!hs_sup_anything_waits(s) || hs_clock_ns() >= s->leave_ns) break;
    }
    const hs_sup_attempt *a = &s->attempt;
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
    hs_supervisor *s = calloc(1, sizeof *s);
    if (!s) return HS_EXIT_CONFIG;
    hs_files_allow(); /* five a rank, and what each rank inherits: one a channel and a shard */
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
        if (!strcmp(hs_machine_cpu_kernels(), "portable"))
            HS_LOG(
                &s->log, HS_LOG_WARN,
                "this CPU has no AVX2 and FMA: its ranks run the portable kernels, with the same "
                "bits, several times slower");
        s->agent_away_ms = agent_away_ms;
        s->away_ns = hs_deadline_ns(agent_away_ms);
        code = run(s);
        hs_sup_forget_attempt(s);
        hs_sup_close_arenas(s, 0);
        free(s->arenas);
        hs_sup_close_fd(&s->agent_fd);
        close(s->signal_fd);
    }
    free(s);
    return code;
}
