"""Every file that the documentation links to or names as its proof is there, and no page is half merged."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMED = re.compile(r"`((?:tests|docs|flows|checkpoint|k8s|trainer|examples)/[\w./*-]+\.\w+|(?:tests|examples)/[\w/]+)`")


def missing(page: Path, text: str) -> list[str]:
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    found = [link for link in links if link and not (page.parent / link).exists()]
    return found + [name for name in NAMED.findall(text) if not any(ROOT.glob(name))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path) -> None:
    assert missing(page, page.read_text(encoding="utf-8")) == []


def test_the_readme_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"](docs/{page.name})" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_page_holds_no_marks_of_a_merge(page: Path) -> None:
    assert re.findall(r"^(?:<{7}|>{7}) .*", page.read_text(encoding="utf-8"), re.MULTILINE) == []


def test_what_is_not_there_is_found() -> None:
    text = (
        "[a](docs/nowhere.md), [b](README.md#start), `tests/e2e/test_gone.py`, `tests/e2e`, `tests/engine/test_c*.py`"
    )
    assert missing(ROOT / "README.md", text) == ["docs/nowhere.md", "tests/e2e/test_gone.py"]


def not_there(text: str, files: set[str]) -> list[str]:
    """Names of files in backticks, however short, that no file has (`*` stands for any letters)."""
    names = re.findall(r"`([\w./*-]+\.(?:py|c|h|md|toml))`", text)
    return [name for name in names if name not in files and not ("*" in name and fnmatch.filter(files, name))]


def test_every_file_that_a_page_names_is_there() -> None:
    kept = ("flows", "checkpoint", "k8s", "trainer", "tests", "docs", "examples")
    paths = [path.relative_to(ROOT).parts for name in kept for path in (ROOT / name).rglob("*.*")]
    files = {"/".join(path[first:]) for path in paths for first in range(len(path))}
    files |= {"prefect.toml", "pyproject.toml"}  # a user's, where Prefect reads them
    for page in PAGES:
        if page.name != "CHANGELOG.md":  # it tells of what is gone, too
            assert not_there(page.read_text(encoding="utf-8"), files) == [], page.name
    assert not_there("`plan/lower.py`, `test_c*.py`, `plan/gone.py`, `gone*.py`", files) == ["plan/gone.py", "gone*.py"]
