"""What moving a checkpoint takes: upload and restore of a GPT-2's state (0.8 GB, two ranks on one node) by the
agent's own uploader, committer and restore, beside a bare client that moves the same objects from and to the same
memory with as many threads and does nothing else; and beside PyTorch's Distributed Checkpoint.

Ours hashes twice on the way up (blocks, chunks), once on the way down, commits and looks at everything that comes. The
bare client is HTTP alone and sends the SHA-256 of each object, which the server compares: what is stored is as sure as
ours, and nothing is quicker. Beside it stand one that has nothing compared, and boto3 as it comes, which people use:
``put_object`` and ``get_object``, and its transfer manager. In a folder the bare client writes, syncs and reads. Reads
are from the disk: what the page cache holds of the objects is dropped before each; and once more from the page cache,
which has all of them before. The slots' pages are there, huge ones, as an agent has them. Rounds are interleaved, and
each begins with another client, because pages that were just given back are cheaper than others.
``python -m tests.bench transfer``, ``transfer-vs-dcp``.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import io
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import boto3
import botocore.auth
import botocore.awsrequest
import botocore.config
import botocore.credentials
import numpy as np

from checkpoint.agent.commit import commit
from checkpoint.agent.gang import layouts
from checkpoint.agent.send import WORKERS, segments
from checkpoint.agent.slots import SlotTable
from checkpoint.agent.upload import Source, Uploader
from checkpoint.chunks import plan_chunks
from checkpoint.log import CheckpointInfo
from checkpoint.restore import restore_slots
from checkpoint.store import Store, open_store
from k8s.images.static import environment_of
from tests.support.agents import Run, put_dataset, tiny_spec
from tests.support.layout_world import Way, World
from tests.support.s3_server import BUCKET, S3Server, s3_server
from trainer.presets import PRESETS
from trainer.spec import RunSpec, parse_spec, what_digest

STEP = 100
REQUIREMENTS = ("torch==2.13.0", "s3torchconnector==1.5.0", "s3fs==2026.9.0", "tenacity", "numpy")
PEERS = ("s3torchconnector", "s3fs")


def spec_of() -> RunSpec:
    """GPT-2 124M of four layers: under 1 GiB, after which the virtual machines that we measure on give freed pages back
    to their host: whoever reads into the page cache next, takes 0.4 s a GB more to copy out of it."""
    sets = ["train.batch=4", "train.microbatch=4", "train.sequence=64", "model.vocab=50304", "parallel.stages=2"]
    sets += ["model.layers=4"]
    return parse_spec(tomllib.loads(PRESETS["gpt2-124m"]), sets)


@dataclass(frozen=True)
class Moved:
    """Of one move: seconds, and this process's processor time in seconds."""

    seconds: float
    cpu: float


def timed(move: Callable[[], object]) -> Moved:
    def used() -> float:
        now = resource.getrusage(resource.RUSAGE_SELF)
        return now.ru_utime + now.ru_stime

    began, cpu = time.monotonic(), used()
    move()
    return Moved(time.monotonic() - began, used() - cpu)


# --- ours -----------------------------------------------------------------------------------------------------


