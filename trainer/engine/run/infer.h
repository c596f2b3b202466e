/* `hotstage-engine infer`: a plan of mode INFER with weights, answering requests until standard
 * input ends. A request is i32 tokens[R] raw (R = microbatch*T values, each in 0..vocab-1), its
 * answer f32 logits[R,V] raw on standard output. Where the plan has losses instead, i32 targets[R]
 * follow the tokens (-1: none), and the answer is f32 losses[R], 0 without a target. */
#ifndef HS_RUN_INFER_H
#define HS_RUN_INFER_H

#include <stdint.h>

#include "backend/backend.h"
#include "core/log.h"
#include "core/status.h"

typedef struct hs_infer_args {
    const char *plan, *weights;   /* files */
    uint32_t kernel_path;         /* HS_PATH_* */
    uint32_t threads;             /* 0: the plan's, or the cores */
    uint32_t device_kind, device; /* HS_DEVICE_* (wire/attempt.h), and which of them */
    const hs_log *log;
} hs_infer_args;

/* HS_OK at the end of the input; HS_E_DATA for a token out of range or a request cut short. */
hs_status hs_infer(const hs_infer_args *args, hs_why *why);

#endif
