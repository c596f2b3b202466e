"""Where buffers lie in a slot: those of a run of stages that outlive a program or meet a message, for one microbatch.

A slot is taken when a microbatch arrives and free when all of its programs are done. In between, buffers whose lives
do not meet share bytes. The order that counts: activation received, forwards up the run, activation sent; gradient
received, backwards (or input gradients) down the run. Weight gradients that are put off, and the send of a gradient,
may come at any time after: what they read lives to the end.

What lives across the turn, from a forward to a backward, is stacked: what lives longest lies lowest. So the room that
backward gains is one piece at the top of the stack, and what backward makes grows down into it from the slot's end.
Where all of that lives to the end (it does, but for a gradient that a stage below takes over), no smaller slot is
possible.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from trainer.models.base import Call, View
from trainer.plan.expand import StagePrograms
from trainer.plan.memory import align
from trainer.plan.places import Stage

Name = tuple[Stage, str]
"""A buffer, by its stage and its name there."""
END = 1 << 62
"""When a slot is free again."""


@dataclass(slots=True)
class BufferLife:
    """Of a buffer, from its first to its last use; the programs that use it, and whether a message does."""

    first: int
    last: int
    users: set[tuple[Stage, str]]
    message: bool = False

    @property
    def outlives(self) -> bool:
        """Whether it must lie in a slot."""
        return self.message or len(self.users) > 1


@dataclass(frozen=True)
class SlotLayout:
    """What of a run lies where in its slot, and the slot's bytes."""

    offsets: Mapping[Name, int]
    bytes: int


class _Run:
    """The lives of a run's buffers."""

    def __init__(
        self, run: Sequence[Stage], stages: Mapping[Stage, StagePrograms], elsewhere: Collection[Name]
    ) -> None:
        self.stages, self.elsewhere = {number: stages[number] for number in run}, elsewhere
        self.lives: dict[Name, BufferLife] = {}
        self.now = 0
        bottom, top = self.stages[run[0]], self.stages[run[-1]]
        self._message(run[0], bottom.received, False)
        for number in run:
            self._calls(number, "F", self.stages[number].forward)
        self._message(run[-1], top.sent, False)
        self.turn = self.now
        self._message(run[-1], top.gradient_received, True)
        for number in reversed(run):
            self._calls(number, "I", self.stages[number].backward)
        self.now = END
        for number in run:
            self._calls(number, "W", self.stages[number].weights)
        self._message(run[0], bottom.gradient_sent, True)

    def owner(self, number: Stage, name: str, backward: bool) -> Name:
        """Stages of a run pass nothing on: the second reads what the first made where it lies, and back alike."""
        stage = self.stages[number]
        above, below = self.stages.get(Stage(number + 1)), self.stages.get(Stage(number - 1))
        left, made = None if above is None else above.gradient_sent, None if below is None else below.sent
        taken = stage.gradient_received
        if backward and left is not None and taken is not None and name == taken.buffer:
            return self.owner(Stage(number + 1), left.buffer, True)
        if made is not None and stage.received is not None and name == stage.received.buffer:
            return Stage(number - 1), made.buffer
        return number, name

    def _use(self, name: Name) -> BufferLife:
        life = self.lives.setdefault(name, BufferLife(self.now, self.now, set()))
        life.last = self.now
        return life

    def _calls(self, number: Stage, op: str, calls: Sequence[Call]) -> None:
        for call in calls:
            for view in call.views():
                self._use(self.owner(number, view.buffer, op != "F")).users.add((number, op))
            self.now += op != "W"

    def _message(self, number: Stage, view: View | None, backward: bool) -> None:
        if view is not None and (number, view.buffer) not in self.elsewhere:
            self._use(self.owner(number, view.buffer, backward)).message = True
        self.now += self.now < END

    def names(self) -> list[Name]:
        """What lies in the slot, in the stages' order."""
        listed = ((number, name) for number, stage in self.stages.items() for name in stage.buffers)
        return [n for n in listed if n in self.lives and n not in self.elsewhere and self.lives[n].outlives]


def lay_out(
    run: Sequence[Stage],
    stages: Mapping[Stage, StagePrograms],
    size: Callable[[Name], int],
    elsewhere: Collection[Name] = (),
) -> SlotLayout:
    """The slot of a run; ``elsewhere``: buffers of it that have a place outside of slots."""
    found = _Run(run, stages, elsewhere)
    kept = [name for name in found.names() if found.lives[name].first <= found.turn]
    made = [name for name in found.names() if found.lives[name].first > found.turn]
    if made:
        kept.sort(key=lambda name: -found.lives[name].last)
    offsets: dict[Name, int] = {}
    end = 0
    ends = [0]
    for name in kept:
        offsets[name] = end
        end += align(size(name))
        ends.append(end)
    leave = [-found.lives[name].last for name in kept]  # ascending, where anything is made later
    depth = 0
    depths = []
    for name in sorted(made, key=lambda name: found.lives[name].first):
        depth += align(size(name))
        depths.append((name, depth))
        stacked = ends[bisect_right(leave, -found.lives[name].first)]
        end = max(end, stacked + depth)
    offsets |= {name: end - depth for name, depth in depths}
    return SlotLayout(offsets, end)
