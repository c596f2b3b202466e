"""Makes a golden run: the store that a version of hotstage leaves of a small run, for later versions to go on from.

    PYTHONPATH=TREE HOTSTAGE_ENGINE=ENGINE python tests/golden/make_run.py TREE NAME

``TREE`` is a checkout of that version, whose commands and packages are used; ``NAME`` is the version. Written is
``tests/golden/runs/NAME.tar.xz``: the store as a driver leaves it that died before its last checkpoint (the
records of that and of the end are not there, nor are hints and claims: another machine), with 256 records and more, so
that there is a folded state; and ``expected.json``: the digests that the run had, also those of its end.
"""

from __future__ import annotations

import io
import json
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

SPEC = """
name = "golden"
[model]
family = "gpt2"
layers = 2
width = 8
heads = 2
context = 16
[train]
steps = 12
batch = 4
microbatch = 2
sequence = 8
seed = 3
[data]
source = "text:corpus/*.txt"
vocab_size = 260
[parallel]
stages = 2
[checkpoint]
every = 4
"""
TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on. "
RECORDS = 258


def make(tree: Path, folder: Path) -> dict[str, object]:
    """Leave ``folder/store``; what is to be expected of it."""
    from checkpoint.log import RunLog
    from checkpoint.store import open_store

    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.txt").write_text(TEXT * 20)
    (folder / "spec.toml").write_text(SPEC)
    url = (folder / "store").as_uri()
    command = [sys.executable, "-m", "flows.cli", "train", "spec.toml", "--no-prefect", "--store", url]
    subprocess.run(command, cwd=folder, check=True)
    store = open_store(url)
    (run,) = [path.name for path in (folder / "store" / "runs").iterdir()]
    log = RunLog(store, run, writer="golden")
    state = log.fold()
    points = {c.step: c.state_digest for c in state.checkpoints}
    assert len(points) > 1, "its steps were faster than the store: once more"
    assert 12 in points
    assert state.ended is not None
    assert state.ended.outcome == "succeeded"
    last = next(c.n for c in state.checkpoints if c.step == 12)
    for n in range(last, state.n + 1):
        (folder / "store" / "runs" / run / "log" / f"{n:020d}").unlink()
    for left in ("live", "chunks/000000000012-00000001", "manifests/000000000012-00000001"):
        shutil.rmtree(folder / "store" / "runs" / run / left, ignore_errors=True)
    state = log.fold()
    assert (state.n, state.ended) == (last - 1, None)
    assert {c.step for c in state.checkpoints} == points.keys() - {12}
    while state.n < RECORDS:
        state = log.append("intervention", {"kind": "note", "number": state.n}, state)
    shutil.rmtree(folder / "store" / "runs" / run / "live", ignore_errors=True)
    return {"run": run, "records": state.n, "digests": points}


def main() -> None:
    tree, name = Path(sys.argv[1]).resolve(), sys.argv[2]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        expected = make(tree, folder)
        out = Path(__file__).parent / "runs" / f"{name}.tar.xz"
        out.parent.mkdir(exist_ok=True)
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
            (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
            shutil.rmtree(folder / "store" / "tmp", ignore_errors=True)
            files = [folder / "expected.json", *sorted(p for p in (folder / "store").rglob("*") if p.is_file())]
            for path in files:
                info = tarfile.TarInfo(str(path.relative_to(folder)))
                info.size, info.mode = path.stat().st_size, 0o644
                with open(path, "rb") as data:
                    tar.addfile(info, data)
        out.write_bytes(lzma.compress(packed.getvalue(), preset=9))
        print(f"{out}: {len(files)} files, {out.stat().st_size} bytes, {expected}")


if __name__ == "__main__":
    main()
