"""Conversations: a record's messages become a text by the chat template of the tokenizer, and each answer counts once.

A template is Jinja with what transformers gives it, and outside input: it runs in a sandbox, in a bounded number of
steps, and whatever it raises is told with the record. What of the text is an answer is found by

- the template's own ``{% generation %}`` blocks, where it has some; else
- what the template writes before an answer (``add_generation_prompt``), and with it: the difference is what a model
  says there. Where the template writes an answer otherwise once more follows (thinking is left out), it counts in a
  document of its own, which ends with it: so each one counts where it reads what it would read when it is asked for.

Neither clock nor chance has a part in it: a conversation is the same text again in every pass, piece and process.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flows.data.sources.base import Borne, Document, whole_pairs
from trainer.errors import DatasetError
from trainer.spec_fields import shown

MAX_MESSAGES = 1024
"""Of a conversation: a template is gone through once and more for each answer, with all that was said before."""
MAX_TEXT = 16 << 20
"""Characters that a template may write of one."""
MAX_STEPS = 1 << 22
"""Rounds of loops and calls that it may take for that: seconds."""
TODAY = datetime.datetime(2024, 7, 26)
"""What templates are given as today, so that a conversation is the same text every day: what those of Llama take where
they are told nothing."""
BEGIN, END = "\ufdd0", "\ufdd1"
"""Around an answer while a template is at work: two of the codes that Unicode keeps free of characters."""
_ROLES = {"human": "user", "gpt": "assistant"}
_KNOWN = ("system", "developer", "user", "assistant")
_SAID = ("role", "content", "from", "value")
_THOUGHT = ("reasoning_content", "thinking", "reasoning")
"""Names under which records have what was thought before an answer; templates read the first or the second."""
_NOT_READ = ("tools", "functions", "images", "image", "videos", "audios", "documents")
"""What stands beside a conversation and would have to be in the text; no model here looks at pictures."""
_NOT_SAID = ("tool_calls", "function_call", "tool_call_id", "images", "audio")
TALK_BESIDE = (*_NOT_READ, "system")
"""Columns that are read beside that of the conversations."""
_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
Message = Mapping[str, Any]
Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ChatForm:
    """How conversations are written."""

    template: str
    tokens: tuple[tuple[str, str], ...]
    """What a template may name: ``bos_token`` and the like."""
    marks: tuple[str, ...]
    """The special tokens of the tokenizer."""
    end: str | None
    """The token that ends a document."""
    others: tuple[str, ...] = field(default=(), compare=False)
    """Tokens that could, too."""
    what: str = field(default="the chat template", compare=False)
    """For people."""

    @property
    def digest(self) -> str:
        made = ["hotstage talk v1", self.template, self.tokens, self.marks, self.end]
        return hashlib.sha256(json.dumps(made).encode("utf-8", "surrogatepass")).hexdigest()

    def to_map(self) -> dict[str, Any]:
        """As a dataset's manifest has it."""
        return {"template": self.template, "tokens": dict(self.tokens)}


# --- what a template may do ---------------------------------------------------------------------------------


class _Refused(TemplateError):
    """The template's own words."""


