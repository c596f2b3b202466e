"""The engine as one static binary a platform, by zig's C compiler (clang with musl): what the engine's image holds. And
as one that is linked to glibc, which the image for GPUs needs: a static one cannot open the CUDA backend.

The compiler comes from the package registry into an environment in the user's cache folder; nothing of the machine's
own toolchain is used, so a binary depends on the sources alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.folders import cache_folder

ROOT = Path(__file__).resolve().parents[2]
ZIG = "0.17.1"
TOOLS = (f"ziglang=={ZIG}", "cmake==3.31.6", "ninja==1.11.1.4")
GLIBC_TARGET = "x86_64-linux-gnu.2.28"
TARGETS = {"amd64": ("x86_64-linux-musl", "x86_64"), "arm64": ("aarch64-linux-musl", "aarch64")}


def cache() -> Path:
    """The user's cache folder for hotstage; made where it is missing."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def say(text: str) -> None:
    sys.stderr.write(f"images: {text}\n")
    sys.stderr.flush()


def environment_of(name: str, pins: Sequence[str], options: Sequence[str] = ()) -> Path:
    """An environment with these wheels, in the user's cache folder; made on first use."""
    digest = hashlib.sha256(" ".join((*pins, sys.version)).encode()).hexdigest()[:12]
    home = cache() / f"{name}-{digest}"
    done = home / ".done"
    if done.exists():
        return home
    with open(cache() / f".{home.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            say(f"installing {', '.join(pins)} into {home} (once)")
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
            pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, *options, *pins], check=True)
            done.touch()
    return home


def tools() -> Path:
    """The ``bin`` folder of an environment with the compiler (100 MB are fetched)."""
    return environment_of("static", TOOLS) / "bin"


def compiler(target: str) -> Path:
    """A folder with ``cc``, ``c++``, ``ar`` and ``ranlib`` for one of zig's targets. The first build for a target makes
    its libc (40 s, once); what zig keeps lies in the user's cache folder."""
    python = tools() / "python"
    folder = python.parents[1] / "for" / target
    folder.mkdir(parents=True, exist_ok=True)
    kept = f'ZIG_GLOBAL_CACHE_DIR="{cache()}/zig" ZIG_LOCAL_CACHE_DIR="{cache()}/zig"'
    compile_for = f"-target {target} -fno-sanitize=all"
    commands = {"cc": f"cc {compile_for}", "c++": f"c++ {compile_for}", "ar": "ar", "ranlib": "ranlib"}
    for name, command in commands.items():
        text = f'#!/bin/sh\n{kept} exec "{python}" -m ziglang {command} "$@"\n'
        wrapper = folder / name
        if not wrapper.exists() or wrapper.read_text() != text:
            made = folder / f".{name}-{os.getpid()}"
            made.write_text(text)
            made.chmod(0o755)
            made.replace(wrapper)
    return folder


def static_engine(arch: str) -> Path:
    """The static binary for amd64 or arm64, stripped; only what changed is compiled again."""
    target, processor = TARGETS[arch]
    return _engine(f"static-engine-{arch}", target, processor, "-static -s")


def glibc_engine() -> Path:
    """The binary for amd64 that opens libraries, for glibc 2.28 and later; stripped."""
    return _engine("glibc-engine-amd64", GLIBC_TARGET, "x86_64", "-s")


def _engine(name: str, target: str, processor: str, link_flags: str) -> Path:
    programs = tools()
    zig = compiler(target)
    # a folder of its own for each tree and compiler: CMake does not go on where another one configured
    build = cache() / name / hashlib.sha256(f"{ROOT} {zig}".encode()).hexdigest()[:8]
    build.mkdir(parents=True, exist_ok=True)
    settings = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": processor,
        "CMAKE_C_COMPILER": str(zig / "cc"),
        "CMAKE_AR": str(zig / "ar"),
        "CMAKE_RANLIB": str(zig / "ranlib"),
        "CMAKE_MAKE_PROGRAM": str(programs / "ninja"),
        "CMAKE_BUILD_TYPE": "Release",
        # no path of the machine in the binary
        "CMAKE_C_FLAGS": f"-ffile-prefix-map={ROOT}=.",
        "CMAKE_EXE_LINKER_FLAGS": link_flags,
    }
    env = dict(os.environ)
    for variable in ("CC", "CFLAGS", "LDFLAGS", "CPPFLAGS"):
        env.pop(variable, None)
    say(f"building {name}")
    cmake = str(programs / "cmake")
    configure = [cmake, "-G", "Ninja", "-S", str(ROOT / "trainer" / "engine"), "-B", str(build)]
    with open(build / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _quiet([*configure, *(f"-D{key}={value}" for key, value in settings.items())], env)
        _quiet([cmake, "--build", str(build), "--target", "hotstage-engine"], env)
    return build / "hotstage-engine"


def _quiet(command: list[str], env: dict[str, str]) -> None:
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed:\n{(done.stdout + done.stderr)[-4000:]}")
