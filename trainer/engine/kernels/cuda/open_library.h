/* Where NVIDIA's libraries are found at run time. */
#ifndef HS_KERNELS_CUDA_OPEN_LIBRARY_H
#define HS_KERNELS_CUDA_OPEN_LIBRARY_H

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* In the folders of HOTSTAGE_CUDA_LIBRARIES, one after the other, then where the system looks. NULL:
 * nowhere, and dlerror says why. */
static inline void *hs_open_library(const char *name) {
    const char *folders = getenv("HOTSTAGE_CUDA_LIBRARIES");
    for (const char *at = folders ? folders : ""; *at;) {
        const int length = (int)strcspn(at, ":");
        char path[4096];
        const int n = snprintf(path, sizeof path, "%.*s/%s", length, at, name);
        void *found = length && n < (int)sizeof path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
        if (found) return found;
        at += length + (at[length] == ':');
    }
    return dlopen(name, RTLD_NOW | RTLD_LOCAL);
}

#endif
