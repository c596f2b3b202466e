/* What a step cost and gave, as one JSON line (the contract's "step", "start" and "end" objects).
 * Time is counted by kind of instruction on every rank; rank 0 prints. Nothing allocates after
 * hs_metrics_open. */
#ifndef HS_RUN_METRICS_H
#define HS_RUN_METRICS_H

#include <stdint.h>

#include "core/text.h"
#include "run/plan.h"

enum {
    HS_TIME_F,
    HS_TIME_B, /* B, I and W */
    HS_TIME_OPT,
    HS_TIME_SEND,
    HS_TIME_RECV,
    HS_TIME_DATA,
    HS_TIME_SNAPSHOT,
    HS_TIME_COUNT
};

/* Groups of tensors whose gradients are told apart, and positions whose messages are, at most. */
#define HS_METRICS_SUMS 32
#define HS_METRICS_SENT 32

typedef struct hs_metrics {
    const char *run;
    uint64_t epoch;
    uint32_t rank;
    uint64_t tokens; /* of a step */
    int statm_fd;    /* /proc/self/statm, or -1 */
    int64_t page_bytes;
    int64_t step_start_ns;
    int64_t ns[HS_TIME_COUNT];
    uint64_t skipped; /* snapshots that were due and had no slot, so far in this attempt */
    uint64_t idle;    /* steps of which no token counted, so far in this attempt */
    int64_t busy_ns,
        reported_ns; /* in F, B, I and W in this attempt: in all, and up to the last report */
    char sums[8 * HS_METRICS_SUMS + 1], sent[16 * HS_METRICS_SENT + 1];
    char busy[11 * HS_METRICS_SENT + 1];
} hs_metrics;

void hs_metrics_open(hs_metrics *metrics, const char *run, uint64_t epoch, uint32_t rank,
                     uint64_t tokens);
void hs_metrics_close(hs_metrics *metrics);

/* Zeroes the step's times and starts its clock. */
void hs_metrics_begin(hs_metrics *metrics);
/* HS_TIME_* that an action counts as, or -1. */
int hs_metrics_kind(const hs_plan_action *action);

/* Adds time that an action took, HS_TIME_* as its kind says. */
void hs_metrics_add(hs_metrics *metrics, const hs_plan_action *action, int64_t ns);
/* Microseconds in F, B, I and W since this was asked last. */
uint32_t hs_metrics_busy_us(hs_metrics *metrics);

/* Rank 0, from the reports of all positions after COMBINE: what a step computed again is compared by,
 * beside loss and norm (flows/replay). "sums": 8 hex digits for each of G = min(tensors, 32) groups,
 * CRC-32C of the squared norms (f64) of the gradients of tensors t with t G / tensors = group. "sent":
 * of each position what it sent forward, then backward, 8 digits each; left out for one position and
 * for more than 32. "busy": of each position its busy_us, left out in the same cases. */
void hs_metrics_evidence(hs_metrics *metrics, const uint8_t *reports, size_t positions,
                         size_t tensors);
/* The step's object, into text (no newline); counts control->skipped, and steps without a token
 * that counts. "counted": tokens that do, told where some do not. `batch`: that it read, told where
 * orders made it another than the step's number. */
void hs_metrics_step(hs_metrics *metrics, const hs_step_control *control, int64_t batch,
                     hs_text *text);
/* The same beginning for any other event: {"event":...,"run":...,"epoch":...,"rank":...,"time":... (no
 * closing brace); time: seconds since 1970. */
void hs_metrics_event(const hs_metrics *metrics, const char *event, hs_text *text);

/* Resident bytes of this process, 0 where the system does not say. */
int64_t hs_metrics_rss_bytes(const hs_metrics *metrics);

/* Writes text and a newline to standard output in one go. */
void hs_metrics_print(const hs_text *text);

#endif
