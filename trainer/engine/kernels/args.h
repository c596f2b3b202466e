/* The arguments of each kernel by name: hs_<name>_args has the operands, dims and reals of its row of
 * wire/kernels.h, and dtype. hs_<name>_args_of takes them out of an hs_args; this is the only place
 * where a kernel's arguments are counted. C++ may include it.
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
#define X(number, NAME, name, dims, sizes, switch_, reals, holds, gradient, work, ...)             \
    typedef struct hs_##name##_args {                                                              \
        void __VA_ARGS__;                                                                          \
        int64_t dims;                                                                              \
        reals uint32_t dtype;                                                                      \
    } hs_##name##_args;                                                                            \
    static inline hs_##name##_args hs_##name##_args_of(const hs_args *args) {                      \
        struct ptrs {                                                                              \
            void __VA_ARGS__;                                                                      \
        };                                                                                         \
        struct integers {                                                                          \
            int64_t dims;                                                                          \
        };                                                                                         \
        hs_##name##_args a;                                                                        \
        char *const to = (char *)&a;                                                               \
        const size_t from_reals = sizeof(struct ptrs) + sizeof(struct integers);                   \
        memcpy(to, args->ptr, sizeof(struct ptrs));                                                \
        memcpy(to + sizeof(struct ptrs), args->dim, sizeof(struct integers));                      \
        memcpy(to + from_reals, args->real, offsetof(hs_##name##_args, dtype) - from_reals);       \
        a.dtype = args->dtype;                                                                     \
        return a;                                                                                  \
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
