"""Messages behind the work (``run/behind.c``, ``run/messages.c``): whole ranks as threads over ``comm/loop.c``, which
hands messages over as late as it may. What each wait is for, and each place that is given no sooner.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.e2e import engine_runs
from tests.engine.native import build_program
from tests.engine.plans import GPT2, small_plan
from tests.engine.test_device import CHUNKS
from trainer import wire
from trainer.plan.compiled import Plan

STEADY = {"schedule": {"kind": "constant"}}
SEEDS = (1, 2, 3)


class Line(NamedTuple):
    """What the program says of a message of a rank; `action`: before which it is waited for, or gets its place."""

    what: str
    rank: int
    action: int
    message: int
    name: str
    verdict: str


class Gang:
    """A plan's ranks in one process."""

    def __init__(self, folder: Path, **plan: Any) -> None:
        self.folder, self.plan = folder, small_plan(folder, **plan)
        (folder / "plan").write_bytes(self.plan.to_bytes())
        ranks = len(self.plan.positions) * self.plan.config.replicas
        attempt = engine_runs.attempt_bytes(self.plan, [0] * ranks, folder / "data", folder)
        (folder / "attempt").write_bytes(attempt)

    def run(self, *mode: object) -> tuple[str, list[Line]]:
        """What all states come to, and what is said of messages."""
        command = [str(build_program("messages_drive")), f"{self.folder}/plan", f"{self.folder}/attempt"]
        done = subprocess.run([*command, *map(str, mode)], capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        lines = done.stdout.splitlines()
        (sound,) = (line.split()[1] for line in lines if line.startswith("sound"))
        said = [line.split(" ") for line in lines if not line.startswith("sound")]
        return sound, [Line(what, int(r), int(a), int(m), name, how) for what, r, a, m, name, how in said]


def is_send(plan: Plan, line: Line) -> bool:
    return plan.positions[line.rank % len(plan.positions)].step[line.message].kind == wire.A_SEND


DECISIONS = (wire.A_APPLY, wire.A_CHECK)
AT_THE_DECISION = ("gpipe",)
"""Plans of PLANS all of whose early places are given right behind it."""
PLANS: dict[str, dict[str, Any]] = {
    "1f1b": {"stages": 2, "batch": 8},
    "gpipe": {"parallel": {"stages": 2, "schedule": "gpipe"}, "batch": 8},
    "3": {"stages": 3, "batch": 8, "model": GPT2 | {"layers": 3}},
    "chunks": {"parallel": CHUNKS, "model": GPT2 | {"layers": 4}, "batch": 8},
    "replicas": {"parallel": {"stages": 2, "replicas": 2}, "batch": 16, "reduction_groups": 2},
    "untied": {"stages": 2, "batch": 8, "model": GPT2 | {"tied": False}},
    "head": {"parallel": {"stages": 2, "vocab_stages": 2}, "batch": 8, "vocab_blocks": 4},
}


REPLICAS: dict[str, dict[str, Any]] = {
    "whole": {"parallel": {"stages": 2, "replicas": 2}},
    # the weights that replicas exchange in pieces go whole from the first to the last position
    "tied": {"parallel": {"stages": 2, "replicas": 2}, "vocab": 16_400},
    "pieces": {"parallel": {"stages": 1, "replicas": 4}, "vocab": 16_400, "model": GPT2 | {"tied": False}},
}


@pytest.mark.parametrize("which", sorted(REPLICAS))
def test_exchanges_pass_without_a_buffer(tmp_path: Path, which: str) -> None:
    """Both ends send first: no rank waits for its half to leave before it has a place for the other's."""
    plan = REPLICAS[which] | STEADY | {"batch": 8, "microbatch": 1, "reduction_groups": 4}
    gang = Gang(tmp_path, **plan)
    sound = gang.run("late", 1)[0]
    assert gang.run("late", 2)[0] == gang.run("rendezvous")[0] == sound


@pytest.mark.parametrize("which", sorted(PLANS))
def test_each_wait_for_a_message_is_needed(tmp_path: Path, which: str) -> None:
    """Without it a step's bytes are others, in some order of messages. Or it is for a send that its receiver has got
    whatever the order, because what came back since then was made of it: then no run ever waits there.
    """
    gang = Gang(tmp_path, **PLANS[which], **STEADY)
    sound = gang.run("rendezvous")[0]
    shown: dict[Line, bool] = {}
    held = set()
    for seed in SEEDS:
        digest, said = gang.run("without", seed)
        assert digest == sound, seed
        held |= {(line.rank, line.message) for line in said if line.what == "held"}
        for line in said:
            if line.what == "wait":
                key = line._replace(verdict="")
                shown[key] = shown.get(key, False) or line.verdict == "differs"
    assert any(is_send(gang.plan, line) for line, needed in shown.items() if needed)
    for line, needed in shown.items():
        if not needed:
            assert is_send(gang.plan, line), line
            assert (line.rank, line.message) not in held, line


@pytest.mark.parametrize("which", sorted(PLANS.keys() - {"replicas"}))  # an exchange's place was only written before
def test_a_place_that_is_given_ahead_is_given_no_sooner(tmp_path: Path, which: str) -> None:
    """One action sooner, and what still reads the place there finds others' bytes. (Behind the decision it might be: a
    step that is not finite begins again from there, `run/behind.h`, B2.)
    """
    gang = Gang(tmp_path, **PLANS[which], **STEADY)
    ahead = [line for line in gang.run("without", 1)[1] if line.what == "post" and line.action < line.message]
    assert ahead
    early = [line for line in ahead if gang.plan.positions[line.rank].step[line.action - 1].kind not in DECISIONS]
    assert {line.verdict for line in early} == (set() if which in AT_THE_DECISION else {"differs"}), early


def first_after(plan: Plan, rank: int, send: int) -> int:
    """Behind the last action before a send that made its bytes: its stage's forward, or backward, of its microbatch."""
    step = plan.positions[rank].step
    it = step[send]
    ops = "F" if it.op == "F" else "BI"
    (made,) = (n for n, a in enumerate(step[:send]) if a.kind == wire.A_RUN and a.op in ops
               and (a.stage, a.microbatch) == (it.stage, it.microbatch))  # fmt: skip
    return made + 1


@pytest.mark.parametrize("schedule", ["interleaved-1f1b", "zb-v", "v-half"])
def test_a_send_begins_as_soon_as_its_bytes_are_made(tmp_path: Path, schedule: str) -> None:
    """Between stages; the list has it where a rank that blocks would have to wait least, often long after. Where a send
    blocks it stays there, and both ways give the same bits."""
    parallel = {"stages": 4, "chunks": 2, "schedule": schedule}
    gang = Gang(tmp_path, parallel=parallel, model=GPT2 | {"layers": 4}, batch=8, **STEADY)
    sound, said = gang.run("rendezvous")
    starts = [
        line for line in said if line.what == "start" and line.name.lstrip("0123456789")[:6] in ("SEND_F", "SEND_B")
    ]
    between = [line for line in starts if gang.plan.positions[line.rank].step[line.message].stage is not None]
    edges, microbatches = 3 if schedule == "interleaved-1f1b" else 2, 4
    assert len(between) == 2 * edges * microbatches
    early = 0
    for line in between:
        assert line.action == first_after(gang.plan, line.rank, line.message), line
        early += line.action < line.message
    assert early
    for seed in SEEDS:
        assert gang.run("late", seed)[0] == sound


@pytest.mark.parametrize("clip", [1e-3, 0.0], ids=["clipped", "not clipped"])
@pytest.mark.parametrize("which", ["gpipe", "chunks"])
def test_an_optimistic_step_comes_to_the_same_in_any_order(tmp_path: Path, which: str, clip: float) -> None:
    """Where messages wait for their receives, and where they are late; prefixes run once or twice."""
    more = PLANS[which] | STEADY | {"optimizer": {"clip": clip}}
    sound = Gang(tmp_path / "checked", **more).run("rendezvous")[0]
    parallel = more["parallel"] | {"optimizer": "optimistic"}
    gang = Gang(tmp_path / "optimistic", **more | {"parallel": parallel})
    assert all(position.step_checks for position in gang.plan.positions)
    assert gang.run("rendezvous")[0] == sound
    for seed in SEEDS:
        assert gang.run("late", seed)[0] == sound, seed
