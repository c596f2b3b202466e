/* The table of kernels: one number, one name, one fixed list of operands each.
 *
 * A plan names a kernel by its number (HS_K_*), its element type (HS_F32 ...), up to HS_CALL_PTRS operand
 * references, HS_CALL_DIMS integers and HS_CALL_REALS reals. The meaning of each position stands here and
 * nowhere else; kernels/<op>.h says what is computed and in which order the sums are taken.
 *
 * Letters: B microbatch size, T sequence length, R = B*T rows, C width, H query heads, G key/value heads,
 * D head size, F hidden width of the MLP, V vocabulary, K inner and N outer size of a linear layer,
 * ld* = distance between rows, in elements. "dt" is the call's element type; "acc" is f32, or f64 where dt
 * is f64 (oracle only). Matrices of weights are dt, vectors of weights (norms, biases) are acc, gradients
 * of weights are acc. An operand marked ? may be absent (HS_SPACE_NONE). "+=" operands are read and written.
 *
 * X(number, NAME, name, pointers, dims, reals)   pointers/dims/reals: how many positions the op uses
 */
#ifndef HS_WIRE_KERNELS_H
#define HS_WIRE_KERNELS_H

#define HS_CALL_PTRS 12
#define HS_CALL_DIMS 16
#define HS_CALL_REALS 6

/* element types; the size in bytes is 4, 2, 8, 4 */
enum { HS_F32 = 1, HS_BF16 = 2, HS_F64 = 3, HS_I32 = 4 };

