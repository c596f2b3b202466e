/* The table of kernels: one number, one name, one fixed list of operands each, what its gradients are, what it costs.
 * The only place that says so: typed arguments (kernels/args.h), extents and work (kernels/extent.c), the loader's
 * checks (run/plan/), the plan fuzzer, and `wire` (which trainer/wire/kernels.py is compared with, and so the expand
 * pass, the layout, the simulator and MFU) all read it. C++ may include it.
 *
 * A plan names a kernel by its number (HS_K_*), its element type (HS_F32 ...), up to HS_CALL_PTRS operand
 * references, HS_CALL_DIMS integers and HS_CALL_REALS reals, in the order given here. kernels/<op>.h says what is
 * computed and in which order the sums are taken.
 *
 * X(number, NAME, name, dims, sizes, switch, reals, holds, gradient, work, operands ...)
 *   dims      DIMS(names, in order). The first `sizes` of them must be above 0; `switch` names one that is 0 or 1.
 *             ld* is the distance between two rows of an operand, in elements, at least its columns.
 *   reals     REALS(names, in order), or NO_REALS
 *   holds     what else must hold of dims, all of it: "a|b", a divides b; "a<=b"; each a dim or a number
 *   gradient  GRADIENT(INPUT, WEIGHT, passes): the kernels that give the gradient of its inputs and of its weights
 *             (NONE: there is none; twice the same: one call gives both), and the operand whose gradient is that of the
 *             output as it is; NO_GRADIENT for what no program derives. Names say what a gradient kernel takes:
 *             d<operand> is the gradient of the forward call's operand; UPDATE of an operand that forward changes in
 *             place is that value's gradient, changed back in place; any other operand, dim or real is the forward
 *             call's of that name. Beside them: ld<operand>, the row distance of what is given for it; ACCUM, 1 where
 *             the gradient has a part already (dx; of dw the lowering says, which writes what a step has first); CHUNK
 *             and scale, the head's. Where forward takes <v>8 and <v>s, what
 *             QUANTISE makes of a value or of a weight, also: <v>8t, its transpose; d<v>, the gradient of v itself; and
 *             of the gradient of an output d<v>8, d<v>8t, d<v>s, in E5M2; old, what ACCUM adds to where that must stay
 *             as it is (absent: what is written).
 *   work      WORK(products, again, each): multiply-adds of the matrix products that the mathematics has, of products
 *             that are computed again, and other operations (a rounded number an element: memory decides their time)
 *
 * ROLE(name, type, rows, columns, ld, ...)   an operand: `rows` rows of `columns` elements; ld is the name of a dim, or
 *                                            "": dense
 *   READ     is only read. Two READ operands may overlap, and only they.
 *   WRITE    is written wholly and not read before
 *   UPDATE   is read and written ("+=")
 *   SCRATCH  is written; its bytes mean nothing afterwards
 *   type     DT the call's element type; ACC f32, or f64 where the call's is f64 (oracle only); F64; BYTE;
 *            TOKENS and TARGETS i32, the position's own, each below the dim `below`; CONTROL the position's
 *            hs_step_control; PLACES i32, places in a sequence: for one outside a kernel takes the nearest (SCRATCH:
 *            rows of its own)
 *   OPTIONAL       may be absent (HS_SPACE_NONE)
 *   WITH(name)     may be absent where that operand is, and is not looked at then
 *   MAY_BE(name)   may be the same memory as that operand, at the same place; else they do not overlap
 * Matrices of weights are DT, vectors of weights (norms, biases) ACC, gradients of weights ACC.
 *
 * Rows, columns and work are products of dims and numbers ("": 1). "BLOCKS n" is n / HS_SUMSQ_BLOCK rounded up,
 * "BAND n w" is what n causal queries see, each w keys at most, its own among them (w 0: all before it).
 *
 * Letters: B microbatch size, T sequence length, R = B*T rows, C width, H query heads, G key/value heads,
 * D head size, F hidden width of the MLP, V vocabulary, K inner and N outer size of a linear layer.
 */
#ifndef HS_WIRE_KERNELS_H
#define HS_WIRE_KERNELS_H

#define HS_CALL_PTRS 12
#define HS_CALL_DIMS 16
#define HS_CALL_REALS 6

