"""RunSpec, and the sections of its What half: model, train, and ``data`` in ``spec_data.py``. The How half is in
``spec_how.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from trainer import models
from trainer.dataset import DatasetRef
from trainer.errors import SpecError
from trainer.models.base import Tensor
from trainer.spec_data import DataSpec
from trainer.spec_fields import (
    MAX_INT32,
    MAX_LAYERS,
    NAME,
    RULES,
    Section,
    divisors,
    largest_two,
    power_of_two,
    shown,
    size,
)
from trainer.spec_hints import value_meant
from trainer.spec_how import (
    LATER,
    MAX_HOW_BYTES,
    OPEN_TREES,
    CheckpointSpec,
    LaunchSpec,
    ParallelSpec,
    RecoverySpec,
    check_tree,
    device_refusal,
    other_name,
)
from trainer.spec_layouts import layout_words, other_hows
from trainer.spec_watch import WATCHED, EvalSpec, LimitsSpec, TrackSpec, ValidationSpec
from trainer.wire import ATTENTION_HEAD_MAX, VOCAB_BLOCKS
from trainer.wire.packed import RECORD_DEPTH, pack

MAX_MICROBATCHES = 1 << 16
MAX_BETA, MAX_CLIP = 0.999999999, 1e30
"""What the engine's loader takes at most (``run/plan/tables.c``)."""
LEAST_FLOAT32 = 1e-37
"""The engine computes with float32, where less is 0 or has fewer digits, and 0 / 0 is no number."""
DEFAULT_GROUPS = 8
"""Of ``train.reduction_groups``, where the microbatches of a step allow it."""
FP8_SIDE = 16
MOMENTUM = 0.95
"""Of Muon, where it is unset."""
VOCAB_UNIT = 8
"""Blocks of a vocabulary begin at multiples of it, so that its rows keep their alignment."""

LATER_WHAT = {"model": ("init", "window")}
"""Keys of the What half that came when runs had names already: at their default they are no part of it."""
_INIT = r"(?s:hf:.+)|run:[a-z][-a-z0-9]*@\d{1,18}|(weights|state):[0-9a-f]{64}"
HOW_OF_WHAT = (("data", "cache_gib"),)
"""Keys of What sections that are no part of it: an attempt's record has them, and each attempt may have others."""

GUARD = ("train", "max_batch_tokens")
"""A key that refuses sizes and does nothing else: of neither half."""

Precision = Literal["fp32", "bf16", "fp8"]


