"""The CUDA backend and its kernels as one library, ``out/cuda/libhs_cuda.so``, for every architecture at once, with no
toolkit, no g++ and no GPU; and ``out/cuda/kernels.json``: registers, spills and shared memory of every kernel.

    python -m k8s.images.cuda        (`make cuda`; exits 69, saying why, where the compiler cannot be had)

nvcc comes in pinned wheels from the package registry, into the user's cache folder; its host compiler is the clang that
the engine's image is built with (static.py), and the few things that CUDA's headers ask of a C++ library are in
``cuda_host/``. So the library depends on the sources and the pins alone. Objects are kept by content.

A kernel that spills registers, or has local memory otherwise, fails the build, unless ``SPILLS`` says why it may.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from k8s.images.static import ROOT, cache, compiler, environment_of

CANNOT = 69
WHEELS = (
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
    "nvidia-cuda-cuobjdump==13.2.78",
)
# the code of 100f is a family's: it runs on a B200 (10.0) and on a B300 or GB300 (10.3), where that of 100a does not
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100f")
# beside them PTX, which the driver of any other device compiles as it loads it
PORTABLE = "compute_80"
ENGINE = ROOT / "trainer" / "engine"
ROOMS = (ENGINE / "backend" / "cuda", ENGINE / "kernels" / "cuda")  # every .cu and .cc there, but emulate*
CORE = ("hash", "math", "status")  # of core/, which they call
HEADERS = ROOT / "k8s" / "images" / "cuda_host"
OUT = ROOT / "out" / "cuda"
TARGET = "x86_64-linux-gnu.2.28"
SYMBOL = "hs_cuda_backend"
# -fmad=false: a product is rounded unless the source says fma; bits are the CPU's (kernels/cuda/device.h)
FLAGS = shlex.split("-std=c++17 -O3 -lineinfo -fmad=false -Werror all-warnings -Xptxas -v")
HOST = "-nostdinc++,-fPIC,-fvisibility=hidden,-fno-exceptions,-fno-rtti,-fno-threadsafe-statics"
SPILLS: dict[str, str] = {}  # kernel: why it may


class CannotBuild(Exception):
    """What this machine lacks."""


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one architecture."""

    registers: int
    spill_bytes: int  # stored and loaded, a thread
    stack_bytes: int
    shared_bytes: int


Table = dict[str, dict[str, Resources]]  # by kernel, then architecture


def say(text: str) -> None:
    sys.stderr.write(f"cuda: {text}\n")
    sys.stderr.flush()


def toolkit() -> Path:
    """The folder with nvcc's ``bin`` and ``include``; it and the host compiler are fetched at first use."""
    try:
        home = environment_of("cuda", WHEELS, ("--no-deps",))
        compiler(TARGET)
    except subprocess.CalledProcessError as error:
        raise CannotBuild(
            f"the compilers cannot be had: {shlex.join(map(str, error.cmd))} ended with {error.returncode}"
        ) from error
    return next(home.glob("lib/python3*/site-packages/nvidia/cu13"))


def host_compiler() -> list[str]:
    """nvcc's options for the compiler of host code, and the headers that stand in for a C++ library's."""
    return ["-ccbin", str(compiler(TARGET) / "c++"), "-allow-unsupported-compiler", "-Xcompiler", HOST, f"-I{HEADERS}"]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout + done.stderr


def sources() -> list[Path]:
    """What nvcc compiles: a file that is dropped into one of the rooms is built."""
    found = [p for room in ROOMS for p in sorted(room.iterdir()) if p.suffix in (".cu", ".cc")]
    return [p for p in found if not p.name.startswith("emulate")]


def compile_all(home: Path) -> tuple[list[Path], Table]:
    """The objects of every source, and what their kernels take."""
    kept = cache() / "cuda-objects"
    kept.mkdir(parents=True, exist_ok=True)
    codes = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in ARCHITECTURES]
    codes.append(f"-gencode=arch={PORTABLE},code={PORTABLE}")
    command = [str(home / "bin" / "nvcc"), *host_compiler(), *FLAGS, *codes, f"-I{ENGINE}"]
    rooms = ("backend", "core", "kernels", "wire")
    headers = [p.read_bytes() for room in rooms for p in sorted((ENGINE / room).rglob("*.h"))]
    headers += [p.read_bytes() for p in sorted(HEADERS.iterdir())]
    common = hashlib.sha256(b"\0".join([shlex.join([*WHEELS, *command[3:-1]]).encode(), *headers]))

    def compiled(source: Path) -> tuple[Path, str]:
        key = common.copy()
        key.update(source.read_bytes())
        target = kept / f"{source.parents[1].name}-{source.stem}-{key.hexdigest()[:24]}.o"
        told = target.with_suffix(".txt")
        if not (target.exists() and told.exists()):
            made = target.with_suffix(f".{os.getpid()}.o")
            told.write_text(_run([*command, "-c", str(source), "-o", str(made)]))
            made.replace(target)
        return target, told.read_text()

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = list(pool.map(compiled, sources()))
    core = [kept / f"{name}-{common.hexdigest()[:24]}.o" for name in CORE]
    c = [str(compiler(TARGET) / "cc"), "-std=c11", "-D_GNU_SOURCE", "-O2", "-fPIC", "-ffp-contract=off"]
    for name, made in zip(CORE, core, strict=True):
        _run([*c, "-fvisibility=hidden", f"-I{ENGINE}", "-c", str(ENGINE / "core" / f"{name}.c"), "-o", str(made)])
    table: Table = {}
    for _, text in results:
        for kernel, arch, use in uses_of(text):
            table.setdefault(kernel, {})[arch] = use
    return [*(path for path, _ in results), *core], table