/* Families of kernels, X(number, NAME, name): launch.kernel_path, hs_attempt.kernel_path. AUTO is the fastest that the
 * device runs. The attempt records what its gang runs; bits are those of one family (kernels/cpu has one in five, and
 * CUDA_EXACT is of it too but where kernels/cuda/cuda.h says otherwise). Those two of CUDA run on its devices, the
 * others on CPUs. */
#define HS_PATHS(X)                                                                                           \
    X(0, AUTO, "auto") X(1, REF, "ref") X(2, PORTABLE, "portable") X(3, AVX2, "avx2") X(4, AVX512, "avx512")  \
    X(5, CUDA_EXACT, "cuda-exact") X(6, CUDA, "cuda") X(7, AVX512_BF16, "avx512_bf16") X(8, NEON, "neon")

enum {
#define X(number, NAME, name) HS_PATH_##NAME = number,
    HS_PATHS(X)
#undef X
    HS_PATH_COUNT = 9
};

/* Element types; the size in bytes is 4, 2, 8, 4, 1, 1. A call's is one of the first three; operands of E4M3 or E5M2
 * are BYTE below. FP8 is a plan's alone: BF16, but the products of the layers take E4M3 and E5M2. */
enum { HS_F32 = 1, HS_BF16 = 2, HS_F64 = 3, HS_I32 = 4, HS_E4M3 = 5, HS_E5M2 = 6, HS_FP8 = 7 };

/* Partial maxima of a tensor that is quantised, at most. */
#define HS_QUANTISE_PARTS 1024

/* Head sizes go up to this: a row fits on the stack, and in registers of a GPU. */
#define HS_ATTENTION_HEAD_MAX 512
/* Elements of a block of sumsq. */
#define HS_SUMSQ_BLOCK 65536
/* Blocks of a vocabulary, at most. */
#define HS_VOCAB_BLOCKS 64

#define HS_TEXT_OF2(number) #number
#define HS_TEXT_OF(number)  HS_TEXT_OF2(number)