class ModelSpec(Section):
    """The model: a family and its sizes (in elements, heads, tokens)."""

    family: str = Field(description="model family: a module of trainer/models (gpt2, llama, mistral, qwen3)")
    layers: int = size(high=MAX_LAYERS, text="transformer layers")
    width: int = size(high=1 << 20, text="size of the residual stream")
    heads: int = size(high=1 << 16, text="query heads")
    kv_heads: int | None = size(None, high=1 << 16, text="key/value heads (not gpt2); unset: as many as heads")
    head_size: int | None = size(None, high=ATTENTION_HEAD_MAX, text="elements of a head; unset: width / heads")
    hidden: int | None = size(
        None, high=1 << 22, text="width inside the MLP; unset: 4*width (gpt2), else 8/3*width rounded up to 64"
    )
    vocab: int = size(0, low=0, text="vocabulary; 0: that of the dataset")
    context: int = size(high=1 << 24, text="longest sequence that the model takes, in tokens")
    window: int = size(
        0,
        low=0,
        high=1 << 24,
        text="keys that a token reads at most, its own and those before it (mistral); 0: all",
    )
    norm_eps: float = Field(1e-5, ge=LEAST_FLOAT32, lt=1, description="added to the variance in norms")
    rope_base: float = Field(10_000.0, gt=1, description="base of the rotary angles (not gpt2)")
    tied: bool = Field(True, description="the head shares the token embedding's weights")
    init_std: float = Field(0.02, gt=0, lt=10, description="standard deviation of initial weights")
    init: str | None = Field(
        None,
        max_length=4096,
        description='where the weights come from: "hf:DIR", a folder in Hugging Face\'s form, or "run:ID@STEP", a '
        "checkpoint of a run (without its moments); unset: they are drawn from train.seed",
    )

    @model_validator(mode="after")
    def _check(self) -> ModelSpec:
        if self.family not in models.names():
            meant = value_meant(self.family, models.names())
            raise ValueError(f"family {shown(self.family)} is unknown; take one of {', '.join(models.names())}{meant}")
        if self.head_size is None and self.width % self.heads:
            below = max(h for h in range(1, self.heads + 1) if self.width % h == 0)
            raise ValueError(
                f"heads {self.heads} do not divide width {self.width}; take heads = {below} or a width that is a "
                f"multiple of {self.heads}"
            )
        if self.size_of_head > ATTENTION_HEAD_MAX:
            least = min(h for h in divisors(self.width) if self.width <= h * ATTENTION_HEAD_MAX)
            raise ValueError(
                f"heads {self.heads}: each has width / heads = {self.size_of_head} elements; attention takes at most "
                f"{ATTENTION_HEAD_MAX}: take heads = {least}"
            )
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads {self.kv_heads} do not divide heads {self.heads}; every key/value head serves the same "
                "number of query heads"
            )
        if self.window and not models.family(self.family).windows:
            able = [name for name in models.names() if models.family(name).windows]
            raise ValueError(
                f"window {self.window}: family {self.family} reads all that came before; leave window out, or take a "
                f"family that has windows ({', '.join(able)})"
            )
        models.family(self.family).check(self)
        if self.init is not None and not re.fullmatch(_INIT, self.init):
            raise ValueError(
                f"init {shown(self.init)} is unknown; take 'hf:DIR' (a folder with config.json and model.safetensors) "
                "or 'run:ID@STEP' (a checkpoint of a run)"
            )
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


class OptimizerSpec(Section):
    """AdamW, or Muon for the matrices inside the layers and AdamW for the rest. Decay applies to tensors of two and
    more dimensions."""

    name: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: matrices inside the layers step by their orthogonal momentum, the rest by AdamW"
    )
    lr: float = Field(3e-4, gt=0, le=10, description="peak learning rate")
    min_lr: float = Field(0.0, ge=0, le=10, description="floor of the learning rate")
    beta1: float = Field(0.9, ge=0, le=MAX_BETA)
    beta2: float = Field(0.95, ge=0, le=MAX_BETA)
    eps: float = Field(1e-8, ge=LEAST_FLOAT32, lt=1)
    weight_decay: float = Field(0.1, ge=0, le=10)
    clip: float = Field(1.0, ge=0, le=MAX_CLIP, description="limit of the global gradient norm; 0: off")
    momentum: float = Field(MOMENTUM, ge=0, lt=1, description="of muon, with Nesterov's step")

    @model_validator(mode="after")
    def _check(self) -> OptimizerSpec:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}; lower it")
        if self.name == "adamw" and self.momentum != MOMENTUM:
            raise ValueError(
                f"momentum {self.momentum} is muon's, and name is 'adamw', whose is beta1; leave it out, or take name "
                "= 'muon'"
            )
        return self

    def takes(self, tensor: Tensor) -> bool:
        """Whether it is Muon that takes a tensor."""
        return self.name == "muon" and tensor.hidden

    def kinds(self, tensor: Tensor) -> int:
        """What a state has of a tensor: master and moments."""
        return 2 if self.takes(tensor) else 3


class ScheduleSpec(Section):
    """Learning rate over steps."""

    kind: Literal["constant", "cosine", "wsd"] = Field("cosine", description="wsd: warm-up, stable, linear decay")
    warmup: int = size(0, low=0, text="steps of the linear warm-up")
    decay: int = size(
        0, low=0, text="steps of the final decay (wsd; 0: a fifth) or of the whole curve (cosine; 0: all)"
    )
    start: int = size(
        0,
        low=0,
        high=1 << 40,
        text="the step that the curve begins after: for a run that begins there, from another's checkpoint",
    )


