"""docker, podman or buildah behind one call: an ordinary Containerfile becomes an image and an archive of it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from k8s.images.static import cache


class ImageError(Exception):
    """An image cannot be built; the text says why, and the mend."""


MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "arm64": "arm64"}


def machine() -> str:
    """This machine's architecture by its name in images."""
    name = platform.machine()
    if name not in MACHINES:
        raise ImageError(f"no image is made for {name}: there are {', '.join(sorted(set(MACHINES.values())))}")
    return MACHINES[name]


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """One at a time works in this user's storages: between a build and its archive nobody gives the image's name away,
    and nobody tidies layers away that a build stands on.
    """
    with open(cache() / ".images.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class ImageBuilder:
    """``options`` come before the program's verb (a storage of its own, for one)."""

    program: str
    options: tuple[str, ...] = ()

    @classmethod
    def find(cls, named: str | None = None, storage: Path | None = None) -> ImageBuilder:
        """The one named, else the first that works here. ``storage``: keep images in this folder (podman, buildah)."""
        for program in [named] if named else ["docker", "podman", "buildah"]:
            if shutil.which(program) and _works(program):
                own = ("--storage-driver", "vfs", "--root", f"{storage}/root", "--runroot", f"{storage}/run")
                return cls(program, own if storage and program != "docker" else ())
        looked = named or "docker (with its engine running), podman or buildah"
        raise ImageError(f"nothing here builds images: looked for {looked}; on Debian: apt-get install buildah")

    def build(self, context: Path, name: str, *, arch: str, args: Mapping[str, str], epoch: int) -> None:
        """Build ``context/Containerfile``; every file and the image itself carry the time ``epoch``."""
        given = [item for key, value in args.items() for item in ("--build-arg", f"{key}={value}")]
        common = ["--platform", f"linux/{arch}", "--tag", name, "--file", str(context / "Containerfile"), *given]
        if self.program == "docker":
            common += ["--build-arg", f"SOURCE_DATE_EPOCH={epoch}", "--provenance=false"]
        else:
            # chroot: works where no container can be started inside another one
            common += ["--timestamp", str(epoch), "--isolation", "chroot"]
        self._run("build", *common, str(context))

    def save(self, name: str, archive: Path) -> None:
        """Write the image as a docker-archive that calls it as nodes look for short names: docker.io/library/NAME."""
        archive.unlink(missing_ok=True)
        full = f"docker.io/{name}" if "/" in name else f"docker.io/library/{name}"
        if self.program == "buildah":
            self._run("push", "--quiet", name, f"docker-archive:{archive}:{full}")
        else:
            self._run("tag", name, full)
            form = ["--format", "docker-archive"] if self.program == "podman" else []
            self._run("save", *form, "--output", str(archive), full)

    def has(self, name: str) -> bool:
        """Whether the image is in the builder's own storage."""
        verb = ["inspect", "--type", "image"] if self.program == "buildah" else ["image", "inspect"]
        return subprocess.run([self.program, *self.options, *verb, name], capture_output=True).returncode == 0

    def tidy(self) -> None:
        """Drop images that no name points to any more, where the storage is this builder's own."""
        if self.options:
            verb = ["rmi", "--prune"] if self.program == "buildah" else ["image", "prune", "--force"]
            with one_at_a_time():
                subprocess.run([self.program, *self.options, *verb], capture_output=True)

    def _run(self, *args: str) -> None:
        command = [self.program, *self.options, *args]
        env = {**os.environ, "DOCKER_BUILDKIT": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        if done.returncode != 0:
            words = (done.stdout + done.stderr).strip()[-3000:]
            raise ImageError(
                f"{' '.join(command)}: code {done.returncode}\n{words}\nwhere a base image cannot be pulled, name a "
                "local one: make images BASE=NAME, or BASE=local for one made of this machine's own Python"
            )


def _works(program: str) -> bool:
    """A docker command without its engine is of no use."""
    if program != "docker":
        return True
    return subprocess.run([program, "info"], capture_output=True).returncode == 0
