/* The plan file: flat tables, little-endian, fixed-size records, mapped and checked before use.
 *
 *   offset  size  what
 *        0   256  hs_plan_header; of a plan without a mixture its last two sections are not there: 224, and zero up to 256
 *   then the sections in the order of HS_SECTION_*, each starting on a multiple of 64, zero-padded between
 *
 * Validity: magic, version and file_bytes match; digest = SHA-256 of bytes [64, file_bytes); every section
 * lies inside the file, in order, without overlap; every index, offset and size below is inside its
 * table or memory space; every call's operands hold the bytes that its kernel needs (kernels/extent.c).
 * A file that fails any of these is refused with exit 78 and the first failure named.
 *
 * A plan knows no run, epoch, address or key: those come in the attempt file (attempt.h).
 */
#ifndef HS_WIRE_PLAN_H
#define HS_WIRE_PLAN_H

#include <stdint.h>

#include "wire/kernels.h"

#define HS_PLAN_MAGIC "HSPLAN\r\n" /* 8 bytes, no terminator */
#define HS_PLAN_VERSION 3u /* of a plan with a mixture, HS_SECTION_COUNT sections */
#define HS_PLAN_PLAIN   2u /* of one without, HS_SECTIONS_PLAIN of them */
/* What the bits of a step mean: one spec gives equal bits in all engines of one number. Plans,
 * attempts and manifests say it; a change of a kernel, of a sum's order or of a generator that
 * makes golden digests differ raises it, for the precisions that it concerns. Version 2: products of
 * bf16 and FP8 add in pairs (kernels/linear.h). Version 3: so does attention in bf16 (kernels/attention.h). */
#define HS_NUMERICS_VERSION 3u
#define HS_NUMERICS_F32     1u /* of plans of float32 */

enum {
    HS_SECTION_CONFIG = 0, /* one hs_plan_config */
    HS_SECTION_STRINGS,    /* bytes; names are (offset, length) into it, UTF-8, not terminated */
    HS_SECTION_TENSORS,    /* hs_plan_tensor: the state tensors, in the table's order */
    HS_SECTION_SHARDS,     /* hs_plan_shard */
    HS_SECTION_POSITIONS,  /* hs_plan_position: one a pipeline position; rank r runs position r % positions */
    HS_SECTION_STATES,     /* hs_plan_state: which position owns which tensor, and where */
    HS_SECTION_PROGRAMS,   /* hs_plan_program */
    HS_SECTION_CALLS,      /* hs_plan_call */
    HS_SECTION_ACTIONS,    /* hs_plan_action */
    HS_SECTION_CHANNELS,   /* hs_plan_channel */
    HS_SECTION_PARTS,      /* hs_plan_part: of a mixture */
    HS_SECTION_WEIGHTS,    /* hs_plan_weight: of its phases, one a part in each, a phase after the other */
    HS_SECTION_COUNT
};
enum { HS_SECTIONS_PLAIN = HS_SECTION_PARTS };

typedef struct hs_plan_section {
    uint64_t offset; /* from the start of the file */
    uint64_t count;  /* records (bytes for STRINGS) */
} hs_plan_section;

typedef struct hs_plan_header {
    char magic[8];
    uint32_t version;
    uint32_t sections; /* HS_SECTION_COUNT, or HS_SECTIONS_PLAIN */
    uint64_t file_bytes;
    uint64_t reserved; /* 0 */
    uint8_t digest[32]; /* SHA-256 of everything from byte 64 on */
    hs_plan_section section[HS_SECTION_COUNT];
} hs_plan_header;

/* kinds of run */
enum { HS_MODE_TRAIN = 1, HS_MODE_INFER = 2 };
#define HS_PERSIST_LAST (-1)
/* learning-rate schedules: constant after warm-up; cosine to min; warm-up, stable, linear decay to min */
enum { HS_LR_CONSTANT = 1, HS_LR_COSINE = 2, HS_LR_WSD = 3 };

