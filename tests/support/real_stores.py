"""Real S3 servers of other makers on loopback, for what a store is measured by: `hotstage ckpt doctor`.

Each is built once, from its package registry, into the user's cache folder, named by its version; what is not there yet
is built by the nightly tests only (minutes), and what cannot be had on a machine is said and left out.

    python -m tests.support.real_stores [NAME…]    # build, start, examine: the rows of docs/stores.md
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import boto3
import botocore.config

from checkpoint.doctor import Diagnosis, Effort, examine_store
from checkpoint.store import open_store
from tests.support.go import cache, go
from tests.support.s3_server import die_with_parent, environment

KEY, SECRET = "GK0123456789abcdef01234567", "0123456789abcdef" * 4  # of a form that Garage takes too
BUCKET = "hotstage"


class NotHere(Exception):
    """This server cannot be built or started on this machine."""


@dataclass(frozen=True)
class Server:
    """How a server is had and started. ``command``: its arguments, for a folder of its own and a port."""

    name: str
    version: str
    build: Callable[[Path, str], Path]
    command: Callable[[Path, int], list[str]]
    env: Mapping[str, str] = field(default_factory=dict)
    ready: Callable[[Path, Path, int], None] = lambda *_: None
    key: str = KEY
    secret: str = SECRET

    def program(self) -> Path:
        """Its binary or script, built where it is not in the cache yet."""
        home = cache() / "stores" / f"{self.name}-{self.version}"
        with open(cache() / f".store-{self.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (home / "ok").exists():
                shutil.rmtree(home, ignore_errors=True)
                home.mkdir(parents=True)
                print(f"building {self.name} {self.version} (once)", file=sys.stderr, flush=True)
                try:
                    made = self.build(home, self.version)
                except (subprocess.CalledProcessError, OSError) as error:
                    raise NotHere(f"{self.name} {self.version} cannot be built here: {error}") from error
                (home / "ok").write_text(str(made))
        return Path((home / "ok").read_text())

    @property
    def built(self) -> bool:
        return (cache() / "stores" / f"{self.name}-{self.version}" / "ok").exists()


def _run(*command: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
    subprocess.run(
        ["nice", *command], check=True, env={**os.environ, **(env or {})}, cwd=cwd, stdout=subprocess.DEVNULL
    )


def _cargo(crate: str, *more: str) -> Callable[[Path, str], Path]:
    def build(home: Path, version: str) -> Path:
        cargo = shutil.which("cargo")
        if cargo is None:
            raise NotHere(f"{crate} is built by cargo, and there is none here")
        work = {"CARGO_TARGET_DIR": str(home / "work")}
        _run(cargo, "install", crate, "--version", version, "--locked", "--root", str(home), *more, env=work)
        shutil.rmtree(home / "work", ignore_errors=True)
        return home / "bin" / crate

    return build


def _go_module(package: str) -> Callable[[Path, str], Path]:
    """A command of a Go module, in a module of one's own: `go install` refuses those with replacements."""

    def build(home: Path, version: str) -> Path:
        work = home / "work"
        work.mkdir()
        env = {"GOFLAGS": "-mod=mod", "CGO_ENABLED": "0"}
        program = home / package.rsplit("/", 1)[-1]
        _run(go(), "mod", "init", "x", env=env, cwd=work)
        _run(go(), "get", f"{package}@{version}", env=env, cwd=work)
        _run(go(), "build", "-trimpath", "-ldflags=-s -w", "-o", str(program), package, env=env, cwd=work)
        shutil.rmtree(work)
        return program

    return build


def _pip(*wanted: str) -> Callable[[Path, str], Path]:
    def build(home: Path, version: str) -> Path:
        _run(sys.executable, "-m", "venv", str(home / "venv"))
        packages = [text.format(version=version) for text in wanted]
        _run(str(home / "venv/bin/pip"), "install", "-q", "--disable-pip-version-check", *packages)
        return home / "venv/bin/moto_server"

    return build


def _weed_mini(folder: Path, port: int) -> list[str]:
    """Every part of it on a port of its own, and nothing told to its makers."""
    parts = ("master", "filer", "volume", "admin", "webdav", "s3")
    ports = [f"-{part}.port={_free_port()}" for part in parts[:-1]]
    ports += [f"-{part}.port.grpc={_free_port()}" for part in parts if part != "webdav"]
    off = ("-s3.port.iceberg=0", "-s3.port.lance=0", "-admin.port.legacy=0", "-master.telemetry=false")
    return ["mini", f"-dir={folder / 'data'}", "-ip=127.0.0.1", f"-s3.port={port}", *ports, *off]


def _garage_files(folder: Path, port: int) -> list[str]:
    rpc = _free_port()
    (folder / "garage.toml").write_text(
        f'metadata_dir = "{folder}/meta"\ndata_dir = "{folder}/data"\ndb_engine = "sqlite"\nreplication_factor = 1\n'
        f'rpc_bind_addr = "127.0.0.1:{rpc}"\nrpc_public_addr = "127.0.0.1:{rpc}"\nrpc_secret = "{"ab" * 32}"\n'
        f'[s3_api]\ns3_region = "us-east-1"\napi_bind_addr = "127.0.0.1:{port}"\n'
    )
    return ["-c", str(folder / "garage.toml"), "server"]


