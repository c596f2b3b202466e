/* A CUDA device behind the table of backend/backend.h; what its sources share. Host code here calls
 * the CUDA runtime alone, checks every status, and keeps the first failure (failed). */
#ifndef HS_BACKEND_CUDA_DEVICE_H
#define HS_BACKEND_CUDA_DEVICE_H

#include <pthread.h>

#include "kernels/cuda/runtime.h"

extern "C" {
#include "backend/backend.h"
#include "kernels/cuda/cuda.h"
}

namespace hs_cuda {

enum { OLDEST = 80 }; /* compute capability 8.0 */

/* What was put on a stream last. */
enum what { NOTHING, KERNEL, TO_DEVICE, FROM_DEVICE, ON_DEVICE, GRAPH };
struct doing {
    int stream;
    what is;
    uint16_t kernel; /* HS_K_* of KERNEL */
};

} // namespace hs_cuda

struct hs_graph {
    cudaGraphExec_t exec;
    hs_graph *next;
};

struct hs_device {
    int index;
    char name[96];
    int processors;
    const hs_cuda_table *table;
    hs_cuda_ctx kernels; /* stream and why are each call's */
    cudaStream_t streams[HS_STREAMS];
    cudaEvent_t events[HS_EVENTS];
    void *memory[HS_DEVICE_ARENAS]; /* of both kinds */
    bool of_host[HS_DEVICE_ARENAS];
    int memories;
    void *pins[HS_DEVICE_PINS];
    int pin_count;
    hs_graph *graphs;
    int capturing;      /* the stream; -1: none */
    bool one_at_a_time; /* HOTSTAGE_CUDA_SYNC: waits after every call, so that a failure names its
                         * kernel */
    hs_cuda::doing last[HS_STREAMS], before[HS_EVENTS];

    /* other threads may wait too */
    pthread_mutex_t lock;
    hs_status status; /* the first failure, for good */
    hs_why why;
};

namespace hs_cuda {

/* What a CUDA error is to the engine: HS_E_MEMORY, HS_E_UNSUPPORTED, HS_E_BUG (a call that CUDA
 * refuses, a kernel that went wrong), else HS_E_DEVICE. */
hs_status status_of(cudaError_t error);
/* A failure for good: in the device's own words, and at what. Forgets the runtime's last error. */
hs_status failed(hs_device *d, cudaError_t error, const doing *at, const char *action, hs_why *why);
/* What the device itself says after a call was refused: a failure that stays shows in any call that looks at
 * it. In a capture nothing may look. Forgets the runtime's last error. */
cudaError_t error_of(const hs_device *d);
/* HS_OK, or the failure that stays. */
hs_status sound(hs_device *d, hs_why *why);
/* The runtime keeps a device a thread; another thread's is device 0, which no call here may wake. */
hs_status here(hs_device *d, hs_why *why);

hs_status devices(hs_device_facts *list, uint32_t room, uint32_t *count, hs_why *why);
hs_status open(const hs_device_config *config, hs_device **device, hs_device_facts *facts,
               hs_why *why);
void close(hs_device *device);
hs_status check(hs_device *device, uint8_t *at, size_t bytes, hs_check *check, hs_why *why);
extern const struct hs_product_table products;

} // namespace hs_cuda

#endif
