/* cuBLASLt on the CPU, as far as cublaslt.h declares it, for the tests: column-major products in plain
 * loops, on the emulator's terms. It has six algorithms:
 *
 *   0, 1   one sum, k ascending; 1 takes even k first, then odd: other bits
 *   2      one sum, k descending
 *   3      split-K: fast, and never to be chosen
 *   4      a reduction in a second pass: the same
 *   5      operands rounded to TF32: the same
 *
 * They are offered in the order 3, 4, 5, 0, 1, 2, each for operands that are aligned as was asked. Its clock is its
 * own: an algorithm takes a time that follows from its number and the product, so that a choice can be foretold, and
 * twice that in the first 80 ms, as a device that was idle takes longer; and HS_EMULATED_CUBLASLT,
 * some of these words, makes others of it:
 *
 *   fastest N     algorithm N is the fastest
 *   refuse N      the check refuses algorithm N
 *   only N        nothing but algorithm N is offered
 *   version N     cublasLtGetVersion
 *   missing       the library is not found
 *   balk N        products by algorithm N are refused, although it is offered and checked */
#include "kernels/cuda/cublaslt.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/emulate_runtime.h"
#include "kernels/cuda/fp8.h"

#include <stdlib.h>
#include <string.h>

namespace {

struct side_of { /* of a layout */
    int type;
    uint64_t rows, columns;
    int64_t ld;
};

struct what_of { /* of a description */
    int transa, transb, epilogue;
    const void *bias;
    const float *scale_a, *scale_b;
};

struct wish_of {
    uint64_t workspace;
    uint32_t reduction, aligned[4]; /* of a, b, c, d */
};

template <typename To, typename From> To *inside(From *from) {
    static_assert(sizeof(To) <= sizeof(From), "more than the library's opaque structure holds");
    return reinterpret_cast<To *>(from->data);
}

const int64_t MS = 1000000, COLD_NS = 80 * MS;
int64_t now_ns;

/* The number after `word` in HS_EMULATED_CUBLASLT; -1: it is not there. */
int64_t asked(const char *word) {
    const char *text = getenv("HS_EMULATED_CUBLASLT");
    const char *at = text ? strstr(text, word) : NULL;
    return at ? strtoll(at + strlen(word), NULL, 10) : -1;
}

enum { ALGORITHMS = 6, SPLIT = 3, REDUCE = 4, TF32 = 5 };

int number_of(const lt::algorithm *algo) {
    return algo->data[0] >> 8 == 0x4853 ? (int)(algo->data[0] & 0xff) : -1;
}

float read(const void *at, int64_t i, int type) {
    if (type == lt::R_32F) return static_cast<const float *>(at)[i];
    if (type == lt::R_8F_E4M3) return widen(static_cast<const e4m3 *>(at)[i]);
    if (type == lt::R_8F_E5M2) return widen(static_cast<const e5m2 *>(at)[i]);
    return widen(static_cast<const bf16 *>(at)[i]);
}

lt::status create(void **handle) {
    *handle = &now_ns;
    return 0;
}
lt::status destroy(void *) {
    return 0;
}
size_t version() {
    const int64_t other = asked("version");
    return other > 0 ? (size_t)other : 130100;
}
const char *text_of(lt::status st) {
    return st == lt::NOT_SUPPORTED ? "the functionality is not supported"
           : st                    ? "an unsupported value or parameter was passed"
                                   : "success";
}
lt::status layout_init(lt::layout *to, size_t size, int type, uint64_t rows, uint64_t columns,
                       int64_t ld) {
    if (size != sizeof *to || ld < (int64_t)rows) return 7;
    *inside<side_of>(to) = side_of{type, rows, columns, ld};
    return 0;
}
lt::status desc_init(lt::description *to, size_t size, int compute, int scale) {
    if (size != sizeof *to || compute != lt::COMPUTE_32F || scale != lt::R_32F) return 7;
    *inside<what_of>(to) = what_of{lt::OP_N, lt::OP_N, lt::EPILOGUE_DEFAULT, NULL, NULL, NULL};
    return 0;
}
lt::status desc_set(lt::description *to, int attribute, const void *value, size_t bytes) {
    what_of *w = inside<what_of>(to);
    switch (attribute) {
    case lt::DESC_TRANSA:
        if (bytes == 4) return memcpy(&w->transa, value, bytes), 0;
        return 7;
    case lt::DESC_TRANSB:
        if (bytes == 4) return memcpy(&w->transb, value, bytes), 0;
        return 7;
    case lt::DESC_EPILOGUE:
        if (bytes == 4) return memcpy(&w->epilogue, value, bytes), 0;
        return 7;
    case lt::DESC_BIAS_POINTER:
        if (bytes == 8) return memcpy(&w->bias, value, bytes), 0;
        return 7;
    case lt::DESC_A_SCALE_POINTER:
        if (bytes == 8) return memcpy(&w->scale_a, value, bytes), 0;
        return 7;
    case lt::DESC_B_SCALE_POINTER:
        if (bytes == 8) return memcpy(&w->scale_b, value, bytes), 0;
        return 7;
    default:
        return 7;
    }
}
lt::status preference_init(lt::preference *to, size_t size) {
    if (size != sizeof *to) return 7;
    *inside<wish_of>(to) = wish_of{0, lt::REDUCTION_MASK, {256, 256, 256, 256}};
    return 0;
}
lt::status preference_set(lt::preference *to, int attribute, const void *value, size_t bytes) {
    wish_of *w = inside<wish_of>(to);
    if (attribute == lt::PREF_WORKSPACE_BYTES && bytes == 8)
        return memcpy(&w->workspace, value, 8), 0;
    if (attribute == lt::PREF_REDUCTION_MASK && bytes == 4)
        return memcpy(&w->reduction, value, 4), 0;
    const int side = attribute - lt::PREF_ALIGNMENT_A_BYTES;
    if (side < 0 || side > 3 || bytes != 4) return 7;
    return memcpy(&w->aligned[side], value, 4), 0;
}

/* An algorithm works with operands that are aligned as was said when it was offered. */
uint64_t promised(const wish_of &w) {
    uint64_t all = 0;
    for (int i = 3; i >= 0; i--) all = all << 16 | w.aligned[i];
    return all;
}
bool keeps(uint64_t promised, const void *const at[4]) {
    for (int i = 0; i < 4; i++, promised >>= 16)
        if (promised & 0xffff && reinterpret_cast<uintptr_t>(at[i]) % (promised & 0xffff))
            return false;
    return true;
}

bool is_fp8(int type) {
    return type == lt::R_8F_E4M3 || type == lt::R_8F_E5M2;
}

/* Whether the shapes fit each other. */
bool fits(lt::description *what, lt::layout *a, lt::layout *b, lt::layout *c, lt::layout *d) {
    const what_of *w = inside<what_of>(what);
    const side_of *A = inside<side_of>(a), *B = inside<side_of>(b), *C = inside<side_of>(c),
                  *D = inside<side_of>(d);
    const uint64_t m = w->transa ? A->columns : A->rows, k = w->transa ? A->rows : A->columns;
    const uint64_t n = w->transb ? B->rows : B->columns, kb = w->transb ? B->columns : B->rows;
    const bool eight = is_fp8(A->type);
    if (eight != is_fp8(B->type) || (w->scale_a != NULL) != eight || (w->scale_b != NULL) != eight)
        return false;
    /* FP8: the index that is summed over side by side in both, sides of 16 bytes, not E5M2 twice */
    if (eight && (!w->transa || w->transb || m % 16 || n % 16 || k % 16 || A->ld % 16 ||
                  B->ld % 16 || (A->type == lt::R_8F_E5M2 && B->type == lt::R_8F_E5M2)))
        return false;
    return m == D->rows && n == D->columns && k == kb && C->rows == m && C->columns == n &&
           C->type == D->type;
}

lt::status offer(void *, lt::description *what, lt::layout *a, lt::layout *b, lt::layout *c,
                 lt::layout *d, lt::preference *wish, int room, lt::heuristic *list, int *count) {
    static const int order[ALGORITHMS] = {SPLIT, REDUCE, TF32, 0, 1, 2};
    const wish_of *w = inside<wish_of>(wish);
    *count = 0;
    if (!fits(what, a, b, c, d)) return 7;
    for (int i = 0; i < ALGORITHMS && *count < room; i++) {
        if (asked("only") >= 0 && asked("only") != order[i]) continue;
        if (order[i] == REDUCE && w->reduction == lt::REDUCTION_NONE) continue;
        lt::heuristic *h = &list[(*count)++];
        memset(h, 0, sizeof *h);
        h->algo.data[0] = 0x485300u | (unsigned)order[i];
        h->algo.data[1] = promised(*w);
        h->workspace_bytes = order[i] == 2 ? w->workspace + 1 : 4096; /* 2 needs too much */
        if (asked("only") == 2) h->workspace_bytes = 0;
    }
    return *count ? 0 : lt::NOT_SUPPORTED;
}

lt::status check(void *, lt::description *what, lt::layout *a, lt::layout *b, lt::layout *c,
                 lt::layout *d, const lt::algorithm *algo, lt::heuristic *told) {
    const int number = number_of(algo);
    if (number < 0 || number >= ALGORITHMS || !fits(what, a, b, c, d)) return 7;
    if (asked("refuse") == number) return lt::NOT_SUPPORTED;
    told->workspace_bytes = 0;
    return 0;
}

lt::status config_get(const lt::algorithm *algo, int attribute, void *to, size_t bytes,
                      size_t *written) {
    const int number = number_of(algo);
    if (number < 0 || bytes != 4) return 7;
    const uint32_t value = attribute == lt::CONFIG_SPLITK_NUM  ? number == SPLIT ? 4 : 1
                           : attribute == lt::CONFIG_REDUCTION ? number == REDUCE ? 2 : 0
                                                               : 99;
    if (value == 99) return 7;
    memcpy(to, &value, 4);
    *written = 4;
    return 0;
}

lt::status cap_get(const lt::algorithm *algo, int attribute, void *to, size_t bytes,
                   size_t *written) {
    if (number_of(algo) < 0 || attribute != lt::CAP_NUMERICAL_FLAGS || bytes != 8) return 7;
    const uint64_t flags = lt::ACCUMULATOR_32F | (number_of(algo) == TF32 ? lt::INPUT_TF32 : 0);
    memcpy(to, &flags, 8);
    *written = 8;
    return 0;
}

struct sum_of {
    const void *a, *b;
    int type_a, type_b;
    int64_t k, step_a, step_b;
};

float chain(const sum_of &s, int64_t first, int64_t step, float sum) {
    for (int64_t k = first; k >= 0 && k < s.k; k += step)
        sum = fmaf(read(s.a, k * s.step_a, s.type_a), read(s.b, k * s.step_b, s.type_b), sum);
    return sum;
}

const char *element(const void *at, int64_t i, int type) {
    return static_cast<const char *>(at) + i * (type == lt::R_32F ? 4 : is_fp8(type) ? 1 : 2);
}

/* A product that a stream does when its turn comes. */
struct job {
    what_of what;
    side_of a, b, c, d;
    const void *at_a, *at_b, *at_c;
    void *at_d, *workspace;
    size_t workspace_bytes;
    float by, old;
    int number;
};

int work(void *closure) {
    const job &j = *static_cast<const job *>(closure);
    const int64_t k = (int64_t)(j.what.transa ? j.a.rows : j.a.columns);
    memset(j.workspace, 0xff, j.workspace_bytes < 4096 ? j.workspace_bytes : 4096);
    for (int64_t column = 0; column < (int64_t)j.d.columns; column++)
        for (int64_t row = 0; row < (int64_t)j.d.rows; row++) {
            sum_of s;
            s.a = element(j.at_a, j.what.transa ? row * j.a.ld : row, j.a.type);
            s.b = element(j.at_b, j.what.transb ? column : column * j.b.ld, j.b.type);
            s.type_a = j.a.type, s.type_b = j.b.type, s.k = k;
            s.step_a = j.what.transa ? 1 : j.a.ld, s.step_b = j.what.transb ? j.b.ld : 1;
            float x = j.number == 1   ? chain(s, 1, 2, chain(s, 0, 2, 0.0f))
                      : j.number == 2 ? chain(s, k - 1, -1, 0.0f)
                                      : chain(s, 0, 1, 0.0f);
            x = x * j.by;
            if (j.what.scale_a) x = (x * *j.what.scale_a) * *j.what.scale_b;
            if (j.old != 0.0f) x = x + j.old * read(j.at_c, row + column * j.c.ld, j.c.type);
            if (j.what.epilogue & lt::EPILOGUE_BIAS) x = x + read(j.what.bias, row, j.d.type);
            if (j.d.type == lt::R_32F)
                static_cast<float *>(j.at_d)[row + column * j.d.ld] = x;
            else
                narrow(x, static_cast<bf16 *>(j.at_d) + row + column * j.d.ld);
        }
    return 0;
}

lt::status matmul(void *, lt::description *what, const void *alpha, const void *a, lt::layout *la,
                  const void *b, lt::layout *lb, const void *beta, const void *c, lt::layout *lc,
                  void *d, lt::layout *ld, const lt::algorithm *algo, void *workspace,
                  size_t workspace_bytes, void *on) {
    const int number = number_of(algo);
    if (number < 0 || number >= ALGORITHMS || !fits(what, la, lb, lc, ld)) return 7;
    if (asked("balk") == number) return lt::NOT_SUPPORTED;
    const void *const operands[4] = {a, b, c, d};
    if (!keeps(algo->data[1], operands)) return 7;
    job j = {*inside<what_of>(what),
             *inside<side_of>(la),
             *inside<side_of>(lb),
             *inside<side_of>(lc),
             *inside<side_of>(ld),
             a,
             b,
             c,
             d,
             workspace,
             workspace_bytes,
             0.0f,
             0.0f,
             number};
    memcpy(&j.by, alpha, 4);
    memcpy(&j.old, beta, 4);
    const int64_t k = (int64_t)(j.what.transa ? j.a.rows : j.a.columns), fastest = asked("fastest");
    const bool cold = now_ns < COLD_NS;
    int64_t takes = (fastest < 0 ? number == (k % 2 ? 0 : 1) : fastest == number) ? 15 : 25;
    if (number == SPLIT || number == TF32) takes -= 10;
    now_ns += takes * (cold ? 2 : 1) * MS;
    const cudaStream_t stream = static_cast<cudaStream_t>(on);
    if (!stream) return work(&j);
    const cudaError_t before = cudaPeekAtLastError();
    static const char *const kernels[ALGORITHMS] = {"cublaslt 0", "cublaslt 1", "cublaslt 2",
                                                    "cublaslt 3", "cublaslt 4", "cublaslt 5"};
    const bool taken = hs_emulated::enqueue(stream, kernels[number], work, &j, sizeof j) == 0;
    hs_emulated::leave_last_error(before);
    return taken ? 0 : 13;
}

int wait_stream(void *on) {
    return on ? cudaStreamSynchronize(static_cast<cudaStream_t>(on)) : 0;
}
int64_t clock_ns() {
    return now_ns;
}

} // namespace

hs_status lt::open(api *out, hs_why *why) {
    if (asked("missing") >= 0)
        return hs_fail(why, HS_E_UNSUPPORTED, "the emulated cuBLASLt is said to be missing");
    *out = api{create,   destroy,         version,        text_of, layout_init, desc_init,
               desc_set, preference_init, preference_set, offer,   check,       config_get,
               cap_get,  matmul,          wait_stream,    clock_ns};
    return HS_OK;
}
