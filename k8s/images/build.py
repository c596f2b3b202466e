"""Build the images engine, engine-cuda, agent, flows and store.

    python -m k8s.images.build [NAME…] [--base IMAGE] [--out DIR]

What goes into an image is laid out here, in a context that depends on sources and pinned requirements alone; the
Containerfile beside this module only copies it, so docker, podman and buildah give the same files (an image's ID is of
its builder too). An archive is made anew only where its context changed. Beside each archive lies its SBOM (SPDX 2.3,
JSON), which is in the image too.

The engine is static (``static.py``), for amd64 and arm64. Agent and flows stand on a Python image, BASE of their
recipe; so does engine-cuda, the engine for NVIDIA GPUs (amd64), which holds 1 GB of NVIDIA's libraries and is built
where it is named. The store is the S3 server that the quick overlay names, for clusters that cannot pull it.

Builds of one user take turns: a builder's storage has one image of a name.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path

from k8s.images.base import VERSION, base_image
from k8s.images.builder import ImageBuilder, ImageError, machine, one_at_a_time
from k8s.images.sbom import engine_sbom, python_sbom, store_sbom
from k8s.images.static import ROOT, cache, glibc_engine, say, static_engine
from k8s.images.store import VERSION as STORE_VERSION
from k8s.images.store import store_server

HERE = Path(__file__).resolve().parent
NAMES = ("engine", "engine-cuda", "agent", "flows", "store")
ON_PYTHON = ("engine-cuda", "agent", "flows")
ENGINE_LIMIT = 10_000_000  # bytes
PYTHON = "3.11"  # of the base image: what compiled packages are fetched for
BASE = f"docker.io/library/python:{PYTHON}-slim-bookworm"
SOURCES = {
    "agent": ("checkpoint", "trainer/__init__.py", "trainer/wire"),
    "flows": ("flows", "trainer", "checkpoint", "k8s"),
}
# of botocore's 400 services these are needed: objects, and credentials that come from a service account
SERVICES = {"s3", "sts", "sso", "sso-oidc"}


@dataclass(frozen=True)
class Image:
    """A built image: ``tag`` is its short name, ``digest`` its ID, ``archive`` a docker-archive of it."""

    name: str
    arch: str
    tag: str
    archive: Path
    digest: str


def version() -> str:
    """The project's version, which is the images' tag."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def tag_of(name: str, arch: str) -> str:
    """What the overlays call the image; of another architecture than this machine's it says which."""
    if name == "store":
        return f"versity/versitygw:{STORE_VERSION}"
    return f"hotstage-{name}:{version()}" + ("" if arch == machine() else f"-{arch}")


def build(
    name: str,
    *,
    arch: str | None = None,
    base: str = BASE,
    python: str = PYTHON,
    out: Path | None = None,
    builder: ImageBuilder | None = None,
    revision: str | None = None,
    epoch: int | None = None,
) -> Image:
    """Build one image and write its archive into ``out``; the archive that is there already where nothing changed.

    ``python``: the version that ``base`` has, for which compiled packages are fetched.

    Raises ImageError where it cannot be built, or where the engine's is over its limit.
    """
    arch = arch or machine()
    out = out or ROOT / "out" / "images"
    out.mkdir(parents=True, exist_ok=True)
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH", "0")) if epoch is None else epoch
    tag = tag_of(name, arch)
    args = {"VERSION": STORE_VERSION if name == "store" else version(), "REVISION": revision or _revision()}
    if name in ON_PYTHON:
        args["BASE"] = base
    with tempfile.TemporaryDirectory(prefix="hotstage-image-") as place:
        context = Path(place) / "context"
        context.mkdir()
        bill = _lay_out(name, arch, context, base, python, epoch)
        shutil.copy(HERE / f"{name}.Containerfile", context / "Containerfile")
        _same_modes(context)
        key = _digest(context, {**args, "arch": arch, "epoch": str(epoch)})
        archive = out / f"{name}-{arch}.tar"
        stamp = archive.with_suffix(".key")
        with one_at_a_time():
            if not (archive.exists() and stamp.exists() and stamp.read_text() == key):
                builder = builder or ImageBuilder.find()
                say(f"building {tag} for {arch} with {builder.program}")
                builder.build(context, tag, arch=arch, args=args, epoch=epoch)
                stamp.unlink(missing_ok=True)  # of what is there until now
                with _partial(archive) as partial:
                    builder.save(tag, partial)
                stamp.write_text(key)
            (out / f"{name}-{arch}.spdx.json").write_text(bill)
            made = Image(name, arch, tag, archive, image_id(archive))
            size = archive.stat().st_size
    if name == "engine" and size > ENGINE_LIMIT:
        raise ImageError(f"{archive} has {size} bytes, over the limit of {ENGINE_LIMIT}")
    return made


