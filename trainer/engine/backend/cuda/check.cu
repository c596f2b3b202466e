/* The check of a device (backend/check.h): every multiprocessor computes a product whose bits are
 * known, as often as blocks of this size fit on it; and units of memory, evenly over the arena, give
 * back what was written, all of them after all were written. */
#include "backend/cuda/device.h"
#include "kernels/cuda/device.h"

#include "backend/sheet.h"
extern "C" {
#include "core/clock.h"
#include "core/hash.h"
}

/* y = x w^T, [ROWS, OUT], each element one chain of fma (kernels/linear.h). */
enum { ROWS = 16, OUT = 64, INNER = 512, OUTPUTS = ROWS * OUT, PER_PROCESSOR = 2 };
enum { UNIT = 2 << 20, UNITS = 128 }; /* more than a GPU's caches hold */

/* CRC-32C of the product; tests/engine/test_check.py computes it anew. */
static const uint32_t SHEET_CUDA = 0x40f61a46;

HS_DEVICE unsigned processor_of_this_block() {
#ifdef HS_CUDA_EMULATED
    return blockIdx.x / PER_PROCESSOR;
#else
    unsigned id;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(id));
    return id;
#endif
}

/* Block b makes the whole product at y[b]. */
__global__ void __launch_bounds__(OUTPUTS)
    check_product(float *y, unsigned *processor, const float *x, const float *w) {
    const int t = (int)threadIdx.x;
    const float *row = x + t / OUT * INNER, *column = w + t % OUT * INNER;
    float sum = 0.0f;
    for (int k = 0; k < INNER; k++) sum = fmaf(row[k], column[k], sum);
    y[(int64_t)blockIdx.x * OUTPUTS + t] = sum;
    if (t == 0) processor[blockIdx.x] = processor_of_this_block();
}

/* A block does a unit of `words`, which lies at blockIdx.x * stride. */
__global__ void __launch_bounds__(OUTPUTS)
    write_pattern(uint64_t *memory, int64_t words, int64_t stride, int pass) {
    for (int64_t i = threadIdx.x; i < words; i += OUTPUTS) {
        const int64_t at = blockIdx.x * stride + i;
        memory[at] = HS_SHEET_PATTERN(at, pass);
    }
}

/* bad[b]: a word of unit b that does not hold. */
__global__ void __launch_bounds__(OUTPUTS)
    read_pattern(int64_t *bad, const uint64_t *memory, int64_t words, int64_t stride, int pass) {
    for (int64_t i = threadIdx.x; i < words; i += OUTPUTS) {
        const int64_t at = blockIdx.x * stride + i;
        if (memory[at] != HS_SHEET_PATTERN(at, pass)) bad[blockIdx.x] = at;
    }
}

