"""Every order of events of a small world, whose actors are the shipped code.

An actor is a function that asks a store, and whatever else it must ask (a choice, a wait), through its `Line`; it has
no other source of news, so where it stands is what it has been answered so far. That makes its code a tree: a node is
a question, an edge an answer. An edge is found by running the code, once; from then on it is a step of a table. A state
of the world is its objects, the node of each actor, the writes that are under way, and what may still go wrong.
`search` visits every state that there is, depth first, each once.

Two questions that cannot change each other's answers need not be asked in both orders. Where an actor's next question
is such against all that any other actor ever asks (`Search.alone`), that actor alone moves (a persistent set; states
have no cycles, because trees have none). What others ever ask is found out by searching until it does not grow.

An actor that dies is one that never moves again, so all that must never be true needs no deaths: every state on the way
is looked at. Deaths are for what must come to be (`Small.final`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from greenlet import getcurrent, greenlet

from checkpoint import keys
from checkpoint.digest import KINDS
from checkpoint.errors import CheckpointError, Damaged, NotFound, StoreUnavailable
from checkpoint.log import Record, RunState
from checkpoint.read import StateReader, load_manifest
from checkpoint.store.base import PAID, Data, Info
from checkpoint.store.memory import MemoryStore, window
from tests.support.protocol.gate import kind_of
from tests.support.protocol.hub import quiet
from tests.support.protocol.state import RUN, TENSORS, truth

Question = tuple[Any, ...]
"""(verb, key, more...); verbs of the store, and ``until`` (keys: one of them is there), ``tick`` (time passes)."""
Answer = tuple[str, Any]
Objects = Mapping[str, bytes]
Note = tuple[Any, ...]
"""What an actor has come to believe or to do: (word, more...)."""
WRITES = ("create", "create-new", "put", "delete")
"""``create`` answers whether the object is as wanted, ``create-new`` whether it was made by this."""
HINTS = ("condensed state", "choice", "status", "address", "collected")
EARLY = (256, 1024, 4096)
"""Steps after which a search that has learnt what else is asked begins again, not only at its end."""
_RAISED: Mapping[str, Callable[[str], Exception]] = {
    "unavailable": lambda text: StoreUnavailable(text),
    "absent": lambda text: NotFound(text, "memory"),
    "damaged": lambda text: Damaged(text),
}


class Leave(BaseException):
    """A run of the code that is not gone on with."""


@contextmanager
def told() -> Iterator[None]:
    """Inside, what the code of an actor takes of the time and of chance is its line's."""
    import checkpoint.collect.pins as pins_module
    import checkpoint.log.run_log as log_module

    class Tokens:
        @staticmethod
        def token_hex(_: int) -> str:
            line = getattr(getcurrent(), "line", None)
            return line.token() if line is not None else "nobody"

    defaults = log_module.RunLog.__init__.__kwdefaults__
    before, modules = dict(defaults), (pins_module, log_module)
    real = [module.secrets for module in modules]
    defaults["clock"] = lambda: 0.0
    for module in modules:
        module.secrets = Tokens  # type: ignore[attr-defined]
    try:
        yield
    finally:
        defaults.update(before)
        for module, secrets in zip(modules, real, strict=True):
            module.secrets = secrets  # type: ignore[attr-defined]


