"""The names of a run's objects in a store, in one place.

    data/<dataset digest>/...
    runs/<run>/spec                                   canonical What
    runs/<run>/plans/<plan digest>                    a plan file
    runs/<run>/log/<20 digits>                        records
    runs/<run>/folds/<20 digits>-<token>              folded states that fold records name
    runs/<run>/manifests/<step>-<epoch>/parts/<node>  part manifests, one an agent
    runs/<run>/manifests/<step>-<epoch>/manifest      what the checkpoint record names
    runs/<run>/manifests/<step>-<epoch>/pages/...     of either, where it is large (pages.py)
    runs/<run>/chunks/<step>-<epoch>/<rank>-<incarnation>-<index>
    runs/<run>/live/...                               hints; claims (claims.py), the log's condensed state (log/),
                                                      metrics (curve.py), output and status (agent/output.py)

``<step>`` has 12 digits, ``<epoch>`` 8, ``<node>`` 5, ``<rank>`` 6, ``<index>`` 6.
"""

from __future__ import annotations

import re

from checkpoint.errors import Damaged, StoreRefused

_RUN = re.compile(r"[a-z0-9]([a-z0-9-]{0,98}[a-z0-9])?\Z")


def check_run(run: str) -> str:
    """The run's name, or StoreRefused where it is not lower-case letters, digits and dashes."""
    if _RUN.match(run) is None:
        raise StoreRefused(f"run {run[:100]!r}: must be lower-case letters, digits and inner dashes, 100 at most")
    return run


def run_key(run: str, *names: str) -> str:
    """A key under the run: ``run_key("r", "log", "1") == "runs/r/log/1"``."""
    return "/".join(("runs", check_run(run), *names))


def spec_key(run: str) -> str:
    return run_key(run, "spec")


def plan_key(run: str, digest: str) -> str:
    return run_key(run, "plans", digest)


def log_prefix(run: str) -> str:
    return run_key(run, "log") + "/"


def log_key(run: str, n: int) -> str:
    return run_key(run, "log", f"{n:020d}")


def fold_name(n: int, token: str) -> str:
    """Relative to the run."""
    return f"folds/{n:020d}-{token}"


def point(step: int, epoch: int) -> str:
    """The folder name of a checkpoint: ``000000000050-00000003``."""
    return f"{step:012d}-{epoch:08d}"


def part_name(step: int, epoch: int, node: int) -> str:
    """Of a node's part manifest, relative to the run."""
    return f"manifests/{point(step, epoch)}/parts/{node:05d}"


def manifest_name(step: int, epoch: int) -> str:
    """Of a merged manifest, relative to the run."""
    return f"manifests/{point(step, epoch)}/manifest"


def chunk_name(step: int, epoch: int, rank: int, incarnation: str, index: int) -> str:
    """Of a chunk, relative to the run; the incarnation (letters and digits) makes an agent's names its own."""
    return f"chunks/{point(step, epoch)}/{rank:06d}-{incarnation}-{index:06d}"


_RELATIVE = re.compile(r"(chunks|manifests|folds)(/[A-Za-z0-9_+=@-][A-Za-z0-9._+=@-]{0,199}){1,4}\Z")


def check_relative(name: str, folder: str, what: str) -> str:
    """A name found in a hostile object: relative to the run, in this folder; Damaged otherwise."""
    if _RELATIVE.match(name) is None or not name.startswith(folder + "/"):
        raise Damaged(f"{what}: {name[:120]!r} is not a name under {folder}/ of the run")
    return name