#define HS_KERNELS(X)                                                                                   \
    /* y[R,C] dt, tok[R] i32, wte[V,C] dt, wpe[T,C] dt ?      dims R C V T                              \
     * y[r] = wte[tok[r]] + wpe[r % T] */                                                               \
    X(1, EMBED_FWD, embed_fwd, 4, 4, 0)                                                                 \
    /* dwte[V,C] acc +=, dwpe[T,C] acc += ?, dy[R,C] dt, tok[R] i32      dims R C V T */                \
    X(2, EMBED_WGRAD, embed_wgrad, 4, 4, 0)                                                             \
    /* y[R,C] dt, mean[R] acc, rstd[R] acc, x[R,C] dt, w[C] acc, b[C] acc      dims R C      reals eps */ \
    X(3, LAYERNORM_FWD, layernorm_fwd, 6, 2, 1)                                                         \
    /* dx[R,C] dt, dy[R,C] dt, x[R,C] dt, w[C] acc, mean[R] acc, rstd[R] acc      dims R C ACCUM        \
     * ACCUM 1: dx += , 0: dx = */                                                                      \
    X(4, LAYERNORM_IGRAD, layernorm_igrad, 6, 3, 0)                                                     \
    /* dw[C] acc +=, db[C] acc +=, dy[R,C] dt, x[R,C] dt, mean[R] acc, rstd[R] acc      dims R C */     \
    X(5, LAYERNORM_WGRAD, layernorm_wgrad, 6, 2, 0)                                                     \
    /* y dt, rstd[R,N] acc, x dt, w[C] acc      dims R N C ldx ldy      reals eps                       \
     * N groups of C in a row are normalised apart with the same w: element (r,n,c) at r*ld + n*C + c */ \
    X(6, RMSNORM_FWD, rmsnorm_fwd, 4, 5, 1)                                                             \
    /* dx dt, dy dt, x dt, w[C] acc, rstd[R,N] acc      dims R N C lddx lddy ldx ACCUM */               \
    X(7, RMSNORM_IGRAD, rmsnorm_igrad, 5, 7, 0)                                                         \
    /* dw[C] acc +=, dy dt, x dt, rstd[R,N] acc      dims R N C lddy ldx */                             \
    X(8, RMSNORM_WGRAD, rmsnorm_wgrad, 4, 5, 0)                                                         \
    /* y[R,N] dt, x[R,K] dt, w[N,K] dt, b[N] acc ?, res[R,N] dt ?      dims R N K ldy ldx ldres         \
     * y = (sum_k x w) + b + res, rounded once */                                                       \
    X(9, LINEAR_FWD, linear_fwd, 5, 6, 0)                                                               \
    /* dx[R,K] dt, dy[R,N] dt, w[N,K] dt      dims R N K lddx lddy ACCUM */                             \
    X(10, LINEAR_IGRAD, linear_igrad, 3, 6, 0)                                                          \
    /* dw[N,K] acc +=, db[N] acc += ?, dy[R,N] dt, x[R,K] dt      dims R N K lddy ldx */                \
    X(11, LINEAR_WGRAD, linear_wgrad, 4, 5, 0)                                                          \
    /* o[R,H*D] dt, lse[B,H,T] acc, q[R,H*D] dt, k[R,G*D] dt, v[R,G*D] dt                               \
     * dims B T H G D ldo ldq ldk ldv      reals scale      causal; head h reads kv head h / (H/G) */   \
    X(12, ATTENTION_FWD, attention_fwd, 5, 9, 1)                                                        \
    /* dq dt, dk dt, dv dt, do dt, o dt, q dt, k dt, v dt, lse[B,H,T] acc, delta[B,H,T] acc (scratch)   \
     * dims B T H G D lddq lddk lddv lddo ldo ldq ldk ldv      reals scale      dq dk dv are written */ \
    X(13, ATTENTION_IGRAD, attention_igrad, 10, 13, 1)                                                  \
    /* tab[T,D/2,2] acc (cos, sin)      dims T D      reals base      angle t / base^(2i/D) */          \
    X(14, ROPE_TABLE, rope_table, 1, 2, 1)                                                              \
    /* x[R,N*D] dt += (in place), tab[T,D/2,2] acc      dims R T N D ldx                                \
     * pairs (i, i + D/2) are turned by tab[r % T] */                                                   \
    X(15, ROPE_FWD, rope_fwd, 2, 5, 0)                                                                  \
    /* same operands; turned back */                                                                    \
    X(16, ROPE_IGRAD, rope_igrad, 2, 5, 0)                                                              \
    /* y dt, x dt      dims n      tanh form */                                                         \
    X(17, GELU_FWD, gelu_fwd, 2, 1, 0)                                                                  \
    /* dx dt, dy dt, x dt      dims n      dx may be dy */                                              \
    X(18, GELU_IGRAD, gelu_igrad, 3, 1, 0)                                                              \
    /* y[R,F] dt, gu[R,2F] dt (gate, then up)      dims R F      y = silu(gate) * up */                 \
    X(19, SWIGLU_FWD, swiglu_fwd, 2, 2, 0)                                                              \
    /* dgu[R,2F] dt, dy[R,F] dt, gu[R,2F] dt      dims R F      dgu may be gu */                        \
    X(20, SWIGLU_IGRAD, swiglu_igrad, 3, 2, 0)                                                          \
    /* loss[R] acc, x[R,C] dt, w[V,C] dt, target[R] i32, logits[CHUNK,V] acc (scratch)                  \
     * dims R C V CHUNK      loss[r] = lse(x w) - logit[target], unscaled; a target < 0 gives 0 */      \
    X(21, CLASSIFIER_FWD, classifier_fwd, 5, 4, 0)                                                      \
    /* loss[R] acc, dx[R,C] dt, dw[V,C] acc +=, x[R,C] dt, w[V,C] dt, target[R] i32,                    \
     * logits[CHUNK,V] acc (scratch), dlogits[CHUNK,V] dt (scratch)                                     \
     * dims R C V CHUNK      reals scale      gradients of scale * sum(loss); rows chunk by chunk */    \
    X(22, CLASSIFIER_GRAD, classifier_grad, 8, 4, 1)                                                    \
    /* logits[R,V] acc, x[R,C] dt, w[V,C] dt      dims R C V      inference */                          \
    X(23, LOGITS, logits, 3, 3, 0)                                                                      \
    /* dst[n] acc +=, src[n] acc      dims n */                                                         \
    X(24, ADD_ACC, add_acc, 2, 1, 0)                                                                    \
    /* out[1] f64, x[n] acc, part[ceil(n/65536)] f64 (scratch)      dims n */                           \
    X(25, SUMSQ, sumsq, 3, 1, 0)                                                                        \
    /* w[n] acc +=, m[n] acc +=, v[n] acc +=, g[n] acc +=, wc[n] dt ?, ctl hs_step_control              \
     * dims n ZERO_G      reals beta1 beta2 eps decay      g is zeroed on the way where ZERO_G = 1 */   \
    X(26, ADAMW, adamw, 6, 2, 4)                                                                        \
    /* dst, bytes      dims bytes */                                                                    \
    X(27, ZERO, zero, 1, 1, 0)                                                                          \
    /* w[n] acc      dims n TENSOR SEED      reals mean std      Philox keyed by (seed, tensor, element) */ \
    X(28, INIT_NORMAL, init_normal, 1, 3, 2)                                                            \
    /* w[n] acc      dims n      reals value */                                                         \
    X(29, INIT_CONST, init_const, 1, 1, 1)                                                              \
    /* dst[n] dt, src[n] acc      dims n      round to nearest even */                                  \
    X(30, CAST, cast, 2, 1, 0)

enum {
#define X(number, NAME, name, p, d, r) HS_K_##NAME = number,
    HS_KERNELS(X)
#undef X
    HS_K_COUNT = 31
};

#endif
