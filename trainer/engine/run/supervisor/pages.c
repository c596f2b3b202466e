/* What the pages of the ranks (core/rank_page.h) say of them: where they stand at a stall, and which
 * of them stands still because its process was stopped. */

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/rank_page.h"
#include "run/supervisor/supervisor_internal.h"

enum { STALL_MARGIN_MS = 1000 };

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
    static const char *const names[] = {"starting", "RUN",    "SEND",   "RECV",     "DATA",
                                        "COMBINE",  "REPORT", "APPLY",  "SNAPSHOT", "MERGE",
                                        "DECIDE",   "CHECK",  "FORESEE"};
    return kind < sizeof names / sizeof *names ? names[kind] : "?";
}

void hs_sup_log_pages(hs_supervisor *s, const char *event) {
    for (uint32_t i = 0; i < s->attempt.count; i++) {
        const hs_sup_rank *r = &s->attempt.ranks[i];
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

void hs_sup_look(hs_supervisor *s) {
    hs_sup_attempt *a = &s->attempt;
    const int64_t now = hs_clock_ns();
    const int64_t patience_ns = ((int64_t)a->stall_ms + STALL_MARGIN_MS) * 1000000;
    s->look_ns = now + (int64_t)HS_SUP_LOOK_MS * 1000000;
    for (uint32_t i = 0; i < a->count; i++) {
        hs_sup_rank *r = &a->ranks[i];
        if (!r->pid || r->stalled) continue;
        const uint64_t moves = atomic_load(&r->page->moves);
        const char state = process_state(r->pid);
        if (moves != r->moves || (state != 'T' && state != 't')) {
            r->moves = moves;
            r->moved_ns = now;
        } else if (now - r->moved_ns >= patience_ns) {
            hs_sup_log_pages(s, "a stopped rank does not move");
            r->stalled = true;
            (void)kill(r->pid, SIGKILL);
        }
    }
}
