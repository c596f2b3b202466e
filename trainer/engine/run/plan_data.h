/* A plan's tables of its data, as data/ takes them. */
#ifndef HS_RUN_PLAN_DATA_H
#define HS_RUN_PLAN_DATA_H

#include "data/order.h"
#include "data/shards.h"
#include "run/plan.h"

static inline hs_order hs_plan_order(const hs_plan *plan) {
    const uint32_t parts = (uint32_t)plan->count[HS_SECTION_PARTS];
    return (hs_order){.config = plan->config,
                      .parts = plan->parts,
                      .weights = plan->weights,
                      .part_count = parts,
                      .phase_count = parts ? (uint32_t)plan->count[HS_SECTION_WEIGHTS] / parts : 0};
}

static inline hs_shard_tables hs_plan_shards(const hs_plan *plan) {
    return (hs_shard_tables){.config = plan->config,
                             .shards = plan->shards,
                             .parts = plan->parts,
                             .count = plan->count[HS_SECTION_SHARDS],
                             .part_count = plan->count[HS_SECTION_PARTS]};
}

#endif
