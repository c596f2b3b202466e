"""Kubeconfigs: what is wrong is told with the file, the context and the mend, before it is asked."""

from __future__ import annotations

import base64
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from k8s.api import Api
from k8s.errors import Unauthenticated
from trainer.errors import LaunchRefused

SERVER = "https://127.0.0.1:1"
EXEC = {"apiVersion": "client.authentication.k8s.io/v1", "command": "no-such-program", "installHint": "ask\n  Ann"}


def config(
    user: dict[str, Any] | None = None, cluster: dict[str, Any] | None = None, name: str = "x", **more: Any
) -> dict[str, Any]:
    return {
        "clusters": [{"name": f"c-{name}", "cluster": cluster or {"server": SERVER}}],
        "users": [{"name": "u", "user": user or {}}],
        "contexts": [{"name": name, "context": {"cluster": f"c-{name}", "user": "u", "namespace": f"of-{name}"}}],
        "current-context": name,
        **more,
    }


GARBAGE = base64.b64encode(bytes(range(256))).decode()
EMPTY_PEM = base64.b64encode(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").decode()
KEY_PEM = base64.b64encode(b"-----BEGIN RSA PRIVATE KEY-----\nAAAA\n-----END RSA PRIVATE KEY-----\n").decode()


def program(line: str) -> dict[str, Any]:
    return {"exec": {**EXEC, "command": "sh", "args": ["-c", line]}}


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        (config(**{"current-context": "prod"}), "its current-context 'prod' is not there, its contexts are x; choose"),
        (config(**{"current-context": ""}), "it says no current-context, .*: kubectl config use-context NAME"),
        (config(clusters=[]), "context 'x': its cluster 'c-x' is not there, it has no clusters; correct it"),
        (config(users=[{"name": "v"}]), "context 'x': its user 'u' is not there, its users are v; correct it"),
        (config(users={"u": {}}), "users is no list of entries with a name each"),
        (config(cluster={"server": "10.1.2.3:6443"}), "server is '10.1.2.3:6443'; write it as https://host:port"),
        (config(cluster={"server": SERVER, "certificate-authority": "ca.crt"}), "authority is the file /.*/ca.crt, wh"),
        (config(cluster={"server": SERVER, "certificate-authority-data": "abc"}), "authority-data is no base64"),
        (
            config(cluster={"server": SERVER, "certificate-authority-data": GARBAGE}),
            r"certificate-authority-data holds no certificate in PEM \(it has no line.*\); fetch the kubeconfig anew",
        ),
        (
            config(cluster={"server": SERVER, "certificate-authority-data": EMPTY_PEM}),
            "-data holds no certificate in PEM",
        ),
        (config({"client-certificate-data": KEY_PEM}), "certificate-data holds no certificate in PEM .it has no line"),
        (config({"client-certificate": "/no/c.crt", "client-key": "/no/c.key"}), "the file /no/c.crt, which is not"),
        (config({"tokenFile": "/no/token"}), "tokenFile is the file /no/token, which is not there; bring it there"),
        (config({"exec": EXEC}), r"'no-such-program', and that is not in PATH; install it \(ask Ann\), or take"),
        (config({"exec": {**EXEC, "command": "./here"}}), "'./here', and that is not there; install it"),
    ],
)
def test_what_does_not_hold_is_told_with_file_and_context(tmp_path: Path, tree: dict[str, Any], words: str) -> None:
    file = tmp_path / "config"
    file.write_text(json.dumps(tree))
    with pytest.raises(LaunchRefused, match=words) as caught:
        Api.load(str(file))
    assert f"kubeconfig {file}" in str(caught.value)


@pytest.fixture(scope="module")
def authority() -> bytes:
    """A certificate of an authority of one's own."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ours")])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    return made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(
    "form",
    [
        lambda pem: b"# T\xc3\xbcrkTrust\n" + pem + b"\n# caf\xe9\n" + pem,
        lambda pem: b"\xef\xbb\xbf" + pem.replace(b"\n", b"\r\n"),
        lambda pem: pem.replace(b"-----\n", b"-----  \n").rstrip(),
    ],
    ids=["words between", "CRLF", "blanks"],
)
def test_certificates_in_each_form_that_tls_takes(
    tmp_path: Path, authority: bytes, form: Callable[[bytes], bytes]
) -> None:
    bundle = tmp_path / "ca.crt"
    bundle.write_bytes(form(authority))
    (tmp_path / "config").write_text(
        json.dumps(config(cluster={"server": SERVER, "certificate-authority": str(bundle)}))
    )
    assert Api.load(str(tmp_path / "config")).host == SERVER
    bundle.write_bytes(form(authority).replace(b"END", b"DNE"))
    with pytest.raises(LaunchRefused, match=r"ca\.crt holds no certificate in PEM"):
        Api.load(str(tmp_path / "config"))


@pytest.mark.parametrize(
    ("line", "words"), [("echo you must log in >&2; exit 3", "returned 3. you must log in; "), ("echo hi", "decode")]
)
def test_a_program_that_gives_no_credentials(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "config").write_text(json.dumps(config(program(line))))
    with pytest.raises(Unauthenticated, match=f"the program 'sh' gave no credentials: .*{words}"):
        Api.load(str(tmp_path / "config"))


def test_a_program_that_gives_a_token(tmp_path: Path) -> None:
    said = json.dumps({"apiVersion": EXEC["apiVersion"], "kind": "ExecCredential", "status": {"token": "t"}})
    (tmp_path / "config").write_text(json.dumps(config(program(f"echo '{said}'"))))
    assert Api.load(str(tmp_path / "config")).namespace == "of-x"


def test_of_several_files_the_first_has_the_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kubectl's rule; the client itself takes the last one's."""
    files = [tmp_path / name for name in ("none", "a", "b")]
    for file in files[1:]:
        file.write_text(json.dumps(config(name=file.name)))
    monkeypatch.delenv("HOTSTAGE_KUBECONFIG", raising=False)
    monkeypatch.setenv("KUBECONFIG", ":".join(map(str, files)))
    assert Api.load().namespace == "of-a"
    assert Api.load(context="b").namespace == "of-b"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('apiVersion: v1\nclusters: [{name: "hush"}]', "holds a kubeconfig itself; write that to a file"),
        ("/no/config", "there is no file /no/config; set HOTSTAGE_KUBECONFIG or KUBECONFIG"),
    ],
)
def test_a_variable_that_names_no_file(monkeypatch: pytest.MonkeyPatch, text: str, words: str) -> None:
    monkeypatch.setenv("HOTSTAGE_KUBECONFIG", text)
    with pytest.raises(LaunchRefused, match=words) as caught:
        Api.load()
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(("data", "words"), [(b"", "is empty"), (b"[]", "is no kubeconfig"), (b"\xff\xfe", "no text")])
def test_a_file_that_is_no_kubeconfig(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "config").write_bytes(data)
    with pytest.raises(LaunchRefused, match=words):
        Api.load(str(tmp_path / "config"))
