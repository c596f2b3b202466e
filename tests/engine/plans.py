"""Small real plans for the engine's tests, and what edits their bytes."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.e2e.engine_runs import write_samples
from trainer import wire
from trainer.dataset import DatasetRef, Mixture
from trainer.plan.compile import compile_plan
from trainer.plan.compiled import Plan
from trainer.spec import parse_spec, what_digest
from trainer.wire.order import MixPhase

VOCAB, SEQUENCE, SAMPLES = 30, 8, 12

GPT2: dict[str, Any] = {"family": "gpt2", "layers": 2, "width": 16, "heads": 2}
LLAMA: dict[str, Any] = {"family": "llama", "layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "hidden": 24}


def small_plan(
    folder: Path | None = None,
    *,
    stages: int = 1,
    model: dict[str, Any] = GPT2,
    mode: Any = "train",
    data: dict[str, Any] | None = None,
    dataset: DatasetRef | None = None,
    parallel: dict[str, Any] | None = None,
    every: int = 0,
    delays: dict[str, float] | None = None,
    vocab: int = VOCAB,
    eot: int | None = None,
    masked: bool = False,
    **train: Any,
) -> Plan:
    """A plan of a few kilobytes; with a folder, its shards are written to ``folder/data``. ``masked``: of their tokens
    three in ten count.
    """
    if train.get("precision") == "fp8" and "hidden" in model:
        model = model | {"hidden": 32}  # a multiple of 16
    if dataset is None and folder is not None:
        rng = np.random.default_rng(5)
        tokens = rng.integers(0, VOCAB, (SAMPLES, SEQUENCE + 1))
        counts = rng.random(tokens.shape) < 0.3 if masked else None
        dataset = replace(write_samples(folder / "data", tokens, vocab, counts), eot=eot)
    dataset = dataset or DatasetRef("0" * 64, vocab, 2, (SEQUENCE + 1,) * SAMPLES, "0" * 64)
    values: dict[str, Any] = {
        "name": "small",
        "model": model | {"vocab": vocab, "context": SEQUENCE},
        "data": data or {},
        "train": {"steps": 3, "batch": 4, "microbatch": 2, "sequence": SEQUENCE, "seed": 3, "reduction_groups": 1}
        | train,
        "parallel": {"stages": stages, "threads": 1} | (parallel or {}),
        "checkpoint": {"every": every},
    }
    spec = parse_spec(values)
    return compile_plan(spec.resolve(dataset), dataset, what_digest(spec, dataset), mode, delays=delays)


WIDE = LLAMA | {"layers": 1, "hidden": 16400}
"""Matrices of a little more than one and two blocks of a piece."""


def replicated(replicas: int = 2, stages: int = 1, precision: str = "fp32") -> bytes:
    """A plan of several replicas, with tensors in pieces."""
    train: dict[str, Any] = {"batch": 32, "microbatch": 2, "reduction_groups": 2 * replicas, "precision": precision}
    model = WIDE | {"layers": stages}
    return small_plan(stages=stages, model=model, parallel={"replicas": replicas}, **train).to_bytes()


def mixture(*phases: MixPhase) -> bytes:
    """A plan over three parts, of 4, 6 and 2 of the small dataset's shards."""
    plain = DatasetRef("0" * 64, VOCAB, 2, (SEQUENCE + 1,) * SAMPLES, "0" * 64)
    phases = phases or (MixPhase(1, (3, 0, 2)), MixPhase(3, (0, 1, 1)))
    mix = Mixture((("1" * 64, 4), ("2" * 64, 6), ("3" * 64, 2)), phases)
    return small_plan(dataset=replace(plain, mix=mix)).to_bytes()


def sealed(data: bytes | bytearray) -> bytes:
    """The same bytes with their own digest."""
    out = bytearray(data)
    start = wire.PlanHeader.digest.offset
    out[start : start + 32] = hashlib.sha256(out[64:]).digest()
    return bytes(out)


def edited(data: bytes, section: str, record: int, kind: Any, change: Callable[[Any], None]) -> bytes:
    """The plan with one record of a section changed in place, and the digest made to fit."""
    out = bytearray(data)
    header = wire.PlanHeader.from_buffer_copy(data)
    at = header.section[wire.SECTIONS.index(section)].offset + record * ctypes.sizeof(kind)
    value = kind.from_buffer_copy(data, at)
    change(value)
    out[at : at + ctypes.sizeof(kind)] = bytes(value)
    return sealed(out)
