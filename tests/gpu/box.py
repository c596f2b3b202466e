"""What the machine has: compilers, tools, libraries, devices. Found, never assumed; nothing is installed.

python -m tests.gpu.box        prints it as JSON
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.folders import cache_folder

LIBRARIES = {  # what libhs_cuda.so opens, with the wheel that has it
    "libcublasLt.so.13": "nvidia-cublas",
    "libnccl.so.2": "nvidia-nccl-cu13",
}
PRODUCTS = "libcublasLt.so.13"  # without it there is no kernel path cuda


def site_folders() -> list[Path]:
    """Where NVIDIA's wheels put things: ``nvidia/`` of every folder that Python looks in."""
    return [Path(p) / "nvidia" for p in dict.fromkeys(sys.path) if p and (Path(p) / "nvidia").is_dir()]


def toolkits() -> list[Path]:
    """Folders of CUDA toolkits, the likeliest first."""
    named = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    found = [Path(p) for p in named] + ([Path(on_path).resolve().parents[1]] if on_path else [])
    found += [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True), Path("/opt/cuda")]
    found += [folder for site in site_folders() for folder in sorted(site.glob("cu1*"), reverse=True)]
    return [p for p in dict.fromkeys(found) if p.is_dir()]


def tool(name: str) -> str | None:
    """A program of the toolkit, or of the system."""
    places = [str(kit / "bin") for kit in toolkits()]
    places += (
        [str(p) for p in sorted(Path("/opt/nvidia").glob("*/*/"), reverse=True)] if Path("/opt/nvidia").is_dir() else []
    )
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))


def library_folders() -> list[str]:
    """Folders with the libraries that the backend opens, PyTorch's first: they are of one release."""
    folders = [
        folder for site in site_folders() for folder in (*sorted(site.glob("*/lib")), *sorted(site.glob("*/lib64")))
    ]
    folders += [kit / name for kit in toolkits() for name in ("lib64", "lib", "targets/x86_64-linux/lib")]
    return [str(folder) for folder in dict.fromkeys(folders) if any((folder / name).exists() for name in LIBRARIES)]


def opens(name: str) -> bool:
    """Whether the backend finds a library: in its folders, or where the system looks."""
    named = os.environ.get("HOTSTAGE_CUDA_LIBRARIES")
    folders = library_folders() if named is None else [folder for folder in named.split(os.pathsep) if folder]
    if any((Path(folder) / name).exists() for folder in folders):
        return True
    try:
        return bool(ctypes.CDLL(name))
    except OSError:
        return False


def libraries() -> dict[str, str]:
    """Where the backend looks for libraries (``HOTSTAGE_CUDA_LIBRARIES``, where it is not set already)."""
    name, folders = "HOTSTAGE_CUDA_LIBRARIES", library_folders()
    return {} if name in os.environ or not folders else {name: os.pathsep.join(folders)}


def cache(instead: Path) -> dict[str, str]:
    """A folder for what is compiled once (``XDG_CACHE_HOME``), where the user's own cannot be written or there is none:
    a home folder of another user, or on a read-only mount."""
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except (OSError, RuntimeError):
        writable = False
    return {} if writable else {"XDG_CACHE_HOME": str(instead.resolve())}


def _said(*command: str) -> str:
    """What a program printed; empty where it cannot be had."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


QUERY = (
    "index,name,uuid,driver_version,memory.total,memory.used,compute_cap,ecc.mode.current,clocks.sm,clocks.mem,"
    "power.limit"
)


@functools.cache
def driver() -> dict[str, Any]:
    """What the driver says (driver.py), asked once."""
    said = _said(sys.executable, "-m", "tests.gpu.driver")
    try:
        return dict(json.loads(said))
    except ValueError:
        return {"why": "the driver gave no answer in 60 s, or ended the process that asked"}


def devices() -> list[dict[str, str]]:
    """The GPUs that CUDA gives a process, its first one first, with what nvidia-smi adds where it knows them."""
    found, version = driver().get("devices", []), int(driver().get("driver", 0))
    smi = shutil.which("nvidia-smi") if found else None
    said = _said(smi, f"--query-gpu={QUERY}", "--format=csv,noheader,nounits") if smi else ""
    rows = [dict(zip(QUERY.split(","), map(str.strip, row.split(",")), strict=False)) for row in said.splitlines()]
    more = {row.get("uuid", "").partition("-")[2]: row for row in rows}
    cuda = {"driver_version": f"CUDA {version // 1000}.{version % 1000 // 10}"}
    return [cuda | more.get(device["uuid"], {}) | device for device in found]


@functools.cache
def emulated() -> bool:
    """Whether ``HOTSTAGE_CUDA`` names the tests' emulated library (it says so by a symbol of its own)."""
    named = os.environ.get("HOTSTAGE_CUDA")
    if not named or not Path(named).exists():
        return False
    return b"hs_emulated_text" in Path(named).read_bytes()


