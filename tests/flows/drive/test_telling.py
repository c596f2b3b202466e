"""What people are told of a run, and how often."""

from __future__ import annotations

from dataclasses import dataclass, field

from checkpoint.log import RunLog, RunState
from checkpoint.store import open_store
from flows.drive.events import Event
from flows.drive.telling import Teller
from flows.drive.views import NodeView, Phase, Restore, StartAttempt
from tests.checkpoint.samples import attempt_body


@dataclass
class Heard:
    """Keeps what it is told, in words."""

    phases: list[tuple[str, str]] = field(default_factory=list)

    def tell(self, event: Event) -> None:
        self.phases.append((event.facts["phase"], event.facts["text"]))


def test_trouble_that_lasts_is_told_once_and_so_is_the_phase_beside_it() -> None:
    heard, state, trouble = Heard(), RunState("r-0a1b2c"), "the checkpoint of step 8 is not stored: no space"
    teller = Teller("r-0a1b2c", heard)

    def look(phase: Phase, error: str | None) -> None:
        teller.nodes(state, [NodeView(0, error=error)])
        teller.phase(phase, "", key=("phase", phase, ""))

    for _ in range(3):  # looks, one after the other
        look(Phase.TRAINING, trouble)
    assert heard.phases == [("warning", f"node 0: {trouble}"), ("training", "")]
    look(Phase.DRAINING, trouble)
    look(Phase.TRAINING, None)  # a phase that comes back is told again
    look(Phase.TRAINING, trouble)  # and so is trouble
    assert heard.phases[2:] == [
        ("draining", ""),
        ("training", ""),
        ("warning", f"node 0: {trouble}"),
        ("training", ""),
    ]


def test_steps_whose_lines_come_after_the_next_attempt_has_begun_are_lost_all_the_same() -> None:
    """A store that costs is asked for lines each few seconds: the last of them come when their gang is long gone."""
    log = RunLog(open_store("memory:"), "r-0a1b2c", writer="driver")
    state = log.append("attempt", attempt_body(), log.fold())
    teller = Teller("r-0a1b2c")

    def line(step: int) -> dict[str, object]:
        return {"event": "step", "epoch": 1, "step": step, "loss": 2.0, "grad_norm": 1.0}

    teller.steps(state, map(line, range(1, 11)))
    state = log.append("attempt", attempt_body(step=8), state)
    teller.began(state, StartAttempt(Restore(2, 8), (), "recover"), None, steps=20)
    assert teller.outcome(state, "stopped").lost_steps == 2
    teller.steps(state, [line(11), line(12)])
    assert teller.outcome(state, "stopped").lost_steps == 4
