/* The order in which a run reads its samples: arithmetic, no state (wire/shard.h has the
 * definition; trainer/wire/order.py the Python mirror). Pure functions, thread-safe. */
#ifndef HS_DATA_ORDER_H
#define HS_DATA_ORDER_H

#include <stdint.h>

#include "wire/attempt.h"
#include "wire/plan.h"

/* A plan's tables that say it: lent. */
typedef struct hs_order {
    const hs_plan_config *config;
    const hs_plan_part *parts;     /* of a mixture */
    const hs_plan_weight *weights; /* phases x parts */
    uint32_t part_count;           /* 0: no mixture */
    uint32_t phase_count;
} hs_order;

/* x -> its place in the keyed permutation of 0..n-1; n >= 1, x < n. */
uint64_t hs_order_permute(uint64_t key, uint64_t n, uint64_t x);

/* SplitMix64's finalizer, and the key of (seed, pass, use). */
uint64_t hs_order_mix(uint64_t z);
uint64_t hs_order_key(uint64_t seed, uint64_t pass, uint64_t use);

/* Number of the sample (in the shards' order, 0 .. data_samples-1) that sample `index` of the run
 * reads. config: data_samples >= 1, data_block >= 1, data_window >= 1; every part has a sample, and
 * every phase a weight. */
uint64_t hs_order_sample(const hs_order *order, uint64_t index);

/* The 1-based batch that 1-based `step` reads: the step-th that no skip has. */
int64_t hs_order_batch(const hs_attempt_skip *skips, uint32_t count, int64_t step);

/* Samples of a batch, of all replicas. */
uint64_t hs_order_batch_samples(const hs_plan_config *config);

/* The run's sample with which a replica begins a 1-based batch: a batch's samples are shared out in
 * order, its first microbatches are replica 0's. */
uint64_t hs_order_first(const hs_plan_config *config, uint64_t replica, int64_t batch);

#endif