class _Counted(CodeGenerator):
    """Loops whose rounds are counted, and texts joined (``~``) up to their bound."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        node.iter = nodes.Call(nodes.EnvironmentAttribute("rounds"), [node.iter], [], None, None)
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.visit(nodes.Call(nodes.EnvironmentAttribute("joined"), node.nodes, [], None, None), frame)


class _Generation(Extension):
    """``{% generation %}…{% endgeneration %}``: what stands between is an answer."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{BEGIN}{caller()}{END}"


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with a bound of its steps and of what operators make."""

    code_generator_class = _Counted
    intercepted_binops = frozenset(("+", "*", "**"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        self._left = threading.local()
        self.globals.pop("lipsum")  # which is of chance
        self.filters.pop("random")
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = TODAY.strftime
        self.filters["tojson"] = _to_json

    def begin(self) -> None:
        self._left.steps = MAX_STEPS

    def _step(self) -> None:
        self._left.steps -= 1
        if self._left.steps < 0:
            raise SecurityError(f"it takes more than {MAX_STEPS:,} rounds of loops and calls")

    def rounds(self, values: Iterable[Any]) -> Iterator[Any]:
        """The values of a loop."""
        for value in values:
            self._step()
            yield value

    def joined(self, *parts: object) -> str:
        """What ``~`` makes."""
        texts = list(map(str, parts))
        _check_length(sum(map(len, texts)))
        return "".join(texts)

    def call(self, context: Context, function: Any, /, *args: Any, **named: Any) -> Any:
        self._step()
        return super().call(context, function, *args, **named)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (abs(left) <= MAX_STEPS and abs(right) <= 8):
            raise SecurityError(f"it takes {left} ** {right}")
        if operator == "+" and isinstance(left, str | list) and isinstance(right, str | list):
            _check_length(len(left) + len(right))
        for one, many in ((left, right), (right, left)):
            if operator == "*" and isinstance(one, str | list | tuple):
                _check_length(len(one) * many)
        return super().call_binop(context, operator, left, right)


def _check_length(length: int) -> None:
    if length > MAX_TEXT:
        raise SecurityError(f"it makes {length:,} characters of one text, the limit is {MAX_TEXT:,}")


def _refuse(words: str) -> None:
    raise _Refused(words)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: letters as they are, nothing escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=8)
def form_template(form: ChatForm) -> tuple[_Sandbox, Any]:
    """The template of a form, compiled. DatasetError where it is none."""
    sandbox = _Sandbox()
    try:
        return sandbox, sandbox.from_string(form.template)
    except TemplateSyntaxError as error:
        raise DatasetError(f"{form.what}, line {error.lineno}: {error.message}; mend the template") from error
    except Exception as error:  # of Python's own compiler: nested too deep, too large
        raise DatasetError(
            f"{form.what} does not compile: {type(error).__name__}: {str(error)[:200]}; mend the template"
        ) from error


def written(form: ChatForm, messages: Sequence[Message], where: Callable[[], str], asks: bool = False) -> str:
    """What the template writes of these messages; ``asks``: and of the beginning of the answer to them."""
    sandbox, template = form_template(form)
    values = {"tools": None, "documents": None, **dict(form.tokens)}
    sandbox.begin()
    held, size = [], 0
    try:
        for piece in template.generate(**values, messages=list(messages), add_generation_prompt=asks):
            size += len(piece)
            if size > MAX_TEXT:
                raise SecurityError(f"it writes more than {MAX_TEXT:,} characters")
            held.append(piece)
    except Exception as error:  # a template is a program of somebody else
        raise _told(form, error, where) from error
    return "".join(held)


def _told(form: ChatForm, error: Exception, where: Callable[[], str]) -> DatasetError:
    mend = "mend the record, leave it out of the file, or name another template (data.chat_template)"
    if isinstance(error, _Refused):
        why = f"it says: {str(error)[:300]}"
    elif isinstance(error, SecurityError):
        why, mend = str(error)[:300], "mend the template"
    else:
        why = f"{type(error).__name__}: {str(error)[:300]}"
    return DatasetError(f"{where()}: {form.what} does not write this conversation ({why}); {mend}")


# --- what a record says -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TalkReader:
    """Makes documents of records. ``key``: of their conversations."""

    key: str
    form: ChatForm | None

    def documents(
        self, record: Mapping[str, Any], where: Callable[[], str], borne: Borne, whole: bool
    ) -> Iterator[Document]:
        """The documents of a record; ``whole``: with what it holds. DatasetError, with its place, where it is none."""
        assert self.form is not None, "a corpus is read with its form"
        for key in _NOT_READ:
            if record.get(key) not in (None, "", "[]", "null", [], {}):
                raise DatasetError(
                    f"{where()} has {key!r} beside its conversation, which is not read: write what the answers need "
                    "of it into the messages, or leave such records out"
                )
        if isinstance(system := record.get("system"), str) and system.strip():
            borne.beside.add(where)
        messages = read_messages(record.get(self.key), self.key, where)
        if any(_marks_of(self.form).search(text) for text in _texts(messages)):
            borne.marks.add(where)
        found = False
        for number, (text, spans) in enumerate(talk_texts(self.form, messages, where)):
            found = True
            if number == 0 and _cut(messages, text):
                borne.cut.add(where)
            if number == 1:
                borne.rewritten.add(where)
            yield Document(where, whole_pairs(text, where, borne), record if whole else {}, counted=spans)
        if not found:
            borne.unanswered.add(where)


def read_messages(value: object, key: str, where: Callable[[], str]) -> list[dict[str, Any]]:
    """A record's messages, each with ``role`` and ``content``, and what else it says."""

    def refused(why: str) -> DatasetError:
        return DatasetError(
            f'{where()}: its {key} {why}; write a list of messages, {{"role": "user", "content": "…"}} or {{"from": '
            '"human", "value": "…"}, or leave such records out'
        )

    if isinstance(value, Mapping) and value and all(isinstance(one, list) for one in value.values()):
        if len({len(one) for one in value.values()}) > 1:
            raise refused("has columns of different lengths")
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]  # a table of messages
    if not isinstance(value, list):
        raise refused("is null or missing" if value is None else f"is no list of messages but {type(value).__name__}")
    if len(value) > MAX_MESSAGES:
        raise refused(f"has {len(value):,} messages, the limit is {MAX_MESSAGES:,}: cut it into several")
    messages: list[dict[str, Any]] = []
    for number, one in enumerate(value, 1):
        if not isinstance(one, Mapping):
            raise refused(f"has as message {number} {'null' if one is None else type(one).__name__}")
        said = {str(name): item for name, item in one.items() if item is not None}
        pair = ("from", "value") if "from" in said else ("role", "content")
        role, content = (said.get(name) for name in pair)
        said = {name: item for name, item in said.items() if name not in _SAID}
        for name in _NOT_SAID:
            if said.get(name):
                raise refused(f"has {name!r} in message {number}, and neither tools nor pictures are read")
        if not isinstance(role, str) or (mapped := _ROLES.get(role, role)) not in _KNOWN:
            raise refused(
                f"has in message {number} as {pair[0]!r} {shown(role)}: known are {', '.join((*_KNOWN, *_ROLES))}"
            )
        if isinstance(content, list):
            content = _joined(content)
        if not isinstance(content, str):
            kind = "none" if content is None else type(content).__name__
            raise refused(f"has in message {number} no text under {pair[1]!r} ({kind})")
        if said.get("weight", 1) not in (0, 1):
            raise refused(f"has in message {number} the weight {shown(said['weight'])}: it may be 0 or 1")
        if thought := next((said[name] for name in _THOUGHT if said.get(name)), ""):
            if not isinstance(thought, str):
                raise refused(f"has in message {number} thoughts that are no text ({type(thought).__name__})")
            said |= {name: said.get(name) or thought for name in _THOUGHT[:2]}
        messages.append({"role": mapped, "content": content, **said})
        if any(BEGIN in text or END in text for text in _texts(messages[-1:])):
            raise refused(f"holds U+FDD0 or U+FDD1 in message {number}, which are no characters")
    return messages


