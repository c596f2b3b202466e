"""Prefect's settings as people write them: what is no address, no login or no proxy is told with its mend."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.settings import (
    PREFECT_API_KEY,
    PREFECT_API_SSL_CERT_FILE,
    PREFECT_API_TLS_INSECURE_SKIP_VERIFY,
    PREFECT_API_URL,
    PREFECT_CLIENT_CUSTOM_HEADERS,
    temporary_settings,
)

from flows.cli.main import exit_code_of
from flows.hosting import Prefect
from flows.prefect_api import (
    Client,
    Configured,
    Gone,
    NoPrefect,
    PrefectSettingsError,
    Refused,
    answers,
    configured,
    why_not,
)
from flows.prefect_server import PrefectServer
from flows.serve import Server
from tests.support.certificates import served
from tests.support.wait import wait_for
from trainer.presets import PRESETS


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:4200/api",
        '"http://prefect.example/api"',
        "http://a b/api",
        "http://a:port/api",
        "http:///api",
        "ftp://a",
    ],
)
def test_an_api_that_is_no_address(url: str) -> None:
    with (
        temporary_settings(updates={PREFECT_API_URL: url}),
        pytest.raises(PrefectSettingsError, match="which is no address; write it as http://host:4200/api"),
    ):
        configured()


@pytest.mark.parametrize(
    "command",
    [
        ["schedule", "SPEC", "--interval", "60"],
        ["data", "prepare", "SPEC", "--dask", "2"],
        ["reconcile", "--interval", "60"],
        ["ckpt", "gc", "--cron", "@daily"],
    ],
    ids=lambda words: words[0],
)
def test_what_needs_a_server_says_so_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    spec = tmp_path / "spec.toml"
    spec.write_text(PRESETS["gpt2-demo"])
    monkeypatch.setattr("flows.prefect_api.configured", lambda: None)
    words = [str(spec) if word == "SPEC" else word for word in command]
    assert exit_code_of([*words, "--store", str(tmp_path / "store")]) == 78
    assert "needs a Prefect server, but Prefect's settings name none" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_an_address_without_a_scheme_keeps_its_password_to_itself() -> None:
    with (
        temporary_settings(updates={PREFECT_API_URL: "http://ann:hush@a:port/api"}),
        pytest.raises(PrefectSettingsError) as caught,
    ):
        configured()
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("login", "told"),
    [("admin:pass", False), ("admin:pass\n", True), ('"admin:pass"', True), ("YWRtaW46cGFzcw==", True), ("", False)],
)
def test_a_login_of_another_form_is_told_without_its_value(
    monkeypatch: pytest.MonkeyPatch, login: str, told: bool
) -> None:
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", login)

    def refuse() -> None:
        request = httpx.Request("GET", "http://a")
        raise httpx.HTTPStatusError("", request=request, response=httpx.Response(401, request=request))

    with Client.open("http://127.0.0.1:1/api") as client, pytest.raises(Refused, match="is not accepted") as caught:
        client.call(refuse)
    assert ("is user:password as the server has it" in str(caught.value)) is told
    assert not login or login not in str(caught.value)


@pytest.mark.parametrize(
    "held",
    [{PREFECT_API_KEY: "hush\n"}, {PREFECT_API_KEY: "hüsh"}, {PREFECT_CLIENT_CUSTOM_HEADERS: {"X-Tok": "hush\n"}}],
)
def test_what_no_header_can_hold_is_told_and_not_shown(held: dict[Any, Any]) -> None:
    """A key as a Secret has it that was made with `echo`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Healthy) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        with (
            temporary_settings(updates={PREFECT_API_URL: f"http://127.0.0.1:{server.server_port}/api", **held}),
            pytest.raises(
                Refused, match="no header can, such as a line's end: take it out of PREFECT_API_KEY"
            ) as caught,
            Client.open(None) as client,
        ):
            client.check()
        server.shutdown()
    told = "".join(traceback.format_exception(caught.value))
    assert "hush" not in told
    assert "hüsh" not in told


