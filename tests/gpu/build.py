"""The engine, the CUDA library and the tests' way to a device, built with what a bare box has: gcc, g++ and its nvcc,
for the device's own architecture, on every core at once. No cmake, no pip, no network. Objects are kept by content.

    python -m tests.gpu.build [FOLDER]     builds all three into FOLDER (out/gpu-build) and says how long each took

``HOTSTAGE_ENGINE`` and ``HOTSTAGE_CUDA`` name an engine and a library to use instead.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from k8s.images import cuda
from tests.engine.kernel_lib import CPU_PATHS
from tests.engine.kernel_lib import build as build_oracle
from tests.gpu import box
from trainer.cores import free_bytes, usable_cpus

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / "trainer" / "engine"
HERE = Path(__file__).resolve().parent
FOLDER = ROOT / "out" / "gpu-build"

# as trainer/engine/CMakeLists.txt; the rehearsal compares the rooms
ROOMS = ("backend", "core", "comm", "data", "kernels", "kernels/ref", "run", "run/*", "snapshot")
C = shlex.split(
    "-std=c11 -D_GNU_SOURCE -O2 -g1 -fPIC -pthread -Wall -Wextra -Wno-psabi -ffp-contract=off -fno-math-errno"
)
# as `make cuda` compiles, but for the warnings and the resources that it asks for, and with the box's own C++ library
DEVICE = [flag for flag in cuda.FLAGS if flag not in ("-Werror", "all-warnings", "-Xptxas", "-v")]
HOST = cuda.HOST.removeprefix("-nostdinc++,")


COMPILER_BYTES = 3 << 29  # of a compiler's process, at most: as many run at once as a container has memory for


class BuildFailed(Exception):
    """What a compiler said."""


@dataclass
class Builder:
    """Compiles in parallel into a folder, and remembers how long things took."""

    folder: Path
    jobs: int = field(default_factory=lambda: max(1, min(usable_cpus(), free_bytes() // COMPILER_BYTES)))
    took: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def run(self, command: Sequence[str | Path]) -> None:
        words = [str(word) for word in command]
        print(f"$ {shlex.join(words)}", flush=True)
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BuildFailed(
                f"{shlex.join(words)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-6000:]}"
            )

    def objects(self, units: Iterable[tuple[Path, str, Sequence[str]]], headers: bytes) -> list[Path]:
        """Of (source, label, compiler and flags) each."""

        def compiled(unit: tuple[Path, str, Sequence[str]]) -> Path:
            source, label, command = unit
            h = hashlib.sha256(headers + shlex.join(command).encode() + source.read_bytes())
            target = self.folder / f"{label}-{h.hexdigest()[:16]}.o"
            if not target.exists():
                began = time.monotonic()
                made = target.with_suffix(f".{os.getpid()}.o")
                self.run([*command, "-c", source, "-o", made])
                made.replace(target)
                self.took[label] = round(time.monotonic() - began, 1)
            return target

        with ThreadPoolExecutor(self.jobs) as pool:
            return list(pool.map(compiled, units))


def engine_units(compiler: str = "gcc") -> list[tuple[Path, str, list[str]]]:
    """Everything of the engine's library; the slowest first, so that many cores end together."""
    command = [compiler, *C, f"-I{ENGINE}"]
    every = ENGINE / "kernels" / "cpu" / "all.c"
    units = [
        (every, f"cpu-{path}", [*command, f"-DHS_PATH={path}", *flags]) for path, flags in reversed(CPU_PATHS.items())
    ]
    sources = [source for room in ROOMS for source in sorted(ENGINE.glob(f"{room}/*.c"))]
    return units + [(s, "-".join(s.relative_to(ENGINE).with_suffix("").parts), command) for s in sources]


def build_engine(builder: Builder) -> Path:
    """``hotstage-engine``."""
    texts = [p.read_bytes() for p in sorted(ENGINE.rglob("*.h"))]
    texts += [p.read_bytes() for p in sorted((ENGINE / "kernels" / "cpu").glob("*.c"))]
    main = (ENGINE / "main.c", "main", ["gcc", *C, f"-I{ENGINE}"])
    objects = builder.objects([*engine_units(), main], b"\0".join(texts))
    target = builder.folder / "hotstage-engine"
    made = target.with_suffix(f".{os.getpid()}")
    builder.run(["gcc", "-pthread", "-o", made, *objects, "-lm", "-ldl"])
    made.replace(target)
    return target


def library_sources() -> list[Path]:
    """What libhs_cuda.so is made of, as `make cuda` makes it: for nvcc, then for gcc."""
    return [*cuda.sources(), *(ENGINE / "core" / f"{name}.c" for name in cuda.CORE)]


