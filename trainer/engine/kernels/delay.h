/* Time that passes.
 *
 *   delay   sleeps NS nanoseconds, burning no CPU; computes nothing and touches nothing
 *
 * A program that ends with it lasts a set time also where more ranks than cores share a machine: what a
 * schedule makes of such times can be measured (compile_plan's `delays`). On CPUs alone: a device has no
 * sleep, and the linker refuses it there.
 */
#ifndef HS_KERNELS_DELAY_H
#define HS_KERNELS_DELAY_H

#include <errno.h>
#include <sys/prctl.h>

#include "core/clock.h"
#include "kernels/kernels.h"

/* The timer's slack, 50 us by default, would be added to every sleep. */
static inline void hs_delay_ns(int64_t ns) {
    const int64_t until = hs_clock_ns() + ns;
    const struct timespec at = {.tv_sec = until / 1000000000, .tv_nsec = until % 1000000000};
    (void)prctl(PR_SET_TIMERSLACK, 1UL, 0UL, 0UL, 0UL);
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, NULL) == EINTR) {}
}

#endif
