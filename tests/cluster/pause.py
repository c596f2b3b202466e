"""The sandbox's image: a static C program that waits and reaps, from scratch, as an archive in the cache."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from tests.cluster.host import call
from tests.cluster.node import PAUSE
from tests.support.go import cache

SOURCE = Path(__file__).resolve().parent / "pause.c"


def archive() -> Path:
    """The image as a file that ``ctr images import`` takes; built where the cache lacks it."""
    key = hashlib.sha256(SOURCE.read_bytes() + PAUSE.encode()).hexdigest()[:16]
    folder = cache() / "images"
    folder.mkdir(parents=True, exist_ok=True)
    found = folder / f"pause-{key}.tar"
    if found.exists():
        return found
    with tempfile.TemporaryDirectory(dir=folder) as place:
        here = Path(place)
        call("gcc", "-static", "-Os", "-s", "-o", str(here / "pause"), str(SOURCE))
        (here / "Containerfile").write_text('FROM scratch\nCOPY pause /pause\nUSER 65535\nENTRYPOINT ["/pause"]\n')
        buildah = ("buildah", "--storage-driver", "vfs", "--root", f"{here}/root", "--runroot", f"{here}/run")
        call(*buildah, "build", "--isolation", "chroot", "--timestamp", "0", "--tag", PAUSE, str(here))
        call(*buildah, "push", "--quiet", PAUSE, f"docker-archive:{here}/image.tar:{PAUSE}")
        call(*buildah, "rmi", "--all", "--force", check=False)
        os.replace(here / "image.tar", found)
    return found
