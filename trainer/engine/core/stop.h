/* Requests to stop, as something that a poll() can wait for. No signal handler, no global: the
 * signals are blocked and read from a signalfd.
 *
 *   SIGTERM, SIGINT   stop: finish the step with the others, save it, leave with HS_EXIT_PREEMPTED
 *   SIGUSR1           lost: the supervisor says that a peer died; leave the last words now,
 *                     HS_EXIT_LOST
 *
 * One hs_stop a process, made before any other thread (threads inherit the blocked mask) and used
 * by one thread. Signals that came before hs_stop_create stay pending where the parent blocked them
 * over the exec, as the supervisor does; so no request is lost in between.
 *
 * That thread looks between its waits. While it is in something long that does not look (a program
 * of kernels, a restore), it says so (hs_stop_busy), and a second thread (hs_stop_watch) hears
 * "lost" for it.
 */
#ifndef HS_CORE_STOP_H
#define HS_CORE_STOP_H

#include <stdbool.h>

#include "core/status.h"

typedef struct hs_stop hs_stop;

/* HS_OK, or HS_E_IO where the kernel gives no descriptor. */
hs_status hs_stop_create(hs_stop **out);
void hs_stop_destroy(hs_stop *stop); /* NULL allowed; ends the watching thread */

/* Becomes readable when a request arrives and stays so until it was looked at. -1 for NULL. */
int hs_stop_fd(const hs_stop *stop);

/* Takes what arrived (never blocks), then says what was asked so far. A request once seen stays.
 * NULL: false. */
bool hs_stop_requested(hs_stop *stop);
bool hs_stop_lost(hs_stop *stop);
/* Whether one of the two has seen "lost" already; does not look itself, and costs nothing. */
bool hs_stop_was_lost(const hs_stop *stop);

/* Starts the second thread. Where "lost" arrives while the owner is busy, it calls fn, which must
 * not return: it ends the process. Until then the owner stays in what keeps it busy, or stops at
 * hs_stop_busy(stop, false): whatever it does outside of that, fn may do.
 * HS_E_MEMORY, or as hs_files_failed has it. */
hs_status hs_stop_watch(hs_stop *stop, void (*fn)(void *ctx), void *ctx, hs_why *why);

/* The owner enters or leaves what does not look. NULL allowed. */
void hs_stop_busy(hs_stop *stop, bool busy);

#endif
