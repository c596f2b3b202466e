"""The collector: what goes and stays, when, and what a pass costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from checkpoint import keys
from checkpoint.agent.commit import commit
from checkpoint.collect.collector import KEPT_OUTPUTS, PassLimits, collect
from checkpoint.collect.pins import pin
from checkpoint.errors import Halted, OtherVersion, StoreRefused
from checkpoint.log import RunLog
from checkpoint.store import Info
from checkpoint.store.memory import MemoryStore
from checkpoint.verify import verify_run
from tests.checkpoint.collect.world import GRACE_S, KEEP, PLAN, RULES, World
from tests.checkpoint.samples import attempt_body, point_body
from tests.support.long_log import long_log
from tests.support.small_checkpoints import RUN, Clock, Watched, names, upload, whole


def test_what_no_rule_keeps_goes_after_the_grace_and_the_rest_is_whole() -> None:
    world = World().saved(10, 20, 30, 40, 50)
    size = sum(info.bytes for info in world.store.list("runs/"))
    report = world.collect()
    assert [info.step for info in report.given_up] == [10, 20, 30]
    assert (report.objects, len(world.points)) == (0, 5)
    assert report.kept == dict.fromkeys((5, 6), "one of the newest 2")
    report = world.late(GRACE_S / 2).collect()
    assert [(s.step, s.wait_s) for s in report.waiting] == [(10, 51.0), (20, 51.0), (30, 51.0)]
    report = world.late(51).collect()
    assert [(s.step, s.objects, s.why) for s in report.deleted] == [(step, 5, "given up") for step in (10, 20, 30)]
    assert world.points == [(40, 1), (50, 1)]
    assert sum(info.bytes for info in world.store.list("runs/")) < size - report.bytes + 2000
    assert {p.key for p in verify_run(world.store, RUN, "full").problems} == {keys.spec_key(RUN), PLAN}  # it has none
    world.check()
    report = world.late().collect()
    assert (report.given_up, report.deleted, report.waiting, report.unknowns) == ([], [], [], 0)


def test_without_rules_everything_stays_but_what_dead_attempts_left() -> None:
    world = World({"parallel": {"stages": 2}}).saved(10, 20, 30)
    upload(world.store, RUN, 40, 1, 0, 2)
    world.again().saved(40).late(4000)
    report = world.collect()
    assert report.given_up == []
    assert [(s.step, s.epoch, s.why) for s in report.deleted] == [(40, 1, "its attempt ended before it was committed")]
    assert world.points == [(10, 1), (20, 1), (30, 1), (40, 5)]
    assert world.collect(rules=RULES).given_up != []  # a person's rules, for this pass


def test_the_living_attempts_uploads_stay_until_two_newer_ones_are_there() -> None:
    world = World().saved(10)
    for step in (15, 25):
        upload(world.store, RUN, step, 1, 0, 2)
    world.saved(20).late(10_000)
    assert world.collect().abandoned == []
    world.saved(30).late(10_000)
    assert world.collect().abandoned == [(15, 1)]
    assert (15, 1) in world.points  # the grace begins with its tombstone
    report = world.late().collect()
    assert [(s.step, s.why) for s in report.deleted] == [(10, "given up"), (15, "never committed")]
    assert (25, 1) in world.points
    world.check()


def test_a_commit_after_its_step_was_given_up_is_void_and_ends() -> None:
    world = World()
    for node in range(2):
        upload(world.store, RUN, 5, 1, node, 2)
    before = world.log.fold()
    world.saved(10, 20)
    assert world.collect().abandoned == [(5, 1)]
    with pytest.raises(Halted, match="step 5 was given up by the collector"):
        commit(world.log, 2, 5, 1, before)  # an agent that was away meanwhile
    state = world.log.fold()
    assert state.find(5, 1) is None
    state = world.log.append("checkpoint", point_body(5), state, epoch=1)  # one that does not look
    assert (state.find(5, 1), state.void[-1].step) == (None, 5)
    world.late().collect()
    assert (5, 1) not in world.points
    assert RunLog(world.store, RUN).fold(quick=True) == state
    world.again()
    assert not world.state.abandoned  # the newer attempt is the fence


def test_an_older_hotstage_does_not_go_on_with_a_log_that_gives_up_a_step() -> None:
    """It would take the late commit for a checkpoint."""
    world = World()
    upload(world.store, RUN, 5, 1, 0, 2)
    world.saved(10, 20).collect()
    record = next(r for r in world.log.records() if r.kind == "tombstone")
    assert (record.v, dict(record.body)) == (2, {"step": 5, "epoch": 1})
    world.saved(30).collect()
    assert [r.v for r in world.log.records() if r.kind == "tombstone"] == [2, 1]  # step 10 is given up as ever


def test_when_the_run_has_ended_what_was_never_committed_goes_too() -> None:
    world = World().saved(10)
    upload(world.store, RUN, 20, 1, 0, 2)
    world.log.append("ended", {"outcome": "cancelled", "reason": "", "step": 10, "state_digest": None}, world.state)
    assert world.collect().abandoned == []
    assert world.late().collect().abandoned == [(20, 1)]
    world.late().collect()
    assert world.points == [(10, 1)]


def test_the_collector_knows_every_name_that_a_checkpoint_has() -> None:
    known = [
        keys.chunk_name(10, 3, 1 << 20, "1a2b3c", 7), keys.part_name(10, 3, 1 << 20), keys.group_name(10, 3, 45),
        keys.manifest_name(10, 3), keys.page_name(keys.manifest_name(10, 3), "all", 2),
        keys.page_name(keys.part_name(10, 3, 4), "00004-1a2b3c", 2),
    ]  # fmt: skip
    assert [keys.point_of(name) for name in known] == [(10, 3)] * len(known)
    assert keys.point_of(keys.chunk_name(10**12, 10**8, 1, "i", 7)) == (10**12, 10**8)
    for name in ("chunks/0000000000010-00000003/000000-i1-000000", known[0] + "/x", known[3] + "s"):
        assert keys.point_of(name) is None


def test_what_is_not_known_is_told_and_stays() -> None:
    world = World().saved(10, 20, 30)
    mine = [
        "chunks/notes.txt", "chunks/000000000010-00000001/my-copy", "manifests/000000000010-00000001/manifest.bak",
        "chunks/10-1/000000-i1-000000", "chunks/000000000010-00000099/000000-i1-000000", "backup/a", "chunks2/b",
    ]  # fmt: skip
    for name in mine:
        world.store.create(keys.run_key(RUN, name), b"mine")
    world.collect()
    report = world.late().collect()
    assert [s.step for s in report.deleted] == [10]
    assert set(mine) <= set(names(world.store, RUN))
    assert (report.unknowns, sorted(report.unknown)) == (5, sorted(mine[:5]))
    assert world.points == [(10, 99), (20, 1), (30, 1)]


def test_of_a_run_without_a_log_nothing_is_deleted_or_made_anew() -> None:
    """Its folder was renamed: made anew, it could not be renamed back."""
    store = MemoryStore()
    assert collect(store, RUN).unknowns == 0
    store.create(there := keys.run_key(RUN, keys.chunk_name(10, 1, 0, "i1", 0)), b"x")
    assert collect(store, RUN).unknowns == 1
    assert [info.key for info in store.list("")] == [there]


def test_pins_and_the_newest_attempt_hold_what_the_rules_would_give_up() -> None:
    world = World().saved(10, 20, 30, 40)
    info = world.state.at_step(10)
    assert info is not None
    pin(world.log, info, "mine")
    world.again().saved(50, 60)  # from step 40
    for _ in range(3):
        world.late().collect()
    assert world.points == [(10, 1), (40, 1), (50, 7), (60, 7)]
    world.log.append("unpin", {"name": "mine"}, world.log.fold())
    world.again()
    for _ in range(3):
        world.late().collect()
    assert world.points == [(50, 7), (60, 7)]
    world.check()


def test_nothing_is_given_up_where_a_newest_one_is_not_whole() -> None:
    world = World().saved(10, 20, 30, 40)
    chunk = next(n for n in names(world.store, RUN, "chunks/") if keys.point_of(n) == (40, 1))
    world.store.delete(keys.run_key(RUN, chunk))
    report = world.collect()
    assert report.given_up == []
    assert report.refused.startswith(f"the checkpoint of step 40 stays, but its object {chunk} is gone or cut short")
    world.log.append("damaged", {"checkpoint": 5, "reason": "gone"}, world.log.fold())
    report = world.collect()
    assert (report.refused, [i.step for i in report.given_up]) == ("", [10, 40])  # 20 and 30 are the newest sound ones


def test_a_store_that_tells_no_times_deletes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World().saved(10, 20, 30)
    for verb in ("head", "list"):
        monkeypatch.setattr(world.store, verb, _timeless(getattr(world.store, verb)))
    for _ in range(2):
        with pytest.raises(StoreRefused, match="does not say when objects were written"):
            world.late().collect()
    assert len(world.points) == 3
    assert not world.log.fold().buried


def _timeless(call: Callable[..., Any]) -> Callable[..., Any]:
    def without(found: Info | None) -> Info | None:
        return None if found is None else replace(found, modified=None)

    def asked(*given: Any, **more: Any) -> Any:
        found = call(*given, **more)
        return without(found) if found is None or isinstance(found, Info) else iter([without(i) for i in found])

    return asked


def test_the_stores_clock_counts_and_nobody_elses() -> None:
    """The driver's clock is a year ahead, the collector's a year behind."""
    world = World()
    world.log = RunLog(world.store, RUN, writer="driver", clock=lambda: world.clock.now + 3e7)
    world.saved(10, 20, 30).collect()
    assert world.collect().deleted == []
    assert [s.step for s in world.late().collect().deleted] == [10]


def test_a_pass_has_limits_and_the_next_one_goes_on() -> None:
    world = World().saved(*range(10, 130, 10))
    report = world.collect(limits=PassLimits(tombstones=4))
    assert ([i.step for i in report.given_up], report.more) == ([10, 20, 30, 40], True)
    world.collect()
    passes = 0
    while len(world.points) > 2:
        report = world.late().collect(limits=PassLimits(objects=7))
        assert report.objects <= 7
        assert report.more == (len(world.points) > 2)
        world.check()
        passes += 1
    assert passes == 8  # 50 objects


def test_a_dry_run_writes_nothing_and_tells_what_would_go() -> None:
    world = World().saved(10, 20, 30)
    upload(world.store, RUN, 40, 1, 0, 2)
    world.again().saved(40, 50).late()
    before = dict(world.store._objects)
    told = world.collect(dry_run=True)
    assert world.store._objects == before
    done = world.collect()
    assert [i.step for i in told.given_up] == [i.step for i in done.given_up] == [10, 20]
    assert told.kept == done.kept
    assert [(s.step, s.epoch) for s in done.deleted] == [(40, 1)]
    assert {(s.step, s.epoch) for s in [*told.deleted, *told.waiting]} == {(40, 1)}  # how late it is it cannot ask


def test_a_log_that_cannot_be_read_and_rules_that_are_not_known_stop_it() -> None:
    world = World({**KEEP, "checkpoint": {"keep": {"last": 2, "per_moon": 1}}}).saved(10, 20, 30)
    with pytest.raises(Exception, match="has the rule 'per_moon', which this version does not know"):
        world.collect()
    world = World().saved(10, 20, 30)
    world.store.create(keys.log_key(RUN, 5), b"torn")
    report = world.late().collect()
    assert "nothing is deleted beside a log that cannot be read" in report.refused
    assert len(world.points) == 3
    newer = World().saved(10, 20, 30)
    record = newer.log.read(4)
    newer.store._objects[keys.log_key(RUN, 5)] = _newer(replace(record, n=5))
    with pytest.raises(OtherVersion):
        newer.collect()


def _newer(record: Any) -> bytes:
    from checkpoint import codec

    value = codec.unseal(record.to_bytes(), "record", max_bytes=1 << 16)
    return codec.seal({**value, "v": 99}, codec.RECORD_DEPTH)


def test_output_of_old_attempts_goes_and_their_metrics_stay() -> None:
    world = World()
    for number in range(KEPT_OUTPUTS + 3):
        epoch = world.state.epoch
        for name in ("logs/0/00", "logs/1/00", "trace/0", "metrics/0000000000", "node/0"):
            world.store.put(keys.live_key(RUN, epoch, *name.split("/")), b"x" * 100)
        world.saved(10 * number + 10).again()
    report = world.late().collect()
    old = [s for s in report.deleted if s.step < 0]
    epochs = [a.epoch for a in world.state.attempts]
    assert [s.epoch for s in old] == epochs[: len(epochs) - KEPT_OUTPUTS]
    assert [s.objects for s in old] == [3] * len(old)
    left = names(world.store, RUN, "live/")
    assert sum("/logs/" in n for n in left) == 2 * (KEPT_OUTPUTS - 1)
    assert sum("/metrics/" in n or "/node/" in n for n in left) == 2 * (KEPT_OUTPUTS + 3)
    asked: list[str] = []
    world.store.before = lambda verb, key: asked.append(key) if verb == "list" else None
    world.collect()
    assert not [key for key in asked if "/logs/" in key]  # it knows how far it came


def test_a_pass_costs_what_is_there_and_not_what_ever_was() -> None:
    """Requests of a pass with nothing to do, after a hundred and after four thousand checkpoints."""

    def requests(each: int) -> int:
        store = Watched(Clock())
        body = {**attempt_body(), "how": KEEP}
        state = long_log(store, RUN, 4, each, lambda n, step: {**body, "restore": _restore(n, step)})
        for number, info in enumerate(state.checkpoints[:-2], state.n + 1):
            state = replace(state, buried={**state.buried, info.n: number}) if number < state.n + 3 else state
        store.requests = 0
        collect(store, RUN, state=replace(state, buried={c.n: c.n for c in state.checkpoints[:-2]}))
        return store.requests

    assert requests(1000) <= requests(25) + 2


def _restore(n: int | None, step: int) -> dict[str, Any]:
    return {"checkpoint": n, "step": step, "slots": None}


def test_its_hint_is_a_map_that_people_can_read() -> None:
    from checkpoint import codec

    world = World().saved(10, 20, 30)
    world.collect()
    world.late().collect()
    raw = world.store.get(keys.collected_key(RUN))
    found = codec.unpack_hint(raw, "hint", max_bytes=1000)
    assert json.loads(json.dumps(found)) == {"v": 1, "outputs_before": 0, "objects": 5, "bytes": found["bytes"]}


def test_what_is_collected_while_a_run_is_verified_is_no_damage() -> None:
    world = World().saved(10, 20, 30)

    def gone(verb: str, key: str) -> None:
        if verb == "get" and "/chunks/" in key:
            world.store.before = lambda _verb, _key: None
            for _ in range(2):
                world.late().collect()

    world.store.before = gone
    report = verify_run(world.store, RUN, "full")
    assert {p.key for p in report.problems} == {keys.spec_key(RUN), PLAN}
    assert report.checkpoints == 2
    world.store.delete(keys.run_key(RUN, keys.manifest_name(30, 1)))
    assert keys.run_key(RUN, keys.manifest_name(30, 1)) in {p.key for p in verify_run(world.store, RUN).problems}


def test_a_checkpoint_from_which_an_attempt_begins_all_the_same_stays() -> None:
    """No driver of this version does it; one that did, between tombstone and deletion, would lose nothing (C4)."""
    world = World().saved(10, 20, 30)
    world.collect()
    world.late()

    def begin_anyway(verb: str, key: str) -> None:
        if verb == "put":  # the pass looks at the clock: it has seen the log and the listing
            world.store.before = lambda _verb, _key: None
            body = {**attempt_body(), "how": KEEP, "restore": _restore(2, 10)}
            world.log.append("attempt", body, world.log.fold())

    world.store.before = begin_anyway
    assert collect(world.store, RUN).deleted == []
    info = world.log.fold().checkpoint(2)
    assert info is not None
    assert not whole(world.store, RUN, info)
