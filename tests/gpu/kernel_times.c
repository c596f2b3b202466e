/* When each kernel of a process ran on the device, by CUPTI: the driver loads this library into the engine where
 * CUDA_INJECTION64_PATH names it (tests/gpu/kernel_times.py). At the end of the process the file that HS_KERNEL_TIMES names
 * gets a line a kernel: begin and end in ns, name. HS_KERNEL_RECORD is the newest record of the header that this is
 * compiled with. */
#include <cupti.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { BUFFER_BYTES = 8 << 20 };

static FILE *out;

static void told(const char *what, CUptiResult result) {
    const char *text = NULL;
    if (result == CUPTI_SUCCESS) return;
    cuptiGetResultString(result, &text);
    fprintf(stderr, "kernel_times: %s: %s\n", what, text ? text : "no reason");
}

static void CUPTIAPI give(uint8_t **buffer, size_t *size, size_t *most) {
    *buffer = aligned_alloc(64, BUFFER_BYTES);
    *size = *buffer ? BUFFER_BYTES : 0;
    *most = 0;
}

static void CUPTIAPI take(CUcontext context, uint32_t stream, uint8_t *buffer, size_t size,
                          size_t valid) {
    (void)context, (void)stream, (void)size;
    CUpti_Activity *record = NULL;
    while (out && cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
        if (record->kind != CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL &&
            record->kind != CUPTI_ACTIVITY_KIND_KERNEL)
            continue;
        const HS_KERNEL_RECORD *const kernel = (const HS_KERNEL_RECORD *)record;
        fprintf(out, "%llu %llu %s\n", (unsigned long long)kernel->start,
                (unsigned long long)kernel->end, kernel->name ? kernel->name : "?");
    }
    free(buffer);
}

static void at_end(void) {
    told("flush", cuptiActivityFlushAll(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED));
    if (out) fclose(out);
    out = NULL;
}

int InitializeInjection(void);

int InitializeInjection(void) {
    const char *const path = getenv("HS_KERNEL_TIMES");
    out = path ? fopen(path, "w") : NULL;
    if (!out) return 0;
    told("callbacks", cuptiActivityRegisterCallbacks(give, take));
    told("kernels", cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL));
    atexit(at_end);
    return 1;
}
