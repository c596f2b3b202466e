/* The last layer with its loss, where a run has its vocabulary in blocks (train.vocab_blocks): the
 * same bits whether one position has all of it, or several have an aligned part each.
 *
 * N blocks of a part's V rows: BLOCK rows each, the last what is left. Of a row of logits:
 *   a block   top = its largest logit, e = exp(logit - top), sum = the sum of e in one order, fixed
 *             by the block's length
 *   two       top = the larger; sum = a.sum exp(a.top - top) + b.sum exp(b.top - top)
 *   all       neighbours in a balanced tree: ((0 + 1) + (2 + 3)) + ...; then
 *             loss[r] = (top - logit[target]) + log(sum)
 * The gradients of scale * (sum of all losses), all sums in acc:
 *   dlogits[v] = e[v] (exp(block's top - top) (scale / sum)); at the target p - 1 is taken before
 *                scaling; rounded to dt
 *   dx[r]      a block: sum over its v ascending of dlogits[v] w[v]; the blocks in the same tree
 *   dw[v]      from the old value on (ACCUM 0: from +0), rows ascending, + dlogits[r,v] x[r]
 *
 *   vocab_head       all of it at once, CHUNK rows at a time; dx is rounded once
 *   vocab_sums   a part, rows FIRST .. FIRST + V of the vocabulary's ALL: e and tops are kept for
 *                    the gradients; sums[0], [1], [2]: the part's top, sum, and the target's logit,
 *                    0 where the part does not have it
 *   vocab_part  by the sums of all P parts, one after the other: dx is the part's alone, a
 *                    subtree of the whole, unrounded; loss, where it is wanted, of the whole
 *
 * A row with target < 0 is left out: loss 0, dlogits 0, dx 0. CHUNK does not change the bits of the
 * fast set; ref rounds dw once a chunk.
 */
#ifndef HS_KERNELS_VOCABULARY_H
#define HS_KERNELS_VOCABULARY_H

#include "kernels/kernels.h"

/* Where block b of a part of V rows begins; b = N: V. */
static inline int64_t hs_vocab_block(int64_t b, int64_t N, int64_t BLOCK, int64_t V) {
    if (b == 0) return 0;
    return b >= N || BLOCK >= V || b * BLOCK >= V ? V : b * BLOCK;
}

#endif
