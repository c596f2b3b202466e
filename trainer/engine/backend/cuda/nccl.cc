/* The library NCCL: where it is found, and its functions. */
#include "backend/cuda/nccl.h"

#ifndef HS_CUDA_EMULATED
#include "kernels/cuda/open_library.h"

#define LIBRARY "libnccl.so.2"
#define MEND                                                                                       \
    "install hotstage[cuda] (it comes in the wheel nvidia-nccl-cu13), or let "                     \
    "HOTSTAGE_CUDA_LIBRARIES name its folder"

hs_status nccl::open(api *out, hs_why *why) {
    void *library = hs_open_library(LIBRARY);
    if (!library) return hs_fail(why, HS_E_UNSUPPORTED, LIBRARY " is not found; " MEND);
#define X(kind, name, parameters)                                                                  \
    *(void **)&out->name = dlsym(library, "nccl" #name);                                           \
    if (!out->name) return hs_fail(why, HS_E_UNSUPPORTED, LIBRARY " has no nccl" #name "; " MEND);
    HS_NCCL(X)
#undef X
    if (out->GetVersion(&out->version) != SUCCESS || out->version < OLDEST)
        return hs_fail(why, HS_E_UNSUPPORTED, LIBRARY " is too old (%d, 2.18 is needed); " MEND,
                       out->version);
    return HS_OK;
}
#endif