ENTRY = re.compile(
    r"Compiling entry function '(?P<name>[^']+)' for '(?P<arch>sm_\w+)'\n"
    r"(?:.*Function properties.*\n)?"
    r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers(?P<rest>.*)"
)


def uses_of(text: str) -> Iterator[tuple[str, str, Resources]]:
    """(kernel, architecture, what it takes) of what ``ptxas -v`` said."""
    for m in ENTRY.finditer(text):
        shared = re.search(r"(\d+) bytes smem", m["rest"])
        use = Resources(
            registers=int(m["registers"]),
            spill_bytes=int(m["stores"]) + int(m["loads"]),
            stack_bytes=int(m["stack"]),
            shared_bytes=int(shared[1]) if shared else 0,
        )
        yield kernel_name(m["name"]), m["arch"], use


def kernel_name(mangled: str) -> str:
    """``attention_dq<float>``: the mangled name's first name, and its template arguments."""
    m = re.match(r"_Z(\d+)", mangled)
    if m is None:
        return mangled
    start = m.end()
    name, rest = mangled[start : start + int(m[1])], mangled[start + int(m[1]) :]
    types: list[str] = []
    classes: list[str] = []  # S0_ is the first of them, S_ the kernel's own name
    if rest.startswith("I"):
        rest = rest[1:]
        while not rest.startswith("E"):
            if rest.startswith("f"):
                types, rest = [*types, "float"], rest[1:]
            elif named := re.match(r"\d+(__nv_bfloat16|e4m3|e5m2|token_of|place_of)", rest):
                classes.append(named[1].replace("__nv_bfloat16", "bf16"))
                types, rest = [*types, classes[-1]], rest[named.end() :]
            elif again := re.match(r"S(\d)_", rest):
                types, rest = [*types, classes[int(again[1])]], rest[again.end() :]
            elif number := re.match(r"L[ib](\d+)E", rest):
                types, rest = [*types, number[1]], rest[number.end() :]
            else:
                raise ValueError(
                    f"{mangled}: a template argument that is none of our types and no number; teach kernel_name"
                )
    return f"{name}<{', '.join(types)}>" if types else name


def faults(table: Table) -> list[str]:
    """Why the build must not stand: spills that nobody answers for, kernels that an architecture lacks."""
    found = []
    for kernel, uses in sorted(table.items()):
        missing = [arch for arch in ARCHITECTURES if arch not in uses]
        if missing:
            found.append(f"{kernel} was not compiled for {', '.join(missing)}")
        spills = {arch: use.spill_bytes for arch, use in uses.items() if use.spill_bytes}
        if spills and kernel not in SPILLS:
            told = ", ".join(f"{n} bytes on {arch}" for arch, n in spills.items())
            found.append(f"{kernel} spills registers ({told}); give it fewer live values or a block of fewer threads, "
                         "or say in SPILLS of k8s/images/cuda.py why it may")  # fmt: skip
        stacks = {arch: use.stack_bytes for arch, use in uses.items() if use.stack_bytes and not use.spill_bytes}
        if stacks and kernel not in SPILLS:
            told = ", ".join(f"{n} bytes on {arch}" for arch, n in stacks.items())
            found.append(f"{kernel} has an array in local memory ({told}), of which a context takes some for every "
                         "thread that its device can hold (1 KiB is 280 MB), and no plan counts it: index it with "
                         "constants, or lay it into shared memory")  # fmt: skip
        if not spills and not stacks and kernel in SPILLS and not missing:
            found.append(f"{kernel} no longer spills: take it out of SPILLS of k8s/images/cuda.py")
    return found


WORD = re.compile(r"\s*(st|ld)\.global\.[bfsu]32\s+(?:%\w+, )?\[(%\w+)(?:\+(\d+))?\]")
BRANCH = re.compile(r"\s*(?:@|bra\b|\$L)")