typedef struct hs_plan_config {
    uint32_t mode;             /* HS_MODE_* */
    uint32_t numerics_version; /* HS_NUMERICS_VERSION */
    uint32_t dtype;            /* of activations and weight matrices: HS_F32, HS_BF16 or HS_FP8 */
    uint32_t positions;        /* P, of the pipeline; each is a rank in every replica */
    uint32_t replicas;         /* D, a power of two */
    uint32_t microbatches;     /* M of a step, in each replica */
    uint32_t microbatch;       /* B, sequences */
    uint32_t sequence;         /* T, tokens */
    uint32_t vocab;            /* V: every token is < V */
    uint32_t token_bytes;      /* 2 or 4: of the shards */
    int64_t steps;             /* the run ends after this many optimizer steps */
    uint64_t seed;
    double lr, min_lr;         /* peak, floor */
    int64_t warmup_steps;      /* linear from lr/warmup to lr over these steps */
    int64_t decay_steps;       /* WSD: length of the final decay; COSINE: steps of the whole curve */
    uint32_t lr_schedule;      /* HS_LR_* */
    uint32_t threads;          /* of a rank; 0: its share of the CPUs that the node may use (run/machine.h) */
    double clip;               /* global gradient norm; 0: off */
    double beta1, beta2;       /* for the bias corrections */
    int64_t checkpoint_every;  /* snapshot after every step s with s % this == 0, and after the last; 0: last only */
    uint32_t slots;            /* snapshot slots of a rank */
    uint32_t data_shuffled;    /* 1: keyed permutation, 0: in order */
    uint64_t data_samples;     /* of one pass over the shards */
    uint32_t data_block;       /* samples a block */
    uint32_t data_window;      /* blocks a window */
    uint8_t dataset_digest[32];
    uint8_t what_digest[32];   /* of the What half of the spec */
    uint32_t reduction_groups; /* G, a power of two and a multiple of D that divides M*D: the step's microbatches are
                                * added up in G groups of consecutive ones, the groups in a balanced tree; replica r
                                * has those from r*G/D on */
    uint32_t reserved0;        /* 0 */
    int64_t persist_every;     /* of the snapshots, those after steps s with s % this == 0 go to the store, and the last
                                * one; a multiple of checkpoint_every; 0: all do; HS_PERSIST_LAST: the last one alone */
    int64_t lr_start;          /* the learning-rate schedule begins after this step; below steps */
    uint64_t reserved[3];
} hs_plan_config;

typedef struct hs_plan_tensor {
    uint32_t name_offset, name_length;
    uint32_t rank; /* dimensions used, 1..4 */
    uint32_t decay; /* 1: weight decay applies */
    int64_t shape[4]; /* unused ones are 1 */
    int64_t elements;
    uint64_t reserved;
} hs_plan_tensor;

typedef struct hs_plan_shard {
    uint64_t tokens;
    uint64_t first_sample; /* samples of all shards before; a shard has (tokens - 1) / T */
} hs_plan_shard;

/* A part of a mixture: a dataset of its own. All shards are some part's, in order. */
enum { HS_PARTS_MAX = 256, HS_PHASES_MAX = 256, HS_CYCLE_MAX = 1 << 16 };

typedef struct hs_plan_part {
    uint8_t digest[32];    /* of its dataset: its shards are <data_dir>/<digest, hex>/00000.bin ... */
    uint32_t first_shard, shards;
    uint64_t first_sample; /* samples of all parts before */
    uint64_t samples;      /* at least 1 */
    uint64_t reserved;     /* 0 */
} hs_plan_part;

/* What a part has of each cycle of a phase (shard.h), which begins with batch from_batch (1-based; the first phase with
 * 1) and ends where the next one begins. */
typedef struct hs_plan_weight {
    int64_t from_batch; /* of its phase; ascending */
    uint64_t base;      /* places of the part's order that whole cycles of the phases before have used */
    uint32_t part;      /* = its index in its phase */
    uint32_t weight;    /* of a phase 1 to HS_CYCLE_MAX in all */
} hs_plan_weight;

