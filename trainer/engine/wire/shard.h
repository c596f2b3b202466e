/* A token shard: hs_shard_header (64 bytes), then tokens, u16 or u32, little-endian. In a shard of version
 * HS_SHARD_MASKED the top bit of a token is no part of it: where it is 1, the prediction of that token does not count.
 * The engine refuses (exit 65) a shard whose header, size or token count disagree with the plan, and any token >= vocab
 * when it is read. The dataset's manifest (msgpack, checkpoint/dataset) names every shard with its SHA-256.
 *
 * The order of samples. A sample is T+1 tokens that start at a multiple of T inside one shard, so a shard has
 * (tokens-1)/T of them, numbered in order over all shards: data_samples = S. Sample i of the run (i = step*batch + b, from 0)
 * belongs to pass e = i / S' and place j = i % S', where with shuffling S' = (S / block) * block (block = min(data_block, S)),
 * without S' = S and the sample is j itself. Shuffled: nb = S'/block blocks; window = w blocks; q = j / (w*block) is the window,
 * in which n = min(w*block, S' - q*w*block) samples lie;
 * k = permute(key(seed, e, 1 + q), n, j - q*w*block) is a place inside the window: block slot q*w + k / block, offset k % block;
 * the block is permute(key(seed, e, 0), nb, slot); sample = block_number * block + offset.
 * permute(key, n, x): a balanced Feistel network of 6 rounds on 2h bits, h = ceil(bits(n-1)/2) at least 1, applied again until
 * the result is < n (cycle walking). Round: (L, R) -> (R, L ^ (mix(R + key + round * 0x9E3779B97F4A7C15) & mask_h)), L the high half;
 * mix = SplitMix64's finalizer: z ^= z >> 30, *= 0xBF58476D1CE4E5B9, z ^= z >> 27, *= 0x94D049BB133111EB, z ^= z >> 31.
 * key(seed, e, u) = mix(mix(mix(seed) + e) + u), all modulo 2^64. n = 1 gives 0.
 *
 * A mixture (hs_plan_part, hs_plan_weight) has the shards of several datasets. Sample i of the run is of the phase p that has
 * begun with batch i / batch + 1, at place t = i - (from_batch - 1) * batch of it; W is the sum of the phase's weights w_k.
 * In cycle c = t / W, at u = permute(key(~seed, p, c), W, t % W), lies a sample of part k, where u is in
 * [w_0 + .. + w_k-1, w_0 + .. + w_k): each cycle has w_k samples of part k. It is the one at place base_k + c * w_k + u - (w_0 +
 * .. + w_k-1) of that part's own order: the above, over its samples alone, with seed + k * 0x9E3779B97F4A7C15 in place of seed.
 * base_k of a phase: that of the phase before, and w_k there for each of its cycles, begun ones counted whole.
 */
#ifndef HS_WIRE_SHARD_H
#define HS_WIRE_SHARD_H

#include <stdint.h>

#define HS_SHARD_MAGIC "HSSHRD\r\n"
#define HS_SHARD_VERSION 1u
#define HS_SHARD_MASKED  2u

typedef struct hs_shard_header {
    char magic[8];
    uint32_t version;     /* HS_SHARD_VERSION: every token counts; or HS_SHARD_MASKED */
    uint32_t token_bytes; /* 2 or 4 */
    uint64_t tokens;
    uint32_t vocab;
    uint32_t reserved0;
    uint8_t reserved[32];
} hs_shard_header;

#endif
