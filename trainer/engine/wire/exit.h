/* Exit codes of a rank and of a node's supervisor. Said once, for the engine, the driver and the Job's
 * pod failure policy; trainer/wire/__init__.py mirrors the table and a test compares the two.
 *
 * X(code, NAME, class, text)   class: what the driver does about it, by trainer/failures.py
 */
#ifndef HS_WIRE_EXIT_H
#define HS_WIRE_EXIT_H

#define HS_EXITS(X)                                                                         \
    X(0, DONE, "done", "finished")                                                          \
    X(64, USAGE, "config", "wrong command line")                                            \
    X(65, DATA, "data", "bad training data")                                                \
    X(70, BUG, "bug", "internal error")                                                     \
    X(75, LOST, "infra", "a peer or the store was lost")                                    \
    X(76, RESTORE, "restore", "the restore point is damaged")                               \
    X(78, CONFIG, "config", "refused configuration or plan")                                \
    X(85, PREEMPTED, "preempted", "stopped on request, state saved")                        \
    X(86, STALLED, "stall", "a wait passed its deadline")                                   \
    X(87, DIVERGED, "numeric", "loss or gradient norm is not finite")                       \
    X(88, SICK, "sick", "the machine, or a device of it, computes wrongly or is gone")      \
    X(143, TERMINATED, "infra", "stopped on request, this attempt saved nothing")

enum {
#define X(code, NAME, cls, text) HS_EXIT_##NAME = code,
    HS_EXITS(X)
#undef X
};

#endif