/* Memory of a rank: one arena of arena_bytes. A reference names a space and an offset into it:
 *   STATIC  arena + offset
 *   ACT     arena + act_offset + slot * act_stride + offset           (slot: of the action)
 *   MB      arena + mb_offset + microbatch * mb_stride + offset       (microbatch: of the action)
 *   PIECE   arena + offset + (replica ^ across) * bytes               (replica: of the rank)
 * A position with several stages has one pool of slots, each as large as the largest of them needs.
 * PIECE is one of D pieces of a buffer, each `bytes` long, all D in the arena: the rank's own (across 0), or
 * that of the replica which an exchange over `across` is with.
 * Every reference of 64-byte alignment at its start of buffer; sub-buffers may start at any element. */
enum { HS_SPACE_NONE = 0, HS_SPACE_STATIC = 1, HS_SPACE_ACT = 2, HS_SPACE_MB = 3, HS_SPACE_PIECE = 4 };

typedef struct hs_plan_ref {
    uint32_t space;
    uint32_t across; /* PIECE: below D; else 0 */
    uint64_t offset;
    uint64_t bytes; /* that may be touched from offset on; inside the space (ACT: inside act_stride) */
} hs_plan_ref;

/* bytes_by_kind; "other" holds the kernels' workspace of `threads` threads, of HS_THREADS_COUNTED where that is 0 */
enum { HS_MEMORY_SLOTS = 5, HS_MEMORY_KINDS = 8 };
enum { HS_THREADS_COUNTED = 2, HS_THREADS_MAX = 256 };

/* Action lists of a position, each a range of ACTIONS:
 *   init   once, on a fresh start, before load: fills master weights (moments are zero: the arena is)
 *   load   once, at every start: what follows from the master weights (compute copies, tables, tied copies)
 *   step   once a step
 *   redo   after a CHECK that clips: what the optimizer made after all goes where the foreseen went (run/steps.h)
 * Infer mode: load once, then step for each request (tokens in MB 0, logits out; or tokens and targets in, losses
 * out, both in MB 0). */
enum { HS_PLAN_FORESEEN = 128 };

typedef struct hs_plan_position {
    uint32_t position;       /* = its index in this table */
    uint32_t step_prefix;    /* optimistic: so many actions of the step list run before the step before is checked */
    uint64_t arena_bytes;
    uint64_t act_offset, act_stride;
    uint32_t act_slots, mb_count;
    uint64_t mb_offset, mb_stride;
    uint64_t tokens_offset;  /* inside an MB: i32[R] inputs; UINT64_MAX: this position reads none */
    uint64_t targets_offset; /* inside an MB: i32[R] targets; UINT64_MAX: none */
    uint64_t loss_offset;    /* inside an MB: f32[R] losses written by the classifier; UINT64_MAX: none */
    uint64_t sumsq_offset;   /* STATIC: f64[tensors] squared norms by tensor, zero where not owned */
    uint64_t control_offset; /* STATIC: hs_step_control; optimistic: HS_PLAN_FORESEEN further on the one foreseen */
    uint64_t logits_offset;  /* infer mode without losses, STATIC: f32[R,V]; else UINT64_MAX */
    uint64_t slot_bytes;     /* of a snapshot slot: header, checksums and data (slot.h) */
    uint32_t first_state, states;
    uint32_t first_init, inits;
    uint32_t first_load, loads;
    uint32_t first_step, steps;
    uint32_t first_redo, redos;
    uint32_t step_checks;    /* optimistic: so many actions behind the prefix check the step before; 0: the step list
                              * checks its own step at its end */
    uint32_t reserved0;      /* 0 */
    uint64_t bytes_by_kind[HS_MEMORY_KINDS]; /* weights, moments, gradients, activations, scratch, slots, channels, other: for show */
} hs_plan_position;

/* A state tensor at its owner. Exactly one position owns each tensor. Offsets are STATIC; f32.
 *
 * pieces 1: every replica keeps it whole. pieces D, for a tensor of more than HS_PIECE_BLOCK elements: a replica keeps
 * one piece of it. Of e elements in ceil(e / HS_PIECE_BLOCK) blocks a piece has ceil(blocks / D) blocks, `per` elements;
 * replica r has [r*per, min((r+1)*per, e)), which may be empty. Memory and slot always hold `per` elements; those that
 * the tensor does not have are zero. */