def _joined(parts: Sequence[object]) -> object:
    """The text of a content in parts; what else it is where one is no text."""
    texts = []
    for part in parts:
        if not isinstance(part, Mapping):
            return part
        said = {name: item for name, item in part.items() if item is not None}
        if said.get("type", "text") != "text" or not isinstance(said.get("text"), str):
            return part
        texts.append(said["text"])
    return "".join(texts)


def _texts(messages: Iterable[Message]) -> Iterator[str]:
    """All that messages say."""
    return (text for message in messages for text in message.values() if isinstance(text, str))


@functools.lru_cache(maxsize=8)
def _marks_of(form: ChatForm) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, form.marks)) or r"(?!)")


# --- what of a text is an answer ----------------------------------------------------------------------------


def talk_texts(form: ChatForm, messages: Sequence[Message], where: Callable[[], str]) -> Iterator[tuple[str, Spans]]:
    """Texts in which each answer that counts does so once, the whole conversation first, with the places (characters)
    that do; what follows the last answer is left out. Nothing where there is no answer."""
    wanted = [n for n, one in enumerate(messages) if one["role"] == "assistant" and one.get("weight", 1)]
    if not wanted:
        return
    if _GENERATION.search(form.template):
        yield _by_blocks(form, messages[: wanted[-1] + 1], where)
        return
    turns = {n: _turn(form, messages, n, where) for n in wanted}
    while wanted:
        last = wanted[-1]
        here = messages[: last + 1]
        text = _checked(form, here, written(form, here, where), where)
        inside = [n for n in wanted if n == last or turns[n].begins(text)]
        yield text, tuple((turns[n].first, turns[n].end) for n in inside)
        wanted = [n for n in wanted if n not in inside]


def turn_end(form: ChatForm) -> str | None:
    """The special token that ends an answer; None where none does, or the template writes no answer of two lines."""
    probe = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    try:
        text, spans = next(talk_texts(form, probe, lambda: "a probe"))
    except DatasetError:
        return None
    said = text[slice(*spans[-1])] if spans else ""
    return max((mark for mark in form.marks if said.endswith(mark)), key=len, default=None)


@dataclass(frozen=True)
class _Turn:
    """An answer's place in the text that ends with it, and the digest of all up to its end."""

    first: int
    end: int
    digest: bytes

    def begins(self, text: str) -> bool:
        return len(text) >= self.end and _digest(text[: self.end]) == self.digest


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _turn(form: ChatForm, messages: Sequence[Message], number: int, where: Callable[[], str]) -> _Turn:
    before = written(form, messages[:number], where, asks=True)
    text = written(form, messages[: number + 1], where)
    if not text.startswith(before):
        same = next((n for n, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), len(text))
        raise DatasetError(
            f"{where()}: {form.what} writes {shown(before[same:][:40])} where it asks for the answer of message "
            f"{number + 1}, and {shown(text[same:][:40])} where that is there, so what a model would say is not known; "
            "name a copy of it with {% generation %} and {% endgeneration %} around what counts (data.chat_template)"
        )
    end = len(before) + _said(form, text[len(before) :])
    return _Turn(len(before), end, _digest(text[:end]))


