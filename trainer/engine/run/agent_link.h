/* A rank's talk with the checkpoint agent of its node (wire/agent.h). It never blocks the trainer
 * and survives the agent: every call looks for what came, sends what it can, and where the agent is
 * away keeps the newest READY of each slot, the last words, and up to HS_LINK_METRICS_BYTES of
 * metrics for the next connection. An agent that was restarted gets HELLO with the slots'
 * descriptors first.
 *
 * Order of calls, all from the rank's main thread: create, slots (waits), then metrics/ready/trace
 * and poll as the steps go, wait_committed before leaving with a final snapshot, words and leave at
 * the end, destroy. A NULL link
 * (`--agent -`) takes every call: no slots come, nothing is sent, wait_committed is done at once.
 *
 * Nothing allocates after create.
 */
#ifndef HS_RUN_AGENT_LINK_H
#define HS_RUN_AGENT_LINK_H

#include <stdbool.h>
#include <stdint.h>

#include "core/log.h"
#include "core/status.h"
#include "core/stop.h"
#include "snapshot/snapshot.h"

#define HS_LINK_METRICS_BYTES (1u << 20)
#define HS_LINK_METRICS_MAX   4096u  /* of one JSON line */
#define HS_LINK_WORDS_MAX     16384u /* of the last words */
#define HS_LINK_DATA_MAX      400u   /* of why data is late */

typedef struct hs_agent_link hs_agent_link;

/* The path must outlive the link. HS_E_CONFIG where it cannot be a socket's. Does not connect yet.
 */
hs_status hs_agent_link_create(const char *socket_path, uint32_t rank, uint64_t epoch,
                               const hs_log *log, hs_agent_link **out, hs_why *why);
void hs_agent_link_destroy(hs_agent_link *link);

/* Waits for the agent's SLOTS: *count descriptors, the caller's from here (give them to
 * hs_snapshot_attach), and the slot to restore from in *restore, -1: none. HS_E_LOST where the
 * agent does not answer until deadline_ns or a peer is lost, HS_E_TERMINATED on SIGTERM. */
hs_status hs_agent_link_slots(hs_agent_link *link, int64_t deadline_ns, hs_stop *stop,
                              int fds[HS_SNAPSHOT_SLOTS_MAX], int *count, int *restore,
                              hs_why *why);

/* Proposes a table of algorithms (wire/algorithms.h) and waits for the run's: its bytes in answer, of
 * which there are *came. HS_E_CONFIG: the agent cannot keep it, in its words; HS_E_LOST and
 * HS_E_TERMINATED as above. */
hs_status hs_agent_link_agree(hs_agent_link *link, const void *table, size_t bytes, void *answer,
                              size_t room, size_t *came, int64_t deadline_ns, hs_stop *stop,
                              hs_why *why);

/* The attempt's data comes ahead: from now on the agent hears how far this rank has read, beginning with `step`. */
void hs_agent_link_ahead(hs_agent_link *link, int64_t step);
/* This rank has read the data of that step; the agent hears it at the next call. */
void hs_agent_link_has_read(hs_agent_link *link, int64_t step);
/* Waits until the agent says that the data of `step` is there; no more than a comparison where it is. HS_E_LOST where it
 * is not by deadline_ns, in the agent's words (HS_E_CONFIG where this machine is why), or where a peer is lost meanwhile;
 * HS_E_DATA at once where it never will be. */
hs_status hs_agent_link_wait_data(hs_agent_link *link, int64_t step, int64_t deadline_ns,
                                  hs_stop *stop, hs_why *why);

/* From now on a reconnection hands over the descriptors of this snapshot, which must outlive the
 * link. */
void hs_agent_link_keep(hs_agent_link *link, const hs_snapshot *snapshot);

/* One JSON object, NUL-terminated, at most HS_LINK_METRICS_MAX bytes (longer ones are dropped and
 * logged). */
void hs_agent_link_metrics(hs_agent_link *link, const char *json);
void hs_agent_link_ready(hs_agent_link *link, int slot, int64_t step, bool final);
/* JSON, cut at HS_LINK_WORDS_MAX. The last call wins. */
void hs_agent_link_words(hs_agent_link *link, const char *json);
/* The path of a trace file that is complete. */
void hs_agent_link_trace(hs_agent_link *link, const char *path);

/* Takes what came and sends what waits; connects again where needed, at most every 50 ms. */
void hs_agent_link_poll(hs_agent_link *link);

/* Waits until the agent says that `step` (or a later one) is committed. HS_E_LOST where it is not
 * by deadline_ns, or where a peer is lost meanwhile. */
hs_status hs_agent_link_wait_committed(hs_agent_link *link, int64_t step, int64_t deadline_ns,
                                       hs_stop *stop, hs_why *why);

/* The socket that the agent knows as this rank's, for words in an emergency (run/abort_words.c);
 * -1: none now. Safe in a signal handler. */
int hs_agent_link_socket(const hs_agent_link *link);

/* Before leaving: hands over what still waits, until deadline_ns at most. True when all of it went.
 */
bool hs_agent_link_leave(hs_agent_link *link, int64_t deadline_ns);

#endif
