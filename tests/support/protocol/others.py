"""Who else meets the logs and checkpoints of runs: the collector of a store, and one who reads a checkpoint for
long under a pin.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from checkpoint.collect.pins import pinned
from checkpoint.digest import KINDS
from checkpoint.errors import CheckpointError, Damaged, PinRefused, StoreError
from checkpoint.log import RunLog
from checkpoint.read import StateReader, load_manifest
from flows.drive.collecting import collect_runs
from flows.drive.run import run_names
from tests.support.protocol.gate import Gate
from tests.support.protocol.hub import Process
from tests.support.protocol.state import TENSORS, truth

if TYPE_CHECKING:
    from tests.support.protocol.place import Place
    from tests.support.protocol.world import World

PASS_S = 5.0


class Collector(Process):
    """The shipped passes over all runs, again and again."""

    def __init__(self, place: Place) -> None:
        super().__init__(place.hub, "collector", "collector")
        self.gate = Gate(place, self)
        self.hub.spawn(self, "pass", self._loop)

    def _loop(self) -> None:
        while True:
            with contextlib.suppress(CheckpointError):  # the next pass goes on
                list(collect_runs(self.gate, run_names(self.gate)))
            self.hub.sleep(PASS_S)


class Reader(Process):
    """Pins a checkpoint, reads all of it, slowly, and takes the pin away."""

    def __init__(self, world: World) -> None:
        super().__init__(world.hub, "reader", "reader")
        self.world, self.gate = world, Gate(world.place, self, world)
        self.hub.spawn(self, "read", self._loop)

    def _loop(self) -> None:
        while True:
            with contextlib.suppress(StoreError, PinRefused):
                self._read()
            self.hub.sleep(5.0)

    def _read(self) -> None:
        run = self.world.run
        state = RunLog(self.gate, run).fold()
        candidates = state.restore_candidates()
        if not candidates:
            return
        info = self.hub.rng.choice(list(candidates))
        with pinned(self.gate, run, info, "read") as held:
            if held is None:
                return
            try:
                course = self.world.course_of(state, info)
                reader = StateReader(self.gate, load_manifest(self.gate, run, info))
                for number, tensor in enumerate(TENSORS):
                    for kind in range(len(KINDS)):
                        if bytes(reader.read(tensor.name, kind)) != truth(number, kind, info.step, course):
                            self.world.silent(f"a reader finds record {info.n} wrong")
                    self.hub.sleep(2.0 + 20.0 * self.hub.rng.random())
            except Damaged as error:
                if info.n not in self.world.spoilt:
                    self.world.found["unloadable"].append(f"a reader that has pinned record {info.n}: {error}")
