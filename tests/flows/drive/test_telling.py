"""What people are told of a run, and how often."""

from __future__ import annotations

from dataclasses import dataclass, field

from checkpoint.log import RunState
from flows.drive.events import Event
from flows.drive.telling import Teller
from flows.drive.views import NodeView, Phase


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
