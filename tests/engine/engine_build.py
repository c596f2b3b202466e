"""The engine, built from the sources as they are now: for tests of the binary and of programs that link its library.

A build is kept in ``hotstage/engine/<digest>`` of the user's cache folder (`trainer.folders`); the
digest is over the engine's sources, the compiler's version and the options: a change builds anew, nothing else does.
``HOTSTAGE_ENGINE`` names a binary to test instead (what the ``engine`` fixture gives).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.compilers import find
from trainer.folders import cache_folder

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "trainer" / "engine"
PROGRAMS = Path(__file__).resolve().parent / "programs"
NAME = "hotstage-engine"


def _tool(name: str) -> str:
    """A build tool of this environment, else of the system."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found, f"{name} is not installed; `make setup` brings it"
    return found


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"


def _cache() -> Path:
    return cache_folder() / "engine"


def _digest(compiler: str, options: list[str]) -> str:
    h = hashlib.sha256(shlex.join([compiler, *options]).encode())
    h.update(subprocess.run([compiler, "--version"], check=True, capture_output=True).stdout)
    for path in sorted(p for p in SOURCES.rglob("*") if p.suffix in (".c", ".h", ".txt")):
        h.update(f"{path.relative_to(SOURCES)}\0".encode() + path.read_bytes() + b"\0")
    return h.hexdigest()[:24]


def build_folder(compiler: str = "cc", sanitize: str = "") -> Path:
    """A finished build: holds ``hotstage-engine`` and ``libhotstage.a``. Safe in several processes at once."""
    path = find(compiler)
    options = [f"-DHS_SANITIZE={sanitize}", "-DHS_WERROR=ON", "-DCMAKE_BUILD_TYPE=Release"]
    base = _cache()
    base.mkdir(parents=True, exist_ok=True)
    folder = base / _digest(path, options)
    with (base / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / ".done").exists():
            print(f"building the engine with {compiler} {sanitize} into {folder}", file=sys.stderr)
            shutil.rmtree(folder, ignore_errors=True)
            configure = ["-S", str(SOURCES), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}"]
            configure += [f"-DCMAKE_C_COMPILER={path}", *options]
            _run([_tool("cmake"), *configure])
            _run([_tool("cmake"), "--build", str(folder), "--parallel", str(len(os.sched_getaffinity(0)))])
            (folder / ".done").touch()
    return folder


def build_engine(compiler: str = "cc", sanitize: str = "") -> Path:
    """The binary of a build."""
    return build_folder(compiler, sanitize) / NAME


def _small(name: str, sources: list[Path], flags: list[str]) -> Path:
    """Compiles sources in one call; kept by their content, every header's, and the flags."""
    base = _cache() / "programs"
    base.mkdir(parents=True, exist_ok=True)
    h = hashlib.sha256(shlex.join(flags).encode())
    for path in [*sources, *sorted(SOURCES.rglob("*.h"))]:
        h.update(path.read_bytes() + b"\0")
    target = base / f"{name}-{h.hexdigest()[:24]}"
    if not target.exists():
        made = target.with_suffix(f".{os.getpid()}")
        _run([find("cc"), *flags, f"-I{SOURCES}", "-o", str(made), *map(str, sources), "-lm", "-ldl"])
        made.replace(target)
    return target


def build_flipping(kernel: str, step: int, rank: int, *, nan: bool = False) -> Path:
    """The engine with ``programs/flip_kernel.c`` around its kernels: this one is wrong once, by a bit or a NaN."""
    built = build_folder()
    flags = shlex.split("-std=c11 -D_GNU_SOURCE -O1 -g1 -pthread -ffp-contract=off -Wall -Wextra -Werror -rdynamic")
    flags += [f"-DFLIP_OP=HS_K_{kernel}", f"-DFLIP_STEP={step}", f'-DFLIP_RANK="{rank}"', *["-DFLIP_NAN"] * nan]
    flags += ["-Wl,--wrap=hs_kernels_pick", f"-DBUILT={built.name}"]  # the library's content counts for what is kept
    sources = [PROGRAMS / "flip_kernel.c", SOURCES / "main.c", built / "libhotstage.a"]
    return _small("flipping", sources, flags)


def build_preload(name: str = "preload_alloc") -> Path:
    """``programs/<name>.c``, to load before the engine (LD_PRELOAD)."""
    flags = shlex.split("-std=c11 -D_GNU_SOURCE -O1 -g1 -shared -fPIC -Wall -Wextra -Werror")
    return _small(name, [PROGRAMS / f"{name}.c"], flags)


def build_idle_device() -> Path:
    """``programs/idle_device.c``, for HOTSTAGE_CUDA."""
    flags = shlex.split("-std=c11 -D_GNU_SOURCE -O2 -g1 -shared -fPIC -Wall -Wextra -Werror")
    return _small("idle_device", [PROGRAMS / "idle_device.c", SOURCES / "core" / "status.c"], flags)


@pytest.fixture(scope="session")
def engine() -> Path:
    """The engine's binary: ``HOTSTAGE_ENGINE`` where set, else built here."""
    named = os.environ.get("HOTSTAGE_ENGINE")
    return Path(named) if named else build_engine()
