/* The library NCCL: where it is found, and its functions. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cuda/nccl.h"

#ifndef HS_CUDA_EMULATED
#include <dlfcn.h>

#define LIBRARY "libnccl.so.2"
#define MEND                                                                                       \
    "install hotstage[cuda] (it comes in the wheel nvidia-nccl-cu13), or let "                     \
    "HOTSTAGE_CUDA_LIBRARIES name its folder"

/* In the folders of HOTSTAGE_CUDA_LIBRARIES, one after the other, then where the system looks. */
static void *open_library() {
    const char *folders = getenv("HOTSTAGE_CUDA_LIBRARIES");
    for (const char *at = folders ? folders : ""; *at;) {
        const int length = (int)strcspn(at, ":");
        char path[4096];
        const int n = snprintf(path, sizeof path, "%.*s/" LIBRARY, length, at);
        void *found = length && n < (int)sizeof path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
        if (found) return found;
        at += length + (at[length] == ':');
    }
    return dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL);
}

hs_status nccl::open(api *out, hs_why *why) {
    void *library = open_library();
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
