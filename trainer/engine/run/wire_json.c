/* `hotstage-engine wire`: every byte format and number of wire/ as one JSON object, for the test
 * that compares them with trainer/wire/__init__.py. A field that is renamed there does not compile here. */
#include "run/wire_json.h"

#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "kernels/kernels.h"
#include "wire/agent.h"
#include "wire/algorithms.h"
#include "wire/attempt.h"
#include "wire/exit.h"
#include "wire/frame.h"
#include "wire/kernels.h"
#include "wire/plan.h"
#include "wire/shard.h"
#include "wire/slot.h"

typedef struct field {
    const char *record, *name; /* name NULL: the record itself */
    size_t offset, size;
} field;

/* clang-format off */
#define S(type) {#type, NULL, 0, sizeof(type)},
#define F(type, name) {#type, #name, offsetof(type, name), sizeof(((type *)0)->name)},
static const field fields[] = {
    S(hs_plan_section) F(hs_plan_section, offset) F(hs_plan_section, count)
    S(hs_plan_header) F(hs_plan_header, magic) F(hs_plan_header, version) F(hs_plan_header, sections) F(hs_plan_header, file_bytes) F(hs_plan_header, reserved) F(hs_plan_header, digest) F(hs_plan_header, section)
    S(hs_plan_config) F(hs_plan_config, mode) F(hs_plan_config, numerics_version) F(hs_plan_config, dtype) F(hs_plan_config, positions) F(hs_plan_config, replicas) F(hs_plan_config, microbatches) F(hs_plan_config, microbatch) F(hs_plan_config, sequence) F(hs_plan_config, vocab) F(hs_plan_config, token_bytes) F(hs_plan_config, steps) F(hs_plan_config, seed) F(hs_plan_config, lr) F(hs_plan_config, min_lr) F(hs_plan_config, warmup_steps) F(hs_plan_config, decay_steps) F(hs_plan_config, lr_schedule) F(hs_plan_config, threads) F(hs_plan_config, clip) F(hs_plan_config, beta1) F(hs_plan_config, beta2) F(hs_plan_config, checkpoint_every) F(hs_plan_config, slots) F(hs_plan_config, data_shuffled) F(hs_plan_config, data_samples) F(hs_plan_config, data_block) F(hs_plan_config, data_window) F(hs_plan_config, dataset_digest) F(hs_plan_config, what_digest) F(hs_plan_config, reduction_groups) F(hs_plan_config, reserved0) F(hs_plan_config, persist_every) F(hs_plan_config, lr_start) F(hs_plan_config, reserved)
    S(hs_plan_tensor) F(hs_plan_tensor, name_offset) F(hs_plan_tensor, name_length) F(hs_plan_tensor, rank) F(hs_plan_tensor, decay) F(hs_plan_tensor, shape) F(hs_plan_tensor, elements) F(hs_plan_tensor, reserved)
    S(hs_plan_part) F(hs_plan_part, digest) F(hs_plan_part, first_shard) F(hs_plan_part, shards) F(hs_plan_part, first_sample) F(hs_plan_part, samples) F(hs_plan_part, reserved)
    S(hs_plan_weight) F(hs_plan_weight, from_batch) F(hs_plan_weight, base) F(hs_plan_weight, part) F(hs_plan_weight, weight)
    S(hs_plan_shard) F(hs_plan_shard, tokens) F(hs_plan_shard, first_sample)
    S(hs_plan_ref) F(hs_plan_ref, space) F(hs_plan_ref, across) F(hs_plan_ref, offset) F(hs_plan_ref, bytes)
    S(hs_plan_position) F(hs_plan_position, position) F(hs_plan_position, step_prefix) F(hs_plan_position, arena_bytes) F(hs_plan_position, act_offset) F(hs_plan_position, act_stride) F(hs_plan_position, act_slots) F(hs_plan_position, mb_count) F(hs_plan_position, mb_offset) F(hs_plan_position, mb_stride) F(hs_plan_position, tokens_offset) F(hs_plan_position, targets_offset) F(hs_plan_position, loss_offset) F(hs_plan_position, sumsq_offset) F(hs_plan_position, control_offset) F(hs_plan_position, logits_offset) F(hs_plan_position, slot_bytes) F(hs_plan_position, first_state) F(hs_plan_position, states) F(hs_plan_position, first_init) F(hs_plan_position, inits) F(hs_plan_position, first_load) F(hs_plan_position, loads) F(hs_plan_position, first_step) F(hs_plan_position, steps) F(hs_plan_position, first_redo) F(hs_plan_position, redos) F(hs_plan_position, step_checks) F(hs_plan_position, reserved0) F(hs_plan_position, bytes_by_kind)
    S(hs_plan_state) F(hs_plan_state, tensor) F(hs_plan_state, pieces) F(hs_plan_state, master_offset) F(hs_plan_state, m_offset) F(hs_plan_state, v_offset) F(hs_plan_state, grad_offset) F(hs_plan_state, slot_offset)
    S(hs_plan_program) F(hs_plan_program, first_call) F(hs_plan_program, calls) F(hs_plan_program, name_offset) F(hs_plan_program, name_length)
    S(hs_plan_call) F(hs_plan_call, kernel) F(hs_plan_call, dtype) F(hs_plan_call, layer) F(hs_plan_call, ptr) F(hs_plan_call, dim) F(hs_plan_call, real)
    S(hs_plan_action) F(hs_plan_action, kind) F(hs_plan_action, op) F(hs_plan_action, reserved) F(hs_plan_action, program) F(hs_plan_action, channel) F(hs_plan_action, stage) F(hs_plan_action, microbatch) F(hs_plan_action, slot) F(hs_plan_action, ref)
    S(hs_plan_channel) F(hs_plan_channel, from) F(hs_plan_channel, to) F(hs_plan_channel, kind) F(hs_plan_channel, across) F(hs_plan_channel, bytes)
    S(hs_step_report) F(hs_step_report, step) F(hs_step_report, loss_sum) F(hs_step_report, loss_count) F(hs_step_report, free_slot) F(hs_step_report, stop) F(hs_step_report, not_finite) F(hs_step_report, position) F(hs_step_report, sent_forward) F(hs_step_report, sent_backward) F(hs_step_report, busy_us) F(hs_step_report, origin_of) F(hs_step_report, origin)
    S(hs_step_control) F(hs_step_control, step) F(hs_step_control, loss) F(hs_step_control, norm) F(hs_step_control, lr) F(hs_step_control, clip_scale) F(hs_step_control, step_size) F(hs_step_control, v_scale) F(hs_step_control, lr_decay) F(hs_step_control, snapshot) F(hs_step_control, stop) F(hs_step_control, not_finite) F(hs_step_control, skipped) F(hs_step_control, persist) F(hs_step_control, origin_of) F(hs_step_control, origin) F(hs_step_control, counted) F(hs_step_control, reserved)
    S(hs_slot_header) F(hs_slot_header, magic) F(hs_slot_header, version) F(hs_slot_header, position) F(hs_slot_header, state) F(hs_slot_header, hold) F(hs_slot_header, generation) F(hs_slot_header, step) F(hs_slot_header, epoch) F(hs_slot_header, data_offset) F(hs_slot_header, data_bytes) F(hs_slot_header, chunks) F(hs_slot_header, plan_digest) F(hs_slot_header, what_digest) F(hs_slot_header, header_crc) F(hs_slot_header, final) F(hs_slot_header, checksum_kind) F(hs_slot_header, replica) F(hs_slot_header, persist) F(hs_slot_header, claim)
    S(hs_attempt) F(hs_attempt, magic) F(hs_attempt, version) F(hs_attempt, crc) F(hs_attempt, run) F(hs_attempt, epoch) F(hs_attempt, plan_digest) F(hs_attempt, key) F(hs_attempt, nonce) F(hs_attempt, ranks) F(hs_attempt, kernel_path) F(hs_attempt, start_step) F(hs_attempt, stop_after) F(hs_attempt, connect_ms) F(hs_attempt, stall_ms) F(hs_attempt, commit_ms) F(hs_attempt, trace) F(hs_attempt, device_kind) F(hs_attempt, data_ahead) F(hs_attempt, algorithms_digest) F(hs_attempt, total_steps) F(hs_attempt, skips) F(hs_attempt, rates) F(hs_attempt, data_dir) F(hs_attempt, work_dir)
    S(hs_attempt_rank) F(hs_attempt_rank, host) F(hs_attempt_rank, port) F(hs_attempt_rank, node) F(hs_attempt_rank, device) F(hs_attempt_rank, reserved)
    S(hs_attempt_skip) F(hs_attempt_skip, first) F(hs_attempt_skip, last)
    S(hs_attempt_rate) F(hs_attempt_rate, step) F(hs_attempt_rate, factor)
    S(hs_algorithms) F(hs_algorithms, magic) F(hs_algorithms, version) F(hs_algorithms, crc) F(hs_algorithms, device) F(hs_algorithms, library) F(hs_algorithms, capability) F(hs_algorithms, count)
    S(hs_algorithm_key) F(hs_algorithm_key, m) F(hs_algorithm_key, n) F(hs_algorithm_key, k) F(hs_algorithm_key, ld_a) F(hs_algorithm_key, ld_b) F(hs_algorithm_key, ld_out) F(hs_algorithm_key, ld_add) F(hs_algorithm_key, type_a) F(hs_algorithm_key, type_b) F(hs_algorithm_key, type_out) F(hs_algorithm_key, across) F(hs_algorithm_key, add) F(hs_algorithm_key, bias) F(hs_algorithm_key, scale) F(hs_algorithm_key, align_a) F(hs_algorithm_key, align_b) F(hs_algorithm_key, align_out) F(hs_algorithm_key, align_add) F(hs_algorithm_key, align_bias) F(hs_algorithm_key, unused)
    S(hs_algorithm) F(hs_algorithm, key) F(hs_algorithm, algorithm) F(hs_algorithm, workspace_bytes) F(hs_algorithm, microseconds) F(hs_algorithm, candidates)
    S(hs_msg) F(hs_msg, magic) F(hs_msg, type) F(hs_msg, rank) F(hs_msg, bytes) F(hs_msg, epoch) F(hs_msg, a) F(hs_msg, b) F(hs_msg, c)
    S(hs_msg_prepare) F(hs_msg_prepare, local_ranks) F(hs_msg_prepare, port_base) F(hs_msg_prepare, bind)
    S(hs_hello) F(hs_hello, magic) F(hs_hello, version) F(hs_hello, channel) F(hs_hello, from) F(hs_hello, to) F(hs_hello, epoch) F(hs_hello, run) F(hs_hello, plan_digest) F(hs_hello, gang_nonce) F(hs_hello, nonce) F(hs_hello, start_step) F(hs_hello, mac)
    S(hs_frame) F(hs_frame, magic) F(hs_frame, channel) F(hs_frame, sequence) F(hs_frame, bytes) F(hs_frame, microbatch) F(hs_frame, reserved)
    S(hs_frame_end) F(hs_frame_end, magic) F(hs_frame_end, crc)
    S(hs_offer) F(hs_offer, magic) F(hs_offer, version) F(hs_offer, channel) F(hs_offer, rank) F(hs_offer, allowed) F(hs_offer, able) F(hs_offer, library) F(hs_offer, bytes) F(hs_offer, boot) F(hs_offer, device) F(hs_offer, memory) F(hs_offer, flags) F(hs_offer, flag) F(hs_offer, why)
    S(hs_answer) F(hs_answer, magic) F(hs_answer, channel) F(hs_answer, way) F(hs_answer, can) F(hs_answer, id) F(hs_answer, why)
    S(hs_shard_header) F(hs_shard_header, magic) F(hs_shard_header, version) F(hs_shard_header, token_bytes) F(hs_shard_header, tokens) F(hs_shard_header, vocab) F(hs_shard_header, reserved0) F(hs_shard_header, reserved)
};
/* clang-format on */

