"""Orders that change a run's numbers: what can be asked, what cannot and why, and what a driver makes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from checkpoint.amendments import NONE, Amendments
from checkpoint.collect.pins import unpin
from checkpoint.keys import run_key
from checkpoint.log import RunLog, RunState, StartPoint
from checkpoint.store import Data, Store
from checkpoint.store.memory import MemoryStore
from flows.drive.amend import Wish, amend, amended_words
from flows.drive.decide import judge, superseded
from flows.drive.fork import fork_run
from flows.drive.history import give_up, raises, recent, spoken, struck
from flows.drive.line import beginning_of, ordered_back
from flows.drive.orders import Asked, describe, order_of, own_order, place_order
from flows.drive.run import Prepared, fallback_body, fold_view, is_superseded, load_run, ruling_how, run_names
from flows.drive.views import (
    Cause,
    CheckpointView,
    End,
    LogView,
    OrderView,
    OwnOrder,
    Restore,
    StartAttempt,
)
from flows.show.facts import details
from tests.checkpoint.samples import attempt_body, point_body
from tests.flows.drive.decisions import POLICY, attempt, ended
from tests.flows.drive.test_orders import Nodes, driven, small, state_of
from trainer.errors import SpecError
from trainer.failures import Failure
from trainer.spec import RunSpec, how_map, parse_spec

__all__ = ["small"]

RUN = "small-0a1b2c"
BEGINS = StartPoint(None, 0)


def spec_of(**train: Any) -> RunSpec:
    whole = {"steps": 100, "batch": 4, "microbatch": 2, "sequence": 16, **train}
    model = {"family": "gpt2", "layers": 4, "width": 32, "heads": 4, "context": 16}
    return parse_spec({"name": "small", "model": model, "train": whole})


CONSTANT = spec_of(schedule={"kind": "constant"})


def saved(*steps: int, log: RunLog | None = None) -> RunState:
    """A run whose only attempt has saved these steps, in records 2 and on."""
    log = log or RunLog(MemoryStore(), RUN, writer="d")
    state = log.append("attempt", attempt_body(how=how_map(CONSTANT)), log.fold())
    for step in steps:
        state = log.append("checkpoint", point_body(step), state, epoch=1)
    return state


def ordered(state: RunState, wish: Wish, spec: RunSpec = CONSTANT, log: RunLog | None = None) -> dict[str, Any] | None:
    return order_of(state, spec, how_map(spec), Asked("runs order", wish=wish))


# --- what can be asked --------------------------------------------------------------------------------------


def test_an_order_begins_at_the_newest_checkpoint_or_at_the_one_that_it_names() -> None:
    state = saved(10, 20, 30)
    assert amend(state, CONSTANT, Wish(lr_scale=0.5), BEGINS) == (Amendments(rate=((31, 0.5),)), StartPoint(4, 30))
    assert amend(state, CONSTANT, Wish(rollback_to=10, lr_scale=0.5), BEGINS)[1] == StartPoint(2, 10)
    assert amend(state, CONSTANT, Wish(rollback_to=0), BEGINS) == (NONE, StartPoint(None, 0))
    found, _ = amend(state, CONSTANT, Wish(10, ((15, 19), (25, 25)), 0.25, 40, 120), BEGINS)
    assert found == Amendments(120, ((15, 19), (25, 25)), ((40, 0.25),))
    assert amend(saved(), CONSTANT, Wish(skip=((1, 2),)), BEGINS) == (Amendments(skip=((1, 2),)), BEGINS)


@pytest.mark.parametrize(("wish", "says"), [
    (Wish(rollback_to=15), "no usable checkpoint of that step; it can go back to 0, 10, 20, 30"),
    (Wish(rollback_to=40), "no usable checkpoint of that step"),
    (Wish(skip=((0, 3),)), "batches are numbered from 1"),
    (Wish(skip=((40, 35),)), "the first one not above the last"),
    (Wish(skip=((90, 101),)), "ends at step 100, which reads batch 100; take batches up to 100, or more --steps"),
    (Wish(skip=((40, 45), (45, 50))), "--skip 45-50: batch 45 is skipped already; leave that out"),
    (Wish(skip=((25, 35),)), r"goes on from step 30, which has read the batches up to 30; go back .*--rollback-to 20"),
    (Wish(skip=((1, 2),), rollback_to=10), r"batches up to 10; go back before them \(--rollback-to 0\)"),
    (Wish(lr_scale=0.0), "--lr-scale 0: an order lowers the rate; take a number above 0 and at most 1"),
    (Wish(lr_scale=-1.0), "--lr-scale -1: an order lowers the rate"),
    (Wish(lr_scale=1.5), r"--lr-scale 1.5: .* A higher rate is another run: hotstage runs fork"),
    (Wish(lr_scale=float("nan")), "an order lowers the rate"),
    (Wish(from_step=40), "--from-step 40 says from where --lr-scale holds; give that too"),
    (Wish(lr_scale=0.5, from_step=25), r"what it has trained keeps its rate; go back before it \(--rollback-to 20\)"),
    (Wish(lr_scale=0.5, from_step=101), "--from-step 101: the run ends at step 100"),
    (Wish(steps=25), r"the run goes on from step 30: take at least 30, or go back first \(--rollback-to 20\)"),
    (Wish(steps=1 << 41), "take at most 1099511627776"),
])  # fmt: skip
def test_what_cannot_be_is_refused_with_the_limit_and_the_mend(wish: Wish, says: str) -> None:
    with pytest.raises(SpecError, match=says) as refused:
        amend(saved(10, 20, 30), CONSTANT, wish, BEGINS)
    assert refused.value.exit_code == 78


def test_a_step_that_was_given_up_or_is_damaged_is_named_so() -> None:
    log = RunLog(MemoryStore(), RUN, writer="d")
    state = saved(10, 20, 30, log=log)
    state = log.append("tombstone", {"checkpoint": 2}, state)
    state = log.append("damaged", {"checkpoint": 3, "reason": "other bits"}, state)
    with pytest.raises(SpecError, match=r"it was given up to the collector \(log record 5\); it can go back to 0, 30"):
        amend(state, CONSTANT, Wish(rollback_to=10), BEGINS)
    with pytest.raises(SpecError, match=r"it is damaged \(other bits\)"):
        amend(state, CONSTANT, Wish(rollback_to=20), BEGINS)


def test_more_steps_bend_no_curve_that_was_trained_by() -> None:
    cosine = spec_of(schedule={"kind": "cosine"}, optimizer={"lr": 1e-3, "min_lr": 1e-4})
    to_zero = spec_of(schedule={"kind": "cosine"})
    wsd = spec_of(schedule={"kind": "wsd", "decay": 20})
    state = saved(50, 80, 90)
    assert amend(state, cosine, Wish(steps=200), BEGINS)[0] == Amendments(steps=200)
    with pytest.raises(SpecError, match=r"the cosine's rate is 0 from step 100 on .* --set train.steps=200"):
        amend(state, to_zero, Wish(steps=200), BEGINS)
    assert amend(state, to_zero, Wish(steps=95), BEGINS)[0] == Amendments(steps=95)  # sooner, on the same curve
    with pytest.raises(SpecError, match=r"decay of the rate begins after step 80.*step 90; .*\(--rollback-to 80\)"):
        amend(state, wsd, Wish(steps=200), BEGINS)
    assert amend(state, wsd, Wish(80, steps=200), BEGINS) == (Amendments(steps=200), StartPoint(3, 80))
    with pytest.raises(SpecError, match="begins after step 75"):
        amend(state, wsd, Wish(80, steps=95), BEGINS)


def test_what_the_next_order_says_is_the_whole() -> None:
    log = RunLog(MemoryStore(), RUN, writer="d")
    state = saved(10, 20, log=log)
    body = ordered(state, Wish(skip=((30, 34),)))
    assert body is not None
    assert (body["amendments"], body["checkpoint"], body["step"]) == ({"skip": [[30, 34]]}, 3, 20)
    state = log.append("intervention", body, state)
    # of another layout, before anybody follows: where the run goes on stays
    two = parse_spec(CONSTANT.model_dump(mode="json"), ["parallel.stages=2"])
    body = order_of(state, two, how_map(two), Asked("runs resume", again=True))
    assert body is not None
    assert (body["amendments"], body["checkpoint"], body["step"]) == ({"skip": [[30, 34]]}, 3, 20)
    state = log.append("intervention", body, state)
    state = log.append("attempt", attempt_body(3, 20, order=5, how=how_map(two), amendments=body["amendments"]), state)
    # and once somebody does: no other place
    body = order_of(state, CONSTANT, how_map(CONSTANT), Asked("runs resume", again=True))
    assert body is not None
    assert (body["amendments"], "step" in body) == ({"skip": [[30, 34]]}, False)
    with pytest.raises(SpecError, match="batches 32-34 are skipped already"):
        ordered(state, Wish(skip=((32, 36),)))
    assert [o["text"] for o in describe(state)] == [
        "goes on from step 20, skips batches 30-34",
        "goes on from step 20; parallel.stages 1 -> 2; goes on again",
    ]


def test_an_order_opens_a_run_that_had_ended_and_a_repeated_one_is_none() -> None:
    log = RunLog(MemoryStore(), RUN, writer="d")
    state = saved(50, 100, log=log)
    state = log.append("ended", {"outcome": "succeeded", "reason": "", "step": 100, "state_digest": None}, state)
    assert not isinstance(judge(fold_view(state), [], POLICY), StartAttempt)
    assert ordered(state, Wish()) is None
    with pytest.raises(SpecError, match="--from-step 101: the run ends at step 100"):
        ordered(state, Wish(lr_scale=0.5))
    body = ordered(state, Wish(steps=150, lr_scale=0.5))
    assert body is not None
    assert body["again"]
    state = log.append("intervention", body, state)
    longer = replace(POLICY, steps=state.amendments.total(100))
    begun = judge(fold_view(state), [], longer)
    assert isinstance(begun, StartAttempt)
    assert (begun.restore.checkpoint, begun.restore.step) == (3, 100)
    state = log.append("attempt", attempt_body(3, 100, order=5, how=how_map(CONSTANT)), state)
    assert ordered(state, Wish(steps=150)) is None


def test_a_run_that_has_not_begun_is_not_ordered() -> None:
    with pytest.raises(SpecError, match="has not begun"):
        ordered(RunState(RUN), Wish(steps=5))


def test_orders_in_words() -> None:
    before = Amendments(steps=200, skip=((10, 12),), rate=((5, 0.5),))
    after = Amendments(skip=((8, 15),), rate=((5, 0.5), (30, 0.25)))
    told = amended_words(before, after, StartPoint(3, 7), 100)
    assert told == ("goes on from step 7, skips batches 8-9, 13-15, rate x 0.25 from step 30, ends at step 100")
    assert amended_words(before, replace(before, rate=()), None) == "the rate's change at step 5 is taken back"


# --- what a driver makes of it ------------------------------------------------------------------------------


def view(*orders: OrderView, **more: Any) -> LogView:
    points = (CheckpointView(2, 10, 1), CheckpointView(3, 20, 1))
    return LogView(
        **{"attempts": (attempt(1),), "checkpoints": points, "candidates": points[::-1], "orders": orders, **more}
    )


def test_an_order_with_a_place_begins_an_attempt_there_whatever_its_layout() -> None:
    order = OrderView(5, {}, "ann@a (runs order)", start=(2, 10))
    cut = view(order, candidates=(CheckpointView(2, 10, 1),))
    assert superseded(cut)
    decision = judge(cut, [], POLICY)
    assert isinstance(decision, StartAttempt)
    assert (decision.restore.checkpoint, decision.reason) == (2, "ordered by ann@a (runs order)")
    # also where one on the layout alone came after it
    assert superseded(replace(cut, orders=(order, OrderView(6, {}))))
    assert not superseded(replace(cut, attempts=(attempt(1), attempt(7, order=6)), orders=(order, OrderView(6, {}))))


def test_only_an_order_leads_back_to_the_start() -> None:
    order = OrderView(5, {}, start=(None, 0))
    decision = judge(view(order, candidates=()), [], POLICY)
    assert isinstance(decision, StartAttempt)
    assert decision.restore.step == 0
    again = view(order, candidates=(), attempts=(attempt(1), attempt(6, order=5)))
    nodes = [ended(0, epoch=6, signal=9), ended(1, epoch=6, code=75)]
    assert isinstance(judge(again, nodes, POLICY), StartAttempt)  # it has saved nothing yet
    own = (*again.checkpoints, CheckpointView(7, 5, 6))
    assert isinstance(judge(replace(again, checkpoints=own), nodes, POLICY), End)  # what it saved is lost: D7


def test_progress_counts_from_where_an_order_went_back_to() -> None:
    order = OrderView(5, {}, start=(2, 10))
    points = (CheckpointView(2, 10, 1), CheckpointView(3, 20, 1), CheckpointView(4, 30, 1))
    log = view(order, attempts=(attempt(1), attempt(6, order=5, restore_step=10)), checkpoints=points)
    assert raises(log) == [1, 2, 3, 4]
    log = replace(log, checkpoints=(*points, CheckpointView(7, 15, 6)))
    assert raises(log) == [1, 2, 3, 4, 7]  # behind what the run had been at before the order, and further all the same
    later = (*log.attempts, attempt(8, order=5, restore_step=15, cause={"class": "signal", "step": 17}))
    assert len(recent(replace(log, attempts=later))) == 1


DIVERGED = {"step": 27, "why": "step 27: loss nan"}
SKIPS = replace(POLICY, skips_diverged=True)


def diverged(log: LogView, words: dict[str, Any] | None = None) -> Any:
    epoch = log.attempts[-1].epoch
    nodes = [ended(n, epoch=epoch, step=26, code=87, words=DIVERGED if words is None else words) for n in range(2)]
    return judge(log, nodes, SKIPS)


def test_numbers_that_diverge_twice_at_a_step_are_passed_over() -> None:  # D10
    once = diverged(view())
    assert isinstance(once, StartAttempt)  # a machine's fault would not come again
    cause = {"class": "numeric", "step": 26}
    twice = view(attempts=(attempt(1), attempt(4, restore_checkpoint=3, restore_step=20, cause=cause)))
    assert isinstance(
        judge(twice, [ended(n, epoch=4, step=26, code=87, words=DIVERGED) for n in range(2)], POLICY), End
    )
    decision = diverged(twice)
    assert isinstance(decision, OwnOrder)
    assert (decision.start, decision.amendments.skip) == ((3, 20), ((21, 27),))
    assert decision.cause.cls == Failure.NUMERIC
    # batches that an order had skipped before are of no step
    decision = diverged(replace(twice, amendments=Amendments(skip=((10, 12), (24, 24)))))
    assert decision.amendments.skip == ((10, 12), (24, 31))
    assert isinstance(diverged(twice, {"why": "no step"}), End)
    assert isinstance(diverged(twice, {"step": 20}), End)


def test_it_does_so_a_few_times_since_a_persons_word() -> None:  # D10
    own = tuple(OrderView(n, {}, start=(3, 20), own=True) for n in (5, 7, 9))
    cause = {"class": "numeric", "step": 26}
    attempts = (attempt(1), attempt(10, order=9), attempt(11, order=9, restore_step=20, cause=cause))
    log = view(*own, attempts=attempts)
    decision = diverged(log)
    assert isinstance(decision, End)
    assert "to skip batches, 3 times (recovery.max_skips), did not help" in decision.reason
    assert isinstance(diverged(replace(log, orders=own[1:])), OwnOrder)
    spoken_to = replace(log, orders=(*own, OrderView(9, {}, "ann")))
    assert isinstance(diverged(spoken_to), OwnOrder)


def test_the_drivers_own_order_is_no_persons_word() -> None:
    own = OrderView(4, {}, start=(2, 10), own=True)
    cause = {"class": "sick", "place": "m1", "step": 3}
    log = view(own, attempts=(attempt(1), attempt(3, cause=cause)))
    assert spoken(log) == 0
    assert struck(log, 2) == {"m1"}
    assert struck(replace(log, orders=(replace(own, own=False),)), 2) == frozenset()
    # what failed before it counts no more all the same: it is about other batches now
    numeric = {"class": "numeric", "step": 26}
    log = view(own, attempts=(attempt(1), attempt(3, cause=numeric), attempt(5, order=4, restore_step=10)))
    assert give_up(log, Cause(Failure.NUMERIC, "", step=26), SKIPS) is None


# --- one driver, and the log that it writes -----------------------------------------------------------------


def test_a_driver_follows_an_order_on_numbers_in_the_launch_that_it_has(small: tuple[Store, Prepared]) -> None:
    store, prepared = small
    driven(store, prepared, nodes := Nodes())
    log = RunLog(store, prepared.run, writer="agent")
    state = log.fold()
    for step in (1, 2):
        state = log.append("checkpoint", point_body(step), state, epoch=1)
    place_order(store, prepared, Asked("runs order", wish=Wish(1, ((2, 2),), 0.5, None, 3)))
    _, told = driven(store, prepared, nodes)
    state = state_of(store, prepared)
    newest = state.attempts[-1]
    assert newest.amendments == Amendments(3, ((2, 2),), ((2, 0.5),)) == state.amendments
    assert (newest.checkpoint, newest.step, newest.launch) == (2, 1, state.attempts[0].launch)
    assert newest.plan == state.attempts[0].plan  # the plan does not know of it
    assert ordered_back(state) == [(newest.epoch, 1)]
    (text,) = [str(e.facts["text"]) for e in told if e.facts.get("phase") == "order"]
    assert "goes on from step 1, skips batch 2, rate x 0.5 from step 2, ends at step 3" in text
    (began,) = [e.facts for e in told if e.kind == "attempt"]
    assert (began["steps"], began["back"]) == (3, True)
    assert driven(store, prepared, nodes)[0].outcome == "stopped"
    assert state_of(store, prepared).n == state.n  # nobody asked for more
    # its last step is the order's
    log.append("checkpoint", point_body(3, newest.epoch), state, epoch=newest.epoch)
    nodes.ensured.clear()
    assert driven(store, prepared, nodes)[0].outcome == "succeeded"


def test_the_drivers_own_order_is_for_the_layout_that_there_is(small: tuple[Store, Prepared]) -> None:
    """And a person's for the one that was asked for."""
    store, prepared = small
    log = RunLog(store, prepared.run, writer="driver")
    wide = how_map(parse_spec(prepared.spec.model_dump(mode="json"), ["parallel.stages=2"]))
    state = log.append("attempt", attempt_body(how=wide), log.fold())
    fewer = attempt_body(how=how_map(prepared.spec), fallback={"kind": "capacity", "why": "no room"})
    state = log.append("attempt", fewer, state)
    skip = OwnOrder((None, 0), Amendments(skip=((1, 3),)), Cause(Failure.NUMERIC, "not finite", step=2))
    state = log.append("intervention", own_order(state, skip), state)
    assert is_superseded(state)
    assert ruling_how(state) == how_map(prepared.spec)
    assert fallback_body(state, StartAttempt(Restore(None, 0), (), "ordered")) == {"kind": "capacity", "why": "no room"}
    (told,) = describe(state)
    assert (told["by"], told["amends"]) == ("the driver", "goes on from step 0, skips batches 1-3")
    assert told["text"].endswith("; because not finite")
    body = order_of(state, prepared.spec, how_map(prepared.spec), Asked("runs order", again=True, wish=Wish(steps=3)))
    assert body is not None
    assert (body["amendments"], body["step"]) == ({"skip": [[1, 3]], "steps": 3}, 0)
    person = {**body, "how": wide}
    assert ruling_how(log.append("intervention", person, state)) == wide


