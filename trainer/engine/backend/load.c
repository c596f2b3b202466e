#include "backend/load.h"

#include <dlfcn.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "wire/attempt.h"

static const char library_name[] = "libhs_cuda.so";

/* The folder of this program, with its slash, and the library's name after it. */
static bool beside(char *path, size_t room) {
    const ssize_t n = readlink("/proc/self/exe", path, room - sizeof library_name);
    if (n <= 0) return false;
    path[n] = 0;
    char *const slash = strrchr(path, '/');
    if (!slash) return false;
    memcpy(slash + 1, library_name, sizeof library_name);
    return access(path, F_OK) == 0;
}

static hs_status no_library(const char *name, const char *told, hs_why *why) {
    /* what musl says in a program without dynamic linker */
    if (strstr(told, "Dynamic loading not supported"))
        return hs_fail(
            why, HS_E_UNSUPPORTED,
            "this hotstage-engine was built without dynamic loading and cannot use CUDA; "
            "use the image for CUDA, or parallel.device = \"cpu\"");
    return hs_fail(why, HS_E_UNSUPPORTED,
                   "the CUDA backend cannot be opened (%s: %s): `make cuda` builds it in a source "
                   "tree, the image for CUDA has it, HOTSTAGE_CUDA may name it",
                   name, told);
}

static hs_status load_cuda(const hs_backend **backend, hs_why *why) {
    char path[4096];
    const char *name = getenv("HOTSTAGE_CUDA");
    if (!name || !name[0]) name = beside(path, sizeof path) ? path : library_name;
    void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        const char *told = dlerror();
        return no_library(name, told ? told : "no reason", why);
    }
    const hs_backend *(*table)(void);
    *(void **)&table = dlsym(library, "hs_cuda_backend");
    if (!table)
        return hs_fail(why, HS_E_UNSUPPORTED,
                       "%s is not a CUDA backend of hotstage: it has no hs_cuda_backend", name);
    const hs_backend *const found = table();
    if (found->version != HS_BACKEND_VERSION)
        return hs_fail(why, HS_E_UNSUPPORTED,
                       "%s is a CUDA backend of version %" PRIu32
                       ", this hotstage-engine needs version %u: install both from one release",
                       name, found->version, HS_BACKEND_VERSION);
    *backend = found;
    return HS_OK;
}

hs_status hs_backend_load(uint32_t kind, const hs_backend **backend, hs_why *why) {
    *backend = NULL;
    if (kind == HS_DEVICE_CUDA) return load_cuda(backend, why);
    if (kind != HS_DEVICE_CPU)
        return hs_fail(why, HS_E_UNSUPPORTED,
                       "there is no device of kind %" PRIu32 " (%d is the CPU, %d is CUDA)", kind,
                       HS_DEVICE_CPU, HS_DEVICE_CUDA);
    *backend = &hs_backend_cpu;
    return HS_OK;
}
