"""The whole run through the command on a real S3 server, as an identity that may not delete."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import spec_of
from tests.support.chaos import Fault, caught, rank_step, unleashed
from tests.support.place import SPEC, Place, finish
from tests.support.s3_server import BUCKET, S3Server, s3_server
from tests.support.wait import wait_for

REFUSED, LOST = 78, 75


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3") / "server") as running:
        yield running


@pytest.fixture
def there(request: pytest.FixtureRequest, tmp_path: Path, server: S3Server) -> Iterator[Place]:
    """A place whose store is a prefix of its own on the server."""
    made = Place(tmp_path / "p", spec_of(request), store=server.url(tmp_path.name), env=server.environment("trainer"))
    try:
        yield made
    finally:
        made.stop_all()


def objects(server: S3Server, place: Place) -> Path:
    """Where the server keeps what the place's store holds."""
    return server.data / BUCKET / place.folder.parent.name


@pytest.mark.long_run
def test_a_killed_rank_and_the_same_bits_as_in_a_folder(
    there: Place, server: S3Server, undisturbed: tuple[str, str]
) -> None:
    """And nothing that was written or inherited knows the secret but the agent's own environment."""
    run, digest = undisturbed
    _, secret = server.identities["trainer"]
    with unleashed(Fault("forward", 1, 6), there.folder, there.folder / "out") as watcher:
        process = there.start_train()
        with caught(there.folder / "out", lambda: rank_step(there.folder / "out", 0) is not None, "a rank"):
            environments = {line: environment(pid) for pid, line in there.left().items()}
        done = finish(process)
        assert watcher.wait(60) == 0
    assert done.code == 0, done.err
    result = done.json()
    assert (result["run"], result["outcome"], result["state_digest"]) == (run, "succeeded", digest)
    assert result["attempts"] > 1
    there.all_gone()

    engine = {line: text for line, text in environments.items() if "hotstage-engine" in line.split()[0]}
    assert len(engine) >= 2  # the supervisor and a rank
    for line, text in engine.items():
        assert secret.encode() not in text, line
        assert b"AWS_" not in text, line
    assert any("checkpoint.agent" in line and secret.encode() in text for line, text in environments.items())

    assert secret not in done.out + done.err
    for folder in (there.folder, objects(server, there)):
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert files
        for path in files:
            assert secret.encode() not in path.read_bytes(), path
    told = json.loads(there.said("ckpt", "digest", run, "--json"))
    assert told["state_digest"] == digest
    events = [json.loads(line).get("event") for line in there.said("logs", run).splitlines()]
    assert "end" in events


def environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("how", ["killed", pytest.param("frozen", marks=pytest.mark.slow)])
def test_a_store_that_is_away_for_a_while_costs_no_step(
    there: Place, server: S3Server, tmp_path: Path, how: str
) -> None:
    """Training goes on without it, no attempt is lost, and what comes after is stored again."""
    steps = "train.steps=160"
    process = there.start_train(steps)
    work = there.folder / "out"
    saved = objects(server, there)
    with caught(work, lambda: any(saved.glob("runs/*/manifests/*/manifest")), "a checkpoint"):
        if how == "killed":
            server.kill()
        else:
            os.kill(server.pid, signal.SIGSTOP)
    try:
        left_at = wait_for(lambda: rank_step(work, 0), "the ranks", 60)
        wait_for(lambda: (rank_step(work, 0) or 0) > left_at + 40, "steps without a store", 60)
    finally:
        if how == "killed":
            server.restart()
        else:
            os.kill(server.pid, signal.SIGCONT)
    done = finish(process)
    assert done.code == 0, done.err
    result = done.json()
    assert (result["outcome"], result["attempts"], result["step"]) == ("succeeded", 1, 160)
    kept = [c["step"] for c in json.loads(there.said("ckpt", "ls", result["run"], "--json"))]
    assert [s for s in kept if left_at + 40 < s], kept

    folder = Place(tmp_path / "folder", SPEC)
    try:
        assert folder.train(steps, "parallel.stages=1")["state_digest"] == result["state_digest"]
    finally:
        folder.stop_all()


def test_ctrl_c_is_heard_while_the_store_does_not_answer(there: Place, server: S3Server) -> None:
    """The server takes connections and says nothing: the gang leaves all the same."""
    process, work = there.start_train("checkpoint.commit_s=1"), there.folder / "out"
    saved = objects(server, there)
    with caught(work, lambda: any(saved.glob("runs/*/manifests/*/manifest")), "a checkpoint"):
        os.kill(server.pid, signal.SIGSTOP)
    try:
        process.send_signal(signal.SIGINT)
        done = finish(process, 60)  # no call comes back in all this time
        there.all_gone(30)
    finally:
        os.kill(server.pid, signal.SIGCONT)
    assert done.code == 85, done.out + done.err
    assert "stopping" in done.err
    assert "the store does not answer" in done.err


def test_credentials_in_a_file_that_is_named_from_where_the_command_works(there: Place, server: S3Server) -> None:
    """An agent works in its node's folder, and found none: it was started again and again."""
    access, secret = server.identities["trainer"]
    (there.folder / "mine").write_text(f"[default]\naws_access_key_id = {access}\naws_secret_access_key = {secret}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        del there.env[name]
    there.env["AWS_SHARED_CREDENTIALS_FILE"] = "mine"
    assert there.train("train.steps=8")["outcome"] == "succeeded"


def refused(place: Place, code: int, secret: str, *words: str) -> None:
    done = place.refused_train()
    assert done.code == code, done.out + done.err
    assert "Traceback" not in done.err
    assert len([line for line in done.told.splitlines() if line.startswith("hotstage: ")]) == 1
    for word in words:
        assert word in done.told, done.err
    assert secret not in done.err


def test_wrong_credentials_and_addresses_are_told_apart(there: Place, server: S3Server) -> None:
    _, secret = server.identities["trainer"]
    good = dict(there.env)
    there.env = good | {"AWS_SECRET_ACCESS_KEY": "wrong" + secret}
    refused(there, REFUSED, secret, "SignatureDoesNotMatch", "check AWS_SECRET_ACCESS_KEY")
    there.env = good | {"AWS_ACCESS_KEY_ID": "nobody"}
    refused(there, REFUSED, secret, "check AWS_ACCESS_KEY_ID")
    there.env = {k: v for k, v in good.items() if not k.startswith("AWS_")} | {
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    refused(there, REFUSED, secret, "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    there.env = good | {"HOTSTAGE_STORE": good["HOTSTAGE_STORE"].replace(BUCKET, "nobodys-bucket", 1)}
    refused(there, REFUSED, secret, "nobodys-bucket", "NoSuchBucket", "create the bucket")
    there.env = good | {"HOTSTAGE_STORE": f"s3://trainer:{secret}@{BUCKET}/x"}
    refused(there, REFUSED, secret, "an address holds no credentials")
    there.env = good


def test_a_server_that_is_not_there(there: Place, server: S3Server) -> None:
    _, secret = server.identities["trainer"]
    server.kill()
    try:
        refused(there, LOST, secret, server.endpoint)
    finally:
        server.restart()
