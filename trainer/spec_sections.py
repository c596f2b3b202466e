"""What a spec holds: RunSpec and its sections, with their defaults and limits. How one is read: ``spec.py``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, model_validator

from trainer import models
from trainer.dataset import DatasetRef
from trainer.errors import SpecError
from trainer.spec_layouts import layout_words, other_hows
from trainer.wire import CUDA_PATHS
from trainer.wire.packed import RECORD_DEPTH, pack

MAX_INT32 = (1 << 31) - 1
MAX_VOCAB_SIZE = 1 << 24
MAX_MICROBATCHES = 1 << 16
DEFAULT_GROUPS = 8
"""Of ``train.reduction_groups``, where the microbatches of a step allow it."""
MAX_LAYERS = 10_000
FP8_SIDE = 16
NAME = r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$"
DNS_LABEL = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
RULES = {
    NAME: "lower-case letters, digits and inner dashes, a letter first, at most 40",
    DNS_LABEL: "lower-case letters, digits and inner dashes, at most 63 characters (a DNS label)",
}

Precision = Literal["fp32", "bf16", "fp8"]
KernelPath = Literal["auto", "ref", "portable", "avx2", "avx512", "cuda-exact", "cuda"]
"""Families of kernels, in the order of their numbers (``wire.PATHS``); the last two run on CUDA devices."""


Device = Literal["auto", "cpu", "cuda"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


RETIRED = {"recovery": ("max_rollbacks",)}
"""Keys that never had an effect and are gone. Specs, logs and Prefect's deployments that hold them are read."""


