"""How a run goes, the half of its spec that never changes the bits: parallel, checkpoint, launch, recovery."""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, StrictInt, model_validator

from trainer.spec_fields import DNS_LABEL, MAX_LAYERS, Quantities, Section, power_of_two, shown, size
from trainer.spec_hints import value_meant
from trainer.wire import CUDA_PATHS, VOCAB_BLOCKS

KernelPath = Literal["auto", "ref", "portable", "avx2", "avx512", "cuda-exact", "cuda", "avx512_bf16", "neon"]
"""Families of kernels, in the order of their numbers (``wire.PATHS``); ``wire.CUDA_PATHS`` run on CUDA devices."""
Device = Literal["auto", "cpu", "cuda"]

RETIRED = {"recovery": ("max_rollbacks",)}
"""Keys that never had an effect and are gone. Specs, logs and Prefect's deployments that hold them are read."""
LATER = {
    "checkpoint": ("bandwidth_mb_s", "keep", "snapshot_every", "persist_every"),
    "recovery": ("replay_every", "on_divergence", "on_explosion", "max_skips"),
    "parallel": ("vocab_stages",),
    "launch": ("labels", "annotations"),
}
"""Keys that came when runs had records already. Where they are at their default a How is written without them, so that
it has the bytes that an older version gives it, and can be read by one (``spec.how_map``).
"""
MAX_HOW_BYTES = 24 << 10
"""Of a record's 64 KiB; the rest is for why an attempt ended: a rank's last words have up to 16 KiB, twice."""
MAX_TREE_DEPTH = 20
OPEN_TREES = ("pod_patch", "tolerations", "resources", "agent_resources", "node_selector", "labels", "annotations")
"""Keys of ``launch`` whose values are whatever Kubernetes takes."""

SCHEDULES = ("1f1b", "gpipe", "interleaved-1f1b", "zb-h1", "zb-v", "v-half")
ONE_STAGE = {"1f1b": "interleaved-1f1b", "zb-h1": "zb-v"}
"""Schedules that take one stage a rank; each with one that takes several."""
THERE_AND_BACK = ("zb-v", "v-half")
"""Schedules that take two stages a rank, there and back along the ranks."""
SHARES_HEAD = ("1f1b", "gpipe", "interleaved-1f1b", "zb-h1", "zb-v")
"""Schedules whose ranks may share the head (``parallel.vocab_stages``)."""

RecomputeKind = Literal["none", "elementwise", "attention", "layer"]


class RecomputeSpec(Section):
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
            said = counts[0] if isinstance(self.layers, int) else list(counts)
            raise ValueError(f"layers {said}: each must be from 0 to {MAX_LAYERS}; correct it")
        return self

    def of_stage(self, stage: int) -> int | None:
        """How many layers of a stage; None: all of them."""
        if self.kind == "none":
            return 0
        return self.layers[stage] if isinstance(self.layers, tuple) else self.layers


class ParallelSpec(Section):
    """How the work is split. Never changes the bits."""

    stages: int = size(1, high=4096, text="pipeline stages")
    chunks: int = size(1, high=4096, text="stages of a rank, at most; 2 for zb-v and v-half")
    schedule: str = Field(
        "1f1b",
        max_length=4096,
        description='"1f1b", "gpipe", "interleaved-1f1b", "zb-h1", "zb-v", "v-half" (docs/schedules.md), or '
        '"file:PATH" of a CSV as PyTorch\'s pipelining writes it',
    )
    replicas: int = size(
        1,
        high=4096,
        text="data-parallel replicas, a power of two, at most train.reduction_groups; they share the batch",
    )
    vocab_stages: int = size(
        0,
        low=0,
        high=VOCAB_BLOCKS,
        text="ranks of a replica that share the head, a power of two, at most train.vocab_blocks; 0: as many as the "
        "cost model says",
    )
    recompute: RecomputeSpec = RecomputeSpec()
    optimizer: Literal["auto", "checked", "optimistic"] = Field(
        "auto",
        description="checked: a step ends when all know that it is finite, and how it is clipped; optimistic: the next "
        "one begins meanwhile; auto: what the cost model says is quicker",
    )
    threads: int = size(0, low=0, high=1024, text="threads a rank; 0: its share of the node's cores")
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
            raise ValueError(
                f"schedule {shown(self.schedule)} is unknown; take one of {names}"
                + value_meant(self.schedule, SCHEDULES)
            )
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
        if self.schedule in THERE_AND_BACK and (self.chunks != 2 or self.stages % 2):
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
        self._check_vocab_stages()
        if not power_of_two(self.replicas):
            below = 1 << (self.replicas.bit_length() - 1)
            raise ValueError(f"replicas {self.replicas} is no power of two; take replicas = {below} or {2 * below}")
        return self

    def _check_vocab_stages(self) -> None:
        count, positions = self.vocab_stages, self.positions(self.stages)
        if count <= 1:
            return
        most = 1 << (min(count, positions).bit_length() - 1)
        if not power_of_two(count) or count > positions:
            why = f"is more than the {positions} ranks of a replica" if power_of_two(count) else "is no power of two"
            raise ValueError(f"vocab_stages {count} {why}; take vocab_stages = {most}")
        if self.schedule not in SHARES_HEAD:
            raise ValueError(
                f"vocab_stages {count}: schedule {shown(self.schedule)} has no place for parts of the head yet; take "
                f"vocab_stages = 1, or one of {', '.join(SHARES_HEAD)}"
            )
        if self.optimizer == "optimistic":
            raise ValueError(
                f'vocab_stages {count} with optimizer "optimistic": where ranks share the head no step begins before '
                'the one before is checked; take optimizer = "checked" or "auto", or vocab_stages = 1'
            )


