/* cuBLASLt as far as products use it, declared here so that nothing of NVIDIA's is needed to build:
 * names, numbers and sizes are those of cublasLt.h 13.1 (wheel nvidia-cublas 13.1.0.3; cublasLt
 * keeps them within a major version). The library itself is opened at run time.
 *
 * Rows and columns. cuBLASLt is told of column-major matrices, ours are row-major, and a row-major matrix is
 * the column-major one of its transpose. So out[m,n] is its D[n,m], and with
 *     D[n,m] = op(A)[n,k] op(B)[k,m] + beta C[n,m] + bias[n]
 * its A is our b, its B is our a:
 *     b, rows side by side (b[j ld + k]): a k x n matrix of leading dimension ld, transposed
 *     b, across            (b[k ld + j]): an n x k matrix, as it is
 *     a, rows side by side (a[i ld + k]): a k x m matrix, as it is
 *     a, across            (a[k ld + i]): an m x k matrix, transposed
 * The bias is along D's rows: our columns. tests/engine/test_products.py holds all of them to the oracle.
 */
#ifndef HS_KERNELS_CUDA_CUBLASLT_H
#define HS_KERNELS_CUDA_CUBLASLT_H

#include "kernels/cuda/libraries.h"

namespace lt {

typedef int status; /* cublasStatus_t; 0: success */
enum { INVALID_VALUE = 7, NOT_SUPPORTED = 15 };

struct layout {
    uint64_t data[8];
};
struct algorithm {
    uint64_t data[8];
};
struct description {
    uint64_t data[32];
};
struct preference {
    uint64_t data[8];
};
struct heuristic {
    algorithm algo;
    size_t workspace_bytes;
    status state;
    float waves;
    int reserved[4];
};

enum { COMPUTE_32F = 68, OP_N = 0, OP_T = 1, EPILOGUE_DEFAULT = 1, EPILOGUE_BIAS = 4 };
enum { R_32F = 0, R_16BF = 14, R_8F_E4M3 = 28, R_8F_E5M2 = 29 };
enum { DESC_TRANSA = 3, DESC_TRANSB = 4, DESC_EPILOGUE = 7, DESC_BIAS_POINTER = 8 };
enum { DESC_A_SCALE_POINTER = 17, DESC_B_SCALE_POINTER = 18 };
enum { PREF_WORKSPACE_BYTES = 1, PREF_REDUCTION_MASK = 3, PREF_ALIGNMENT_A_BYTES = 5 };
enum { CONFIG_SPLITK_NUM = 2, CONFIG_REDUCTION = 3, REDUCTION_NONE = 0, REDUCTION_MASK = 7 };
enum { CAP_NUMERICAL_FLAGS = 15 };
const uint64_t ACCUMULATOR_32F = UINT64_C(2) << 8, ACCUMULATOR_MASK = UINT64_C(0xff) << 8,
               INPUT_TF32 = UINT64_C(4) << 16, INPUT_16BF = UINT64_C(2) << 16,
               INPUT_32F = UINT64_C(8) << 16, INPUT_8F_E4M3 = UINT64_C(0x40) << 16,
               INPUT_8F_E5M2 = UINT64_C(0x80) << 16, INPUT_MASK = UINT64_C(0xff) << 16;

/* X(result, name, parameters): the functions, cublasLt<name> */
#define HS_CUBLASLT(X)                                                                             \
    X(status, Create, (void **handle))                                                             \
    X(status, Destroy, (void *handle))                                                             \
    X(size_t, GetVersion, (void))                                                                  \
    X(const char *, GetStatusString, (status))                                                     \
    X(status, MatrixLayoutInit_internal,                                                           \
      (layout *, size_t size, int type, uint64_t rows, uint64_t columns, int64_t ld))              \
    X(status, MatmulDescInit_internal, (description *, size_t size, int compute, int scale))       \
    X(status, MatmulDescSetAttribute, (description *, int attribute, const void *, size_t))        \
    X(status, MatmulPreferenceInit_internal, (preference *, size_t size))                          \
    X(status, MatmulPreferenceSetAttribute, (preference *, int attribute, const void *, size_t))   \
    X(status, MatmulAlgoGetHeuristic,                                                              \
      (void *handle, description *, layout *a, layout *b, layout *c, layout *d, preference *,      \
       int room, heuristic *, int *count))                                                         \
    X(status, MatmulAlgoCheck,                                                                     \
      (void *handle, description *, layout *a, layout *b, layout *c, layout *d, const algorithm *, \
       heuristic *))                                                                               \
    X(status, MatmulAlgoConfigGetAttribute,                                                        \
      (const algorithm *, int attribute, void *, size_t, size_t *written))                         \
    X(status, MatmulAlgoCapGetAttribute,                                                           \
      (const algorithm *, int attribute, void *, size_t, size_t *written))                         \
    X(status, Matmul,                                                                              \
      (void *handle, description *, const void *alpha, const void *a, layout *, const void *b,     \
       layout *, const void *beta, const void *c, layout *, void *d, layout *, const algorithm *,  \
       void *workspace, size_t workspace_bytes, void *stream))

struct api {
#define X(result, name, parameters) result(*name) parameters;
    HS_CUBLASLT(X)
#undef X
    /* Until the stream's work is done; 0: done. */
    int (*wait)(void *stream);
    int64_t (*clock_ns)();
};

/* The functions of the library that is found. HS_E_UNSUPPORTED. */
hs_status open(api *out, hs_why *why);

} // namespace lt

/* One product on the library. */
struct hs_cublaslt {
    lt::api api;
    void *handle;
    char name[32]; /* "cuBLASLt 13.1.0" */
};

hs_status hs_cublaslt_open(hs_cublaslt *lib, const char *device, hs_why *why);
void hs_cublaslt_close(hs_cublaslt *lib);

/* Algorithms that may compute p, the likely fastest first: without split-K, without reduction, f32
 * accumulators, operands as they are, within HS_LIBRARY_WORKSPACE. */
hs_status hs_cublaslt_candidates(hs_cublaslt *lib, const hs_product *p, hs_algorithm *list,
                                 int room, int *count, hs_why *why);
/* Whether the algorithm is such a one. */
hs_status hs_cublaslt_check(hs_cublaslt *lib, const hs_product *p, const hs_algorithm *a,
                            hs_why *why);
hs_status hs_cublaslt_run(hs_cublaslt *lib, const hs_cuda_ctx *ctx, const hs_product *p,
                          const hs_algorithm *a, hs_why *why);

#endif
