/* Monotonic time and deadlines. No wall clock orders anything. */
#ifndef HS_CORE_CLOCK_H
#define HS_CORE_CLOCK_H

#include <limits.h>
#include <stdint.h>
#include <time.h>

/* Nanoseconds since some start; never goes back. */
static inline int64_t hs_clock_ns(void) {
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}
static inline int64_t hs_clock_us(void) {
    return hs_clock_ns() / 1000;
}

/* A point in monotonic time, `ms` from now. */
static inline int64_t hs_deadline_ns(int64_t ms) {
    return hs_clock_ns() + ms * 1000000;
}

/* Milliseconds left, rounded up, at least 0, at most INT_MAX: what poll(2) takes. */
static inline int hs_deadline_poll_ms(int64_t deadline_ns) {
    const int64_t left = deadline_ns - hs_clock_ns();
    if (left <= 0) return 0;
    const int64_t ms = (left + 999999) / 1000000;
    return ms > INT_MAX ? INT_MAX : (int)ms;
}

#endif
