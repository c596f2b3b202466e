"""What people are told of a run, and how often."""

from __future__ import annotations

from dataclasses import dataclass, field

from checkpoint.curve import AttemptRow, Point
from checkpoint.log import RunLog, RunState
from checkpoint.store import open_store
from flows.drive.events import Event
from flows.drive.line import ordered_back
from flows.drive.live import on_line
from flows.drive.telling import OVER_S, QUIET_S, Teller
from flows.drive.views import NodeView, Phase, RankView, Restore, StartAttempt
from flows.show.facts import attempt_facts
from flows.show.lines import Lines
from tests.checkpoint.samples import attempt_body, point_body


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


def test_an_outage_is_told_once_and_the_next_one_again() -> None:
    """Hours later, in the same words."""
    heard, now = Heard(), 0.0
    teller = Teller("r-0a1b2c", heard, clock=lambda: now)
    for seconds in (0.0, 1.0, OVER_S - 1, 1.0, OVER_S + 1, 1.0):  # from one look that is not answered to the next
        now += seconds
        teller.silence("unknown", "the API server does not answer", "launcher", "the API server does not answer")
    assert heard.phases == [("unknown", "the API server does not answer")] * 2


def test_a_node_that_is_not_heard_of_is_told_once_while_its_ranks_may_train() -> None:
    """Its launcher sees its processes, stopped ones too, so nothing ends it: it was waited for in silence."""
    heard, state = Heard(), RunState("r-0a1b2c")
    teller, trains = Teller("r-0a1b2c", heard), (RankView(0, pid=7),)
    for age_s in (1.0, QUIET_S - 1, QUIET_S + 1, QUIET_S + 2):
        teller.nodes(state, [NodeView(0, alive=True, ranks=trains, age_s=age_s)])
    ((phase, text),) = heard.phases
    assert (phase, text.startswith("node 0: its agent was not heard of for 31 s")) == ("unknown", True)
    over = (RankView(0, pid=7, code=0),)
    for ranks in ((), over):
        teller.nodes(state, [NodeView(1, alive=True, ranks=ranks, age_s=QUIET_S + 1)])
    assert len(heard.phases) == 1


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


def test_an_order_back_to_the_runs_end_leaves_what_lay_behind_it() -> None:
    """No attempt follows it. It was told: step 9/4, an ETA below nothing, saved 9."""
    log = RunLog(open_store("memory:"), "r-0a1b2c", writer="driver")
    state = log.append("attempt", attempt_body(), log.fold())
    for step in (4, 9):
        state = log.append("checkpoint", point_body(step), state, epoch=1)
    order = {"kind": "order", "how": {}, "by": "ann@b", "via": "runs order", "checkpoint": 2, "step": 4}
    state = log.append("intervention", order, state)
    told: list[tuple[str, int]] = []

    class Told:
        def tell(self, event: Event) -> None:
            told.append((event.kind, event.facts["step"]))

    teller = Teller("r-0a1b2c", Told())
    teller.steps(state, [{"event": "step", "epoch": 1, "step": s, "loss": 2.0, "grad_norm": 1.0} for s in (4, 9)])
    teller.checkpoints(state)
    assert told == [("step", 4), ("checkpoint", 4)]


def test_lines_that_an_order_has_left_are_not_told() -> None:
    """Those of the gang before it, behind the step that the run went back to."""
    log = RunLog(open_store("memory:"), "r-0a1b2c", writer="driver")
    state = log.append("attempt", attempt_body(), log.fold())
    state = log.append("checkpoint", point_body(4), state, epoch=1)
    order = {"kind": "order", "how": {}, "by": "ann@b", "via": "runs order", "checkpoint": 2, "step": 4}
    state = log.append("intervention", order, state)
    state = log.append("attempt", attempt_body(2, 4, order=3), state)
    told: list[Event] = []

    class Told:
        def tell(self, event: Event) -> None:
            told.append(event)

    teller = Teller("r-0a1b2c", Told())
    lines = [
        {"event": "step", "epoch": e, "step": s, "loss": 2.0, "grad_norm": 1.0} for e, s in ((1, 4), (1, 9), (4, 5))
    ]
    teller.steps(state, lines)
    assert [(e.facts["epoch"], e.facts["step"]) for e in told] == [(1, 4), (4, 5)]
    teller.began(state, StartAttempt(Restore(2, 4), (), "ordered"), None, steps=8)
    assert told[-1].facts["back"]
    assert teller.lost_steps == 0  # they were left on purpose
    points = {s: Point(s, e, 0.0, 2.0, 1.0, 1.0, 1.0) for e, s in ((1, 3), (4, 5), (1, 9))}
    assert sorted(on_line(points, ordered_back(state))) == [3, 5]
    rows = {1: AttemptRow(points[3], points[9], 0, 1), 4: AttemptRow(points[5], points[5], 0, 1)}
    assert [fact.lost_steps for fact in attempt_facts(state, rows)] == [0, 0]
    state = log.append("attempt", attempt_body(2, 4, order=3) | {"cause": {"text": "rank 1 was killed"}}, state)
    late = Point(5, 5, -9.0, 2.0, 1.0, 1.0, 1.0)  # by a clock that was set back meanwhile
    rows[5] = AttemptRow(late, late, 0, 1)
    facts = attempt_facts(state, rows)
    assert [fact.lost_steps for fact in facts] == [0, 0, 1]
    assert [fact.recovery_s for fact in facts] == [None, None, 0.0]  # an order's time to come is no recovery


def test_the_last_step_and_what_is_saved_follow_an_order() -> None:
    said: list[str] = []
    lines = Lines(said.append, 10, every_s=0.0)
    lines.tell(Event("checkpoint", {"n": 3, "step": 8, "epoch": 1}))
    facts = {"number": 2, "step": 4, "from": "checkpoint", "cause": None, "steps": 20, "back": True}
    lines.tell(Event("attempt", facts))
    lines.tell(Event("step", {"step": 5, "loss": 2.0, "grad_norm": 1.0, "tokens_per_s": 9.0, "step_us": 1000}))
    assert said[-1].startswith("step      5/20 ")
    assert said[-1].endswith("saved 4")
