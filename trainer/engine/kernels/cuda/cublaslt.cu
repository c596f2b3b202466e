#include "kernels/cuda/cublaslt.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#ifndef HS_CUDA_EMULATED
#include <cuda_runtime.h>

#include "core/clock.h"
#include "kernels/cuda/open_library.h"

#define LIBRARY "libcublasLt.so.13"

static int wait_stream(void *stream) {
    return (int)cudaStreamSynchronize((cudaStream_t)stream);
}

hs_status lt::open(api *out, hs_why *why) {
    void *library = hs_open_library(LIBRARY);
    if (!library)
        return hs_fail(why, HS_E_UNSUPPORTED,
                       "kernel path cuda needs " LIBRARY
                       ", which is not found (%s); install hotstage[cuda] (it comes in the wheel "
                       "nvidia-cublas 13), or let HOTSTAGE_CUDA_LIBRARIES name its folder; "
                       "launch.kernel_path cuda-exact needs no library",
                       dlerror());
#define X(result, name, parameters)                                                                \
    *(void **)&out->name = dlsym(library, "cublasLt" #name);                                       \
    if (!out->name)                                                                                \
        return hs_fail(why, HS_E_UNSUPPORTED,                                                      \
                       LIBRARY " has no cublasLt" #name                                            \
                               ": it is not of version 13; install the wheel nvidia-cublas 13");
    HS_CUBLASLT(X)
#undef X
    out->wait = wait_stream;
    out->clock_ns = hs_clock_ns;
    return HS_OK;
}
#endif

hs_status hs_cublaslt_open(hs_cublaslt *lib, const char *device, hs_why *why) {
    HS_TRY(lt::open(&lib->api, why));
    const size_t version = lib->api.GetVersion();
    (void)snprintf(lib->name, sizeof lib->name, "cuBLASLt %zu.%zu.%zu", version / 10000,
                   version / 100 % 100, version % 100);
    if (version / 10000 != 13)
        return hs_fail(why, HS_E_UNSUPPORTED,
                       "%s was found, and this build needs version 13; install the wheel "
                       "nvidia-cublas 13",
                       lib->name);
    const lt::status st = lib->api.Create(&lib->handle);
    if (st)
        return hs_fail(why, HS_E_UNSUPPORTED, "%s cannot use %s: %s", lib->name, device,
                       lib->api.GetStatusString(st));
    return HS_OK;
}

void hs_cublaslt_close(hs_cublaslt *lib) {
    if (lib->handle) (void)lib->api.Destroy(lib->handle);
    lib->handle = NULL;
}

/* --- a product as cuBLASLt sees it ------------------------------------------------------------ */

static int type_of(uint32_t type) {
    switch (type) {
    case HS_BF16:
        return lt::R_16BF;
    case HS_E4M3:
        return lt::R_8F_E4M3;
    case HS_E5M2:
        return lt::R_8F_E5M2;
    default:
        return lt::R_32F;
    }
}

namespace {
struct call {
    lt::description what;
    lt::layout a, b, c, d;
    const void *at_c;
    float alpha, beta;
};
} // namespace

static lt::status describe(hs_cublaslt *lib, const hs_product *p, call *c) {
    const lt::api *api = &lib->api;
    lt::status st =
        api->MatmulDescInit_internal(&c->what, sizeof c->what, lt::COMPUTE_32F, lt::R_32F);
    const auto set = [&](int attribute, const void *value, size_t bytes) {
        if (!st) st = api->MatmulDescSetAttribute(&c->what, attribute, value, bytes);
    };
    const auto lay = [&](lt::layout *to, uint32_t type, int64_t rows, int64_t columns, int64_t ld) {
        if (!st)
            st = api->MatrixLayoutInit_internal(to, sizeof *to, type_of(type), (uint64_t)rows,
                                                (uint64_t)columns, ld);
    };
    const int32_t op_a = p->b.across ? lt::OP_N : lt::OP_T;
    const int32_t op_b = p->a.across ? lt::OP_T : lt::OP_N;
    set(lt::DESC_TRANSA, &op_a, sizeof op_a);
    set(lt::DESC_TRANSB, &op_b, sizeof op_b);
    if (p->bias) {
        const uint32_t epilogue = lt::EPILOGUE_BIAS;
        set(lt::DESC_EPILOGUE, &epilogue, sizeof epilogue);
        set(lt::DESC_BIAS_POINTER, &p->bias, sizeof p->bias);
    }
    if (p->b.scale) set(lt::DESC_A_SCALE_POINTER, &p->b.scale, sizeof p->b.scale);
    if (p->a.scale) set(lt::DESC_B_SCALE_POINTER, &p->a.scale, sizeof p->a.scale);
    if (p->b.across)
        lay(&c->a, p->b.type, p->n, p->k, p->b.ld);
    else
        lay(&c->a, p->b.type, p->k, p->n, p->b.ld);
    if (p->a.across)
        lay(&c->b, p->a.type, p->m, p->k, p->a.ld);
    else
        lay(&c->b, p->a.type, p->k, p->m, p->a.ld);
    lay(&c->d, p->type_out, p->n, p->m, p->ld_out);
    lay(&c->c, p->type_out, p->n, p->m, p->add ? p->ld_add : p->ld_out);
    c->at_c = p->add ? p->add : p->out; /* not read where beta is 0 */
    c->alpha = 1.0f;
    c->beta = p->add && !p->fresh ? 1.0f : 0.0f;
    return st;
}

static uint64_t inputs_of(uint32_t type) {
    switch (type) {
    case HS_BF16:
        return lt::INPUT_16BF;
    case HS_E4M3:
        return lt::INPUT_8F_E4M3;
    case HS_E5M2:
        return lt::INPUT_8F_E5M2;
    default:
        return lt::INPUT_32F; /* no TF32, no sums of bf16 */
    }
}

/* NULL: it may be used, else why not. */
static const char *fault_of(const lt::api *api, const hs_product *p, const lt::algorithm *algo) {
    size_t written = 0;
    int32_t splits = 0;
    uint32_t reduction = lt::REDUCTION_MASK;
    uint64_t flags = 0; /* 0: the library does not say, and the compute type holds */
    if (api->MatmulAlgoConfigGetAttribute(algo, lt::CONFIG_SPLITK_NUM, &splits, sizeof splits,
                                          &written) ||
        api->MatmulAlgoConfigGetAttribute(algo, lt::CONFIG_REDUCTION, &reduction, sizeof reduction,
                                          &written))
        return "the library does not know it";
    if (api->MatmulAlgoCapGetAttribute(algo, lt::CAP_NUMERICAL_FLAGS, &flags, sizeof flags,
                                       &written))
        flags = 0;
    if (splits > 1 || splits < 0) return "it splits the sum (split-K)";
    if (reduction != lt::REDUCTION_NONE) return "it adds parts of the sum in a second pass";
    if (flags & lt::ACCUMULATOR_MASK & ~lt::ACCUMULATOR_32F) return "it does not accumulate in f32";
    const uint64_t allowed = inputs_of(p->a.type) | inputs_of(p->b.type);
    if (flags & lt::INPUT_MASK & ~allowed) return "it rounds its operands";
    return NULL;
}

hs_status hs_cublaslt_candidates(hs_cublaslt *lib, const hs_product *p, hs_algorithm *list,
                                 int room, int *count, hs_why *why) {
    enum { ASKED = 32 };
    const lt::api *api = &lib->api;
    static const uint32_t masks[] = {lt::REDUCTION_NONE, lt::REDUCTION_MASK};
    hs_algorithm_key key;
    hs_algorithm_key_of(p, &key);
    const uint32_t aligned[] = {key.align_b, key.align_a,
                                key.add == 2 ? key.align_add : key.align_out, key.align_out};
    const uint64_t workspace = HS_LIBRARY_WORKSPACE;
    *count = 0;
    call c = {};
    lt::status st = describe(lib, p, &c);
    /* The library's own mask first; where that leaves nothing, all, of which most are refused. */
    for (int ask = 0; !st && ask < 2 && *count == 0; ask++) {
        lt::preference wish = {};
        st = api->MatmulPreferenceInit_internal(&wish, sizeof wish);
        if (!st)
            st = api->MatmulPreferenceSetAttribute(&wish, lt::PREF_WORKSPACE_BYTES, &workspace,
                                                   sizeof workspace);
        if (!st)
            st = api->MatmulPreferenceSetAttribute(&wish, lt::PREF_REDUCTION_MASK, &masks[ask],
                                                   sizeof masks[ask]);
        for (int i = 0; !st && i < 4; i++)
            st = api->MatmulPreferenceSetAttribute(&wish, lt::PREF_ALIGNMENT_A_BYTES + i,
                                                   &aligned[i], sizeof aligned[i]);
        lt::heuristic found[ASKED] = {};
        int some = 0;
        if (st) break;
        const lt::status asked = api->MatmulAlgoGetHeuristic(lib->handle, &c.what, &c.a, &c.b, &c.c,
                                                             &c.d, &wish, ASKED, found, &some);
        if (asked) { /* none by this mask */
            if (ask > 0 && asked != lt::NOT_SUPPORTED && asked != lt::INVALID_VALUE) st = asked;
            continue;
        }
        for (int i = 0; !st && i < some && *count < room; i++) {
            if (found[i].state || found[i].workspace_bytes > workspace ||
                fault_of(api, p, &found[i].algo))
                continue;
            hs_algorithm *to = &list[(*count)++];
            memset(to, 0, sizeof *to);
            to->key = key;
            memcpy(to->algorithm, &found[i].algo, sizeof to->algorithm);
            to->workspace_bytes = found[i].workspace_bytes;
        }
    }
    if (st)
        return hs_fail(why, HS_E_UNSUPPORTED,
                       "%s cannot look for algorithms for a product of %" PRId64 " x %" PRId64
                       " x %" PRId64 ": %s",
                       lib->name, p->m, p->n, p->k, api->GetStatusString(st));
    return HS_OK;
}

hs_status hs_cublaslt_check(hs_cublaslt *lib, const hs_product *p, const hs_algorithm *a,
                            hs_why *why) {
    call c = {};
    lt::algorithm algo;
    lt::heuristic found = {};
    memcpy(&algo, a->algorithm, sizeof algo);
    const lt::api *api = &lib->api;
    const char *fault = fault_of(api, p, &algo);
    if (!fault) {
        lt::status st = describe(lib, p, &c);
        if (!st)
            st = api->MatmulAlgoCheck(lib->handle, &c.what, &c.a, &c.b, &c.c, &c.d, &algo, &found);
        if (st)
            fault = api->GetStatusString(st);
        else if (found.workspace_bytes > HS_LIBRARY_WORKSPACE)
            fault = "it needs more workspace than there is";
    }
    if (!fault) return HS_OK;
    return hs_fail(why, HS_E_CONFIG,
                   "%s refuses the algorithm that this run has for a product of %" PRId64
                   " x %" PRId64 " x %" PRId64
                   " (%s); go on with the library and device that it began with, or start a new "
                   "run from a checkpoint of this one (hotstage fork)",
                   lib->name, p->m, p->n, p->k, fault);
}

hs_status hs_cublaslt_run(hs_cublaslt *lib, const hs_cuda_ctx *ctx, const hs_product *p,
                          const hs_algorithm *a, hs_why *why) {
    call c = {};
    lt::algorithm algo;
    memcpy(&algo, a->algorithm, sizeof algo);
    lt::status st = describe(lib, p, &c);
    if (!st)
        st = lib->api.Matmul(lib->handle, &c.what, &c.alpha, p->b.at, &c.a, p->a.at, &c.b, &c.beta,
                             c.at_c, &c.c, p->out, &c.d, &algo, ctx->workspace,
                             HS_LIBRARY_WORKSPACE, ctx->stream);
    if (!st) return HS_OK;
    return hs_fail(why, HS_E_BUG,
                   "%s failed in a product of %" PRId64 " x %" PRId64 " x %" PRId64 ": %s",
                   lib->name, p->m, p->n, p->k, lib->api.GetStatusString(st));
}
