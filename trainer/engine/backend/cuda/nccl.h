/* NCCL, opened when a gang first needs it (libnccl.so.2, of the wheel nvidia-nccl-cu13). What is
 * declared here is what nccl.h of 2.28.9 says; calls are those that 2.14 (non-blocking
 * communicators) and all since have. In the tests its place takes an emulation (emulate_nccl.cc). */
#ifndef HS_BACKEND_CUDA_NCCL_H
#define HS_BACKEND_CUDA_NCCL_H

#include <limits.h>
#include <stddef.h>

#include "kernels/cuda/runtime.h"

extern "C" {
#include "core/status.h"
}

struct ncclComm; /* the library's */

namespace nccl {

enum result {
    SUCCESS = 0,
    UNHANDLED_CUDA_ERROR = 1,
    SYSTEM_ERROR = 2,
    INTERNAL_ERROR = 3,
    INVALID_ARGUMENT = 4,
    INVALID_USAGE = 5,
    REMOTE_ERROR = 6,
    IN_PROGRESS = 7
};

enum {
    ID_BYTES = 128,
    INT8 = 0,
    UNDEFINED = INT_MIN,
    OLDEST = 21800 /* 2.18: of this config's form */
};

typedef ncclComm *comm;

struct id {
    char bytes[ID_BYTES];
};

/* ncclConfig_t grows at its end; size and version say how much of it there is. This is as far as
 * 2.18 has it, which all newer ones take. */
struct config {
    size_t size;
    unsigned magic;   /* MAGIC */
    unsigned version; /* whose form it has */
    int blocking;
    int cga_cluster_size;
    int min_ctas, max_ctas;
    const char *net_name;
    int split_share;
};

enum : unsigned { MAGIC = 0xcafebeef };

/* result name(parameters): X(result, Name, (parameters)) */
#define HS_NCCL(X)                                                                                 \
    X(result, GetVersion, (int *version))                                                          \
    X(result, GetUniqueId, (id * made))                                                            \
    X(result, CommInitRankConfig, (comm * made, int ranks, id name, int rank, config *how))        \
    X(result, CommGetAsyncError, (comm c, result * error))                                         \
    X(result, CommFinalize, (comm c))                                                              \
    X(result, CommDestroy, (comm c))                                                               \
    X(result, CommAbort, (comm c))                                                                 \
    X(result, Send, (const void *from, size_t count, int type, int peer, comm c, cudaStream_t s))  \
    X(result, Recv, (void *to, size_t count, int type, int peer, comm c, cudaStream_t s))          \
    X(result, GroupStart, (void))                                                                  \
    X(result, GroupEnd, (void))                                                                    \
    X(const char *, GetErrorString, (result error))                                                \
    X(const char *, GetLastError, (comm c))

struct api {
    int version; /* 22809: 2.28.9 */
#define X(kind, name, parameters) kind(*name) parameters;
    HS_NCCL(X)
#undef X
};

/* HS_E_UNSUPPORTED: it is not here, or too old; why says what brings it. */
hs_status open(api *out, hs_why *why);

} // namespace nccl

#endif