class TrainSpec(Section):
    """How long and with which batches, precision and optimizer."""

    steps: int = size(high=1 << 40, text="optimizer steps of the run")
    batch: int = size(text="sequences a step")
    microbatch: int = size(high=1 << 20, text="sequences a microbatch")
    sequence: int = size(high=1 << 24, text="tokens a sequence")
    precision: Precision = Field(
        "fp32",
        description="of activations and weight matrices; masters are fp32. fp8: bf16, but the layers' products in FP8",
    )
    seed: int = size(0, low=0, high=(1 << 63) - 1, text="of initial weights and the order of samples")
    max_batch_tokens: int = size(0, low=0, high=1 << 62, text="most tokens that a step may have; 0: no limit")
    reduction_groups: int = size(
        0,
        low=0,
        text="groups of microbatches whose gradients join in a tree, a power of two: the most replicas that give the "
        "same bits; 0: 8, or the largest power of two below it that divides the step's microbatches",
    )
    vocab_blocks: int = size(
        1,
        high=VOCAB_BLOCKS,
        text="blocks of the vocabulary whose sums join in a tree, a power of two: the most stages that may share the "
        "head with the same bits",
    )
    classifier_chunk: int = size(64, text="rows of logits that exist at a time")
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()

    @model_validator(mode="after")
    def _check(self) -> TrainSpec:
        if self.batch % self.microbatch:
            best = max(d for d in divisors(self.batch) if d <= self.microbatch)
            raise ValueError(
                f"batch {self.batch} is not a multiple of microbatch {self.microbatch}; take microbatch = {best}"
            )
        if self.microbatches > MAX_MICROBATCHES:
            fits = min(d for d in divisors(self.batch) if self.batch // d <= MAX_MICROBATCHES)
            raise ValueError(
                f"batch {self.batch} is {self.microbatches} microbatches of {self.microbatch}; the limit is "
                f"{MAX_MICROBATCHES}, a plan lists each of them: take microbatch = {fits} or a smaller batch"
            )
        self._check_groups()
        if not power_of_two(self.vocab_blocks):
            below = 1 << (self.vocab_blocks.bit_length() - 1)
            raise ValueError(
                f"vocab_blocks {self.vocab_blocks} is no power of two; take vocab_blocks = {below}"
                + (f" or {2 * below}" if 2 * below <= VOCAB_BLOCKS else "")
            )
        own, told = self.steps, f"steps {self.steps}"
        if self.schedule.start:
            own, told = self.steps - self.schedule.start, f"the steps from {self.schedule.start} to {self.steps}"
        if own < 1:
            raise ValueError(f"schedule.start {self.schedule.start} is not before the last step {self.steps}; lower it")
        if self.schedule.warmup > own:
            raise ValueError(f"schedule.warmup {self.schedule.warmup} is more than {told}; lower it")
        if self.schedule.kind == "wsd" and self.schedule.warmup + self.schedule.decay > own:
            raise ValueError(
                f"schedule.warmup {self.schedule.warmup} and decay {self.schedule.decay} exceed {told}; shorten one"
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
        groups, most = self.reduction_groups, largest_two(self.microbatches)
        if not groups or (power_of_two(groups) and most % groups == 0):
            return
        why = "is no power of two"
        if power_of_two(groups):
            why = f"does not divide the step's {self.microbatches} microbatches (batch / microbatch)"
        fits = min(most, 1 << (groups.bit_length() - 1))
        more = "" if fits < most else f", or a batch that is a multiple of {self.microbatch * 2 * most}"
        raise ValueError(f"reduction_groups {groups} {why}; take reduction_groups = {fits}{more}")

    @property
    def groups(self) -> int:
        """``reduction_groups``, or what it is where it is unset."""
        return self.reduction_groups or min(DEFAULT_GROUPS, largest_two(self.microbatches))

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


def vocab_block(vocab: int, blocks: int) -> int:
    """Rows of a block of the vocabulary, but the last, which has what is left.

    >>> vocab_block(50257, 8)
    6288
    """
    return -(-vocab // (blocks * VOCAB_UNIT)) * VOCAB_UNIT


def _few_for_blocks(vocab: int, blocks: int) -> str | None:
    """Why a vocabulary cannot be cut into so many blocks; None where it can."""
    if (blocks - 1) * vocab_block(vocab, blocks) < vocab:
        return None
    fits = max(n for n in (1 << i for i in range(blocks.bit_length())) if (n - 1) * vocab_block(vocab, n) < vocab)
    return (
        f"train.vocab_blocks {blocks}: a vocabulary of {vocab} in blocks of multiples of {VOCAB_UNIT} has fewer; take "
        f"vocab_blocks = {fits}"
    )


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
    groups = f"{train.groups} group{'s' * (train.groups > 1)}"
    raise ValueError(
        f"parallel.replicas {replicas} is more than the {groups} of train.reduction_groups, of which every replica "
        f"has as many; take replicas = {train.groups}, or reduction_groups = {replicas} for a new "
        "run (it changes the bits)"
    )


class RunSpec(Section):
    """A run: What is trained, and How; ``spec.py`` tells the two halves apart."""

    name: str = Field(pattern=NAME, description=RULES[NAME])
    model: ModelSpec
    data: DataSpec = DataSpec()
    train: TrainSpec
    parallel: ParallelSpec = ParallelSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    launch: LaunchSpec = LaunchSpec()
    recovery: RecoverySpec = RecoverySpec()
    validation: ValidationSpec = ValidationSpec()
    eval: tuple[EvalSpec, ...] = Field(
        (), max_length=8, description="commands on exported checkpoints: tables [[eval]]"
    )
    track: TrackSpec = TrackSpec()
    limits: LimitsSpec = LimitsSpec()

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
        if (refusal := device_refusal(self.parallel.device, self.launch.kernel_path)) is not None:
            raise ValueError(refusal)
        if self.train.precision == "fp8":
            _check_fp8(self.model, self.train)
        _check_replicas(self.parallel.replicas, self.train)
        if self.parallel.vocab_stages > self.train.vocab_blocks:
            raise ValueError(
                f"parallel.vocab_stages {self.parallel.vocab_stages} is more than train.vocab_blocks "
                f"{self.train.vocab_blocks}, of which every rank that shares the head has as many; take vocab_stages = "
                f"{self.train.vocab_blocks}, or vocab_blocks = {self.parallel.vocab_stages} for a new run (it changes "
                "the bits)"
            )
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
                RunSpec.model_validate({**with_how(tree, how), "recovery": alone})
            except ValidationError as error:
                why = "; ".join(str(e.get("ctx", {}).get("error", e["msg"])) for e in error.errors(include_url=False))
                raise ValueError(f"{other_name(self.recovery, number)} ({layout_words(how)}): {why}") from error
        return self

    @model_validator(mode="after")
    def _check_how(self) -> RunSpec:
        """Every attempt's record holds the How half: what a record cannot hold is refused here."""
        for key in OPEN_TREES:
            check_tree(getattr(self.launch, key), f"launch.{key}")
        held = len(pack(how_map(self), RECORD_DEPTH))
        if held > MAX_HOW_BYTES:
            sizes = {f"launch.{key}": len(pack(getattr(self.launch, key), RECORD_DEPTH)) for key in OPEN_TREES}
            sizes["eval"] = len(pack([e.model_dump(mode="json") for e in self.eval], RECORD_DEPTH))
            largest = max(sizes, key=lambda key: sizes[key])
            bulk = "a script" if largest == "eval" else "a ConfigMap"
            raise ValueError(
                f"{largest} has {sizes[largest]} bytes, and parallel, checkpoint, launch and recovery together "
                f"{held}; an attempt's record holds {MAX_HOW_BYTES} of them: shorten it (bulk belongs in {bulk})"
            )
        return self

    @model_validator(mode="after")
    def _check_validation(self) -> RunSpec:
        made = self.data.source.startswith("dataset:")  # it may have a validation part, or not: its store knows
        if self.validation.every and not (self.validation.source or self.data.validation or made):
            raise ValueError(
                "validation.every is set, and there is nothing to validate on: set data.validation (a share of the "
                "corpus, which is split off), or validation.source, such as text:held-out/*.txt"
            )
        return self

    @model_validator(mode="after")
    def _check_eval(self) -> RunSpec:
        names = [e.name for e in self.eval]
        again = next((name for name in names if names.count(name) > 1 or name == "validation"), None)
        if again is not None:
            raise ValueError(
                f"eval has the name {again!r} "
                + ("twice" if again != "validation" else "which is that of [validation]")
                + "; results are found by name: give each [[eval]] its own"
            )
        return self

    def resolve(self, dataset: DatasetRef) -> RunSpec:
        """The spec with ``model.vocab`` and ``data.packing`` from the dataset and ``train.reduction_groups`` from the
        batch; refuses data that do not fit. Idempotent."""
        problems: list[str] = []
        if self.model.vocab and self.model.vocab < dataset.vocab:
            problems.append(
                f"model.vocab {self.model.vocab} is smaller than the dataset's vocabulary {dataset.vocab}; set it to 0 "
                f"(the dataset's) or to at least {dataset.vocab}"
            )
        few = _few_for_blocks(self.model.vocab or dataset.vocab, self.train.vocab_blocks)
        if few is not None and not problems:
            problems.append(few)
        for number, shards in enumerate(dataset.parts):
            short = too_short(shards, self.train.sequence)
            if short is not None:
                problems.append(short if dataset.mix is None else f"data.mix[{number}]: {short}")
        if self.data.packing == "within" and dataset.eot is None:
            problems.append(
                'data.packing "within" keeps attention within a document, and these data were prepared without a token '
                'that ends one: prepare them with one (data.end_token), or take packing = "across"'
            )
        if problems:
            raise SpecError(problems)
        if self.model.vocab and self.train.reduction_groups and self.data.packing:
            return self
        model = self.model.model_copy(update={"vocab": self.model.vocab or dataset.vocab})
        train = self.train.model_copy(update={"reduction_groups": self.train.groups})
        data = self.data.model_copy(update={"packing": self.data.packing_of(dataset.eot)})
        return self.model_copy(update={"model": model, "data": data, "train": train})


def with_how(what: Mapping[str, Any], how: Mapping[str, Any]) -> dict[str, Any]:
    """A spec's plain values, of the sections of a What and of a How (``how_map``)."""
    bare = {section: dict(value) if isinstance(value, Mapping) else value for section, value in what.items()}
    for section, key in HOW_OF_WHAT:
        bare.get(section, {}).pop(key, None)
    said = {section: how[section] for section, _ in HOW_OF_WHAT if isinstance(how.get(section), Mapping)}
    return {**bare, **how, **{section: {**bare.get(section, {}), **value} for section, value in said.items()}}


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
    """The How half as plain values, for the attempt record; with what a section of the What says that is none of it
    (``HOW_OF_WHAT``), where it says something.
    """
    how = spec.model_dump(mode="json", include={"parallel", "checkpoint", "launch", "recovery"})
    for section, key in HOW_OF_WHAT:
        if value := getattr(getattr(spec, section), key):
            how.setdefault(section, {})[key] = value
    for section, keys in LATER.items():
        fields = type(getattr(spec, section)).model_fields
        for key in keys:
            if getattr(getattr(spec, section), key) == fields[key].default:
                del how[section][key]
    watched = (name for name in WATCHED if getattr(spec, name) != RunSpec.model_fields[name].default)
    told = spec.model_dump(mode="json", include=set(watched))
    if spec.validation.messages is None:
        told.get("validation", {}).pop("messages", None)  # it came later, too
    return how | told
