/* Which products a call makes, and by which algorithm each is computed (libraries.h). */
#include "kernels/cuda/cublaslt.h"
#include "kernels/cuda/device.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

namespace {
struct entry {
    hs_product product;  /* of the first call that needs it */
    hs_algorithm chosen; /* the key always; the rest where `known` */
    bool known;
};
} // namespace

struct hs_products {
    hs_cublaslt lib;
    uint32_t capability;
    int64_t warm_ns; /* the first choice's: from then on times count; 0: nothing was timed yet */
    uint32_t count;
    entry entries[HS_ALGORITHMS_MAX];
};

/* --- the products of a call -------------------------------------------------------------------- */

static hs_side side(const void *at, int64_t ld, bool across, uint32_t type) {
    hs_side s = {};
    s.at = at, s.ld = ld, s.across = across, s.type = type;
    return s;
}

static hs_product product(int64_t m, int64_t n, int64_t k, hs_side a, hs_side b, void *out,
                          int64_t ld_out, uint32_t type_out) {
    hs_product p = {};
    p.m = m, p.n = n, p.k = k, p.a = a, p.b = b;
    p.out = out, p.ld_out = ld_out, p.type_out = type_out;
    return p;
}

static hs_product linear_fwd(const hs_linear_fwd_args &a, void *own) {
    hs_product p = product(a.R, a.N, a.K, side(a.x, a.ldx, false, a.dtype),
                           side(a.w, a.K, false, a.dtype), a.y, a.ldy, a.dtype);
    p.add = a.res, p.ld_add = a.res ? a.ldres : 0;
    p.bias = !a.b || a.dtype == HS_F32 ? a.b : own;
    return p;
}

static hs_product linear_igrad(const hs_linear_igrad_args &a) {
    hs_product p = product(a.R, a.K, a.N, side(a.dy, a.lddy, false, a.dtype),
                           side(a.w, a.K, true, a.dtype), a.dx, a.lddx, a.dtype);
    if (a.ACCUM) p.add = a.dx, p.ld_add = a.lddx;
    return p;
}

static hs_product linear_wgrad(const hs_linear_wgrad_args &a) {
    hs_product p = product(a.N, a.K, a.R, side(a.dy, a.lddy, true, a.dtype),
                           side(a.x, a.ldx, true, a.dtype), a.dw, a.K, HS_F32);
    p.add = a.dw, p.ld_add = a.K, p.fresh = !a.ACCUM;
    return p;
}

/* linear8.h: rows of codes, k of each, with their scales. */
static hs_product product8(int64_t m, int64_t n, int64_t k, const void *a, uint32_t type_a,
                           const void *a_scale, const void *b, const void *b_scale, void *out,
                           int64_t ld_out, uint32_t type_out) {
    hs_product p = product(m, n, k, side(a, k, false, type_a), side(b, k, false, HS_E4M3), out,
                           ld_out, type_out);
    p.a.scale = static_cast<const float *>(a_scale);
    p.b.scale = static_cast<const float *>(b_scale);
    return p;
}

static int linear8_fwd(const hs_linear8_fwd_args &a, void *own, hs_product *p) {
    if (!hs_fp8_fits(a.dtype, a.R, a.N, a.K)) return 0;
    *p = product8(a.R, a.N, a.K, a.x8, HS_E4M3, a.xs, a.w8, a.ws, a.y, a.ldy, a.dtype);
    p->add = a.res, p->ld_add = a.res ? a.ldres : 0;
    p->bias = a.b ? own : NULL;
    return 1;
}

static int linear8_igrad(const hs_linear8_igrad_args &a, hs_product *p) {
    if (!hs_fp8_fits(a.dtype, a.R, a.N, a.K)) return 0;
    *p = product8(a.R, a.K, a.N, a.dy8, HS_E5M2, a.dys, a.w8t, a.ws, a.dx, a.lddx, a.dtype);
    if (a.ACCUM) p->add = a.dx, p->ld_add = a.lddx;
    return 1;
}

static int linear8_wgrad(const hs_linear8_wgrad_args &a, hs_product *p) {
    if (!hs_fp8_fits(a.dtype, a.R, a.N, a.K)) return 0;
    *p = product8(a.N, a.K, a.R, a.dy8t, HS_E5M2, a.dys, a.x8t, a.xs, a.dw, a.K, HS_F32);
    p->add = a.dw, p->ld_add = a.K;
    return 1;
}

static hs_product logits(const hs_logits_args &a) {
    return product(a.R, a.V, a.C, side(a.x, a.C, false, a.dtype), side(a.w, a.C, false, a.dtype),
                   a.logits, a.V, HS_F32);
}

