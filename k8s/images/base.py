"""A base image with this machine's own Python, for images that stand on one where nothing can be pulled.

The interpreter, its standard library, the shared libraries that they name, and a few programs of the machine (a shell,
test, mkdir): what an image of the kind ``python:3.11-slim`` has, as far as hotstage's images use it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from k8s.images.builder import ImageBuilder, ImageError, machine, one_at_a_time

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
SUM = hashlib.sha256(f"{sys.version} {os.path.realpath(sys.executable)} 3".encode()).hexdigest()[:8]
NAME = f"hotstage-python:{VERSION}-{SUM}"
PROGRAMS = ("sh", "test", "cat", "ls", "mkdir", "sleep", "env", "dd", "kill")
# what compiled packages from the registry count on: the parts of the C library, and gcc's
EVERYWHERE = (
    *("libpthread.so.0", "librt.so.1", "libdl.so.2", "libutil.so.1", "libresolv.so.2"),
    *("libgcc_s.so.1", "libstdc++.so.6"),
)
SKIPPED = (
    "__pycache__",
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "tkinter",
    "turtledemo",
    "ensurepip",
)


def base_image(builder: ImageBuilder) -> str:
    """Build the base into the builder's storage where it is not there yet; returns its name for a Containerfile."""
    name = NAME if builder.program == "docker" else f"localhost/{NAME}"
    with one_at_a_time():
        if not builder.has(name):
            _make(builder)
    return name


def _make(builder: ImageBuilder) -> None:
    with tempfile.TemporaryDirectory(prefix="hotstage-base-") as place:
        root = Path(place) / "root"
        for folder in (
            "usr/bin",
            "usr/lib",
            "usr/lib64",
            "usr/local/bin",
            "usr/local/lib",
            "etc",
            "tmp",
            "proc",
            "dev",
            "sys",
        ):
            (root / folder).mkdir(parents=True)
        (root / "tmp").chmod(0o1777)
        for folder in ("bin", "lib", "lib64"):
            (root / folder).symlink_to(f"usr/{folder}")
        python = Path(os.path.realpath(sys.executable))
        library = Path(sysconfig.get_path("stdlib"))
        own = root / "usr/local/lib" / f"python{VERSION}"
        shutil.copytree(library, own, symlinks=True, ignore=shutil.ignore_patterns(*SKIPPED, "config-*"))
        copied = root / "usr/local/bin" / f"python{VERSION}"
        shutil.copy(python, copied)
        for alias in ("python3", "python"):
            (root / "usr/local/bin" / alias).symlink_to(copied.name)
        extensions = list((own / "lib-dynload").glob("*.so"))
        programs = [Path(found) for name in PROGRAMS if (found := shutil.which(name))]
        for program in programs:
            shutil.copy(program, root / "usr/bin" / program.name)
        usual = Path("/usr/lib") / str(sysconfig.get_config_var("MULTIARCH"))
        also = [usual / name for name in EVERYWHERE]
        for needed in _libraries([python, *extensions, *programs]) | {path for path in also if path.exists()}:
            _copy_library(needed, root)
        (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nhotstage:x:65532:65532::/tmp:/bin/sh\n")
        (root / "etc/group").write_text("root:x:0:\nhotstage:x:65532:\n")
        (root / "etc/nsswitch.conf").write_text("hosts: files dns\n")
        authorities = Path("/etc/ssl/certs/ca-certificates.crt")
        if authorities.exists():
            (root / "etc/ssl/certs").mkdir(parents=True)
            shutil.copy(authorities, root / "etc/ssl/certs")
        (Path(place) / "Containerfile").write_text(
            'FROM scratch\nCOPY root/ /\nENV PATH=/usr/local/bin:/usr/bin:/bin\nCMD ["python3"]\n'
        )
        builder.build(Path(place), NAME, arch=machine(), args={}, epoch=0)


def _libraries(files: list[Path]) -> set[Path]:
    """The shared libraries that these files need, by where the loader finds them; the loader too."""
    found: set[Path] = set()
    for file in files:
        done = subprocess.run(["ldd", str(file)], capture_output=True, text=True)
        for line in done.stdout.splitlines():
            if "not found" in line:
                raise ImageError(f"{file} needs a library that is not here: {line.strip()}")
            word = line.split("=>")[-1].split("(")[0].strip()
            if word.startswith("/"):
                found.add(Path(word))
    return found


def _copy_library(needed: Path, root: Path) -> None:
    """To its own place where the loader looks for it anyway, else to /usr/lib's folder of this machine's kind."""
    usual = str(needed).startswith(("/lib", "/usr/lib"))
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    target = root / str(needed).lstrip("/") if usual else root / "usr/lib" / multiarch / needed.name
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        shutil.copy(needed, target)