def test_a_server_that_is_busy_is_asked_again_by_who_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its database is locked while it begins."""
    monkeypatch.setattr("flows.prefect_api.BUSY_PAUSE_S", 0.01)
    asked: list[str] = []

    class Begins(_Healthy):
        def do_GET(self) -> None:
            self.send_error(404)  # of what Prefect's client asks beside: a token against forgeries

        def do_POST(self) -> None:
            asked.append(self.path)
            self.send_response(503 if len(asked) < 3 else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Begins) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/api"
        with temporary_settings(updates={PREFECT_API_URL: url}):
            assert why_not(Configured(url, "PREFECT_API_URL")) == ""
        server.shutdown()
    assert len(asked) == 3


def test_a_proxy_that_is_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "foo:bar")
    with pytest.raises(Refused, match=r"a proxy is no address .*: write HTTP_PROXY"):
        Client.connect("http://prefect.example/api")


class _Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Nothing to the terminal."""


def test_a_server_with_a_certificate_of_ones_own(tmp_path: Path) -> None:
    """What Prefect's settings say of authorities holds for each look at it, and what is wrong there is told."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Healthy) as server:
        server.socket = served(tmp_path).wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        url = f"https://127.0.0.1:{server.server_port}/api"
        assert not answers(url)
        told = "your own authority needs its file in PREFECT_API_SSL_CERT_FILE"
        with Client.open(url) as client, pytest.raises(Gone, match=told):
            client.check()
        for known in (
            {PREFECT_API_SSL_CERT_FILE: str(tmp_path / "ca.pem")},
            {PREFECT_API_TLS_INSECURE_SKIP_VERIFY: True},
        ):
            with temporary_settings(updates=known):
                assert answers(url)
        server.shutdown()


@pytest.mark.parametrize(("theirs", "told"), [("3.1.15", True), ("999.0.0", False), ("?", False)])
def test_a_server_that_does_not_know_what_is_asked_because_it_is_older(theirs: str, told: bool) -> None:
    class Older(_Healthy):
        def answer(self) -> None:
            body = json.dumps(theirs if self.path.endswith("/admin/version") else {"type": "extra_forbidden"}).encode()
            self.send_response(200 if self.path.endswith("/admin/version") else 422)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = answer

    with ThreadingHTTPServer(("127.0.0.1", 0), Older) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        with (
            Client.open(f"http://127.0.0.1:{server.server_port}/api") as client,
            pytest.raises(Refused, match=r"^422: .*extra_forbidden") as caught,
        ):
            client.check()
        server.shutdown()
    assert (f"the server is Prefect {theirs} and this is 3." in str(caught.value)) is told


def test_a_file_of_authorities_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no certificate\n")
    for name in ("text", "missing"):
        with (
            temporary_settings(updates={PREFECT_API_SSL_CERT_FILE: str(tmp_path / name)}),
            pytest.raises(Refused, match=f"PREFECT_API_SSL_CERT_FILE is '.*/{name}', which cannot be used"),
        ):
            Client.connect("https://prefect.example/api")


def test_a_file_of_authorities_that_every_program_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As conda and nix set it. Prefect takes it where it has no setting of its own, which was blamed."""
    monkeypatch.delenv("PREFECT_API_SSL_CERT_FILE", raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "missing"))
    with (
        temporary_settings(updates={PREFECT_API_SSL_CERT_FILE: str(tmp_path / "missing")}),
        pytest.raises(Refused, match=r"^SSL_CERT_FILE is '.*/missing', which cannot be used"),
    ):
        Client.connect("https://prefect.example/api")
    server = PrefectServer(tmp_path)
    server.start()
    try:
        assert not server.wait()
        said = server.why_not_up()
        assert said.startswith(f"; SSL_CERT_FILE is '{tmp_path}/missing', and there is no such file: name one"), said
    finally:
        server.stop()


def test_a_user_without_a_home_is_told_to_set_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Prefect is imported, which prints a line of its own about its plugins."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    with pytest.raises(PrefectSettingsError, match=r"Prefect keeps its settings in .* has none: set HOME"):
        configured()


