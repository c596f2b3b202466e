"""Persons of a world: what they ask of a run goes through the commands' own functions (``runs order``, ``runs resume``,
``runs fork``), each in a process that may be killed at any of its requests.
"""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Callable

from checkpoint.collect.pins import unpin
from checkpoint.errors import CheckpointError, Conflict, PinRefused, StoreError
from checkpoint.log import RunLog, RunState
from flows.drive.amend import Wish
from flows.drive.fork import fork_run
from flows.drive.orders import Asked, place_order
from flows.drive.run import ask_run
from tests.support.protocol.gate import Gate
from tests.support.protocol.hub import Process
from tests.support.protocol.place import Place
from tests.support.protocol.state import OWNERS
from tests.support.protocol.world import World
from trainer.errors import SpecError

AGAIN_S = 1.0
TRIES = 8
"""Wishes that were refused, until somebody has none any more."""


def ask(world: World, kind: str, after_s: float) -> None:
    """Somebody wants another layout, another How or other numbers, also of a run that has ended. Who is killed while he
    asks does not come again.
    """
    place = world.place
    process = Process(place.hub, "person", "a person")
    world.persons.append(process)
    gate, rng = Gate(place, process), place.hub.rng
    log = RunLog(gate, world.run)

    def order() -> bool:
        state = log.fold()
        if not state.attempts:
            return False
        sets, wish = _sets(kind, rng), _wish(state, world.steps, rng) if kind == "numbers" else Wish()
        again = state.ended is not None
        place_order(gate, ask_run(gate, world.run, sets), Asked("a test", again=again, wish=wish))
        return True

    place.hub.at(after_s, None, lambda: place.hub.spawn(process, "order", lambda: _patiently(place, process, order)))


def _patiently(place: Place, process: Process, work: Callable[[], bool]) -> None:
    for _ in range(TRIES):
        while True:
            try:
                if work():
                    process.kill()
                    return
            except SpecError:
                break
            except (StoreError, Conflict):
                pass
            place.hub.sleep(AGAIN_S)
        place.hub.sleep(AGAIN_S)
    process.kill()


def _sets(kind: str, rng: random.Random) -> list[str]:
    if kind == "layout":
        ranks = rng.choice(tuple(OWNERS))
        return [f"parallel.stages={ranks}", f"launch.nodes={ranks}"]
    if kind == "how":
        return [
            rng.choice(
                ("checkpoint.every=1", "checkpoint.every=3", "checkpoint.keep.last=3", "checkpoint.keep.last=2")
            ),
            f"recovery.on_explosion={rng.choice(('warn', 'skip', 'lower'))}",
        ]
    return []


def _wish(state: RunState, steps: int, rng: random.Random) -> Wish:
    """Numbers, and from where; what cannot be is refused."""
    saved = list(state.restore_candidates())
    late = [p.step for p in saved if any(p.step < q.step and p.n > q.n for q in saved)]
    goes_back = rng.random() < 0.7
    back = rng.choice(late or [c.step for c in [*saved[:1], *saved]] or [0]) if goes_back else None
    start = saved[0].step if back is None and saved else back or 0
    amended, skip, scale, since, total = state.amendments, (), None, None, None
    if rng.random() < 0.5:
        total = max(1, start, amended.total(steps) + rng.choice((-8, -1, 3)))
    if rng.random() < 0.5:
        first = amended.batch(start) + rng.randint(1, 3)
        skip = ((first, first + rng.randrange(3)),)
    if rng.random() < 0.4:
        scale, since = rng.choice((0.25, 0.5, 1.0)), rng.choice((None, start + rng.randint(1, 3)))
    return Wish(back, skip, scale, since, total)


def fork(parent: World, after_s: float) -> None:
    """Somebody forks a run, and comes again until that is done, whatever kills him; a refusal is done with, or mended
    as it says.
    """
    place = parent.place
    rng, log_name = place.hub.rng, parent.run
    place.asking += 1
    step: list[int | None] = []
    sets = [f"name=f{place.asking}", f"train.seed={rng.randrange(2)}", f"train.steps={parent.steps + 6}"]

    def come() -> None:
        process = Process(place.hub, "person", "who forks")
        gate = Gate(place, process)

        def work() -> None:
            while True:
                try:
                    state = RunLog(gate, log_name).fold()
                    if saved := list(state.restore_candidates()):
                        if not step or rng.random() < 0.3:
                            step[:] = [rng.choice((None, rng.choice(saved).step))]
                        fork_run(gate, log_name, step[0], sets)
                        place.asking -= 1
                        process.kill()
                        return
                except PinRefused as error:
                    if named := re.search(r"ckpt unpin (\S+) ([^)\s]+)\)", str(error)):
                        _removed(gate, *named.groups())
                    step.clear()
                except SpecError:
                    step.clear()
                except (StoreError, Conflict):
                    pass
                if place.hub.now > 600.0 and place.asking:
                    place.asking -= 1
                    process.kill()
                    return
                place.hub.sleep(AGAIN_S)

        def again() -> None:
            if process.alive:
                place.hub.at(5.0, None, again)
            elif place.asking:
                come()

        place.hub.spawn(process, "fork", work)
        place.hub.at(5.0, None, again)

    place.hub.at(after_s, None, come)


def _removed(gate: Gate, run: str, name: str) -> None:
    """As the refusal says."""
    with contextlib.suppress(CheckpointError):
        unpin(RunLog(gate, run), name)
