"""The engine's byte formats, as Python sees them: a mirror of ``trainer/engine/wire/*.h``.

The headers are the manual; this module holds the same records as ctypes structures and the same numbers as
constants, and ``tests/trainer/test_wire.py`` compares both with what ``hotstage-engine wire`` prints (names, offsets,
sizes), so neither can drift. It depends on nothing but the standard library: the agent's image carries it.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from trainer.wire.kernels import ATTENTION_HEAD_MAX as ATTENTION_HEAD_MAX
from trainer.wire.kernels import KERNELS as KERNELS
from trainer.wire.kernels import QUANTISE_PARTS as QUANTISE_PARTS
from trainer.wire.kernels import SUMSQ_BLOCK as SUMSQ_BLOCK
from trainer.wire.kernels import VOCAB_BLOCKS as VOCAB_BLOCKS

u8, u16, u32, u64 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64
i32, i64, f32, f64 = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_double
char = ctypes.c_char

# --- exit.h -----------------------------------------------------------------------------------------------


class Exit(NamedTuple):
    """An exit code of the engine: what it is called, what the driver does about it, what it means."""

    name: str
    cls: str
    text: str


EXITS: dict[int, Exit] = {
    0: Exit("DONE", "done", "finished"),
    64: Exit("USAGE", "config", "wrong command line"),
    65: Exit("DATA", "data", "bad training data"),
    70: Exit("BUG", "bug", "internal error"),
    75: Exit("LOST", "infra", "a peer or the store was lost"),
    76: Exit("RESTORE", "restore", "the restore point is damaged"),
    78: Exit("CONFIG", "config", "refused configuration or plan"),
    85: Exit("PREEMPTED", "preempted", "stopped on request, state saved"),
    86: Exit("STALLED", "stall", "a wait passed its deadline"),
    87: Exit("DIVERGED", "numeric", "loss or gradient norm is not finite"),
    88: Exit("SICK", "sick", "the machine, or a device of it, computes wrongly or is gone"),
    143: Exit("TERMINATED", "infra", "stopped on request, this attempt saved nothing"),
}

# --- kernels.h (its table: trainer/wire/kernels.py) --------------------------------------------------------

CALL_PTRS, CALL_DIMS, CALL_REALS = 12, 16, 6
F32, BF16, F64, I32, E4M3, E5M2, FP8 = range(1, 8)
DTYPE_BYTES = {F32: 4, BF16: 2, F64: 8, I32: 4, E4M3: 1, E5M2: 1}
PATHS = {
    "auto": 0,
    "ref": 1,
    "portable": 2,
    "avx2": 3,
    "avx512": 4,
    "cuda-exact": 5,
    "cuda": 6,
    "avx512_bf16": 7,
    "neon": 8,
}
"""Families of kernels by number: ``launch.kernel_path``, and ``kernel_path`` of an attempt."""
CUDA_PATHS = ("cuda-exact", "cuda")
"""Those that run on CUDA devices; ``auto`` runs on both, the others on CPUs."""

# --- plan.h -----------------------------------------------------------------------------------------------

PLAN_MAGIC, PLAN_VERSION, PLAN_PLAIN = b"HSPLAN\r\n", 3, 2
"""The newest version is of a plan with a mixture; one without is written as it was."""
NUMERICS_VERSION, NUMERICS_F32 = 3, 1
"""What the bits of a step mean: the newest that is known here, and that of float32."""
SECTIONS = (
    "config",
    "strings",
    "tensors",
    "shards",
    "positions",
    "states",
    "programs",
    "calls",
    "actions",
    "channels",
    "parts",
    "weights",
)
SECTIONS_PLAIN = 10
PARTS_MAX, PHASES_MAX, CYCLE_MAX = 256, 256, 1 << 16
MODE_TRAIN, MODE_INFER = 1, 2
PERSIST_LAST = -1
THREADS_COUNTED, THREADS_MAX = 2, 256
LR_CONSTANT, LR_COSINE, LR_WSD = 1, 2, 3
SPACE_NONE, SPACE_STATIC, SPACE_ACT, SPACE_MB, SPACE_PIECE = range(5)
PIECE_BLOCK = 262144
(
    A_RUN,
    A_SEND,
    A_RECV,
    A_DATA,
    A_COMBINE,
    A_REPORT,
    A_APPLY,
    A_SNAPSHOT,
    A_MERGE,
    A_DECIDE,
    A_CHECK,
    A_FORESEE,
    A_COUNT,
) = range(1, 14)
(
    CH_FORWARD,
    CH_BACKWARD,
    CH_TIED_GRAD,
    CH_TIED_WEIGHT,
    CH_REPORT,
    CH_CONTROL,
    CH_REDUCE,
    CH_GATHER,
    CH_NORMS,
) = range(1, 10)
FORESEEN = 128  # from the control block to the one foreseen
NONE32, NONE64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
MEMORY_KINDS = ("weights", "moments", "gradients", "activations", "scratch", "slots", "channels", "other")


class PlanSection(ctypes.LittleEndianStructure):
    _fields_ = [("offset", u64), ("count", u64)]


class PlanHeader(ctypes.LittleEndianStructure):
    _fields_ = [
        ("magic", u8 * 8),
        ("version", u32),
        ("sections", u32),
        ("file_bytes", u64),
        ("reserved", u64),
        ("digest", u8 * 32),
        ("section", PlanSection * len(SECTIONS)),
    ]


class PlanConfig(ctypes.LittleEndianStructure):
    _fields_ = [
        ("mode", u32),
        ("numerics_version", u32),
        ("dtype", u32),
        ("positions", u32),
        ("replicas", u32),
        ("microbatches", u32),
        ("microbatch", u32),
        ("sequence", u32),
        ("vocab", u32),
        ("token_bytes", u32),
        ("steps", i64),
        ("seed", u64),
        ("lr", f64),
        ("min_lr", f64),
        ("warmup_steps", i64),
        ("decay_steps", i64),
        ("lr_schedule", u32),
        ("threads", u32),
        ("clip", f64),
        ("beta1", f64),
        ("beta2", f64),
        ("checkpoint_every", i64),
        ("slots", u32),
        ("data_shuffled", u32),
        ("data_samples", u64),
        ("data_block", u32),
        ("data_window", u32),
        ("dataset_digest", u8 * 32),
        ("what_digest", u8 * 32),
        ("reduction_groups", u32),
        ("reserved0", u32),
        ("persist_every", i64),
        ("lr_start", i64),
        ("reserved", u64 * 3),
    ]


class PlanTensor(ctypes.LittleEndianStructure):
    _fields_ = [
        ("name_offset", u32),
        ("name_length", u32),
        ("rank", u32),
        ("decay", u32),
        ("shape", i64 * 4),
        ("elements", i64),
        ("reserved", u64),
    ]


class PlanPart(ctypes.LittleEndianStructure):
    """A part of a mixture."""

    _fields_ = [
        ("digest", u8 * 32),
        ("first_shard", u32),
        ("shards", u32),
        ("first_sample", u64),
        ("samples", u64),
        ("reserved", u64),
    ]


class PlanWeight(ctypes.LittleEndianStructure):
    """What a part has of each cycle of a phase."""

    _fields_ = [("from_batch", i64), ("base", u64), ("part", u32), ("weight", u32)]


class PlanShard(ctypes.LittleEndianStructure):
    _fields_ = [("tokens", u64), ("first_sample", u64)]


class PlanRef(ctypes.LittleEndianStructure):
    _fields_ = [("space", u32), ("across", u32), ("offset", u64), ("bytes", u64)]


class PlanPosition(ctypes.LittleEndianStructure):
    _fields_ = [
        ("position", u32),
        ("step_prefix", u32),
        ("arena_bytes", u64),
        ("act_offset", u64),
        ("act_stride", u64),
        ("act_slots", u32),
        ("mb_count", u32),
        ("mb_offset", u64),
        ("mb_stride", u64),
        ("tokens_offset", u64),
        ("targets_offset", u64),
        ("loss_offset", u64),
        ("sumsq_offset", u64),
        ("control_offset", u64),
        ("logits_offset", u64),
        ("slot_bytes", u64),
        ("first_state", u32),
        ("states", u32),
        ("first_init", u32),
        ("inits", u32),
        ("first_load", u32),
        ("loads", u32),
        ("first_step", u32),
        ("steps", u32),
        ("first_redo", u32),
        ("redos", u32),
        ("step_checks", u32),
        ("reserved0", u32),
        ("bytes_by_kind", u64 * 8),
    ]


class PlanState(ctypes.LittleEndianStructure):
    _fields_ = [
        ("tensor", u32),
        ("pieces", u32),
        ("master_offset", u64),
        ("m_offset", u64),
        ("v_offset", u64),
        ("grad_offset", u64),
        ("slot_offset", u64),
    ]


class PlanProgram(ctypes.LittleEndianStructure):
    _fields_ = [("first_call", u32), ("calls", u32), ("name_offset", u32), ("name_length", u32)]


class PlanCall(ctypes.LittleEndianStructure):
    _fields_ = [
        ("kernel", u16),
        ("dtype", u16),
        ("layer", u32),
        ("ptr", PlanRef * CALL_PTRS),
        ("dim", i64 * CALL_DIMS),
        ("real", f64 * CALL_REALS),
    ]


class PlanAction(ctypes.LittleEndianStructure):
    _fields_ = [
        ("kind", u8),
        ("op", u8),
        ("reserved", u16),
        ("program", u32),
        ("channel", u32),
        ("stage", u32),
        ("microbatch", u32),
        ("slot", u32),
        ("ref", PlanRef),
    ]


class PlanChannel(ctypes.LittleEndianStructure):
    _fields_ = [("from_", u32), ("to", u32), ("kind", u32), ("across", u32), ("bytes", u64)]


class StepReport(ctypes.LittleEndianStructure):
    _fields_ = [
        ("step", i64),
        ("loss_sum", f64),
        ("loss_count", u64),
        ("free_slot", u32),
        ("stop", u32),
        ("not_finite", u32),
        ("position", u32),
        ("sent_forward", u32),
        ("sent_backward", u32),
        ("busy_us", u32),
        ("origin_of", u32),
        ("origin", u64),
    ]


class StepControl(ctypes.LittleEndianStructure):
    _fields_ = [
        ("step", i64),
        ("loss", f64),
        ("norm", f64),
        ("lr", f64),
        ("clip_scale", f32),
        ("step_size", f32),
        ("v_scale", f32),
        ("lr_decay", f32),
        ("snapshot", u32),
        ("stop", u32),
        ("not_finite", u32),
        ("skipped", u32),
        ("persist", u32),
        ("origin_of", u32),
        ("origin", u64),
        ("counted", u64),
        ("reserved", u64),
    ]


# --- slot.h -----------------------------------------------------------------------------------------------

SLOT_MAGIC, SLOT_VERSION = b"HSSLOT\r\n", 2
SLOT_HEADER_BYTES, SLOT_CHUNK, SLOTS_MAX = 4096, 4 << 20, 16
SLOT_EMPTY, SLOT_FILLING, SLOT_READY = 0, 1, 2
DEVICE_CPU, DEVICE_CUDA = 1, 2
SUM_CRC32 = 2


class SlotHeader(ctypes.LittleEndianStructure):
    _fields_ = [
        ("magic", u8 * 8),
        ("version", u32),
        ("position", u32),
        ("state", u32),
        ("hold", u32),
        ("generation", u64),
        ("step", i64),
        ("epoch", u64),
        ("data_offset", u64),
        ("data_bytes", u64),
        ("chunks", u64),
        ("plan_digest", u8 * 32),
        ("what_digest", u8 * 32),
        ("header_crc", u32),
        ("final", u32),
        ("checksum_kind", u32),
        ("replica", u32),
        ("persist", u32),
        ("claim", u32),
    ]


# --- attempt.h --------------------------------------------------------------------------------------------

ATTEMPT_MAGIC, ATTEMPT_VERSION = b"HSATTM\r\n", 4
TRACE_CALLS = 2  # HS_TRACE_CALLS
ATTEMPT_SKIPS_MAX, ATTEMPT_RATES_MAX = 256, 64
DEVICES = {"cpu": DEVICE_CPU, "cuda": DEVICE_CUDA}
"""What a gang runs on, by the name that ``parallel.device`` has for it."""


class Attempt(ctypes.LittleEndianStructure):
    _fields_ = [
        ("magic", u8 * 8),
        ("version", u32),
        ("crc", u32),
        ("run", char * 64),
        ("epoch", u64),
        ("plan_digest", u8 * 32),
        ("key", u8 * 32),
        ("nonce", u8 * 16),
        ("ranks", u32),
        ("kernel_path", u32),
        ("start_step", i64),
        ("stop_after", i64),
        ("connect_ms", u32),
        ("stall_ms", u32),
        ("commit_ms", u32),
        ("trace", u32),
        ("device_kind", u32),
        ("data_ahead", u32),
        ("algorithms_digest", u8 * 32),
        ("total_steps", i64),
        ("skips", u32),
        ("rates", u32),
        ("data_dir", char * 512),
        ("work_dir", char * 512),
    ]


FOLDER_MOST = Attempt.data_dir.size - 1
"""Bytes of a folder's name in an attempt file, which ends with a zero."""