class Checkpoints:
    """A run in a store, and the slots of its one node."""

    def __init__(self, store: Store) -> None:
        self.spec = spec_of()
        dataset = put_dataset(store)
        self.run = Run(store, f"bench-{what_digest(self.spec, dataset).hex()[:6]}")
        self.plan = self.run.add_plan(self.spec, dataset)
        self.layout = self.run.layouts[self.plan]
        local = layouts(self.layout, range(self.layout.ranks))
        self.table = SlotTable(local, self.layout.digest, self.layout.what_digest, 1)
        rng = np.random.default_rng(0)
        for rank in local:
            self.table.create(rank)
            self.slot(rank).prefault()
            with self.slot(rank).begin_fill() as view:
                block = rng.bytes(1 << 24)
                for at in range(0, view.nbytes, len(block)):
                    view[at : at + len(block)] = block[: view.nbytes - at]
        self.pool = ThreadPoolExecutor(WORKERS)

    def slot(self, rank: int) -> Any:
        return self.table.slots[rank][0]

    def ready(self) -> int:
        """The state as a snapshot of a new attempt; its epoch."""
        epoch = self.run.attempt(self.spec, self.plan)
        for rank in self.table.layouts:
            self.slot(rank).begin_fill().release()
            self.slot(rank).finish_fill(STEP, epoch, self.pool)
        return epoch

    def upload(self, epoch: int) -> CheckpointInfo:
        stored, errors = threading.Event(), list[str]()
        run = self.run
        uploader = Uploader(
            run.store, run.name, 0, 1, f"a{epoch}", pool=self.pool, post=lambda call: call(),
            on_part=lambda *_: stored.set(), on_idle=lambda: None,
            on_error=lambda text: errors.append(text or ""),
        )  # fmt: skip
        uploader.begin(Source(epoch, self.layout, self.table, 600.0))
        if not stored.wait(600):
            raise SystemExit(f"the upload does not end: {errors}")
        state = commit(run.log, 1, STEP, epoch, run.fold())
        assert state is not None
        uploader.close()
        return state.checkpoints[-1]

    def restore(self, info: CheckpointInfo) -> None:
        slots = {rank: self.slot(rank) for rank in self.table.layouts}
        restore_slots(self.run.store, self.run.name, info, self.layout, slots, epoch=info.epoch + 1, pool=self.pool)

    @contextlib.contextmanager
    def objects(self) -> Iterator[list[memoryview]]:
        """The memory of each chunk."""
        with contextlib.ExitStack() as held:
            found = []
            for rank, local in self.table.layouts.items():
                data = held.enter_context(self.slot(rank).data())
                for plan in plan_chunks(segments(local)):
                    begin, end = plan.segments[0].source, plan.segments[-1].source + plan.segments[-1].bytes
                    assert end - begin == plan.bytes
                    found.append(held.enter_context(data[begin:end]))
            yield found


# --- bare clients ---------------------------------------------------------------------------------------------


class Bare(Protocol):
    def put(self, name: str, data: memoryview) -> None: ...

    def get(self, name: str, out: memoryview) -> None: ...


class BareFolder:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def put(self, name: str, data: memoryview) -> None:
        descriptor = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        while data.nbytes:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
        os.close(descriptor)

    def get(self, name: str, out: memoryview) -> None:
        with open(self.folder / name, "rb", buffering=0) as file:
            while out.nbytes:
                out = out[file.readinto(out) or sys.exit("a short file") :]


class BareS3:
    """HTTP by the standard library over one connection a thread; a body is hashed where it is checked, never signed."""

    def __init__(self, server: S3Server, checked: bool = True) -> None:
        self._server, self._own, self._checked = server, threading.local(), checked
        self._auth = botocore.auth.S3SigV4Auth(
            botocore.credentials.Credentials(*server.identities["root"]), "s3", "us-east-1"
        )
        self._config = botocore.config.Config(s3={"payload_signing_enabled": False})

    def _ask(self, verb: str, name: str, body: memoryview | None) -> http.client.HTTPResponse:
        request = botocore.awsrequest.AWSRequest(verb, f"{self._server.endpoint}/{BUCKET}/bare/{name}")
        if body is not None and self._checked:
            request.headers["x-amz-checksum-sha256"] = base64.b64encode(hashlib.sha256(body).digest()).decode()
        request.context["client_config"] = self._config
        self._auth.add_auth(request)
        if not hasattr(self._own, "connection"):
            self._own.connection = http.client.HTTPConnection(self._server.host, self._server.port)
        connection: http.client.HTTPConnection = self._own.connection
        connection.request(verb, f"/{BUCKET}/bare/{name}", body, dict(request.headers.items()))
        answer = connection.getresponse()
        assert answer.status == 200, (verb, answer.status, answer.read(500))
        return answer

    def put(self, name: str, data: memoryview) -> None:
        self._ask("PUT", name, data).read()

    def get(self, name: str, out: memoryview) -> None:
        answer = self._ask("GET", name, None)
        while out.nbytes:
            out = out[answer.readinto(out) or sys.exit("a short answer") :]
        answer.read()


