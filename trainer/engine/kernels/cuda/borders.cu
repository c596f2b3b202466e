/* Where documents begin: a block a sequence. Thread by thread a chunk of places, then the last end
 * token before each chunk, handed on from chunk to chunk. */
#include "kernels/cuda/device.h"

#include "kernels/borders.h"

enum { CHUNKS = 256 };

__global__ void __launch_bounds__(CHUNKS)
    borders(int32_t *first, const int32_t *tok, int64_t T, int64_t end) {
    HS_SHARED(int64_t, start, [CHUNKS]);
    const int64_t each = (T + CHUNKS - 1) / CHUNKS, from = (int64_t)threadIdx.x * each;
    const int64_t to = from + each < T ? from + each : T, row = (int64_t)blockIdx.x * T;
    int64_t last = 0; /* the place after the last end token of the chunk; 0: it has none */
    for (int64_t t = from; t < to; t++)
        if (tok[row + t] == end) last = t + 1;
    start[threadIdx.x] = last;
    __syncthreads();
    last = 0;
    for (int i = (int)threadIdx.x - 1; i >= 0 && !last; i--) last = start[i];
    for (int64_t t = from; t < to; t++) {
        first[row + t] = (int32_t)last;
        if (tok[row + t] == end) last = t + 1;
    }
}

extern "C" hs_status hs_cuda_borders(const hs_cuda_ctx *ctx, const hs_args *args) {
    const hs_borders_args a = hs_borders_args_of(args);
    if (args->dtype != HS_F32 && args->dtype != HS_BF16) return HS_E_CONFIG;
    return HS_LAUNCH(borders, (unsigned)a.B, CHUNKS, static_cast<cudaStream_t>(ctx->stream),
                     static_cast<int32_t *>(a.first), static_cast<const int32_t *>(a.tok), a.T,
                     a.END);
}
