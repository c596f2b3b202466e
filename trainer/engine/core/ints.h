/* Small arithmetic on whole numbers. */
#ifndef HS_CORE_INTS_H
#define HS_CORE_INTS_H

#include <stdint.h>

static inline int64_t hs_min(int64_t a, int64_t b) {
    return a < b ? a : b;
}
static inline int64_t hs_max(int64_t a, int64_t b) {
    return a > b ? a : b;
}
/* a / b rounded up; a is not below 0, b above. */
static inline int64_t hs_ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

#endif