def build_library(builder: Builder, nvcc: str, architecture: str, more: Sequence[str] = ()) -> Path:
    """``libhs_cuda.so`` for one architecture; ``more``: options of nvcc."""
    number = architecture.removeprefix("sm_")
    common = [*DEVICE, "-allow-unsupported-compiler", "-Xcompiler", HOST, f"-I{ENGINE}", *more]
    device = [nvcc, *common, f"-gencode=arch=compute_{number},code=sm_{number}"]
    texts = [p.read_bytes() for p in sorted(ENGINE.rglob("*.h"))]
    units: list[tuple[Path, str, Sequence[str]]] = []
    for source in library_sources():
        label = f"cuda-{'-'.join(source.relative_to(ENGINE).with_suffix('').parts)}"
        if source.suffix == ".c":
            units.append((source, label, ["gcc", *C, "-fvisibility=hidden", f"-I{ENGINE}"]))
        else:
            units.append((source, label, [*device, "-x", "cu"] if source.suffix != ".cu" else device))
    objects = builder.objects(units, b"\0".join(texts))
    target = builder.folder / "libhs_cuda.so"
    made = target.with_suffix(f".{os.getpid()}")
    with tempfile.NamedTemporaryFile("w", suffix=".map") as script:
        script.write(f"{{ global: {cuda.SYMBOL}; local: *; }};\n")
        script.flush()
        builder.run([nvcc, *more, "-shared", "-cudart", "static", "-Xlinker", f"--version-script={script.name}",
                     "-o", made, *objects])  # fmt: skip
    made.replace(target)
    return target


def build_way_to_device(builder: Builder) -> Path:
    """``device_lib.so``: what the tests call through ctypes (device_lib.c)."""
    command = ["gcc", *C, f"-I{ENGINE}"]
    texts = [p.read_bytes() for p in sorted(ENGINE.rglob("*.h"))]
    sources = [
        HERE / "device_lib.c",
        *(ENGINE / f"{name}.c" for name in ("core/status", "core/text", "kernels/extent")),
    ]
    objects = builder.objects([(s, f"way-{s.stem}", command) for s in sources], b"\0".join(texts))
    target = builder.folder / "device_lib.so"
    made = target.with_suffix(f".{os.getpid()}")
    builder.run(["gcc", "-shared", "-pthread", "-o", made, *objects, "-lm", "-ldl"])
    made.replace(target)
    return target


def oracle() -> Path:
    """The tests' kernels of the CPU, which they would build first. Where they cannot be built, the tests that compare
    with them say so, and training is timed all the same."""
    try:
        return build_oracle(strict=False)
    except AssertionError as error:
        print(f"no oracle: {error}", flush=True)
        return Path()


@dataclass(frozen=True)
class Built:
    """Where things are; empty strings of seconds: it was given."""

    engine: Path
    library: Path
    way: Path
    seconds: dict[str, float]
    slowest: dict[str, float]


def build(folder: Path = FOLDER) -> Built:
    """All three, what is named by a variable left out. BuildFailed with the compiler's words."""
    builder = Builder(folder)
    seconds: dict[str, float] = {}
    nvcc = box.tool("nvcc")
    # a wheel's nvcc looks for the runtime in lib64, and the wheel has lib
    beside = Path(nvcc).resolve().parents[1] / "lib" if nvcc else Path()
    more = [f"-L{beside}"] if (beside / "libcudart_static.a").exists() else []
    wanted: list[tuple[str, str, Callable[[], Path]]] = [
        ("library", "HOTSTAGE_CUDA", lambda: build_library(builder, nvcc or "nvcc", box.architecture(), more)),
        ("engine", "HOTSTAGE_ENGINE", lambda: build_engine(builder)),
        ("way", "", lambda: build_way_to_device(builder)),
        ("oracle", "", oracle),
    ]

    def one(what: tuple[str, str, Callable[[], Path]]) -> Path:
        name, given, make = what
        if os.environ.get(given):
            return Path(os.environ[given])
        began = time.monotonic()
        path = make()
        seconds[name] = round(time.monotonic() - began, 1)
        return path

    with ThreadPoolExecutor(len(wanted)) as pool:
        library, engine, way, _ = pool.map(one, wanted)
    slowest = dict(sorted(builder.took.items(), key=lambda item: -item[1])[:6])
    return Built(engine, library, way, seconds, slowest)


def main() -> int:
    try:
        built = build(Path(sys.argv[1]) if sys.argv[1:] else FOLDER)
    except BuildFailed as error:
        print(error)
        return 1
    print(f"engine {built.engine}, library {built.library}; seconds {built.seconds}; slowest {built.slowest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