static const char *kernel_name(uint16_t number) {
    return number == HS_K_NONE ? "" : hs_kernel_facts_of(number)->name;
}

/* "a, b, c" as "a b c" */
static void print_names(const char *names) {
    (void)putchar('"');
    for (; *names; names++)
        if (*names != ',') (void)putchar(*names);
    (void)printf("\", ");
}

/* "name": [number, dims, reals, holds, input gradient, weight gradient, passes, products, again,
 * each, operands]; an operand as role, name, kind, rows, columns, row distance, and what else there
 * is to say: "optional", "below V", "may be dy", "with db". */
static void print_kernel(uint32_t number) {
    static const char *const roles[] = {"", "read", "write", "update", "scratch"};
    static const char *const kinds[] = {"",       "dt",      "acc",     "f64",   "byte",
                                        "tokens", "targets", "control", "places"};
    const hs_kernel_facts *k = hs_kernel_facts_of(number);
    (void)printf("%s\"%s\": [%u, ", number > 1 ? ", " : "", k->name, (unsigned)number);
    print_names(k->dims);
    print_names(k->reals);
    (void)printf("\"%s\", \"%s\", \"%s\", \"%s\", \"%s\", \"%s\", \"%s\", [", k->holds,
                 kernel_name(k->input_gradient), kernel_name(k->weight_gradient), k->passes,
                 k->products, k->again, k->each);
    for (int i = 0; i < k->operand_count; i++) {
        const hs_operand *o = &k->operands[i];
        (void)printf("%s[\"%s\", \"%s\", \"%s\", \"%s\", \"%s\", \"%s\", \"%s%s%s%s%s%s%s\"]",
                     i ? ", " : "", roles[o->role], o->name, kinds[o->kind], o->rows, o->columns,
                     o->ld, o->optional ? "optional" : "", o->below ? "below " : "",
                     o->below ? o->below : "", o->may_be ? "may be " : "",
                     o->may_be ? o->may_be : "", o->with ? "with " : "", o->with ? o->with : "");
    }
    (void)printf("]]");
}

