#include "kernels/delay.h"

#include "kernels/ref/ref_internal.h"

void hs_ref_delay(const hs_delay_args *a) {
    hs_delay_ns(a->NS);
}