KEEP_ALL = "all"


class KeepSpec(Section):
    """Which checkpoints stay: those that one of these rules names, and pinned ones (checkpoint/collect/)."""

    last: int = size(2, low=2, high=1 << 20, text="the newest so many")
    every_steps: int = size(0, low=0, high=1 << 40, text="the first of every so many steps; 0: no such rule")
    every_s: float = Field(0.0, ge=0, le=1e9, description="the first of every so many seconds; 0: no such rule")
    best: int = size(
        0,
        low=0,
        high=1 << 20,
        text="so many of the least validation loss; without [validation] of the training loss, averaged since the "
        "checkpoint before; 0: no such rule",
    )
    grace_s: float = Field(
        3600.0, ge=0, le=2_592_000, description="from when a checkpoint is given up to when its objects are deleted"
    )


class CheckpointSpec(Section):
    """When state is saved and how long saving may take."""

    @model_validator(mode="before")
    @classmethod
    def _all(cls, value: Any) -> Any:
        keeps_all = isinstance(value, Mapping) and value.get("keep") == KEEP_ALL
        return {**value, "keep": None} if keeps_all else value

    every: int = size(
        100,
        low=0,
        high=1 << 40,
        text="steps between snapshots, each of them stored; 0: only after the last step. Short for the next two",
    )
    snapshot_every: int | None = size(
        None, low=0, high=1 << 40, text="steps between snapshots in memory; 0: only after the last step; unset: every"
    )
    persist_every: int | None = size(
        None,
        low=0,
        high=1 << 40,
        text="steps between snapshots that go to the store, a multiple of snapshot_every; 0: only the last one; "
        "unset: every",
    )
    slots: int = size(3, low=2, high=16, text="snapshot slots of a rank in memory")
    deadline_s: float = Field(600.0, gt=0, le=86_400, description="of a checkpoint, from its first byte to its commit")
    bandwidth_mb_s: float = Field(
        0.0, ge=0, le=1e6, description="most that a node's checkpoints take of its network, MB/s; 0: no cap"
    )
    commit_s: float = Field(120.0, gt=0, le=86_400, description="wait of the last step for its commit")
    keep: KeepSpec | None = Field(None, description='which checkpoints stay; unset or "all": all of them')

    @property
    def in_memory(self) -> int:
        """Steps between snapshots; 0: only after the last."""
        return self.every if self.snapshot_every is None else self.snapshot_every

    @property
    def in_store(self) -> int:
        """Steps between those of them that go to the store; 0: only the last."""
        return self.every if self.persist_every is None else self.persist_every

    @model_validator(mode="after")
    def _check(self) -> CheckpointSpec:
        memory, store = self.in_memory, self.in_store
        if not store or (memory and store % memory == 0):
            return self
        name = "persist_every" if self.persist_every is not None else "every"
        if not memory:
            raise ValueError(
                f"{name} {store} with snapshot_every 0: what is stored is a snapshot in memory first; take "
                f"snapshot_every = {store}, or persist_every = 0"
            )
        raise ValueError(
            f"{name} {store} is no multiple of snapshot_every {memory}: what is stored is one of these snapshots; take "
            f"persist_every = {max(1, round(store / memory)) * memory}"
        )


