/* What a call touches: a table of operands (a type, and rows and columns as products of dims), a
 * table of what dims must satisfy, and one place that multiplies with a check for overflow.
 */
#include "kernels/attention.h"
#include "kernels/optimizer.h"
#include "wire/plan.h"

enum type { NOTHING = 0, DT, ACC, INT, DOUBLE, CONTROL, BYTE };

/* An operand: `rows` rows of `columns` elements, each row `ld` elements after the last; rows and
 * columns are products of dims, given as text, one letter a dim ('a' is dim[0], 'b' dim[1] ...), a
 * digit is a factor. ld is a letter, or 0: dense. */
typedef struct operand {
    uint8_t type;
    bool optional;
    char rows[5], columns[5];
    char ld;
} operand;

/* A kernel: dims that are sizes (> 0) and dims that are switches (0 or 1), and its operands. Dims
 * that are row distances are checked where the operand is: an absent operand's may be anything. */
typedef struct kernel {
    char sizes[8];
    char flag;
    operand operands[HS_CALL_PTRS];
} kernel;

static const kernel kernels[HS_K_COUNT] = {
    [HS_K_EMBED_FWD] =
        {"abcd",
         0,
         {{DT, 0, "a", "b", 0}, {INT, 0, "", "a", 0}, {DT, 0, "c", "b", 0}, {DT, 1, "d", "b", 0}}},
    [HS_K_EMBED_WGRAD] = {"abcd",
                          0,
                          {{ACC, 0, "c", "b", 0},
                           {ACC, 1, "d", "b", 0},
                           {DT, 0, "a", "b", 0},
                           {INT, 0, "", "a", 0}}},
    [HS_K_LAYERNORM_FWD] = {"ab",
                            0,
                            {{DT, 0, "a", "b", 0},
                             {ACC, 0, "", "a", 0},
                             {ACC, 0, "", "a", 0},
                             {DT, 0, "a", "b", 0},
                             {ACC, 0, "", "b", 0},
                             {ACC, 0, "", "b", 0}}},
    [HS_K_LAYERNORM_IGRAD] = {"ab",
                              'c',
                              {{DT, 0, "a", "b", 0},
                               {DT, 0, "a", "b", 0},
                               {DT, 0, "a", "b", 0},
                               {ACC, 0, "", "b", 0},
                               {ACC, 0, "", "a", 0},
                               {ACC, 0, "", "a", 0}}},
    [HS_K_LAYERNORM_WGRAD] = {"ab",
                              0,
                              {{ACC, 0, "", "b", 0},
                               {ACC, 0, "", "b", 0},
                               {DT, 0, "a", "b", 0},
                               {DT, 0, "a", "b", 0},
                               {ACC, 0, "", "a", 0},
                               {ACC, 0, "", "a", 0}}},
    [HS_K_RMSNORM_FWD] = {"abc",
                          0,
                          {{DT, 0, "a", "bc", 'e'},
                           {ACC, 0, "a", "b", 0},
                           {DT, 0, "a", "bc", 'd'},
                           {ACC, 0, "", "c", 0}}},
    [HS_K_RMSNORM_IGRAD] = {"abc",
                            'g',
                            {{DT, 0, "a", "bc", 'd'},
                             {DT, 0, "a", "bc", 'e'},
                             {DT, 0, "a", "bc", 'f'},
                             {ACC, 0, "", "c", 0},
                             {ACC, 0, "a", "b", 0}}},
    [HS_K_RMSNORM_WGRAD] = {"abc",
                            0,
                            {{ACC, 0, "", "c", 0},
                             {DT, 0, "a", "bc", 'd'},
                             {DT, 0, "a", "bc", 'e'},
                             {ACC, 0, "a", "b", 0}}},
    [HS_K_LINEAR_FWD] = {"abc",
                         0,
                         {{DT, 0, "a", "b", 'd'},
                          {DT, 0, "a", "c", 'e'},
                          {DT, 0, "b", "c", 0},
                          {ACC, 1, "", "b", 0},
                          {DT, 1, "a", "b", 'f'}}},
    [HS_K_LINEAR_IGRAD] = {"abc",
                           'f',
                           {{DT, 0, "a", "c", 'd'}, {DT, 0, "a", "b", 'e'}, {DT, 0, "b", "c", 0}}},
    [HS_K_LINEAR_WGRAD] = {"abc",
                           0,
                           {{ACC, 0, "b", "c", 0},
                            {ACC, 1, "", "b", 0},
                            {DT, 0, "a", "b", 'd'},
                            {DT, 0, "a", "c", 'e'}}},
    [HS_K_ATTENTION_FWD] = {"abcde",
                            0,
                            {{DT, 0, "ab", "ce", 'f'},
                             {ACC, 0, "ac", "b", 0},
                             {DT, 0, "ab", "ce", 'g'},
                             {DT, 0, "ab", "de", 'h'},
                             {DT, 0, "ab", "de", 'i'}}},
    [HS_K_ATTENTION_IGRAD] = {"abcde",
                              0,
                              {{DT, 0, "ab", "ce", 'f'},
                               {DT, 0, "ab", "de", 'g'},
                               {DT, 0, "ab", "de", 'h'},
                               {DT, 0, "ab", "ce", 'i'},
                               {DT, 0, "ab", "ce", 'j'},
                               {DT, 0, "ab", "ce", 'k'},
                               {DT, 0, "ab", "de", 'l'},
                               {DT, 0, "ab", "de", 'm'},
                               {ACC, 0, "ac", "b", 0},
                               {ACC, 0, "ac", "b", 0}}},
    [HS_K_ROPE_TABLE] = {"ab", 0, {{ACC, 0, "a", "b", 0}}},
    [HS_K_ROPE_FWD] = {"abcd", 0, {{DT, 0, "a", "cd", 'e'}, {ACC, 0, "b", "d", 0}}},
    [HS_K_ROPE_IGRAD] = {"abcd", 0, {{DT, 0, "a", "cd", 'e'}, {ACC, 0, "b", "d", 0}}},
    [HS_K_GELU_FWD] = {"a", 0, {{DT, 0, "", "a", 0}, {DT, 0, "", "a", 0}}},
    [HS_K_GELU_IGRAD] = {"a", 0, {{DT, 0, "", "a", 0}, {DT, 0, "", "a", 0}, {DT, 0, "", "a", 0}}},
    [HS_K_SWIGLU_FWD] = {"ab", 0, {{DT, 0, "a", "b", 0}, {DT, 0, "a", "2b", 0}}},
    [HS_K_SWIGLU_IGRAD] = {"ab",
                           0,
                           {{DT, 0, "a", "2b", 0}, {DT, 0, "a", "b", 0}, {DT, 0, "a", "2b", 0}}},
    [HS_K_CLASSIFIER_FWD] = {"abcd",
                             0,
                             {{ACC, 0, "", "a", 0},
                              {DT, 0, "a", "b", 0},
                              {DT, 0, "c", "b", 0},
                              {INT, 0, "", "a", 0},
                              {ACC, 0, "d", "c", 0}}},
    [HS_K_CLASSIFIER_GRAD] = {"abcd",
                              0,
                              {{ACC, 0, "", "a", 0},
                               {DT, 0, "a", "b", 0},
                               {ACC, 0, "c", "b", 0},
                               {DT, 0, "a", "b", 0},
                               {DT, 0, "c", "b", 0},
                               {INT, 0, "", "a", 0},
                               {ACC, 0, "d", "c", 0},
                               {DT, 0, "d", "c", 0}}},
    [HS_K_LOGITS] = {"abc", 0, {{ACC, 0, "a", "c", 0}, {DT, 0, "a", "b", 0}, {DT, 0, "c", "b", 0}}},
    [HS_K_ADD_ACC] = {"a", 0, {{ACC, 0, "", "a", 0}, {ACC, 0, "", "a", 0}}},
    /* the length of part is not a product: see hs_kernel_extent */
    [HS_K_SUMSQ] = {"a", 0, {{DOUBLE, 0, "", "", 0}, {ACC, 0, "", "a", 0}, {DOUBLE, 0, "", "", 0}}},
    [HS_K_ADAMW] = {"a",
                    'b',
                    {{ACC, 0, "", "a", 0},
                     {ACC, 0, "", "a", 0},
                     {ACC, 0, "", "a", 0},
                     {ACC, 0, "", "a", 0},
                     {DT, 1, "", "a", 0},
                     {CONTROL, 0, "", "", 0}}},
    [HS_K_ZERO] = {"a", 0, {{BYTE, 0, "", "a", 0}}},
    [HS_K_INIT_NORMAL] = {"a", 0, {{ACC, 0, "", "a", 0}}},
    [HS_K_INIT_CONST] = {"a", 0, {{ACC, 0, "", "a", 0}}},
    [HS_K_CAST] = {"a", 0, {{DT, 0, "", "a", 0}, {ACC, 0, "", "a", 0}}},
};