def _said(form: ChatForm, text: str) -> int:
    """How much of what follows a prompt is the answer with the token that ends it: what stands behind that is not asked
    of a model."""
    bare = text.rstrip()
    eos = dict(form.tokens).get("eos_token")
    if eos and bare.endswith(eos) and (short := bare.removesuffix(eos).rstrip()).endswith(form.marks):
        bare = short
    return len(bare) if bare.endswith(form.marks) else len(text)


def _by_blocks(form: ChatForm, messages: Sequence[Message], where: Callable[[], str]) -> tuple[str, Spans]:
    pieces = re.split(f"([{BEGIN}{END}])", written(form, messages, where))
    if pieces[1::2] != [BEGIN, END] * (len(pieces) // 4):
        raise DatasetError(f"{where()}: {form.what} has {{% generation %}} blocks in one another; mend the template")
    text = "".join(pieces[::2])
    ends = list(itertools.accumulate(map(len, pieces[::2])))
    spans = list(zip(ends[::2], ends[1::2], strict=False))
    counts = [one.get("weight", 1) for one in messages if one["role"] == "assistant"]
    if not all(counts):
        if len(counts) != len(spans):
            raise DatasetError(
                f"{where()}: of its {len(counts)} answers some have the weight 0, and {form.what} writes {len(spans)} "
                "{% generation %} blocks, so which are meant is not known; leave weights out, or have a block an answer"
            )
        spans = [span for span, weight in zip(spans, counts, strict=True) if weight]
    return _checked(form, messages, text, where), tuple(spans)


def _checked(form: ChatForm, messages: Sequence[Message], text: str, where: Callable[[], str]) -> str:
    """The text of these messages, of which the last is an answer. DatasetError where one of them is not in it; of
    earlier answers that is the template's to say."""
    for number, one in enumerate(messages, 1):
        answers = one["role"] == "assistant"
        words = one["content"].split() if answers else _longest(one["content"])
        if words and (not answers or number == len(messages)) and not any(word in text for word in words):
            raise DatasetError(
                f"{where()}: {form.what} leaves out what message {number} says ({one['role']}: "
                f"{shown(one['content'][:40])}): name a template that writes it (data.chat_template; those of models "
                "that see pictures leave plain texts out), or take it out of the record"
            )
    _check_ends(form, messages, text, where)
    return text


def _longest(text: str) -> list[str]:
    """Two words that stand elsewhere hardly by chance."""
    return sorted(text.split(), key=len)[-2:]


def _cut(messages: Sequence[Message], text: str) -> bool:
    """Whether a part of the last answer that counts, or of what was thought before it, is not in the text."""
    last = next(one for one in reversed(messages) if one["role"] == "assistant" and one.get("weight", 1))
    parts = (last["content"], last.get("reasoning_content", ""))
    return any(word not in text for part in parts for word in _longest(part)[-1:])


def _check_ends(form: ChatForm, messages: Sequence[Message], text: str, where: Callable[[], str]) -> None:
    """DatasetError where the token that ends documents stands inside: attention would end there."""
    if form.end is None:
        return
    inside = text.rstrip().removesuffix(form.end).count(form.end)
    if inside > sum(said.count(form.end) for said in _texts(messages)):
        other = next((token for token in form.others if token != form.end and token not in text), None)
        mend = (
            "name a token that they do not hold"
            if other is None
            else f'data.end_token = "{other}" does not stand in them'
        )
        raise DatasetError(
            f"{where()}: {form.what} writes {form.end} inside a conversation, and that token ends documents: each turn "
            f'would be one; {mend} (beside data.tokenizer; import: --end-token), or say data.end_token = ""'
        )


def counting(offsets: Sequence[tuple[int, int]], spans: Spans) -> npt.NDArray[np.bool_]:
    """Of each token, by its first and end character, whether some of it lies in a span.

    >>> counting([(0, 2), (2, 2), (3, 4), (3, 4)], ((3, 4),)).tolist()
    [False, False, True, True]
    """
    if not spans:
        return np.zeros(len(offsets), bool)
    firsts, ends = np.fromiter(itertools.chain.from_iterable(offsets), np.int64, 2 * len(offsets)).reshape(-1, 2).T
    before = np.concatenate(([0], np.maximum.accumulate(ends)))[:-1]
    # of blanks, which some tokenizers leave out of their offsets, what lies behind the token before
    begins = np.where(ends > firsts, firsts, np.minimum(firsts, before))
    places = np.asarray(spans, np.int64)
    at = np.searchsorted(places[:, 1], begins, "right")  # the first span that ends behind its beginning
    return np.asarray((at < len(places)) & (places[np.minimum(at, len(places) - 1), 0] < ends))