@contextlib.contextmanager
def _partial(archive: Path) -> Iterator[Path]:
    """A name of its own to write to; the archive once it is whole."""
    with tempfile.TemporaryDirectory(prefix=f".{archive.stem}-", dir=archive.parent) as place:
        partial = Path(place) / archive.name
        yield partial
        os.replace(partial, archive)


def image_id(archive: Path) -> str:
    """The ID of a docker-archive's image: the SHA-256 of its configuration."""
    with tarfile.open(archive) as tar:
        member = tar.extractfile("manifest.json")
        assert member is not None
        config: str = json.load(member)[0]["Config"]
        content = tar.extractfile(config)
        assert content is not None
        return hashlib.sha256(content.read()).hexdigest()


# --- contexts ---------------------------------------------------------------------------------------------


def _lay_out(name: str, arch: str, context: Path, base: str, python: str, epoch: int) -> str:
    """Fill the context; returns the bill of materials."""
    if name == "engine":
        binary = context / "hotstage-engine"
        shutil.copy(static_engine(arch), binary)
        bill = engine_sbom(version(), binary, epoch)
    elif name == "engine-cuda":
        if arch != "amd64":
            raise ImageError(f"the image for GPUs is built for amd64, not for {arch}")
        packages = _packages(name, arch, python)
        shutil.copytree(packages, context / "packages", symlinks=True)
        (context / "hotstage").mkdir()
        shutil.copy(glibc_engine(), context / "hotstage" / "hotstage-engine")
        shutil.copy(cuda_backend(), context / "hotstage" / "libhs_cuda.so")
        bill = python_sbom(f"hotstage-{name}", version(), base, list(_distributions(packages)), epoch)
    elif name == "store":
        binary = context / "versitygw"
        shutil.copy(store_server(), binary)
        bill = store_sbom(STORE_VERSION, binary, epoch)
    else:
        packages = _packages(name, arch, python)
        shutil.copytree(packages, context / "packages")
        _sources(SOURCES[name], context / "hotstage")
        if name == "flows":
            _programs(context, arch)
        bill = python_sbom(f"hotstage-{name}", version(), base, list(_distributions(packages)), epoch)
    (context / "sbom.spdx.json").write_text(bill)
    return bill


def cuda_backend() -> Path:
    """libhs_cuda.so, built where it is not there as the sources have it."""
    from k8s.images import cuda

    if cuda.main() != 0:
        raise ImageError("the CUDA backend cannot be built; `make cuda` says why")
    return cuda.OUT / "libhs_cuda.so"


def _packages(name: str, arch: str, python: str) -> Path:
    """The pinned requirements as a folder of packages, for the base's Python; kept in the cache."""
    pins = HERE / f"{name}.requirements.txt"
    key = hashlib.sha256(pins.read_bytes() + f"{arch} {python} {sorted(SERVICES)} 1".encode()).hexdigest()[:16]
    found = cache() / "packages" / f"{name}-{key}"
    if found.exists():
        return found
    say(f"fetching the packages of {pins.name}")
    found.parent.mkdir(parents=True, exist_ok=True)
    machine_name = {"amd64": "x86_64", "arm64": "aarch64"}[arch]
    glibcs = [*(f"_2_{minor}" for minor in range(28, 16, -1)), "2014", "_2_12", "2010"]
    platforms = [f"manylinux{glibc}_{machine_name}" for glibc in glibcs]
    with tempfile.TemporaryDirectory(dir=found.parent) as place:
        target = Path(place) / "packages"
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"),
                *("--no-deps", "--only-binary", ":all:", "--python-version", python, "--implementation", "cp"),
                *(item for each in platforms for item in ("--platform", each)),
                *("--target", str(target), "--requirement", str(pins)),
            ],
            check=True,
        )
        _prune(target)
        try:
            os.replace(target, found)
        except OSError:
            if not found.exists():
                raise  # else somebody beside us fetched the same meanwhile
    return found


