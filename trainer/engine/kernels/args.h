/* The arguments of each kernel by name: hs_<name>_args has the operands, dims and reals of its row of
 * wire/kernels.h, and dtype. hs_<name>_args_of takes them out of an hs_args, hs_<name>_args_to makes
 * one; this is the only place where a kernel's arguments are counted. C++ may include it.
 *
 *     hs_linear_fwd_args { void *y, *x, *w, *b, *res; int64_t R, N, K, ldy, ldx, ldres; uint32_t dtype; }
 *     hs_adamw_args      { void *w, *m, *v, *g, *wc, *ctl; int64_t n, ZERO_G; double beta1, ...; ... }
 */
#ifndef HS_KERNELS_ARGS_H
#define HS_KERNELS_ARGS_H

#include <string.h>

#include "kernels/kernels.h"

#define READ(name, ...)    *name
#define WRITE(name, ...)   *name
#define UPDATE(name, ...)  *name
#define SCRATCH(name, ...) *name
#define DIMS(...)          __VA_ARGS__
#define REALS(...)         double __VA_ARGS__;
#define NO_REALS

/* Pointers, integers and reals are 8 bytes each and lie one after the other as in the table. */
static inline void hs_args_split(const hs_args *args, void *to, size_t ptr_bytes, size_t dim_bytes,
                                 size_t bytes) {
    memcpy(to, args->ptr, ptr_bytes);
    memcpy((char *)to + ptr_bytes, args->dim, dim_bytes);
    memcpy((char *)to + ptr_bytes + dim_bytes, args->real, bytes - ptr_bytes - dim_bytes);
}

static inline hs_args hs_args_join(const void *from, size_t ptr_bytes, size_t dim_bytes,
                                   size_t bytes, uint32_t dtype) {
    hs_args args;
    memset(&args, 0, sizeof args);
    memcpy(args.ptr, from, ptr_bytes);
    memcpy(args.dim, (const char *)from + ptr_bytes, dim_bytes);
    memcpy(args.real, (const char *)from + ptr_bytes + dim_bytes, bytes - ptr_bytes - dim_bytes);
    args.dtype = dtype;
    return args;
}

#define X(number, NAME, name, dims, sizes, switch_, reals, holds, gradient, work, ...)             \
    typedef struct hs_##name##_args {                                                              \
        void __VA_ARGS__;                                                                          \
        int64_t dims;                                                                              \
        reals uint32_t dtype;                                                                      \
    } hs_##name##_args;                                                                            \
    struct hs_##name##_ptrs {                                                                      \
        void __VA_ARGS__;                                                                          \
    };                                                                                             \
    struct hs_##name##_dims {                                                                      \
        int64_t dims;                                                                              \
    };                                                                                             \
    static inline hs_##name##_args hs_##name##_args_of(const hs_args *args) {                      \
        hs_##name##_args a;                                                                        \
        hs_args_split(args, &a, sizeof(struct hs_##name##_ptrs), sizeof(struct hs_##name##_dims),  \
                      offsetof(hs_##name##_args, dtype));                                          \
        a.dtype = args->dtype;                                                                     \
        return a;                                                                                  \
    }                                                                                              \
    static inline hs_args hs_##name##_args_to(const hs_##name##_args *a) {                         \
        return hs_args_join(a, sizeof(struct hs_##name##_ptrs), sizeof(struct hs_##name##_dims),   \
                            offsetof(hs_##name##_args, dtype), a->dtype);                          \
    }
HS_KERNELS(X)
#undef X

#undef READ
#undef WRITE
#undef UPDATE
#undef SCRATCH
#undef DIMS
#undef REALS
#undef NO_REALS

#endif
