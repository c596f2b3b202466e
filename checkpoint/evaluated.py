"""What evaluations of a run's checkpoints gave: validation loss, a sample, the numbers of commands. Bounded.

    runs/<run>/live/evaluated    one object, written again by whoever has evaluated a checkpoint

An evaluation is a function of its checkpoint, so whoever writes joins what is there with its own (``merge``), and what
one writer loses to another comes back when that checkpoint is evaluated again. Like all of ``live/`` it is a hint, read
as hostile: it may be behind, or missing. A row is known by step and epoch, as the checkpoint is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from checkpoint import codec
from checkpoint.errors import Damaged

VERSION = 1
MAX_ROWS = 1024
MAX_NUMBERS = 32
MAX_NAME = 80
MAX_TEXT = 2000
MAX_BYTES = 8 << 20
BEST_KEPT = 64
"""Rows of the least validation loss stay whatever comes."""
SAMPLES_KEPT = 16
"""Of the newest rows with one; those before keep their numbers."""
WHOLE_KEPT = 64
LEAN_NUMBERS, LEAN_TEXT = 4, 200
"""Of a command, in rows that are not among the newest."""


@dataclass(frozen=True, slots=True)
class Ran:
    """A command of the user's on an exported checkpoint: its numbers by name, or why there are none."""

    numbers: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    why: str = ""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Of one checkpoint. ``loss``: mean over ``windows`` windows of validation data, ``tokens`` tokens; None where it
    was not computed. ``data``: the digest of that data. ``commands``: by name.
    """

    step: int
    epoch: int
    time: float = 0.0
    loss: float | None = None
    windows: int = 0
    tokens: int = 0
    data: str = ""
    prompt: str = ""
    sample: str = ""
    commands: Mapping[str, Ran] = field(default_factory=dict)

    def joined(self, other: Evaluation) -> Evaluation:
        """With what ``other`` has of the same checkpoint; where both have something, the later one's."""
        old, new = (self, other) if other.time >= self.time else (other, self)
        made = replace(new, commands={**old.commands, **new.commands})
        if new.loss is None:
            made = replace(made, loss=old.loss, windows=old.windows, tokens=old.tokens, data=old.data)
        return made if new.sample else replace(made, prompt=old.prompt, sample=old.sample)

    def numbers(self) -> dict[str, float]:
        """All of them, by the names that trackers show: ``validation/loss``, ``eval/<command>/<number>``."""
        found = {} if self.loss is None else {"validation/loss": self.loss}
        for name, ran in self.commands.items():
            found |= {f"eval/{name}/{key}": value for key, value in ran.numbers.items()}
        return found

    def lean(self) -> Evaluation:
        """With the first few numbers of each command, and the beginning of why one failed."""
        ran = {
            name: Ran(dict(islice(r.numbers.items(), LEAN_NUMBERS)), r.seconds, codec.short(r.why, LEAN_TEXT))
            for name, r in self.commands.items()
        }
        return replace(self, commands=ran)

    def to_map(self) -> dict[str, Any]:
        ran = {name: {"n": dict(r.numbers), "s": r.seconds, "why": r.why} for name, r in self.commands.items()}
        value: dict[str, Any] = {"step": self.step, "epoch": self.epoch, "time": self.time, "loss": self.loss}
        value |= {"windows": self.windows, "tokens": self.tokens, "data": self.data}
        return value | {"prompt": self.prompt, "sample": self.sample, "commands": ran}


@dataclass
class Evaluations:
    """By (step, epoch)."""

    rows: dict[tuple[int, int], Evaluation] = field(default_factory=dict)

    def add(self, row: Evaluation) -> None:
        key = row.step, row.epoch
        self.rows[key] = self.rows[key].joined(row) if key in self.rows else row

    def merge(self, other: Evaluations) -> None:
        """Take what ``other`` has."""
        for row in other.rows.values():
            self.add(row)

    def of(self, points: Iterable[tuple[int, int]]) -> list[Evaluation]:
        """Those of these checkpoints, by step."""
        return sorted((self.rows[p] for p in set(points) if p in self.rows), key=lambda row: row.step)

    def to_bytes(self) -> bytes:
        self._thin()
        return codec.pack_hint({"v": VERSION, "rows": [row.to_map() for row in self.rows.values()]})

    @classmethod
    def parse(cls, raw: bytes) -> Evaluations:
        """Damaged for anything that is not one of this version: then it is as good as missing."""
        value = codec.unpack_hint(raw, "what evaluations gave", max_bytes=MAX_BYTES)
        try:
            if value["v"] != VERSION:
                raise Damaged(f"what evaluations gave has version {value['v']!r}, this program reads {VERSION}")
            rows = [_row(row) for row in value["rows"]]
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise Damaged(f"what evaluations gave is damaged: {error!r}") from error
        if len(rows) > MAX_ROWS:
            raise Damaged(f"what evaluations gave is damaged: {len(rows)} rows, {MAX_ROWS} at most")
        return cls({(row.step, row.epoch): row for row in rows})

    def _thin(self) -> None:
        """The newest, and the best; long texts and many numbers of the newest alone."""
        newest = sorted(self.rows.values(), key=lambda row: (row.step, row.epoch), reverse=True)
        known = sorted((r for r in newest if r.loss is not None and math.isfinite(r.loss)), key=lambda r: r.loss or 0.0)
        stay = newest[:MAX_ROWS]
        if len(newest) > MAX_ROWS:
            best = known[:BEST_KEPT]
            stay = list({(r.step, r.epoch): r for r in (*newest[: MAX_ROWS - len(best)], *best)}.values())
        texts = {(r.step, r.epoch) for r in [r for r in newest if r.sample][:SAMPLES_KEPT]}
        whole = {(r.step, r.epoch) for r in newest[:WHOLE_KEPT]}
        rows = (r if (r.step, r.epoch) in texts else replace(r, prompt="", sample="") for r in stay)
        rows = (r if (r.step, r.epoch) in whole else r.lean() for r in rows)
        self.rows = {(r.step, r.epoch): r for r in sorted(rows, key=lambda r: (r.step, r.epoch))}


def kept_numbers(found: Mapping[str, Any]) -> dict[str, float]:
    """Of numbers by name as many as are kept, with names of bounded length; what is no finite number is left out.

    >>> kept_numbers({"acc": 1, "why": "no", "loss": float("nan")})
    {'acc': 1.0}
    """
    out: dict[str, float] = {}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        try:
            number = float(value)
        except OverflowError:
            continue
        if math.isfinite(number) and len(out) < MAX_NUMBERS:
            out[codec.short(str(name), MAX_NAME)] = number
    return out


def _row(value: Mapping[str, Any]) -> Evaluation:
    loss = value["loss"]
    ran = {
        _text(name, MAX_NAME): Ran(kept_numbers(r["n"]), float(r["s"]), _text(r["why"], MAX_TEXT))
        for name, r in list(value["commands"].items())[:MAX_NUMBERS]
    }
    return Evaluation(
        step=_whole(value["step"]),
        epoch=_whole(value["epoch"]),
        time=float(value["time"]),
        loss=None if loss is None else float(loss),
        windows=_whole(value["windows"]),
        tokens=_whole(value["tokens"]),
        data=_text(value["data"], 64),
        prompt=_text(value["prompt"], MAX_TEXT),
        sample=_text(value["sample"], MAX_TEXT),
        commands=ran,
    )


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{str(value)[:40]} is no count")
    return value


def _text(value: Any, most: int) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:40]} is no text")
    return codec.short(value, most)