def torn(ptx: str) -> list[str]:
    """The kernels that access 16 bytes of the device's memory as four words where nothing branches between, by their
    linkers' names: of a struct that is copied the compiler may not see that it is one access, and caches take four
    times the requests.
    """
    found: dict[str, None] = {}
    kernel, before, words = "", ("", "", 0), 1
    for line in ptx.splitlines():
        if m := WORD.match(line):
            what, base, at = m[1], m[2], int(m[3] or 0)
            words = words + 1 if (what, base, at - 4) == before else 1
            before = (what, base, at)
            if words == 4:
                found[kernel] = None
        elif m := re.search(r"\.entry (\w+)", line):
            kernel, before = m[1], ("", "", 0)
        elif BRANCH.match(line):
            before = ("", "", 0)
    return list(found)


def link(home: Path, objects: list[Path]) -> Path:
    """The library, with the CUDA runtime inside and one symbol outside."""
    OUT.mkdir(parents=True, exist_ok=True)
    library = OUT / "libhs_cuda.so"
    made = library.with_suffix(f".{os.getpid()}")
    runtime = ["-lpthread", "-ldl", "-lrt", "-lm", str(home / "lib" / "libcudart_static.a")]
    with tempfile.NamedTemporaryFile("w", suffix=".map") as script:
        script.write(f"{{ global: {SYMBOL}; local: *; }};\n")
        script.flush()
        flags = ["-shared", "-s", f"-Wl,--version-script={script.name}"]
        _run([str(compiler(TARGET) / "cc"), *flags, "-o", str(made), *map(str, objects), *runtime])
    made.replace(library)
    return library


def look_into(home: Path, library: Path, table: Table) -> list[str]:
    """What the finished library lacks: the table's kernels with the table's registers, and one symbol that answers."""
    found = []
    arch, inside = "", set()
    for line in _run([str(home / "bin" / "cuobjdump"), "--dump-resource-usage", str(library)]).splitlines():
        if m := re.match(r"arch = (\w+)", line):
            arch = m[1]
        elif m := re.match(r" Function (\w+):", line):
            kernel = kernel_name(m[1])
        elif m := re.search(r"REG:(\d+)", line):
            inside.add((kernel, arch))
            want = table[kernel][arch].registers
            if int(m[1]) != want:
                found.append(
                    f"{kernel} has {m[1]} registers on {arch} in the library, {table[kernel][arch].registers} compiled"
                )
    lost = {(kernel, arch) for kernel, uses in table.items() for arch in uses} - inside
    found += [f"{kernel} for {arch} is not in the library" for kernel, arch in sorted(lost)]
    listed = _run([str(home / "bin" / "cuobjdump"), "--list-ptx", str(library)])
    if PORTABLE.replace("compute", "sm") not in listed:
        found.append(f"the library has no PTX of {PORTABLE} for devices that are none of {', '.join(ARCHITECTURES)}")
    ptx = _run([str(home / "bin" / "cuobjdump"), "--dump-ptx", str(library)])
    found += [
        f"{kernel_name(name)} accesses 16 bytes as four words: store, load or put16 of device.h make it one access"
        for name in torn(ptx)
    ]
    outside = [line.split()[-1] for line in _run(["nm", "-D", "--defined-only", str(library)]).splitlines()]
    if outside != [SYMBOL]:
        return [*found, f"the library exports {', '.join(outside) or 'nothing'}; it must be {SYMBOL} alone"]
    answer = getattr(ctypes.CDLL(str(library)), SYMBOL)
    answer.restype = ctypes.POINTER(ctypes.c_uint32)
    version = re.search(r"define HS_BACKEND_VERSION (\d+)", (ENGINE / "backend" / "backend.h").read_text())
    assert version is not None
    if answer()[0] != int(version[1]):
        found.append(f"{SYMBOL} answers with version {answer()[0]}, the sources have {version[1]}")
    return found


def main() -> int:
    try:
        home = toolkit()
    except CannotBuild as error:
        say(str(error))
        return CANNOT
    objects, table = compile_all(home)
    wrong = faults(table)
    if not wrong:
        wrong = look_into(home, link(home, objects), table)
    for fault in wrong:
        say(fault)
    if wrong:
        return 1
    told = {
        "version": 1,
        "wheels": list(WHEELS),
        "architectures": list(ARCHITECTURES),
        "spills": SPILLS,
        "kernels": {name: {arch: asdict(use) for arch, use in uses.items()} for name, uses in sorted(table.items())},
    }
    (OUT / "kernels.json").write_text(json.dumps(told, indent=1) + "\n")
    size = (OUT / "libhs_cuda.so").stat().st_size
    say(f"{len(table)} kernels for {', '.join(ARCHITECTURES)}, no spills but those that SPILLS allows: "
        f"out/cuda/libhs_cuda.so ({size >> 10} KiB), out/cuda/kernels.json")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