class Line:
    """What an actor has of the world; its ``Store``."""

    pace = PAID
    url = "memory:"

    def __init__(self, ask: Callable[[Question], Answer], name: str) -> None:
        self._question, self.name = ask, name
        self.notes: list[Note] = []
        self.now, self._tokens = 0.0, 0

    # --- beside the store ---------------------------------------------------------------------------------

    def clock(self) -> float:
        return self.now

    def token(self) -> str:
        self._tokens += 1
        return f"{self.name}-{self._tokens}"

    def note(self, *note: Any) -> None:
        self.notes.append(note)

    def until(self, *wanted: str) -> None:
        self._ask("until", "", wanted)

    def tick(self, seconds: float) -> None:
        """Time passes."""
        self._ask("tick", "")
        self.now += max(0.0, seconds)

    # --- the store ----------------------------------------------------------------------------------------

    def describe(self) -> str:
        return "memory"

    def create(self, key: str, data: Data, *, sha256: bytes | None = None) -> bool:
        return bool(self._ask("create", key, bytes(data)))

    def put(self, key: str, data: Data) -> None:
        self._ask("put", key, bytes(data))

    def get(
        self, key: str, *, max_bytes: int | None = None, first: int | None = None, length: int | None = None
    ) -> bytes:
        return bytes(self._ask("get", key, max_bytes, first, length))

    def read_into(self, key: str, out: Sequence[memoryview], *, first: int = 0) -> None:
        data, at = self.get(key, first=first, length=sum(view.nbytes for view in out)), 0
        for view in out:
            view[:] = data[at : at + view.nbytes]
            at += view.nbytes

    def holds(self, key: str, data: Data, *, sha256: bytes) -> bool:
        try:
            return self.get(key) == data
        except NotFound:
            return False

    def limit(self, bytes_per_s: float | None) -> None:
        pass

    def head(self, key: str) -> Info | None:
        found = self._ask("head", key)
        return None if found is None else Info(*found)

    def list(self, prefix: str, start_after: str = "") -> Iterator[Info]:
        return iter([Info(*found) for found in self._ask("list", prefix, start_after)])

    def delete(self, key: str) -> None:
        self._ask("delete", key)

    def local_path(self, key: str) -> None:
        return None

    def ask(self, question: Question) -> Answer:
        return self._question(question)

    def _ask(self, *question: Any) -> Any:
        how, value = self._question(question)
        if how != "ok":
            raise _RAISED[how](f"{question[0]} {question[1]}: {value}")
        return value


Body = Callable[[Line], None]


class Node:
    """Where an actor stands: its question; ``None``: it is done. ``notes``: since the question before."""

    __slots__ = ("_live", "above", "answer", "below", "kind", "notes", "number", "question")

    def __init__(self, number: int, above: Node | None, answer: Answer | None) -> None:
        self.number, self.above, self.answer = number, above, answer
        self.question: Question | None = None
        self.kind = ""
        self.notes: tuple[Note, ...] = ()
        self.below: dict[Answer, Node] = {}
        self._live: greenlet | None = None

    def answers(self) -> list[Answer]:
        found: list[Answer] = []
        node = self
        while node.answer is not None and node.above is not None:
            found.append(node.answer)
            node = node.above
        return found[::-1]


class Actor:
    """An actor's code as a tree of questions and answers."""

    def __init__(self, name: str, body: Body) -> None:
        self.name, self._body = name, body
        self.nodes = self.runs = 0
        self.kept: list[Node] = []
        self.root = self._new(None, None)
        self._begin(self.root)

    def _new(self, above: Node | None, answer: Answer | None) -> Node:
        self.nodes += 1
        return Node(self.nodes, above, answer)

    def _start(self) -> tuple[greenlet, Line]:
        """The code, which gives its first question when it is switched to."""
        self.runs += 1
        main = getcurrent()
        line = Line(lambda question: self._parent(run).switch(question), self.name)

        def work(_: object = None) -> None:
            with contextlib.suppress(Leave):
                self._body(line)

        run = greenlet(work, main)
        run.line = line
        return run, line

    @staticmethod
    def _parent(run: greenlet) -> greenlet:
        assert run.parent is not None
        return run.parent

    def _begin(self, node: Node) -> None:
        run, _ = self._start()
        self._go(run, None, node)

    def _go(self, run: greenlet, answer: Answer | None, node: Node) -> None:
        """Run on with this answer to the next question, which is the node's."""
        question = run.switch(answer)
        line: Line = run.line
        node.notes, line.notes = tuple(line.notes), []
        node.question = None if run.dead else question
        if node.question is not None:
            node.kind = kind_of(node.question[1])
            node._live = run
            self.kept.append(node)

    def after(self, node: Node, answer: Answer) -> Node:
        """Where the actor stands after this answer."""
        below = node.below.get(answer)
        if below is None:
            below = node.below[answer] = self._new(node, answer)
            run, node._live = node._live, None
            if run is None:
                run, line = self._start()
                run.switch(None)
                for earlier in node.answers():
                    run.switch(earlier)
                line.notes = []
            self._go(run, answer, below)
        return below

    def close(self) -> None:
        for node in self.kept:
            if node._live:
                node._live.throw(Leave)
                node._live = None


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
            for actor in one.actors:
                actor.close()
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
            self._deleted(after, write[1])
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

    def _deleted(self, after: _State, key: str) -> None:
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


def notes_of(node: Node | None) -> list[Note]:
    """All that its actor has noted on the way there."""
    found: list[Note] = []
    while node is not None:
        found[:0] = node.notes
        node = node.above
    return found
