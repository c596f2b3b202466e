"""The runs of a sweep: its points out of a grid or a list, a few of them at once, and a table of how they went.

Each point is the spec with some of its keys set, and a run of its own; a sweep that was killed finds its runs again by
their names, as any run does.
"""

from __future__ import annotations

import itertools
import shlex
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from checkpoint.errors import CheckpointError
from checkpoint.log import RunLog
from checkpoint.store import Store
from flows.drive.events import Outcome
from flows.drive.line import ordered_back
from flows.drive.live import on_line, read_curve
from trainer.errors import SpecError, TrainerError
from trainer.spec import RunSpec, parse_spec, set_key

MOST_POINTS = 1000
MAX_LIST_BYTES = 1 << 20
LOSS_OF = 10
"""Steps whose mean is a row's loss: of one step it says little."""
_OPEN, _CLOSE = "[{", "]}"


@dataclass(frozen=True)
class SweepRow:
    """A point, and how its run went. ``state`` waits, trains, or the run's outcome; ``loss``: the mean of its last
    `LOSS_OF` steps."""

    number: int
    point: tuple[str, ...]
    run: str = ""
    state: str = "waits"
    step: int = 0
    steps: int = 0
    loss: float | None = None
    note: str = ""
    exit_code: int = 0

    @property
    def values(self) -> dict[str, str]:
        """Of the keys that the point sets."""
        return dict(text.split("=", 1) for text in self.point)


# --- points -----------------------------------------------------------------------------------------------


def grid_points(axes: Sequence[str]) -> list[tuple[str, ...]]:
    """Every combination of ``KEY=VALUE,VALUE,…``; the last key changes fastest.

    >>> grid_points(["train.seed=1,2", "train.batch=8"])
    [('train.seed=1', 'train.batch=8'), ('train.seed=2', 'train.batch=8')]
    """
    choices: dict[str, list[str]] = {}
    for axis in axes:
        key, sign, text = axis.partition("=")
        values = [value.strip() for value in _split(text)]
        if not sign or not key.strip() or not all(values):
            raise SpecError(
                f"--grid {axis!r}: write it as section.key=value,value, such as train.optimizer.lr=1e-3,3e-4"
            )
        if (name := key.strip()) in choices:
            raise SpecError(f"--grid names {name} twice; give its values once, such as --grid {name}=VALUE,VALUE")
        choices[name] = [f"{name}={value}" for value in values]
    return list(itertools.product(*choices.values()))


def _split(text: str) -> list[str]:
    """At commas that no bracket or quote holds."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        depth += (letter in _OPEN) - (letter in _CLOSE) if not quote else 0
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def listed_points(path: Path) -> list[tuple[str, ...]]:
    """A point a line, its settings with blanks between them, as on a command line; # begins a remark."""
    try:
        with path.open("rb") as file:  # not to its end: a device may have none
            data = file.read(MAX_LIST_BYTES + 1)
        if len(data) > MAX_LIST_BYTES:
            raise SpecError(f"--list {path} is larger than {MAX_LIST_BYTES} bytes; it has a line of settings a point")
        lines = data.decode("utf-8-sig").splitlines()  # editors of Windows begin with a mark
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise SpecError(f"--list {path} cannot be read: {why}; it has a line of KEY=VALUE settings a point") from error
    points = []
    for number, line in enumerate(lines, 1):
        try:
            words = tuple(shlex.split(line, comments=True))
        except ValueError as error:
            raise SpecError(f"--list {path}, line {number}: {error}; close the quotes") from error
        if words and not all("=" in word for word in words):
            raise SpecError(
                f"--list {path}, line {number}: {line.strip()!r} is no list of KEY=VALUE settings; write it as "
                "train.seed=1 train.optimizer.lr=1e-3, with blanks between settings and none around ="
            )
        keys = [set_key(word) for word in words]
        twice = next((".".join(key) for key in keys if keys.count(key) > 1), "")
        if twice:
            raise SpecError(f"--list {path}, line {number} sets {twice} twice; leave one of the two out")
        if words:
            points.append(words)
    return points


def pointed_specs(spec: RunSpec, points: Sequence[Sequence[str]]) -> list[RunSpec]:
    """The spec of each point. SpecError where one of them is refused, or two of them are the same run."""
    if not points:
        raise SpecError("the sweep has no point: give --grid KEY=VALUE,VALUE, or --list FILE with a line a point")
    if len(points) > MOST_POINTS:
        raise SpecError(f"the sweep has {len(points)} points; the limit is {MOST_POINTS}: leave some values out")
    tree = spec.model_dump(mode="json")
    specs: list[RunSpec] = []
    for number, point in enumerate(points, 1):
        specs.append(parse_spec(tree, list(point), origin=f"point {number} ({' '.join(point)})"))
    seen: dict[str, int] = {}
    for number, made in enumerate(specs, 1):
        what = made.model_dump_json(include={"name", "model", "data", "train"})
        if what in seen:
            raise SpecError(
                f"points {seen[what]} and {number} of the sweep train the same: {' '.join(points[number - 1])}; how a "
                "run is laid out changes none of its bits, so leave one of them out"
            )
        seen[what] = number
    return specs


