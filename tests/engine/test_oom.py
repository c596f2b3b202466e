"""What the kernel counted in a control group, in both of their versions and from inside and outside a container."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.engine.native import build_program

HYBRID = "9:name=systemd:/\n4:cpu,memory:/pods/a b:c\n3:cpuset:/\n0::/pods/unified\n"
PURE = "0::/pods/unified\n"
V1 = {"memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n", "memory.limit_in_bytes": "268435456\n"}
V2 = {"memory.events": "low 0\nmax 12\noom 4\noom_kill 2\noom_group_kill 0\n", "memory.max": "1048576\n"}


def said(self: Path, mount: Path) -> str:
    return subprocess.run(
        [str(build_program("oom_drive")), str(self), str(mount)], capture_output=True, text=True, check=True
    ).stdout.strip()


def look(tmp_path: Path, group: str, files: dict[str, str], folder: str) -> str:
    place = tmp_path / "mount" / folder
    place.mkdir(parents=True)
    for name, text in files.items():
        (place / name).write_text(text)
    (tmp_path / "self").write_text(group)
    return said(tmp_path / "self", tmp_path / "mount")


@pytest.mark.parametrize(
    ("group", "files", "folder", "expected"),
    [
        (HYBRID, V1, "memory/pods/a b:c", "3 268435456"),
        (HYBRID, V1, "memory", "3 268435456"),  # a container: its group is the mount's root
        (PURE, V2, "pods/unified", "2 1048576"),
        (PURE, V2, "", "2 1048576"),
        (HYBRID, V2, "pods/unified", "0 0"),  # memory is version 1's there
        (PURE, {**V2, "memory.max": "max\n"}, "", "2 0"),
        (HYBRID, {**V1, "memory.limit_in_bytes": "9223372036854771712\n"}, "memory", "3 0"),
        (HYBRID, {"memory.oom_control": "oom_kill_disable 0\nunder_oom 0\n"}, "memory", "0 0"),  # Linux before 4.13
        (PURE, {"memory.events": "oom_kill 7\n"}, "", "7 0"),
        (PURE, {}, "", "0 0"),
        ("", V2, "", "0 0"),
        ("nonsense\n\n:\n", V2, "", "0 0"),
    ],
)
def test_kills_and_limit(tmp_path: Path, group: str, files: dict[str, str], folder: str, expected: str) -> None:
    assert look(tmp_path, group, files, folder) == expected


def test_the_own_group_comes_before_the_root(tmp_path: Path) -> None:
    look(tmp_path, PURE, {"memory.events": "oom_kill 1\n"}, "pods/unified")
    (tmp_path / "mount" / "memory.events").write_text("oom_kill 9\n")
    assert said(tmp_path / "self", tmp_path / "mount") == "1 0"


def test_nothing_to_read(tmp_path: Path) -> None:
    assert said(tmp_path / "none", tmp_path) == "0 0"
