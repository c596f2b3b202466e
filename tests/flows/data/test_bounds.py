"""What a corpus may cost and bear: memory of a piece's size, kills of the real process, sources that change."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from checkpoint.errors import StoreRefused
from checkpoint.store import open_store
from flows.data import prepare
from flows.data.encoding import encode_piece
from flows.data.runners import InTurn
from tests.flows.data.test_pieces import never
from tests.flows.data.test_prepare import objects
from tests.support.place import ROOT
from tests.support.wait import wait_for
from trainer.errors import DatasetError
from trainer.spec import DataSpec

PROGRAM = (
    "import sys; from flows.data import prepare; from checkpoint.store import open_store; "
    "from trainer.spec import DataSpec; prepare(DataSpec.model_validate_json(sys.argv[1]), open_store(sys.argv[2])); "
    "print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM:')))"
)
"""It says the most KiB it had: what its parent waits for, ``ru_maxrss``, begins with what the parent itself had."""


def write(path: Path, size: int) -> None:
    """JSON lines of about so many bytes, of two thousand words."""
    dice = random.Random(1)
    words = ["".join(dice.choices("abcdefghij", k=dice.randrange(2, 9))) for _ in range(2000)]
    with path.open("w") as file:
        while file.tell() < size:
            file.write(json.dumps({"text": " ".join(dice.choices(words, k=700))}) + "\n")


def start(spec: DataSpec, store: str, stdout: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", PROGRAM, spec.model_dump_json(), store]
    environment = {**os.environ, "RAYON_NUM_THREADS": "2"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stdout)


def test_memory_does_not_grow_with_the_corpus(here: Path) -> None:
    """The small one of the bench's data/peak-mib: five MiB more of text take no five times as much more memory, which
    is the allocator's; a corpus that is held takes ten times as much, by its tokens as lists alone."""
    peaks = []
    for size in (2 << 20, 7 << 20):
        write(Path(f"c/{size}.jsonl"), size)
        spec = DataSpec(source=f"jsonl:{here}/c/{size}.jsonl", vocab_size=600, piece_mib=1, shard_tokens=1 << 18)
        with start(spec, f"file://{here / str(size)}", subprocess.PIPE) as process:
            said, _ = process.communicate()
        assert process.returncode == 0
        peaks.append(int(said) / 1024)
    assert peaks[1] < peaks[0] + 25, peaks
    assert peaks[1] < 300


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))])
def test_the_process_is_killed_and_goes_on(here: Path, seed: int) -> None:
    """SIGKILL at a seeded object, and again, until it comes through: one digest, and nothing that was done is done
    again."""
    write(Path("c/a.jsonl"), 5 << 19)
    spec = DataSpec.model_validate(
        {"source": f"jsonl:{here}/c/a.jsonl", "vocab_size": 400, "piece_mib": 1, "dedupe": {}, "validation": 0.1}
    )
    good = open_store("memory:")
    prepare(spec.model_copy(update={"piece_mib": 64}), good)
    store, dice, kept = open_store(f"file://{here / 'store'}"), random.Random(seed), set[str]()
    for _ in range(3):
        process = start(spec, store.url)
        more = len(kept) + dice.randrange(1, 6)
        try:
            wait_for(lambda: process.poll() is not None or len(list(store.list("data/"))) >= more, "an object", 120)  # noqa: B023
        finally:
            process.kill()
            process.wait()
        now = {info.key for info in store.list("data/")}
        assert kept <= now or not list(store.list("data/work/"))
        kept = now
    process = start(spec, store.url)
    assert process.wait(120) == 0
    assert objects(store) == objects(good)