def _divisors(number: int) -> list[int]:
    """All divisors, in the time of its square root: a wrong number must not take minutes to refuse."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return [*small, *(number // d for d in small)]


def _power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


def _twos(number: int) -> int:
    """The largest power of two that divides a number above 0."""
    return number & -number


def _size(default: Any = ..., *, low: int = 1, high: int = MAX_INT32, text: str) -> Any:
    return Field(default, ge=low, le=high, description=text, strict=True)


class ModelSpec(_Section):
    """The model: a family and its sizes (in elements, heads, tokens)."""

    family: str = Field(description="model family: a module of trainer/models (gpt2, llama, qwen3)")
    layers: int = _size(high=MAX_LAYERS, text="transformer layers")
    width: int = _size(high=1 << 20, text="size of the residual stream")
    heads: int = _size(high=1 << 16, text="query heads")
    kv_heads: int | None = _size(None, high=1 << 16, text="key/value heads (llama, qwen3); unset: as many as heads")
    head_size: int | None = _size(None, high=1024, text="elements of a head; unset: width / heads")
    hidden: int | None = _size(
        None, high=1 << 22, text="width inside the MLP; unset: 4*width (gpt2), else 8/3*width rounded up to 64"
    )
    vocab: int = _size(0, low=0, text="vocabulary; 0: that of the dataset")
    context: int = _size(high=1 << 24, text="longest sequence that the model takes, in tokens")
    norm_eps: float = Field(1e-5, gt=0, lt=1, description="added to the variance in norms")
    rope_base: float = Field(10_000.0, gt=1, description="base of the rotary angles (llama, qwen3)")
    tied: bool = Field(True, description="the head shares the token embedding's weights")
    init_std: float = Field(0.02, gt=0, lt=10, description="standard deviation of initial weights")

    @model_validator(mode="after")
    def _check(self) -> ModelSpec:
        if self.family not in models.names():
            raise ValueError(f"family {shown(self.family)} is unknown; take one of {', '.join(models.names())}")
        if self.head_size is None and self.width % self.heads:
            below = max(h for h in range(1, self.heads + 1) if self.width % h == 0)
            raise ValueError(
                f"heads {self.heads} do not divide width {self.width}; take heads = {below} or a width that is a "
                f"multiple of {self.heads}"
            )
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads {self.kv_heads} do not divide heads {self.heads}; every key/value head serves the same "
                "number of query heads"
            )
        models.family(self.family).check(self)
        return self

    @property
    def size_of_head(self) -> int:
        """``head_size``, or width / heads where it is unset."""
        return self.head_size if self.head_size is not None else self.width // self.heads

    @property
    def groups(self) -> int:
        """Key/value heads."""
        return self.kv_heads if self.kv_heads is not None else self.heads

    @property
    def size_of_hidden(self) -> int:
        """``hidden``, or the family's usual size where it is unset."""
        if self.hidden is not None:
            return self.hidden
        return 4 * self.width if self.family == "gpt2" else -(-8 * self.width // 3 // 64) * 64


class DataSpec(_Section):
    """Where the text comes from and in which order its samples are read."""

    source: str = Field(
        "python-stdlib", description='"python-stdlib", "text:<glob>", "jsonl:<glob>" (field text) or "dataset:<digest>"'
    )
    vocab_size: int = _size(4096, low=257, high=MAX_VOCAB_SIZE, text="vocabulary of the tokenizer to train")
    tokenizer: str | None = Field(None, description="path of a tokenizer.json; unset: train a byte-level BPE")
    end_token: str | None = Field(
        None, description='token of data.tokenizer that ends a document; unset: <|endoftext|>; "": none'
    )
    shuffled: bool = Field(True, description="keyed permutation of blocks and samples; false: in order")
    block: int = _size(64, text="samples a block of the shuffle")
    window: int = _size(64, text="blocks a window of the shuffle")
    shard_tokens: int = _size(1 << 24, low=2, text="tokens a shard file")
    packing: Literal["across"] = Field("across", description="documents are packed, attention crosses their borders")

    @model_validator(mode="after")
    def _check(self) -> DataSpec:
        if self.end_token is not None and self.tokenizer is None:
            raise ValueError(
                f"end_token {shown(self.end_token)} is for a tokenizer that is given with data.tokenizer; the one "
                "that is trained here ends documents with <|endoftext|>: leave it out"
            )
        kind, _, rest = self.source.partition(":")
        if self.source == "python-stdlib" or (kind in ("text", "jsonl") and rest):
            return self
        if kind == "dataset" and re.fullmatch(r"[0-9a-f]{64}", rest):
            return self
        raise ValueError(
            f"source {shown(self.source)} is unknown; take 'python-stdlib', 'text:<glob>', 'jsonl:<glob>' or "
            "'dataset:<64 hex digits>'"
        )


class OptimizerSpec(_Section):
    """AdamW. Decay applies to tensors of two and more dimensions."""

    name: Literal["adamw"] = "adamw"
    lr: float = Field(3e-4, gt=0, le=10, description="peak learning rate")
    min_lr: float = Field(0.0, ge=0, le=10, description="floor of the learning rate")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0, lt=1)
    weight_decay: float = Field(0.1, ge=0, le=10)
    clip: float = Field(1.0, ge=0, description="limit of the global gradient norm; 0: off")

    @model_validator(mode="after")
    def _check(self) -> OptimizerSpec:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}; lower it")
        return self


class ScheduleSpec(_Section):
    """Learning rate over steps."""

    kind: Literal["constant", "cosine", "wsd"] = Field("cosine", description="wsd: warm-up, stable, linear decay")
    warmup: int = _size(0, low=0, text="steps of the linear warm-up")
    decay: int = _size(0, low=0, text="steps of the final decay (wsd) or of the whole curve (cosine); 0: from steps")