def _prune(packages: Path) -> None:
    """Take out what is never used, and what differs from one installation to the next."""
    for data in (packages / "botocore" / "data", packages / "boto3" / "data"):
        for service in data.iterdir() if data.exists() else ():
            if service.is_dir() and service.name not in SERVICES:
                shutil.rmtree(service)
    shutil.rmtree(packages / "boto3" / "examples", ignore_errors=True)
    for headers in packages.glob("nvidia/*/include"):
        shutil.rmtree(headers)
    for info in packages.glob("*.dist-info"):
        for file in ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json"):
            (info / file).unlink(missing_ok=True)
    for script in (packages / "bin").glob("*") if (packages / "bin").exists() else ():
        lines = script.read_bytes().split(b"\n", 1)
        if lines[0].startswith(b"#!") and b"python" in lines[0]:  # of the machine that fetched it
            script.write_bytes(b"#!/usr/bin/env python3\n" + lines[1])


def _sources(wanted: Sequence[str], target: Path) -> None:
    """The project's own modules, without the engine's sources and what is only for building."""
    for name in wanted:
        source = ROOT / name
        if source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target / name)
        else:
            skip = shutil.ignore_patterns("__pycache__", "*.pyc", "engine", "bin", "images")
            shutil.copytree(source, target / name, ignore=skip)


def _programs(context: Path, arch: str) -> None:
    """The command, and the engine for runs on the flows' own machine."""
    command = context / "hotstage" / "bin" / "hotstage"
    command.parent.mkdir()
    command.write_text("#!/usr/bin/env python3\nimport sys\n\nfrom flows.cli import main\n\nsys.exit(main())\n")
    command.chmod(0o755)
    engine = context / "hotstage" / "trainer" / "bin" / "hotstage-engine"
    engine.parent.mkdir()
    shutil.copy(static_engine(arch), engine)


def _distributions(packages: Path) -> Sequence[Distribution]:
    return sorted(distributions(path=[str(packages)]), key=lambda d: d.metadata["Name"].lower())


def _same_modes(context: Path) -> None:
    """Files are 0644 or 0755, whatever this user's mask is."""
    for path in [context, *context.rglob("*")]:
        if not path.is_symlink():
            runs = path.is_dir() or path.stat().st_mode & stat.S_IXUSR
            path.chmod(0o755 if runs else 0o644)


def _digest(context: Path, args: Mapping[str, str]) -> str:
    """What the image is made of."""
    value = hashlib.sha256(json.dumps(dict(args), sort_keys=True).encode())
    for path in sorted(context.rglob("*")):
        if path.is_file():
            content = hashlib.sha256(path.read_bytes()).digest()
            value.update(f"{path.relative_to(context)} {path.stat().st_mode:o} ".encode() + content)
    return value.hexdigest()


def _revision() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m k8s.images.build", description="Build hotstage's images.")
    text = f"of {', '.join(NAMES)}; default: all but engine-cuda, the store only with --base local"
    parser.add_argument("names", nargs="*", metavar="NAME", help=text)
    parser.add_argument(
        "--base",
        default=BASE,
        help="base image of agent and flows (%(default)s); local: one made of this machine's own Python",
    )
    parser.add_argument("--python", default=PYTHON, help="the version of Python that the base has (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "images", help="folder of the archives and SBOMs")
    parser.add_argument("--tool", choices=["docker", "podman", "buildah"], help="default: the first that works here")
    options = parser.parse_args(argv)
    by_name = {"engine-cuda", *(["store"] if options.base != "local" else [])}
    wanted = options.names or [name for name in NAMES if name not in by_name]
    unknown = [name for name in wanted if name not in NAMES]
    if unknown:
        parser.error(f"no image is called {', '.join(unknown)}; there are {', '.join(NAMES)}")
    try:
        builder = ImageBuilder.find(options.tool)
        base, python = (base_image(builder), VERSION) if options.base == "local" else (options.base, options.python)
        for name in wanted:
            for arch in ("amd64", "arm64") if name == "engine" else (machine(),):
                image = build(name, arch=arch, base=base, python=python, out=options.out, builder=builder)
                size = image.archive.stat().st_size / 1e6
                sys.stdout.write(f"{image.tag}  sha256:{image.digest}  {image.archive}  {size:.1f} MB\n")
    except (ImageError, RuntimeError, subprocess.CalledProcessError) as error:
        say(f"{error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
