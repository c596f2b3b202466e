/* The table of wire/kernels.h as data, and what follows from it: which bytes a call touches, and
 * whether two of its operands may lie as they do. One place multiplies, with a check for overflow.
 */
#include <string.h>

#include "kernels/attention.h"
#include "kernels/optimizer.h"
#include "wire/plan.h"

#define OPERAND(what, n, type, r, c, l, ...)                                                       \
    {.name = #n,                                                                                   \
     .role = HS_ROLE_##what,                                                                       \
     .kind = HS_KIND_##type,                                                                       \
     .rows = (r),                                                                                  \
     .columns = (c),                                                                               \
     .ld = (l),                                                                                    \
     __VA_ARGS__}
#define READ(...)    OPERAND(READ, __VA_ARGS__, )
#define WRITE(...)   OPERAND(WRITE, __VA_ARGS__, )
#define UPDATE(...)  OPERAND(UPDATE, __VA_ARGS__, )
#define SCRATCH(...) OPERAND(SCRATCH, __VA_ARGS__, )
#define OPTIONAL     .optional = true
#define BELOW(dim)   .below = #dim
#define MAY_BE(n)    .may_be = #n

#define X(number, NAME, name, d, s, z, r, ...)                                                     \
    static const hs_operand name##_operands[] = {__VA_ARGS__};
HS_KERNELS(X)
#undef X