class Between(InTurn):
    """Does something between the passes, before the texts are encoded."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def map(self, function: Any, items: Sequence[Any], *more: Any) -> Iterator[dict[str, Any]]:
        if function is encode_piece:
            self.act()
        return super().map(function, items, *more)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: write(Path("c/b.jsonl"), 40_000), "c/b.jsonl changed while it was read"),
        (lambda: os.utime("c/b.jsonl", (1, 1)), "c/b.jsonl changed while it was read"),
        (lambda: Path("c/b.jsonl").unlink(), "c/b.jsonl vanished while the corpus was read"),
        (lambda: Path("c/b.jsonl").chmod(0o000), "c/b.jsonl (cannot be read|changed)"),
    ],
    ids=["bytes", "times", "gone", "rights"],
)
def test_a_source_that_changes_between_the_passes(
    here: Path, small: Callable[[int], None], act: Callable[[], None], words: str
) -> None:
    for name in "ab":
        write(Path(f"c/{name}.jsonl"), 30_000)
    small(9000)
    store = open_store("memory:")
    spec = DataSpec(source="jsonl:c/*.jsonl", vocab_size=300, piece_mib=1)
    with pytest.raises(DatasetError, match=words):
        prepare(spec, store, runner=Between(act), clock=never)
    assert not list(store.list("data/inputs/"))
    if Path("c/b.jsonl").exists():
        Path("c/b.jsonl").chmod(0o644)
    assert prepare(spec, store, clock=never) == prepare(spec, open_store("memory:"), clock=never)


def test_bytes_that_change_behind_equal_times_are_seen(here: Path, small: Callable[[int], None]) -> None:
    """Where names, sizes and times lie, the texts' own hashes do not."""
    for name in "ab":
        write(Path(f"c/{name}.jsonl"), 30_000)
    small(9000)

    def act() -> None:
        from flows.data.sources import files

        path = Path("c/b.jsonl")
        path.write_text(path.read_text().replace("a", "b", 1) if "a" in path.read_text() else "")
        entries = {entry.name: entry for entry in before}
        patch.setattr(files, "_entry", lambda name, status: entries[name])

    from flows.data.sources.files import look_at_files

    before = look_at_files("jsonl:c/*.jsonl")
    spec = DataSpec(source="jsonl:c/*.jsonl", vocab_size=300, piece_mib=1)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DatasetError, match=r"c/b.jsonl changed while it was"):
        prepare(spec, open_store("memory:"), runner=Between(act), clock=never)


def test_two_who_prepare_the_same_agree(here: Path, small: Callable[[int], None]) -> None:
    """One finishes first, and what the other needs of the pieces is gone: it finds the dataset."""
    write(Path("c/a.jsonl"), 40_000)
    small(9000)
    store, spec = open_store("memory:"), DataSpec(source="jsonl:c/a.jsonl", vocab_size=300, piece_mib=1)
    other: list[Any] = []
    said: list[str] = []

    def act() -> None:
        if not other:
            other.append(prepare(spec, store, clock=never))

    assert prepare(spec, store, runner=Between(act), say=said.append, clock=never) == other[0]
    assert "is already there" in said[-1]
    assert not list(store.list("data/work/"))


def test_again_uses_no_piece_of_before(here: Path, small: Callable[[int], None]) -> None:
    """What a killed preparation left is forgotten first; where it cannot be, nothing is made of it."""
    write(Path("c/a.jsonl"), 40_000)
    small(9000)
    store, spec = open_store("memory:"), DataSpec(source="jsonl:c/a.jsonl", vocab_size=300, piece_mib=1)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(spec, store, runner=Between(stop), clock=never)
    assert len(list(store.list("data/work/"))) > 5

    class NoDelete:
        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        def delete(self, key: str) -> None:
            raise StoreRefused(f"deleting {key!r}: no rights")

    with pytest.raises(StoreRefused, match="no rights"):
        prepare(spec, NoDelete(), again=True, clock=never)  # type: ignore[arg-type]
    made = prepare(spec, NoDelete(), clock=never)  # type: ignore[arg-type]
    assert list(store.list("data/work/"))  # it costs room alone
    assert prepare(spec, store, again=True, clock=never) == made
    assert not list(store.list("data/work/"))


def test_an_error_of_a_piece_ends_the_others() -> None:
    done: list[int] = []

    def work(item: int) -> dict[str, Any]:
        done.append(item)
        if item == 3:
            raise DatasetError("no")
        return {"item": item}

    rows = InTurn().map(work, list(range(50)))
    assert [next(rows)["item"] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DatasetError, match="no"):
        list(rows)
    assert len(done) < 12
