"""The health of a run by its steps' lines: what is found, when it is over; and what a policy makes of it."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest

from checkpoint import keys
from checkpoint.agent.status import NodeStatus, RankStatus
from checkpoint.amendments import Amendments
from checkpoint.curve import AttemptRow, Curve, Point
from checkpoint.log import RunLog
from checkpoint.store import Store
from flows.drive.decide import decide
from flows.drive.foreseen import pass_steps, plan_shares
from flows.drive.health import IN_A_ROW, Health, Symptom
from flows.drive.hours import worked
from flows.drive.loop import Driver
from flows.drive.run import Prepared
from flows.drive.views import (
    AwaitStop,
    CheckpointView,
    Decision,
    End,
    LogView,
    Look,
    Memory,
    NodeView,
    OrderView,
    OwnOrder,
    Phase,
    Policy,
    Watch,
)
from tests.checkpoint.samples import attempt_body, point_body
from tests.flows.drive.decisions import POLICY, attempt, ended, running
from tests.flows.drive.test_orders import Nodes, another, driven, small, state_of
from trainer.dataset import Mixture
from trainer.spec_watch import LimitsSpec
from trainer.wire.order import MixPhase

__all__ = ["small"]


def line(
    step: int, loss: float = 3.0, norm: float = 1.0, rate: float = 1e4, epoch: int = 1, **more: Any
) -> dict[str, Any]:
    found = {"event": "step", "epoch": epoch, "step": step, "loss": loss, "grad_norm": norm, "tokens_per_s": rate}
    return {**found, **more}


def seen(health: Health, *lines: dict[str, Any]) -> list[Symptom]:
    return [finding for one in lines for finding in health.see(one)]


def quiet(first: int, last: int, **more: Any) -> list[dict[str, Any]]:
    """Steps with a little noise, of a seed."""
    noise = random.Random(5)
    return [line(step, 3.0 + noise.gauss(0, 0.02), 1.0 + noise.random() / 5, **more) for step in range(first, last + 1)]


def test_a_run_that_learns_has_nothing() -> None:
    """A loss that falls from 11 to 3 with noise, norms that wander, a rate with hiccups of single steps."""
    noise = random.Random(1)
    lines = [
        line(
            step,
            3 + 8 / (1 + step / 50) + noise.gauss(0, 0.05),
            1 + noise.random() * 2,
            1e4 * (0.3 if step % 50 == 0 else 1 + noise.random() / 10),
        )
        for step in range(1, 2001)
    ]
    assert seen(Health(), *lines) == []


def test_a_loss_that_stays_high_explodes_once_and_is_over_when_it_is_back() -> None:
    health = Health()
    assert seen(health, *quiet(1, 60)) == []
    spike, explosion = seen(health, *(line(61 + n, 9.0 + n) for n in range(2 * IN_A_ROW)))
    assert (spike.kind, spike.step, spike.value) == ("spike", 61, 9.0)
    assert (explosion.kind, explosion.step, explosion.last, explosion.epoch) == ("explosion", 61, 60 + IN_A_ROW, 1)
    assert health.explosion == explosion
    assert (
        explosion.text
        == "the loss explodes: loss 16.0000 at step 68, where 2.9990 is usual; above the usual since step 61"
    )
    assert seen(health, line(77)) == []
    assert health.explosion is None
    # one that leaps again is not told each time
    assert seen(health, line(78, 9.0), line(79), line(80, 9.0), line(81)) == []


def test_what_the_attempt_before_did_behind_the_step_that_it_goes_back_to_is_no_measure() -> None:
    health = Health()
    seen(health, *quiet(1, 60), *(line(61 + n, 9.0) for n in range(IN_A_ROW)))
    again = [line(41 + n, 3.0, epoch=2) for n in range(10)]
    assert seen(health, *again) == []
    assert (health.explosion, health.epoch) == (None, 2)
    assert seen(health, line(99, 50.0, epoch=1)) == [], "a late line of an attempt that is over"
    (spike,) = seen(health, line(51, 9.0, epoch=2))
    assert (spike.kind, round(spike.usual, 1)) == ("spike", 3.0), "40 steps of the first attempt are still known"


def test_a_step_of_which_nothing_counts_is_no_measure() -> None:
    health = Health()
    lines = [line(n, 0.0, 0.0, counted=0) if n % 3 else one for n, one in enumerate(quiet(1, 200), 1)]
    assert seen(health, *lines) == []
    (spike,) = seen(health, line(201, 9.0))
    assert (spike.kind, round(spike.usual, 1)) == ("spike", 3.0)


def test_a_norm_many_times_the_usual() -> None:
    health = Health()
    (found,) = seen(health, *quiet(1, 50), line(51, norm=40.0), line(52, norm=50.0))
    assert (found.kind, found.step, found.value) == ("gradient", 51, 40.0)
    assert found.text.endswith("; nothing clips it (train.optimizer.clip is 0)")
    (found,) = seen(Health(clip=1.5), *quiet(1, 50), line(51, norm=40.0))
    assert found.text.endswith("; it was clipped to 1.5")


def test_a_throughput_that_drops_and_comes_back() -> None:
    health = Health()
    slow = [line(60 + n, rate=5e3) for n in range(40)]
    drop, back = seen(health, *quiet(1, 59), *slow, *quiet(100, 120))
    assert (drop.kind, drop.step, drop.over, drop.value, drop.usual) == ("slow", 60, False, 5e3, 1e4)
    assert drop.text == "5,000 tokens a second since step 60, where 10,000 are usual"
    assert (back.kind, back.over) == ("slow", True)
    # another attempt has times of its own
    assert seen(health, *quiet(121, 180, epoch=2, rate=2e3)) == []


def test_short_steps_are_rated_together() -> None:
    """Of steps of 10 ms a tenth of a second without a processor is nothing, 4 s are."""
    health, hiccup, slow = Health(), {"rate": 1e3, "step_us": 10_000.0}, {"rate": 5e3, "step_us": 10_000.0}
    lines = [line(n, step_us=10_000.0) if n % 100 > 9 else line(n, **hiccup) for n in range(1, 2000)]
    assert seen(health, *lines) == []
    (drop,) = seen(health, *(line(2000 + n, **slow) for n in range(500)))
    assert (drop.kind, drop.step, drop.last, drop.value) == ("slow", 2005, 2404, 5e3)


def test_a_stage_that_is_slower_than_its_share() -> None:
    health = Health(shares=(1.0, 2.0, 1.0))
    assert seen(health, *quiet(1, 80, busy=[30_000, 60_000, 31_000])) == []
    (found,) = seen(health, *quiet(81, 160, busy=[30_000, 60_000, 57_000]))
    assert (found.kind, found.over, round(found.value, 1)) == ("straggler", False, 1.9)
    assert "rank 2 computes 1.9 times as long as the plan says" in found.text
    (over,) = seen(health, *quiet(161, 240, busy=[30_000, 60_000, 30_000]))
    assert (over.over, over.text) == (True, "rank 2 keeps up again")
    assert seen(Health(shares=(1.0, 2.0, 1.0)), *quiet(1, 80, busy=[300, 600, 570])) == [], "too short to tell"


@pytest.mark.parametrize(
    "busy", [None, [], [1, 2], [1, 2, 0], [1, 2, -1], [1, 2, True], [1, 2, "3"], {"a": 1}, [1, 2, 1e999]]
)
def test_times_that_are_none(busy: Any) -> None:
    assert seen(Health(shares=(1.0, 1.0, 1.0)), *quiet(1, 80, busy=busy)) == []


def test_data_that_are_read_again() -> None:
    health = Health(pass_steps=100)
    (again,) = seen(health, *quiet(90, 330))
    assert (again.kind, again.step, again.value) == ("repeated", 101, 1.01)
    assert again.text == "from step 101 on the data are read again from their beginning (100 steps a pass)"
    (first,) = seen(Health(pass_steps=100), *quiet(150, 190))
    assert first.step == 101, "a driver that comes later tells it too"


# --- what the policy makes of it (D11, D12) -----------------------------------------------------------------

ILL = Symptom("explosion", 1, 31, 38, 9.0, 3.0, "the loss explodes: loss 9.0000 at step 38")
SAVED = (CheckpointView(2, 10, 1), CheckpointView(3, 30, 1), CheckpointView(4, 36, 1))


def asked(policy: Policy, look: Look, **change: Any) -> Decision:
    log = LogView((attempt(),), SAVED, tuple(reversed(SAVED)))
    return decide(replace(log, **change), look, policy, Memory())[0]


def training(**more: Any) -> Look:
    return Look(1.0, tuple(running(step=38)), **more)


def explodes(how: str) -> Policy:
    return replace(POLICY, on_explosion=how)


def test_an_explosion_is_told_alone_unless_the_spec_says_more() -> None:
    assert asked(POLICY, training(exploded=ILL)) == Watch(Phase.TRAINING)


def test_skip_goes_back_before_it_and_past_it() -> None:
    decision = asked(explodes("skip"), training(exploded=ILL))
    assert isinstance(decision, OwnOrder)
    assert (decision.start, decision.amendments, decision.via) == (
        (3, 30),
        Amendments(skip=((31, 38),)),
        "recovery.on_explosion",
    )


def test_lower_goes_back_before_it_at_half_the_rate_and_half_of_that() -> None:
    decision = asked(explodes("lower"), training(exploded=ILL))
    assert isinstance(decision, OwnOrder)
    assert (decision.start, decision.amendments) == ((3, 30), Amendments(rate=((31, 0.5),)))
    again = asked(explodes("lower"), training(exploded=ILL), amendments=Amendments(rate=((11, 0.5),)))
    assert isinstance(again, OwnOrder)
    assert again.amendments == Amendments(rate=((11, 0.5), (31, 0.25)))


def test_stop_gives_up_and_says_why() -> None:
    decision = asked(explodes("stop"), training(exploded=ILL))
    assert isinstance(decision, End)
    assert (decision.outcome, decision.reason) == ("gave_up", f"{ILL.text} (recovery.on_explosion)")
    assert decision.cause is not None
    assert decision.cause.cls == "numeric"


def test_the_next_time_it_goes_further_back() -> None:
    """What was saved in an explosion is high from its first step on: the run went back there again and gave up."""
    own = (OrderView(5, {}, start=(4, 36), own=True),)
    ill, nodes = replace(ILL, epoch=8, step=37), tuple(replace(n, epoch=8) for n in running(step=38))
    look, newest = Look(1.0, nodes, exploded=ill), attempt(8, order=5)
    decision = asked(explodes("skip"), look, orders=own, attempts=(newest,))
    assert isinstance(decision, OwnOrder)
    assert (decision.start, decision.amendments) == ((3, 30), Amendments(skip=((31, 38),)))
    last = asked(explodes("skip"), look, orders=own, attempts=(newest,), candidates=SAVED[2:])
    assert isinstance(last, OwnOrder)
    assert last.start == (4, 36), "there is nothing older"


def test_it_is_done_a_few_times() -> None:
    own = tuple(OrderView(n, {}, start=(3, 30), own=True) for n in (5, 6, 7))
    newest = attempt(8, order=7)
    ill, nodes = replace(ILL, epoch=8), tuple(replace(n, epoch=8) for n in running(step=38))
    decision = asked(explodes("skip"), Look(1.0, nodes, exploded=ill), orders=own, attempts=(newest,))
    assert isinstance(decision, End)
    assert "going back 3 times (recovery.max_skips) did not help" in decision.reason


@pytest.mark.parametrize(
    ("look", "change"),
    [
        (training(exploded=replace(ILL, epoch=0)), {}),
        (training(exploded=replace(ILL, step=5)), {}),
        (Look(1.0, (), exploded=ILL), {}),
    ],
    ids=["of another attempt", "nothing saved before it", "no gang trains"],
)
def test_nothing_is_done_without_ground(look: Look, change: dict[str, Any]) -> None:
    assert isinstance(asked(explodes("skip"), look, **change), Watch)


LIMITED = replace(POLICY, device_hours=2.0)


def test_used_hours_have_the_gang_save_and_leave_then_the_run_is_parked() -> None:
    assert asked(LIMITED, training(hours=1.99)) == Watch(Phase.TRAINING)
    waits = asked(LIMITED, training(hours=2.0))
    assert isinstance(waits, AwaitStop)
    assert waits.why == "2 of limits.device_hours 2 are used: the run saves its state and is parked"
    left: list[NodeView] = [ended(n, step=39, code=85) for n in range(2)]
    over = asked(LIMITED, Look(1.0, tuple(left), hours=2.01))
    assert isinstance(over, End)
    assert (over.outcome, over.reason) == (
        "preempted",
        "2.01 of limits.device_hours 2 are used; `hotstage runs resume RUN --set limits.device_hours=…` goes on",
    )
    assert over.cause is None


def test_a_run_that_is_done_is_not_parked() -> None:
    done = (*SAVED, CheckpointView(5, 100, 1))
    decision = asked(LIMITED, training(hours=9.0), candidates=tuple(reversed(done)), checkpoints=done)
    assert isinstance(decision, End)
    assert decision.outcome == "succeeded"


# --- a driver and its log -----------------------------------------------------------------------------------


def test_a_driver_tells_what_it_finds_and_gives_the_order(small: tuple[Store, Prepared]) -> None:
    store, prepared = small
    prepared = another(store, prepared, "recovery.on_explosion=skip", "train.steps=100")
    driven(store, prepared, nodes := Nodes())
    log = RunLog(store, prepared.run, writer="agent")
    state = log.fold()
    epoch, launch = state.epoch, state.attempts[0].launch
    log.append("checkpoint", point_body(40), state, epoch=epoch)
    status = NodeStatus(0, launch, "t", epoch=epoch, phase="running", ranks={0: RankStatus(pid=7, step=68)})
    store.put(keys.status_key(prepared.run, launch, 0), status.pack())
    lines = [*quiet(1, 60, epoch=epoch), *(line(61 + n, 9.0, epoch=epoch) for n in range(IN_A_ROW))]
    store.put(keys.segment_key(prepared.run, epoch, 0), "\n".join(map(json.dumps, lines)).encode())
    _, told = driven(store, prepared, nodes, looks=4)
    found = [e.facts for e in told if e.kind == "health"]
    assert [f["finding"] for f in found if f["finding"] != "repeated"] == ["spike", "explosion"]
    state = state_of(store, prepared)
    (order,) = state.orders
    assert (order.body["own"], order.body["via"], order.start) == (True, "recovery.on_explosion", (2, 40))
    assert order.amendments.skip == ((41, 68),)
    assert (state.attempts[-1].step, state.attempts[-1].order) == (40, order.n)


def test_the_plan_says_how_much_each_rank_computes(small: tuple[Store, Prepared]) -> None:
    store, prepared = small
    assert plan_shares(another(store, prepared, "parallel.stages=1")) == ()
    shares = plan_shares(another(store, prepared, "parallel.stages=2", "parallel.replicas=2", "train.batch=8"))
    assert len(shares) == 2
    assert 0.2 < shares[0] / shares[1] < 5.0


def test_a_mixture_has_no_pass_of_its_own(small: tuple[Store, Prepared]) -> None:
    _, prepared = small
    train, data = prepared.spec.train, prepared.dataset
    assert pass_steps(prepared) == data.samples(train.sequence) // train.batch > 0
    mix = Mixture(((data.digest, len(data.shards)),), (MixPhase(1, (1,)),))
    assert pass_steps(replace(prepared, dataset=replace(data, mix=mix))) == 0


# --- hours --------------------------------------------------------------------------------------------------


def row(epoch: int, first: tuple[int, float], last: tuple[int, float]) -> AttemptRow:
    points = [Point(step, epoch, at, 3.0, 1.0, 0.0, 0.0) for step, at in (first, last)]
    return AttemptRow(points[0], points[1], 0, 1)


def test_device_hours_and_those_that_were_lost(small: tuple[Store, Prepared]) -> None:
    """Two ranks: an hour of start-up, ten of 10 steps; then half an hour to start again, and two of its steps twice."""
    store, prepared = small
    log = RunLog(store, prepared.run, writer="driver", clock=iter((0.0, 12 * 3600.0, 30 * 3600.0)).__next__)
    state = log.append("attempt", attempt_body(ranks=2), log.fold())
    state = log.append("checkpoint", point_body(8), state, epoch=1)
    body = attempt_body(ranks=2, restore={"checkpoint": 2, "step": 8, "slots": None})
    state = log.append("attempt", body, state)
    began = [a.time for a in state.attempts]
    curve = Curve(
        rows={
            1: row(1, (1, began[0] + 3600), (11, began[0] + 11 * 3600)),
            3: row(3, (9, began[1] + 1800), (19, began[1] + 1800 + 10 * 3600)),
        }
    )
    hours = worked(state.attempts, curve, {})
    assert hours.used == pytest.approx(2 * 11 + 2 * 10.5)
    assert hours.lost == pytest.approx(2 * 1 + 2 * (0.5 + 3))
    ordered = worked(state.attempts, curve, {3: 8})
    assert ordered.lost == pytest.approx(2 * 1 + 2 * 0.5), "what an order left was not lost"
    assert worked(state.attempts, Curve(), {}).used == 0.0


def test_hours_in_which_machines_slept_are_nobody_s(small: tuple[Store, Prepared]) -> None:
    """A laptop is closed for eight hours between two steps of 30 s each, and once more after the last one."""
    store, prepared = small
    log = RunLog(store, prepared.run, writer="driver", clock=lambda: 1000.0)
    state = log.append("attempt", attempt_body(ranks=2), log.fold())
    curve = Curve()
    for step in range(1, 121):
        at = 1000.0 + 30 * step + (8 * 3600 if step > 60 else 0)
        curve.add(line(step, time=at, step_us=30e6), 0)
    assert worked(state.attempts, curve, {}).used == pytest.approx(2.0)
    slow = Curve()  # steps of which some take twice as long are no sleep
    for step in range(1, 61):
        slow.add(line(step, time=1000.0 + 60 * step, step_us=(30 if step % 2 else 90) * 1e6), 0)
    assert worked(state.attempts, slow, {}).used == pytest.approx(2.0)
    prepared = replace(prepared, spec=prepared.spec.model_copy(update={"limits": LimitsSpec(device_hours=3.0)}))
    driver = Driver(prepared, store, Nodes(), lambda *_: None)  # type: ignore[arg-type,return-value]
    store.put(keys.curve_key(prepared.run), curve.to_bytes())
    assert driver._device_hours(state) == pytest.approx(2.0), "of a run whose machines are off since"