def test_a_fork_takes_its_parents_amendments_along(small: tuple[Store, Prepared]) -> None:
    store, prepared = small
    driven(store, prepared, nodes := Nodes())
    log = RunLog(store, prepared.run, writer="agent")
    log.append("checkpoint", point_body(1), log.fold(), epoch=1)
    place_order(store, prepared, Asked("runs order", wish=Wish(skip=((2, 2),), lr_scale=0.5, steps=3)))
    driven(store, prepared, nodes)
    name = prepared.run.rsplit("-", 1)[1]

    def child(*sets: str) -> tuple[Prepared, RunState]:
        made = fork_run(store, prepared.run, 1, [f"name={name}", *sets])
        return made, RunLog(store, made.run).fold()

    made, state = child()
    assert made.spec.train.steps == 3
    assert made.spec.train.schedule.decay == prepared.spec.train.steps  # on the parent's curve
    assert state.amendments == Amendments(0, ((2, 2),), ((2, 0.5),))
    assert child("train.seed=9")[1].amendments == Amendments(rate=((2, 0.5),))
    assert child("train.optimizer.lr=1e-4")[1].amendments == Amendments(skip=((2, 2),))
    assert child("train.seed=8", "train.optimizer.lr=1e-4")[1].amendments == NONE
    driven(store, load_run(store, made.run), Nodes())
    (newest,) = RunLog(store, made.run).fold().attempts
    assert (newest.amendments, newest.step) == (state.amendments, 1)
    assert [a["from"] for a in details(store, made.run)["attempts_list"]] == ["checkpoint"]


