/* CUDA as far as our kernels use it, on the CPU: the same .cu source compiled as C++ with
 * HS_CUDA_EMULATED (kernels/cuda/device.h includes this file in place of NVIDIA's).
 *
 * What it models
 *   threads    A block's threads are fibers. They run one after another, in an order that a seed
 *              fixes (mixed anew at every barrier; all threads, or warp by warp), each as far ahead
 *              of the others as it can get: no more is promised on a GPU, and what a kernel
 *              assumes beyond that comes out wrong here. Blocks run one after another, in a seeded
 *              order too.
 *   barriers   __syncthreads is passed when every thread of the block stands at that very call. A
 *              thread that has returned, or stands at another call, is a fault.
 *   warps      32 threads. A shuffle, ballot or __syncwarp is passed when every lane of its mask
 *              stands at that very call. A mask without the caller, a lane that the block does not
 *              have, a source lane outside the mask are faults.
 *   shared     HS_SHARED arrays and a launch's dynamic shared memory are full of NaN bytes when a
 *              block begins: what is read before it is written shows. Under the address sanitizer
 *              each stands between red zones. A block may have what an architecture gives it.
 *   tensor     mma and ldmatrix (tensor.h) are passed by a whole warp at that very call; fragments
 *   cores      lie as the PTX manual says. A product of an mma adds k ascending to its accumulator,
 *              rounded each time; a GPU's tensor cores round in ways that nobody states, so that
 *              bits of a kernel with mma are compared on one kind of device alone. Bank conflicts
 *              of ldmatrix are counted.
 *   copies     cp.async (tensor.h): the target is NaN bytes from the call to the wait that covers
 *              its group, and the source is read at that wait. A thread that returns with a copy in
 *              flight is a fault.
 *   accesses   of 16 bytes must be aligned, as on a GPU.
 *   numbers    f32 and f64 as IEEE says, no contraction, no flushing: compile with
 *              -ffp-contract=off, and nvcc with -fmad=false (`make cuda` and the tests do).
 *   launches   on no stream run at once; on a stream when its turn comes (emulate_runtime.h).
 *
 * What it does not: time, caches, occupancy, races on global memory between blocks.
 *
 * A fault ends the launch with HS_E_BUG and a sentence (hs_emulated_text) that names kernel, block,
 * threads and the place in the source. One launch at a time in a process; x86-64 and aarch64.
 */
#ifndef HS_KERNELS_CUDA_EMULATE_H
#define HS_KERNELS_CUDA_EMULATE_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct __nv_bfloat16 {
    uint16_t bits;
};
typedef struct hs_emulated_stream *cudaStream_t;

namespace hs_emulated {

/* Of the thread that runs. */
extern uint3 thread_at, block_at;
extern dim3 block_size, grid_size;

struct site {
    const char *file;
    int line;
};

enum warp_op { SYNC, BALLOT, SHUFFLE, SHUFFLE_XOR, SHUFFLE_DOWN, MMA, LDMATRIX };
/* What a whole warp does at once, from the records of its 32 lanes. */
typedef void (*together_fn)(void *const *lanes);

void barrier(site at);
/* What the lanes of the mask give each other; `with` is the lane, the bits or the distance. */
uint64_t exchange(site at, warp_op op, unsigned mask, uint64_t value, unsigned with);
void together(site at, warp_op op, together_fn does, void *record);
void shared(void *at, size_t bytes);
void *dynamic_shared();
void aligned16(const void *p, site at);
/* bytes 4 or 16, of which `there` are read and the rest is zero */
void copy_async(site at, void *to, const void *from, unsigned bytes, unsigned there);
void copy_commit();
void copy_wait(site at, int left); /* for all groups but the `left` youngest */
int launch(const char *kernel, dim3 grid, dim3 block, size_t dynamic, void (*body)(void *),
           void *closure);

template <typename Body>
static int launch(const char *kernel, dim3 grid, dim3 block, size_t dynamic, Body body) {
    return launch(
        kernel, grid, block, dynamic, [](void *b) { (*static_cast<Body *>(b))(); }, &body);
}

/* emulate_runtime.h */
int enqueue(cudaStream_t stream, const char *name, int (*body)(void *), const void *closure,
            size_t bytes);

template <typename Body> struct launched {
    const char *kernel;
    dim3 grid, block;
    size_t dynamic;
    Body body;
};

template <typename Body>
static int launch_on(cudaStream_t stream, const char *kernel, dim3 grid, dim3 block, size_t dynamic,
                     Body body) {
    if (!stream) return launch(kernel, grid, block, dynamic, body);
    static_assert(__is_trivially_copyable(Body), "a kernel's arguments are copied as bytes");
    const launched<Body> later = {kernel, grid, block, dynamic, body};
    return enqueue(
        stream, kernel,
        [](void *l) {
            launched<Body> *now = static_cast<launched<Body> *>(l);
            return launch(now->kernel, now->grid, now->block, now->dynamic, now->body);
        },
        &later, sizeof later);
}

template <typename T>
static inline T shuffle(site at, warp_op op, unsigned mask, T value, unsigned with) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    uint64_t word = 0;
    memcpy(&word, &value, sizeof value);
    word = exchange(at, op, mask, word, with);
    memcpy(&value, &word, sizeof value);
    return value;
}

} // namespace hs_emulated