class AttemptRank(ctypes.LittleEndianStructure):
    _fields_ = [("host", char * 256), ("port", u32), ("node", u32), ("device", u32), ("reserved", u32)]


class AttemptSkip(ctypes.LittleEndianStructure):
    _fields_ = [("first", i64), ("last", i64)]


class AttemptRate(ctypes.LittleEndianStructure):
    _fields_ = [("step", i64), ("factor", f64)]


# --- algorithms.h -----------------------------------------------------------------------------------------

ALGORITHMS_MAGIC, ALGORITHMS_VERSION, ALGORITHMS_MAX = b"HSALGO\r\n", 1, 256


class Algorithms(ctypes.LittleEndianStructure):
    _fields_ = [
        ("magic", u8 * 8),
        ("version", u32),
        ("crc", u32),
        ("device", char * 96),
        ("library", char * 32),
        ("capability", u32),
        ("count", u32),
    ]


class AlgorithmKey(ctypes.LittleEndianStructure):
    _fields_ = [
        ("m", i64),
        ("n", i64),
        ("k", i64),
        ("ld_a", i64),
        ("ld_b", i64),
        ("ld_out", i64),
        ("ld_add", i64),
        ("type_a", u8),
        ("type_b", u8),
        ("type_out", u8),
        ("across", u8),
        ("add", u8),
        ("bias", u8),
        ("scale", u8),
        ("align_a", u8),
        ("align_b", u8),
        ("align_out", u8),
        ("align_add", u8),
        ("align_bias", u8),
        ("unused", u8 * 4),
    ]


