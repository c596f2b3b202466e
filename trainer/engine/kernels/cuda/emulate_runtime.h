/* The CUDA runtime API as far as we use it, on the CPU: same names, same numbers, NVIDIA's contracts
 * (cuda_runtime_api.h) at their least promising.
 *
 *   memory    Of a device: a mapping that nobody may touch but while the device works; a host that
 *             does dies of SIGSEGV. It lies in a memfd, so that other processes can be given it. What
 *             a stream's copy names must be the device's, or the host's, as its kind says.
 *   work      is queued; it runs inside of waits and queries alone, in an order of
 *             HS_EMULATED_ORDER that the events allow: 0..23, which of the first four streams goes
 *             first, second, ... where several may go; from 24 on, any, by that seed. A wait runs
 *             nothing beyond what it is for; a query runs some pieces at most, and may leave what it asks for undone.
 *   copies    To the host: where they will land is garbage (0xff) from the call on. To the device:
 *             what the host changes between call and copy is a fault. Host memory of which a part is
 *             pinned is refused.
 *   capture   takes kernels and copies between device memories; all else on that stream, and what
 *             CUDA forbids beside a capture (allocation), makes it fail, as there. So does a kernel
 *             that was not launched before: the driver would have to load it, and may not. So does a
 *             thread that captures and asks or waits for anything meanwhile, of whatever stream.
 *   threads   A thread works with streams and events of the device that it turned to (cudaSetDevice): with those of
 *             another one NVIDIA's runtime would refuse it, or wake device 0 for it.
 *   errors    A fault of a kernel (emulate.h) or of a copy shows as the device's: it stays, and every
 *             later call that touches the device returns it. Others are forgotten by
 *             cudaGetLastError; cudaErrorNotReady is remembered too, as NVIDIA's does. The last error is
 *             what a call of this thread has returned: nobody is told of a fault who has not asked.
 *
 * Switches, read once: HS_EMULATED_DRIVER, the driver's version (0: none; 13000), _DEVICES (1),
 * _CAPABILITY (90), _MEMORY, in bytes (8 GiB), of which _FREE are free at first (all),
 * _MODE: the compute mode, 2 (prohibited) or 3 (exclusive-process, and another one has it): no process gets the device,
 * _PIN=CODE: the host lets no memory be registered, with that cudaError_t,
 * _FAIL="N CODE": the N-th kernel (from 1) ends with that cudaError_t (700), _FLIP="N P B": after
 * the N-th kernel a bit of byte B of the P-th device memory (from 0) is another. One process at a time
 * knows what it took of a device's memory itself. Any thread may call. */
#ifndef HS_KERNELS_CUDA_EMULATE_RUNTIME_H
#define HS_KERNELS_CUDA_EMULATE_RUNTIME_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/cuda/emulate.h"

#define CUDA_IPC_HANDLE_SIZE 64
typedef struct cudaIpcMemHandle_st {
    char reserved[CUDA_IPC_HANDLE_SIZE];
} cudaIpcMemHandle_t;
enum { cudaIpcMemLazyEnablePeerAccess = 1 };
enum cudaDeviceAttr { cudaDevAttrComputeMode = 20, cudaDevAttrIpcEventSupport = 125 };
enum cudaComputeMode {
    cudaComputeModeDefault = 0,
    cudaComputeModeProhibited = 2,
    cudaComputeModeExclusiveProcess = 3
};
enum { cudaEnableDefault = 0 };
enum cudaDriverEntryPointQueryResult {
    cudaDriverEntryPointSuccess = 0,
    cudaDriverEntryPointSymbolNotFound = 1
};

typedef enum cudaError {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDevicePointer = 17,
    cudaErrorInvalidMemcpyDirection = 21,
    cudaErrorStubLibrary = 34,
    cudaErrorInsufficientDriver = 35,
    cudaErrorCallRequiresNewerDriver = 36,
    cudaErrorDevicesUnavailable = 46,
    cudaErrorInvalidDeviceFunction = 98,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorInvalidKernelImage = 200,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorECCUncorrectable = 214,
    cudaErrorInvalidPtx = 218,
    cudaErrorJitCompilerNotFound = 221,
    cudaErrorUnsupportedPtxVersion = 222,
    cudaErrorJitCompilationDisabled = 223,
    cudaErrorContained = 226,
    cudaErrorOperatingSystem = 304,
    cudaErrorInvalidResourceHandle = 400,
    cudaErrorIllegalState = 401,
    cudaErrorMapBufferObjectFailed = 205,
    cudaErrorNotReady = 600,
    cudaErrorIllegalAddress = 700,
    cudaErrorLaunchOutOfResources = 701,
    cudaErrorLaunchTimeout = 702,
    cudaErrorAssert = 710,
    cudaErrorHostMemoryAlreadyRegistered = 712,
    cudaErrorHostMemoryNotRegistered = 713,
    cudaErrorHardwareStackError = 714,
    cudaErrorIllegalInstruction = 715,
    cudaErrorMisalignedAddress = 716,
    cudaErrorInvalidAddressSpace = 717,
    cudaErrorInvalidPc = 718,
    cudaErrorLaunchFailure = 719,
    cudaErrorNotPermitted = 800,
    cudaErrorNotSupported = 801,
    cudaErrorCompatNotSupportedOnDevice = 804,
    cudaErrorMpsConnectionFailed = 805,
    cudaErrorMpsServerNotReady = 807,
    cudaErrorMpsMaxClientsReached = 808,
    cudaErrorMpsMaxConnectionsReached = 809,
    cudaErrorStreamCaptureUnsupported = 900,
    cudaErrorStreamCaptureInvalidated = 901,
    cudaErrorStreamCaptureMerge = 902,
    cudaErrorStreamCaptureUnmatched = 903,
    cudaErrorStreamCaptureUnjoined = 904,
    cudaErrorStreamCaptureIsolation = 905,
    cudaErrorStreamCaptureImplicit = 906,
    cudaErrorCapturedEvent = 907,
    cudaErrorStreamCaptureWrongThread = 908,
    cudaErrorUnknown = 999
} cudaError_t;

