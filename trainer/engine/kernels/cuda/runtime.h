/* The CUDA runtime's host API: NVIDIA's, or its emulation. For sources without kernels; those with
 * kernels include kernels/cuda/device.h. */
#ifndef HS_KERNELS_CUDA_RUNTIME_H
#define HS_KERNELS_CUDA_RUNTIME_H

#ifdef HS_CUDA_EMULATED
#include "kernels/cuda/emulate_runtime.h"
#else
#include <cuda_runtime_api.h>
#endif

#endif
