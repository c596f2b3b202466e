"""What preparing data costs beside the tokenizer's library alone, and how much memory it takes.

The corpus is what the machine has: sources, headers and manuals, as JSON lines of about 64 MB a file; where it is too
little, it goes round again with the letters of each word shifted, so that nothing comes twice. ``tokenizers`` alone:
the same text is read, the same share of it trains a tokenizer of the same size, and all of it is encoded; it sums,
stores and checks nothing. Both are processes of their own, in turns; each one's peak is what the kernel counted.

``HOTSTAGE_BENCH_DATA_MB`` (1000) says how much text. ``python -m tests.bench data``
"""

from __future__ import annotations

import codecs
import json
import os
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.place import ROOT

VOCAB = 32_000
FILE_BYTES = 64_000_000
_ENDINGS = (".py", ".h", ".md", ".txt", ".rst", ".c", ".js", ".html", ".pyi")
_MOST = 2_000_000  # bytes of a document


@dataclass(frozen=True)
class Cost:
    """Of a process: seconds, seconds of processors, the most memory that it had."""

    wall_s: float
    cpu_s: float
    peak_mib: float


def texts_of_machine(size: int) -> Iterator[str]:
    """About so many bytes of text."""
    roots = [sysconfig.get_paths()["stdlib"], *{p for p in sys.path if p.endswith("-packages")}]
    roots += ["/usr/include", "/usr/share", "/usr/lib/python3"]
    done, turn = 0, 0
    while done < size:
        found = 0
        for root in sorted(set(roots)):
            for folder, folders, names in os.walk(root):
                folders.sort()
                for name in sorted(names):
                    path = Path(folder, name)
                    if not name.endswith(_ENDINGS) or path.is_symlink() or path.stat().st_size > _MOST:
                        continue
                    try:
                        text = path.read_text(encoding="utf-8")
                    except (UnicodeDecodeError, OSError):
                        continue
                    yield text if not turn else _shifted(text, turn)
                    found += path.stat().st_size
                    if done + found >= size:
                        return
        done, turn = done + found, turn + 1
        if not found:
            raise RuntimeError("this machine has no text")


def _shifted(text: str, turn: int) -> str:
    for _ in range(turn % 2):
        text = codecs.encode(text, "rot13")
    return f"{turn}\n{text}"


def write_corpus(folder: Path, size: int, file_bytes: int = FILE_BYTES) -> int:
    """JSON lines below the folder; the bytes of their text."""
    total, number, file = 0, 0, None
    for text in texts_of_machine(size):
        if file is None or file.tell() > file_bytes:
            if file is not None:
                file.close()
            file, number = (folder / f"{number:04d}.jsonl").open("w", encoding="utf-8"), number + 1
        file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        total += len(text.encode("utf-8", "surrogatepass"))
    if file is not None:
        file.close()
    return total


def alone(folder: str, share: float) -> None:
    """The library alone: train on a share of the text, encode all of it."""
    from flows.data.tokenizer import train_tokenizer

    def texts() -> Iterator[str]:
        for path in sorted(Path(folder).glob("*.jsonl")):
            with path.open(encoding="utf-8") as file:
                for line in file:
                    yield json.loads(line)["text"]

    def some() -> Iterator[str]:
        owed = 0.0
        for text in texts():
            owed += share
            if owed >= 1:
                owed -= 1
                yield text

    tokenizer, batch, held = train_tokenizer(some(), VOCAB), [], 0
    for text in texts():
        batch.append(text)
        held += len(text)
        if held >= 1 << 20:
            tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            batch, held = [], 0
    tokenizer.encode_batch_fast(batch, add_special_tokens=False)


def prepared(folder: str, store: str, piece_mib: int) -> None:
    """What `hotstage data prepare` does."""
    from checkpoint.store import open_store
    from flows.data import prepare
    from trainer.spec import DataSpec

    spec = DataSpec(source=f"jsonl:{folder}/*.jsonl", vocab_size=VOCAB, piece_mib=piece_mib)
    prepare(spec, open_store(f"file://{store}"), say=print)


def cost_of(*arguments: str) -> Cost:
    """Of this file as a program."""
    begin = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "tests.bench.bench_data", *arguments], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{arguments} ended with {process.returncode}")
    return Cost(time.monotonic() - begin, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def compare(size: int, piece_mib: int = 32) -> tuple[int, Cost, Cost]:
    """Bytes of text; what preparing it cost; what the library alone did."""
    from flows.data.encoding import SAMPLE_LETTERS

    with tempfile.TemporaryDirectory(prefix="hotstage-bench-") as name:
        folder = Path(name, "corpus")
        folder.mkdir()
        total = write_corpus(folder, size)
        peer = cost_of("alone", str(folder), str(min(1.0, SAMPLE_LETTERS / total)))
        ours = cost_of("prepared", str(folder), str(Path(name, "store")), str(piece_mib))
    return total, ours, peer


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    what, *rest = sys.argv[1:]
    if what == "alone":
        alone(rest[0], float(rest[1]))
    elif what == "prepared":
        prepared(rest[0], rest[1], int(rest[2]))
    else:
        text, ours, peer = compare(int(what) * 1_000_000)
        print(f"{text / 1e6:.0f} MB: {ours}, alone {peer}")
