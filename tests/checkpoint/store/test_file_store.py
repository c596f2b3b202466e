"""A folder as a store, when the disk is full, may not be written, or the writer is killed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from checkpoint.errors import StoreError, StoreRefused, StoreUnavailable
from checkpoint.probe import ensure_probed
from checkpoint.store import direct, open_store
from checkpoint.store.address import folder_of
from checkpoint.store.file import FileStore, translate

KEY = "runs/r/log/00000000000000000001"


def in_child(work: Callable[[], None]) -> None:
    """Run the work in a forked process, which may give up rights; its assertions are this test's."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # a forked child must not return into pytest
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"cannot mount a small file system here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_loses_nothing_and_goes_on_when_there_is_room(small_disk: Path) -> None:
    store = open_store((small_disk / "store").as_uri())
    assert store.create(KEY, b"first")
    filler = small_disk / "filler"
    with pytest.raises(StoreUnavailable, match="free space"):
        store.create("runs/r/chunks/big", bytes(600 << 10))
    filler.write_bytes(bytes(200 << 10))
    with pytest.raises(StoreUnavailable, match="free space"):
        store.create("runs/r/chunks/big", bytes(400 << 10))
    with pytest.raises(StoreUnavailable, match="free space"):
        store.put("runs/r/live/x", bytes(400 << 10))
    assert [i.key for i in store.list("")] == [KEY]
    assert list((small_disk / "store" / ".tmp").iterdir()) == []  # and the failed attempts hold no space
    filler.unlink()
    assert store.create("runs/r/chunks/big", bytes(400 << 10))
    assert store.get(KEY) == b"first"


def test_a_read_only_disk_is_refused(small_disk: Path) -> None:
    store = open_store((small_disk / "store").as_uri())
    store.create(KEY, b"first")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StoreRefused, match="mount it writable"):
        store.create("runs/r/a", b"x")
    assert store.get(KEY) == b"first"


def test_a_limit_of_the_process_is_named_with_its_mend(tmp_path: Path) -> None:
    store = open_store((tmp_path / "store").as_uri())

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        assert store.create(KEY, bytes(1000))
        with pytest.raises(StoreRefused, match=r"may write files of 1000 bytes at most .*ulimit -f unlimited"):
            store.create("runs/r/chunks/big", bytes(5000))
        resource.setrlimit(resource.RLIMIT_NOFILE, (1, 1))
        with pytest.raises(StoreUnavailable, match=r"all of the 1 open files .*ulimit -n"):
            store.create("runs/r/a", b"x")

    in_child(work)
    assert [i.bytes for i in store.list("")] == [1000]
    assert list((tmp_path / "store" / ".tmp").iterdir()) == []


def test_a_disk_without_inodes_is_named(small_disk: Path) -> None:
    store = open_store((small_disk / "store").as_uri())
    assert store.create(KEY, b"first")
    subprocess.run(["mount", "-o", "remount,nr_inodes=12", str(small_disk)], check=True)
    said = ""
    for number in range(12):
        try:
            store.create(f"runs/r/{number}", b"x")
        except StoreUnavailable as error:
            said = str(error)
    assert "has space, but takes no more files" in said
    assert "df -i" in said
    assert list((small_disk / "store" / ".tmp").iterdir()) == []
    assert store.get(KEY) == b"first"