static const hs_kernel_facts kernels[HS_K_COUNT] = {
#define X(number, NAME, name_, dims_, sizes_, switch_, reals_, ...)                                \
    [number] = {.name = #name_,                                                                    \
                .dims = (dims_),                                                                   \
                .reals = (reals_),                                                                 \
                .one_or_zero = (switch_),                                                          \
                .sizes = (sizes_),                                                                 \
                .operand_count = (int)(sizeof name_##_operands / sizeof *name_##_operands),        \
                .operands = name_##_operands},
    HS_KERNELS(X)
#undef X
};

const hs_kernel_facts *hs_kernel_facts_of(uint32_t kernel) {
    return kernel > 0 && kernel < HS_K_COUNT ? &kernels[kernel] : NULL;
}

int hs_kernel_names(const char *names) {
    int count = names[0] != '\0';
    for (; *names; names++) count += *names == ' ';
    return count;
}

/* Position of a name among `names`; -1: it is none of them. */
static int position_of(const char *names, const char *name, size_t length) {
    for (int i = 0; *names; i++) {
        const size_t n = strcspn(names, " ");
        if (n == length && memcmp(names, name, n) == 0) return i;
        names += n + (names[n] == ' ');
    }
    return -1;
}

int64_t hs_kernel_dim(const hs_kernel_facts *facts, const int64_t dim[], const char *name) {
    const int i = position_of(facts->dims, name, strlen(name));
    return i < 0 ? 0 : dim[i];
}

static int64_t bytes_of_kind(hs_kind kind, uint16_t dtype) {
    switch (kind) {
    case HS_KIND_DT:
        return dtype == HS_BF16 ? 2 : dtype == HS_F64 ? 8 : 4;
    case HS_KIND_ACC:
        return dtype == HS_F64 ? 8 : 4;
    case HS_KIND_TOKENS:
    case HS_KIND_TARGETS:
        return 4;
    case HS_KIND_F64:
        return 8;
    case HS_KIND_CONTROL:
        return (int64_t)sizeof(hs_step_control);
    case HS_KIND_BYTE:
        return 1;
    }
    return 1;
}

/* The product that the text stands for ("": 1). False: beyond int64. */
static bool product(const hs_kernel_facts *k, const char *factors, const int64_t dim[],
                    int64_t *out) {
    bool blocks = false;
    *out = 1;
    while (*factors) {
        const size_t n = strcspn(factors, " ");
        const int i = position_of(k->dims, factors, n);
        if (n == 6 && memcmp(factors, "BLOCKS", n) == 0) {
            blocks = true;
        } else {
            HS_ASSERT(i >= 0 || (n == 1 && *factors >= '1' && *factors <= '9'));
            if (__builtin_mul_overflow(*out, i < 0 ? *factors - '0' : dim[i], out)) return false;
        }
        factors += n + (factors[n] == ' ');
    }
    if (blocks) *out = *out / HS_SUMSQ_BLOCK + (*out % HS_SUMSQ_BLOCK != 0);
    return true;
}

/* What dims must satisfy beyond being sizes and switches. */
static bool dims_agree(uint16_t number, const int64_t dim[]) {
    switch (number) {
    case HS_K_EMBED_FWD:
    case HS_K_EMBED_WGRAD: /* whole sequences; tokens are i32 */
        return dim[0] % dim[3] == 0 && dim[2] <= INT32_MAX;
    case HS_K_ATTENTION_FWD:
    case HS_K_ATTENTION_IGRAD: /* heads share evenly; a row fits on the stack */
        return dim[2] % dim[3] == 0 && dim[4] <= HS_ATTENTION_HEAD_MAX;
    case HS_K_ROPE_TABLE: /* pairs; angles that core/math.h takes */
        return dim[1] % 2 == 0 && dim[0] <= 1 << 30;
    case HS_K_ROPE_FWD:
    case HS_K_ROPE_IGRAD:
        return dim[0] % dim[1] == 0 && dim[3] % 2 == 0;
    case HS_K_CLASSIFIER_FWD:
    case HS_K_CLASSIFIER_GRAD:
        return dim[2] <= INT32_MAX;
    case HS_K_INIT_NORMAL:
        return dim[1] >= 0 && dim[1] <= UINT32_MAX;
    default:
        return true;
    }
}

static bool dims_valid(uint16_t number, const int64_t dim[]) {
    const hs_kernel_facts *k = &kernels[number];
    for (int d = 0; d < k->sizes; d++)
        if (dim[d] <= 0) return false;
    if (k->one_or_zero[0]) {
        const int64_t flag = hs_kernel_dim(k, dim, k->one_or_zero);
        if (flag != 0 && flag != 1) return false;
    }
    return dims_agree(number, dim);
}

/* An operand as equal pieces: `count` of `bytes`, each `stride` after the last. */
typedef struct pieces {
    int64_t count, bytes, stride;
} pieces;

/* Rows side by side are one piece. The dims are valid. */
static hs_status pieces_of(const hs_kernel_facts *k, uint16_t dtype, const int64_t dim[],
                           int operand, pieces *out) {
    const hs_operand *o = &k->operands[operand];
    const int64_t size = bytes_of_kind(o->kind, dtype);
    int64_t rows, columns;
    if (!product(k, o->rows, dim, &rows) || !product(k, o->columns, dim, &columns))
        return HS_E_OVERFLOW;
    const int64_t ld = o->ld[0] ? hs_kernel_dim(k, dim, o->ld) : columns;
    if (ld < columns) return HS_E_CONFIG; /* rows would overlap */
    if (ld == columns) {
        if (__builtin_mul_overflow(rows, columns, &columns)) return HS_E_OVERFLOW;
        rows = 1;
    }
    int64_t whole;
    if (__builtin_mul_overflow(rows - 1, ld, &whole) ||
        __builtin_add_overflow(whole, columns, &whole) ||
        __builtin_mul_overflow(whole, size, &whole))
        return HS_E_OVERFLOW;
    *out = (pieces){.count = rows, .bytes = columns * size, .stride = rows > 1 ? ld * size : 0};
    return HS_OK;
}

static int64_t extent_of(const pieces *p) {
    return (p->count - 1) * p->stride + p->bytes;
}

hs_status hs_kernel_extent(uint16_t kernel, uint16_t dtype, const int64_t dim[], int operand,
                           uint64_t *bytes) {
    const hs_kernel_facts *k = hs_kernel_facts_of(kernel);
    if (!k || operand < 0 || operand >= k->operand_count) return HS_E_CONFIG;
    if (dtype != HS_F32 && dtype != HS_BF16 && dtype != HS_F64) return HS_E_CONFIG;
    if (!dims_valid(kernel, dim)) return HS_E_CONFIG;
    pieces p;
    HS_TRY(pieces_of(k, dtype, dim, operand, &p));
    *bytes = (uint64_t)extent_of(&p);
    return HS_OK;
}

uint64_t hs_operand_alignment(const hs_operand *operand, uint16_t dtype) {
    return operand->kind == HS_KIND_CONTROL ? _Alignof(hs_step_control)
                                            : (uint64_t)bytes_of_kind(operand->kind, dtype);
}

static int64_t floor_div(int64_t a, int64_t b) {
    return a / b - (a % b != 0 && (a < 0) != (b < 0));
}

/* Whether a's pieces from 0 on and b's from `distance` on share a byte; of different strides: their
 * extents. Piece i of a meets piece j of b where -b.bytes < distance + (j - i) stride < a.bytes. */
static bool pieces_meet(const pieces *a, const pieces *b, int64_t distance) {
    if (distance <= -extent_of(b) || distance >= extent_of(a)) return false;
    if (a->stride && b->stride && a->stride != b->stride) return true;
    const int64_t stride = a->stride ? a->stride : b->stride;
    if (!stride) return true;
    const int64_t first = floor_div(-b->bytes - distance, stride) + 1;
    const int64_t last = floor_div(a->bytes - 1 - distance, stride);
    return first <= last && first <= b->count - 1 && last >= -(a->count - 1);
}

bool hs_kernel_clash(uint16_t kernel, uint16_t dtype, const int64_t dim[], int a, uint64_t at_a,
                     int b, uint64_t at_b) {
    const hs_kernel_facts *k = &kernels[kernel];
    const hs_operand *x = &k->operands[a], *y = &k->operands[b];
    if (x->role == HS_ROLE_READ && y->role == HS_ROLE_READ) return false;
    pieces p, q;
    if (pieces_of(k, dtype, dim, a, &p) != HS_OK || pieces_of(k, dtype, dim, b, &q) != HS_OK)
        return true;
    const bool may_be =
        (x->may_be && !strcmp(x->may_be, y->name)) || (y->may_be && !strcmp(y->may_be, x->name));
    if (may_be && at_a == at_b && !memcmp(&p, &q, sizeof p)) return false;
    return pieces_meet(&p, &q, (int64_t)(at_b - at_a));
}
