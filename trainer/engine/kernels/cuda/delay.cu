/* A device has no sleep: the linker refuses plans that have it (run/linker.c). */
#include "kernels/cuda/device.h"

extern "C" hs_status hs_cuda_delay(const hs_cuda_ctx *, const hs_args *) {
    return HS_E_CONFIG;
}