def test_no_rights_is_refused_with_the_mend(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path / "store"
    store = open_store(folder.as_uri())
    store.create(KEY, b"first")
    folder.chmod(0o755)
    ours = tmp_path_factory.getbasetemp()  # pytest's folders are for their user alone; a worker's lies one deeper
    base = ours.parents[1] if "PYTEST_XDIST_WORKER" in os.environ else ours.parent
    for each in [tmp_path, *(parent for parent in tmp_path.parents if parent.is_relative_to(base))]:
        each.chmod(each.stat().st_mode | 0o055)

    user, closed = os.geteuid(), "runs/r/log/2"
    store.create(closed, b"of a user with umask 777")
    (folder / closed).chmod(0)

    def work() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        else:
            for each in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
                each.chmod(0o555)
        with pytest.raises(
            StoreRefused, match=rf"\.tmp is user {user}'s and .* mode [57]55, .*give it the rights there"
        ):
            store.create("runs/r/a", b"x")
        with pytest.raises(StoreRefused, match=r"users who share a store have a group and umask 002"):
            store.put("runs/r/live/x", b"x")
        assert store.get(KEY) == b"first"
        with pytest.raises(StoreRefused, match=rf"{closed} is user {user}'s and .*, with mode 0, and this is user"):
            store.get(closed)

    in_child(work)
    for each in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        each.chmod(0o755)


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV])
def test_a_file_system_without_hard_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """As FAT (EPERM), BeeGFS (EXDEV, EOPNOTSUPP) and FUSE (ENOSYS) answer: one system call fails, all else works."""

    def link(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", link)
    store = open_store((tmp_path / "store").as_uri())
    with pytest.raises(StoreRefused, match=r"has no hard links .*use a folder on .*ext4.*or an S3 store") as caught:
        store.create(KEY, b"x")
    assert "rights" not in str(caught.value)
    store.put("runs/r/live/x", b"x")
    assert list((tmp_path / "store" / ".tmp").iterdir()) == []
    with pytest.raises(StoreRefused, match="has no hard links"):
        ensure_probed(store)


@pytest.mark.parametrize(
    ("code", "kind", "says"),
    [
        (errno.EDQUOT, StoreUnavailable, "full or over its quota"),
        (errno.ENOSPC, StoreUnavailable, "full or over its quota"),
        (errno.ESTALE, StoreUnavailable, "mount it again"),
        (errno.EIO, StoreUnavailable, "EIO"),
        (errno.EROFS, StoreRefused, "mount it writable"),
        (errno.ENAMETOOLONG, StoreRefused, "long names"),
    ],
)
def test_what_file_systems_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[StoreError], says: str
) -> None:
    store = open_store((tmp_path / "store").as_uri())
    store.create(KEY, b"first")

    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    for call in ("write", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(kind, match=says):
                store.create("runs/r/a", b"x")
    assert [i.key for i in store.list("")] == [KEY]
    assert list((tmp_path / "store" / ".tmp").iterdir()) == []
    assert store.create("runs/r/a", b"x")


def test_a_path_that_is_too_long_is_refused(tmp_path: Path) -> None:
    store = open_store((tmp_path / ("x" * 300)).as_uri())
    with pytest.raises(StoreRefused, match="long names"):
        store.create(KEY, b"x")
    with pytest.raises(StoreRefused, match="long names"):
        store.get(KEY)


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for url in ((tmp_path / "file").as_uri(), (tmp_path / "file" / "below").as_uri()):
        with pytest.raises(StoreError):
            open_store(url).create(KEY, b"x")
        looks: list[Callable[[FileStore], object]] = [
            lambda store: store.get(KEY),
            lambda store: store.head(KEY),
            lambda store: list(store.list("")),
            lambda store: store.read_into(KEY, [memoryview(bytearray(1))]),
        ]
        for look in looks:  # a store that holds nothing looks otherwise
            with pytest.raises(StoreRefused, match="file is a file, and a store is a folder"):
                look(FileStore(folder_of(url)))
    store = open_store((tmp_path / "store").as_uri())
    store.create("runs/r/a", b"x")
    with pytest.raises(StoreRefused, match="cannot hold it"):
        store.create("runs/r/a/b", b"x")  # as on other stores, a name is an object or a folder
    assert store.head("runs/r/a/b") is None
    assert store.head("runs/r") is None


@pytest.mark.parametrize("code", sorted(errno.errorcode))
def test_every_errno_becomes_one_of_ours(code: int) -> None:
    error = translate(OSError(code, os.strerror(code)), "creating 'k'", Path("/store"))
    assert isinstance(error, StoreError)
    assert os.strerror(code) in str(error)


def test_a_killed_writer_leaves_only_whole_objects(tmp_path: Path) -> None:
    rng = random.Random(7)
    folder = tmp_path / "store"
    program = (
        "import sys, itertools\n"
        "from checkpoint.store import open_store\n"
        "store = open_store(sys.argv[1])\n"
        "for n in itertools.count(int(sys.argv[2])):\n"
        "    store.create(f'runs/r/chunks/{n}', bytes([n % 256]) * (3 << 20))\n"
        "    print(n, flush=True)\n"
    )
    acknowledged = 0
    for _ in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", program, folder.as_uri(), str(acknowledged)], stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            for _ in range(rng.randrange(1, 5)):
                acknowledged = int(child.stdout.readline()) + 1
            child.send_signal(signal.SIGKILL)
    store = FileStore(folder)
    seen = {i.key for i in store.list("runs/r/chunks/")}
    assert {f"runs/r/chunks/{n}" for n in range(acknowledged)} <= seen
    for key in seen:
        assert store.get(key) == bytes([int(key.rpartition("/")[2]) % 256]) * (3 << 20)
    left = folder / ".tmp" / "1-crashed-0"
    young, old = left.with_name("2-crashed-0"), time.time() - 25 * 3600
    young.write_bytes(b"half")
    left.write_bytes(b"half")
    os.utime(left, (old, old))
    assert store.create("runs/r/chunks/next", b"x")  # the first write of a store sweeps what is a day old
    assert young.exists()
    assert not left.exists()


def test_folders_that_a_collector_removes_meanwhile_are_made_anew(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    for number in range(50):
        assert store.create(f"runs/r/chunks/{number % 2}/{number}", b"x")
        store.delete(f"runs/r/chunks/{number % 2}/{number}")
    assert not (tmp_path / "store" / "runs").exists()


def test_threads_that_make_a_store_at_once_miss_nothing(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for number in range(60):
            store, start = FileStore(tmp_path / str(number)), threading.Barrier(8)

            def create(key: int, store: FileStore = store, start: threading.Barrier = start) -> bool:
                start.wait()
                return store.head("runs/r/none") is None and store.create(f"runs/r/log/{key}", b"x")

            assert all(pool.map(create, range(8)))


@pytest.mark.parametrize("who", ["wrote", "read", "found it as it is", "serves a run"])
@pytest.mark.parametrize("unmounted", [True, False])
def test_a_store_that_is_gone_is_not_begun_anew(tmp_path: Path, unmounted: bool, who: str) -> None:
    """By who used it, nor by an agent that starts meanwhile."""
    first = FileStore(tmp_path / "store")
    assert first.create(KEY, b"x")
    store = first if who == "wrote" else FileStore(tmp_path / "store", begun=who == "serves a run")
    if who == "read":
        assert store.get(KEY) == b"x"
    elif who == "found it as it is":
        assert store.create(KEY, b"x")
    (tmp_path / "store").rename(tmp_path / "away")
    if unmounted:
        (tmp_path / "store").mkdir()  # where its disk was mounted
    for call in (
        lambda: store.create("runs/r/log/1", b"x"), lambda: store.put("runs/r/live/a", b"x"),
        lambda: store.get(KEY), lambda: store.head(KEY), lambda: list(store.list("runs/r/")),
    ):  # fmt: skip
        with pytest.raises(StoreUnavailable, match=r"this process (has used it|serves one of them): put"):
            call()
    if unmounted:
        (tmp_path / "store").rmdir()
    (tmp_path / "away").rename(tmp_path / "store")
    assert store.create("runs/r/log/1", b"x")
    assert store.get(KEY) == b"x"


def test_where_another_store_has_taken_its_place_nothing_is_left(tmp_path: Path) -> None:
    """An agent that nobody stopped left a temporary file there four times a second."""
    store = FileStore(tmp_path / "store")
    assert store.create(KEY, b"x")
    (tmp_path / "store").rename(tmp_path / "away")
    assert FileStore(tmp_path / "store").create("runs/other/log/1", b"x")
    for write in (store.put, store.create):
        with pytest.raises(StoreUnavailable, match="this process has used it"):
            write("runs/r/live/a", b"x")
    assert [p.name for p in (tmp_path / "store").iterdir() if any(p.iterdir())] == ["runs"]


@pytest.mark.parametrize("who", ["wrote", "read"])
def test_a_store_whose_folder_has_another_number_is_the_same_where_it_holds_what_it_held(
    tmp_path: Path, who: str
) -> None:
    """Mounted buckets, sshfs and the like number a folder anew when the kernel has forgotten it."""
    first = FileStore(tmp_path / "store")
    assert first.create(KEY, b"x")
    store = first if who == "wrote" else FileStore(tmp_path / "store")
    assert store.get(KEY) == b"x"
    shutil.copytree(tmp_path / "store", tmp_path / "again")
    (tmp_path / "store").rename(tmp_path / "away")
    (tmp_path / "again").rename(tmp_path / "store")
    assert store.head("runs/r/log/1") is None
    assert store.create("runs/r/log/1", b"x")


def cached(path: Path) -> bool:
    with open(path, "rb") as file:
        return direct.cached(file.fileno(), 0)


@pytest.mark.parametrize("first", [0, 512, 1], ids=["page", "sector", "odd"])
@pytest.mark.parametrize("size", [1 << 20, (1 << 20) + 1, (16 << 20) + 4095, (20 << 20) + 4096])
def test_large_objects_are_written_past_the_page_cache(tmp_path: Path, first: int, size: int) -> None:
    known = tmp_path / "known"
    known.write_bytes(bytes(4096))
    try:
        os.close(os.open(known, os.O_WRONLY | os.O_DIRECT))
        assert cached(known)
    except OSError:
        pytest.skip("the file system of the temporary folder has no O_DIRECT, or does not tell what is cached")
    store, data = FileStore(tmp_path / "store"), random.Random(size).randbytes(size)
    with mmap.mmap(-1, size + 4096) as memory, memoryview(memory) as whole, whole[first : first + size] as view:
        view[:] = data
        assert store.create("runs/r/chunks/c", view)
    assert not cached(tmp_path / "store" / "runs/r/chunks/c")
    for begin, cut, to in (
        (0, size, first),
        (3, 70_001, first),
        (512, 3 << 20, 512 + first),
        (4096 - first, 4 << 20, 5),
    ):
        with mmap.mmap(-1, size + 4096) as memory, memoryview(memory) as whole:
            views = [whole[at : min(at + cut, to + size - begin)] for at in range(to, to + size - begin, cut)]
            store.read_into("runs/r/chunks/c", views, first=begin)
            assert hashlib.sha256(whole[to : to + size - begin]).digest() == hashlib.sha256(data[begin:]).digest()
            assert not any(whole[:to])
            assert not any(whole[to + size - begin :])
            for view in views:
                view.release()
        assert size < 2 << 20 or not cached(tmp_path / "store" / "runs/r/chunks/c")  # large ones are read so too
    assert hashlib.sha256(store.get("runs/r/chunks/c")).digest() == hashlib.sha256(data).digest()


@pytest.mark.parametrize("whence", ["open", "read", "later"])
def test_a_file_system_without_direct_reads_gets_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whence: str
) -> None:
    real_read, real_fcntl, reads = os.preadv, fcntl.fcntl, list[int]()

    def refuse_open(descriptor: int, command: int, flags: int = 0) -> int:
        if whence == "open" and command == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct reads here")
        return real_fcntl(descriptor, command, flags)

    def refuse_read(descriptor: int, into: list[memoryview], at: int) -> int:
        if real_fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            if whence == "read" or (whence == "later" and len(reads) > 1):
                raise OSError(errno.EINVAL, "no direct reads here")
            into = [into[0][: 1 << 20]]  # and short ones before
        reads.append(real_read(descriptor, into, at))
        return reads[-1]

    store, data = FileStore(tmp_path / "store"), random.Random(3).randbytes((5 << 20) + 5)
    assert store.create("runs/r/chunks/c", data)
    monkeypatch.setattr(fcntl, "fcntl", refuse_open)
    monkeypatch.setattr(os, "preadv", refuse_read)
    with mmap.mmap(-1, len(data)) as memory, memoryview(memory) as view:
        store.read_into("runs/r/chunks/c", [view])
        assert view == data
    assert sum(reads) >= len(data)


@pytest.mark.parametrize("whence", ["open", "write", "later"])
def test_a_file_system_without_direct_writes_gets_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whence: str
) -> None:
    real_write, real_fcntl, writes = os.write, fcntl.fcntl, list[int]()

    def refuse_open(descriptor: int, command: int, flags: int = 0) -> int:
        if whence == "open" and command == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct writes here")
        return real_fcntl(descriptor, command, flags)

    def refuse_write(descriptor: int, data: bytes | memoryview) -> int:
        if real_fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            if whence == "write" or (whence == "later" and writes):
                raise OSError(errno.EINVAL, "no direct writes here")
            data = data[: 3 << 20]  # and a short one before
        writes.append(real_write(descriptor, data))
        return writes[-1]

    monkeypatch.setattr(fcntl, "fcntl", refuse_open)
    monkeypatch.setattr(os, "write", refuse_write)
    store, data = FileStore(tmp_path / "store"), random.Random(3).randbytes((17 << 20) + 5)
    assert store.create("runs/r/chunks/c", data)
    assert sum(writes) == len(data)
    assert hashlib.sha256(store.get("runs/r/chunks/c")).digest() == hashlib.sha256(data).digest()


def test_what_is_no_object_is_not_listed(tmp_path: Path) -> None:
    """What a file manager or a tool of copies leaves in a folder."""
    store = FileStore(tmp_path)
    store.put("runs/r/live/a", b"1")
    for name in ("a (conflicted copy)", ".DS_Store", "ä", "sp ace/b"):
        path = tmp_path / "runs" / "r" / "live" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"2")
    assert [info.key for info in store.list("runs/")] == ["runs/r/live/a"]
