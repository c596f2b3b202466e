#include "data/order.h"

#include <stddef.h>

#define GOLDEN UINT64_C(0x9E3779B97F4A7C15)

uint64_t hs_order_mix(uint64_t z) {
    z ^= z >> 30;
    z *= UINT64_C(0xBF58476D1CE4E5B9);
    z ^= z >> 27;
    z *= UINT64_C(0x94D049BB133111EB);
    return z ^ z >> 31;
}

uint64_t hs_order_key(uint64_t seed, uint64_t pass, uint64_t use) {
    return hs_order_mix(hs_order_mix(hs_order_mix(seed) + pass) + use);
}

uint64_t hs_order_permute(uint64_t key, uint64_t n, uint64_t x) {
    if (n <= 1) return 0;
    unsigned bits = 0;
    while (bits < 64 && (n - 1) >> bits) bits++;
    const unsigned half = bits > 1 ? (bits + 1) / 2 : 1;
    const uint64_t mask = (UINT64_C(1) << half) - 1; /* half <= 32 */
    /* Cycle walking: the network permutes 0 .. 4^half - 1, less than 4n places, so few turns are
     * needed. */
    do {
        uint64_t left = x >> half, right = x & mask;
        for (uint64_t round = 0; round < 6; round++) {
            const uint64_t mixed = left ^ (hs_order_mix(right + key + round * GOLDEN) & mask);
            left = right;
            right = mixed;
        }
        x = left << half | right;
    } while (x >= n);
    return x;
}

/* The number, among `samples` of one dataset, of the one at place `index` of its order. */
static uint64_t in_dataset(const hs_plan_config *config, uint64_t samples, uint64_t seed,
                           uint64_t index) {
    if (!config->data_shuffled) return index % samples;
    const uint64_t block = config->data_block < samples ? config->data_block : samples;
    const uint64_t blocks = samples / block, used = blocks * block;
    const uint64_t pass = index / used, place = index % used;
    const uint64_t window = (uint64_t)config->data_window * block; /* samples */
    const uint64_t q = place / window, first = q * window;
    const uint64_t in_window = window < used - first ? window : used - first;
    const uint64_t k = hs_order_permute(hs_order_key(seed, pass, 1 + q), in_window, place - first);
    const uint64_t slot = q * config->data_window + k / block;
    return hs_order_permute(hs_order_key(seed, pass, 0), blocks, slot) * block + k % block;
}

/* The last phase that has begun with this 1-based batch. */
static uint32_t phase_of(const hs_order *order, uint64_t batch) {
    uint32_t phase = 0;
    while (phase + 1 < order->phase_count &&
           (uint64_t)order->weights[(size_t)(phase + 1) * order->part_count].from_batch <= batch)
        phase++;
    return phase;
}

uint64_t hs_order_sample(const hs_order *order, uint64_t index) {
    const hs_plan_config *config = order->config;
    if (!order->part_count) return in_dataset(config, config->data_samples, config->seed, index);
    const uint64_t batch = hs_order_batch_samples(config);
    const uint32_t phase = phase_of(order, index / batch + 1);
    const hs_plan_weight *weights = order->weights + (size_t)phase * order->part_count;
    uint64_t cycle = 0;
    for (uint32_t k = 0; k < order->part_count; k++) cycle += weights[k].weight;
    const uint64_t place = index - (uint64_t)(weights[0].from_batch - 1) * batch;
    const uint64_t turn = place / cycle;
    uint64_t u = hs_order_permute(hs_order_key(~config->seed, phase, turn), cycle, place % cycle);
    uint32_t k = 0;
    while (u >= weights[k].weight) u -= weights[k++].weight;
    return order->parts[k].first_sample +
           in_dataset(config, order->parts[k].samples, config->seed + k * GOLDEN,
                      weights[k].base + turn * weights[k].weight + u);
}

int64_t hs_order_batch(const hs_attempt_skip *skips, uint32_t count, int64_t step) {
    int64_t batch = step;
    for (uint32_t i = 0; i < count && skips[i].first <= batch; i++)
        batch += skips[i].last - skips[i].first + 1;
    return batch;
}

uint64_t hs_order_first(const hs_plan_config *config, uint64_t replica, int64_t batch) {
    const uint64_t before = (uint64_t)(batch - 1) * config->replicas + replica;
    return before * config->microbatches * config->microbatch;
}

uint64_t hs_order_batch_samples(const hs_plan_config *config) {
    return (uint64_t)config->replicas * config->microbatches * config->microbatch;
}