static int64_t bytes_of_type(uint8_t type, uint16_t dtype) {
    switch (type) {
    case DT:
        return dtype == HS_BF16 ? 2 : dtype == HS_F64 ? 8 : 4;
    case ACC:
        return dtype == HS_F64 ? 8 : 4;
    case INT:
        return 4;
    case DOUBLE:
        return 8;
    case CONTROL:
        return (int64_t)sizeof(hs_step_control);
    default:
        return 1;
    }
}

/* The product that the text stands for ("": 1). False: beyond int64. */
static bool product(const char *factors, const int64_t dim[], int64_t *out) {
    *out = 1;
    for (; *factors; factors++) {
        int64_t f = *factors >= 'a' ? dim[*factors - 'a'] : *factors - '0';
        if (__builtin_mul_overflow(*out, f, out)) return false;
    }
    return true;
}

/* What the letters of a kernel must satisfy beyond being sizes and switches. */
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
    const kernel *k = &kernels[number];
    for (const char *p = k->sizes; *p; p++)
        if (dim[*p - 'a'] <= 0) return false;
    if (k->flag && dim[k->flag - 'a'] != 0 && dim[k->flag - 'a'] != 1) return false;
    return dims_agree(number, dim);
}

static bool operand_exists(uint16_t number, int index) {
    return number > 0 && number < HS_K_COUNT && index >= 0 && index < HS_CALL_PTRS &&
           kernels[number].operands[index].type != NOTHING;
}