static hs_product classifier_logits(const hs_classifier_grad_args &a, int64_t rows) {
    return product(rows, a.V, a.C, side(a.x, a.C, false, a.dtype), side(a.w, a.C, false, a.dtype),
                   a.logits, a.V, HS_F32);
}

static int classifier_grad(const hs_classifier_grad_args &a, int64_t rows, hs_product *out) {
    out[0] = classifier_logits(a, rows);
    out[1] = product(rows, a.C, a.V, side(a.dlogits, a.V, false, a.dtype),
                     side(a.w, a.C, true, a.dtype), a.dx, a.C, a.dtype);
    out[2] = product(a.V, a.C, rows, side(a.dlogits, a.V, true, a.dtype),
                     side(a.x, a.C, true, a.dtype), a.dw, a.C, HS_F32);
    out[2].add = a.dw, out[2].ld_add = a.C;
    return 3;
}

extern "C" int hs_products_of(uint16_t kernel, const hs_args *args, void *own,
                              hs_product out[HS_PRODUCTS_OF_A_CALL]) {
    hs_linear_fwd_args fwd;
    hs_linear8_fwd_args fwd8;
    hs_linear8_igrad_args igrad8;
    hs_linear8_wgrad_args wgrad8;
    hs_classifier_fwd_args loss;
    hs_classifier_grad_args grad = {};
    int n = 0;
    switch (kernel) {
    case HS_K_LINEAR_FWD:
        fwd = hs_linear_fwd_args_of(args);
        out[0] = linear_fwd(fwd, own);
        return 1;
    case HS_K_LINEAR_IGRAD:
        out[0] = linear_igrad(hs_linear_igrad_args_of(args));
        return 1;
    case HS_K_LINEAR_WGRAD:
        out[0] = linear_wgrad(hs_linear_wgrad_args_of(args));
        return 1;
    case HS_K_LINEAR8_FWD:
        fwd8 = hs_linear8_fwd_args_of(args);
        return linear8_fwd(fwd8, own, out);
    case HS_K_LINEAR8_IGRAD:
        igrad8 = hs_linear8_igrad_args_of(args);
        return linear8_igrad(igrad8, out);
    case HS_K_LINEAR8_WGRAD:
        wgrad8 = hs_linear8_wgrad_args_of(args);
        return linear8_wgrad(wgrad8, out);
    case HS_K_LOGITS:
        out[0] = logits(hs_logits_args_of(args));
        return 1;
    case HS_K_CLASSIFIER_FWD:
        loss = hs_classifier_fwd_args_of(args);
        grad.R = loss.R, grad.C = loss.C, grad.V = loss.V, grad.CHUNK = loss.CHUNK;
        grad.x = loss.x, grad.w = loss.w, grad.logits = loss.logits, grad.dtype = loss.dtype;
        if (grad.R >= grad.CHUNK) out[n++] = classifier_logits(grad, grad.CHUNK);
        if (grad.R % grad.CHUNK) out[n++] = classifier_logits(grad, grad.R % grad.CHUNK);
        return n;
    case HS_K_CLASSIFIER_GRAD:
        grad = hs_classifier_grad_args_of(args);
        if (grad.R >= grad.CHUNK) n += classifier_grad(grad, grad.CHUNK, out);
        if (grad.R % grad.CHUNK) n += classifier_grad(grad, grad.R % grad.CHUNK, out + n);
        return n;
    case HS_K_VOCAB_HEAD:
    case HS_K_VOCAB_SUMS:
    case HS_K_VOCAB_PART:
        return hs_vocab_products(kernel, args, out);
    default:
        return 0;
    }
}

/* --- what it is kept under --------------------------------------------------------------------- */

/* Of a matrix's start and of its rows, so that it is the same for every block of rows; up to 16. */
static uint8_t alignment(const void *at, int64_t ld, uint32_t type) {
    const uint64_t bytes = type == HS_F32 ? 4 : type == HS_BF16 ? 2 : 1;
    const uint64_t both = (uint64_t)(uintptr_t)at | (uint64_t)ld * bytes | 16;
    return (uint8_t)(both & (~both + 1));
}

extern "C" void hs_algorithm_key_of(const hs_product *p, hs_algorithm_key *key) {
    memset(key, 0, sizeof *key);
    key->m = p->m, key->n = p->n, key->k = p->k;
    key->ld_a = p->a.ld, key->ld_b = p->b.ld, key->ld_out = p->ld_out;
    key->type_a = (uint8_t)p->a.type, key->type_b = (uint8_t)p->b.type;
    key->type_out = (uint8_t)p->type_out;
    key->across = (uint8_t)(p->a.across | p->b.across << 1);
    key->align_a = alignment(p->a.at, p->a.ld, p->a.type);
    key->align_b = alignment(p->b.at, p->b.ld, p->b.type);
    key->align_out = alignment(p->out, p->ld_out, p->type_out);
    if (p->add) {
        key->add = p->add == p->out ? 1 : 2;
        key->ld_add = p->ld_add;
        key->align_add = alignment(p->add, p->ld_add, p->type_out);
    }
    if (p->bias) key->bias = 1, key->align_bias = alignment(p->bias, 0, p->type_out);
    key->scale = p->a.scale || p->b.scale;
}

