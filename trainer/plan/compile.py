"""RunSpec to Plan: the passes in order, nothing else. The same input gives the same plan, byte for byte.

Pure, but for a schedule that the spec names as a file.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Literal

from trainer import models, wire
from trainer.cores import usable_cpus
from trainer.dataset import DatasetRef
from trainer.errors import PlanError
from trainer.models.base import Call, Weight, tensor_table
from trainer.plan import schedule_file, steady
from trainer.plan.compiled import Plan
from trainer.plan.delays import with_delays
from trainer.plan.expand import StagePrograms, expand_stage
from trainer.plan.flops import call_cost, kernel_flops, model_flops
from trainer.plan.head import expand_part
from trainer.plan.head_rows import HeadParts
from trainer.plan.job import Job
from trainer.plan.layout import split_layers, split_with
from trainer.plan.lower import lower
from trainer.plan.memory import check_budget, more_threads_bytes
from trainer.plan.places import Layout, Pipeline, Stage
from trainer.plan.records import Config
from trainer.plan.rows import Row, split_stages
from trainer.plan.schedules import TIMED, pipeline_for, rows_for
from trainer.plan.simulate import from_plan, simulate
from trainer.spec import ModelSpec, RunSpec
from trainer.spec_how import SHARES_HEAD, CheckpointSpec, ParallelSpec, RecomputeSpec
from trainer.spec_sections import TrainSpec

_LR = {"constant": wire.LR_CONSTANT, "cosine": wire.LR_COSINE, "wsd": wire.LR_WSD}
FIRST_IS_LAST = ("1f1b", "gpipe", "interleaved-1f1b")
"""Schedules whose first position starts first and ends last: no next step can begin sooner, whatever is foreseen."""
TICKS = 24
"""Of F, I and W of a mean stage together, where a schedule is made for their times."""
MARGIN = 0.01
"""What sharing the head among more ranks must gain of a step's time to be chosen."""
WSD_DECAY_SHARE = 5
"""A warmup-stable-decay schedule whose decay is 0 in the spec decays over a fifth of the steps."""


def compile_plan(
    spec: RunSpec,
    dataset: DatasetRef,
    what_digest: bytes,
    mode: Literal["train", "infer", "losses"] = "train",
    pipeline: Pipeline | None = None,
    delays: Mapping[str, float] | None = None,
) -> Plan:
    """The plan of a resolved spec (``spec.resolve(dataset)``). PlanError where none can be made or none fits.

    Time and memory are in proportion to the actions of the step lists: about 35 bytes an action while the plan is made,
    and 48 in its file.

    ``pipeline``: where the stages are; None: as the schedule or its file places them.

    ``delays``: seconds by operation (F, I, W, B) that its programs sleep at their end: to measure schedules.

    Mode "infer": one position, one sequence of ``train.sequence`` tokens a request, forward only, logits out;
    "losses": the same, targets too, losses out.
    """
    if not spec.model.vocab:
        raise PlanError("model.vocab is 0: call spec.resolve(dataset) before compile_plan")
    if len(what_digest) != 32:
        raise PlanError(f"what_digest has {len(what_digest)} bytes; it is a SHA-256 of 32")
    infer, losses = mode != "train", mode == "losses"
    if infer:
        train = spec.train.model_copy(update={"batch": 1, "microbatch": 1, "reduction_groups": 1})
        alone = {"stages": 1, "chunks": 1, "schedule": "1f1b", "replicas": 1, "vocab_stages": 1}
        parallel = spec.parallel.model_copy(update=alone)
        spec = spec.model_copy(update={"train": train, "parallel": parallel})
    with _uncollected():
        rows, pipeline = _placed(spec, pipeline, delays)
        tensors = tensor_table(models.family(spec.model.family), spec.model)
        shards = () if infer else dataset.shards

        def sharing(count: int) -> Plan:
            """With so many positions that share the head."""
            parts = HeadParts.of(count, pipeline) if count > 1 else None
            stages = expand(spec, infer, split_stages(rows), losses, parts, pipeline, document_end(spec, dataset))
            layout = Layout(tuple(stage.layers for stage in stages if stage.layers), pipeline)
            job = Job(spec, tensors, stages, layout, infer, losses, tuple(rows), parts=parts)

            def plan(optimistic: bool) -> Plan:
                positions, channels, schedule = lower(replace(job, optimistic=optimistic))
                if delays:
                    positions = with_delays(positions, delays)
                config, mix = _config(job, dataset, what_digest), None if infer else dataset.mix
                return Plan(config, tensors, shards, positions, channels, schedule, mix)

            if infer:
                return plan(False)
            return _chosen(spec, pipeline, plan, dataset.masked) if parts is None else _fitting(spec, plan(False))

        if infer or spec.parallel.vocab_stages:
            return sharing(spec.parallel.vocab_stages or 1)
        return _quickest(spec, [partial(sharing, count) for count in head_shares(spec.train, spec.parallel)])


