"""Where the C engine's binary lies: ``HOTSTAGE_ENGINE``, else what the installation put beside this package. Where its
library for CUDA lies, and the libraries that this one opens. Nothing is opened here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from trainer.errors import LaunchRefused

NAME = "hotstage-engine"
CUDA_NAME = "libhs_cuda.so"
CUDA_WHEELS = ("cu13", "nccl")
"""Folders under ``nvidia`` in which the wheels of ``hotstage[cuda]`` put their libraries."""


def engine_binary() -> Path:
    """The engine to run. Raises LaunchRefused where there is none, saying where it looked.

    In a source tree the compiled binary lies in the environment that ``make setup`` filled, not beside the sources, so
    the environment's packages are asked too.
    """
    named = os.environ.get("HOTSTAGE_ENGINE")
    if named:
        path = Path(named).absolute()
        if not os.access(path, os.X_OK) or path.is_dir():
            raise LaunchRefused(
                f"HOTSTAGE_ENGINE names {path}, which is no program; unset it or give the engine's path"
            )
        return path
    places = [folder / NAME for folder in _bins()]
    for place in places:
        if os.access(place, os.X_OK):
            return place
    looked = ", ".join(dict.fromkeys(str(place) for place in places))
    raise LaunchRefused(f"the engine is not built: no {looked}; run 'make setup', or name it in HOTSTAGE_ENGINE")


def ready_engine() -> Path:
    """The engine, once it has answered. Raises LaunchRefused where it does not run: of another machine, or cut."""
    engine = engine_binary()
    try:
        done = subprocess.run([engine, "version"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except OSError as error:
        why = error.strerror or str(error)
    else:
        if done.returncode == 0 and done.stdout:
            return engine
        said = done.stderr[:400].decode(errors="replace").strip()
        why = f"it left with {done.returncode}" + (f": {said}" if said else "")
    raise LaunchRefused(
        f"the engine {engine} does not run ({why}): it is of another kind of machine, or damaged; build it again with "
        "'make setup', or name another in HOTSTAGE_ENGINE"
    )


def _bins() -> list[Path]:
    return [
        Path(__file__).resolve().parent / "bin",
        *(Path(sysconfig.get_path(kind)) / "trainer" / "bin" for kind in ("platlib", "purelib")),
    ]


def cuda_library() -> Path | None:
    """The engine's backend for CUDA: what ``HOTSTAGE_CUDA`` names, be it there or not (the engine says what is wrong
    with it); else beside the engine, else what ``make cuda`` built in this source tree; None where there is none.
    """
    named = os.environ.get("HOTSTAGE_CUDA")
    if named:
        return Path(named).absolute()
    places = [folder / CUDA_NAME for folder in _bins()]
    places.append(Path(__file__).resolve().parent.parent / "out" / "cuda" / CUDA_NAME)
    return next((place for place in places if place.is_file()), None)


def cuda_folders() -> list[Path]:
    """Folders of the libraries that the backend opens by absolute path: those of ``HOTSTAGE_CUDA_LIBRARIES`` (colons
    between them), then those of the wheels of ``hotstage[cuda]`` in this environment.
    """
    folders = [Path(part) for part in os.environ.get("HOTSTAGE_CUDA_LIBRARIES", "").split(":") if part]
    for kind in ("platlib", "purelib"):
        folders += [Path(sysconfig.get_path(kind)) / "nvidia" / name / "lib" for name in CUDA_WHEELS]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def cuda_environment() -> dict[str, str]:
    """What the engine is told of both, beside its own environment; empty where there is no library.

    ``LD_LIBRARY_PATH`` is for what the libraries open themselves, by name: cuBLASLt its parts.
    """
    library = cuda_library()
    if library is None:
        return {}
    told, folders = {"HOTSTAGE_CUDA": str(library)}, os.pathsep.join(map(str, cuda_folders()))
    if folders:
        told["HOTSTAGE_CUDA_LIBRARIES"] = folders
        told["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, (folders, os.environ.get("LD_LIBRARY_PATH"))))
    return told


if __name__ == "__main__":
    sys.stdout.write(f"{engine_binary()}\n")
