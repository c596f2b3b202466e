"""A plain path is a folder of that name, whatever it holds; a URL is decoded as URLs are."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from checkpoint.errors import StoreRefused
from checkpoint.store import address, open_store
from checkpoint.store.file import FileStore
from flows.drive.train import store_at, store_url

NAMES = [
    *(
        "a%41",
        "a%",
        "%",
        "%zz",
        "a%2541",
        "#",
        "a#b",
        "?",
        "a?b=c",
        "a b",
        " ",
        "a:b",
        "s3:x",
        "s3:",
        "http:",
        "memory:x",
    ),
    *(
        "~",
        "a~b",
        "a\nb",
        "\t",
        "ü字",
        os.fsdecode(b"\xff\xfe"),
        "[x]",
        "*",
        "a;b",
        "a&b",
        "@",
        "a@b",
        "\\",
        "'",
        '"',
        "-x",
    ),
    *("-x", "a" * 255, "…", "file:x"),
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_plain_path_is_taken_literally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    there = tmp_path / "x" / name
    written = [str(there), f"{there}/", f"x/{name}", f"./x/{name}", f"x/../x/{name}"]
    for text in written:
        store = store_at(text)
        assert isinstance(store, FileStore)
        assert os.path.realpath(store.root) == os.path.realpath(there), text
        again = open_store(store.url)  # as an agent does
        assert isinstance(again, FileStore)
        assert (again.root, again.url) == (store.root, store.url)
        assert address(store.url) == store.url
    assert store_at(str(there)).create("probe/a", b"x")
    assert [path.name for path in (tmp_path / "x").iterdir()] == [name]
    assert open_store(there.as_uri()).get("probe/a") == b"x"


def test_a_bare_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("./s3:x", "a%41", "x", "./s3:/bucket", "s3x:/b"):
        store = store_at(name)
        assert isinstance(store, FileStore)
        assert store.root == tmp_path / name


def test_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "h%41"))
    monkeypatch.chdir(tmp_path)
    assert store_url("~/runs") == (tmp_path / "h%41" / "runs").as_uri()
    monkeypatch.delenv("HOTSTAGE_STORE", raising=False)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert store_url(None) == (tmp_path / "h%41" / ".local" / "share" / "hotstage").as_uri()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data %41"))
    assert store_url(None) == (tmp_path / "data %41" / "hotstage").as_uri()
    monkeypatch.setenv("XDG_DATA_HOME", "data")  # of the current folder: the specification says that it does not count
    assert store_url(None) == (tmp_path / "h%41" / ".local" / "share" / "hotstage").as_uri()
    for home in ("", "h%41"):
        monkeypatch.setenv("HOME", home)
        assert store_url(None) == (Path(pwd.getpwuid(os.getuid()).pw_dir) / ".local" / "share" / "hotstage").as_uri()
    monkeypatch.setenv("HOTSTAGE_STORE", str(tmp_path / "s#1"))
    assert store_url(None) == (tmp_path / "s#1").as_uri()


@pytest.mark.parametrize("below", ["", "deeper/store"])
def test_a_link_to_nothing_is_no_store(tmp_path: Path, below: str) -> None:
    (tmp_path / "link").symlink_to("unmounted")
    store = store_at(str(tmp_path / "link" / below))
    for use in (lambda: store.create("probe/a", b"1"), lambda: store.get("probe/a"), lambda: list(store.list(""))):
        with pytest.raises(StoreRefused, match="/link is a symbolic link to 'unmounted', and nothing is there; make"):
            use()
    (tmp_path / "unmounted").mkdir()
    assert store.create("probe/a", b"1")


@pytest.mark.parametrize(
    ("url", "folder"),
    [
        ("file:///a%41", "/aA"),
        ("file:///a%2541", "/a%41"),
        ("file://localhost/a%20b", "/a b"),
        ("file:/a/b", "/a/b"),
        ("FILE:///a", "/a"),
        ("file:///a%23%3F%0A", "/a#?\n"),
        ("file:///%FF", os.fsdecode(b"/\xff")),
    ],
)
def test_a_url_is_decoded(url: str, folder: str) -> None:
    store = store_at(url)
    assert isinstance(store, FileStore)
    assert str(store.root) == folder


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "address is empty"),
        ("  ", "address is empty"),
        ("/", "not the root folder"),
        ("file:///", "not the root folder"),
        ("file:////", "not the root folder"),
        ("a\0b", "NUL byte"),
        ("file:///a%00b", "NUL byte"),
        ("file:///a%zz", "followed by two hex digits"),
        ("file:///a b", "%20"),
        ("file:///a\nb", "taken as it is"),
        ("file:///a?b", "%3F"),
        ("file:///a#b", "%23"),
        ("file://host/a", "without host"),
        ("file://", "file:///absolute/path"),
        ("s3://[bad/x", "s3://bucket/prefix"),
        ("s3://bucket/x?endpoint=http://[bad", "http://host:port"),
        ("s3://bucket/x?endpoint=http://h:99999", "http://host:port"),
        ("s3://bkt.s3.amazonaws.com/p", "a server's name, not a bucket's: write s3://bkt/p"),
        ("s3://a.b.s3.eu-west-1.amazonaws.com/p", "write s3://a.b/p"),
        ("s3://bkt.s3-eu-west-1.amazonaws.com", "write s3://bkt"),
        ("s3://192.168.1.1/p", "write s3://bucket/prefix?endpoint=http://host:port"),
        (
            "s3://minio:9000/bkt/p",
            "a server's name and port, not a bucket's: write s3://bkt/p?endpoint=http://minio:9000",
        ),
        ("s3://arn:aws:s3:us-east-1:123456789012:accesspoint/mine/p", "an access point by its alias"),
        ("s3://fast--use1-az4--x-s3/p", "is a directory bucket: its listings have no order"),
        ("http://h/x", "schemes are"),
    ],
)
def test_what_can_be_no_store(text: str, says: str) -> None:
    with pytest.raises(StoreRefused) as caught:
        store_at(text)
    assert says in str(caught.value)


def test_a_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(StoreRefused, match="give an absolute path"):
        store_at("runs")
    assert store_at(str(tmp_path / "runs"))


@pytest.mark.parametrize(
    "text",
    [
        "s3:/b",
        "s3:b",
        "S3:/b/p",
        " s3://b/p",
        '"s3://b/p"',
        "'s3://b/p'",
        "s3:\\\\b",
        "file:x",
        "gs:b",
        "memory:x",
        "arn:aws:s3:::b/p",
    ],
)
def test_what_begins_like_an_address_is_no_folder(text: str) -> None:
    with pytest.raises(StoreRefused, match=r"begins like one: write s3://bucket/prefix .* put ./ before it"):
        store_at(text)


@pytest.mark.parametrize("text", ['"/data/runs"', "'/data/runs'", "'runs'", " /data/runs", "\t/data"])
def test_blanks_before_a_path_and_quotes_around_it(text: str) -> None:
    """As a file of environment variables leaves them there."""
    with pytest.raises(StoreRefused, match="without blanks before it or quotes around it"):
        store_at(text)


@pytest.mark.parametrize("text", ["/data/runs\n", "runs\r\n", "s3://bucket/p\n", "s3://bucket/p?region=eu-west-1\n"])
def test_a_lines_end_behind_it(text: str) -> None:
    """As a Secret has it that was made with `echo`: never a folder of that name."""
    with pytest.raises(StoreRefused, match="ends with a line's end"):
        store_at(text)


def test_a_home_folder_that_nobody_has() -> None:
    with pytest.raises(StoreRefused, match="there is no home folder of '~nobody-of-this-name'"):
        store_at("~nobody-of-this-name/runs")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://bucket//p//", "has no empty part .*: write s3://bucket/p$"),
        ("s3://bucket/a//b", "write s3://bucket/a/b$"),
        ("s3://bucket//", "write s3://bucket$"),
        ("s3://bucket/p?endpoint=http://h:9000/minio/", "has the path '/minio/', .*: write http://h:9000, without it"),
        ("s3://bucket/p?region=", "option region has no value"),
        ("s3://bucket/p?region=a&region=b", "option region stands twice"),
        ("s3://bucket/a b", "store s3://bucket/a b: its prefix cannot be; .*'a b' is not a plain name"),
    ],
)
def test_an_address_that_would_be_read_as_another(url: str, words: str) -> None:
    with pytest.raises(StoreRefused, match=words):
        open_store(url)


def test_a_folder_of_the_kernels_own() -> None:
    with pytest.raises(StoreRefused, match=r"/proc takes no folders of people .*; choose another with --store"):
        store_at("/proc/x").create("probe/a", b"x")


def test_an_address_in_s3_opens_again_as_it_is() -> None:
    """As an agent does: a prefix with + = @ was written with escapes, which no prefix may hold."""
    url = "s3://bucket/a+b=c@d/e?endpoint=http://[::1]:9000&region=eu-west-1&sse=aws:kms&kms_key=alias/team"
    store = open_store(url)
    again = open_store(store.url)
    assert (again.url, store.describe()) == (store.url, store.url)
    assert store.url.startswith("s3://bucket/a+b=c@d/e?")
