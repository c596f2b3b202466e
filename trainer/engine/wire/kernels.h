/* The table of kernels: one number, one name, one fixed list of operands each. The only place that says so: the
 * extents (kernels/extent.c), the loader's checks (run/plan/), the plan fuzzer and `wire` (which
 * trainer/wire/__init__.py is compared with) all read it.
 *
 * A plan names a kernel by its number (HS_K_*), its element type (HS_F32 ...), up to HS_CALL_PTRS operand
 * references, HS_CALL_DIMS integers and HS_CALL_REALS reals, in the order given here. kernels/<op>.h says what is
 * computed and in which order the sums are taken.
 *
 * X(number, NAME, name, dims, sizes, switch, reals, operands ...)
 *   dims    their names, in order. The first `sizes` of them must be above 0; `switch` names one that is 0 or 1.
 *           ld* is the distance between two rows of an operand, in elements, at least its columns.
 *   reals   their names, in order
 *
 * ROLE(name, type, rows, columns, ld, ...)   an operand: `rows` rows of `columns` elements; both are products of
 *                                            dims and numbers ("": 1; "BLOCKS n": n / HS_SUMSQ_BLOCK rounded
 *                                            up, see kernels/optimizer.h); ld is the name of a dim, or "": dense
 *   READ     is only read. Two READ operands may overlap, and only they.
 *   WRITE    is written wholly and not read before
 *   UPDATE   is read and written ("+=")
 *   SCRATCH  is written; its bytes mean nothing afterwards
 *   type     DT the call's element type; ACC f32, or f64 where the call's is f64 (oracle only); F64; BYTE;
 *            TOKENS and TARGETS i32, the position's own, each below the dim `below`; CONTROL the position's
 *            hs_step_control
 *   OPTIONAL       may be absent (HS_SPACE_NONE)
 *   MAY_BE(name)   may be the same memory as that operand, at the same place; else they do not overlap
 * Matrices of weights are DT, vectors of weights (norms, biases) ACC, gradients of weights ACC.
 *
 * Letters: B microbatch size, T sequence length, R = B*T rows, C width, H query heads, G key/value heads,
 * D head size, F hidden width of the MLP, V vocabulary, K inner and N outer size of a linear layer.
 */
#ifndef HS_WIRE_KERNELS_H
#define HS_WIRE_KERNELS_H

#define HS_CALL_PTRS 12
#define HS_CALL_DIMS 16
#define HS_CALL_REALS 6

/* element types; the size in bytes is 4, 2, 8, 4 */
enum { HS_F32 = 1, HS_BF16 = 2, HS_F64 = 3, HS_I32 = 4 };

