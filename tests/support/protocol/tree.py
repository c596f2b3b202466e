"""An actor's code as a tree: a node is a question to the world, an edge an answer, found by running the code once.

An actor is a function that asks a store, and whatever else it must ask (a wait, the time), through its `Line`; it has
no other source of news, so where it stands is what it has been answered so far.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from greenlet import getcurrent, greenlet

from checkpoint.errors import Damaged, NotFound, StoreUnavailable
from checkpoint.store.base import PAID, Data, Info, fill, ignored
from tests.support.protocol.gate import kind_of

Question = tuple[Any, ...]
"""(verb, key, more...); verbs of the store, and ``until`` (keys: one of them is there), ``tick`` (time passes)."""
Answer = tuple[str, Any]
Objects = Mapping[str, bytes]
Note = tuple[Any, ...]
"""What an actor has come to believe or to do: (word, more...)."""
WRITES = ("create", "create-new", "put", "delete")
"""``create`` answers whether the object is as wanted, ``create-new`` whether it was made by this."""
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

    def read_into(
        self, key: str, out: Sequence[memoryview], *, first: int = 0, filled: Callable[[int], None] = ignored
    ) -> None:
        fill(out, self.get(key, first=first, length=sum(view.nbytes for view in out)), filled)

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

    def delete(self, key: str) -> bool:
        self._ask("delete", key)
        return False

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


def notes_of(node: Node | None) -> list[Note]:
    """All that its actor has noted on the way there."""
    found: list[Note] = []
    while node is not None:
        found[:0] = node.notes
        node = node.above
    return found