def module_version(name: str) -> str | None:
    """The version of an installed package, without importing it; None: it is not there."""
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def lacks() -> dict[str, str]:
    """What stages may need and this machine has not, with the words for it (``Stage.needs``)."""
    found: dict[str, str] = {}
    gpus = devices()
    if emulated():
        found["gpu"] = "the device is emulated"
        found["compute-sanitizer"] = "the device is emulated"
    elif not gpus:
        found["gpu"] = found["device"] = f"no GPU: {driver()['why']}"
    if not emulated() and not tool("compute-sanitizer"):
        found["compute-sanitizer"] = "compute-sanitizer is not installed; it comes with the CUDA toolkit"
    if not os.environ.get("HOTSTAGE_CUDA") and not tool("nvcc"):
        found["nvcc"] = "there is no nvcc: not on PATH, in CUDA_HOME, /usr/local/cuda or a wheel"
    # g++ is what nvcc compiles host code with: a library that is there needs none
    missing = [name for name in ("gcc", "g++") if not shutil.which(name)]
    if missing and not (missing == ["g++"] and os.environ.get("HOTSTAGE_CUDA")):
        found["compilers"] = f"{' and '.join(missing)} missing: gcc builds the engine, nvcc uses g++ for the library"
    if not emulated() and not opens(PRODUCTS):
        found["products"] = (
            f"{PRODUCTS} is not found, which kernel path cuda needs: not in HOTSTAGE_CUDA_LIBRARIES, else in toolkits "
            f"and wheels, nor where the system looks; the wheel {LIBRARIES[PRODUCTS]} 13 has it"
        )
    for name in ("torch", "jax"):
        if module_version(name) is None:
            found[name] = f"{name} is not installed in {sys.executable}"
    if gpus and float(gpus[0]["compute_cap"]) < 8.9:
        found["fp8"] = f"{gpus[0]['name']} has no FP8 (compute capability {gpus[0]['compute_cap']})"
    return found


def facts() -> dict[str, Any]:
    """Everything about the machine that a reader of figures wants."""
    cpu = next((line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    nvcc = tool("nvcc")
    return {
        "python": sys.version.split()[0],
        "kernel": platform.release(),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory": next(iter(_lines("/proc/meminfo")), ""),
        "gpus": devices(),
        "emulated": emulated(),
        "nvcc": (_said(nvcc, "--version").splitlines()[-1:] if nvcc else []),
        "nvcc_path": nvcc,
        "gcc": next(iter(_said("gcc", "--version").splitlines()), ""),
        "g++": next(iter(_said("g++", "--version").splitlines()), ""),
        "compute-sanitizer": tool("compute-sanitizer"),
        "library_folders": library_folders(),
        "packages": {n: module_version(n) for n in ("numpy", "pydantic", "pytest", "torch", "triton", "jax", "jaxlib")},
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(("HOTSTAGE_", "HS_", "CUDA_"))},
    }


def _lines(path: str) -> Iterator[str]:
    try:
        yield from Path(path).read_text().splitlines()
    except OSError:
        return


def architecture(gpus: list[Mapping[str, str]] | None = None) -> str:
    """What nvcc compiles for: the device's own, with Hopper's and Blackwell's own instructions."""
    gpus = list(devices()) if gpus is None else gpus
    capability = gpus[0]["compute_cap"] if gpus else "9.0"
    number = capability.replace(".", "")
    return f"sm_{number}a" if int(number) >= 90 else f"sm_{number}"


if __name__ == "__main__":
    sys.stdout.write(json.dumps({"facts": facts(), "lacks": lacks()}, indent=1) + "\n")