static entry *find(hs_products *products, const hs_algorithm_key *key) {
    for (uint32_t i = 0; i < products->count; i++)
        if (memcmp(&products->entries[i].chosen.key, key, sizeof *key) == 0)
            return &products->entries[i];
    return NULL;
}

/* --- the choice -------------------------------------------------------------------------------- */

extern "C" hs_status hs_products_create(const char *device, uint32_t capability, hs_products **out,
                                        hs_why *why) {
    *out = NULL;
    hs_products *products = static_cast<hs_products *>(calloc(1, sizeof *products));
    if (!products) return hs_fail(why, HS_E_MEMORY, "no memory for the table of algorithms");
    products->capability = capability;
    const hs_status st = hs_cublaslt_open(&products->lib, device, why);
    if (st != HS_OK) {
        free(products);
        return st;
    }
    *out = products;
    return HS_OK;
}

extern "C" void hs_products_destroy(hs_products *products) {
    if (!products) return;
    hs_cublaslt_close(&products->lib);
    free(products);
}

extern "C" const char *hs_products_library(const hs_products *products) {
    return products->lib.name;
}

extern "C" hs_status hs_products_need(hs_products *products, const hs_cuda_ctx *ctx,
                                      uint16_t kernel, const hs_args *args, hs_why *why) {
    hs_product list[HS_PRODUCTS_OF_A_CALL];
    const int count = hs_products_of(kernel, args, HS_OWN_WORKSPACE(ctx), list);
    for (int i = 0; i < count; i++) {
        hs_algorithm_key key;
        hs_algorithm_key_of(&list[i], &key);
        if (key.scale && products->capability < 89)
            return hs_fail(why, HS_E_CONFIG,
                           "train.precision \"fp8\" needs tensor cores that have it: compute "
                           "capability 8.9 or more, this device has %u.%u; use another device, "
                           "precision \"bf16\", or launch.kernel_path cuda-exact, which is slow",
                           products->capability / 10, products->capability % 10);
        if (find(products, &key)) continue;
        if (products->count == HS_ALGORITHMS_MAX)
            return hs_fail(why, HS_E_CONFIG,
                           "this position has more than %u different products, and a table of "
                           "algorithms holds no more; use more stages, or launch.kernel_path "
                           "cuda-exact",
                           HS_ALGORITHMS_MAX);
        entry *e = &products->entries[products->count++];
        e->product = list[i];
        e->chosen.key = key;
    }
    return HS_OK;
}

extern "C" hs_status hs_products_use(hs_products *products, const hs_algorithm *entries,
                                     uint32_t count, hs_why *why) {
    for (uint32_t i = 0; i < count; i++) {
        entry *e = find(products, &entries[i].key);
        if (!e || e->known) continue;
        if (entries[i].candidates)
            HS_TRY(hs_cublaslt_check(&products->lib, &e->product, &entries[i], why));
        e->chosen = entries[i];
        e->known = true;
    }
    return HS_OK;
}

extern "C" uint32_t hs_products_missing(const hs_products *products) {
    uint32_t missing = 0;
    for (uint32_t i = 0; i < products->count; i++) missing += !products->entries[i].known;
    return missing;
}

__global__ void __launch_bounds__(FLAT) clear_words(uint32_t *at, int64_t n) {
    const int64_t i = flat_index();
    if (i < n) at[i] = 0;
}

/* A device that was idle takes some time to come to its speed: until then nothing is counted. */
static const int64_t WARM_NS = 100000000;

/* An algorithm that may compute a product, as far as it was timed. */
struct trial {
    int64_t times; /* that a round runs it: about a millisecond; 0: it was not run yet */
    int64_t least; /* ns of a run, in the fastest round that counts */
    bool refused;
};