#define HS_KERNELS(X)                                                                                                 \
    /* y[r] = wte[tok[r]] + wpe[r % T] */                                                                             \
    X(1, EMBED_FWD, embed_fwd, "R C V T", 4, "", "",                                                                  \
      WRITE(y, DT, "R", "C", ""), READ(tok, TOKENS, "", "R", "", BELOW(V)), READ(wte, DT, "V", "C", ""),              \
      READ(wpe, DT, "T", "C", "", OPTIONAL))                                                                          \
    X(2, EMBED_WGRAD, embed_wgrad, "R C V T", 4, "", "",                                                              \
      UPDATE(dwte, ACC, "V", "C", ""), UPDATE(dwpe, ACC, "T", "C", "", OPTIONAL), READ(dy, DT, "R", "C", ""),         \
      READ(tok, TOKENS, "", "R", "", BELOW(V)))                                                                       \
    X(3, LAYERNORM_FWD, layernorm_fwd, "R C", 2, "", "eps",                                                           \
      WRITE(y, DT, "R", "C", ""), WRITE(mean, ACC, "", "R", ""), WRITE(rstd, ACC, "", "R", ""),                       \
      READ(x, DT, "R", "C", ""), READ(w, ACC, "", "C", ""), READ(b, ACC, "", "C", ""))                                \
    /* ACCUM 1: dx +=, 0: dx = */                                                                                     \
    X(4, LAYERNORM_IGRAD, layernorm_igrad, "R C ACCUM", 2, "ACCUM", "",                                               \
      UPDATE(dx, DT, "R", "C", ""), READ(dy, DT, "R", "C", ""), READ(x, DT, "R", "C", ""),                            \
      READ(w, ACC, "", "C", ""), READ(mean, ACC, "", "R", ""), READ(rstd, ACC, "", "R", ""))                          \
    X(5, LAYERNORM_WGRAD, layernorm_wgrad, "R C", 2, "", "",                                                          \
      UPDATE(dw, ACC, "", "C", ""), UPDATE(db, ACC, "", "C", ""), READ(dy, DT, "R", "C", ""),                         \
      READ(x, DT, "R", "C", ""), READ(mean, ACC, "", "R", ""), READ(rstd, ACC, "", "R", ""))                          \
    /* N groups of C in a row are normalised apart with the same w: element (r,n,c) at r*ld + n*C + c */              \
    X(6, RMSNORM_FWD, rmsnorm_fwd, "R N C ldx ldy", 3, "", "eps",                                                     \
      WRITE(y, DT, "R", "N C", "ldy"), WRITE(rstd, ACC, "R", "N", ""), READ(x, DT, "R", "N C", "ldx"),                \
      READ(w, ACC, "", "C", ""))                                                                                      \
    X(7, RMSNORM_IGRAD, rmsnorm_igrad, "R N C lddx lddy ldx ACCUM", 3, "ACCUM", "",                                   \
      UPDATE(dx, DT, "R", "N C", "lddx"), READ(dy, DT, "R", "N C", "lddy"), READ(x, DT, "R", "N C", "ldx"),           \
      READ(w, ACC, "", "C", ""), READ(rstd, ACC, "R", "N", ""))                                                       \
    X(8, RMSNORM_WGRAD, rmsnorm_wgrad, "R N C lddy ldx", 3, "", "",                                                   \
      UPDATE(dw, ACC, "", "C", ""), READ(dy, DT, "R", "N C", "lddy"), READ(x, DT, "R", "N C", "ldx"),                 \
      READ(rstd, ACC, "R", "N", ""))                                                                                  \
    /* y = (sum_k x w) + b + res, rounded once */                                                                     \
    X(9, LINEAR_FWD, linear_fwd, "R N K ldy ldx ldres", 3, "", "",                                                    \
      WRITE(y, DT, "R", "N", "ldy"), READ(x, DT, "R", "K", "ldx"), READ(w, DT, "N", "K", ""),                         \
      READ(b, ACC, "", "N", "", OPTIONAL), READ(res, DT, "R", "N", "ldres", OPTIONAL))                                \
    X(10, LINEAR_IGRAD, linear_igrad, "R N K lddx lddy ACCUM", 3, "ACCUM", "",                                        \
      UPDATE(dx, DT, "R", "K", "lddx"), READ(dy, DT, "R", "N", "lddy"), READ(w, DT, "N", "K", ""))                    \
    X(11, LINEAR_WGRAD, linear_wgrad, "R N K lddy ldx", 3, "", "",                                                    \
      UPDATE(dw, ACC, "N", "K", ""), UPDATE(db, ACC, "", "N", "", OPTIONAL), READ(dy, DT, "R", "N", "lddy"),          \
      READ(x, DT, "R", "K", "ldx"))                                                                                   \
    /* causal; head h reads kv head h / (H/G); lse is [B,H,T] */                                                      \
    X(12, ATTENTION_FWD, attention_fwd, "B T H G D ldo ldq ldk ldv", 5, "", "scale",                                  \
      WRITE(o, DT, "B T", "H D", "ldo"), WRITE(lse, ACC, "B H", "T", ""), READ(q, DT, "B T", "H D", "ldq"),           \
      READ(k, DT, "B T", "G D", "ldk"), READ(v, DT, "B T", "G D", "ldv"))                                             \
    X(13, ATTENTION_IGRAD, attention_igrad, "B T H G D lddq lddk lddv lddo ldo ldq ldk ldv", 5, "", "scale",          \
      WRITE(dq, DT, "B T", "H D", "lddq"), WRITE(dk, DT, "B T", "G D", "lddk"), WRITE(dv, DT, "B T", "G D", "lddv"),  \
      READ(do, DT, "B T", "H D", "lddo"), READ(o, DT, "B T", "H D", "ldo"), READ(q, DT, "B T", "H D", "ldq"),         \
      READ(k, DT, "B T", "G D", "ldk"), READ(v, DT, "B T", "G D", "ldv"), READ(lse, ACC, "B H", "T", ""),             \
      SCRATCH(delta, ACC, "B H", "T", ""))                                                                            \
    /* tab[t,i] = cos, sin of the angle t / base^(2i/D) */                                                            \
    X(14, ROPE_TABLE, rope_table, "T D", 2, "", "base",                                                               \
      WRITE(tab, ACC, "T", "D", ""))                                                                                  \
    /* in place; pairs (i, i + D/2) are turned by tab[r % T] */                                                       \
    X(15, ROPE_FWD, rope_fwd, "R T N D ldx", 4, "", "",                                                               \
      UPDATE(x, DT, "R", "N D", "ldx"), READ(tab, ACC, "T", "D", ""))                                                 \
    /* turned back */                                                                                                 \
    X(16, ROPE_IGRAD, rope_igrad, "R T N D ldx", 4, "", "",                                                           \
      UPDATE(x, DT, "R", "N D", "ldx"), READ(tab, ACC, "T", "D", ""))                                                 \
    /* tanh form */                                                                                                   \
    X(17, GELU_FWD, gelu_fwd, "n", 1, "", "",                                                                         \
      WRITE(y, DT, "", "n", ""), READ(x, DT, "", "n", ""))                                                            \
    X(18, GELU_IGRAD, gelu_igrad, "n", 1, "", "",                                                                     \
      WRITE(dx, DT, "", "n", "", MAY_BE(dy)), READ(dy, DT, "", "n", ""), READ(x, DT, "", "n", ""))                    \
    /* gu holds a row's gates, then its ups; y = silu(gate) * up */                                                   \
    X(19, SWIGLU_FWD, swiglu_fwd, "R F", 2, "", "",                                                                   \
      WRITE(y, DT, "R", "F", ""), READ(gu, DT, "R", "2 F", ""))                                                       \
    X(20, SWIGLU_IGRAD, swiglu_igrad, "R F", 2, "", "",                                                               \
      WRITE(dgu, DT, "R", "2 F", "", MAY_BE(gu)), READ(dy, DT, "R", "F", ""), READ(gu, DT, "R", "2 F", ""))           \
    /* loss[r] = lse(x w) - logit[target], unscaled; a target < 0 gives 0 */                                          \
    X(21, CLASSIFIER_FWD, classifier_fwd, "R C V CHUNK", 4, "", "",                                                   \
      WRITE(loss, ACC, "", "R", ""), READ(x, DT, "R", "C", ""), READ(w, DT, "V", "C", ""),                            \
      READ(target, TARGETS, "", "R", "", BELOW(V)), SCRATCH(logits, ACC, "CHUNK", "V", ""))                           \
    /* gradients of scale * sum(loss); rows chunk by chunk */                                                         \
    X(22, CLASSIFIER_GRAD, classifier_grad, "R C V CHUNK", 4, "", "scale",                                            \
      WRITE(loss, ACC, "", "R", ""), WRITE(dx, DT, "R", "C", ""), UPDATE(dw, ACC, "V", "C", ""),                      \
      READ(x, DT, "R", "C", ""), READ(w, DT, "V", "C", ""), READ(target, TARGETS, "", "R", "", BELOW(V)),             \
      SCRATCH(logits, ACC, "CHUNK", "V", ""), SCRATCH(dlogits, DT, "CHUNK", "V", ""))                                 \
    /* inference */                                                                                                   \
    X(23, LOGITS, logits, "R C V", 3, "", "",                                                                         \
      WRITE(logits, ACC, "R", "V", ""), READ(x, DT, "R", "C", ""), READ(w, DT, "V", "C", ""))                         \
    X(24, ADD_ACC, add_acc, "n", 1, "", "",                                                                           \
      UPDATE(dst, ACC, "", "n", ""), READ(src, ACC, "", "n", ""))                                                     \
    X(25, SUMSQ, sumsq, "n", 1, "", "",                                                                               \
      WRITE(out, F64, "", "", ""), READ(x, ACC, "", "n", ""), SCRATCH(part, F64, "", "BLOCKS n", ""))                 \
    /* g is zeroed on the way where ZERO_G is 1 */                                                                    \
    X(26, ADAMW, adamw, "n ZERO_G", 1, "ZERO_G", "beta1 beta2 eps decay",                                             \
      UPDATE(w, ACC, "", "n", ""), UPDATE(m, ACC, "", "n", ""), UPDATE(v, ACC, "", "n", ""),                          \
      UPDATE(g, ACC, "", "n", ""), WRITE(wc, DT, "", "n", "", OPTIONAL), READ(ctl, CONTROL, "", "", ""))              \
    X(27, ZERO, zero, "bytes", 1, "", "",                                                                             \
      WRITE(dst, BYTE, "", "bytes", ""))                                                                              \
    /* Philox keyed by (seed, tensor, element) */                                                                     \
    X(28, INIT_NORMAL, init_normal, "n TENSOR SEED", 1, "", "mean std",                                               \
      WRITE(w, ACC, "", "n", ""))                                                                                     \
    X(29, INIT_CONST, init_const, "n", 1, "", "value",                                                                \
      WRITE(w, ACC, "", "n", ""))                                                                                     \
    /* round to nearest even */                                                                                       \
    X(30, CAST, cast, "n", 1, "", "",                                                                                 \
      WRITE(dst, DT, "", "n", ""), READ(src, ACC, "", "n", ""))

enum {
#define X(number, NAME, ...) HS_K_##NAME = number,
    HS_KERNELS(X)
#undef X
    HS_K_COUNT = 31
};

#endif