def head_shares(train: TrainSpec, parallel: ParallelSpec) -> list[int]:
    """How many ranks of a replica may share the head, where the spec leaves it open.

    >>> head_shares(TrainSpec(steps=1, batch=1, microbatch=1, sequence=1, vocab_blocks=8), ParallelSpec(stages=6))
    [1, 2, 4]
    """
    most = min(train.vocab_blocks, parallel.positions(parallel.stages))
    if parallel.schedule not in SHARES_HEAD or parallel.optimizer == "optimistic":
        most = 1
    return [1 << n for n in range(most.bit_length())]


def _quickest(spec: RunSpec, ways: Sequence[Callable[[], Plan]]) -> Plan:
    """Of the plans that fit, the one whose step takes least; a later one must gain MARGIN. PlanError: none fits."""
    cost = steady.CUDA if spec.parallel.on_cuda(spec.launch.kernel_path) else steady.CPU
    best: tuple[float, Plan] | None = None
    refused: PlanError | None = None
    for way in ways:
        try:
            plan = way()
        except PlanError as error:
            refused = refused or error
            continue
        if len(ways) == 1:
            return plan
        seconds = simulate(from_plan(plan, cost), cost).step_seconds
        if best is None or seconds < best[0] * (1 - MARGIN):
            best = seconds, plan
    if best is None:
        assert refused is not None
        raise refused
    return best[1]


def _chosen(spec: RunSpec, pipeline: Pipeline, plan: Callable[[bool], Plan], masked: bool) -> Plan:
    """The plan with the spec's optimizer, checked or optimistic, if it fits; auto: the quicker of the two that do.
    ``masked``: how many tokens count is known at a step's end, so that nothing can be foreseen.
    """
    parallel = spec.parallel
    if parallel.optimizer != "auto" or masked or pipeline.positions == 1 or parallel.schedule in FIRST_IS_LAST:
        return _fitting(spec, plan(parallel.optimizer == "optimistic"))
    checked = _fitting(spec, plan(False))
    cost = steady.CUDA if parallel.on_cuda(spec.launch.kernel_path) else steady.CPU
    try:
        optimistic = _fitting(spec, plan(True))
    except PlanError:
        return checked  # it alone fits
    return optimistic if steady.quicker(checked, optimistic, cost) else checked


def _fitting(spec: RunSpec, plan: Plan) -> Plan:
    """PlanError where it is too large."""
    # on a cluster nobody knows the machines yet: what they have more, the engine fits into their limit
    on_cuda = spec.parallel.on_cuda(spec.launch.kernel_path)
    more = more_threads_bytes(spec, usable_cpus()) if spec.launch.target == "local" and not on_cuda else 0
    budget = int(spec.launch.memory_gib * (1 << 30))
    check_budget(plan.positions, spec.launch.nodes, budget, more, spec.parallel.replicas, on_cuda=on_cuda)
    return plan


