"""Proves and times the CUDA backend on the first GPU of this machine (docs/gpu-session.md).

    python3 -m tests.gpu session    everything, at most 9 minutes a call; call again until it exits with 0 or 1
    python3 -m tests.gpu test       the tests alone
    python3 -m tests.gpu bench      the figures alone

Results and state are in ``--folder`` (out/gpu), and copied into ``$OUT`` where that names a folder. Needs Python 3.11,
NumPy, pydantic and pytest beside gcc, g++, nvcc and a driver; no network. Exit codes: 0 all is done and nothing failed;
1 something failed; 69 this machine cannot, and why; 75 there is more to do: call again.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

CANNOT = 69
OLDEST = (3, 11)
BARE = Path(__file__).resolve().parent / "bare"
NEEDED = {"numpy": "numpy", "pydantic": "pydantic", "pytest": "pytest"}
STAND_INS = ("msgpack", "safetensors")  # in BARE
FIGURES = ("train", "torch", "jax", "roofline", "timeline", "snapshot", "fp8", "facts")
BUDGET_S = 540.0


def say(text: str) -> None:
    print(text, flush=True)


def missing_packages(names: Iterable[str] = tuple(NEEDED)) -> list[str]:
    """Of what the session cannot do without."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def python_path(stand_ins: bool) -> str:
    """Of a stage's processes and the peers': it comes before what is installed, so that what stands in for packages is
    left out where none of them is missing."""
    return os.pathsep.join(p for p in (os.environ.get("PYTHONPATH", ""), str(BARE) if stand_ins else "") if p)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tests.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["session", "test", "bench"])
    parser.add_argument("--folder", type=Path, default=Path("out/gpu"))
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="SECONDS", help="of this call (540)")
    parser.add_argument("--until-done", action="store_true", help="go on in calls until all is done")
    parser.add_argument("--only", default="", metavar="NAME,NAME", help="stages whose name begins so, and the build")
    parser.add_argument("--again", default="", metavar="NAME,NAME", help="do these again, whatever came out before")
    options = parser.parse_args()
    if sys.version_info < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        say(
            f"{sys.executable} is Python {sys.version.split()[0]}, and {oldest} or newer is needed: "
            "run this with another one (make: GPU_PYTHON)"
        )
        return CANNOT
    missing = missing_packages()
    if missing:
        say(
            f"{sys.executable} has no {', '.join(missing)}: name an environment that has them "
            "(PYTHONPATH for wheels that were brought along); docs/gpu-session.md says how"
        )
        return CANNOT
    # what this tree imports and a bare machine may lack has a small stand-in, behind what is installed
    stand_ins = bool(missing_packages(STAND_INS))
    sys.path.append(str(BARE))
    from tests.gpu import box

    lacks = box.lacks()
    if "device" in lacks:
        say(f"skipped: {lacks['device']}. What can be tested without one, `make test` does, emulated")
        return CANNOT
    from tests.gpu import report
    from tests.gpu.session import MORE, Session, tree_digest
    from tests.gpu.stages import BUILT, stages, tiny

    gpus = box.devices()
    key = {
        "tree": tree_digest(),
        "device": "emulated" if box.emulated() else gpus[0]["name"],
        "driver": "none" if box.emulated() else gpus[0]["driver_version"],
    }
    environment = {"PYTHONPATH": python_path(stand_ins), "PYTHONUNBUFFERED": "1"} | box.libraries()
    environment |= box.cache(options.folder / "cache")
    listed = stages()
    if options.what == "test":
        listed = [s for s in listed if not s.name.startswith(FIGURES)]
    elif options.what == "bench":
        listed = [s for s in listed if s.name.startswith(FIGURES) or s.name == "build"]
    if options.only:
        listed = [s for s in listed if s.name.startswith(("build", *options.only.split(",")))]
    out = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
    began = time.monotonic()
    while True:
        session = Session(
            options.folder.resolve(), listed, key, lacks, lambda s: report.publish(s, out, tiny()), environment
        )
        for name in list(session.done):
            if options.again and name.startswith(tuple(options.again.split(","))):
                del session.done[name]
        options.again = ""
        if not (session.folder / BUILT).exists():  # results came along from another machine, what was built did not
            session.done.pop("build", None)
        code = session.run(options.budget - (0 if options.until_done else time.monotonic() - began))
        if code != MORE or not options.until_done:
            break
    say((session.folder / "summary.txt").read_text())
    say(f"results: {session.folder}{f', copied to {out}' if out else ''}")
    if code == MORE:
        say(f"there is more to do ({', '.join(s.name for s in session.left())}): the same command goes on")
    return code


if __name__ == "__main__":
    sys.exit(main())
