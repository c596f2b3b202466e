/* The seam of NVIDIA's libraries under kernel path cuda: products by cuBLASLt. Attention's comes
 * beside it.
 *
 * A product is out[m,n] = sum over k of a(i,k) b(j,k) (+ add) (+ bias), in f32 until it is rounded once to
 * out's type. Which of the library's algorithms computes it is decided once a run and product
 * (wire/algorithms.h); nothing here asks a heuristic while a run trains.
 *
 * Order of calls: create; need for every call that the position makes; use with what the run has
 * chosen already; choose, where something is missing, and use again with the winners; then run. run
 * allocates nothing and may be captured into a graph. One thread at a time.
 */
#ifndef HS_KERNELS_CUDA_LIBRARIES_H
#define HS_KERNELS_CUDA_LIBRARIES_H

#ifdef __cplusplus
extern "C" {
#endif
#include "kernels/cuda/cuda.h"
#include "wire/algorithms.h"

/* Row i of a product's side is at + i * ld, its elements side by side; across: element (i, k) is
 * at[k * ld + i]. ld in elements. */
typedef struct hs_side {
    const void *at;
    int64_t ld;
    bool across;
    uint32_t type;
    const float
        *scale; /* device memory: what its elements are multiplied by; FP8 alone, else NULL */
} hs_side;

typedef struct hs_product {
    int64_t m, n, k;
    hs_side a, b; /* m rows, n rows, of k elements */
    void *out;
    int64_t ld_out;
    uint32_t type_out;
    const void *add; /* [m,n] of out's type: out itself, or what does not overlap it; NULL: none */
    int64_t ld_add;
    bool fresh; /* add counts as zero, unread, by the algorithm of the product that reads it */
    const void *bias; /* [n] of out's type; NULL: none */
} hs_product;

typedef struct hs_products hs_products;

/* Opens the library. device and capability: hs_device_facts. HS_E_UNSUPPORTED: the library is
 * missing (why names the wheel), or refuses this device. */
hs_status hs_products_create(const char *device, uint32_t capability, hs_products **out,
                             hs_why *why);
void hs_products_destroy(hs_products *products); /* NULL is fine */
/* "cuBLASLt 13.1.0"; valid until destroy. */
const char *hs_products_library(const hs_products *products);

/* The products of a call of HS_K_<kernel> under path cuda are needed. Its operands may be written by
 * choose: zero bytes there stay zero. HS_E_CONFIG: more than HS_ALGORITHMS_MAX. */
hs_status hs_products_need(hs_products *products, const hs_cuda_ctx *ctx, uint16_t kernel,
                           const hs_args *args, hs_why *why);
/* Takes the algorithms of what is needed out of entries, the first of a key; they are of this device
 * and library. HS_E_CONFIG: the library refuses one, and what to do. */
hs_status hs_products_use(hs_products *products, const hs_algorithm *entries, uint32_t count,
                          hs_why *why);
/* Of what is needed, the products that have no algorithm. */
uint32_t hs_products_missing(const hs_products *products);
/* Times the candidates of each that is missing on the call's own operands: an entry of the fastest for each,
 * in the order in which they were needed; list has room for hs_products_missing. Does not use them. Blocks.
 * Where the library has none, or refuses what it offered, the entry has 0 candidates: plain.cu computes it. */
hs_status hs_products_choose(hs_products *products, const hs_cuda_ctx *ctx, hs_algorithm *list,
                             hs_why *why);

/* Puts the product on ctx->stream, by the algorithm in use. HS_E_BUG: it has none. */
hs_status hs_products_run(hs_products *products, const hs_cuda_ctx *ctx, const hs_product *p);
/* The same by a kernel of ours (plain.cu). */
hs_status hs_plain_product(const hs_cuda_ctx *ctx, const hs_product *p);

/* The products of a call of HS_K_<kernel>, in order, but a classifier's: of its first chunk, then of its
 * last where that is shorter. A bias that is rounded to out's type lies at `own` (HS_OWN_WORKSPACE).
 * Their number; 0: the kernel makes none. */
enum { HS_PRODUCTS_OF_A_CALL = 2 * (HS_VOCAB_BLOCKS + 2) };
int hs_products_of(uint16_t kernel, const hs_args *args, void *own,
                   hs_product out[HS_PRODUCTS_OF_A_CALL]);
/* Those of vocabulary.cu's kernels. */
int hs_vocab_products(uint16_t kernel, const hs_args *args, hs_product out[HS_PRODUCTS_OF_A_CALL]);

/* Whether products are the library's. */
static inline bool hs_by_library(const hs_cuda_ctx *ctx) {
    return ctx->path == HS_PATH_CUDA && ctx->products;
}

/* Whether a product of linear8.h may be the library's: tensor cores take FP8 where every side is a
 * multiple of 16 bytes, and give bf16 or add to f32. */
static inline bool hs_fp8_fits(uint32_t dtype, int64_t R, int64_t N, int64_t K) {
    return dtype == HS_BF16 && R % 16 == 0 && N % 16 == 0 && K % 16 == 0;
}

/* What an algorithm is kept under. */
void hs_algorithm_key_of(const hs_product *p, hs_algorithm_key *key);

/* The library's part of a workspace, and what is left for kernels of ours. */
#define HS_LIBRARY_WORKSPACE  (UINT64_C(32) << 20)
#define HS_OWN_WORKSPACE(ctx) ((char *)(ctx)->workspace + HS_LIBRARY_WORKSPACE)
#define HS_OWN_BYTES          (HS_CUDA_WORKSPACE - HS_LIBRARY_WORKSPACE)

#ifdef __cplusplus
}
#endif

#endif