class Boto3:
    """boto3 as it comes: a request an object, or (``manager``) its transfer manager, in parts."""

    def __init__(self, server: S3Server, manager: bool = False) -> None:
        user, secret = server.identities["root"]
        self._client = boto3.client(
            "s3", endpoint_url=server.endpoint, region_name="us-east-1",
            aws_access_key_id=user, aws_secret_access_key=secret,
        )  # fmt: skip
        self._manager = manager

    def put(self, name: str, data: memoryview) -> None:
        if self._manager:
            self._client.upload_fileobj(io.BytesIO(data), BUCKET, f"bare/{name}")
        else:
            self._client.put_object(Bucket=BUCKET, Key=f"bare/{name}", Body=bytes(data))

    def get(self, name: str, out: memoryview) -> None:
        if self._manager:
            into = io.BytesIO()
            self._client.download_fileobj(BUCKET, f"bare/{name}", into)
            out[:] = into.getbuffer()
        else:
            out[:] = self._client.get_object(Bucket=BUCKET, Key=f"bare/{name}")["Body"].read()


# --- rounds ---------------------------------------------------------------------------------------------------


def drop_cache(folder: Path) -> None:
    """What the page cache holds of these files goes, once it is on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fill_cache(paths: Sequence[Path]) -> None:
    """The page cache holds all of these files: who read them past it has not filled it."""
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 22):
                pass


OURS = "ours"
Pairs = dict[tuple[str, str], list[tuple[Moved, Moved]]]
"""Of what was moved, and a client: ours and that client's, a pair a round."""


def rounds(checkpoints: Checkpoints, bare: Mapping[str, Bare], files: Path, count: int) -> Pairs:
    """``upload``, ``restore`` and ``restore, from the page cache``, each of ``count`` rounds, and of one before them
    that makes pages and connections. All uploads come first, and a restore beside each client takes turns with it
    alone: what either finds of free pages is then what the other has left (``spec_of``).
    """
    pool, clients = checkpoints.pool, [OURS, *bare]
    found: Pairs = {}

    def stored(client: str) -> list[Path]:
        large = [path for path in files.rglob("*") if path.is_file() and path.stat().st_size > 1 << 20]
        if client == OURS:
            return [path for path in large if "bare" not in path.parts]
        return [path for path in large if "bare" in path.parts and path.name.startswith(f"{clients.index(client)}-")]

    def all_of(verb: str, client: str, objects: Sequence[memoryview]) -> None:
        names = [f"{clients.index(client)}-{at}" for at in range(len(objects))]
        list(pool.map(getattr(bare[client], verb), names, objects))

    for number in range(count + 1):
        epoch = checkpoints.ready()
        moved: dict[str, Moved] = {}
        with checkpoints.objects() as objects:
            for client in turns(clients, number):
                for path in stored(client):
                    path.unlink()
                upload = (
                    partial(checkpoints.upload, epoch) if client == OURS else partial(all_of, "put", client, objects)
                )
                moved[client] = timed(upload)
        for client in bare if number else ():
            found.setdefault(("upload", client), []).append((moved[OURS], moved[client]))
    info = checkpoints.run.fold().checkpoints[-1]
    drop_cache(files)
    with checkpoints.objects() as objects:
        for beside, number in ((client, number) for client in bare for number in range(count + 1)):
            disk, cache = dict[str, Moved](), dict[str, Moved]()
            for client in turns((OURS, beside), number):
                restore = (
                    partial(checkpoints.restore, info) if client == OURS else partial(all_of, "get", client, objects)
                )
                disk[client] = timed(restore)
                fill_cache(stored(client))
                cache[client] = timed(restore)
                drop_cache(files)
            for what, moved in (("restore", disk), ("restore, from the page cache", cache)) if number else ():
                found.setdefault((what, beside), []).append((moved[OURS], moved[beside]))
    return found


def turns(clients: Sequence[str], number: int) -> Sequence[str]:
    """Each round begins with another one."""
    first = number % len(clients)
    return [*clients[first:], *clients[:first]]


