"""`hotstage ckpt doctor`: what is right is called right, each lie and each missing right is found and named."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import pytest

from checkpoint.doctor import COLLECTING, DRIVING, READING, SAVING, Diagnosis, Effort, examine_store
from checkpoint.errors import StoreRefused
from checkpoint.probe import Unordered, probe, race
from checkpoint.store import Store, open_store
from checkpoint.store.s3 import S3Store
from checkpoint.store.s3_answers import Retry
from flows.cli.main import exit_code_of
from tests.support.hostile_s3 import HostileS3, Lie, hostile_s3
from tests.support.s3_server import S3Server

LITTLE = Effort(data_bytes=1 << 18, races=((2, 4, 64),), objects=6, small=2)


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostileS3]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    with hostile_s3() as running:
        yield running


def examined(peer: HostileS3) -> Diagnosis:
    retry = Retry(attempts=2, sleep=lambda _: None)
    endpoint = f"http://127.0.0.1:{peer.port}"
    store = S3Store("bucket", "p", endpoint=endpoint, region="us-east-1", path_style=True, retry=retry, read_s=5.0)
    return examine_store(store, LITTLE)


def test_what_is_right_is_called_right_and_nothing_is_left(store: Store, collector: Store) -> None:
    if (folder := collector.local_path("x")) is not None:
        folder.parent.mkdir()
    found = examine_store(collector, LITTLE)
    assert {f.verdict for f in found.findings} == {"ok"}, found
    assert found.ok
    assert found.good_for == (READING, DRIVING, SAVING, COLLECTING)
    assert (found.bad_for, found.left) == ((), 0)
    assert list(store.list("")) == []


def test_the_trainers_identity_is_right_for_training_and_leaves_little(store: Store) -> None:
    if not store.url.startswith("s3:"):
        return  # a folder has one identity
    found = examine_store(store, LITTLE)
    assert found.ok
    assert found.good_for == (READING, DRIVING, SAVING)
    assert found.left == len(list(store.list("")))
    assert found.left > 0
    assert [f.text for f in found.findings if f.name == "rights"] == [
        "this identity reads, creates runs, creates checkpoints: right for agents and drivers in one"
    ]


TOGETHER: list[set[Lie]] = [
    {"races", "order", "ranges", "keeps", "undead", "empty", "flips"},
    {"changes", "hidden", "plus", "beyond"},
    {"unlisted", "case"},
    {"unchecked", "stale", "ahead"},
    {"timeless"},
]
"""Lies that different checks find: one examination finds all of them."""
FOUND: dict[Lie, tuple[str, str]] = {
    "races": ("bad races", "[2-4] of 4 racing creators of one object were told that they made it"),
    "changes": ("bad races", "[2-4] of 4 racing creators|a create that lost changed|does not hold the bytes"),
    "unlisted": ("bad visible", "not shown or listed right after their create"),
    "hidden": ("bad visible", "not shown or listed right after their create"),
    "order": ("bad names", "out of the order of their bytes"),
    "case": ("bad names", "'a' and another name are one to this store"),
    "plus": ("bad names", "come back from a listing changed"),
    "ranges": ("bad ranges", "of an object came back wrong"),
    "beyond": ("bad ranges", "a range beyond an object's end was answered"),
    "keeps": ("bad checksums", "bytes that do not have the digest that came with them were kept"),
    "undead": ("bad rights", "an object that was deleted is still shown"),
    "empty": ("bad conditions", "an empty object does not keep its name"),
    "flips": ("bad speed", "other bytes than were written"),
    "unchecked": ("warn checksums", "is not compared with its bytes"),
    "stale": ("warn hints", "was read as it was before"),
    "ahead": ("warn times", "its clock is 3[56][0-9][0-9] s ahead"),
    "timeless": ("warn times", "does not say when an object was written"),
}


@pytest.mark.parametrize("lies", TOGETHER, ids=lambda lies: "+".join(sorted(lies)))
def test_lies_are_found_and_named(peer: HostileS3, lies: set[Lie]) -> None:
    peer.lies |= lies
    found = examined(peer)
    for lie in lies:
        kind, says = FOUND[lie]
        assert any(f"{f.verdict} {f.name}" == kind and re.search(says, f.text) for f in found.findings), (lie, found)
    broken = any(FOUND[lie][0].startswith("bad") for lie in lies)
    assert found.ok is not broken
    assert found.good_for == (
        () if broken else (READING, DRIVING, SAVING, COLLECTING)[: 3 if "timeless" in lies else 4]
    )


def test_every_lie_that_the_server_can_tell_is_in_the_list() -> None:
    assert sorted(lie for lies in TOGETHER for lie in lies) == sorted(FOUND) == sorted(get_args(Lie))


@pytest.mark.parametrize(
    ("denied", "good", "says"),
    [
        ({"DELETE"}, (READING, DRIVING, SAVING), "right for agents and drivers in one"),
        ({"PUT"}, (READING,), "this identity reads: right for who only looks"),  # a collector writes what it gives up
        ({"PUT", "DELETE"}, (READING,), "this identity reads: right for who only looks"),
        ({"LIST"}, (), "can be read, but not listed.*|s3:ListBucket"),
        ({"GET"}, (), "AccessDenied"),
    ],
    ids=lambda x: "+".join(sorted(x)) if isinstance(x, set) else "",
)
def test_rights_are_told(peer: HostileS3, denied: set[str], good: tuple[str, ...], says: str) -> None:
    peer.denies |= denied
    found = examined(peer)
    assert found.good_for == good
    assert any(re.search(says, f.text) for f in found.findings), found
    if "PUT" in denied:
        assert [f.verdict for f in found.findings if f.name == "writes" and "AccessDenied" in f.text] == ["ok"]


@pytest.mark.parametrize(
    ("role", "good", "says"),
    [
        ("agent", (READING, SAVING), "this identity reads, creates checkpoints: right for an agent"),
        ("driver", (READING, DRIVING), "this identity reads, creates runs: right for a driver"),
        ("collector", (READING, COLLECTING), "this identity reads, deletes: right for the collector"),
        ("reader", (READING,), "this identity reads: right for who only looks"),
    ],
)
def test_the_identities_of_docs_policies_are_known_again(
    server: S3Server, role: str, good: tuple[str, ...], says: str
) -> None:
    with server.identity(role):
        found = examine_store(open_store(server.url(f"doctor-{role}")), LITTLE)
    assert found.ok, found
    assert found.good_for == good
    assert [f.text for f in found.findings if f.name == "rights"] == [says]
    assert (found.verdict("races") == "ok") is (role != "reader")


def test_a_store_that_stops_answering_is_unknown_not_bad(peer: HostileS3) -> None:
    peer.applies = ("PUT",)
    peer.faults.extend(["503"] * 1000)
    found = examined(peer)
    assert (found.ok, found.exit_code) == (False, 75)
    assert found.verdict("writes") == "unknown"
    assert SAVING in found.bad_for


@pytest.mark.parametrize("lie", ["races", "changes", "unlisted"])
def test_a_run_is_not_begun_on_it(peer: HostileS3, lie: Lie) -> None:
    peer.lies.add(lie)
    peer.racing = "probe/"
    with pytest.raises(Unordered, match=r"cannot order writers: .*use a store that has it.*ckpt doctor") as caught:
        probe(open_store(peer.url()))
    assert isinstance(caught.value, StoreRefused)
    assert caught.value.exit_code == 78


def test_the_command_tells_people_and_programs(
    peer: HostileS3, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, why in (("store", "there is no folder"), ("file/below", "file is a file, and a store is a folder")):
        (tmp_path / "file").touch()
        assert exit_code_of(["ckpt", "doctor", f"{tmp_path}/{name}"]) == 78
        assert "BAD      answers" in (said := capsys.readouterr().out)
        assert why in said
        assert sorted(tmp_path.iterdir()) == [tmp_path / "file"]  # it has made nothing
    (tmp_path / "store").mkdir()
    assert exit_code_of(["ckpt", "doctor", f"{tmp_path}/store", "--mb", "8"]) == 0
    said = capsys.readouterr().out
    assert "ok       races" in said
    assert f"good for  {SAVING}" in said
    assert exit_code_of(["ckpt", "doctor", f"{tmp_path}/store", "--mb", "8", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    assert {f["name"] for f in told["findings"]} >= {"races", "conditions", "visible", "times", "speed"}
    peer.denies.add("LIST")
    assert exit_code_of(["ckpt", "doctor", peer.url()]) == 78
    said = capsys.readouterr().out
    assert "BAD      answers" in said
    assert f"not for  {SAVING}" in said
    assert "mend: give this identity s3:ListBucket on the bucket" in said


def test_racers_that_a_machine_cannot_start_are_not_waited_for() -> None:
    class Few(ThreadPoolExecutor):
        """A machine, or a container, that gives no fifth thread."""

        def submit(self, *args: Any, **kwargs: Any) -> Any:
            if len(self._threads) == 4:
                raise RuntimeError("can't start new thread")
            return super().submit(*args, **kwargs)

    with pytest.raises(RuntimeError, match="new thread"), Few(16) as pool:
        race(open_store("memory:"), pool, "probe/x", 16)
