/* Several calls of a kernel as one launch: the blocks of call 0, then those of call 1, ... What is small costs a
 * launch's latency once, and not each. */
#ifndef HS_KERNELS_CUDA_TOGETHER_H
#define HS_KERNELS_CUDA_TOGETHER_H

#include "kernels/cuda/device.h"

/* A kernel's argument: const __grid_constant__ calls<Call>, of which a launch may have 4 KiB in all. */
template <typename Call> struct calls {
    uint32_t count, blocks;           /* of the launch */
    uint32_t first[HS_CUDA_TOGETHER]; /* block of each */
    Call call[HS_CUDA_TOGETHER];
};

/* One more, of so many blocks. */
template <typename Call>
static inline void add_call(calls<Call> &c, const Call &call, int64_t blocks) {
    c.first[c.count] = c.blocks;
    c.call[c.count++] = call;
    c.blocks += (uint32_t)blocks;
}

/* The call that this block works on, and its number there. */
template <typename Call> HS_DEVICE uint32_t call_of_block(const calls<Call> &c, int64_t &block) {
    uint32_t low = 0, high = c.count - 1;
    while (low < high) {
        const uint32_t middle = (low + high + 1) / 2;
        if (c.first[middle] <= blockIdx.x)
            low = middle;
        else
            high = middle - 1;
    }
    block = blockIdx.x - c.first[low];
    return low;
}

/* hs_cuda_<name>_together from name##_op<T>(stream, args, count), and hs_cuda_<name>: one call of it. */
#define HS_CUDA_TOGETHER_OP(name)                                                                  \
    extern "C" hs_status hs_cuda_##name##_together(const hs_cuda_ctx *ctx, const hs_args *args,    \
                                                   uint32_t count) {                               \
        const cudaStream_t stream = static_cast<cudaStream_t>(ctx->stream);                        \
        if (args->dtype == HS_F32) return name##_op<float>(stream, args, count);                   \
        if (args->dtype == HS_BF16) return name##_op<bf16>(stream, args, count);                   \
        return HS_E_CONFIG;                                                                        \
    }                                                                                              \
    extern "C" hs_status hs_cuda_##name(const hs_cuda_ctx *ctx, const hs_args *args) {             \
        return hs_cuda_##name##_together(ctx, args, 1);                                            \
    }

#endif