def test_a_fork_goes_back_to_its_parent_only_where_that_is_still_there(small: tuple[Store, Prepared]) -> None:
    """It left what it had saved, and then found nothing to begin from."""
    store, prepared = small
    driven(store, prepared, Nodes())
    log = RunLog(store, prepared.run, writer="agent")
    log.append("checkpoint", point_body(1), log.fold(), epoch=1)
    made = fork_run(store, prepared.run, 1, ["name=back"])
    driven(store, load_run(store, made.run), Nodes())
    child = RunLog(store, made.run, writer="agent")
    state = child.fold()
    state = child.append("checkpoint", point_body(2, state.epoch), state, epoch=state.epoch)
    back = Asked("runs resume", again=True, wish=Wish(rollback_to=1))
    with pytest.raises(SpecError, match=r"begins from step 1 of .*, whose checkpoint is not there .*go back to 2$"):
        place_order(store, load_run(store, made.run), back)  # the record is: its objects are not
    store.create(run_key(prepared.run, point_body(1)["manifest"]), b"there")
    place_order(store, load_run(store, made.run), back)
    unpin(log, f"fork-{made.run}")
    log.transact(lambda known: ("tombstone", {"checkpoint": 2}) if not known.buried else None)
    again = replace(back, wish=Wish(rollback_to=1, steps=3))
    with pytest.raises(SpecError, match=rf"was given up to the collector \(log record \d+ of {prepared.run}\)"):
        place_order(store, load_run(store, made.run), again)
    with pytest.raises(SpecError, match=r"has no usable checkpoint on its line; it has none"):
        fork_run(store, prepared.run, None, ["name=other"])


