/* The table of wire/kernels.h as data, and what follows from it: which bytes a call touches, what it
 * does, and whether two of its operands may lie as they do. One place multiplies, with a check for
 * overflow.
 */
#include <stdlib.h>
#include <string.h>

#include "kernels/kernels.h"
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
#define WITH(n)      .with = #n

#define DIMS(...)  #__VA_ARGS__
#define REALS(...) #__VA_ARGS__
#define NO_REALS   ""
#define GRADIENT(INPUT, WEIGHT, passed)                                                            \
    .input_gradient = HS_K_##INPUT, .weight_gradient = HS_K_##WEIGHT, .passes = (passed)
#define NO_GRADIENT   GRADIENT(NONE, NONE, "")
#define WORK(p, a, e) .products = (p), .again = (a), .each = (e)

#define X(number, NAME, name, dims, sizes, switch_, reals, holds, gradient, work, ...)             \
    static const hs_operand name##_operands[] = {__VA_ARGS__};
HS_KERNELS(X)
#undef X

static const hs_kernel_facts kernels[HS_K_COUNT] = {
#define X(number, NAME, name_, dims_, sizes_, switch_, reals_, holds_, gradient, work, ...)        \
    [number] = {.name = #name_,                                                                    \
                .dims = dims_,                                                                     \
                .reals = reals_,                                                                   \
                .one_or_zero = (switch_),                                                          \
                .sizes = (sizes_),                                                                 \
                .holds = holds_,                                                                   \
                gradient,                                                                          \
                work,                                                                              \
                .operand_count = (int)(sizeof name_##_operands / sizeof *name_##_operands),        \
                .operands = name_##_operands},
    HS_KERNELS(X)
#undef X
};

const hs_kernel_facts *hs_kernel_facts_of(uint32_t kernel) {
    return kernel > 0 && kernel < HS_K_COUNT ? &kernels[kernel] : NULL;
}

static bool divides(char c) {
    return c == ' ' || c == ',';
}

/* Length of the word that the text starts with; words end with a blank, a comma, or the text. Words
 * are a few letters and a plan's check asks for millions: strcspn's set-up alone takes longer. */
static size_t word(const char *text) {
    size_t n = 0;
    while (text[n] && !divides(text[n])) n++;
    return n;
}

/* Past a word and what divides it from the next. */
static const char *after(const char *text) {
    text += word(text);
    while (divides(*text)) text++;
    return text;
}

int hs_kernel_names(const char *names) {
    int count = 0;
    for (; *names; names = after(names)) count++;
    return count;
}

/* Position of a name among `names`; -1: it is none of them. */
static int position_of(const char *names, const char *name, size_t length) {
    for (int i = 0; *names; i++, names = after(names))
        if (word(names) == length && memcmp(names, name, length) == 0) return i;
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
    case HS_KIND_PLACES:
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

/* A dim or a number. */
static int64_t value_of(const hs_kernel_facts *k, const char *text, size_t length,
                        const int64_t dim[]) {
    const int i = position_of(k->dims, text, length);
    HS_ASSERT(i >= 0 || (*text >= '0' && *text <= '9'));
    return i >= 0 ? dim[i] : strtoll(text, NULL, 10);
}

static bool is_word(const char *text, const char *wanted) {
    const size_t n = strlen(wanted);
    return strncmp(text, wanted, n) == 0 && (!text[n] || divides(text[n]));
}

/* n (n + 1) / 2 of n from 0 on. False: beyond int64. */
static bool pairs_of(int64_t n, int64_t *out) {
    return n < INT64_MAX &&
           !__builtin_mul_overflow(n % 2 ? n : n / 2, n % 2 ? n / 2 + 1 : n + 1, out);
}

/* The product that the text stands for ("": 1). False: beyond int64. */
static bool product(const hs_kernel_facts *k, const char *factors, const int64_t dim[],
                    int64_t *out) {
    *out = 1;
    for (; *factors; factors = after(factors)) {
        const bool blocks = is_word(factors, "BLOCKS"), band = is_word(factors, "BAND");
        if (blocks || band) factors = after(factors);
        int64_t x = value_of(k, factors, word(factors), dim);
        if (blocks) x = x / HS_SUMSQ_BLOCK + (x % HS_SUMSQ_BLOCK != 0);
        if (band) {
            factors = after(factors);
            const int64_t width = value_of(k, factors, word(factors), dim);
            int64_t unseen = 0;
            if (width > 0 && width < x && !pairs_of(x - width, &unseen)) return false;
            if (!pairs_of(x, &x)) return false;
            x -= unseen;
        }
        if (__builtin_mul_overflow(*out, x, out)) return false;
    }
    return true;
}

hs_status hs_kernel_work(uint16_t kernel, const int64_t dim[], hs_work *work) {
    const hs_kernel_facts *k = &kernels[kernel];
    const bool fits = product(k, k->products, dim, &work->products) &&
                      product(k, k->again, dim, &work->again) &&
                      product(k, k->each, dim, &work->each);
    return fits ? HS_OK : HS_E_OVERFLOW;
}

/* What dims must satisfy beyond being sizes and switches. */
static bool dims_agree(const hs_kernel_facts *k, const int64_t dim[]) {
    for (const char *rule = k->holds; *rule; rule = after(rule)) {
        const size_t left = strcspn(rule, "|<");
        const char *right = rule + left + (rule[left] == '|' ? 1 : 2);
        const int64_t a = value_of(k, rule, left, dim), b = value_of(k, right, word(right), dim);
        if (rule[left] == '|' ? b % a != 0 : a > b) return false;
    }
    return true;
}

static bool dims_valid(const hs_kernel_facts *k, const int64_t dim[]) {
    for (int d = 0; d < k->sizes; d++)
        if (dim[d] <= 0) return false;
    if (k->one_or_zero[0]) {
        const int64_t flag = hs_kernel_dim(k, dim, k->one_or_zero);
        if (flag != 0 && flag != 1) return false;
    }
    return dims_agree(k, dim);
}

/* Rows side by side are one piece. The dims are valid. */
static hs_status pieces_of(const hs_kernel_facts *k, uint16_t dtype, const int64_t dim[],
                           int operand, hs_pieces *out) {
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
    *out = (hs_pieces){.count = rows, .bytes = columns * size, .stride = rows > 1 ? ld * size : 0};
    return HS_OK;
}

static int64_t extent_of(const hs_pieces *p) {
    return (p->count - 1) * p->stride + p->bytes;
}

hs_status hs_kernel_pieces(uint16_t kernel, uint16_t dtype, const int64_t dim[], int operand,
                           hs_pieces *out) {
    const hs_kernel_facts *k = hs_kernel_facts_of(kernel);
    if (!k || operand < 0 || operand >= k->operand_count) return HS_E_CONFIG;
    if (dtype != HS_F32 && dtype != HS_BF16 && dtype != HS_F64) return HS_E_CONFIG;
    if (!dims_valid(k, dim)) return HS_E_CONFIG;
    return pieces_of(k, dtype, dim, operand, out);
}

hs_status hs_kernel_extent(uint16_t kernel, uint16_t dtype, const int64_t dim[], int operand,
                           uint64_t *bytes) {
    hs_pieces p;
    HS_TRY(hs_kernel_pieces(kernel, dtype, dim, operand, &p));
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
static bool pieces_meet(const hs_pieces *a, const hs_pieces *b, int64_t distance) {
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
    hs_pieces p, q;
    if (pieces_of(k, dtype, dim, a, &p) != HS_OK || pieces_of(k, dtype, dim, b, &q) != HS_OK)
        return true;
    const bool may_be =
        (x->may_be && !strcmp(x->may_be, y->name)) || (y->may_be && !strcmp(y->may_be, x->name));
    if (may_be && at_a == at_b && !memcmp(&p, &q, sizeof p)) return false;
    return pieces_meet(&p, &q, (int64_t)(at_b - at_a));
}