static void print_structs(void) {
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        const field *f = &fields[i];
        if (!f->name) {
            (void)printf("%s\"%s\": {\"size\": %zu, \"fields\": {", i ? "}},\n" : "\n", f->record,
                         f->size);
        } else {
            (void)printf("%s\"%s\": [%zu, %zu]", fields[i - 1].name ? ", " : "", f->name, f->offset,
                         f->size);
        }
    }
}

static void print_exits(void) {
    static const struct {
        int code;
        const char *name, *cls, *text;
    } exits[] = {
#define X(code, NAME, cls, text) {code, #NAME, cls, text},
        HS_EXITS(X)
#undef X
    };
    for (size_t i = 0; i < sizeof exits / sizeof *exits; i++) {
        (void)printf("%s\"%d\": [\"%s\", \"%s\", \"%s\"]", i ? ", " : "", exits[i].code,
                     exits[i].name, exits[i].cls, exits[i].text);
    }
}

static void print_messages(void) {
    static const struct {
        const char *name;
        int number;
    } messages[] = {
#define X(number, NAME) {#NAME, number},
        HS_MSGS(X)
#undef X
    };
    for (size_t i = 0; i < sizeof messages / sizeof *messages; i++) {
        (void)printf("%s\"%s\": %d", i ? ", " : "", messages[i].name, messages[i].number);
    }
}