class LaunchSpec(Section):
    """Where the ranks run."""

    target: Literal["local", "kubernetes"] = "local"
    nodes: int = size(1, high=4096, text="nodes (local: groups of processes; kubernetes: pods)")
    kernel_path: KernelPath = "auto"
    memory_gib: float = Field(
        0.0, ge=0, le=1 << 20, description="memory budget of a node; a plan above it is refused; 0: none"
    )
    connect_s: float = Field(60.0, gt=0, le=3600, description="deadline for all ranks to find each other")
    stall_s: float = Field(120.0, gt=0, le=86_400, description="deadline of every wait inside a step")
    trace: bool = Field(False, description="record the time of every instruction")
    host: str = Field("127.0.0.1", min_length=1, max_length=63, description="IP address that local ranks listen on")
    port_base: int = size(0, low=0, high=65_000, text="first port of the ranks; 0: any free ones, in pods 7400 and on")
    namespace: str = Field("default", pattern=DNS_LABEL, description="kubernetes")
    image: str = Field("", description="kubernetes: image of the engine; unset: this version's")
    agent_image: str = Field("", description="kubernetes: image of the agent, another one; unset: this version's")
    service_account: str = Field("", description="kubernetes: service account of the pods; unset: the default one")
    resources: Quantities = Field(default_factory=dict, description="kubernetes: of the engine, e.g. cpu, memory")
    agent_resources: Quantities = Field(default_factory=dict, description="kubernetes: of the agent")
    store_secret: str = Field("", description="kubernetes: Secret with the store's credentials, for the agent only")
    labels: dict[str, str] = Field(default_factory=dict, description="kubernetes: labels of the pods and all objects")
    annotations: dict[str, str] = Field(default_factory=dict, description="kubernetes: annotations of pods and Job")
    pod_patch: dict[str, Any] = Field(default_factory=dict, description="kubernetes: strategic-merge patch of the pod")
    fabric: Literal["tcp", "infiniband", "roce", "efa", "nvl72"] = "tcp"
    queue: str = Field("", max_length=63, description="kubernetes: Kueue's queue; the Job then waits to be admitted")
    runtime_class: str = Field("", max_length=253, description="kubernetes: RuntimeClass of the pods, e.g. nvidia")
    priority_class: str = Field("", max_length=253, description="kubernetes: PriorityClass of the pods")
    node_selector: dict[str, str] = Field(default_factory=dict, description="kubernetes: labels of the machines to use")
    tolerations: list[dict[str, Any]] = Field(default_factory=list, description="kubernetes: taints that are borne")
    toleration_s: int = size(30, low=0, high=86_400, text="kubernetes: seconds until a silent machine's pods are lost")
    spread: str = Field(
        "kubernetes.io/hostname", description="kubernetes: topology that pods are spread over; empty: they are not"
    )

    @model_validator(mode="after")
    def _check(self) -> LaunchSpec:
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            raise ValueError(
                f"host {shown(self.host)} is no address, and ranks do not listen on a name: write one of this "
                "machine's, such as 127.0.0.1 or ::1"
            ) from None
        return self


class OtherLayout(Section):
    """How a run goes on where there is no room for it as it was asked for; a key that is left out stays as it is."""

    nodes: int | None = size(None, high=4096, text="nodes; unset: as many as the ranks fill")
    stages: int | None = size(None, high=4096, text="pipeline stages")
    replicas: int | None = size(None, text="data-parallel replicas")
    chunks: int | None = size(None, high=4096, text="stages of a rank, at most")
    schedule: str | None = Field(None, max_length=4096, description="as parallel.schedule")


class RecoverySpec(Section):
    """What the driver does after a failure."""

    @model_validator(mode="before")
    @classmethod
    def _without_retired(cls, value: Any) -> Any:
        gone = RETIRED["recovery"]
        return {k: v for k, v in value.items() if k not in gone} if isinstance(value, Mapping) else value

    max_same_step: int = size(2, high=100, text="crashes at the same step before it gives up")
    on_divergence: Literal["stop", "skip"] = Field(
        "stop",
        description="where numbers are not finite at the same step for the second time. stop: it gives up; skip: it "
        "goes back to the newest checkpoint and passes over the batches from there to that step",
    )
    on_explosion: Literal["warn", "skip", "lower", "stop"] = Field(
        "warn",
        description="where the loss stays far above what is usual for the run (docs/watch.md). warn: it is told, as "
        "always; skip: the run goes back to the newest checkpoint before that and passes over the batches from there; "
        "lower: it goes back and trains on at half the rate; stop: it gives up",
    )
    max_skips: int = size(
        3, high=100, text="times that on_divergence and on_explosion may do so before the run gives up"
    )
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
    replay_every: int = size(
        0,
        low=0,
        high=1 << 40,
        text="one step in so many is computed again and compared, where the driver runs, on cores that no rank uses; "
        "0: none",
    )

    @model_validator(mode="after")
    def _check(self) -> RecoverySpec:
        if self.layouts and self.allowed_stages:
            raise ValueError("allowed_stages is short for layouts: give one of the two; take layouts")
        return self


def device_refusal(device: Device, kernel_path: KernelPath) -> str | None:
    """Why kernels of this family do not run on this device; None where they do, or where the node decides."""
    needs = "cuda" if kernel_path in CUDA_PATHS else "cpu"
    if "auto" in (device, kernel_path) or device == needs:
        return None
    takes = f"'auto' or one of {', '.join(CUDA_PATHS)}" if device == "cuda" else "'auto'"
    return (
        f"launch.kernel_path {kernel_path!r} does not run on parallel.device {device!r}: take kernel_path {takes}, or "
        f"device {needs!r}"
    )


def other_name(recovery: RecoverySpec, number: int) -> str:
    """The key of the spec that gave the layout of this number."""
    if recovery.layouts:
        return f"recovery.layouts[{number}]"
    return f"recovery.allowed_stages {recovery.allowed_stages[number]}"


def check_tree(value: Any, where: str) -> None:
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
