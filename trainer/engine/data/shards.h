/* Token shards of wire/shard.h. Opened once at start by a rank that reads tokens or targets, a
 * descriptor a shard; reads do not allocate. Not mapped: a file that is cut, or a disk that fails,
 * while the rank trains is an error with its place, not a SIGBUS. One thread.
 */
#ifndef HS_DATA_SHARDS_H
#define HS_DATA_SHARDS_H

#include <stddef.h>
#include <stdint.h>

#include "core/status.h"
#include "wire/plan.h"

typedef struct hs_shards hs_shards;

/* A plan's tables of them, which must outlive what is opened. */
typedef struct hs_shard_tables {
    const hs_plan_config *config;
    const hs_plan_shard *shards;
    const hs_plan_part *parts;
    size_t count, part_count; /* no parts: no mixture */
} hs_shard_tables;

/* Opens <dir>/00000.bin ..., of a mixture <dir>/<part>/00000.bin ..., and checks header and size of each
 * against the plan's table. HS_E_DATA names the shard, what it has and what it should have. */
hs_status hs_shards_open(const char *dir, const hs_shard_tables *tables, hs_shards **out,
                         hs_why *why);
void hs_shards_close(hs_shards *shards); /* NULL is fine */

/* Sample number (0 .. data_samples-1) of the shards: inputs[T] are its tokens, targets[T] the ones
 * after them, -1 for those whose prediction does not count. Either may be NULL. HS_E_DATA where a
 * token is not below the vocabulary: names shard, place, token, limit, or where the file has become
 * shorter; HS_E_LOST where it cannot be read. */
hs_status hs_shards_read(const hs_shards *shards, uint64_t sample, int32_t *inputs,
                         int32_t *targets, hs_why *why);

#endif
