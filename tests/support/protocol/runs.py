"""The runs of a world, as the product prepares them: specs, data, names and plans are real. Only what their ranks keep
is a few numbers (``state.py``), whatever the plan says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import flows.drive.begin as begin_module
import flows.drive.decide as decide_module
import flows.drive.fork as fork_module
import flows.drive.health as health_module
import flows.drive.run as run_module
from checkpoint.layout import PlanLayout
from checkpoint.log import AttemptInfo
from checkpoint.store.memory import MemoryStore
from flows.drive.begin import prepare_run
from flows.drive.history import give_up
from flows.drive.run import Prepared, compiled, spec_under
from flows.drive.views import Cause, LogView, Policy
from tests.support.protocol.hub import swapped
from tests.support.protocol.state import DATASET, OWNERS, plan_of
from trainer.dataset import DatasetRef
from trainer.failures import Failure
from trainer.plan import Plan, compile_plan
from trainer.spec import RunSpec, how_map, parse_spec

STEPS = 18
GRACE_S = 15.0
_PLANS: dict[str, Plan] = {}


def _compiled_once(spec: RunSpec, dataset: DatasetRef, what: bytes) -> Plan:
    """`compile_plan`, which takes most of a world's time otherwise."""
    how = how_map(spec)
    key = json.dumps([what.hex(), how["parallel"], how["launch"]["nodes"], spec.checkpoint.slots])
    if key not in _PLANS:
        _PLANS[key] = compile_plan(spec, dataset, what)
    return _PLANS[key]


def _policy(self: Prepared, *more: Any, **most: Any) -> Policy:
    """What strikes here would be too much for any run."""
    patient = {"max_attempts_without_progress": 10**6, "strikes": 10**6, "max_same_step": 10**6}
    return replace(_shipped_policy(self, *more, **most), **patient)  # type: ignore[arg-type]


def _give_up(log: LogView, cause: Cause, policy: Policy) -> str | None:
    """Numbers that diverge do so again."""
    return give_up(log, cause, replace(policy, max_same_step=2) if cause.cls == Failure.NUMERIC else policy)


_shipped_policy = Prepared.policy


@contextmanager
def patient() -> Iterator[None]:
    """Inside, no run gives up for the number of its strikes, and some steps say already what is usual."""
    with (
        swapped(run_module, "compile_plan", _compiled_once),
        swapped(begin_module, "compile_plan", _compiled_once),
        swapped(fork_module, "compile_plan", _compiled_once),
        swapped(Prepared, "policy", _policy),
        swapped(decide_module, "give_up", _give_up),
        swapped(health_module, "LEAST", 2),
        swapped(health_module, "IN_A_ROW", 2),
    ):
        yield


@lru_cache
def prepared_in(work: Path) -> tuple[MemoryStore, Prepared]:
    """A run of one rank that has not begun, and the store that has its data."""
    text = work / "a.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    spec = parse_spec({
        "name": "proof",
        "model": {"family": "gpt2", "layers": 3, "width": 32, "heads": 4, "context": 16},
        "train": {
            "steps": STEPS, "batch": 2, "microbatch": 1, "sequence": 16, "optimizer": {"min_lr": 1e-5}
        },
        "data": {"vocab_size": 300, "source": f"text:{text}"},
        "checkpoint": {"deadline_s": 60.0, "commit_s": 60.0, "keep": {"last": 2, "grace_s": GRACE_S}},
        "launch": {"target": "local", "connect_s": 20.0, "stall_s": 15.0},
        "recovery": {"backoff_s": 0.2, "backoff_max_s": 2.0, "on_divergence": "skip", "max_skips": 100},
    })  # fmt: skip
    store = MemoryStore()
    return store, prepare_run(spec, store)


def with_layout(prepared: Prepared, ranks: int, **more: Mapping[str, Any]) -> Prepared:
    """The same run in another How: so many ranks, each a node of its own, and what else sections are to say."""
    how = {name: dict(section) if isinstance(section, Mapping) else section
           for name, section in how_map(prepared.spec).items()}  # fmt: skip
    for name, section in {"parallel": {"stages": ranks}, "launch": {"nodes": ranks}, **more}.items():
        how[name] |= section
    return compiled(prepared, spec_under(prepared.spec, how))


def layout_of(attempt: AttemptInfo, prepared: Prepared) -> PlanLayout:
    """What its ranks keep."""
    assert attempt.ranks in OWNERS
    return replace(
        plan_of(attempt.ranks, prepared.spec.train.steps), digest=bytes.fromhex(attempt.plan),
        what_digest=prepared.what, numerics=attempt.numerics,
    )  # fmt: skip


def dataset_there(work: Path) -> None:
    """As if this machine had the run's data."""
    folder = work / "data" / DATASET.hex()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "verified").touch()
