/* Starting a process of the node, a rank's or a look at its devices: what a child gets and what it
 * does not. */
#ifndef HS_RUN_SPAWN_H
#define HS_RUN_SPAWN_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "core/status.h"

typedef struct hs_spawn {
    const char *plan_path, *attempt_path, *socket_path;
    uint32_t rank;
    int listen_fd; /* -1: none; handed over as --listen-fd */
    int status_fd; /* memfd of a hs_rank_page; handed over as --status-fd */
    int arena_fd;  /* memfd of the rank's arena; handed over as --arena-fd */
} hs_spawn;

/* Forks and executes this same binary as `rank`, with pipes on stdout and stderr whose read ends
 * (non-blocking, close-on-exec) are the caller's; stdin is empty. The child dies with the caller's
 * thread, has SIGTERM, SIGINT and SIGUSR1 blocked (they wait for its hs_stop), and lacks every
 * secret of the environment. */
hs_status hs_spawn_rank(const hs_spawn *spawn, pid_t *pid, int *out_fd, int *err_fd, hs_why *why);

/* The same for `devices`: its standard output is *out_fd, its errors go where the caller's go. */
hs_status hs_spawn_devices(pid_t *pid, int *out_fd, hs_why *why);

/* True for names such as AWS_SECRET_ACCESS_KEY: those a rank must not see. */
bool hs_spawn_is_secret(const char *name_and_value);

#endif