enum cudaMemcpyKind {
    cudaMemcpyHostToDevice = 1,
    cudaMemcpyDeviceToHost = 2,
    cudaMemcpyDeviceToDevice = 3
};
enum { cudaStreamNonBlocking = 1 };
enum { cudaEventBlockingSync = 1, cudaEventDisableTiming = 2 };
enum { cudaHostAllocDefault = 0, cudaHostRegisterDefault = 0 };
enum cudaStreamCaptureMode {
    cudaStreamCaptureModeGlobal = 0,
    cudaStreamCaptureModeThreadLocal = 1,
    cudaStreamCaptureModeRelaxed = 2
};

typedef struct hs_emulated_event *cudaEvent_t;
typedef struct hs_emulated_graph *cudaGraph_t, *cudaGraphExec_t;

typedef struct CUuuid_st {
    char bytes[16];
} cudaUUID_t;

/* Of NVIDIA's many fields, ours. */
struct cudaDeviceProp {
    char name[256];
    cudaUUID_t uuid;
    size_t totalGlobalMem;
    int major, minor, multiProcessorCount;
};

cudaError_t cudaDriverGetVersion(int *version);
cudaError_t cudaRuntimeGetVersion(int *version);
cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device);
cudaError_t cudaDeviceGetPCIBusId(char *id, int room, int device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaMemGetInfo(size_t *free, size_t *total);
cudaError_t cudaDeviceSynchronize(void);

const char *cudaGetErrorName(cudaError_t error);
const char *cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError(void);
cudaError_t cudaPeekAtLastError(void);

cudaError_t cudaMalloc(void **at, size_t bytes);
cudaError_t cudaFree(void *at);
cudaError_t cudaHostAlloc(void **at, size_t bytes, unsigned flags);
cudaError_t cudaFreeHost(void *at);
cudaError_t cudaHostRegister(void *at, size_t bytes, unsigned flags);
cudaError_t cudaHostUnregister(void *at);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);
cudaError_t cudaMemsetAsync(void *at, int value, size_t bytes, cudaStream_t stream);

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest);
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamQuery(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventSynchronize(cudaEvent_t event);

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph,
                                 unsigned long long flags);
cudaError_t cudaGraphUpload(cudaGraphExec_t exec, cudaStream_t stream);
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec);

/* emulate_share.cc */
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version,
                                             unsigned long long flags,
                                             cudaDriverEntryPointQueryResult *answer = NULL);
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *at);
cudaError_t cudaIpcOpenMemHandle(void **at, cudaIpcMemHandle_t handle, unsigned flags);
cudaError_t cudaIpcCloseMemHandle(void *at);

namespace hs_emulated {

/* Host code as work of a stream, as a kernel of that name is: a copy of the closure's bytes is kept
 * until it has run, perhaps more than once (graphs). It returns 0, or faults. */
int enqueue(cudaStream_t stream, const char *name, int (*body)(void *), const void *closure,
            size_t bytes);
/* Whether all of these bytes are memory of a device that this process may touch from one. */
bool on_device(const void *at, size_t bytes);

/* For emulate_share.cc and the emulated NCCL. Work that waits for other processes: it runs when `ready`
 * says so, which is asked again and again, memory of the device being open; neither counts as a
 * kernel. */
int enqueue_when(cudaStream_t stream, bool (*ready)(void *), int (*body)(void *),
                 const void *closure, size_t bytes);
/* Called when the device has nothing that it may run, or a wait is done. One in all. */
void when_idle(void (*fn)());
/* Of work that runs: whether memory of the device is this process's. */
bool is_own(const void *at);
/* The allocation in which `at` lies, and its memfd; not what was adopted. */
bool find_memory(const void *at, void **base, size_t *bytes, int *fd);
/* Another process's memory as this device's, and the end of that; NULL, false: no room, none. */
void *adopt(int fd, size_t bytes);
bool disown(void *base);
/* The thread's last error: a library has a runtime of its own, and leaves ours as it was. */
void leave_last_error(cudaError_t error);
/* A call of the API that failed, remembered for cudaGetLastError; what every call says first. */
cudaError_t call_failed(cudaError_t error);
cudaError_t call_allowed();
/* HS_EMULATED_MODE. */
int compute_mode();

} // namespace hs_emulated

/* Bytes that were copied so far from or to memory of the host that is not pinned: a GPU would have
 * kept the host waiting. */
extern "C" uint64_t hs_emulated_unpinned(void);
/* The device fails now, and nobody was told. */
extern "C" void hs_emulated_fail(int error);

#endif