@pytest.mark.parametrize(("said", "after_s"), [("7", 7.0), ("Mon, 30 Nov 2026 07:28:00 GMT", 0.0), ("1e9", 120.0)])
def test_a_server_that_asks_to_be_asked_less_often_is(said: str, after_s: float) -> None:
    """Prefect Cloud's limit of requests: a schedule went on asking each second."""
    asked = httpx.Request("GET", "https://prefect.example/api/health")
    answer = httpx.Response(429, headers={"Retry-After": said}, request=asked)
    waits: list[float] = []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            self.set()
            return True

    server = Server(lambda: pytest.fail("nothing is registered"), print, stop=Stop())
    with Client.open("https://prefect.example/api") as client:

        def told() -> None:
            client.call(answer.raise_for_status)

        server._round = told  # type: ignore[method-assign]
        server.run()
        with pytest.raises(Gone, match=r"answers 429 \(too many requests\)"):
            told()
    assert waits == [max(after_s, server.every_s)]


def test_a_server_without_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert PrefectServer(tmp_path / "not" / "yet").why_not_up() == ""
    monkeypatch.setenv("PREFECT_HOME", "/proc/none")
    monkeypatch.setattr("os.access", lambda path, _: Path("/proc") not in (path, *Path(path).parents))
    assert PrefectServer(None).why_not_up().endswith("which cannot be written: name another folder with PREFECT_HOME")


def test_a_server_of_ones_own_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    """The first run of a sweep that ended took the server, and with it the pages of all the others."""
    server = PrefectServer(tmp_path / "prefect")
    first = threading.Thread(target=server.start)
    first.start()
    first.join()
    try:
        assert server.wait(90), server.why_not_up()
    finally:
        server.stop()


def test_pages_that_ask_at_once_wait_for_the_one_that_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two runs of a sweep one lost its page, with an AssertionError."""
    asked, looks, found = list[str](), threading.Event(), list[BaseException]()

    class Looking:
        lock = threading.Lock()

        def __enter__(self) -> None:
            asked.append(threading.current_thread().name)
            self.lock.acquire()

        def __exit__(self, *_: object) -> None:
            self.lock.release()

    def look() -> None:
        looks.wait(60)
        raise PrefectSettingsError("a profile that is broken")

    def ask() -> None:
        try:
            prefect.connect()
        except (NoPrefect, AssertionError) as error:
            found.append(error)

    monkeypatch.setattr("flows.hosting.configured", look)
    prefect = Prefect()
    prefect._looking = Looking()  # type: ignore[assignment]
    pages = [threading.Thread(target=ask) for _ in range(2)]
    for page in pages:
        page.start()
    wait_for(lambda: len(asked) == 2 or found, "both to ask", 60)
    looks.set()
    for page in pages:
        page.join()
    assert [type(error) for error in found] == [NoPrefect, NoPrefect]


@pytest.mark.parametrize(
    ("last", "told"),
    [
        (
            "alembic.util.exc.CommandError: Can't locate revision identified by 'fff'",
            "made by a newer Prefect than this",
        ),
        ("sqlite3.OperationalError: no disk", "; its last word: sqlite3.OperationalError: no disk"),
        ("asyncpg.InvalidError: postgresql://ann:secret@db/x", "InvalidError: postgresql://db/x"),
        ("Server stopped!", ""),
    ],
)
def test_why_a_server_of_ones_own_did_not_come_up(last: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it said went to nobody, where Prefect's usual folder is its home."""
    script = f"print('Traceback (most recent call last):'); print({last!r}); print('Application startup failed.')"
    popen = subprocess.Popen
    monkeypatch.setattr("subprocess.Popen", lambda _args, **more: popen([sys.executable, "-S", "-c", script], **more))
    server = PrefectServer(None)
    server.start()
    assert server.process is not None
    server.process.wait(60)
    said = server.why_not_up()
    assert told in said
    assert bool(said) is bool(told)
    assert "secret" not in said
