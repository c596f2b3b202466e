"""Credentials that expire: looked for again where newer ones may be, named and never shown."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoint.errors import CredentialsExpired, CredentialsRefused, NotFound
from checkpoint.store.s3 import S3Store
from checkpoint.store.s3_answers import Retry
from tests.support.hostile_s3 import SECRET, HostileS3, client

KEY = "runs/r/log/00000000000000000001"


@pytest.fixture
def profile(peer: HostileS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Credentials in a file: gives what writes another session token into it."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    path = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "team")

    def write(token: str) -> None:
        path.write_text(
            f"[team]\naws_access_key_id = k\naws_secret_access_key = {SECRET}\naws_session_token = {token}\n"
        )

    write("first-token")
    return write


def test_a_token_that_is_renewed_in_its_file_is_read_again(peer: HostileS3, profile: Callable[[str], None]) -> None:
    store = client(peer)
    peer.tokens = {"first-token"}
    assert store.create(KEY, b"x")
    peer.tokens = {"second-token"}
    profile("second-token")
    assert store.get(KEY) == b"x"
    assert store.head(KEY) is not None
    assert [info.key for info in store.list("runs/")] == [KEY]


def test_a_token_that_is_not_renewed_is_unavailable_and_named(
    peer: HostileS3, profile: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="checkpoint")
    store = client(peer, attempts=2)
    peer.tokens = set()
    for ask in (lambda: store.create(KEY, b"x"), lambda: store.get(KEY), lambda: store.head(KEY)):
        with pytest.raises(CredentialsExpired, match=r"ExpiredToken.*profile 'team' in .*credentials: write new ones"):
            ask()
    profile("second-token")
    peer.tokens = {"second-token"}
    assert store.create(KEY, b"x")
    assert SECRET not in caplog.text
    assert "first-token" not in caplog.text


def test_a_token_of_the_environment_is_named_never_shown(peer: HostileS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a-token-of-the-environment")
    store = client(peer, attempts=1)
    peer.tokens = set()
    with pytest.raises(CredentialsExpired, match="AWS_SESSION_TOKEN in this process's environment") as caught:
        store.get(KEY)
    assert "a-token-of" not in str(caught.value)
    assert "AWS_PROFILE" in str(caught.value)


def test_a_credential_process_is_asked_again(
    peer: HostileS3, profile: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    token = tmp_path / "token"
    token.write_text("first-token")
    program = tmp_path / "program"
    program.write_text(
        "#!/bin/sh\n"
        f'echo "{{\\"Version\\": 1, \\"AccessKeyId\\": \\"k\\", \\"SecretAccessKey\\": \\"s\\", '
        f'\\"SessionToken\\": \\"$(cat {token})\\"}}"\n'
    )
    program.chmod(0o755)
    (tmp_path / "config").write_text(f"[profile team]\ncredential_process = {program}\n")
    store = client(peer)
    peer.tokens = {"first-token"}
    assert store.create(KEY, b"x")
    peer.tokens = {"second-token"}
    token.write_text("second-token")
    assert store.get(KEY) == b"x"


def test_credentials_that_come_after_the_store_was_opened(
    peer: HostileS3, profile: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sidecar writes them a second later; a machine's metadata service answers at the second try."""
    (tmp_path / "credentials").unlink()
    monkeypatch.delenv("AWS_PROFILE")
    store = client(peer, renew_s=0.0)
    with pytest.raises(CredentialsRefused, match="Unable to locate credentials"):
        store.get(KEY)
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = k\naws_secret_access_key = s\n")
    assert store.create(KEY, b"x")


def test_looking_for_newer_credentials_is_bounded(peer: HostileS3, profile: Callable[[str], None]) -> None:
    now = [100.0]
    retry = Retry(attempts=1, clock=lambda: now[0], sleep=lambda _: None)
    endpoint = f"http://127.0.0.1:{peer.port}"
    store = S3Store("bucket", "p", endpoint=endpoint, region="us-east-1", path_style=True, retry=retry, renew_s=5)
    peer.tokens = {"second-token"}
    with pytest.raises(CredentialsExpired):
        store.get(KEY)
    profile("second-token")
    now[0] += 4.0
    with pytest.raises(CredentialsExpired):
        store.get(KEY)
    now[0] += 1.0
    with pytest.raises(NotFound):
        store.get(KEY)
