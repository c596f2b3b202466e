/* What the files of the supervisor share. One thread; every function returns at once.
 *
 *   loop.c      the process: signals, the one poll, what is due (I6), the code that it leaves with
 *   talk.c      the agent (I4): what it asks for, and what waits to be said to it, in order
 *   prepare.c   PREPARE and START (I1): listeners, pages, arenas, processes; an attempt's end
 *   ranks.c     the ranks while they live (I2, I5): output, reaping, last words, and killing
 *   devices.c   which devices the node has, asked while an attempt is prepared
 *   pages.c     what the ranks' pages say: where they stand at a stall, and who was stopped
 *
 * An attempt is NONE until the first PREPARE, PREPARED with listeners, RUNNING from START on, ENDED
 * when its last rank is reaped or it was refused; then the next PREPARE. What is to be said of it
 * stands in *_unsent until the agent took it.
 */
#ifndef HS_RUN_SUPERVISOR_INTERNAL_H
#define HS_RUN_SUPERVISOR_INTERNAL_H

#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "core/log.h"
#include "core/rank_page.h"
#include "core/status.h"
#include "run/devices.h"
#include "run/message.h"
#include "run/oom.h"
#include "run/output.h"

enum { HS_SUP_RANKS_MAX = 1024 }; /* of a node */

typedef struct hs_sup_rank {
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
} hs_sup_rank;

typedef enum hs_sup_phase {
    HS_SUP_NONE,
    HS_SUP_PREPARED,
    HS_SUP_RUNNING,
    HS_SUP_ENDED
} hs_sup_phase;

typedef struct hs_sup_devices {
    bool asking; /* fd is that of a process that has not answered yet */
    pid_t pid;   /* 0: reaped */
    int fd;
    int64_t deadline_ns;
    size_t bytes; /* of line; 0: nobody asked */
    char line[HS_DEVICES_LINE_MAX];
} hs_sup_devices;

typedef struct hs_sup_attempt {
    hs_sup_phase at;
    uint64_t epoch;
    uint32_t count, live, ended;
    hs_sup_rank *ranks;
    struct pollfd *polls; /* signals, agent, devices, then two a rank */
    uint16_t *ports;
    hs_sup_devices devices;
    bool ports_unsent, idle_unsent, refused_unsent;
    hs_why refusal;
    int refusal_code;
    int first_bad;   /* while stopping: exit code of the first rank that ended ill; 0: none */
    bool unsaved;    /* one ended with 143 */
    int64_t kill_ns; /* I2: SIGKILL for those that are left; 0: no */
    uint32_t stall_ms;
    int64_t oom_kills; /* of this container that are accounted for */
} hs_sup_attempt;

typedef struct hs_supervisor {
    const char *path; /* of the agent's socket */
    hs_log log;
    int signal_fd, agent_fd;
    bool greeted, stopping, ending;
    bool abandoned;        /* I6 */
    int64_t agent_away_ms; /* I6 */
    int64_t away_ns;       /* I6: when the agent's time is over; 0: it is there */
    int64_t next_try_ns, look_ns, leave_ns;
    hs_sup_attempt attempt;
    bool pending; /* a PREPARE that waits for I1 */
    hs_msg pending_msg;
    hs_msg_prepare pending_prepare;
    hs_oom oom;
    int *arenas; /* of the local ranks, memfds: they outlive the attempts */
    uint32_t arena_count;
    hs_output output;
    char payload[HS_MSG_MAX];
} hs_supervisor;

/* --- ranks.c --- */

/* Closes a descriptor that is open, and leaves -1. */
void hs_sup_close_fd(int *fd);
/* To every rank that lives; SIGKILL counts as the supervisor's own. */
void hs_sup_signal_ranks(hs_supervisor *s, int number);
/* I2: SIGUSR1 now, and SIGKILL at kill_ns (hs_sup_kill_late), unless one is due already. */
void hs_sup_ask_last_words(hs_supervisor *s);
void hs_sup_kill_late(hs_supervisor *s);
/* Moves what a rank wrote to one stream (STDOUT_FILENO, STDERR_FILENO): what a pipe holds, never more
 * in a row. False at the stream's end. */
bool hs_sup_drain(hs_supervisor *s, const hs_sup_rank *r, int fd, int stream);
/* Takes every end that waits. */
void hs_sup_reap(hs_supervisor *s);

/* --- devices.c --- */

/* PORTS is to wait until hs_sup_hear_devices has the answer. */
void hs_sup_ask_devices(hs_supervisor *s);
void hs_sup_hear_devices(hs_supervisor *s);
void hs_sup_forget_devices(hs_sup_devices *d);

/* --- pages.c --- */

enum { HS_SUP_LOOK_MS = 250 }; /* between two looks */

/* Kills a rank whose process is stopped and that does not move any more (run/supervisor.h). */
void hs_sup_look(hs_supervisor *s);
/* What the ranks of this node were doing, into the log. */
void hs_sup_log_pages(hs_supervisor *s, const char *event);

/* --- prepare.c --- */

void hs_sup_on_prepare(hs_supervisor *s, const hs_msg *msg, const char *payload);
void hs_sup_on_start(hs_supervisor *s, const hs_msg *msg, const char *payload);
/* The PREPARE that waited, when the last attempt has no rank left. */
void hs_sup_prepare_pending(hs_supervisor *s);
/* SIGTERM or SIGKILL for what runs; what is only prepared ends at once. */
void hs_sup_stop(hs_supervisor *s, int number);
/* No rank lives: the attempt is over, and IDLE is to be said. */
void hs_sup_end_attempt(hs_supervisor *s);
void hs_sup_forget_attempt(hs_supervisor *s);
/* Closes the arenas beyond the first `keep`. */
void hs_sup_close_arenas(hs_supervisor *s, uint32_t keep);

/* --- talk.c --- */

/* Connects where it is time, hears what the agent says, and says what waits. */
void hs_sup_talk(hs_supervisor *s);
/* Output first, then what ended, then IDLE: the agent has a rank's last lines before it hears of its
 * end. */
hs_status hs_sup_send_waiting(hs_supervisor *s);
bool hs_sup_anything_waits(const hs_supervisor *s);

#endif
