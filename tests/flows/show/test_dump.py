"""``hotstage debug-dump``: what is in the file, and what must never be."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from checkpoint.log import RunLog
from checkpoint.store import open_store
from flows.show.dump import dump, redacted, without_values


@pytest.mark.parametrize(
    "text",
    [
        "AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY",
        '{"secret_key": "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"}',
        "key id AKIAIOSFODNN7EXAMPLE in a line",
        "Authorization: Bearer eyJhbGciOiJSUzI1NiIsImtpZCI6",
        '"launch.key": "c2VjcmV0c2VjcmV0c2VjcmV0"',
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_what_looks_like_a_key_is_struck_out(text: str) -> None:
    out = redacted(text.encode()).decode()
    assert "[struck out]" in out
    for secret in ("wJalr", "IOSFODNN7", "eyJhb", "c2VjcmV0", "MIIEp"):
        assert secret not in out


def test_figures_stay() -> None:
    line = b'{"tokens_per_s": 1234567.25, "tokens": 123456789, "token_bytes": 2}'
    assert redacted(line) == line


def test_variables_lose_their_values_where_their_names_tell() -> None:
    pod = {"env": [{"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}, {"name": "LANG", "value": "C"}]}
    assert without_values(pod)["env"] == [
        {"name": "AWS_SECRET_ACCESS_KEY", "value": "[struck out]"},
        {"name": "LANG", "value": "C"},
    ]


def test_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-very-secret-value")
    store = open_store(f"file://{tmp_path}/store")
    log = RunLog(store, "r-0a1b2c", writer="driver")
    log.append("intervention", {"kind": "note", "text": "a-very-secret-value"}, log.fold())
    file = tmp_path / "out" / "r.tar.gz"
    dump(store, "r-0a1b2c", file, cluster=lambda state: iter([("cluster/jobs.json", b"a-very-secret-value")]))
    with tarfile.open(file) as archive:
        files = {m.name: archive.extractfile(m).read() for m in archive.getmembers()}  # type: ignore[union-attr]
    names = {name.removeprefix("r-0a1b2c/") for name in files}
    assert {"about.json", "log/000001-intervention.json", "cluster/jobs.json", "problems.txt"} <= names
    assert b"run: " in files["r-0a1b2c/problems.txt"]  # this run has no spec: said, not fatal
    assert not any(b"a-very-secret-value" in data for data in files.values())