#define HS_PIECE_BLOCK 262144

/* `per`, or all where it is whole. */
static inline uint64_t hs_piece_elements(uint64_t elements, uint32_t pieces) {
    if (pieces <= 1) return elements;
    const uint64_t blocks = (elements + HS_PIECE_BLOCK - 1) / HS_PIECE_BLOCK;
    return (blocks + pieces - 1) / pieces * HS_PIECE_BLOCK;
}

typedef struct hs_plan_state {
    uint32_t tensor;
    uint32_t pieces; /* 1 or D */
    uint64_t master_offset, m_offset, v_offset; /* `per` elements each (pieces 1: all); v UINT64_MAX: it has none */
    uint64_t grad_offset; /* D*per elements (pieces 1: all), of which the own piece is summed over all replicas'
                           * microbatches after the exchanges (a tied tensor: over both uses) */
    uint64_t slot_offset; /* in a slot's data: master, then m, then v if there is one, each of as many bytes, rounded
                           * up to 64 */
} hs_plan_state;

/* Master and moments of a tensor, when it is trained: 3, or 2 without v, which Muon needs none of. */
static inline uint32_t hs_state_kinds(const hs_plan_state *state) {
    return state->v_offset == UINT64_MAX ? 2 : 3;
}

typedef struct hs_plan_program {
    uint32_t first_call, calls;
    uint32_t name_offset, name_length; /* for traces: "F", "B", "adamw", ... */
} hs_plan_program;

typedef struct hs_plan_call {
    uint16_t kernel; /* HS_K_* */
    uint16_t dtype;
    uint32_t layer; /* for traces; UINT32_MAX: none */
    hs_plan_ref ptr[HS_CALL_PTRS];
    int64_t dim[HS_CALL_DIMS];
    double real[HS_CALL_REALS];
} hs_plan_call;

enum {
    HS_A_RUN = 1,   /* program, with slot and microbatch */
    HS_A_SEND,      /* ref over channel */
    HS_A_RECV,      /* ref over channel */
    HS_A_DATA,      /* fill tokens and targets of every microbatch of this step */
    HS_A_COMBINE,   /* position 0 only: add the others' reports to its own
                     * (reports lie at ref, one hs_step_report each, in order of position; own first) */
    HS_A_REPORT,    /* write this position's hs_step_report at ref */
    HS_A_APPLY,     /* take the control block at ref as this step's: learning rate, clip, snapshot, stop */
    HS_A_SNAPSHOT,  /* fill a slot where the control block says so */
    HS_A_MERGE,     /* position 0 only: add the report at ref, of another replica, to its own */
    HS_A_DECIDE,    /* position 0 only: write the control block by its report at ref */
    HS_A_CHECK,     /* take the control block at ref as that of the step before, as APPLY does */
    HS_A_FORESEE,   /* write at ref the control block that this step will have where nothing is clipped */
    HS_A_COUNT
};

typedef struct hs_plan_action {
    uint8_t kind;  /* HS_A_* */
    char op;       /* 'F' 'I' 'W' 'B' for RUN and its messages; 'O' optimizer; '-' else */
    uint16_t reserved;
    uint32_t program;    /* RUN; else UINT32_MAX */
    uint32_t channel;    /* SEND, RECV; else UINT32_MAX */
    uint32_t stage;      /* of op F, I, W, B: whose, below 65536; else the number of the position */
    uint32_t microbatch; /* UINT32_MAX: none */
    uint32_t slot;       /* UINT32_MAX: none */
    hs_plan_ref ref;
} hs_plan_action;

/* A directed edge and kind. Messages on it are matched in order, one at a time.
 *
 * across 0: both ends are in one replica. across k > 0: from == to, and rank (r, from) talks to rank (r ^ k, from), both
 * ways, in exchanges: a SEND, directly followed by the RECV of the same channel. Both ends run the same list, so each
 * exchange meets its like: the two send at once, and neither waits for the other to have taken its message before it
 * takes the other's (comm/comm.h). */
