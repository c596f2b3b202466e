/* The supervisor of a node (`hotstage-engine node --agent SOCKET`): one process, one thread, one
 * poll loop. It knows processes and nothing of training. For each attempt it binds the listeners of
 * the node's ranks, forks them when the agent says START, forwards their output, reaps them and
 * says how they ended.
 *
 * I1  At most one attempt has live ranks; the next is prepared when all of the last are reaped.
 * I2  A rank that ends by a signal, or with any code but 0, 85 and 143, ends its attempt on this
 *     node: the others get SIGUSR1 (leave last words, exit 75), and SIGKILL 300 ms later.
 * I3  Nothing outlives the supervisor: ranks die with it (PR_SET_PDEATHSIG).
 * I4  The agent may go and come back at any time: ranks are not disturbed. What it must know
 *     (PORTS, EXIT, IDLE) is state, said again after every connection; output is kept to 1 MiB, the
 *     oldest goes first.
 * I5  Ranks never see the credentials of this process's environment (AWS_*, *SECRET*, ...), and
 *     never wait for a reader of their output. One that floods does not keep the supervisor from
 *     its other work.
 * I6  A supervisor that has had no agent for agent_away_ms ends its ranks as in I2, and itself: an
 *     agent that does not come again by then was given up, or its folder deleted, and nothing that
 *     the ranks do will be saved.
 *
 * It keeps a memfd for the arena of each local rank from attempt to attempt (core/arena.h): its
 * pages, not what is in them; empties the one of a rank that the OOM killer ended, and closes all
 * with itself.
 *
 * EXIT says in c whether the supervisor itself killed the rank, so that such an end is never taken
 * for a cause, or the kernel's OOM killer did: a SIGKILL of nobody known while the container's
 * count of such kills is higher than when the attempt began. HELLO says in epoch the attempt that
 * it knows (0: none) and in b how many of its ranks live. A rank whose process is stopped (SIGSTOP,
 * a debugger) and that makes no move for the attempt's stall_ms and one second more is killed and
 * reported with HS_EXIT_STALLED; its peers have usually said so first. The output of ranks also
 * goes to the supervisor's own stdout and stderr, as far as their reader keeps up.
 */
#ifndef HS_RUN_SUPERVISOR_H
#define HS_RUN_SUPERVISOR_H

#include <stdint.h>

/* Runs until END (0), or until SIGTERM or SIGINT and the last rank's end: 85 where ranks ran and
 * each ended with 0 or 85, 143 where none ran or one saved nothing, else the first other code (75
 * for a signal). 75 after I6. 78 where the socket's path cannot be one. */
int hs_supervisor_main(const char *socket_path, int64_t agent_away_ms);

#endif
