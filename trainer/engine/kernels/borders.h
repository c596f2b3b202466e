/* Documents in packed sequences.
 *
 *   borders  first[b,t] = where the document of place t begins: the place after the last END before
 *            t, 0 where there is none. An end token belongs to the document that it ends.
 *
 * Other kernels take `first` as their last operand: attention reads no key before first[t]
 * (attention.h), and positions, learned (embed.h) and rotary (rope.h), count from it. They also take
 * one that is absent, as 0 everywhere. It does not fall along a sequence. A number outside 0..t counts
 * as the nearest of them, so that no bytes make a kernel read elsewhere.
 */
#ifndef HS_KERNELS_BORDERS_H
#define HS_KERNELS_BORDERS_H

#include "kernels/kernels.h"

#ifdef HS_DEVICE
#define HS_BORDERS_INLINE HS_DEVICE
#else
#define HS_BORDERS_INLINE static inline
#endif

/* first[r] of a row at place t of its sequence. */
HS_BORDERS_INLINE int64_t hs_first_of(const int32_t *first, int64_t r, int64_t t) {
    const int64_t at = first ? first[r] : 0;
    return at < 0 ? 0 : at < t ? at : t;
}

/* The first key that the row reads; window 0: none. */
HS_BORDERS_INLINE int64_t hs_first_read(const int32_t *first, int64_t r, int64_t t,
                                        int64_t window) {
    const int64_t at = hs_first_of(first, r, t);
    return window > 0 && t - at >= window ? t - window + 1 : at;
}

#endif