def _garage_ready(program: Path, folder: Path, port: int) -> None:
    def ask(*words: str) -> str:
        command = [str(program), "-c", str(folder / "garage.toml"), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    _until(lambda: bool(ask("node", "id", "-q").strip()), "garage to have an id")
    node = ask("node", "id", "-q").split("@")[0].strip()
    ask("layout", "assign", "-z", "z", "-c", "1G", node)
    ask("layout", "apply", "--version", "1")
    ask("key", "import", "--yes", KEY, SECRET, "-n", "k")
    ask("key", "allow", "--create-bucket", KEY)


SERVERS = {
    server.name: server
    for server in (
        Server(
            "s3s-fs",
            "0.14.1",
            _cargo("s3s-fs", "--features", "binary"),
            lambda folder, port: [
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
                "--access-key",
                KEY,
                "--secret-key",
                SECRET,
                str(folder / "data"),
            ],
        ),
        Server(
            "gofakes3",
            "v1.2.0",
            _go_module("github.com/johannesboyne/gofakes3/cmd/gofakes3"),
            lambda _, port: ["-backend", "memory", "-host", f"127.0.0.1:{port}"],
        ),
        Server(
            "minio",
            "v0.0.0-20260212201848-7aac2a2c5b7c",
            _go_module("github.com/minio/minio"),
            lambda folder, port: [
                "server",
                "--address",
                f"127.0.0.1:{port}",
                "--console-address",
                "127.0.0.1:0",
                str(folder / "data"),
            ],
            {"MINIO_ROOT_USER": KEY, "MINIO_ROOT_PASSWORD": SECRET, "MINIO_BROWSER": "off"},
        ),
        Server(
            "seaweedfs",
            "v0.0.0-20261109003541-7506e5f91cd6",
            _go_module("github.com/seaweedfs/seaweedfs/weed"),
            _weed_mini,
            {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET},
        ),
        Server(
            "garage",
            "2.5.0",
            _cargo("garage", "--no-default-features", "--features", "bundled-libs,sqlite"),
            _garage_files,
            ready=_garage_ready,
        ),
        Server(
            "moto",
            "5.2.5",
            _pip("moto[server,s3]=={version}"),
            lambda _, port: ["-H", "127.0.0.1", "-p", str(port)],
        ),
    )
}


@dataclass(frozen=True)
class Running:
    """A started server."""

    endpoint: str
    key: str
    secret: str

    @property
    def url(self) -> str:
        return f"s3://{BUCKET}/p?endpoint={self.endpoint}&region=us-east-1"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }


@contextlib.contextmanager
def running(server: Server, folder: Path) -> Iterator[Running]:
    """The server on a free port of loopback, its files below ``folder``, with an empty bucket; NotHere with why not."""
    program = server.program()
    (folder / "data").mkdir(parents=True)
    port = _free_port()
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen(
            [str(program), *server.command(folder, port)],
            cwd=folder,
            env={"PATH": os.environ.get("PATH", ""), "HOME": str(folder), **server.env},
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            preexec_fn=die_with_parent,
        )
    try:
        server.ready(program, folder, port)
        answers = Running(f"http://127.0.0.1:{port}", server.key, server.secret)
        _until(lambda: process.poll() is not None or _bucket(answers), f"{server.name} to start")
        if process.poll() is not None:
            raise NotHere(f"{server.name} ended: {(folder / 'server.log').read_text(errors='replace')[-1500:]}")
        yield answers
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _bucket(server: Running) -> bool:
    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        region_name="us-east-1",
        aws_access_key_id=server.key,
        aws_secret_access_key=server.secret,
        config=botocore.config.Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
    )
    try:
        client.create_bucket(Bucket=BUCKET)
    except Exception:
        return False
    finally:
        client.close()
    return True


def _until(done: Callable[[], bool], what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if done():
                return
        except (OSError, subprocess.CalledProcessError, urllib.error.URLError):
            pass
        time.sleep(0.1)  # between two looks at the condition
    raise NotHere(f"waited {seconds:.0f} s for {what}")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def diagnose(server: Server, folder: Path, effort: Effort | None = None) -> Diagnosis:
    """What the doctor says of it."""
    with running(server, folder) as answers, environment(answers.environment):
        return examine_store(open_store(answers.url), effort)


def main(names: list[str]) -> None:
    for name in names or SERVERS:
        server = SERVERS[name]
        print(f"== {name} {server.version}")
        try:
            with tempfile.TemporaryDirectory() as folder:
                found = diagnose(server, Path(folder) / name)
        except NotHere as error:
            print(f"   not here: {error}")
            continue
        for finding in found.findings:
            print(f"   {finding.verdict:<8} {finding.name:<11} {finding.text}")
        print(f"   good for: {'; '.join(found.good_for) or 'nothing'}")


if __name__ == "__main__":
    main(sys.argv[1:])