enum {
    HS_CH_FORWARD = 1,
    HS_CH_BACKWARD,
    HS_CH_TIED_GRAD,
    HS_CH_TIED_WEIGHT,
    HS_CH_REPORT,
    HS_CH_CONTROL,
    HS_CH_REDUCE, /* gradients, to be added; across */
    HS_CH_GATHER, /* weights; across */
    HS_CH_NORMS,  /* partial sums of squares; across */
    HS_CH_COUNT
};

typedef struct hs_plan_channel {
    uint32_t from, to; /* positions */
    uint32_t kind;     /* HS_CH_* */
    uint32_t across;   /* 0, or below D; REPORT is either, the last three across only, the others 0 only */
    uint64_t bytes;    /* of a message; of REDUCE, GATHER and NORMS at most, the exchange says how many */
} hs_plan_channel;

/* What a position tells position 0 before the optimizer, and a replica's position 0 another's. Followed at once by f64
 * sumsq[tensors]: after COMBINE of all tensors, the same in every replica. */
typedef struct hs_step_report {
    int64_t step;        /* 1-based number of the step being finished */
    double loss_sum;     /* sum of the losses of every token (last position; else 0), in the fixed order */
    uint64_t loss_count; /* tokens counted in it: those with a target */
    uint32_t free_slot;  /* 1: a snapshot slot is free here */
    uint32_t stop;       /* 1: this position was asked to stop (SIGTERM) */
    uint32_t not_finite; /* 1: a loss here is not finite */
    uint32_t position;
    uint32_t sent_forward;  /* of the bytes of all its FORWARD messages of the step (run/executor.c); 0 on a device */
    uint32_t sent_backward; /* of its BACKWARD messages */
    uint32_t busy_us;       /* in F, B, I and W since its last report, at most UINT32_MAX; 0 on a device */
    uint32_t origin_of;     /* which number was not finite first, where that is known: run/origin.h */
    uint64_t origin;
} hs_step_report;

/* What position 0 answers to its replica; read by ADAMW. */
typedef struct hs_step_control {
    int64_t step;
    double loss;        /* mean over the tokens that count; 0 where none does */
    double norm;        /* of its gradient, before clipping */
    double lr;
    float clip_scale;   /* of the gradients, which are of the sum over all tokens of the step: tokens / counted, times
                         * clip / norm where that is below 1; 0 where no token counts */
    float step_size;    /* lr / (1 - beta1^step); 0 where no token counts */
    float v_scale;      /* 1 / sqrt(1 - beta2^step) */
    float lr_decay;     /* lr, in f32: multiplies weight decay; 0 where no token counts */
    uint32_t snapshot;  /* 1: save after this step */
    uint32_t stop;      /* 1: save and leave after this step */
    uint32_t not_finite;/* 1: the gang ends with HS_EXIT_DIVERGED before it applies anything */
    uint32_t skipped;   /* 1: a snapshot was due and a slot was missing */
    uint32_t persist;   /* 1: the snapshot goes to the store, as soon as the store takes one */
    uint32_t origin_of; /* the earliest of all reports' */
    uint64_t origin;
    uint64_t counted; /* tokens of the step that count */
    uint64_t reserved;
} hs_step_control;

#if defined(__STDC_VERSION__) && __STDC_VERSION__ >= 201112L
_Static_assert(sizeof(hs_plan_header) == 64 + 16 * HS_SECTION_COUNT, "header");
_Static_assert(sizeof(hs_plan_tensor) == 64, "tensor");
_Static_assert(sizeof(hs_plan_part) == 64, "part");
_Static_assert(sizeof(hs_plan_weight) == 24, "weight");
_Static_assert(sizeof(hs_plan_ref) == 24, "ref");
_Static_assert(sizeof(hs_plan_state) == 48, "state");
_Static_assert(sizeof(hs_plan_call) == 8 + 24 * HS_CALL_PTRS + 8 * HS_CALL_DIMS + 8 * HS_CALL_REALS, "call");
_Static_assert(sizeof(hs_plan_action) == 48, "action");
_Static_assert(sizeof(hs_step_report) == 64, "report");
_Static_assert(sizeof(hs_step_control) == 96, "control");
#endif

#endif