#define HS_KERNELS(X)                                                                                                 \
    /* y[r] = wte[tok[r]] + wpe[t], t = r % T, less first[r] where that is there (kernels/borders.h) */                \
    X(1, EMBED_FWD, embed_fwd, DIMS(R, C, V, T), 4, "", NO_REALS,                                                     \
      "T|R V<=2147483647", GRADIENT(NONE, EMBED_WGRAD, ""), WORK("0", "0", "R C"),                                    \
      WRITE(y, DT, "R", "C", ""), READ(tok, TOKENS, "", "R", "", BELOW(V)), READ(wte, DT, "V", "C", ""),              \
      READ(wpe, DT, "T", "C", "", OPTIONAL), READ(first, PLACES, "", "R", "", OPTIONAL))                              \
    X(2, EMBED_WGRAD, embed_wgrad, DIMS(R, C, V, T), 4, "", NO_REALS,                                                 \
      "T|R V<=2147483647", NO_GRADIENT, WORK("0", "0", "2 R C"),                                                      \
      UPDATE(dwte, ACC, "V", "C", ""), UPDATE(dwpe, ACC, "T", "C", "", OPTIONAL), READ(dy, DT, "R", "C", ""),         \
      READ(tok, TOKENS, "", "R", "", BELOW(V)), READ(first, PLACES, "", "R", "", OPTIONAL))                           \
    X(3, LAYERNORM_FWD, layernorm_fwd, DIMS(R, C), 2, "", REALS(eps),                                                 \
      "", GRADIENT(LAYERNORM_IGRAD, LAYERNORM_WGRAD, ""), WORK("0", "0", "8 R C"),                                    \
      WRITE(y, DT, "R", "C", ""), WRITE(mean, ACC, "", "R", ""), WRITE(rstd, ACC, "", "R", ""),                       \
      READ(x, DT, "R", "C", ""), READ(w, ACC, "", "C", ""), READ(b, ACC, "", "C", ""))                                \
    /* ACCUM 1: dx = old +, where old is absent dx +=; 0: dx = */                                                     \
    X(4, LAYERNORM_IGRAD, layernorm_igrad, DIMS(R, C, ACCUM), 2, "ACCUM", NO_REALS,                                   \
      "", NO_GRADIENT, WORK("0", "0", "11 R C"),                                                                      \
      UPDATE(dx, DT, "R", "C", ""), READ(dy, DT, "R", "C", ""), READ(x, DT, "R", "C", ""), READ(w, ACC, "", "C", ""), \
      READ(mean, ACC, "", "R", ""), READ(rstd, ACC, "", "R", ""), READ(old, DT, "R", "C", "", OPTIONAL))              \
    X(5, LAYERNORM_WGRAD, layernorm_wgrad, DIMS(R, C), 2, "", NO_REALS,                                               \
      "", NO_GRADIENT, WORK("0", "0", "4 R C"),                                                                       \
      UPDATE(dw, ACC, "", "C", ""), UPDATE(db, ACC, "", "C", ""), READ(dy, DT, "R", "C", ""),                         \
      READ(x, DT, "R", "C", ""), READ(mean, ACC, "", "R", ""), READ(rstd, ACC, "", "R", ""))                          \
    /* N groups of C in a row are normalised apart with the same w: element (r,n,c) at r*ld + n*C + c */              \
    X(6, RMSNORM_FWD, rmsnorm_fwd, DIMS(R, N, C, ldx, ldy), 3, "", REALS(eps),                                        \
      "", GRADIENT(RMSNORM_IGRAD, RMSNORM_WGRAD, ""), WORK("0", "0", "4 R N C"),                                      \
      WRITE(y, DT, "R", "N C", "ldy"), WRITE(rstd, ACC, "R", "N", ""), READ(x, DT, "R", "N C", "ldx"),                \
      READ(w, ACC, "", "C", ""))                                                                                      \
    X(7, RMSNORM_IGRAD, rmsnorm_igrad, DIMS(R, N, C, lddx, lddy, ldx, ACCUM), 3, "ACCUM", NO_REALS,                   \
      "", NO_GRADIENT, WORK("0", "0", "7 R N C"),                                                                     \
      UPDATE(dx, DT, "R", "N C", "lddx"), READ(dy, DT, "R", "N C", "lddy"), READ(x, DT, "R", "N C", "ldx"),           \
      READ(w, ACC, "", "C", ""), READ(rstd, ACC, "R", "N", ""), READ(old, DT, "R", "N C", "lddx", OPTIONAL))          \
    X(8, RMSNORM_WGRAD, rmsnorm_wgrad, DIMS(R, N, C, lddy, ldx), 3, "", NO_REALS,                                     \
      "", NO_GRADIENT, WORK("0", "0", "3 R N C"),                                                                     \
      UPDATE(dw, ACC, "", "C", ""), READ(dy, DT, "R", "N C", "lddy"), READ(x, DT, "R", "N C", "ldx"),                 \
      READ(rstd, ACC, "R", "N", ""))                                                                                  \
    /* y = (sum_k x w) + b + res, rounded once */                                                                     \
    X(9, LINEAR_FWD, linear_fwd, DIMS(R, N, K, ldy, ldx, ldres), 3, "", NO_REALS,                                     \
      "", GRADIENT(LINEAR_IGRAD, LINEAR_WGRAD, "res"), WORK("R N K", "0", "0"),                                       \
      WRITE(y, DT, "R", "N", "ldy"), READ(x, DT, "R", "K", "ldx"), READ(w, DT, "N", "K", ""),                         \
      READ(b, ACC, "", "N", "", OPTIONAL), READ(res, DT, "R", "N", "ldres", OPTIONAL))                                \
    X(10, LINEAR_IGRAD, linear_igrad, DIMS(R, N, K, lddx, lddy, ACCUM), 3, "ACCUM", NO_REALS,                         \
      "", NO_GRADIENT, WORK("R N K", "0", "0"),                                                                       \
      UPDATE(dx, DT, "R", "K", "lddx"), READ(dy, DT, "R", "N", "lddy"), READ(w, DT, "N", "K", ""))                    \
    /* ACCUM 0: dw is written, as if it were zero before; db adds always */                                            \
    X(11, LINEAR_WGRAD, linear_wgrad, DIMS(R, N, K, lddy, ldx, ACCUM), 3, "ACCUM", NO_REALS,                          \
      "", NO_GRADIENT, WORK("R N K", "0", "0"),                                                                       \
      UPDATE(dw, ACC, "N", "K", ""), UPDATE(db, ACC, "", "N", "", OPTIONAL), READ(dy, DT, "R", "N", "lddy"),          \
      READ(x, DT, "R", "K", "ldx"))                                                                                   \
    /* causal; head h reads kv head h / (H/G); lse is [B,H,T]; row t reads none before first[t] (absent: 0), nor      \
     * beyond the WINDOW last (0: any) */                                                                             \
    X(12, ATTENTION_FWD, attention_fwd, DIMS(B, T, H, G, D, ldy, ldq, ldk, ldv, WINDOW), 5, "", REALS(scale),         \
      "G|H D<=" HS_TEXT_OF(HS_ATTENTION_HEAD_MAX) " 0<=WINDOW", GRADIENT(ATTENTION_IGRAD, NONE, ""),                  \
      WORK("2 B H D BAND T WINDOW", "0", "0"),                                                                        \
      WRITE(y, DT, "B T", "H D", "ldy"), WRITE(lse, ACC, "B H", "T", ""), READ(q, DT, "B T", "H D", "ldq"),           \
      READ(k, DT, "B T", "G D", "ldk"), READ(v, DT, "B T", "G D", "ldv"),                                             \
      READ(first, PLACES, "B", "T", "", OPTIONAL))                                                                    \
    X(13, ATTENTION_IGRAD, attention_igrad,                                                                           \
      DIMS(B, T, H, G, D, lddq, lddk, lddv, lddy, ldy, ldq, ldk, ldv, WINDOW), 5, "", REALS(scale),                   \
      "G|H D<=" HS_TEXT_OF(HS_ATTENTION_HEAD_MAX) " 0<=WINDOW", NO_GRADIENT,                                          \
      WORK("4 B H D BAND T WINDOW", "B H D BAND T WINDOW", "0"),                                                      \
      WRITE(dq, DT, "B T", "H D", "lddq"), WRITE(dk, DT, "B T", "G D", "lddk"), WRITE(dv, DT, "B T", "G D", "lddv"),  \
      READ(dy, DT, "B T", "H D", "lddy"), READ(y, DT, "B T", "H D", "ldy"), READ(q, DT, "B T", "H D", "ldq"),         \
      READ(k, DT, "B T", "G D", "ldk"), READ(v, DT, "B T", "G D", "ldv"), READ(lse, ACC, "B H", "T", ""),             \
      SCRATCH(delta, ACC, "B H", "T", ""), READ(first, PLACES, "B", "T", "", OPTIONAL))                               \
    /* tab[t,i] = cos, sin of the angle t / base^(2i/D) */                                                            \
    X(14, ROPE_TABLE, rope_table, DIMS(T, D), 2, "", REALS(base),                                                     \
      "2|D T<=1073741824", NO_GRADIENT, WORK("0", "0", "20 T D"),                                                     \
      WRITE(tab, ACC, "T", "D", ""))                                                                                  \
    /* in place; pairs (i, i + D/2) are turned by tab[t], t as in embed_fwd */                                        \
    X(15, ROPE_FWD, rope_fwd, DIMS(R, T, N, D, ldx), 4, "", NO_REALS,                                                 \
      "T|R 2|D", GRADIENT(ROPE_IGRAD, NONE, ""), WORK("0", "0", "3 R N D"),                                           \
      UPDATE(x, DT, "R", "N D", "ldx"), READ(tab, ACC, "T", "D", ""), READ(first, PLACES, "", "R", "", OPTIONAL))     \
    /* turned back */                                                                                                 \
    X(16, ROPE_IGRAD, rope_igrad, DIMS(R, T, N, D, ldx), 4, "", NO_REALS,                                             \
      "T|R 2|D", NO_GRADIENT, WORK("0", "0", "3 R N D"),                                                              \
      UPDATE(x, DT, "R", "N D", "ldx"), READ(tab, ACC, "T", "D", ""), READ(first, PLACES, "", "R", "", OPTIONAL))     \
    /* tanh form */                                                                                                   \
    X(17, GELU_FWD, gelu_fwd, DIMS(n), 1, "", NO_REALS,                                                               \
      "", GRADIENT(GELU_IGRAD, NONE, ""), WORK("0", "0", "20 n"),                                                     \
      WRITE(y, DT, "", "n", ""), READ(x, DT, "", "n", ""))                                                            \
    X(18, GELU_IGRAD, gelu_igrad, DIMS(n), 1, "", NO_REALS,                                                           \
      "", NO_GRADIENT, WORK("0", "0", "30 n"),                                                                        \
      WRITE(dx, DT, "", "n", "", MAY_BE(dy)), READ(dy, DT, "", "n", ""), READ(x, DT, "", "n", ""))                    \
    /* gu holds a row's gates, then its ups; y = silu(gate) * up */                                                   \
    X(19, SWIGLU_FWD, swiglu_fwd, DIMS(R, F), 2, "", NO_REALS,                                                        \
      "", GRADIENT(SWIGLU_IGRAD, NONE, ""), WORK("0", "0", "20 R F"),                                                 \
      WRITE(y, DT, "R", "F", ""), READ(gu, DT, "R", "2 F", ""))                                                       \
    X(20, SWIGLU_IGRAD, swiglu_igrad, DIMS(R, F), 2, "", NO_REALS,                                                    \
      "", NO_GRADIENT, WORK("0", "0", "30 R F"),                                                                      \
      WRITE(dgu, DT, "R", "2 F", "", MAY_BE(gu)), READ(dy, DT, "R", "F", ""), READ(gu, DT, "R", "2 F", ""))           \
    /* loss[r] = lse(x w) - logit[target], unscaled; a target < 0 gives 0 */                                          \
    X(21, CLASSIFIER_FWD, classifier_fwd, DIMS(R, C, V, CHUNK), 4, "", NO_REALS,                                      \
      "V<=2147483647", GRADIENT(CLASSIFIER_GRAD, CLASSIFIER_GRAD, ""), WORK("R C V", "0", "20 R V"),                  \
      WRITE(loss, ACC, "", "R", ""), READ(x, DT, "R", "C", ""), READ(w, DT, "V", "C", ""),                            \
      READ(target, TARGETS, "", "R", "", BELOW(V)), SCRATCH(logits, ACC, "CHUNK", "V", ""))                           \
    /* gradients of scale * sum(loss); rows chunk by chunk; ACCUM as in linear_wgrad */                               \
    X(22, CLASSIFIER_GRAD, classifier_grad, DIMS(R, C, V, CHUNK, ACCUM), 4, "ACCUM", REALS(scale),                    \
      "V<=2147483647", NO_GRADIENT, WORK("3 R C V", "0", "20 R V"),                                                   \
      WRITE(loss, ACC, "", "R", ""), WRITE(dx, DT, "R", "C", ""), UPDATE(dw, ACC, "V", "C", ""),                      \
      READ(x, DT, "R", "C", ""), READ(w, DT, "V", "C", ""), READ(target, TARGETS, "", "R", "", BELOW(V)),             \
      SCRATCH(logits, ACC, "CHUNK", "V", ""), SCRATCH(dlogits, DT, "CHUNK", "V", "", MAY_BE(logits)))                 \
    /* inference */                                                                                                   \
    X(23, LOGITS, logits, DIMS(R, C, V), 3, "", NO_REALS,                                                             \
      "", NO_GRADIENT, WORK("R C V", "0", "0"),                                                                       \
      WRITE(logits, ACC, "R", "V", ""), READ(x, DT, "R", "C", ""), READ(w, DT, "V", "C", ""))                         \
    X(24, ADD_ACC, add_acc, DIMS(n), 1, "", NO_REALS,                                                                 \
      "", NO_GRADIENT, WORK("0", "0", "n"),                                                                           \
      UPDATE(dst, ACC, "", "n", ""), READ(src, ACC, "", "n", ""))                                                     \
    X(25, SUMSQ, sumsq, DIMS(n), 1, "", NO_REALS,                                                                     \
      "", NO_GRADIENT, WORK("0", "0", "2 n"),                                                                         \
      WRITE(out, F64, "", "", ""), READ(x, ACC, "", "n", ""), SCRATCH(part, F64, "", "BLOCKS n", ""))                 \
    /* g is zeroed on the way where ZERO_G is 1 */                                                                    \
    X(26, ADAMW, adamw, DIMS(n, ZERO_G), 1, "ZERO_G", REALS(beta1, beta2, eps, decay),                                \
      "", NO_GRADIENT, WORK("0", "0", "14 n"),                                                                        \
      UPDATE(w, ACC, "", "n", ""), UPDATE(m, ACC, "", "n", ""), UPDATE(v, ACC, "", "n", ""),                          \
      UPDATE(g, ACC, "", "n", ""), WRITE(wc, DT, "", "n", "", OPTIONAL), READ(ctl, CONTROL, "", "", ""))              \
    X(27, ZERO, zero, DIMS(bytes), 1, "", NO_REALS,                                                                   \
      "", NO_GRADIENT, WORK("0", "0", "0"),                                                                           \
      WRITE(dst, BYTE, "", "bytes", ""))                                                                              \
    /* Philox keyed by (seed, tensor, element) */                                                                     \
    X(28, INIT_NORMAL, init_normal, DIMS(n, TENSOR, SEED), 1, "", REALS(mean, std),                                   \
      "0<=TENSOR TENSOR<=4294967295", NO_GRADIENT, WORK("0", "0", "60 n"),                                            \
      WRITE(w, ACC, "", "n", ""))                                                                                     \
    X(29, INIT_CONST, init_const, DIMS(n), 1, "", REALS(value),                                                       \
      "", NO_GRADIENT, WORK("0", "0", "0"),                                                                           \
      WRITE(w, ACC, "", "n", ""))                                                                                     \
    /* round to nearest even */                                                                                       \
    X(30, CAST, cast, DIMS(n), 1, "", NO_REALS,                                                                       \
      "", NO_GRADIENT, WORK("0", "0", "n"),                                                                           \
      WRITE(dst, DT, "", "n", ""), READ(src, ACC, "", "n", ""))                                                       \
    /* q = x / s in E4M3 (E5M2 1: in E5M2), row by row, qt = its transpose; s = a power of two, of all of x */        \
    X(31, QUANTISE, quantise, DIMS(R, C, ldx, E5M2), 2, "E5M2", NO_REALS,                                             \
      "", NO_GRADIENT, WORK("0", "0", "4 R C"),                                                                       \
      WRITE(q, BYTE, "R", "C", ""), WRITE(qt, BYTE, "C", "R", "", OPTIONAL), WRITE(s, ACC, "", "", ""),               \
      READ(x, DT, "R", "C", "ldx"), SCRATCH(part, ACC, "", HS_TEXT_OF(HS_QUANTISE_PARTS), ""))                        \
    /* y = (sum_k x8 w8) xs ws + b + res, rounded once */                                                             \
    X(32, LINEAR8_FWD, linear8_fwd, DIMS(R, N, K, ldy, ldres), 3, "", NO_REALS,                                       \
      "", GRADIENT(LINEAR8_IGRAD, LINEAR8_WGRAD, "res"), WORK("R N K", "0", "0"),                                     \
      WRITE(y, DT, "R", "N", "ldy"), READ(x8, BYTE, "R", "K", ""), READ(xs, ACC, "", "", ""),                         \
      READ(w8, BYTE, "N", "K", ""), READ(ws, ACC, "", "", ""), READ(b, ACC, "", "N", "", OPTIONAL),                   \
      READ(res, DT, "R", "N", "ldres", OPTIONAL))                                                                     \
    X(33, LINEAR8_IGRAD, linear8_igrad, DIMS(R, N, K, lddx, ACCUM), 3, "ACCUM", NO_REALS,                             \
      "", NO_GRADIENT, WORK("R N K", "0", "0"),                                                                       \
      UPDATE(dx, DT, "R", "K", "lddx"), READ(dy8, BYTE, "R", "N", ""), READ(dys, ACC, "", "", ""),                    \
      READ(w8t, BYTE, "K", "N", ""), READ(ws, ACC, "", "", ""))                                                       \
    X(34, LINEAR8_WGRAD, linear8_wgrad, DIMS(R, N, K, lddy), 3, "", NO_REALS,                                         \
      "", NO_GRADIENT, WORK("R N K", "0", "0"),                                                                       \
      UPDATE(dw, ACC, "N", "K", ""), UPDATE(db, ACC, "", "N", "", OPTIONAL), READ(dy8t, BYTE, "N", "R", ""),          \
      READ(dys, ACC, "", "", ""), READ(x8t, BYTE, "K", "R", ""), READ(xs, ACC, "", "", ""),                           \
      READ(dy, DT, "R", "N", "lddy", WITH(db)))                                                                       \
    /* the wc that ADAMW will write, and nothing else (run/steps.h) */                                                \
    X(35, ADAMW_COPY, adamw_copy, DIMS(n), 1, "", REALS(beta1, beta2, eps, decay),                                    \
      "", NO_GRADIENT, WORK("0", "0", "14 n"),                                                                        \
      WRITE(wc, DT, "", "n", ""), READ(w, ACC, "", "n", ""), READ(m, ACC, "", "n", ""), READ(v, ACC, "", "n", ""),    \
      READ(g, ACC, "", "n", ""), READ(ctl, CONTROL, "", "", ""))                                                      \
    /* dst += src, src = 0 */                                                                                         \
    X(36, FOLD, fold, DIMS(n), 1, "", NO_REALS,                                                                       \
      "", NO_GRADIENT, WORK("0", "0", "n"),                                                                           \
      UPDATE(dst, ACC, "", "n", ""), UPDATE(src, ACC, "", "n", ""))                                                   \
    /* sumsq in two: a number a block, and the numbers' sum */                                                        \
    X(37, SUMSQ_PARTS, sumsq_parts, DIMS(n), 1, "", NO_REALS,                                                         \
      "", NO_GRADIENT, WORK("0", "0", "2 n"),                                                                         \
      WRITE(part, F64, "", "BLOCKS n", ""), READ(x, ACC, "", "n", ""))                                                \
    X(38, SUM, sum, DIMS(n), 1, "", NO_REALS,                                                                         \
      "", NO_GRADIENT, WORK("0", "0", "n"),                                                                           \
      WRITE(out, F64, "", "", ""), READ(part, F64, "", "n", ""), SCRATCH(tree, F64, "", "n", ""))                     \
    /* sleeps; on CPUs alone, for measuring schedules */                                                              \
    X(39, DELAY, delay, DIMS(NS), 1, "", NO_REALS,                                                                    \
      "NS<=10000000000", NO_GRADIENT, WORK("0", "0", "0"),                                                            \
      READ(behind, BYTE, "", "", "", OPTIONAL))                                                                       \
    /* the head with its loss, its vocabulary in N blocks of BLOCK rows (kernels/vocabulary.h) */                     \
    X(40, VOCAB_HEAD, vocab_head, DIMS(R, C, V, CHUNK, N, BLOCK, ACCUM), 6, "ACCUM", REALS(scale),                    \
      "V<=2147483647 N<=" HS_TEXT_OF(HS_VOCAB_BLOCKS), NO_GRADIENT, WORK("3 R C V", "0", "20 R V"),                   \
      WRITE(loss, ACC, "", "R", ""), WRITE(dx, DT, "R", "C", ""), UPDATE(dw, ACC, "V", "C", ""),                      \
      READ(x, DT, "R", "C", ""), READ(w, DT, "V", "C", ""), READ(target, TARGETS, "", "R", "", BELOW(V)),             \
      SCRATCH(logits, ACC, "CHUNK", "V", ""), SCRATCH(dlogits, DT, "CHUNK", "V", ""),                                 \
      SCRATCH(parts, ACC, "N CHUNK", "C", ""))                                                                        \
    /* part of it: V rows from FIRST on, of ALL */                                                                    \
    X(41, VOCAB_SUMS, vocab_sums, DIMS(R, C, V, N, BLOCK, FIRST, ALL), 5, "", NO_REALS,                               \
      "0<=FIRST FIRST<=ALL ALL<=2147483647 N<=" HS_TEXT_OF(HS_VOCAB_BLOCKS), NO_GRADIENT,                             \
      WORK("R C V", "0", "15 R V"),                                                                                   \
      WRITE(e, ACC, "R", "V", ""), WRITE(tops, ACC, "N", "R", ""), WRITE(sums, ACC, "3", "R", ""),                    \
      READ(x, DT, "R", "C", ""), READ(w, DT, "V", "C", ""), READ(target, TARGETS, "", "R", "", BELOW(ALL)))           \
    /* its gradients, by the sums of all P parts */                                                                   \
    X(42, VOCAB_PART, vocab_part, DIMS(R, C, V, CHUNK, N, BLOCK, P, FIRST, ALL, ACCUM), 7, "ACCUM", REALS(scale),     \
      "0<=FIRST FIRST<=ALL ALL<=2147483647 N<=" HS_TEXT_OF(HS_VOCAB_BLOCKS) " P<=" HS_TEXT_OF(HS_VOCAB_BLOCKS),       \
      NO_GRADIENT, WORK("2 R C V", "0", "5 R V"),                                                                     \
      WRITE(loss, ACC, "", "R", "", OPTIONAL), WRITE(dx, ACC, "R", "C", ""), UPDATE(dw, ACC, "V", "C", ""),           \
      READ(x, DT, "R", "C", ""), READ(w, DT, "V", "C", ""), READ(target, TARGETS, "", "R", "", BELOW(ALL)),           \
      READ(e, ACC, "R", "V", ""), READ(tops, ACC, "N", "R", ""), READ(sums, ACC, "3 P", "R", ""),                     \
      SCRATCH(dlogits, DT, "CHUNK", "V", ""), SCRATCH(parts, ACC, "N CHUNK", "C", ""))                                \
    /* first[t]: where t's document begins; documents end with token END */                                           \
    X(43, BORDERS, borders, DIMS(B, T, V, END), 3, "", NO_REALS,                                                      \
      "0<=END END<=V V<=2147483647", NO_GRADIENT, WORK("0", "0", "B T"),                                              \
      WRITE(first, PLACES, "B", "T", ""), READ(tok, TOKENS, "", "B T", "", BELOW(V)))                                 \
    /* Muon, of a matrix of n elements (kernels/muon.h): what is to be made orthogonal */                             \
    X(44, MUON_MOMENTUM, muon_momentum, DIMS(n), 1, "", REALS(momentum),                                              \
      "", NO_GRADIENT, WORK("0", "0", "5 n"),                                                                         \
      WRITE(u, ACC, "", "n", ""), READ(m, ACC, "", "n", ""), READ(g, ACC, "", "n", ""), READ(ctl, CONTROL, "", "", ""))\
    /* by its norm, whose square is sumsq */                                                                          \
    X(45, MUON_SCALE, muon_scale, DIMS(n), 1, "", REALS(eps),                                                         \
      "", NO_GRADIENT, WORK("0", "0", "n"),                                                                           \
      UPDATE(x, ACC, "", "n", ""), READ(sumsq, F64, "", "", ""))                                                      \
    /* q = a + b p + c q */                                                                                           \
    X(46, MUON_POLY, muon_poly, DIMS(S), 1, "", REALS(a, b, c),                                                       \
      "", NO_GRADIENT, WORK("0", "0", "3 S S"),                                                                       \
      UPDATE(q, ACC, "S", "S", ""), READ(p, ACC, "S", "S", ""))                                                       \
    /* the step, by o; g is zeroed on the way */                                                                      \
    X(47, MUON, muon, DIMS(n), 1, "", REALS(momentum, scale, decay),                                                  \
      "", NO_GRADIENT, WORK("0", "0", "8 n"),                                                                         \
      UPDATE(w, ACC, "", "n", ""), UPDATE(m, ACC, "", "n", ""), UPDATE(g, ACC, "", "n", ""),                          \
      READ(o, ACC, "", "n", ""), WRITE(wc, DT, "", "n", "", OPTIONAL), READ(ctl, CONTROL, "", "", ""))                \
    /* the wc that MUON will write, and nothing else */                                                               \
    X(48, MUON_COPY, muon_copy, DIMS(n), 1, "", REALS(scale, decay),                                                  \
      "", NO_GRADIENT, WORK("0", "0", "4 n"),                                                                         \
      WRITE(wc, DT, "", "n", ""), READ(w, ACC, "", "n", ""), READ(o, ACC, "", "n", ""), READ(ctl, CONTROL, "", "", ""))\
    /* embed_wgrad where dwte has the head's gradient: a token's rows are added up before they are added to it */     \
    X(49, EMBED_WGRAD_TIED, embed_wgrad_tied, DIMS(R, C, V, T), 4, "", NO_REALS,                                      \
      "T|R R<=2147483647 V<=2147483647", NO_GRADIENT, WORK("0", "0", "2 R C"),                                        \
      UPDATE(dwte, ACC, "V", "C", ""), UPDATE(dwpe, ACC, "T", "C", "", OPTIONAL), READ(dy, DT, "R", "C", ""),         \
      READ(tok, TOKENS, "", "R", "", BELOW(V)), READ(first, PLACES, "", "R", "", OPTIONAL),                           \
      SCRATCH(top, PLACES, "", "V", ""), SCRATCH(next, PLACES, "", "R", ""))

enum {
    HS_K_NONE = 0,
#define X(number, NAME, ...) HS_K_##NAME = number,
    HS_KERNELS(X)
#undef X
    HS_K_COUNT = 50
};

#endif
