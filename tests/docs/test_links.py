"""Every file that the documentation links to or names as its proof is there."""

from __future__ import annotations

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


def test_what_is_not_there_is_found() -> None:
    text = (
        "[a](docs/nowhere.md), [b](README.md#start), `tests/e2e/test_gone.py`, `tests/e2e`, `tests/engine/test_c*.py`"
    )
    assert missing(ROOT / "README.md", text) == ["docs/nowhere.md", "tests/e2e/test_gone.py"]