# --- running ----------------------------------------------------------------------------------------------


def run_points(
    specs: Sequence[RunSpec],
    points: Sequence[Sequence[str]],
    at_once: int,
    drive: Callable[[RunSpec, Callable[[str], None]], Outcome],
    store: Store,
    *,
    stop: threading.Event,
    tell: Callable[[Sequence[SweepRow]], None] = lambda _: None,
    every_s: float = 2.0,
) -> list[SweepRow]:
    """Drive the runs of the points, ``at_once`` of them; the rows, in the points' order.

    ``drive`` takes a spec and who hears the run's name; ``tell`` hears the rows each time that one changes, from this
    thread. A point that fails does not hold up the others. After ``stop`` none begins.
    """
    rows = [SweepRow(n, tuple(p), steps=s.train.steps) for n, (p, s) in enumerate(zip(points, specs, strict=True), 1)]
    names: dict[int, str] = {}

    def work(number: int) -> Outcome:
        return drive(specs[number], lambda run: names.__setitem__(number, run))

    with ThreadPoolExecutor(max_workers=at_once, thread_name_prefix="sweep") as pool:
        waiting, going = list(range(len(specs))), dict[Future[Outcome], int]()
        while (waiting and not stop.is_set()) or going:
            while waiting and len(going) < at_once and not stop.is_set():
                number = waiting.pop(0)
                going[pool.submit(work, number)] = number
            done, _ = wait(going, timeout=every_s, return_when=FIRST_COMPLETED)
            changed = bool(done)
            for number in going.values():
                if number in names and rows[number].run != names[number]:
                    rows[number] = replace(rows[number], run=names[number], state="trains")
                    changed = True
            for future in done:
                number = going.pop(future)
                rows[number] = _ended_row(rows[number], future, store)
            if changed:
                tell(rows)
    return [row if row.state != "waits" else replace(row, state="not begun", exit_code=85) for row in rows]


def _ended_row(row: SweepRow, future: Future[Outcome], store: Store) -> SweepRow:
    error = future.exception()
    if error is None:
        outcome = future.result()
        loss = last_loss(store, outcome.run)
        state = outcome.outcome.replace("_", " ")
        note = "" if outcome.outcome == "succeeded" else outcome.reason
        return replace(row, run=outcome.run, state=state, step=outcome.step, loss=loss, note=note,
                       exit_code=outcome.exit_code)  # fmt: skip
    if isinstance(error, TrainerError | CheckpointError):
        return replace(row, state="refused", note=str(error), exit_code=error.exit_code)
    raise error


def last_loss(store: Store, run: str) -> float | None:
    """The mean loss of a run's last steps."""
    state = RunLog(store, run).fold(quick=True)
    index = read_curve(store, run, [a.epoch for a in state.attempts], tails=1)
    curve = on_line(index.curve(), ordered_back(state))
    losses = [curve[step].loss for step in sorted(curve)[-LOSS_OF:]]
    return sum(losses) / len(losses) if losses else None


# --- the table --------------------------------------------------------------------------------------------


def best_of(rows: Sequence[SweepRow]) -> SweepRow | None:
    """Of those that succeeded the one with the least loss."""
    done = [row for row in rows if row.state == "succeeded" and row.loss is not None]
    return min(done, key=lambda row: row.loss or 0.0, default=None)


def sweep_table(rows: Sequence[SweepRow]) -> list[dict[str, Any]]:
    """As Prefect's page shows it: a column a key, the points in their order."""
    best = best_of(rows)
    keys = list(dict.fromkeys(key for row in rows for key in row.values))
    return [
        {
            **{key: row.values.get(key, "") for key in keys},
            "loss": "" if row.loss is None else f"{row.loss:.4f}" + (" (least)" if row is best else ""),
            "state": row.state,
            "step": f"{row.step} of {row.steps}",
            "run": row.run,
            "note": row.note[:200],
        }
        for row in rows
    ]


def table_lines(rows: Sequence[SweepRow]) -> list[str]:
    """The same for a terminal: columns that hold nothing are left out."""
    table = sweep_table(rows)
    names = [name for name in (table[0] if table else {}) if any(str(row[name]) for row in table)]
    widths = {name: max(len(name), *(len(str(row[name])) for row in table)) for name in names}
    lines = ["  ".join(name.ljust(widths[name]) for name in names)]
    lines += ["  ".join(str(row[name]).ljust(widths[name]) for name in names) for row in table]
    return [line.rstrip() for line in lines]


def sweep_words(rows: Sequence[SweepRow]) -> str:
    """How a sweep went, in a line."""
    good, best = sum(row.state == "succeeded" for row in rows), best_of(rows)
    text = f"{good} of {len(rows)} runs succeeded"
    if best is not None and best.loss is not None:
        text += f"; the least loss, {best.loss:.4f}, has {' '.join(best.point)} (run {best.run})"
    return text
