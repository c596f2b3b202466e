"""Every order of events of a small world, whose actors are the shipped code.

The code of each actor is a tree of questions and answers (`tree.py`): a step of a search is a step of a table, but for
the first time that it is made, when the code is run. A state of the world is its objects, the node of each actor, the
writes that are under way, and what may still go wrong. `search` visits every state that there is, depth first, once.

Two questions that cannot change each other's answers need not be asked in both orders. Where an actor's next question
is such against all that any other actor ever asks (`Search.alone`), that actor alone moves (a persistent set; states
have no cycles, because trees have none). What others ever ask is found out by searching until it does not grow.

An actor that dies is one that never moves again, so all that must never be true needs no deaths: every state on the way
is looked at. Deaths are for what must come to be (`Small.final`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from checkpoint import keys
from checkpoint.digest import KINDS
from checkpoint.errors import CheckpointError, Damaged
from checkpoint.log import Record, RunState
from checkpoint.read import StateReader, load_manifest
from checkpoint.store.memory import MemoryStore, window
from tests.support.protocol.gate import kind_of
from tests.support.protocol.hub import quiet
from tests.support.protocol.state import RUN, TENSORS, truth
from tests.support.protocol.tree import WRITES, Actor, Answer, Body, Node, Note, Objects, Question, notes_of, told

HINTS = ("condensed state", "choice", "status", "address", "collected")
EARLY = (256, 1024, 4096)
"""Steps after which a search that has learnt what else is asked begins again, not only at its end."""


@dataclass(frozen=True)
class Budget:
    """How often each may go wrong: no answer and not done; done and no answer; no answer and done later; a death.

    ``graces``: how often the store's clock moves on by more than the grace of a collector. Nobody may be reading then
    without a pin (between the notes ``reads`` and ``read``): that a read takes no longer is taken for granted.
    """

    fails: int = 0
    losses: int = 0
    lates: int = 0
    deaths: int = 0
    graces: int = 0


@dataclass(frozen=True)
class Small:
    """A small world. ``final``: what must be true once nothing can happen any more, given the log, what its actors
    noted, and whether anything went wrong; an empty text, or why not.
    """

    name: str
    actors: Mapping[str, Body]
    objects: Objects
    budget: Budget = field(default_factory=Budget)
    final: Callable[[End], str] = lambda end: ""


@dataclass(frozen=True)
class End:
    log: RunState
    objects: Objects
    notes: Mapping[str, tuple[Note, ...]]
    left: Budget
    dead: frozenset[str]
    blocked: frozenset[str]


class Violation(Exception):
    """With the way that led there."""


Left = tuple[int, int, int, int, int]
"""Of the budget, in its order."""


@dataclass(slots=True)
class _State:
    objects: dict[str, bytes]
    seen: frozenset[tuple[str, bytes]]
    nodes: tuple[Node | None, ...]
    floating: frozenset[tuple[str, str, bytes]]
    left: Left
    log: RunState
    times: frozenset[tuple[str, int]] = frozenset()
    """Graces that had passed when each was written, of the objects whose age counts."""


@dataclass
class Found:
    """What a search came to."""

    name: str
    states: int = 0
    steps: int = 0
    nodes: int = 0
    runs: int = 0
    ends: int = 0
    last: set[Any] = field(default_factory=set, repr=False)
    """What was in the store at each end, and what its actors had come to believe."""
    seconds: float = 0.0
    violation: str | None = None
    way: list[str] = field(default_factory=list)

    def line(self) -> str:
        told = (
            f"{self.name}: {self.states:,} states, {self.steps:,} steps, {self.ends:,} ends; {self.nodes:,} nodes of "
        )
        return f"{told}code in {self.runs:,} runs; {self.seconds:.1f} s" + (
            f"; {self.violation}" if self.violation else ""
        )


def search(small: Small, most: int = 5_000_000, *, reduced: bool = True) -> Found:
    """Every state of the world, or the first that must not be. ``reduced``: questions that cannot change each other's
    answers are asked in one order; the ends are the same without.
    """
    began = time.perf_counter()
    with quiet(), told():
        one = Search(small, most, reduced=reduced)
        try:
            while (found := one.run()) is None:
                pass
        finally:
            one.close()
    found.nodes, found.runs = sum(a.nodes for a in one.actors), sum(a.runs for a in one.actors)
    found.seconds = time.perf_counter() - began
    return found


@dataclass(frozen=True)
class _Asked:
    """Keys, and prefixes of listings."""

    reads: frozenset[str]
    writes: frozenset[str]
    deletes: frozenset[str]
    lists: frozenset[str]


class Search:
    def __init__(self, small: Small, most: int, *, reduced: bool = True) -> None:
        self.small, self.most, self.reduced = small, most, reduced
        self.names = tuple(small.actors)
        self.actors = [Actor(name, body) for name, body in small.actors.items()]
        self.asked: set[tuple[int, str, str]] = set()
        """(actor, verb, key) of every question that came up."""
        self._folds: dict[tuple[int, bytes], RunState] = {}
        self._whole: dict[Any, str] = {}
        self._keep: list[RunState] = []
        self._prefixes: dict[bytes, bytes] = {}
        self._sets: dict[frozenset[tuple[str, bytes]], int] = {}
        self._more = False
        self._others: dict[tuple[int, tuple[bool, ...]], _Asked] = {}

    def run(self) -> Found | None:
        """None where it came out that an actor asks more than was known: what is left out by that may be wrong."""
        found, small = Found(self.small.name), self.small
        objects, log = dict(small.objects), RunState(RUN)
        for key in sorted(objects):
            if key.startswith(keys.log_prefix(RUN)):
                log = self._fold(log, objects[key])
        budget = small.budget
        first = _State(
            objects, frozenset(objects.items()), tuple(actor.root for actor in self.actors), frozenset(),
            (budget.fails, budget.losses, budget.lates, budget.deaths, budget.graces), log,
        )  # fmt: skip
        seen = {self._key(first)}
        stack: list[tuple[_State, Iterator[tuple[str, _State]]]] = [(first, self._steps(first))]
        way: list[str] = []
        try:
            for state in [first]:
                self._note_all(state)
            while stack:
                state, steps = stack[-1]
                step = next(steps, None)
                if step is None:
                    stack.pop()
                    if way:
                        way.pop()
                    continue
                if self._more and found.steps in EARLY:
                    self._more = False
                    return None
                found.steps += 1
                text, after = step
                key = self._key(after)
                if key in seen:
                    continue
                seen.add(key)
                if len(seen) > self.most:
                    raise Violation(f"more than {self.most} states")
                way.append(text)
                stack.append((after, self._steps(after)))
                if not self._moves(after):
                    found.ends += 1
                    found.last.add(self._final(after))
        except Violation as violation:
            found.violation = str(violation)
            found.way = [*way, *([self._last] if self._last not in way[-1:] else [])]
        found.states = len(seen)
        if self._more and found.violation is None:
            self._more = False
            return None
        return found

    def close(self) -> None:
        """No code of an actor goes on, and what it had opened is closed."""
        from tests.support.protocol.small import OPENED

        for actor in self.actors:
            actor.close()
        while OPENED:
            OPENED.pop().close()

    _last = ""

    def _key(self, state: _State) -> Any:
        """Equal for equal states, of this search; small."""
        objects = self._sets.setdefault(state.seen, len(self._sets))
        nodes = tuple(0 if node is None else node.number for node in state.nodes)
        return objects, nodes, state.floating, state.left, state.times

    # --- steps --------------------------------------------------------------------------------------------

    def _enabled(self, state: _State, number: int) -> bool:
        node = state.nodes[number]
        if node is None or node.question is None:
            return False
        return node.question[0] != "until" or any(key in state.objects for key in node.question[2])

    def _moves(self, state: _State) -> bool:
        return bool(state.floating) or any(self._enabled(state, i) for i in range(len(self.actors)))

    def _steps(self, state: _State) -> Iterator[tuple[str, _State]]:
        enabled = [i for i in range(len(self.actors)) if self._enabled(state, i)]
        for i in enabled:
            node = state.nodes[i]
            assert node is not None
            assert node.question is not None
            asked = i, node.question[0], node.question[1]
            if asked not in self.asked:
                self.asked.add(asked)
                self._others.clear()
                self._more = True
        one = next((i for i in enabled if self.alone(state, i)), None) if self.reduced else None
        for i in enabled if one is None else [one]:
            yield from self._moves_of(state, i)
        if one is None:
            for write in sorted(state.floating):
                self._last = f"lands: {write[0]} {write[1]}"
                objects, _ = self._apply(state.objects, write)
                yield self._last, self._with(state, objects, state.nodes, state.floating - {write}, state.left, write)
            if state.left[4] and not any(self._reads(node) for node in state.nodes):
                self._last = "the grace passes"
                left = (*state.left[:4], state.left[4] - 1)
                yield self._last, self._with(state, state.objects, state.nodes, state.floating, left, None)

    def alone(self, state: _State, number: int) -> bool:
        """Whether no other actor, nor a write under way, can ever change this answer, or is changed by it."""
        node = state.nodes[number]
        assert node is not None
        assert node.question is not None
        verb, key = node.question[:2]
        if verb == "tick":
            return True
        others = self._asked_by_others(state, number)
        if verb == "until":  # one that has come to an end stays so
            return not any(k in others.deletes for k in node.question[2])
        if verb == "list":
            return not any(k.startswith(key) for k in others.writes) and not state.floating
        there = key in state.objects
        if verb in ("get", "head", "create", "create-new") and there and node.kind not in HINTS:
            return key not in others.deletes
        if any(write[1] == key for write in state.floating) or key in others.writes:
            return False
        if verb in ("get", "head"):
            return True
        # names of these are known to others by a listing, or once something names them that is written later
        named = verb in ("create", "create-new") and node.kind in ("chunk", "part", "group's part", "manifest", "page")
        if verb == "delete" or (verb == "put" and node.kind == "collected" and state.left[4]):
            return False
        return (named or key not in others.reads) and not any(key.startswith(p) for p in others.lists)

    def _asked_by_others(self, state: _State, number: int) -> _Asked:
        """What actors that are not at their end ever ask."""
        lives = tuple(self._lives(state, i) for i in range(len(self.actors)))
        found = self._others.get((number, lives))
        if found is None:
            theirs = [(verb, key) for i, verb, key in self.asked if i != number and lives[i]]
            found = self._others[number, lives] = _Asked(
                frozenset(key for verb, key in theirs if verb in ("get", "head")),
                frozenset(key for verb, key in theirs if verb in WRITES),
                frozenset(key for verb, key in theirs if verb == "delete"),
                frozenset(key for verb, key in theirs if verb == "list"),
            )
        return found

    @staticmethod
    def _reads(node: Node | None) -> bool:
        words = [note[0] for note in notes_of(node) if note[0] in ("reads", "read")]
        return words[-1:] == ["reads"]

    def _lives(self, state: _State, number: int) -> bool:
        node = state.nodes[number]
        return node is not None and node.question is not None

    def _moves_of(self, state: _State, number: int) -> Iterator[tuple[str, _State]]:
        node, name = state.nodes[number], self.names[number]
        assert node is not None
        question = node.question
        assert question is not None
        verb, key = question[:2]
        told = f"{name}: {verb} {key.removeprefix(f'runs/{RUN}/')}".rstrip()
        fails, losses, lates, deaths, graces = state.left
        writes = verb in WRITES
        objects, answer = self._apply(state.objects, question, state.times)
        yield self._answered(
            state, number, answer, objects, state.floating, state.left, told, question if writes else None
        )
        if verb in ("until", "tick"):
            return
        gone: Answer = ("unavailable", "no answer")
        if fails:
            left = (fails - 1, losses, lates, deaths, graces)
            yield self._answered(state, number, gone, state.objects, state.floating, left, f"{told} FAILS", None)
        if losses and writes:
            left = (fails, losses - 1, lates, deaths, graces)
            yield self._answered(state, number, gone, objects, state.floating, left, f"{told} ANSWER LOST", question)
        if lates and verb in ("create", "create-new"):
            left = (fails, losses, lates - 1, deaths, graces)
            floating = state.floating | {(verb, key, question[2])}
            yield self._answered(state, number, gone, state.objects, floating, left, f"{told} IS LATE", None)
        if deaths:
            left = (fails, losses, lates, deaths - 1, graces)
            nodes = (*state.nodes[:number], None, *state.nodes[number + 1 :])
            self._last = f"{name}: DIES"
            yield self._last, self._with(state, state.objects, nodes, state.floating, left, None)

    def _answered(
        self, state: _State, number: int, answer: Answer, objects: dict[str, bytes],
        floating: frozenset[tuple[str, str, bytes]], left: Left, told: str,
        write: Question | None,
    ) -> tuple[str, _State]:  # fmt: skip
        node = state.nodes[number]
        assert node is not None
        self._last = told
        below = self.actors[number].after(node, answer)
        nodes = (*state.nodes[:number], below, *state.nodes[number + 1 :])
        after = self._with(state, objects, nodes, floating, left, write)
        for note in below.notes:
            self._note(after, self.names[number], note)
        return told, after

    def _with(
        self, state: _State, objects: dict[str, bytes], nodes: tuple[Node | None, ...],
        floating: frozenset[tuple[str, str, bytes]], left: Left, write: Question | None,
    ) -> _State:  # fmt: skip
        if objects is state.objects:
            return _State(objects, state.seen, nodes, floating, left, state.log, state.times)
        assert write is not None
        times, key = state.times, write[1]
        if self.small.budget.graces and kind_of(key) in ("record", "collected"):
            times = frozenset({(k, at) for k, at in times if k != key} | {(key, self.small.budget.graces - left[4])})
        after = _State(objects, frozenset(objects.items()), nodes, floating, left, state.log, times)
        if write[0] in ("create", "create-new"):
            self._wrote(state, after, write[1])
        elif write[0] == "delete":
            self._deleted(after)
        return after

    @staticmethod
    def _apply(
        objects: dict[str, bytes], question: Question, times: frozenset[tuple[str, int]] = frozenset()
    ) -> tuple[dict[str, bytes], Answer]:
        """As ``MemoryStore`` answers."""
        verb, key = question[:2]
        data = objects.get(key)
        match verb:
            case "create" if data is not None:
                return objects, ("ok", data == question[2])
            case "create-new" if data is not None:
                return objects, ("ok", False)
            case "create" | "create-new" | "put":
                return {**objects, key: question[2]}, ("ok", True)
            case "delete" if data is not None:
                return {k: v for k, v in objects.items() if k != key}, ("ok", None)
            case "get" if data is None:
                return objects, ("absent", "")
            case "get":
                most, first, length = question[2:]
                try:
                    begin, size = window(key, len(data), most, first, length)
                except Damaged as error:
                    return objects, ("damaged", str(error))
                return objects, ("ok", data[begin : begin + size])
            case "head":
                at = next((1000.0 * n for k, n in times if k == key), 0.0)
                return objects, ("ok", None if data is None else (key, len(data), at))
            case "list":
                names = sorted(k for k in objects if k.startswith(key) and k > question[2])
                return objects, ("ok", tuple((k, len(objects[k]), 0.0) for k in names))
        return objects, ("ok", None)

    # --- what must hold -----------------------------------------------------------------------------------

    def _fold(self, log: RunState, data: bytes) -> RunState:
        found = self._folds.get((id(log), data))
        if found is None:
            self._keep.append(log)
            found = self._folds[id(log), data] = log.apply(Record.parse(data, log.n + 1))
        return found

    def _wrote(self, before: _State, after: _State, key: str) -> None:
        """A new object has landed."""
        if not key.startswith(keys.log_prefix(RUN)):
            return
        n, log = int(key.rpartition("/")[2]), before.log
        if n != log.n + 1:
            raise Violation(f"log record {n} comes after record {log.n}")
        after.log = self._fold(log, after.objects[key])
        kind = Record.parse(after.objects[key], n).kind
        if kind == "attempt":
            best, attempt = log.restore_candidates()[:1], after.log.attempts[-1]
            if best and attempt.step < best[0].step:
                raise Violation(f"attempt {n} begins at step {attempt.step}, and step {best[0].step} was saved: lost")
        elif kind == "checkpoint" and (info := after.log.checkpoint(n)) is not None:
            if info.epoch != log.epoch:
                raise Violation(f"record {n} is of attempt {info.epoch}, which attempt {log.epoch} has fenced")
            self._check(after, n)
        elif kind == "damaged":
            raise Violation(f"record {n} marks a checkpoint damaged that is not")

    def _deleted(self, after: _State) -> None:
        for info in after.log.checkpoints:
            newest = after.log.newest_attempt
            named = newest is not None and newest.checkpoint == info.n
            if after.log.usable(info) or named or info.n in after.log.pins.values():
                self._check(after, info.n)

    def _check(self, state: _State, n: int) -> None:
        """The checkpoint of this record is whole, and the state of its step."""
        folders = tuple(keys.run_key(RUN, folder) for folder in ("chunks/", "manifests/"))
        mine = frozenset(item for item in state.seen if item[0].startswith(folders))
        info = state.log.checkpoint(n)
        assert info is not None
        key = mine, info.sha256, info.step
        if key not in self._whole:
            store = MemoryStore()
            store._objects = state.objects  # it is only read
            self._whole[key] = ""
            try:
                reader = StateReader(store, load_manifest(store, RUN, info))
                for number, tensor in enumerate(TENSORS):
                    for kind in range(len(KINDS)):
                        if bytes(reader.read(tensor.name, kind)) != truth(number, kind, info.step):
                            self._whole[key] = f"tensor {tensor.name} is not that of step {info.step}"
            except CheckpointError as error:
                self._whole[key] = str(error)
        if self._whole[key]:
            raise Violation(f"record {n} names a checkpoint that does not load: {self._whole[key]}")

    def _note_all(self, state: _State) -> None:
        for name, node in zip(self.names, state.nodes, strict=True):
            assert node is not None
            for note in node.notes:
                self._note(state, name, note)

    def _note(self, state: _State, name: str, note: Note) -> None:
        match note:
            case ("told", step, epoch):
                if state.log.find(step, epoch) is None:
                    raise Violation(f"{name} tells its ranks that step {step} of attempt {epoch} is safe; it is not")
            case ("acts", n, launch):
                mine = state.log.attempt(n)
                if mine is None or mine.launch != launch:
                    raise Violation(f"{name} acts on attempt {n} of {launch}, which is not in the log")
            case ("starts", epoch, node, place):
                for other, held in zip(self.names, state.nodes, strict=True):
                    for theirs in notes_of(held):
                        if theirs[:3] == ("starts", epoch, node) and theirs[3] != place:
                            raise Violation(f"node {node} of attempt {epoch} runs on two hosts, {name} and {other}")
            case ("begins", epoch, step, why):
                if why:
                    raise Violation(f"{name} begins attempt {epoch} at step {step} with a wrong state: {why}")
            case ("folded", n, unreadable, data):
                if unreadable or data != self._prefix(state, n):
                    raise Violation(f"{name} reads the log up to record {n} otherwise than it is: {unreadable}")
            case ("wrong", why):
                raise Violation(f"{name}: {why}")

    def _prefix(self, state: _State, n: int) -> bytes:
        """The bytes of the state after record ``n``, record by record."""
        key = state.objects.get(keys.log_key(RUN, n), b"")
        if key not in self._prefixes:
            log = RunState(RUN)
            for number in range(1, n + 1):
                log = log.apply(Record.parse(state.objects[keys.log_key(RUN, number)], number))
            self._prefixes[key] = log.to_bytes()
        return self._prefixes[key]

    def _final(self, state: _State) -> Any:
        blocked = {
            name for name, node in zip(self.names, state.nodes, strict=True) if node is not None and node.question
        }
        dead = {name for name, node in zip(self.names, state.nodes, strict=True) if node is None}
        notes = {name: tuple(notes_of(node)) for name, node in zip(self.names, state.nodes, strict=True)}
        end = End(state.log, state.objects, notes, Budget(*state.left), frozenset(dead), frozenset(blocked))
        if why := self.small.final(end):
            self._last = "nothing can happen any more"
            raise Violation(why)
        return state.seen, tuple(sorted((name, told) for name, told in notes.items()))