def measure(count: int) -> Iterator[tuple[str, float, str, float, float]]:
    """(what, GB/s of ours, beside whom, GB/s of that client, processor seconds a GB of ours less that client's)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with s3_server(folder / "s3") as server, server.identity("root"):
            bare: Mapping[str, Bare] = {
                "bare client": BareS3(server),
                "bare client, nothing compared": BareS3(server, False),
                "boto3": Boto3(server),
                "boto3's transfer manager": Boto3(server, True),
            }
            yield from told("versitygw", Checkpoints(open_store(server.url("ours"))), bare, server.data, count)
        files = folder / "files"
        files.mkdir()
        ours = Checkpoints(open_store((files / "store").as_uri()))
        yield from told("folder", ours, {"bare client": BareFolder(files / "bare")}, files, count)


def told(
    where: str, checkpoints: Checkpoints, bare: Mapping[str, Bare], files: Path, count: int
) -> Iterator[tuple[str, float, str, float, float]]:
    with checkpoints.objects() as objects:
        size = sum(view.nbytes for view in objects) / 1e9
    for (what, client), pairs in rounds(checkpoints, bare, files, count).items():
        theirs = statistics.median(b.seconds for _, b in pairs)
        ratio = statistics.median(b.seconds / o.seconds for o, b in pairs)
        more = statistics.median(o.cpu - b.cpu for o, b in pairs)
        yield f"{what} ({where})", ratio * size / theirs, client, size / theirs, more / size


# --- layouts --------------------------------------------------------------------------------------------------

WAYS = [(stages, replicas) for stages in (1, 2, 4, 8) for replicas in (1, 2, 4, 8)]


def reshard(count: int) -> dict[tuple[Way, Way], float]:
    """Seconds that a gang's restore takes, all its nodes one after the other, from each layout into each other: the
    least of ``count``, in a folder, from the page cache. 180 MB of state."""
    found: dict[tuple[Way, Way], float] = {}
    with tempfile.TemporaryDirectory() as name:
        world = World(open_store(Path(name).as_uri()), tiny_spec(model__width=384, model__layers=8, train__batch=16))
        for source in WAYS:
            world.checkpoint(*source)
        for target in WAYS:
            tables = [world.table(target, node) for node in range(target[1])]
            for number in range(count + 1):
                for source in WAYS:
                    began = time.monotonic()
                    for node, table in enumerate(tables):
                        world.restore(source, target, node, table)
                    if number:  # the first one makes the slots' pages
                        seconds = time.monotonic() - began
                        found[source, target] = min(seconds, found.get((source, target), seconds))
            for table in tables:
                table.close()
    return found


# --- PyTorch --------------------------------------------------------------------------------------------------


def torch_python() -> Path:
    """The python of an environment that has torch, made where it is not there yet (minutes and gigabytes, once)."""
    return environment_of("torch", REQUIREMENTS) / "bin" / "python"


class Torch:
    """A peer process; ``ask`` gives seconds."""

    def __init__(self, way: str, server: S3Server, size: int, tensors: int) -> None:
        command = [torch_python(), Path(__file__).with_name("dcp_peer.py"), way, server.endpoint, BUCKET, size, tensors]
        self._process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **server.environment("root"), "PYTHONWARNINGS": "ignore"},
        )  # fmt: skip
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return line.strip() or sys.exit("the torch peer ended; see above")

    def ask(self, verb: str, name: str) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{verb} {name}\n")
        self._process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def versus_torch(count: int, peers: Sequence[str] = PEERS) -> Iterator[tuple[str, float, float]]:
    """(what, seconds of ours, seconds of DCP) of saves until committed and of loads, to the same server."""
    with tempfile.TemporaryDirectory() as name, s3_server(Path(name) / "s3") as server, server.identity("root"):
        ours = Checkpoints(open_store(server.url("ours")))
        with ours.objects() as objects:
            size = sum(view.nbytes for view in objects)
        tensors = 3 * len(ours.layout.tensors)
        running = {way: Torch(way, server, size, tensors) for way in peers}
        times: dict[str, list[tuple[float, float]]] = {}
        for number in range(count + 1):
            epoch = ours.ready()
            began = time.monotonic()
            info = ours.upload(epoch)
            mine = time.monotonic() - began
            theirs = {way: peer.ask("save", f"{way}-{number}") for way, peer in running.items()}
            drop_cache(server.data)
            began = time.monotonic()
            ours.restore(info)
            back = time.monotonic() - began
            for way, peer in running.items():
                drop_cache(server.data)
                if number:
                    times.setdefault(f"upload-vs-dcp ({way})", []).append((mine, theirs[way]))
                    times.setdefault(f"restore-vs-dcp ({way})", []).append((back, peer.ask("load", f"{way}-{number}")))
            for path in server.data.rglob("*"):
                if path.is_file() and path.stat().st_size > 1 << 20:
                    path.unlink()
        for peer in running.values():
            peer.close()
    for what, pairs in times.items():
        other = statistics.median(t for _, t in pairs)
        yield what, other * statistics.median(m / t for m, t in pairs), other