/* For tests. Orders of threads and blocks from now on: */
extern "C" void hs_emulated_seed(uint64_t seed);
/* The last fault; "" where there was none since the seed. */
extern "C" const char *hs_emulated_text(void);
/* Barriers, warp operations and waits that were passed since the seed, the i-th; 0: no more. op: -1
 * __syncthreads, -2 a wait for copies, else a warp_op. */
extern "C" int hs_emulated_site(int i, const char **file, int *line, int *op);
/* From now on these lanes (bits) of every warp walk past this call as if it were not there. line 0:
 * none do. */
extern "C" void hs_emulated_skip(const char *file, int line, uint32_t lanes);

/* Shared memory of a block is what this architecture gives (80, 86, 90 ...); 86, which gives the
 * least of those that we know, where nothing was said. */
extern "C" void hs_emulated_architecture(int capability);
/* ldmatrix calls since the seed whose 8 rows do not lie in 8 different banks of 16 bytes. */
extern "C" uint64_t hs_emulated_conflicts(void);
/* mma since the seed, a warp's as one. */
extern "C" uint64_t hs_emulated_products(void);

#define threadIdx hs_emulated::thread_at
#define blockIdx  hs_emulated::block_at
#define blockDim  hs_emulated::block_size
#define gridDim   hs_emulated::grid_size

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict

#define HS_SHARED(type, name, dims)                                                                \
    static type name dims;                                                                         \
    hs_emulated::shared(&name, sizeof name)
/* One status an expression; grid and block as in <<<>>>. */
#define HS_LAUNCH(kernel, grid, block, stream, ...)                                                \
    hs_emulated::launch_on(stream, #kernel, grid, block, 0, [=] { kernel(__VA_ARGS__); })
/* With dynamic shared memory, of which HS_DYNAMIC_SHARED names the first byte. */
#define HS_LAUNCH_SHARED(kernel, grid, block, bytes, stream, ...)                                  \
    hs_emulated::launch_on(stream, #kernel, grid, block, bytes, [=] { kernel(__VA_ARGS__); })
#define HS_DYNAMIC_SHARED(name)                                                                    \
    unsigned char *const name = static_cast<unsigned char *>(hs_emulated::dynamic_shared())

#define HS_SITE                                                                                    \
    hs_emulated::site {                                                                            \
        file, line                                                                                 \
    }
#define HS_AT const char *file = __builtin_FILE(), int line = __builtin_LINE()

static inline void __syncthreads(HS_AT) {
    hs_emulated::barrier(HS_SITE);
}
static inline void __syncwarp(unsigned mask = 0xffffffffu, HS_AT) {
    hs_emulated::exchange(HS_SITE, hs_emulated::SYNC, mask, 0, 0);
}
static inline unsigned __ballot_sync(unsigned mask, int predicate, HS_AT) {
    return (unsigned)hs_emulated::exchange(HS_SITE, hs_emulated::BALLOT, mask, predicate != 0, 0);
}
template <typename T> static inline T __shfl_sync(unsigned mask, T value, int lane, HS_AT) {
    return hs_emulated::shuffle(HS_SITE, hs_emulated::SHUFFLE, mask, value, (unsigned)lane & 31u);
}
template <typename T> static inline T __shfl_xor_sync(unsigned mask, T value, int bits, HS_AT) {
    return hs_emulated::shuffle(HS_SITE, hs_emulated::SHUFFLE_XOR, mask, value, (unsigned)bits);
}
template <typename T> static inline T __shfl_down_sync(unsigned mask, T value, unsigned by, HS_AT) {
    return hs_emulated::shuffle(HS_SITE, hs_emulated::SHUFFLE_DOWN, mask, value, by);
}

/* Intrinsics: one IEEE operation each. */
static inline float __fdiv_rn(float a, float b) {
    return a / b;
}
static inline float __fsqrt_rn(float a) {
    return sqrtf(a);
}
static inline uint32_t __float_as_uint(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}
static inline float __uint_as_float(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}
static inline uint32_t __umulhi(uint32_t a, uint32_t b) {
    return (uint32_t)((uint64_t)a * b >> 32);
}
static inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}
static inline int __ffs(int x) {
    return __builtin_ffs(x);
}
static inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) {
    return x.bits;
}
static inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t bits) {
    return __nv_bfloat16{bits};
}
/* To nearest even; every NaN becomes 0x7fff, as on a GPU. */
static inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    uint32_t u = __float_as_uint(x);
    if (x != x) return __nv_bfloat16{0x7fff};
    return __nv_bfloat16{(uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}

#endif