/* HS_E_BUG: the library refuses it. */
static hs_status time_round(hs_products *products, const hs_cuda_ctx *ctx, const hs_product *p,
                            const hs_algorithm *a, bool counts, trial *t, hs_why *why) {
    const int64_t ROUND_NS = 1000000, ROUND_MOST = 32;
    const lt::api *api = &products->lib.api;
    const int64_t times = t->times ? t->times : 1, began = api->clock_ns();
    for (int64_t i = 0; i < times; i++) HS_TRY(hs_cublaslt_run(&products->lib, ctx, p, a, why));
    const int failed = api->wait(ctx->stream);
    if (failed)
        return hs_fail(why, HS_E_DEVICE,
                       "the device failed (CUDA error %d) while a product of %" PRId64 " x %" PRId64
                       " x %" PRId64 " was timed",
                       failed, p->m, p->n, p->k);
    const int64_t each = (api->clock_ns() - began) / times;
    if (counts && each < t->least) t->least = each;
    t->times = ROUND_NS / (each > 0 ? each : 1);
    t->times = t->times < 1 ? 1 : t->times > ROUND_MOST ? ROUND_MOST : t->times;
    return HS_OK;
}

/* All candidates in turn, round by round, so that what drifts drifts for all. The first round loads kernels, and says how
 * often each runs in the next; those before the device is warm count as little. */
static hs_status choose_one(hs_products *products, const hs_cuda_ctx *ctx, const entry *e,
                            int64_t warm_ns, hs_algorithm *best, hs_why *why) {
    enum { CANDIDATES = 8, ROUNDS = 2 };
    hs_algorithm list[CANDIDATES];
    trial trials[CANDIDATES];
    int count = 0;
    const hs_product *p = &e->product;
    memset(best, 0, sizeof *best);
    best->key = e->chosen.key;
    HS_TRY(hs_cublaslt_candidates(&products->lib, p, list, CANDIDATES, &count, why));
    int left = count;
    for (int i = 0; i < count; i++) trials[i] = trial{0, INT64_MAX, false};
    for (int round = -1; left > 0 && round < ROUNDS;
         round += round >= 0 || products->lib.api.clock_ns() >= warm_ns)
        for (int i = 0; i < count; i++) {
            hs_why told = {};
            if (trials[i].refused) continue;
            const hs_status st =
                time_round(products, ctx, p, &list[i], round >= 0, &trials[i], &told);
            if (st == HS_E_BUG) { /* offered, and then refused at once: another may do */
                trials[i].refused = true;
                left--;
            } else if (st != HS_OK) {
                return hs_fail(why, st, "%s", told.text);
            }
        }
    if (left == 0) { /* by plain.cu, if it is not the device that refuses */
        const int failed = products->lib.api.wait(ctx->stream);
        if (failed)
            return hs_fail(why, HS_E_DEVICE,
                           "the device failed (CUDA error %d) while products were timed", failed);
        return HS_OK;
    }
    int fastest = -1;
    for (int i = 0; i < count; i++)
        if (!trials[i].refused && (fastest < 0 || trials[i].least < trials[fastest].least))
            fastest = i;
    *best = list[fastest];
    best->microseconds = (uint32_t)(trials[fastest].least / 1000);
    best->candidates = (uint32_t)count;
    return HS_OK;
}

extern "C" hs_status hs_products_choose(hs_products *products, const hs_cuda_ctx *ctx,
                                        hs_algorithm *list, hs_why *why) {
    const cudaStream_t stream = static_cast<cudaStream_t>(ctx->stream);
    /* biases are read here: zero, as all other operands are */
    uint32_t *own = reinterpret_cast<uint32_t *>(HS_OWN_WORKSPACE(ctx));
    int64_t words = 0;
    for (uint32_t i = 0; i < products->count; i++)
        if (products->entries[i].product.bias == own && products->entries[i].product.n > words)
            words = products->entries[i].product.n;
    if (words) HS_TRY(HS_LAUNCH(clear_words, flat_blocks(words), FLAT, stream, own, words));
    if (!products->warm_ns) products->warm_ns = products->lib.api.clock_ns() + WARM_NS;
    for (uint32_t i = 0; i < products->count; i++)
        if (!products->entries[i].known)
            HS_TRY(
                choose_one(products, ctx, &products->entries[i], products->warm_ns, list++, why));
    return HS_OK;
}

extern "C" hs_status hs_products_run(hs_products *products, const hs_cuda_ctx *ctx,
                                     const hs_product *p) {
    hs_algorithm_key key;
    hs_algorithm_key_of(p, &key);
    const entry *e = find(products, &key);
    if (!e || !e->known)
        return hs_fail(ctx->why, HS_E_BUG,
                       "a product of %" PRId64 " x %" PRId64 " x %" PRId64
                       " was never asked for, so that it has no algorithm",
                       p->m, p->n, p->k);
    return e->chosen.candidates ? hs_cublaslt_run(&products->lib, ctx, p, &e->chosen, ctx->why)
                                : hs_plain_product(ctx, p);
}