class TrainSpec(_Section):
    """How long and with which batches, precision and optimizer."""

    steps: int = _size(high=1 << 40, text="optimizer steps of the run")
    batch: int = _size(text="sequences a step")
    microbatch: int = _size(text="sequences a microbatch")
    sequence: int = _size(high=1 << 24, text="tokens a sequence")
    precision: Precision = Field(
        "fp32",
        description="of activations and weight matrices; masters are fp32. fp8: bf16, but the layers' products in FP8",
    )
    seed: int = _size(0, low=0, high=(1 << 63) - 1, text="of initial weights and the order of samples")
    max_batch_tokens: int = _size(0, low=0, high=1 << 62, text="most tokens that a step may have; 0: no limit")
    reduction_groups: int = _size(
        0,
        low=0,
        text="groups of microbatches whose gradients join in a tree, a power of two: the most replicas that give the "
        "same bits; 0: 8, or the largest power of two below it that divides the step's microbatches",
    )
    vocab_blocks: int = _size(1, text="blocks of the head's sums")
    classifier_chunk: int = _size(64, text="rows of logits that exist at a time")
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()

    @model_validator(mode="after")
    def _check(self) -> TrainSpec:
        if self.batch % self.microbatch:
            best = max(d for d in _divisors(self.batch) if d <= self.microbatch)
            raise ValueError(
                f"batch {self.batch} is not a multiple of microbatch {self.microbatch}; take microbatch = {best}"
            )
        if self.microbatches > MAX_MICROBATCHES:
            fits = min(d for d in _divisors(self.batch) if self.batch // d <= MAX_MICROBATCHES)
            raise ValueError(
                f"batch {self.batch} is {self.microbatches} microbatches of {self.microbatch}; the limit is "
                f"{MAX_MICROBATCHES}, a plan lists each of them: take microbatch = {fits} or a smaller batch"
            )
        self._check_groups()
        if self.vocab_blocks != 1:
            raise ValueError(f"vocab_blocks {self.vocab_blocks}: this version runs 1; set it to 1")
        if self.schedule.warmup > self.steps:
            raise ValueError(f"schedule.warmup {self.schedule.warmup} is more than steps {self.steps}; lower it")
        if self.schedule.kind == "wsd" and self.schedule.warmup + self.schedule.decay > self.steps:
            raise ValueError(
                f"schedule.warmup {self.schedule.warmup} and decay {self.schedule.decay} exceed steps {self.steps}; "
                "shorten one"
            )
        if self.batch * self.sequence > MAX_INT32:
            raise ValueError(
                f"batch * sequence is {self.batch * self.sequence} tokens a step; the limit is {MAX_INT32}; lower batch"
            )
        if 0 < self.max_batch_tokens < self.tokens:
            raise ValueError(
                f"batch {self.batch} * sequence {self.sequence} is {self.tokens} tokens a step; max_batch_tokens is "
                f"{self.max_batch_tokens}: take batch = {self.max_batch_tokens // self.sequence} or less, or raise it"
            )
        return self

    def _check_groups(self) -> None:
        groups, most = self.reduction_groups, _twos(self.microbatches)
        if not groups or (_power_of_two(groups) and most % groups == 0):
            return
        why = "is no power of two"
        if _power_of_two(groups):
            why = f"does not divide the step's {self.microbatches} microbatches (batch / microbatch)"
        fits = min(most, 1 << (groups.bit_length() - 1))
        more = "" if fits < most else f", or a batch that is a multiple of {self.microbatch * 2 * most}"
        raise ValueError(f"reduction_groups {groups} {why}; take reduction_groups = {fits}{more}")

    @property
    def groups(self) -> int:
        """``reduction_groups``, or what it is where it is unset."""
        return self.reduction_groups or min(DEFAULT_GROUPS, _twos(self.microbatches))

    @property
    def microbatches(self) -> int:
        """Microbatches a step, of all replicas."""
        return self.batch // self.microbatch

    @property
    def rows(self) -> int:
        """Tokens a microbatch."""
        return self.microbatch * self.sequence

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.batch * self.sequence


SCHEDULES = ("1f1b", "gpipe", "interleaved-1f1b", "zb-h1", "zb-v", "v-half")
ONE_STAGE = {"1f1b": "interleaved-1f1b", "zb-h1": "zb-v"}
"""Schedules that take one stage a rank; each with one that takes several."""
TWO_STAGES = ("zb-v", "v-half")
"""Schedules that take two stages a rank, there and back along the ranks."""


RecomputeKind = Literal["none", "elementwise", "attention", "layer"]


class RecomputeSpec(_Section):
    """What layers compute again in backward instead of keeping it. Written as the kind alone, it is of all layers.

    elementwise: norms and activation functions (and FP8 codes); attention: these and attention; layer: all of it, so
    that its input alone is kept.
    """

    kind: RecomputeKind = Field("none", description='"none", "elementwise", "attention" or "layer"')
    layers: StrictInt | tuple[StrictInt, ...] | None = Field(
        None, description="how many layers of each stage, its first ones, or a list of a number a stage; unset: all"
    )

    @model_validator(mode="before")
    @classmethod
    def _kind_alone(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> RecomputeSpec:
        counts = () if self.layers is None else (self.layers,) if isinstance(self.layers, int) else self.layers
        if self.kind == "none" and self.layers is not None:
            raise ValueError('layers are set and kind is "none"; take a kind, or leave layers out')
        if any(not 0 <= count <= MAX_LAYERS for count in counts):
            raise ValueError(f"layers {self.layers}: each is from 0 to {MAX_LAYERS}")
        return self

    def of_stage(self, stage: int) -> int | None:
        """How many layers of a stage; None: all of them."""
        if self.kind == "none":
            return 0
        return self.layers[stage] if isinstance(self.layers, tuple) else self.layers


class ParallelSpec(_Section):
    """How the work is split. Never changes the bits."""

    stages: int = _size(1, high=4096, text="pipeline stages")
    chunks: int = _size(1, high=4096, text="stages of a rank, at most; 2 for zb-v and v-half")
    schedule: str = Field(
        "1f1b",
        max_length=4096,
        description='"1f1b", "gpipe", "interleaved-1f1b", "zb-h1", "zb-v", "v-half" (docs/schedules.md), or '
        '"file:PATH" of a CSV as PyTorch\'s pipelining writes it',
    )
    replicas: int = _size(
        1,
        high=4096,
        text="data-parallel replicas, a power of two, at most train.reduction_groups; they share the batch",
    )
    recompute: RecomputeSpec = RecomputeSpec()
    optimizer: Literal["auto", "checked", "optimistic"] = Field(
        "auto",
        description="checked: a step ends when all know that it is finite, and how it is clipped; optimistic: the next "
        "one begins meanwhile; auto: what the cost model says is quicker",
    )
    threads: int = _size(0, low=0, high=1024, text="threads a rank; 0: its share of the node's cores")
    device: Device = Field(
        "auto",
        description="what ranks run on: cuda, cpu, or auto: cuda where the node's engine has a device, else cpu",
    )

    @property
    def ranks(self) -> int:
        """Processes of a gang: a rank fills each position of the pipeline in every replica."""
        return self.positions(self.stages) * self.replicas

    def on_cuda(self, kernel_path: KernelPath) -> bool:
        """Whether ranks are asked to run on CUDA devices: by name, or by a family of kernels that runs nowhere else."""
        return self.device == "cuda" or (self.device == "auto" and kernel_path in CUDA_PATHS)

    def positions(self, stages: int) -> int:
        """Places in a pipeline of so many stages."""
        return -(-stages // self.chunks)

    @model_validator(mode="after")
    def _check(self) -> ParallelSpec:
        if self.schedule not in SCHEDULES and not re.match("file:.", self.schedule):
            names = ", ".join((*SCHEDULES, "file:PATH"))
            raise ValueError(f"schedule {shown(self.schedule)} is unknown; take one of {names}")
        counts = self.recompute.layers
        if isinstance(counts, tuple) and len(counts) != self.stages:
            raise ValueError(
                f"recompute.layers has {len(counts)} numbers, there are {self.stages} stages; write one a stage, or "
                "one for all"
            )
        if self.chunks > 1 and self.schedule in ONE_STAGE:
            raise ValueError(
                f"chunks {self.chunks}: schedule {self.schedule} takes 1 stage a rank; take schedule = "
                f"'{ONE_STAGE[self.schedule]}', or chunks = 1"
            )
        if self.schedule in TWO_STAGES and (self.chunks != 2 or self.stages % 2):
            raise ValueError(
                f"stages {self.stages}, chunks {self.chunks}: schedule {self.schedule} takes 2 stages a rank, there "
                "and back along the ranks; take chunks = 2 and an even number of stages, such as "
                f"{self.stages + self.stages % 2}"
            )
        if self.schedule == "interleaved-1f1b" and self.stages % self.chunks:
            raise ValueError(
                f"chunks {self.chunks} do not divide stages {self.stages}: schedule interleaved-1f1b takes as many at "
                f"each rank; take stages = {max(1, self.stages // self.chunks) * self.chunks}"
            )
        if not _power_of_two(self.replicas):
            below = 1 << (self.replicas.bit_length() - 1)
            raise ValueError(f"replicas {self.replicas} is no power of two; take replicas = {below} or {2 * below}")
        return self


class CheckpointSpec(_Section):
    """When state is saved and how long saving may take."""

    every: int = _size(100, low=0, high=1 << 40, text="steps between snapshots; 0: only after the last step")
    slots: int = _size(3, low=2, high=16, text="snapshot slots of a rank in memory")
    deadline_s: float = Field(600.0, gt=0, le=86_400, description="of one upload")
    commit_s: float = Field(120.0, gt=0, le=86_400, description="wait of the last step for its commit")


class LaunchSpec(_Section):
    """Where the ranks run."""

    target: Literal["local", "kubernetes"] = "local"
    nodes: int = _size(1, high=4096, text="nodes (local: groups of processes; kubernetes: pods)")
    kernel_path: KernelPath = "auto"
    memory_gib: float = Field(
        0.0, ge=0, le=1 << 20, description="memory budget of a node; a plan above it is refused; 0: none"
    )
    connect_s: float = Field(60.0, gt=0, le=3600, description="deadline for all ranks to find each other")
    stall_s: float = Field(120.0, gt=0, le=86_400, description="deadline of every wait inside a step")
    trace: bool = Field(False, description="record the time of every instruction")
    host: str = Field("127.0.0.1", min_length=1, max_length=63, description="address that local ranks listen on")
    port_base: int = _size(0, low=0, high=65_000, text="first port of the ranks; 0: any free ones, in pods 7400 and on")
    namespace: str = Field("default", pattern=DNS_LABEL, description="kubernetes")
    image: str = Field("", description="kubernetes: image of the engine")
    agent_image: str = Field("", description="kubernetes: image of the agent; unset: same as image")
    service_account: str = Field("", description="kubernetes: service account of the pods; unset: the default one")
    resources: dict[str, str] = Field(default_factory=dict, description="kubernetes: of the engine, e.g. cpu, memory")
    agent_resources: dict[str, str] = Field(default_factory=dict, description="kubernetes: of the agent")
    store_secret: str = Field("", description="kubernetes: Secret with the store's credentials, for the agent only")
    pod_patch: dict[str, Any] = Field(default_factory=dict, description="kubernetes: strategic-merge patch of the pod")
    fabric: Literal["tcp", "infiniband", "roce", "efa", "nvl72"] = "tcp"
    queue: str = Field("", max_length=63, description="kubernetes: Kueue's queue; the Job then waits to be admitted")
    runtime_class: str = Field("", max_length=253, description="kubernetes: RuntimeClass of the pods, e.g. nvidia")
    priority_class: str = Field("", max_length=253, description="kubernetes: PriorityClass of the pods")
    node_selector: dict[str, str] = Field(default_factory=dict, description="kubernetes: labels of the machines to use")
    tolerations: list[dict[str, Any]] = Field(default_factory=list, description="kubernetes: taints that are borne")
    toleration_s: int = _size(30, low=0, high=86_400, text="kubernetes: seconds until a silent machine's pods are lost")
    spread: str = Field(
        "kubernetes.io/hostname", description="kubernetes: topology that pods are spread over; empty: they are not"
    )


class OtherLayout(_Section):
    """How a run goes on where there is no room for it as it was asked for; a key that is left out stays as it is."""

    nodes: int | None = _size(None, high=4096, text="nodes; unset: as many as the ranks fill")
    stages: int | None = _size(None, high=4096, text="pipeline stages")
    replicas: int | None = _size(None, text="data-parallel replicas")
    chunks: int | None = _size(None, high=4096, text="stages of a rank, at most")
    schedule: str | None = Field(None, max_length=4096, description="as parallel.schedule")


class RecoverySpec(_Section):
    """What the driver does after a failure."""

    @model_validator(mode="before")
    @classmethod
    def _without_retired(cls, value: Any) -> Any:
        gone = RETIRED["recovery"]
        return {k: v for k, v in value.items() if k not in gone} if isinstance(value, Mapping) else value

    max_same_step: int = _size(2, high=100, text="crashes at the same step before it gives up")
    backoff_s: float = Field(1.0, ge=0, le=3600, description="first pause before the next attempt after a loss")
    backoff_max_s: float = Field(60.0, ge=0, le=86_400, description="longest pause")
    layouts: tuple[OtherLayout, ...] = Field(
        (),
        max_length=16,
        description="layouts to go on with where fewer nodes are to be had than asked for, best first: tables of "
        "nodes, stages, replicas, chunks, schedule",
    )
    allowed_stages: tuple[int, ...] = Field(
        (), max_length=16, description="short for layouts that differ in stages alone"
    )
    capacity_s: float = Field(300.0, gt=0, le=86_400, description="wait for nodes before the next of layouts is taken")

    @model_validator(mode="after")
    def _check(self) -> RecoverySpec:
        if self.layouts and self.allowed_stages:
            raise ValueError("allowed_stages is short for layouts: give one of the two; take layouts")
        return self


def _check_fp8(model: ModelSpec, train: TrainSpec) -> None:
    """Tensor cores take FP8 where all sides of a product are multiples of 16 bytes."""
    for tensor in models.family(model.family).tensors(model):
        if tensor.part == "layer" and len(tensor.shape) == 2 and any(side % FP8_SIDE for side in tensor.shape):
            raise ValueError(
                f'train.precision "fp8" multiplies matrices whose sides are multiples of {FP8_SIDE}; '
                f"{tensor.name} is {tensor.shape[0]} x {tensor.shape[1]}: take such a width, hidden and heads * "
                'head_size, or precision = "bf16"'
            )
    if train.rows % FP8_SIDE:
        raise ValueError(
            f'train.precision "fp8" takes microbatches whose tokens are a multiple of {FP8_SIDE}; microbatch '
            f"{train.microbatch} * sequence {train.sequence} is {train.rows}: change one, or take precision = "
            '"bf16"'
        )


def _check_replicas(replicas: int, train: TrainSpec) -> None:
    """A replica has whole groups of microbatches."""
    if replicas <= train.groups:
        return
    if train.microbatches % replicas:
        raise ValueError(
            f"parallel.replicas {replicas} does not divide the {train.microbatches} microbatches of a step (batch / "
            f"microbatch); take replicas = {train.groups}, or a batch that is a multiple of "
            f"{train.microbatch * replicas}"
        )
    raise ValueError(
        f"parallel.replicas {replicas} is more than the {train.groups} groups of train.reduction_groups, of "
        f"which every replica has as many; take replicas = {train.groups}, or reduction_groups = {replicas} for a new "
        "run (it changes the bits)"
    )


class RunSpec(_Section):
    """A run. See the module's text for the two halves."""

    name: str = Field(pattern=NAME, description=RULES[NAME])
    model: ModelSpec
    data: DataSpec = DataSpec()
    train: TrainSpec
    parallel: ParallelSpec = ParallelSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    launch: LaunchSpec = LaunchSpec()
    recovery: RecoverySpec = RecoverySpec()

    @model_validator(mode="after")
    def _check(self) -> RunSpec:
        if self.parallel.stages > self.model.layers:
            raise ValueError(
                f"parallel.stages {self.parallel.stages} is more than model.layers {self.model.layers}; every stage "
                f"needs a layer: take at most {self.model.layers} stages"
            )
        if self.train.sequence > self.model.context:
            raise ValueError(
                f"train.sequence {self.train.sequence} is longer than model.context {self.model.context}; "
                "shorten the sequence or widen the context"
            )
        if (refusal := _device_refusal(self.parallel.device, self.launch.kernel_path)) is not None:
            raise ValueError(refusal)
        if self.train.precision == "fp8":
            _check_fp8(self.model, self.train)
        _check_replicas(self.parallel.replicas, self.train)
        ranks = self.parallel.ranks
        if ranks % self.launch.nodes:
            fits = max(n for n in range(1, min(self.launch.nodes, ranks) + 1) if not ranks % n)
            product = "stages * replicas" if self.parallel.chunks == 1 else "stages / chunks * replicas"
            raise ValueError(
                f"launch.nodes {self.launch.nodes} does not divide the {ranks} ranks ({product}); every node runs the "
                f"same number of ranks: take nodes = {fits}"
            )
        return self

    @model_validator(mode="after")
    def _check_layouts(self) -> RunSpec:
        """Each layout to go on with is one that the spec could have asked for."""
        if not (self.recovery.layouts or self.recovery.allowed_stages):
            return self
        tree = self.model_dump(mode="json")
        for number, how in enumerate(other_hows(how_map(self))):
            alone = {k: v for k, v in how["recovery"].items() if k not in ("layouts", "allowed_stages")}
            try:
                RunSpec.model_validate({**tree, **how, "recovery": alone})
            except ValidationError as error:
                why = "; ".join(str(e.get("ctx", {}).get("error", e["msg"])) for e in error.errors(include_url=False))
                raise ValueError(f"{other_name(self.recovery, number)} ({layout_words(how)}): {why}") from error
        return self

    @model_validator(mode="after")
    def _check_how(self) -> RunSpec:
        """Every attempt's record holds the How half: what a record cannot hold is refused here."""
        for key in OPEN_TREES:
            _check_tree(getattr(self.launch, key), f"launch.{key}")
        size = len(pack(how_map(self), RECORD_DEPTH))
        if size > MAX_HOW_BYTES:
            sizes = {key: len(pack(getattr(self.launch, key), RECORD_DEPTH)) for key in OPEN_TREES}
            largest = max(sizes, key=lambda key: sizes[key])
            raise ValueError(
                f"launch.{largest} has {sizes[largest]} bytes, and parallel, checkpoint, launch and recovery together "
                f"{size}; an attempt's record holds {MAX_HOW_BYTES} of them: shorten it (bulk belongs in a ConfigMap)"
            )
        return self

    def resolve(self, dataset: DatasetRef) -> RunSpec:
        """The spec with ``model.vocab`` filled from the dataset and ``train.reduction_groups`` from the batch; refuses
        data that do not fit. Idempotent."""
        problems: list[str] = []
        if self.model.vocab and self.model.vocab < dataset.vocab:
            problems.append(
                f"model.vocab {self.model.vocab} is smaller than the dataset's vocabulary {dataset.vocab}; set it to 0 "
                f"(the dataset's) or to at least {dataset.vocab}"
            )
        short = too_short(dataset.shards, self.train.sequence)
        if short is not None:
            problems.append(short)
        if problems:
            raise SpecError(problems)
        if self.model.vocab and self.train.reduction_groups:
            return self
        model = self.model.model_copy(update={"vocab": self.model.vocab or dataset.vocab})
        train = self.train.model_copy(update={"reduction_groups": self.train.groups})
        return self.model_copy(update={"model": model, "train": train})


def _device_refusal(device: Device, kernel_path: KernelPath) -> str | None:
    """Why kernels of this family do not run on this device; None where they do, or where the node decides."""
    needs = "cuda" if kernel_path in CUDA_PATHS else "cpu"
    if "auto" in (device, kernel_path) or device == needs:
        return None
    takes = f"'auto' or one of {', '.join(CUDA_PATHS)}" if device == "cuda" else "'auto'"
    return (
        f"launch.kernel_path {kernel_path!r} does not run on parallel.device {device!r}: take kernel_path {takes}, or "
        f"device {needs!r}"
    )


def too_short(shards: Sequence[int], sequence: int) -> str | None:
    """Why shards of so many tokens hold no sample of a sequence; None where one does."""
    longest = max(shards, default=0)
    if longest > sequence:
        return None
    if sum(shards) > sequence:
        return (
            f"train.sequence {sequence} needs a shard of {sequence + 1} tokens, the longest has {longest} of the "
            f"dataset's {sum(shards)}; raise data.shard_tokens"
        )
    return (
        f"train.sequence {sequence} needs a shard of {sequence + 1} tokens, the longest has {longest}: the whole "
        "corpus is shorter than one sequence; shorten the sequence or add text"
    )


def how_map(spec: RunSpec) -> dict[str, Any]:
    """The How half as plain values, for the attempt record."""
    return spec.model_dump(mode="json", include={"parallel", "checkpoint", "launch", "recovery"})


def other_name(recovery: RecoverySpec, number: int) -> str:
    """The key of the spec that gave the layout of this number."""
    if recovery.layouts:
        return f"recovery.layouts[{number}]"
    return f"recovery.allowed_stages {recovery.allowed_stages[number]}"


MAX_HOW_BYTES = 24 << 10
"""Of a record's 64 KiB; the rest is for why an attempt ended: a rank's last words have up to 16 KiB, twice."""
MAX_TREE_DEPTH = 20
OPEN_TREES = ("pod_patch", "tolerations", "resources", "agent_resources", "node_selector")
"""Keys of ``launch`` whose values are whatever Kubernetes takes."""


def _check_tree(value: Any, where: str) -> None:
    """Plain values of JSON, whole numbers of 64 bits, not too deep. ValueError otherwise, with the place."""
    level: list[tuple[str, Any]] = [(where, value)]
    for _ in range(MAX_TREE_DEPTH + 1):
        deeper: list[tuple[str, Any]] = []
        for name, item in level:
            if isinstance(item, Mapping):
                bad = next((key for key in item if not isinstance(key, str) or not _is_unicode(key)), None)
                if bad is not None:
                    raise ValueError(f"{name} has the key {shown(bad)}, which is not text in UTF-8; correct it")
                deeper += [(f"{name}.{key}", below) for key, below in item.items()]
            elif isinstance(item, list | tuple):
                deeper += [(f"{name}[{number}]", below) for number, below in enumerate(item)]
            elif isinstance(item, float) and not math.isfinite(item):
                raise ValueError(f"{name} {item} is not a finite number; write one, or text in quotes")
            elif isinstance(item, int) and not -(1 << 63) <= item < 1 << 63:
                raise ValueError(f"{name} {shown(item)} does not fit 64 bits; write it as text in quotes")
            elif not (item is None or isinstance(item, str | bool | int | float)):
                raise ValueError(f"{name} {shown(item)} is a {type(item).__name__}; write it as text in quotes")
            elif isinstance(item, str) and not _is_unicode(item):
                raise ValueError(f"{name} {shown(item)} is not text that can be written as UTF-8; correct it")
        if not deeper:
            return
        level = deeper
    raise ValueError(f"{level[0][0][:200]} is nested deeper than {MAX_TREE_DEPTH} levels; flatten it")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: Any) -> str:
    """A value as a refusal repeats it: not longer than a line or two."""
    if isinstance(value, int) and value.bit_length() > 400:
        return f"(a number of {value.bit_length()} bits)"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # it holds such a number, or is nested without end
        text = f"({type(value).__name__})"
    return text if len(text) <= 200 else f"{text[:150]}… ({len(text)} characters)"
