/* `hotstage-engine rank`: one rank of an attempt, from its files to its exit. Builds the parts, in
 * this order, each failing with its own status: plan, attempt, stop requests, agent and slots,
 * memory and kernels (checked: backend/check.h), data, state (restored and verified, or weights from a
 * file), peers, then the init and load lists, the steps, the last commit. No rank steps before
 * every peer has verified what it restored: the handshake carries the start step.
 */
#ifndef HS_RUN_RANK_H
#define HS_RUN_RANK_H

#include <stdint.h>

#include "backend/backend.h"
#include "core/status.h"
#include "run/environment.h"

typedef struct hs_rank_args {
    const char *plan, *attempt; /* files */
    uint32_t rank;
    const char *agent;    /* socket; NULL: none (metrics to standard output only, no slots) */
    const char *weights;  /* file of masters to start from instead of the init list; NULL: none */
    const char *dump_dir; /* gradients and weights of every step, for tests; NULL: none */
    int listen_fd; /* listening socket from the supervisor; -1: open one on the attempt's port */
    int page_fd;   /* memfd of hs_rank_page from the supervisor; -1: none */
    const hs_environment *environment;
    int arena_fd; /* memfd that keeps the arena's pages (core/arena.h); -1: none */
} hs_rank_args;

/* HS_OK: trained to the end; HS_E_STOPPED: stopped on request and saved; HS_E_TERMINATED: stopped
 * before it saved; else why, which the last words and the log have got already. */
hs_status hs_rank_run(const hs_rank_args *args, hs_why *why);

#endif
