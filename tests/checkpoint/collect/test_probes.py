"""What probing a store leaves: gone a day later, by the store's clock; the marks that spare it the next probe stay."""

from __future__ import annotations

from checkpoint.collect.probes import OLD_S, sweep_probes
from checkpoint.probe import ensure_probed, probe
from tests.support.small_checkpoints import Clock, Watched


def test_probes_go_a_day_later_and_their_marks_stay() -> None:
    clock = Clock()
    store = Watched(clock)
    ensure_probed(store)
    old = [info.key for info in store.list("probe/") if "passed-" not in info.key]
    (mark,) = {info.key for info in store.list("probe/")} - set(old)
    store.create("probe/doctor-0123456789abcdef/x", b"1")
    mine = ["probe/notes/a", "probe/doctor-mine/b", "probe/0123456789abcdeg/0000"]
    for key in mine:
        store.create(key, b"mine")
    clock.now += OLD_S / 2
    probe(store, rounds=1)
    new = [
        info.key for info in store.list("probe/") if info.key not in {*old, *mine, mark} and "doctor" not in info.key
    ]
    assert sweep_probes(store, clock.now, 1000) == 0
    clock.now += OLD_S / 2 + 1
    assert sweep_probes(store, clock.now, 1000, dry_run=True) == len(old) + 1
    assert sweep_probes(store, clock.now, 2) == 2
    assert sweep_probes(store, clock.now, 1000) == len(old) - 1
    assert {info.key for info in store.list("probe/")} == {mark, *mine, *new}
    store.requests = 0
    ensure_probed(store)
    assert store.requests == 1