def _placed(spec: RunSpec, pipeline: Pipeline | None, delays: Mapping[str, float] | None) -> tuple[list[Row], Pipeline]:
    """What is computed, by position, and where the spec's stages are."""
    parallel, microbatches = spec.parallel, spec.train.microbatches // spec.parallel.replicas
    positions = parallel.positions(parallel.stages)
    if pipeline is None and parallel.schedule.startswith(schedule_file.PREFIX):
        return schedule_file.load(parallel.schedule, parallel.stages, positions, microbatches)
    if pipeline is None:
        pipeline = pipeline_for(parallel.schedule, parallel.stages, positions)
    for position, stages in enumerate(pipeline.chunks):
        if not stages:
            raise PlanError(f"position {position} holds no stage; take as many positions as hold one")
    times = None
    if parallel.schedule in TIMED:
        lasts = [delays.get(op, 0.0) for op in "FIW"] if delays else []
        times = _ticks([lasts] * parallel.stages) if all(lasts) and lasts else _stage_times(spec)
    return rows_for(parallel.schedule, pipeline, microbatches, times), pipeline


def _stage_times(spec: RunSpec) -> list[tuple[int, int, int]]:
    """What F, I and W of each stage last, by their operations."""
    count = spec.parallel.stages
    stages = expand(spec, split=[Stage(number) for number in range(count)])
    done = [
        [sum(kernel_flops(c.kernel, c.dim).done for c in calls) for calls in stage.programs("FIW").values()]
        for stage in stages
    ]
    return _ticks(done)


def _ticks(lasts: Sequence[Sequence[float]]) -> list[tuple[int, int, int]]:
    """The times of F, I and W by stage as whole numbers."""
    unit = sum(map(sum, lasts)) / (TICKS * len(lasts))
    return [(max(1, round(f / unit)), max(1, round(i / unit)), max(1, round(w / unit))) for f, i, w in lasts]


