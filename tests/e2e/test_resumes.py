"""A resume from each layout into each other: the same state, bit by bit, whoever saved it and whoever goes on.

What the slots of real ranks hold after a step is stored; restored into another layout it must be, byte for byte, what
that layout's own ranks held after that step. And whoever goes on from it ends where nobody had stopped. `make test`
takes a sample of layouts and 64 of their pairs, drawn by SEED (``HOTSTAGE_SEED`` draws another); `make nightly` takes
all.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest

from checkpoint.layout import PlanLayout, read_plan
from checkpoint.log import CheckpointInfo
from checkpoint.store import MemoryStore
from tests.e2e import engine_runs
from tests.e2e.test_layouts import How, layouts
from tests.support import slot_gang
from trainer.plan.compile import compile_plan
from trainer.plan.compiled import Plan
from trainer.spec import parse_spec, what_digest

SEED = int(os.environ.get("HOTSTAGE_SEED", "11"))
LAYOUTS, PAIRS, RANKS = 12, 64, 8
VOCAB, SEQUENCE, STEP, STEPS = 33_000, 8, 2, 4
"""The embedding has three blocks: two replicas have two and one, four one, one, one and none. All else is whole, and
the layers' matrices have one moment, which Muon takes."""
RUN = "resumes-0a1b2c"


@dataclass
class World:
    """Real runs of layouts, each made once, and their checkpoints after STEP."""

    folder: Path
    store: MemoryStore = field(default_factory=MemoryStore)
    held: dict[How, dict[int, list[str]]] = field(default_factory=dict)
    saved: dict[tuple[How, int], CheckpointInfo] = field(default_factory=dict)

    @cached_property
    def data(self) -> Path:
        tokens = np.random.default_rng(7).integers(0, VOCAB, (5, SEQUENCE * 3 + 1))
        self.dataset = engine_runs.write_samples(self.folder / "data", tokens, VOCAB)
        return self.folder / "data"

    def plan(self, how: How) -> Plan:
        assert self.data
        spec = parse_spec(
            {
                "name": "resumes",
                "model": {"family": "gpt2", "layers": 8, "width": 16, "heads": 2, "context": 32, "vocab": VOCAB},
                "train": {
                    "steps": STEPS,
                    "batch": 8,
                    "microbatch": 1,
                    "sequence": SEQUENCE,
                    "reduction_groups": 8,
                    "optimizer": {"name": "muon"},
                },
                "parallel": {"threads": 1, **vars(how)},
                "checkpoint": {"every": STEP},
            }
        )
        return compile_plan(spec.resolve(self.dataset), self.dataset, what_digest(spec, self.dataset))

    def layout(self, how: How) -> PlanLayout:
        return read_plan(self.plan(how).to_bytes())

    def run(self, how: How) -> dict[int, list[str]]:
        """What every rank's slots held after STEP and after the last, of a run that nothing stops."""
        if how not in self.held:
            held = slot_gang.train(self.plan(how), self.data, self.folder / name_of(how))
            assert sorted(held) == [STEP, STEPS]
            self.held[how] = digests(held)
            layout, mark = self.layout(how), len(self.held)
            for step, data in held.items():
                self.saved[how, step] = slot_gang.store_state(self.store, RUN, layout, step, data, f"{mark}")
        return self.held[how]

    def checkpoint(self, how: How, step: int = STEP) -> CheckpointInfo:
        """Of that run, after STEP or after the last."""
        self.run(how)
        return self.saved[how, step]

    def resume(self, source: How, target: How) -> dict[int, list[str]]:
        """From STEP as the one saved it, by the other."""
        info, plan = self.checkpoint(source), self.plan(target)
        fill = slot_gang.filling(self.store, RUN, info, self.layout(target))
        folder = self.folder / f"{name_of(source)}-to-{name_of(target)}"
        return digests(slot_gang.train(plan, self.data, folder, step=STEP, fill=fill))


def name_of(how: How) -> str:
    return f"{how.stages}-{how.schedule}-{how.chunks}-{how.replicas}"


def digests(held: Mapping[int, Sequence[bytes]]) -> dict[int, list[str]]:
    return {step: [hashlib.sha256(data).hexdigest() for data in found] for step, found in held.items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("resumes"))


def sampled() -> list[How]:
    """A few layouts of up to RANKS processes: every number of stages, of replicas and every schedule is there."""
    source, everything = random.Random(SEED), [how for how in layouts() if ranks_of(how) <= RANKS]
    names = ("stages", "replicas", "schedule")
    while True:
        drawn = source.sample(everything, LAYOUTS)
        if all({getattr(h, n) for h in drawn} == {getattr(h, n) for h in everything} for n in names):
            return drawn


def ranks_of(how: How) -> int:
    return how.stages // how.chunks * how.replicas


def pairs(of: Sequence[How], count: int) -> list[tuple[How, How]]:
    everything = [(source, target) for source in of for target in of if source != target]
    return random.Random(SEED).sample(everything, min(count, len(everything)))


def assert_equal(world: World, source: How, target: How) -> None:
    """What the target's slots hold that was saved by the source is what its own ranks held."""
    info, layout = world.checkpoint(source), world.layout(target)
    restored = slot_gang.restored(world.store, RUN, info, layout)
    assert digests({STEP: restored})[STEP] == world.run(target)[STEP], (source, target)


def test_a_sample_of_layouts_restores_what_others_saved(world: World) -> None:
    for source, target in pairs(sampled(), PAIRS):
        assert_equal(world, source, target)


def test_a_sample_of_layouts_goes_on_from_what_others_saved(world: World) -> None:
    """Each of them, and each saves at its end what all the others do."""
    drawn = sampled()
    for source, target in zip(drawn, [*drawn[1:], drawn[0]], strict=True):
        assert world.resume(source, target) == {STEPS: world.run(target)[STEPS]}, (source, target)
    for step in (STEP, STEPS):
        assert len({world.checkpoint(how, step).state_digest for how in drawn}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("target", list(layouts()), ids=str)
def test_every_layout_restores_what_every_other_saved(world: World, target: How) -> None:
    """And goes on from what a few of them saved."""
    for source in layouts():
        assert_equal(world, source, target)
    for source in random.Random(SEED).sample(list(layouts()), 4):
        assert world.resume(source, target) == {STEPS: world.run(target)[STEPS]}, (source, target)
