"""Text by the engine that trained the model: a text that grows token by token, by the model or by a person.

Nothing is kept of one token's computation for the next: each is one pass over the window. So the window is as short as
the text allows, and grows with it, up to the run's sequence; older text is forgotten then.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from types import TracebackType

import numpy as np
import numpy.typing as npt

from checkpoint.store import Store
from flows.data import load_tokenizer, unseen
from flows.data.chat_form import form_beside
from flows.data.sources.talk import ChatForm, Message, written
from flows.data.tokenizer import of_library
from flows.drive.hf_beside import beside_with_talk, ends_of
from flows.show.export import Inference, Masters, opening
from trainer.errors import SpecError

log = logging.getLogger(__name__)

SHORTEST = 32
"""Tokens of the first window."""
_BEFORE = 4
"""Tokens that are decoded before new ones: whether a word begins with a blank depends on them."""


class Text:
    """A text that grows. Temperature 0 takes the likeliest token; the same seed and texts give the same ones.

    Use as a context manager. ``ids``: all of it; the newest ``context`` of them are what the model sees.
    """

    def __init__(
        self,
        store: Store,
        run: str,
        step: int | None = None,
        *,
        temperature: float = 0.8,
        top_k: int = 40,
        seed: int = 0,
    ) -> None:
        self._store, self._run = store, run
        self.masters = Masters(store, run, step)
        dataset = self.masters.prepared.dataset
        self.context = self.masters.prepared.spec.train.sequence
        self.tokenizer = load_tokenizer(store, dataset)
        beside = beside_with_talk(store, run, dataset.digest)
        self.ends, self.vocab = ends_of(beside, self.tokenizer, dataset.eot), dataset.vocab
        self._form = functools.partial(form_beside, beside, self.tokenizer, dataset.eot, dataset.begin)
        self.ids: list[int] = []
        self._opening = opening(self.masters.prepared.spec.model, self.tokenizer, dataset.begin)
        self._temperature, self._top_k, self._rng = temperature, top_k, np.random.default_rng(seed)
        self._engine: Inference | None = None
        self._shown = self._from = 0
        self._told: set[str] = set()

    def __enter__(self) -> Text:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._engine is not None:
            self._engine.__exit__(None, None, None)
        self.masters.close()

    def _tell_unseen(self, text: str) -> None:
        lost, unknown = unseen(self.tokenizer, text)
        new = [letter for letter in lost if letter not in self._told]
        self._told |= set(new)
        if new:
            log.warning(
                "the model does not see %s of the prompt: its tokenizer has nothing for it",
                ", ".join(map(repr, new[:5])) + (f" and {len(new) - 5} more characters" if len(new) > 5 else ""),
            )
        if unknown:
            log.warning("the model sees %d characters of the prompt as its unknown token alone", unknown)

    @property
    def forgotten(self) -> int:
        """Tokens that the model does not see any more."""
        return max(0, len(self.ids) - self.context)

    def say(self, text: str) -> None:
        """Add a person's text. SpecError where it is none."""
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise SpecError(
                "the prompt is not text in UTF-8; write it in the terminal's encoding, or set LC_ALL=C.UTF-8"
            )
        with of_library("the tokenizer of the model cannot encode this text", "write it in characters that it knows"):
            said = list(self.tokenizer.encode(text, add_special_tokens=False).ids)
        begins = said[: len(self._opening)] == self._opening  # a prompt as it stands in the data may have it already
        self.ids += said if self.ids or begins else self._opening + said
        self._tell_unseen(text)
        self._shown = len(self.ids)
        self._from = max(0, self._shown - _BEFORE)

    @functools.cached_property
    def form(self) -> ChatForm | None:
        """How talks are written for the model; None where nobody says it. DatasetError where its template is none."""
        return self._form()

    def ask(self, messages: Sequence[Message]) -> None:
        """Begin anew with these messages, by the model's form, up to where an answer begins. DatasetError where that
        does not write them."""
        assert self.form is not None
        self.begin()
        self.say(written(self.form, messages, lambda: "the talk", asks=True))

    def begin(self) -> None:
        """Forget all of it."""
        self.ids.clear()
        self._shown = self._from = 0

    def grow(self) -> int:
        """Add the model's next token, and give it."""
        if not self.ids:
            self.ids += self._opening or self.ends[:1] or [0]
            self._shown = self._from = len(self.ids)
        window = self.ids[-self.context :]
        engine = self._engine_for(len(window))
        padded = np.zeros(engine.context, dtype=np.int32)
        padded[: len(window)] = window
        row = engine.logits(padded)[len(window) - 1, : self.vocab].astype(np.float64)
        self.ids.append(pick(row, self._temperature, self._top_k, self._rng))
        return self.ids[-1]

    def answer(self, tokens: int) -> Iterator[str]:
        """What the model adds, in pieces as they are sure, an empty one where a token gives no whole character yet; up
        to so many tokens, or the end of a text."""
        for _ in range(tokens):
            if self.grow() in self.ends:
                return
            yield self._grown()

    def _grown(self) -> str:
        """The text that came since the last piece: a character may need several tokens, and a token those before it."""
        before = self.tokenizer.decode(self.ids[self._from : self._shown], skip_special_tokens=True)
        now = self.tokenizer.decode(self.ids[self._from :], skip_special_tokens=True)
        if now.endswith("\ufffd") and len(self.ids) - self._shown < 4:  # a character has four bytes at most
            return ""
        self._from, self._shown = self._shown, len(self.ids)
        return str(now[len(before) :])

    def _engine_for(self, tokens: int) -> Inference:
        """The engine for a window that holds so many tokens."""
        if self._engine is None or self._engine.context < tokens:
            window = SHORTEST
            while window < tokens:
                window *= 2
            if self._engine is not None:
                self._engine.__exit__(None, None, None)
            size = min(window, self.context)
            self._engine = Inference(self._store, self._run, window=size, masters=self.masters)
        return self._engine


def generate(
    store: Store,
    run: str,
    prompt: str,
    *,
    tokens: int = 120,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
    step: int | None = None,
    stopped: Sequence[object] = (),
) -> str:
    """Continue a text. Temperature 0 takes the likeliest token; the same seed gives the same text. It ends sooner where
    ``stopped`` comes to hold something."""
    with Text(store, run, step, temperature=temperature, top_k=top_k, seed=seed) as text:
        text.say(prompt)
        if text.forgotten:
            log.warning(
                "the prompt has %d tokens, and the model sees the newest %d of them alone: its run's train.sequence",
                len(text.ids),
                text.context,
            )
        for _ in text.answer(tokens):
            if stopped:
                break
        return str(text.tokenizer.decode(text.ids, skip_special_tokens=True))


def pick(row: npt.NDArray[np.float64], temperature: float, top_k: int, rng: np.random.Generator) -> int:
    """One token from a row of logits."""
    if temperature <= 0:
        return int(row.argmax())
    best = np.argsort(row)[-max(1, min(top_k, len(row))) :]
    with np.errstate(over="ignore"):  # of a temperature of next to nothing: what is not the best has weight 0
        weights = np.exp((row[best] - row[best].max()) / temperature)
    return int(rng.choice(best, p=weights / weights.sum()))
