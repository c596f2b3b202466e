/* Token shards of wire/shard.h, mapped read-only. Opened once at start by a rank that reads tokens
 * or targets; reads neither allocate nor fail for reasons other than the data itself. One thread.
 */
#ifndef HS_DATA_SHARDS_H
#define HS_DATA_SHARDS_H

#include <stddef.h>
#include <stdint.h>

#include "core/status.h"
#include "wire/plan.h"

typedef struct hs_shards hs_shards;

/* Maps <dir>/00000.bin ... and checks header and size of each against the plan's table (the table
 * must outlive the result). HS_E_DATA names the shard, what it has and what it should have. */
hs_status hs_shards_open(const char *dir, const hs_plan_config *config, const hs_plan_shard *table,
                         size_t count, hs_shards **out, hs_why *why);
void hs_shards_close(hs_shards *shards); /* NULL is fine */

/* Sample number (0 .. data_samples-1) of the shards: inputs[T] are its tokens, targets[T] the ones
 * after them. Either may be NULL. HS_E_DATA where a token is not below the vocabulary: names shard,
 * place, token, limit. */
hs_status hs_shards_read(const hs_shards *shards, uint64_t sample, int32_t *inputs,
                         int32_t *targets, hs_why *why);

#endif