bool hs_kernel_operand_optional(uint16_t number, int index) {
    return operand_exists(number, index) && kernels[number].operands[index].optional;
}

hs_status hs_kernel_extent(uint16_t number, uint16_t dtype, const int64_t dim[], int index,
                           uint64_t *bytes) {
    if (!operand_exists(number, index)) return HS_E_CONFIG;
    if (dtype != HS_F32 && dtype != HS_BF16 && dtype != HS_F64) return HS_E_CONFIG;
    if (!dims_valid(number, dim)) return HS_E_CONFIG;

    const operand *o = &kernels[number].operands[index];
    int64_t rows, columns, total;
    if (!product(o->rows, dim, &rows) || !product(o->columns, dim, &columns)) return HS_E_OVERFLOW;
    if (number == HS_K_SUMSQ && index == 2)
        columns = dim[0] / HS_SUMSQ_BLOCK + (dim[0] % HS_SUMSQ_BLOCK != 0);
    const int64_t ld = o->ld ? dim[o->ld - 'a'] : columns;
    if (ld < columns) return HS_E_CONFIG; /* rows would overlap */
    if (__builtin_mul_overflow(rows - 1, ld, &total) ||
        __builtin_add_overflow(total, columns, &total) ||
        __builtin_mul_overflow(total, bytes_of_type(o->type, dtype), &total))
        return HS_E_OVERFLOW;
    *bytes = (uint64_t)total;
    return HS_OK;
}
