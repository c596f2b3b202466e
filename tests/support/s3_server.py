"""A real S3 server for tests: versitygw on loopback, with a root identity, a ``trainer`` (an agent and a driver under
one account, as on a laptop: it cannot delete), and the identities of docs/policies by those files.

The binary is built once with ``go install`` into the user's cache folder and named by its version (`make test` does it
first: ``python -m tests.support.s3_server``); HOTSTAGE_VERSITYGW names another one.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import botocore.config

from k8s.images.store import store_server
from tests.support.go import go

BUCKET = "hotstage"
POLICIES = Path(__file__).resolve().parents[2] / "docs" / "policies"
ROLES = ("agent", "driver", "collector", "reader")
"""Each with its policy in docs/policies."""


def binary() -> Path:
    """The server's binary, built where it is not in the cache yet (minutes, once)."""
    named = os.environ.get("HOTSTAGE_VERSITYGW")
    return Path(named) if named else store_server(go)


@dataclass
class S3Server:
    """A running server; ``identities`` are access keys and their secrets by role."""

    port: int
    process: subprocess.Popen[bytes]
    data: Path
    identities: dict[str, tuple[str, str]]
    start: Callable[[int], subprocess.Popen[bytes]]
    host: str = "127.0.0.1"

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self) -> None:
        """The server is gone, as by a power cut; what it answered for is on its disk."""
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        """The same server again, on the same port."""
        for _ in range(5):
            self.process = self.start(self.port)
            if _healthy(self.process, self.host, self.port):
                return
            self.kill()
        raise RuntimeError(f"versitygw does not start again on port {self.port}")

    @property
    def endpoint(self) -> str:
        return f"http://{self.host}:{self.port}"

    def url(self, prefix: str = "") -> str:
        """Address of a store under this prefix of the bucket."""
        return f"s3://{BUCKET}/{prefix}?endpoint={self.endpoint}&region=us-east-1"

    def environment(self, role: str) -> dict[str, str]:
        """What a process of this role (root, trainer, one of `ROLES`) has in its environment; nothing of this machine's
        is used.
        """
        access, secret = self.identities[role]
        return {
            "AWS_ACCESS_KEY_ID": access,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    @contextlib.contextmanager
    def identity(self, role: str) -> Iterator[None]:
        """This process has the role while inside; stores opened in it keep it."""
        with environment(self.environment(role)):
            yield


@contextlib.contextmanager
def environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """This process's environment has these names while inside, and no other credentials."""
    before = {name: os.environ.pop(name, None) for name in {*wanted, "AWS_SESSION_TOKEN", "AWS_PROFILE"}}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def s3_server(folder: Path, host: str = "127.0.0.1", *, access_log: Path | None = None) -> Iterator[S3Server]:
    """Start a server whose files lie under ``folder``; it is stopped, by its process id, however the block ends.

    ``host``: the address of this machine on which it listens; ``access_log``: where it writes a line a request.
    """
    program = binary()
    keys = {role: (role, secrets.token_hex(16)) for role in ("root", "trainer", *ROLES)}
    root = keys["root"]
    for name in ("iam", "versions", "data"):
        (folder / name).mkdir(parents=True)
    told = () if access_log is None else ("--access-log", str(access_log))

    def start(port: int, *more: str) -> subprocess.Popen[bytes]:
        with open(folder / "server.log", "ab") as log:
            return subprocess.Popen(
                [
                    *(str(program), "--port", f"{host}:{port}", *told, *more),
                    *("--iam-dir", str(folder / "iam"), "--health", "/health", "--quiet"),
                    *("posix", "--versioning-dir", str(folder / "versions"), str(folder / "data")),
                ],
                env={"PATH": os.environ.get("PATH", ""), "ROOT_ACCESS_KEY": root[0], "ROOT_SECRET_KEY": root[1]},
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                preexec_fn=die_with_parent,
            )

    for attempt in range(5):  # a port that was free may be taken meanwhile
        port, admin = _free_ports(host, 2)
        server = S3Server(
            port,
            start(port, "--admin-port", f"{host}:{admin}"),
            folder / "data",
            keys,
            start,
            host,
        )
        try:
            if not _healthy(server.process, host, port):
                if attempt == 4:
                    raise RuntimeError(f"versitygw does not start:\n{(folder / 'server.log').read_text()[-2000:]}")
                continue
            for access, secret in (key for key in keys.values() if key is not root):
                subprocess.run(
                    [
                        *(str(program), "admin", "-a", root[0], "-s", root[1], "-er", f"http://{host}:{admin}"),
                        *("create-user", "-a", access, "-s", secret, "-r", "user"),
                    ],
                    check=True,
                    capture_output=True,
                )
            _make_bucket(server)
            yield server
            return
        finally:
            server.process.send_signal(signal.SIGCONT)
            server.process.terminate()
            try:
                server.process.wait(10)
            except subprocess.TimeoutExpired:
                server.process.kill()
                server.process.wait()


def _make_bucket(server: S3Server) -> None:
    access, secret = server.identities["root"]
    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        region_name="us-east-1",
        aws_access_key_id=access,
        aws_secret_access_key=secret,
        config=botocore.config.Config(s3={"addressing_style": "path"}),
    )
    client.create_bucket(Bucket=BUCKET)
    allow = {"Effect": "Allow", "Principal": {"AWS": ["trainer"]}}
    objects, bucket = f"arn:aws:s3:::{BUCKET}/*", f"arn:aws:s3:::{BUCKET}"
    policy = {
        "Version": "2012-10-17",
        "Statement": [
            {**allow, "Action": ["s3:GetObject", "s3:PutObject"], "Resource": objects},
            {**allow, "Action": ["s3:ListBucket", "s3:GetBucketLocation"], "Resource": bucket},
            *(statement for role in ROLES for statement in statements(role)),
        ],
    }
    client.put_bucket_policy(Bucket=BUCKET, Policy=json.dumps(policy))
    client.close()


def statements(role: str) -> list[dict[str, Any]]:
    """Of the role's shipped policy, as the bucket's policy holds them: for this user, whatever the store's prefix."""
    text = (POLICIES / f"{role}.json").read_text().replace("EXAMPLE-bucket/hotstage/", f"{BUCKET}/*/")
    found: list[dict[str, Any]] = json.loads(text.replace("EXAMPLE-bucket", BUCKET))["Statement"]
    return [{"Principal": {"AWS": [role]}, **{k: v for k, v in s.items() if k != "Sid"}} for s in found]


def _healthy(process: subprocess.Popen[bytes], host: str, port: int) -> bool:
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://{host}:{port}/health", timeout=2) as answer:
                if answer.status == 200:
                    return True
        except OSError:
            time.sleep(0.02)  # between two looks at the condition
    return False


def _free_ports(host: str, count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((host, 0))
        return [int(each.getsockname()[1]) for each in sockets]


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: also when the test run itself is killed


if __name__ == "__main__":
    binary()
