/* The life of the ranks of a node (I2): their output, their last words, how they ended, and who is
 * told to end then. */

#include <errno.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/clock.h"
#include "run/supervisor/supervisor_internal.h"
#include "wire/exit.h"

enum {
    LAST_WORDS_MS = 300, /* I2 */
    DRAIN_READS = 16,    /* of one stream in a row: more than a pipe holds (I5) */
};

void hs_sup_close_fd(int *fd) {
    if (*fd >= 0) close(*fd);
    *fd = -1;
}

void hs_sup_signal_ranks(hs_supervisor *s, int number) {
    for (uint32_t i = 0; i < s->attempt.count; i++) {
        hs_sup_rank *r = &s->attempt.ranks[i];
        if (!r->pid) continue;
        if (number == SIGKILL) r->killed = true;
        (void)kill(r->pid, number);
    }
}

void hs_sup_ask_last_words(hs_supervisor *s) {
    hs_sup_signal_ranks(s, SIGUSR1);
    if (!s->attempt.kill_ns) s->attempt.kill_ns = hs_deadline_ns(LAST_WORDS_MS);
}

void hs_sup_kill_late(hs_supervisor *s) {
    hs_sup_signal_ranks(s, SIGKILL);
    s->attempt.kill_ns = hs_deadline_ns(LAST_WORDS_MS);
}

bool hs_sup_drain(hs_supervisor *s, const hs_sup_rank *r, int fd, int stream) {
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

static void rank_ended(hs_supervisor *s, hs_sup_rank *r, int status) {
    hs_sup_attempt *a = &s->attempt;
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
    (void)hs_sup_drain(s, r, r->out_fd, STDOUT_FILENO);
    (void)hs_sup_drain(s, r, r->err_fd, STDERR_FILENO);
    hs_sup_close_fd(&r->out_fd);
    hs_sup_close_fd(&r->err_fd);
    const bool well =
        r->code == HS_EXIT_DONE || r->code == HS_EXIT_PREEMPTED || r->code == HS_EXIT_TERMINATED;
    a->unsaved |= r->code == HS_EXIT_TERMINATED;
    HS_LOG(&s->log, well ? HS_LOG_INFO : HS_LOG_WARN, "rank ended", HS_I("of", r->number),
           HS_I("code", r->code), HS_I("pid", r->last_pid), HS_I("killed", r->killed),
           HS_I("starved", r->starved), HS_I("of_epoch", (int64_t)a->epoch));
    if (!well && s->stopping && !a->first_bad)
        a->first_bad = r->code < 0 ? HS_EXIT_LOST : (int)r->code;
    if (r->code == HS_EXIT_STALLED) hs_sup_log_pages(s, "at the stall");
    if (!well && a->live && !a->kill_ns) hs_sup_ask_last_words(s); /* I2 */
    if (!a->live) hs_sup_end_attempt(s);
}

void hs_sup_reap(hs_supervisor *s) {
    int status;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        if (pid == s->attempt.devices.pid)
            s->attempt.devices.pid = 0; /* its number may be another's */
        for (uint32_t i = 0; i < s->attempt.count; i++)
            if (s->attempt.ranks[i].pid == pid) {
                rank_ended(s, &s->attempt.ranks[i], status);
                break;
            }
    }
}