namespace hs_cuda {

/* On the device and, with the same layout, on the host. */
struct sheet {
    float x[ROWS * INNER], w[OUT * INNER];
    int64_t bad[UNITS];
    /* then float y[blocks][OUTPUTS], unsigned processor[blocks] */
};

struct exam {
    hs_device *d;
    sheet *device, *host;
    size_t bytes, of_y, of_processor;
    unsigned blocks;
    uint64_t *memory;
    int64_t words, stride;
    unsigned units;
};

static cudaError_t done(const exam *e) {
    const cudaError_t error = cudaPeekAtLastError();
    return error != cudaSuccess ? error : cudaStreamSynchronize(e->d->streams[HS_STREAM_COMPUTE]);
}

static uint8_t *part(sheet *s, size_t offset) {
    return reinterpret_cast<uint8_t *>(s) + offset;
}

static cudaError_t multiply(exam *e, hs_check *check) {
    const cudaStream_t stream = e->d->streams[HS_STREAM_COMPUTE];
    cudaError_t error =
        cudaMemcpyAsync(e->device, e->host, sizeof *e->host, cudaMemcpyHostToDevice, stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
    if (error != cudaSuccess) return error;
    const int64_t began = hs_clock_ns();
    (void)HS_LAUNCH(check_product, e->blocks, OUTPUTS, stream,
                    reinterpret_cast<float *>(part(e->device, e->of_y)),
                    reinterpret_cast<unsigned *>(part(e->device, e->of_processor)), e->device->x,
                    e->device->w);
    error = done(e);
    const int64_t took = hs_clock_ns() - began;
    check->gflops = 2.0 * OUTPUTS * INNER * e->blocks / (double)(took > 0 ? took : 1);
    return error;
}

static cudaError_t write_and_read(exam *e) {
    const cudaStream_t stream = e->d->streams[HS_STREAM_COMPUTE];
    for (int pass = 0; e->units > 0 && pass < 2; pass++) {
        (void)HS_LAUNCH(write_pattern, e->units, OUTPUTS, stream, e->memory, e->words, e->stride,
                        pass);
        (void)HS_LAUNCH(read_pattern, e->units, OUTPUTS, stream, e->device->bad, e->memory,
                        e->words, e->stride, pass);
    }
    cudaError_t error = done(e);
    for (unsigned u = 0; error == cudaSuccess && u < e->units; u++)
        error = cudaMemsetAsync(e->memory + u * e->stride, 0, (size_t)e->words * 8, stream);
    return error;
}

static cudaError_t fetch(exam *e) {
    const cudaError_t error = cudaMemcpyAsync(e->host, e->device, e->bytes, cudaMemcpyDeviceToHost,
                                              e->d->streams[HS_STREAM_COMPUTE]);
    return error == cudaSuccess ? done(e) : error;
}

static hs_status judge(const exam *e, hs_why *why) {
    for (unsigned b = 0; b < e->blocks; b++) {
        const uint8_t *y = part(e->host, e->of_y) + (size_t)b * OUTPUTS * sizeof(float);
        const uint32_t crc = hs_crc32c(0, y, OUTPUTS * sizeof(float));
        if (crc != SHEET_CUDA)
            return hs_fail(
                why, HS_E_SICK,
                "CUDA device %d (%s) computes wrong numbers: multiprocessor %u has a product with "
                "checksum %08x instead of %08x; take the device out of service and test it",
                e->d->index, e->d->name,
                reinterpret_cast<unsigned *>(part(e->host, e->of_processor))[b], crc, SHEET_CUDA);
    }
    for (unsigned u = 0; u < e->units; u++)
        if (e->host->bad[u] >= 0)
            return hs_fail(why, HS_E_SICK,
                           "CUDA device %d (%s): its memory does not hold: word %lld of the arena "
                           "is not what was written; take the device out of service and test it",
                           e->d->index, e->d->name, (long long)e->host->bad[u]);
    return HS_OK;
}

static hs_status examine(exam *e, hs_check *check, hs_why *why) {
    hs_sheet_fill(e->host->x, ROWS * INNER, HS_SHEET_X);
    hs_sheet_fill(e->host->w, OUT * INNER, HS_SHEET_W);
    for (int u = 0; u < UNITS; u++) e->host->bad[u] = -1;
    cudaError_t error = multiply(e, check);
    if (error == cudaSuccess) error = write_and_read(e);
    if (error == cudaSuccess) error = fetch(e);
    if (error != cudaSuccess) return failed(e->d, error, NULL, "checking it", why);
    return judge(e, why);
}

hs_status check(hs_device *d, uint8_t *at, size_t bytes, hs_check *check, hs_why *why) {
    const int64_t began = hs_clock_us();
    const size_t unit = bytes < UNIT ? bytes / 8 * 8 : (size_t)UNIT;
    const size_t there = unit ? bytes / unit : 0;
    exam e = {};
    *check = hs_check{};
    HS_TRY(sound(d, why));
    e.d = d;
    e.blocks = PER_PROCESSOR * (unsigned)d->processors;
    e.of_y = (sizeof(sheet) + 255) / 256 * 256;
    e.of_processor = e.of_y + e.blocks * OUTPUTS * sizeof(float);
    e.bytes = e.of_processor + e.blocks * sizeof(unsigned);
    e.memory = reinterpret_cast<uint64_t *>(at);
    e.words = (int64_t)(unit / 8);
    e.units = (unsigned)(there < UNITS ? there : (size_t)UNITS);
    e.stride = e.units ? (int64_t)(there / e.units * (unit / 8)) : 0;
    void *device = NULL, *host = NULL;
    hs_status st;
    cudaError_t error = cudaMalloc(&device, e.bytes);
    if (error == cudaSuccess) error = cudaHostAlloc(&host, e.bytes, cudaHostAllocDefault);
    e.device = static_cast<sheet *>(device);
    e.host = static_cast<sheet *>(host);
    if (error == cudaErrorMemoryAllocation) {
        (void)cudaGetLastError();
        st = hs_fail(why, HS_E_MEMORY, "no %zu bytes to check CUDA device %d before the first step",
                     e.bytes, d->index);
    } else if (error != cudaSuccess) {
        st = failed(d, error, NULL, "checking it", why);
    } else {
        st = examine(&e, check, why);
    }
    if (device) (void)cudaFree(device);
    if (host) (void)cudaFreeHost(host);
    check->us = hs_clock_us() - began;
    return st;
}

} // namespace hs_cuda