class Algorithm(ctypes.LittleEndianStructure):
    _fields_ = [
        ("key", AlgorithmKey),
        ("algorithm", u8 * 64),
        ("workspace_bytes", u64),
        ("microseconds", u32),
        ("candidates", u32),
    ]


# --- agent.h ----------------------------------------------------------------------------------------------

MSG_MAGIC, MSG_MAX = 0x4D475348, 65536
ENDED_ITSELF, ENDED_BY_SUPERVISOR, ENDED_BY_OOM = 0, 1, 2
MSGS = {
    "HELLO": 1,
    "PREPARE": 2,
    "PORTS": 3,
    "START": 4,
    "SLOTS": 5,
    "METRICS": 6,
    "READY": 7,
    "WORDS": 8,
    "TRACE": 9,
    "OUTPUT": 10,
    "EXIT": 11,
    "IDLE": 12,
    "COMMITTED": 13,
    "STOP": 14,
    "KILL": 15,
    "END": 16,
    "ALGORITHMS": 17,
    "DATA": 18,
}


class Msg(ctypes.LittleEndianStructure):
    _fields_ = [
        ("magic", u32),
        ("type", u32),
        ("rank", i32),
        ("bytes", u32),
        ("epoch", u64),
        ("a", i64),
        ("b", i64),
        ("c", i64),
    ]


