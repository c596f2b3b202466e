/* The attempt file of wire/attempt.h, read into memory and checked: lengths, checksum, terminated
 * texts, ranges. */
#ifndef HS_RUN_ATTEMPT_H
#define HS_RUN_ATTEMPT_H

#include "core/status.h"
#include "wire/attempt.h"

/* What orders changed of the run's numbers; zero: nothing. */
typedef struct hs_amendments {
    int64_t steps; /* in all; 0: the plan's */
    const hs_attempt_skip *skips;
    const hs_attempt_rate *rates;
    uint32_t skip_count, rate_count;
} hs_amendments;

typedef struct hs_attempt_file {
    hs_attempt *attempt;          /* owned, one block with the ranks */
    const hs_attempt_rank *ranks; /* attempt->ranks of them */
    hs_amendments amendments;     /* lent by the file */
} hs_attempt_file;

/* HS_E_CONFIG with the first failure named. On failure *file is zero. */
hs_status hs_attempt_open(const char *path, hs_attempt_file *file, hs_why *why);
void hs_attempt_close(hs_attempt_file *file); /* safe on a zeroed file; forgets the key */

/* Ranks of the attempt on the node of `rank`, itself included. */
uint32_t hs_attempt_local_ranks(const hs_attempt_file *file, uint32_t rank);

#endif
