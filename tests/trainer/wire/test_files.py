"""Files that are seen whole or not at all."""

from __future__ import annotations

import os
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from trainer.wire.files import create_file, kept, kept_where, write_file


def test_a_file_is_replaced_whole_and_nothing_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_file(path, b"one", 0o600)
    write_file(path, b"two" * 100_000, 0o644)
    assert path.read_bytes() == b"two" * 100_000
    assert path.stat().st_mode & 0o077 in (0o044, 0o040, 0)  # less what the umask takes
    assert os.listdir(tmp_path) == ["a"]


def test_what_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_file(path, b"old")

    def half_written() -> None:
        with kept(path, durable=True) as file:
            file.write(b"new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half_written()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]
    with pytest.raises(FileNotFoundError):
        write_file(tmp_path / "none" / "a", b"x")


def test_of_several_creators_one_is_first(tmp_path: Path) -> None:
    path = tmp_path / "token"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: create_file(path, b"%d" % n * 1000), range(8)))
    first = path.read_bytes()
    assert first in {b"%d" % n * 1000 for n in range(8)}
    create_file(path, b"late")
    assert path.read_bytes() == first
    assert os.listdir(tmp_path) == ["token"]


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", no_links)
    create_file(tmp_path / "token", b"first")
    create_file(tmp_path / "token", b"late")
    assert (tmp_path / "token").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["token"]


def test_a_file_that_is_there_needs_no_room(tmp_path: Path) -> None:
    """A launcher looks again and again, also where the disk is full by then."""
    create_file(tmp_path / "launch.json", b"first")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # no file takes a byte
    try:
        with pytest.raises(OSError, match="too large"):
            create_file(tmp_path / "other", b"second")
        create_file(tmp_path / "launch.json", b"second")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["launch.json"]
    assert (tmp_path / "launch.json").read_bytes() == b"first"


def test_a_name_that_a_person_gave_is_written_whole_and_devices_and_pipes_as_they_are(tmp_path: Path) -> None:
    """A report on a full disk left its first 8 kB in place of the good one."""
    report, link = tmp_path / "report", tmp_path / "link"
    report.write_bytes(b"old")
    link.symlink_to(report)

    def half_written() -> None:
        with kept_where(link) as file:
            file.write(b"half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        half_written()
    assert (report.read_bytes(), sorted(tmp_path.iterdir())) == (b"old", [link, report])
    with kept_where(link) as file:
        file.write(b"new")
    assert (report.read_bytes(), link.is_symlink()) == (b"new", True)
    reader, writer = os.pipe()
    with kept_where(Path(f"/dev/fd/{writer}")) as file:
        file.write(b"piped")
    os.close(writer)
    with open(reader, "rb") as end:
        assert end.read() == b"piped"
