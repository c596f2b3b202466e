"""Who drives a run, as its drivers tell it, and what is made of that."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoint import codec
from checkpoint.errors import StoreUnavailable
from checkpoint.keys import driver_key
from checkpoint.store import MemoryStore
from checkpoint.store.base import Data
from flows.drive.driving import BEAT_S, SILENT_S, STOPPED, DriverNote, Driving, Ears
from flows.drive.reconcile import EVERY_S
from trainer.local_launch import ProcessMark

RUN = "told-0a1b2c"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def put(store: MemoryStore, told: DriverNote) -> None:
    store.put(driver_key(RUN, told.token), told.to_bytes())


def told(token: str, **more: object) -> DriverNote:
    base = DriverNote(token, "elsewhere", "boot", "space", 7, 8, "/out")
    return replace(base, **more)  # type: ignore[arg-type]


def test_a_driver_of_this_process_is_heard_and_its_leaving_too() -> None:
    store, clock = MemoryStore(), Clock()
    driving, ears = Driving(store, RUN, Path("out"), clock=clock), Ears(store, RUN, clock)
    assert not ears.listen().driven
    driving.beat(3)
    word = ears.listen()
    assert word.driven
    assert word.newest is not None
    assert (word.newest.n, word.newest.out, word.newest.here) == (3, str(Path("out").absolute()), True)
    clock.now += 10 * SILENT_S  # its process is there: nobody waits for its beats
    assert ears.listen().driven
    driving.leave("succeeded")
    driving.leave(STOPPED)  # the first word stays
    word = ears.listen()
    assert (word.driven, word.stopped, word.gone, word.newest and word.newest.left) == (False, False, (), "succeeded")


def test_another_terminal_s_stop_is_heard_whatever_the_clock_says() -> None:
    """Which may have gone back an hour meanwhile: the log says what was later."""
    store = MemoryStore()
    driving = Driving(store, RUN, Path("out"))
    driving.beat(5)
    put(store, told("before", left=STOPPED, n=4, at=4e9))
    assert driving.stopped_beside(3) is None
    put(store, told("since", left=STOPPED, n=6, at=1.0))
    assert driving.stopped_beside(7) is None, "an older attempt"
    assert (found := driving.stopped_beside(6)) is not None
    assert found.token == "since"


def test_beats_are_few_and_a_new_page_is_told_at_once() -> None:
    store, clock, page = MemoryStore(), Clock(), ["", ""]
    driving = Driving(store, RUN, Path("out"), lambda: (page[0], page[1]), clock)
    for _ in range(10):
        driving.beat(1)
        clock.now += BEAT_S / 8
    assert driving.told.seq == 2
    page[:] = ["http://prefect/api", "a-flow-run"]
    driving.beat(1)
    found = DriverNote.parse("x", store.get(driver_key(RUN, driving.told.token)))
    assert found is not None
    assert (found.seq, found.api, found.flow_run) == (3, "http://prefect/api", "a-flow-run")


def test_a_process_of_this_machine_that_was_killed_is_gone_at_once() -> None:
    store = MemoryStore()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    mark = ProcessMark.of(child.pid)
    assert mark is not None
    here = replace(DriverNote.of_process(Path("out")), pid=mark.pid, started=mark.started)
    put(store, here)
    ears = Ears(store, RUN)
    assert ears.listen().driven
    child.kill()
    child.wait()
    word = ears.listen()
    assert (word.driven, word.gone) == (False, (here,))
    put(store, replace(here, pid=DriverNote.of_process(Path()).pid))  # another process has its number now
    assert not ears.listen().driven


def test_one_of_another_machine_is_gone_after_silence_by_the_lookers_own_clock() -> None:
    store, clock = MemoryStore(), Clock()
    ears, other = Ears(store, RUN, clock), told("a")
    for beat in range(5):
        put(store, replace(other, seq=beat, at=-1e9 * beat))  # its own clock says nothing
        assert ears.listen().driven
        clock.now += SILENT_S - 0.5
        assert ears.listen().driven
    died, looks = clock.now, 0
    put(store, replace(other, seq=5))
    while ears.listen().driven:
        clock.now += EVERY_S
        looks += 1
    assert clock.now - died <= 15.0
    assert looks < 6


def test_the_last_word_counts() -> None:
    """A run that a person stopped stays so, until somebody drives it again."""
    store = MemoryStore()
    put(store, told("a", n=4, at=10.0, boot="", left=""))  # was killed
    put(store, told("b", n=6, at=20.0, left=STOPPED))
    clock = Clock()
    ears = Ears(store, RUN, clock)
    ears.listen()
    clock.now += SILENT_S
    assert (ears.listen().stopped, ears.listen().driven) == (True, False)
    put(store, told("c", n=6, at=30.0))
    assert ears.listen().driven
    clock.now += SILENT_S
    word = ears.listen()
    assert (word.stopped, word.driven) == (False, False)
    assert [t.token for t in word.gone] == ["a", "c"]


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff" * 40, codec.pack_hint([1]), codec.pack_hint({"v": 2}), codec.pack_hint({"v": 1, "host": 3}),
     codec.pack_hint({**codec.unpack_hint(told("x").to_bytes(), "", max_bytes=1 << 14), "pid": -1}),
     codec.pack_hint({**codec.unpack_hint(told("x").to_bytes(), "", max_bytes=1 << 14), "at": "now"})],
)  # fmt: skip
def test_a_word_that_does_not_hold_is_none(data: bytes) -> None:
    store = MemoryStore()
    store.put(driver_key(RUN, "x"), data)
    word = Ears(store, RUN).listen()
    assert (word.driven, word.stopped, word.newest) == (False, False, None)


def test_a_store_that_is_away_hinders_no_driver() -> None:
    class Away(MemoryStore):
        def put(self, key: str, data: Data) -> None:
            raise StoreUnavailable("away")

    driving = Driving(Away(), RUN, Path("out"))
    driving.beat(1)
    driving.leave(STOPPED)
    assert driving.told.left == STOPPED
