/* The talk between the engine (supervisor and ranks) and the checkpoint agent of its node.
 *
 * A Unix socket of type SOCK_SEQPACKET on which the agent listens; one message a packet, at most
 * HS_MSG_MAX bytes: hs_msg, then `bytes` of payload. Descriptors travel as SCM_RIGHTS with SLOTS and HELLO.
 *
 * Who says what, in order:
 *   supervisor   HELLO(rank = -1)                 once a connection; again after a reconnection. a = pid, epoch = the
 *                                                 attempt that it knows (0: none), b = how many of its ranks live;
 *                                                 then PORTS, EXIT and IDLE of that attempt once more, where they stand
 *   agent        PREPARE                          for each attempt: bind listeners for the node's ranks; a = 1: and look
 *                                                 which devices there are
 *   supervisor   PORTS                            payload u16[local ranks], then the line of `hotstage-engine devices`
 *                                                 (run/devices.h) where it was asked for; or EXIT(rank -1,
 *                                                 HS_EXIT_CONFIG) and text
 *   agent        START                            payload: attempt path NUL plan path NUL; a = first local rank,
 *                                                 b = local ranks. The supervisor forks the ranks.
 *   rank         HELLO(rank)                      a = pid; with its slots' descriptors where it already has them
 *                                                 (the agent was restarted), else without
 *   agent        SLOTS                            a = how many, with that many descriptors (only to a rank that sent none);
 *                                                 b = index of the slot to restore from, or -1
 *   rank         METRICS (JSON object, one a step; rank 0), READY (a = slot, b = step, c = 1 where final),
 *                WORDS (JSON object: last words), TRACE (path of a file),
 *                ALGORITHMS (payload: a table of wire/algorithms.h, what it would choose)
 *   agent        ALGORITHMS                       to that rank: the run's choice for the same products, once the store
 *                                                 has it
 *   rank         DATA (where the attempt's data comes ahead)  a = step whose data it read last, b = step up to which it
 *                                                 was told; when it has connected, and once a step
 *   agent        DATA                             to such a rank: a = step up to which its data is there; b = exit code of
 *                                                 what keeps the next one's away, 0: nothing; payload: why, in words.
 *                                                 Sent when the rank may soon wait for it, not more often
 *   supervisor   OUTPUT (rank, bytes of its stdout or stderr; a = 1 or 2), EXIT(rank, a = exit code or -signal,
 *                b = pid, c = HS_ENDED_*; of HS_ENDED_BY_OOM payload u64: bytes that the container may use, 0:
 *                no limit; in the order in which they ended), IDLE (all ranks of the attempt are reaped)
 *   agent        COMMITTED (a = step)             to every rank that waits with a final slot
 *   agent        STOP                             to the supervisor: stop as on SIGTERM (save, exit 85)
 *                KILL                             to the supervisor: kill the ranks of the attempt now
 *                END                              to the supervisor: no more attempts; kill ranks, exit 0
 * A supervisor that loses the agent goes on and connects again every 50 ms; its ranks too, at the next message.
 * A rank's messages never block it: what does not fit the socket is dropped, except READY, WORDS and the
 * last metrics, which are retried until the connection is back or the rank leaves.
 */
#ifndef HS_WIRE_AGENT_H
#define HS_WIRE_AGENT_H

#include <stdint.h>

#define HS_MSG_MAGIC 0x4d475348u /* "HSGM" in the file's order */
#define HS_MSG_MAX 65536u

#define HS_MSGS(X)                                                                          \
    X(1, HELLO) X(2, PREPARE) X(3, PORTS) X(4, START) X(5, SLOTS) X(6, METRICS) X(7, READY) \
    X(8, WORDS) X(9, TRACE) X(10, OUTPUT) X(11, EXIT) X(12, IDLE) X(13, COMMITTED)          \
    X(14, STOP) X(15, KILL) X(16, END) X(17, ALGORITHMS) X(18, DATA)

enum {
#define X(number, NAME) HS_MSG_##NAME = number,
    HS_MSGS(X)
#undef X
};

/* Of EXIT: what the supervisor killed is no cause. */
enum { HS_ENDED_ITSELF = 0, HS_ENDED_BY_SUPERVISOR = 1, HS_ENDED_BY_OOM = 2 };

typedef struct hs_msg {
    uint32_t magic;
    uint32_t type;  /* HS_MSG_* */
    int32_t rank;   /* sender's or subject's global rank; -1: the supervisor */
    uint32_t bytes; /* of payload */
    uint64_t epoch; /* of the attempt; 0: none */
    int64_t a, b, c;
} hs_msg;

/* Payload of PREPARE. */
typedef struct hs_msg_prepare {
    uint32_t local_ranks;
    uint32_t port_base; /* 0: any free ports; else port_base + local rank */
    char bind[64];      /* address to listen on, e.g. "127.0.0.1" */
} hs_msg_prepare;

#endif
