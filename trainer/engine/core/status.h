/* Results of calls: one list, a text each, and the words for what exactly went wrong.
 *
 * Every function that can fail returns hs_status: HS_OK (0) or a negative HS_E_*; results leave
 * through out-pointers, last. Libraries never exit: main.c maps a status to an exit code (X's third
 * column, a number of wire/exit.h). The sentence for people travels beside it in an hs_why that the
 * caller owns: the first failure is written there, naming the value, the limit and, where there is
 * one, the mend.
 *
 * HS_ASSERT stays on in release builds. It is for bugs of this program, never for input: it prints
 * and aborts (run/abort_words.h turns SIGABRT of a rank into last words and exit 70).
 */
#ifndef HS_CORE_STATUS_H
#define HS_CORE_STATUS_H

#include <stddef.h>

/* X(number, NAME, exit code, text) */
#define HS_STATUSES(X)                                                                             \
    X(-1, USAGE, 64, "wrong command line")                                                         \
    X(-2, DATA, 65, "bad training data")                                                           \
    X(-3, BUG, 70, "internal error")                                                               \
    X(-4, LOST, 75, "a peer or the store was lost")                                                \
    X(-5, RESTORE, 76, "the restore point is damaged")                                             \
    X(-6, CONFIG, 78, "refused configuration or plan")                                             \
    X(-7, STALLED, 86, "a wait passed its deadline")                                               \
    X(-8, DIVERGED, 87, "loss or gradient norm is not finite")                                     \
    X(-9, MEMORY, 78, "out of memory")                                                             \
    X(-10, IO, 70, "an input or output operation of the system failed")                            \
    X(-11, OVERFLOW, 78, "a size does not fit 64 bits")                                            \
    X(-12, BUSY, 78, "an address or a resource is in use")                                         \
    X(-13, REFUSED, 75, "turned away by the other side")                                           \
    X(-14, AGAIN, 70, "nothing there yet")                                                         \
    X(-15, STOPPED, 85, "stopped on request")                                                      \
    X(-16, UNSUPPORTED, 78, "this machine or build cannot do it")                                  \
    X(-17, SICK, 88, "this machine computes or remembers wrongly")                                 \
    X(-18, TERMINATED, 143, "stopped on request, this attempt saved nothing")                      \
    X(-19, DEVICE, 88, "a device failed or is gone")

typedef int hs_status;

enum {
    HS_OK = 0,
#define X(number, NAME, code, text) HS_E_##NAME = number,
    HS_STATUSES(X)
#undef X
};

/* The text of a status; never NULL. */
const char *hs_status_text(hs_status status);
/* Its short name ("OK", "DATA", ...); never NULL. */
const char *hs_status_name(hs_status status);
/* The exit code that stands for it: 0 for HS_OK, 70 for a number that is not in the list. */
int hs_status_exit(hs_status status);

/* What went wrong, in a sentence. Zero-initialise; text is always NUL-terminated. */
typedef struct hs_why {
    char text[768];
} hs_why;

/* Writes the sentence (if why is not NULL and still empty: the first failure wins) and returns
 * status. */
__attribute__((format(printf, 3, 4))) hs_status hs_fail(hs_why *why, hs_status status,
                                                        const char *format, ...);

/* Return, or go to a clean-up label with `st` set, where an expression fails. */
#define HS_TRY(expression)                                                                         \
    do {                                                                                           \
        const hs_status hs_try_ = (expression);                                                    \
        if (hs_try_ != HS_OK) return hs_try_;                                                      \
    } while (0)
#define HS_TRY_GOTO(st, label, expression)                                                         \
    do {                                                                                           \
        (st) = (expression);                                                                       \
        if ((st) != HS_OK) goto label;                                                             \
    } while (0)

__attribute__((noreturn)) void hs_assert_failed(const char *expression, const char *file, int line,
                                                const char *function);
/* What the assertion that failed said; empty while none has. For a handler of SIGABRT. */
const char *hs_assert_text(void);
#define HS_ASSERT(expression)                                                                      \
    ((expression) ? (void)0 : hs_assert_failed(#expression, __FILE__, __LINE__, __func__))

#endif
