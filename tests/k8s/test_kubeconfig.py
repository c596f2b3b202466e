"""Kubeconfigs: what is wrong is told with the file, the context and the mend, before it is asked."""

from __future__ import annotations

import base64
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from k8s.api import Api
from k8s.errors import ApiUnavailable, Unauthenticated
from tests.k8s.api_server import ApiServer
from tests.k8s.test_watch import until
from tests.support.certificates import served
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


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as made:
        made.documents["/version"] = {"gitVersion": "v1.35.4"}
        yield made


def asked(server: ApiServer, folder: Path, **user: Any) -> Api:
    (folder / "config").write_text(json.dumps(config(user, {"server": server.url})))
    return Api.load(str(folder / "config"))


def test_a_server_s_scheme_in_capitals(server: ApiServer, tmp_path: Path) -> None:
    (tmp_path / "config").write_text(json.dumps(config({"token": "t"}, {"server": server.url.replace("http", "HTTP")})))
    assert Api.load(str(tmp_path / "config")).get("/version") == {"gitVersion": "v1.35.4"}


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
        (config(cluster={"server": f"{SERVER} "}), "server is 'https://127.0.0.1:1 '; write it as https://host:port"),
        (config({"token": None}), "context 'x': user.token without a value, take that out: "),
        (config(cluster={"server": SERVER, "proxy-url": None}), "cluster.proxy-url without a value, take that out"),
        (config({"token": "t", "as-user-extra": ["x"]}), "as-user-extra holds .*; write it as a table"),
        (
            config(contexts=[{"name": "x", "context": {"cluster": "c-x", "namespace": 1}}]),
            "its namespace 1 is no text; write names in quotes",
        ),
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
        (config({"client-key": ""}), "client-key is there and empty; take that line out, or fetch the kubeconfig anew"),
        (config({"exec": "aws eks get-token"}), "its exec is no table with a command; correct it, or"),
        (config({"auth-provider": {"name": "azure"}}), "none of gcp, oidc, .* take a kubeconfig with exec .*kubelogin"),
        (
            config({"auth-provider": {"name": "oidc", "config": {"id-token": "a.b"}}}),
            "'oidc' gave no credentials; log in",
        ),
        (
            config(contexts=[{"name": "x", "context": {"cluster": 1}}]),
            "its cluster 1 is no text; write names in quotes",
        ),
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
def authority(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A certificate of an authority of one's own."""
    folder = tmp_path_factory.mktemp("authority")
    served(folder)
    return (folder / "ca.pem").read_bytes()


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
        ("/no/config\n", "there is no file '/no/config.n', which begins or ends with a blank or a line's end; set"),
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


# --- who asks -----------------------------------------------------------------------------------------------


def test_a_token_that_is_renewed_in_its_file_is_read_again(server: ApiServer, tmp_path: Path) -> None:
    """A file's last line ends; kubectl reads it each minute, the client once."""
    (tmp_path / "token").write_text("first\n")
    api = asked(server, tmp_path, tokenFile="token")
    server.tokens = {"first"}
    assert api.get("/version")
    server.tokens = {"second"}
    (tmp_path / "token").write_text("second\n")
    assert api.get("/version")
    server.tokens = {"third"}
    with pytest.raises(Unauthenticated, match="unknown or have expired: log in again"):
        api.get("/version")  # not more often than each few seconds
    assert len(server.heads) == 4


def test_a_program_is_asked_again_where_its_token_is_not_known_any_more(server: ApiServer, tmp_path: Path) -> None:
    """Its answer says no end, or the cluster ended it before."""
    server.tokens = {"first"}
    (tmp_path / "token").write_text("first")
    said = json.dumps({"apiVersion": EXEC["apiVersion"], "kind": "ExecCredential", "status": {"token": "T"}})
    (tmp_path / "said").write_text(said)
    api = asked(server, tmp_path, **program('sed "s/\\"T\\"/\\"$(cat token)\\"/" said'))
    assert api.get("/version")
    (tmp_path / "token").write_text("second")
    server.tokens = {"second"}
    assert list(api.watch("/api/v1/namespaces/x/pods", {"resourceVersion": "100"}, 1, 5.0))


def test_another_server_never_gets_the_credentials_of_this_one(
    server: ApiServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.tokens = set()
    api = asked(server, tmp_path, token="t")
    (tmp_path / "config").write_text(json.dumps(config({"token": "u"}, {"server": SERVER})))
    with pytest.raises(Unauthenticated):
        api.get("/version")
    assert f"the kubeconfig now says {SERVER}" in caplog.text
    assert len(server.heads) == 1


def test_a_token_that_no_header_can_hold_is_told_and_not_shown(server: ApiServer, tmp_path: Path) -> None:
    api = asked(server, tmp_path, token="hush\u00fc")
    with pytest.raises(Unauthenticated, match="hold what no header can") as caught:
        api.get("/version")
    assert "hush" not in str(caught.value)
    assert asked(server, tmp_path, token="t\n").get("/version")
    assert server.heads[-1]["authorization"] == ["Bearer t"]


def test_a_user_who_acts_as_another_does(server: ApiServer, tmp_path: Path) -> None:
    user = {"as": "ann", "as-uid": "7", "as-groups": ["a", "b"], "as-user-extra": {"Why/not": ["x", "y"]}}
    asked(server, tmp_path, token="t", **user).get("/version")
    head = server.heads[-1]
    assert head["impersonate-user"] == ["ann"]
    assert head["impersonate-uid"] == ["7"]
    assert ", ".join(head["impersonate-group"]) == "a, b"
    assert ", ".join(head["impersonate-extra-why%2fnot"]) == "x, y"


def test_a_program_that_takes_its_time_is_told(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("k8s.kubeconfig.SILENT_S", 0.0)
    said = json.dumps({"apiVersion": EXEC["apiVersion"], "kind": "ExecCredential", "status": {"token": "t"}})
    os.mkfifo(tmp_path / "login")

    def log_in() -> None:
        until(lambda: "still waiting" in caplog.text, "the word")
        (tmp_path / "login").write_text("now")

    person = threading.Thread(target=log_in)
    person.start()
    asked(server, tmp_path, **program(f"cat login > /dev/null; echo '{said}'"))
    person.join()
    assert "still waiting for the program 'sh', which gives the credentials: does it wait for a login?" in caplog.text


def test_what_the_server_warns_of_is_told_once(
    server: ApiServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.warns = r"would violate PodSecurity \"restricted\""
    api = asked(server, tmp_path, token="t")
    api.get("/version")
    api.get("/version")
    assert caplog.text.count('the API server warns: would violate PodSecurity "restricted"') == 1


@pytest.mark.parametrize(
    ("certificate", "own", "says"),
    [
        ({}, False, "the kubeconfig's certificate-authority is not that of the server's certificate"),
        ({"address": "10.1.2.3"}, True, "is of another name: correct the kubeconfig's server, or .* tls-server-name"),
        ({"days": -1}, True, "does not hold today: have it renewed, or set this machine's clock"),
    ],
)
def test_a_certificate_that_does_not_fit_is_refused(
    tmp_path: Path, certificate: dict[str, Any], own: bool, says: str
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    served(other)
    with ApiServer(served(tmp_path, **certificate)) as server:
        cluster = {"server": server.url, "certificate-authority": str((tmp_path if own else other) / "ca.pem")}
        (tmp_path / "config").write_text(json.dumps(config({"token": "t"}, cluster)))
        with pytest.raises(LaunchRefused, match=says):
            Api.load(str(tmp_path / "config")).get("/version")


def test_a_server_without_tls_and_one_that_ends_each_connection(server: ApiServer, tmp_path: Path) -> None:
    (tmp_path / "config").write_text(json.dumps(config({}, {"server": server.url.replace("http", "https")})))
    with pytest.raises(LaunchRefused, match="speaks no TLS at that port; correct the kubeconfig's server"):
        Api.load(str(tmp_path / "config")).get("/version")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=lambda: listening.accept()[0].close(), daemon=True).start()
        there = f"https://127.0.0.1:{listening.getsockname()[1]}"
        (tmp_path / "config").write_text(json.dumps(config({}, {"server": there})))
        with pytest.raises(ApiUnavailable, match="does not answer"):
            Api.load(str(tmp_path / "config")).get("/version")
