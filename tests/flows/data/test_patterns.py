"""The files that a pattern names: what matches, what was meant, what is no file, what changes meanwhile."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import random
import socket
from pathlib import Path

import pytest

from flows.data import documents
from flows.data.sources import files as sources_of
from flows.data.sources.files import CHUNK
from flows.data.sources.paths import files_of
from tests.checkpoint.store.test_file_store import in_child
from tests.flows.data.test_corpus import WORDS, fill, texts
from trainer.errors import DatasetError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_pattern_matches_what_glob_matches(here: Path) -> None:
    dice = random.Random(11)
    names = ["a", "b.txt", "[c]", ".d", "e f", "*x", "g?h", "ü", "{i}"]
    for _ in range(60):
        fill(
            "/".join(["c", *dice.choices(names[:4], k=dice.randrange(3)), f"f{dice.randrange(9)}{dice.choice(names)}"])
        )
    os.symlink("a", "c/link")
    for pattern in (
        *("c/*", "c/**", "c/**/*", "c/**/*.txt", "**/f1*", "c/*/*", "c/*/**/*", "c/.*/*", "c/[ab]/*", "c/**/f[!0-4]*"),
        *(
            "c/f?a",
            "c//*",
            "./c/*",
            "c/b.txt/../*",
            "c/./*",
            "c/f1a/*",
            "c/../c/*",
            f"{here}/c/**/*",
            "c/**/**/f*",
            "c/?/*",
            "c/link/*",
            "c/fa",
            "c/**/a/*",
        ),
    ):
        want = sorted({p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)})
        try:
            got = files_of(f"text:{pattern}")
        except DatasetError:
            got = []
        assert sorted(map(os.path.normpath, got)) == sorted(map(os.path.normpath, want)), pattern


@pytest.mark.parametrize(
    ("file", "source", "proposal"),
    [
        ("[2024] logs/a.txt", "text:[2024] logs/*.txt", "text:[[]2024] logs/*.txt"),
        ("c/a[1].txt", "text:c/a[1].txt", "text:c/a[[]1].txt"),
        ("c/what?!/x.txt", "text:c/what?!/x.txt", ""),
        ("c/x/a.txt", "text:c", "text:c/**/*"),
        ("c/x/a.txt", "text:c/", "text:c/**/*"),
        ("c/x/a.txt", "jsonl:./c", "jsonl:./c/**/*"),
        ("[c]/x/a.txt", "text:[c]", "text:[[]c]/**/*"),
        ("c/x/a.txt", "text:c/*", "text:c/*/**/*"),
        ("c/x/a.txt", "text:c/*/", "text:c/*/**/*"),
        ("Corpus/a.txt", "text:corpus/*.txt", "there is no corpus, but Corpus"),
        ("c/readme.txt", "text:c/README.txt", "there is no c/README.txt, but c/readme.txt"),
        ("corpus/a.txt", "text:corpsu/*.txt", "but corpus"),
        ("c/.hidden.txt", "text:c/*.txt", "begins with a dot"),
        ("c/.h/a.txt", "text:c/**/*.txt", "begins with a dot"),
        ("c/a.txt", "text:c/{a,b}.txt", "braces are taken literally"),
        ("c/a.txt", "text:c/[x].md", r"written [[]"),
        ("c/a.txt", "text:~nobody-here/*.txt", "matches no file"),
        ("c/a.txt", "text:../*/none/*.txt", "matches no file"),
        ("c/a.txt", "text:\0", "NUL"),
        ("c/a.txt", "text:https://example.org/a.txt", "it is an address"),
        ("c/a.txt", "text:c\\*.txt", "text:c/*.txt"),
        ("c/a.txt", "text:C:\\c\\*.txt", "such as text:/c/*.txt"),
        ("c/a.txt", "text:C:\temp/*.txt", "control character"),
        ("c/a.txt", "text:file:///c/*.txt", "write the path alone: text:/c/*.txt"),
        ("c/A.TXT", "text:c/*.txt", "1 file(s) match but for small and capital letters"),
        ("c/a.txt", "text:$HOME/c/*.txt", "variables of the shell are not replaced"),
        ("c/a.txt", "text:c/a.txt,text:c/b.txt", "a comma is part of a name"),
        ("c/a.txt", "text:c/*.txt, d/*.txt", "a comma is part of a name"),
        ("c/a.txt", "text:'c/*.txt'", "quotes are part of a name; write text:c/*.txt"),
    ],
)
def test_a_pattern_that_matches_nothing_says_what_is_meant(here: Path, file: str, source: str, proposal: str) -> None:
    fill(file)
    if not proposal:
        assert texts(source) == [WORDS]
        return
    with pytest.raises(DatasetError) as caught:
        texts(source)
    assert proposal in str(caught.value), str(caught.value)
    if proposal.startswith(("text:", "jsonl:")):  # what it proposes works
        assert files_of(proposal)


def test_names_that_hold_anything(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill("~/a.txt", "x: y/{1}/b.txt", "c/-rf", "c/new\nline", os.fsdecode(b"c/\xff\xfe"))
    monkeypatch.setenv("HOME", str(here / "c"))
    assert len(texts("text:~/*")) == 3
    assert len(texts("text:./~/*")) == 1
    assert len(texts("text:x: y/{1}/*.txt")) == 1


def test_a_link_that_leads_back_is_no_flood(here: Path) -> None:
    fill("c/d/a.txt")
    os.symlink("..", "c/d/up")
    os.symlink(".", "c/self")
    assert len(files_of("text:c/**/*.txt")) < 8
    assert "c/d/a.txt" in files_of("text:c/**/*.txt")


def test_what_is_no_file_is_named(here: Path) -> None:
    fill("c/a.txt", "c/folder.txt/b.txt")
    assert len(texts("text:c/*.txt")) == 1  # the folder is none
    os.mkfifo("c/pipe.txt")
    with pytest.raises(DatasetError, match=r"c/pipe.txt is no regular file"):
        texts("text:c/*.txt")
    os.unlink("c/pipe.txt")
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir("c"):
        server.bind("s.txt")
    with pytest.raises(DatasetError, match=r"c/s.txt is no regular file"):
        texts("text:c/*.txt")
    os.unlink("c/s.txt")
    os.symlink("nowhere", "c/link.txt")
    with pytest.raises(DatasetError, match=r"c/link.txt is a link to nothing \(nowhere\)"):
        texts("text:c/*.txt")
    os.unlink("c/link.txt")
    os.symlink("round.txt", "c/round.txt")
    with pytest.raises(DatasetError, match="is a link to nothing"):
        texts("text:c/*.txt")


def test_what_may_not_be_read_is_named(here: Path) -> None:
    fill("c/a.txt", "c/d/b.txt")
    for folder in [here, *here.parents][:3]:
        folder.chmod(folder.stat().st_mode | 0o055)

    def refused(source: str, says: str) -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        with pytest.raises(DatasetError, match=says):
            texts(source)

    Path("c/a.txt").chmod(0)
    in_child(lambda: refused("text:c/*.txt", r"c/a.txt cannot be read: Permission denied"))
    Path("c/a.txt").chmod(0o644)
    Path("c/d").chmod(0)
    in_child(lambda: refused("text:c/**/*.txt", r"c/d of the corpus cannot be listed: Permission denied"))
    Path("c/d").chmod(0o755)
    with pytest.raises(DatasetError, match="cannot be read"):
        texts("text:/proc/self/mem")


def test_a_file_that_vanishes_or_grows_meanwhile(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill("c/a.txt", "c/b.txt")
    reading = documents("text:c/*.txt")
    next(reading)
    os.unlink("c/b.txt")
    with pytest.raises(DatasetError, match=r"c/b.txt vanished"):
        next(reading)

    seen = iter([True, False])
    true_fstat = os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        result = true_fstat(descriptor)
        if next(seen, False):
            with open("c/a.txt", "a") as file:
                file.write("more")
        return result

    monkeypatch.setattr(sources_of.os, "fstat", fstat)
    with pytest.raises(DatasetError, match=r"c/a.txt changed while it was read"):
        texts("text:c/*.txt")


def test_a_file_system_that_numbers_a_file_anew_at_each_look(here: Path) -> None:
    """As mounted buckets and sshfs do: the file is the same one."""
    Path("a").write_text("a")
    status = os.stat("a")
    times = {name: getattr(status, name) for name in ("st_mtime_ns", "st_ctime_ns", "st_mtime", "st_ctime")}
    again = os.stat_result((status.st_mode, status.st_ino + 1, *status[2:]), times)
    assert sources_of._entry("a", again) == sources_of._entry("a", status)
    os.utime("a", ns=(1, 1))
    assert sources_of._entry("a", os.stat("a")) != sources_of._entry("a", status)


def test_damage_that_somebody_writes_meanwhile_is_told_as_a_change(here: Path) -> None:
    line = json.dumps({"text": WORDS}) + "\n"
    Path("a.jsonl").write_text(line * (5 * CHUNK // 2 // len(line)))
    reading = documents("jsonl:a.jsonl")
    next(reading)
    os.truncate("a.jsonl", CHUNK + 1)
    with pytest.raises(DatasetError, match=r"a.jsonl changed while it was read"):
        list(reading)


def test_a_name_with_a_line_end_stays_on_a_line(here: Path) -> None:
    fill("c/a\nb.jsonl")
    with pytest.raises(DatasetError, match=r"^c/a\\nb.jsonl:1 is no JSON object"):
        texts("jsonl:c/*")


def test_folders_that_match_beside_files_are_told(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Spark's ``x.parquet`` is one: nothing is left out in silence."""
    for name in ("c/a.txt", "c/x.txt/part.txt", "c/sub/b.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("x")
    assert files_of("text:c/*.txt") == ["c/a.txt"]
    (told,) = [record.getMessage() for record in caplog.records]
    assert "1 folder(s) match too, and what is in them is not read; text:c/*.txt/**/* reads that" in told
    assert files_of("text:c/*") == ["c/a.txt"]
    assert len(caplog.records) == 1