@contextmanager
def _uncollected() -> Iterator[None]:
    """A plan holds no cycles, and the collector would walk it again and again while it grows (a tenth of the time)."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def document_end(spec: RunSpec, dataset: DatasetRef) -> int | None:
    """The token that ends a document, where attention stays within one. PlanError: the dataset has none."""
    if spec.data.packing_of(dataset.eot) == "across":
        return None
    if dataset.eot is None:
        raise PlanError('data.packing is "within", and the dataset has no end token: call spec.resolve(dataset)')
    return dataset.eot


def flops_per_token(model: ModelSpec, sequence: int) -> float:
    """Training operations of a token, forward and backward, as MFU counts them: products of the mathematics. A window
    is counted as it is, documents that are apart as if they were one."""
    family = models.family(model.family)
    whole = expand_stage(family, model, tensor_table(family, model), range(model.layers), 1, sequence, 1, 1.0, True)
    return model_flops(whole.forward) / sequence


def expand(
    spec: RunSpec,
    infer: bool = False,
    split: Collection[Stage] = frozenset(),
    losses: bool = False,
    parts: HeadParts | None = None,
    pipeline: Pipeline | None = None,
    end: int | None = None,
) -> tuple[StagePrograms, ...]:
    """The stages of a resolved spec: layers laid out by cost, then expanded; ``split``: those with programs I and W;
    ``losses``: what inference ends with. ``parts`` of the head, of a ``pipeline``, are stages behind them. ``end``: as
    `expand_stage` has it.
    """
    family, train = models.family(spec.model.family), spec.train
    tensors = {tensor.name: tensor for tensor in tensor_table(family, spec.model)}

    def stage(layers: range, forward_only: bool, number: Stage | None = None) -> StagePrograms:
        again = spec.parallel.recompute
        return expand_stage(
            family,
            spec.model,
            tensors,
            layers,
            train.microbatch,
            train.sequence,
            train.classifier_chunk,
            1.0 / train.tokens,
            infer=forward_only,
            fp8=train.precision == "fp8",
            split=number in split,
            recompute=again.kind,
            again=0 if forward_only else _again(again, number, len(layers), number in split),
            blocks=train.vocab_blocks,
            losses=losses and number is not None,
            parts=1 if parts is None else len(parts.positions),
            end=end,
            once=train.microbatches == 1,
        )

    whole = stage(range(spec.model.layers), True)
    costs, head = _costs(whole.forward, spec.model.layers)
    if spec.parallel.recompute.of_stage(0) is None:  # every layer; else which ones depends on the split
        again = sum(call_cost(call, alone=True) for call in stage(range(1), False).backward if call.part == "R")
        costs = [cost + cost * again // costs[0] for cost in costs]
    if parts is None or pipeline is None:
        ranges = split_layers(costs, head, spec.parallel.stages)
    else:
        each = [head // len(parts.positions) if parts.at(p) is not None else 0 for p in pipeline.of_stage]
        ranges = split_with(costs, [e // len(pipeline.chunks[p]) for e, p in zip(each, pipeline.of_stage, strict=True)])
    stages = ((Stage(number), layers) for number, layers in enumerate(ranges))
    found = [replace(stage(layers, infer, number), index=number) for number, layers in stages]
    if parts is not None:
        matrix = next(p for p in whole.forward[-1].ptr if isinstance(p, Weight)).tensor
        sizes = (train.rows, train.classifier_chunk, 1.0 / train.tokens, train.vocab_blocks, len(parts.positions))
        numbers = range(len(parts.positions))
        found += [expand_part(spec.model, matrix, *sizes, part, parts.stage(part)) for part in numbers]
    return tuple(found)


def _costs(calls: Sequence[Call], layers: int) -> tuple[list[int], int]:
    """Of each layer, and of what is in none."""
    costs, head = [0] * layers, 0
    for call in calls:
        if call.layer is None:
            head += call_cost(call)
        else:
            costs[call.layer] += call_cost(call)
    return costs, head


def _again(recompute: RecomputeSpec, stage: Stage | None, layers: int, split: bool) -> int:
    """How many layers of a stage compute again; None: of one that is but looked at."""
    count = None if stage is None else recompute.of_stage(stage)
    if split and recompute.kind != "none" and (count is None or count == layers):
        raise PlanError(
            f"parallel.recompute: every layer of stage {stage} (it has {layers}) is to be computed again, and its "
            "schedule puts weight gradients off (W), which is for layers that keep what they made: nothing would be "
            f"left for W; let at most {layers - 1} compute again there (parallel.recompute.layers), or take a schedule "
            "of whole backwards"
        )
    if count is not None and count > layers:
        raise PlanError(
            f"parallel.recompute.layers: {count} layers of stage {stage} are to be computed again, it has {layers}; "
            f"take at most {layers} there"
        )
    return layers if count is None else count


def _persist_every(spec: CheckpointSpec) -> int:
    """As the plan has it: 0 where every snapshot goes to the store, which plans have always said."""
    return 0 if spec.in_store == spec.in_memory else spec.in_store or wire.PERSIST_LAST


def _config(job: Job, dataset: DatasetRef, what_digest: bytes) -> Config:
    spec, train, infer = job.spec, job.spec.train, job.infer
    o, s = train.optimizer, train.schedule
    decay = s.decay
    if not decay and s.kind == "cosine":
        decay = train.steps - s.start
    if not decay and s.kind == "wsd":
        own = train.steps - s.start
        decay = max(1, min(own // WSD_DECAY_SHARE, own - s.warmup))
    return Config(
        mode=wire.MODE_INFER if infer else wire.MODE_TRAIN,
        dtype=job.plan_dtype,
        positions=job.layout.pipeline.positions,
        replicas=spec.parallel.replicas,
        microbatches=job.groups.microbatches,
        microbatch=train.microbatch,
        sequence=train.sequence,
        vocab=spec.model.vocab,
        token_bytes=dataset.token_bytes,
        steps=0 if infer else train.steps,
        seed=train.seed,
        lr=o.lr,
        min_lr=o.min_lr,
        warmup_steps=s.warmup,
        decay_steps=decay,
        lr_schedule=_LR[s.kind],
        threads=spec.parallel.threads,
        clip=o.clip,
        beta1=o.beta1,
        beta2=o.beta2,
        checkpoint_every=spec.checkpoint.in_memory,
        persist_every=_persist_every(spec.checkpoint),
        lr_start=0 if infer else s.start,
        slots=0 if infer else spec.checkpoint.slots,
        data_shuffled=spec.data.shuffled,
        data_samples=0 if infer else dataset.samples(train.sequence),
        data_block=spec.data.block,
        data_window=spec.data.window,
        dataset_digest=bytes.fromhex(dataset.digest),
        what_digest=what_digest,
        reduction_groups=train.groups,
        numerics_version=wire.NUMERICS_F32 if job.plan_dtype == wire.F32 else wire.NUMERICS_VERSION,
    )
