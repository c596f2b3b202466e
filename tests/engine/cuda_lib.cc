/* What the tests of the emulated CUDA kernels call through ctypes (tests/engine/cuda_lib.py). Kernels of their own show
 * that the emulator catches what it says it catches. */
#include "kernels/cuda/emulate_runtime.h"
#include "kernels/cuda/libraries.h"
#include "kernels/cuda/tensor.h"

#include <stdlib.h>

enum { SICK_THREADS = 64 };

/* Each does right for kind 0: out[i] = in[(i + 1) % 64] through shared memory, and then the sum of its warp. */
enum {
    SOUND,
    NO_BARRIER,
    HALF_BARRIER,
    HALF_SHUFFLE,
    FOREIGN_LANE,
    UNWRITTEN,
    BEYOND,
    UNALIGNED,
    TWO_BARRIERS
};

__global__ void sick(float *out, const float *in, int kind) {
    HS_SHARED(float, row, [SICK_THREADS]);
    const int t = (int)threadIdx.x;
    if (kind != UNWRITTEN || t != 5) row[t] = in[t];
    if (kind == HALF_BARRIER) {
        if (t < 40) __syncthreads();
    } else if (kind == TWO_BARRIERS) {
        if (t < 32)
            __syncthreads();
        else
            __syncthreads();
    } else if (kind != NO_BARRIER) {
        __syncthreads();
    }
    float x = row[(t + 1) % SICK_THREADS + (kind == BEYOND ? SICK_THREADS : 0)];
    if (kind == HALF_SHUFFLE) {
        if (t % 32 < 16) x += __shfl_xor_sync(0xffffffffu, x, 8);
    } else if (kind == FOREIGN_LANE) {
        if (t % 32 < 16) x += __shfl_xor_sync(0x0000ffffu, x, 16);
    } else {
        for (int bits = 16; bits; bits /= 2) x += __shfl_xor_sync(0xffffffffu, x, bits);
    }
    if (kind == UNALIGNED) {
        const lanes<4> v = load<4>(in + 1, 4, true);
        x += v.x[0];
    }
    out[t] = x;
}

extern "C" int hs_test_sick(float *out, const float *in, int kind) {
    cudaStream_t stream = NULL;
    return HS_LAUNCH(sick, 1, SICK_THREADS, stream, out, in, kind);
}

/* One mma of a 16 x 16 and a 16 x 8 matrix, both through ldmatrix, which reads a [row][k] and b as [column][k] or, turned,
 * as [k][column]; waits or not for the copies. */
enum { MMA_TURNED = 1, MMA_HASTY = 2, MMA_LEAVES = 4 };

__global__ void one_mma(float *out, const bf16 *a, const bf16 *b, int how) {
    HS_DYNAMIC_SHARED(memory);
    bf16 *shared_a = reinterpret_cast<bf16 *>(memory), *shared_b = shared_a + 16 * 16;
    const int lane = lane_id();
    hs_copy16(shared_a + 8 * lane, a + 8 * lane, true);
    hs_copies_end();
    if (lane < 16) hs_copy16(shared_b + 8 * lane, b + 8 * lane, true);
    hs_copies_end();
    if (how & MMA_HASTY)
        hs_copies_wait<1>(); /* a alone */
    else
        hs_copies_wait<0>();
    __syncwarp();
    uint32_t x[4], y[2];
    hs_ldmatrix(x, shared_a + lane % 16 * 16 + lane / 16 * 8);
    if (how & MMA_TURNED)
        hs_ldmatrix_trans(y, shared_b + lane % 16 * 8);
    else
        hs_ldmatrix(y, shared_b + lane % 8 * 16 + lane / 8 % 2 * 8);
    float c[4] = {1, 2, 3, 4}; /* by place in the fragment */
    hs_mma(c, x, y);
    for (int i = 0; i < 4; i++) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = c[i];
    if (!(how & MMA_LEAVES)) hs_copies_wait<0>();
}

extern "C" int hs_test_mma(float *out, const void *a, const void *b, int how, int shared_bytes) {
    cudaStream_t stream = NULL;
    return HS_LAUNCH_SHARED(one_mma, 1, 32, (size_t)shared_bytes, stream, out,
                            static_cast<const bf16 *>(a), static_cast<const bf16 *>(b), how);
}

extern "C" void hs_test_two_to(float *x, int64_t n, float c) {
    for (int64_t i = 0; i < n; i++) x[i] = two_to(x[i], c);
}

/* A device has one. */
static void *workspace() {
    static void *at;
    if (!at) at = aligned_alloc(256, HS_CUDA_WORKSPACE);
    return at;
}

/* Of the device that products are for. */
extern "C" uint32_t hs_test_capability, hs_test_processors;
uint32_t hs_test_capability = 90, hs_test_processors = 1;

