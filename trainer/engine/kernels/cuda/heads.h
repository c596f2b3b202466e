/* Operands of attention: where a head's rows lie. For attention.cu and flash.h. */
#ifndef HS_KERNELS_CUDA_HEADS_H
#define HS_KERNELS_CUDA_HEADS_H

#include "kernels/cuda/lane.h"

#include "kernels/attention.h"

/* One head of one sequence: T rows, ld apart, D wide. */
template <typename T> struct head {
    T *p;
    int64_t ld;
};

struct shape {
    int64_t T, H, G, D, tiles;
    float scale;
    bool wide;
    const int32_t *first; /* of attention.h, as the window; NULL and 0: rows read all before them */
    int64_t window;
};

template <typename T>
HS_DEVICE head<T> head_of(T *p, int64_t ld, const shape &s, int64_t b, int64_t h) {
    return head<T>{p + b * s.T * ld + h * s.D, ld};
}

/* The first key that row t of sequence b reads. */
template <typename S> HS_DEVICE int64_t low_of(const S &s, int64_t b, int64_t t) {
    return hs_first_read(s.first, b * s.T + t, t, s.window);
}

/* What a running maximum begins with. LEAST where a tile may come before a row's first key: a masked
 * score less it is no NaN. */
template <typename S> HS_DEVICE float least_of(const S &s) {
    return s.first || s.window ? -3.40282347e38f : -INFINITY;
}

/* Operands with their row distances. */
template <typename T> struct operand {
    T *p;
    int64_t ld;
};

template <typename T> static operand<T> operand_of(void *p, int64_t ld) {
    return operand<T>{static_cast<T *>(p), ld};
}
template <typename T> static bool wide_rows(operand<T> x, int64_t D) {
    return wide_at(x.p, x.ld) && wide_at(x.p, D);
}

/* attention.cu: a.delta, by which the gradients of both begin. */
hs_status hs_cuda_attention_delta(cudaStream_t stream, const hs_attention_igrad_args &a);
/* flash_fwd.cu, flash_igrad.cu: bf16 on tensor cores. Which calls they take (largest: of T and the
 * distances of rows); others are attention.cu's. */
bool hs_cuda_flash_takes(int64_t D, double scale, int64_t largest);
hs_status hs_cuda_flash_fwd(cudaStream_t stream, const hs_attention_fwd_args &a);
hs_status hs_cuda_flash_igrad(cudaStream_t stream, const hs_attention_igrad_args &a);

#endif
