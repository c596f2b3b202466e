"""The check in a bare Debian: it reads the README, and says why where it cannot run. (CI runs it: `.ci/run`.)"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.newcomer import CANNOT, ROOT, Cannot, main, packages

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gets as far")


def able(path: str, *prefix: str) -> tuple[int, str]:
    environment = os.environ | {"PATH": path}
    command = [*prefix, sys.executable, "-m", "tests.tools.newcomer", "--able"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr


def test_the_readme_names_the_packages_once() -> None:
    readme = (ROOT / "README.md").read_text()
    assert {"python3", "python3-venv", "gcc", "libc6-dev", "make", "git"} <= set(packages(readme))
    assert packages("```sh\nsudo apt-get install -y a b\n```") == ["a", "b"]
    for text, count in ((readme.replace("apt-get install", "apt"), 0), (readme + "\napt-get install chromium\n", 2)):
        with pytest.raises(Cannot, match=f"README.md has {count} lines"):
            packages(text)


def test_who_is_not_root_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)
    try:
        code = main(["--able"])
    finally:
        os.seteuid(me)
    assert (code, "run it as root" in capsys.readouterr().err) == (CANNOT, True)


@needs_root
def test_without_debootstrap(tmp_path: Path) -> None:
    code, said = able(str(tmp_path))
    assert (code, "debootstrap is not installed" in said) == (CANNOT, True), said


@needs_root
def test_without_the_right_to_mount(tmp_path: Path) -> None:
    tools = {name: shutil.which(name) for name in ("unshare", "mount", "setpriv")}
    assert all(tools.values()), tools
    for name, found in (tools | {"debootstrap": "/bin/true"}).items():
        (tmp_path / name).symlink_to(str(found))
    code, said = able(str(tmp_path), "setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin")
    assert (code, "root may not mount here" in said) == (CANNOT, True), said