extern "C" int hs_test_cuda(uint32_t path, uint32_t kernel, uint32_t dtype, void *const *ptrs,
                            const int64_t *dims, const double *reals) {
    const hs_cuda_table *table = hs_cuda_kernels();
    if (table->version != HS_CUDA_VERSION || kernel == 0 || kernel >= table->count) return 1;
    hs_args args = {};
    args.dtype = dtype;
    memcpy(args.ptr, ptrs, sizeof args.ptr);
    memcpy(args.dim, dims, sizeof args.dim);
    memcpy(args.real, reals, sizeof args.real);
    hs_cuda_ctx ctx = {};
    ctx.path = path;
    ctx.processors = hs_test_processors;
    ctx.workspace = workspace(), ctx.workspace_bytes = HS_CUDA_WORKSPACE;
    return table->fn[kernel](&ctx, &args);
}

/* A call under path cuda, by the algorithms in `list`, *count of them; run 0: instead, what would be chosen for its
 * products beside them, into list. why: 1,024 bytes. */
extern "C" int hs_test_products(uint32_t kernel, uint32_t dtype, void *const *ptrs,
                                const int64_t *dims, const double *reals, hs_algorithm *list,
                                uint32_t *count, int run, char *text) {
    hs_args args = {};
    args.dtype = dtype;
    memcpy(args.ptr, ptrs, sizeof args.ptr);
    memcpy(args.dim, dims, sizeof args.dim);
    memcpy(args.real, reals, sizeof args.real);
    hs_why why = {};
    hs_cuda_ctx ctx = {};
    ctx.path = HS_PATH_CUDA;
    ctx.capability = hs_test_capability;
    ctx.processors = hs_test_processors;
    ctx.why = &why;
    ctx.workspace = workspace();
    ctx.workspace_bytes = HS_CUDA_WORKSPACE;
    const uint32_t known = *count;
    hs_status st = hs_products_create("emulated", hs_test_capability, &ctx.products, &why);
    if (st == HS_OK) st = hs_products_need(ctx.products, &ctx, (uint16_t)kernel, &args, &why);
    if (st == HS_OK) st = hs_products_use(ctx.products, list, known, &why);
    if (st == HS_OK && run) st = hs_cuda_kernels()->fn[kernel](&ctx, &args);
    if (st == HS_OK && !run) {
        *count = hs_products_missing(ctx.products);
        st = hs_products_choose(ctx.products, &ctx, list, &why);
    }
    hs_products_destroy(ctx.products);
    memcpy(text, why.text, sizeof why.text);
    return st;
}

/* With so many bytes of dynamic shared memory beside its own. */
extern "C" int hs_test_beside(float *out, const float *in, uint64_t bytes) {
    cudaStream_t stream = NULL;
    return HS_LAUNCH_SHARED(sick, 1, SICK_THREADS, (size_t)bytes, stream, out, in, SOUND);
}

/* What CUDA says to: 0 work on a stream, 1 a question to an event, 2 an event's record, of a device that this thread
 * has turned away from; 3 a copy to host memory of which the first page is pinned, 4 from it; 5 the pinning of half a
 * page whose other half is pinned. Two devices. */
extern "C" int hs_test_refused(int what) {
    enum { PAGE = 4096 };
    static char *const at = static_cast<char *>(aligned_alloc(PAGE, 4 * PAGE));
    cudaStream_t stream;
    cudaEvent_t event;
    void *memory;
    if (cudaSetDevice(1) || cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, 0) ||
        cudaEventCreateWithFlags(&event, cudaEventDisableTiming) || cudaMalloc(&memory, 2 * PAGE))
        return -1;
    if (what <= 2 && cudaSetDevice(0)) return -1;
    if (what >= 3 && cudaHostRegister(at, PAGE / 2 * (what < 5 ? 2 : 1), cudaHostRegisterDefault))
        return -1;
    const cudaError_t found =
        what == 0   ? cudaMemsetAsync(memory, 0, PAGE, stream)
        : what == 1 ? cudaEventQuery(event)
        : what == 2 ? cudaEventRecord(event, stream)
        : what == 3 ? cudaMemcpyAsync(at, memory, 2 * PAGE, cudaMemcpyDeviceToHost, stream)
        : what == 4 ? cudaMemcpyAsync(memory, at, 2 * PAGE, cudaMemcpyHostToDevice, stream)
                    : cudaHostRegister(at + PAGE / 2, PAGE / 2, cudaHostRegisterDefault);
    if (what >= 3) (void)cudaHostUnregister(at);
    (void)cudaSetDevice(0);
    return found;
}

/* A page of the host's, or of a device's. */
extern "C" void *hs_test_memory(int of_device) {
    void *at = NULL;
    const cudaError_t error =
        of_device ? cudaMalloc(&at, 4096) : cudaHostAlloc(&at, 4096, cudaHostAllocDefault);
    return error == cudaSuccess ? at : NULL;
}