static void print_numbers(void) {
    static const struct {
        const char *name;
        unsigned long long value;
    } numbers[] = {
#define N(name) {#name, name}
        N(HS_PLAN_VERSION),
        N(HS_PLAN_PLAIN),
        N(HS_SECTIONS_PLAIN),
        N(HS_PARTS_MAX),
        N(HS_PHASES_MAX),
        N(HS_CYCLE_MAX),
        N(HS_NUMERICS_VERSION),
        N(HS_NUMERICS_F32),
        N(HS_ATTEMPT_VERSION),
        N(HS_ATTEMPT_SKIPS_MAX),
        N(HS_ATTEMPT_RATES_MAX),
        N(HS_ALGORITHMS_VERSION),
        N(HS_ALGORITHMS_MAX),
        N(HS_SLOT_VERSION),
        N(HS_SHARD_VERSION),
        N(HS_SHARD_MASKED),
        N(HS_HELLO_VERSION),
        N(HS_FRAME_MAGIC),
        N(HS_FRAME_END_MAGIC),
        N(HS_BUFFER_MOST),
        N(HS_MSG_MAGIC),
        N(HS_MSG_MAX),
        N(HS_ENDED_ITSELF),
        N(HS_ENDED_BY_SUPERVISOR),
        N(HS_ENDED_BY_OOM),
        N(HS_SLOT_CHUNK),
        N(HS_SLOTS_MAX),
        N(HS_THREADS_COUNTED),
        N(HS_THREADS_MAX),
        N(HS_CALL_PTRS),
        N(HS_CALL_DIMS),
        N(HS_CALL_REALS),
        N(HS_SUMSQ_BLOCK),
        N(HS_ATTENTION_HEAD_MAX),
        N(HS_SECTION_COUNT),
        N(HS_SLOT_HEADER_BYTES),
        N(HS_F32),
        N(HS_BF16),
        N(HS_F64),
        N(HS_I32),
        N(HS_E4M3),
        N(HS_E5M2),
        N(HS_FP8),
        N(HS_QUANTISE_PARTS),
        N(HS_VOCAB_BLOCKS),
        N(HS_MODE_TRAIN),
        N(HS_MODE_INFER),
        N(HS_LR_CONSTANT),
        N(HS_LR_COSINE),
        N(HS_LR_WSD),
        N(HS_SPACE_NONE),
        N(HS_SPACE_STATIC),
        N(HS_SPACE_ACT),
        N(HS_SPACE_MB),
        N(HS_SPACE_PIECE),
        N(HS_PIECE_BLOCK),
        N(HS_A_RUN),
        N(HS_A_SEND),
        N(HS_A_RECV),
        N(HS_A_DATA),
        N(HS_A_COMBINE),
        N(HS_A_REPORT),
        N(HS_A_APPLY),
        N(HS_A_SNAPSHOT),
        N(HS_A_MERGE),
        N(HS_A_DECIDE),
        N(HS_A_CHECK),
        N(HS_A_FORESEE),
        N(HS_CH_FORWARD),
        N(HS_CH_BACKWARD),
        N(HS_CH_TIED_GRAD),
        N(HS_CH_TIED_WEIGHT),
        N(HS_CH_REPORT),
        N(HS_CH_CONTROL),
        N(HS_CH_REDUCE),
        N(HS_CH_GATHER),
        N(HS_CH_NORMS),
        N(HS_TRACE_CALLS),
        N(HS_DEVICE_CPU),
        N(HS_DEVICE_CUDA),
        N(HS_SLOT_EMPTY),
        N(HS_SLOT_FILLING),
        N(HS_SLOT_READY),
        N(HS_SLOT_SUM_CRC32),
    };
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        (void)printf("%s\"%s\": %llu", i ? ", " : "", numbers[i].name, numbers[i].value);
    }
}

void hs_wire_print(void) {
    (void)printf("{\"structs\": {");
    print_structs();
    (void)printf("}}},\n\"kernels\": {");
    for (uint32_t k = 1; k < HS_K_COUNT; k++) print_kernel(k);
    (void)printf("},\n\"paths\": {");
#define X(number, NAME, name) (void)printf("%s\"%s\": %d", number ? ", " : "", name, number);
    HS_PATHS(X)
#undef X
    (void)printf("},\n\"exits\": {");
    print_exits();
    (void)printf("},\n\"messages\": {");
    print_messages();
    (void)printf("},\n\"numbers\": {");
    print_numbers();
    (void)printf("},\n\"workspace_bytes\": [%zu, %zu]}\n", hs_kernels_scratch_bytes(1),
                 hs_kernels_scratch_bytes(3));
}
