/* Last words of a rank that aborts: a failed HS_ASSERT, or the C library's own abort (a damaged
 * heap, a smashed stack). The handler of SIGABRT can run in any thread and in the middle of
 * anything, so it only reads what stands ready here, formats by hand, writes, and leaves with
 * HS_EXIT_BUG. */
#ifndef HS_RUN_ABORT_WORDS_H
#define HS_RUN_ABORT_WORDS_H

#include <stdint.h>

#include "run/agent_link.h"

/* From now on SIGABRT leaves words: on standard error and, where link is not NULL and connected,
 * with the agent. step is read when it happens; both outlive the process, or until disarmed.
 * Without arming, SIGABRT only leaves with HS_EXIT_BUG. */
void hs_abort_words_arm(uint32_t rank, uint64_t epoch, const hs_agent_link *link,
                        const volatile int64_t *step);
void hs_abort_words_disarm(void);

/* The handler; main.c installs it. */
void hs_abort_words_leave(int signal_number);

#endif