class MsgPrepare(ctypes.LittleEndianStructure):
    _fields_ = [("local_ranks", u32), ("port_base", u32), ("bind", char * 64)]


# --- frame.h, shard.h -------------------------------------------------------------------------------------

HELLO_MAGIC, HELLO_VERSION = b"HSHELO\r\n", 2
FRAME_MAGIC, FRAME_END_MAGIC = 0x52465348, 0x45465348
BUFFER_MOST = 8 << 20


class Hello(ctypes.LittleEndianStructure):
    _fields_ = [
        ("magic", u8 * 8),
        ("version", u32),
        ("channel", u32),
        ("from_", u32),
        ("to", u32),
        ("epoch", u64),
        ("run", char * 64),
        ("plan_digest", u8 * 32),
        ("gang_nonce", u8 * 16),
        ("nonce", u8 * 16),
        ("start_step", i64),
        ("mac", u8 * 32),
    ]


class Frame(ctypes.LittleEndianStructure):
    _fields_ = [
        ("magic", u32),
        ("channel", u32),
        ("sequence", u64),
        ("bytes", u64),
        ("microbatch", u32),
        ("reserved", u32),
    ]


class FrameEnd(ctypes.LittleEndianStructure):
    _fields_ = [("magic", u32), ("crc", u32)]


OFFER_MAGIC, OFFER_VERSION, ANSWER_MAGIC, BYE = b"HSOFFR\r\n", 1, 0x52574E41, 0x42
WAYS = {"tcp": 0, "ipc": 1, "nccl": 2}
"""How the messages of a channel of device memory pass."""


class Offer(ctypes.LittleEndianStructure):
    """What an end of a channel of device memory may and can do."""

    _fields_ = [
        ("magic", u8 * 8),
        ("version", u32),
        ("channel", u32),
        ("rank", u32),
        ("allowed", u32),
        ("able", u32),
        ("library", u32),
        ("bytes", u64),
        ("boot", char * 40),
        ("device", u8 * 16),
        ("memory", u8 * 80),
        ("flags", u8 * 80),
        ("flag", u64),
        ("why", char * 160),
    ]


class Answer(ctypes.LittleEndianStructure):
    """Whether an end can do what was chosen."""

    _fields_ = [
        ("magic", u32),
        ("channel", u32),
        ("way", u32),
        ("can", u32),
        ("id", u8 * 128),
        ("why", char * 256),
    ]


SHARD_MAGIC, SHARD_VERSION, SHARD_MASKED = b"HSSHRD\r\n", 1, 2


class ShardHeader(ctypes.LittleEndianStructure):
    _fields_ = [
        ("magic", u8 * 8),
        ("version", u32),
        ("token_bytes", u32),
        ("tokens", u64),
        ("vocab", u32),
        ("reserved0", u32),
        ("reserved", u8 * 32),
    ]