def test_a_fork_is_listed_once_its_log_says_from_where_it_begins(
    small: tuple[Store, Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was killed before that was resumed from step 0, with weights that nobody had trained."""
    store, prepared = small
    driven(store, prepared, Nodes())
    log = RunLog(store, prepared.run, writer="agent")
    log.append("checkpoint", point_body(1), log.fold(), epoch=1)
    create = store.create

    def dies(key: str, data: Data, **more: Any) -> bool:
        if "/log/" in key and prepared.run not in key:
            raise KeyboardInterrupt
        return create(key, data, **more)

    with monkeypatch.context() as patched:
        patched.setattr(store, "create", dies)
        with pytest.raises(KeyboardInterrupt):
            fork_run(store, prepared.run, 1, ["name=child"])
    assert not any(run.startswith("child-") for run in run_names(store))
    log.append("checkpoint", point_body(2), log.fold(), epoch=1)
    made = fork_run(store, prepared.run, None, ["name=child"])  # that of step 1 is pinned for it
    assert made.run in run_names(store)
    assert beginning_of(RunLog(store, made.run).fold()) == StartPoint(None, 1)
    with pytest.raises(SpecError, match="is there already, a fork of step 1"):  # it has begun: from there alone
        fork_run(store, prepared.run, None, ["name=child"])
