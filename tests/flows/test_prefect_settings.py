"""Prefect's settings as people write them: what is no address, no login or no proxy is told with its mend."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.prefect_api import Client, PrefectSettingsError, Refused, configured
from flows.prefect_server import PrefectServer


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


def test_a_proxy_that_is_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "foo:bar")
    with pytest.raises(Refused, match=r"a proxy is no address .*: write HTTP_PROXY"):
        Client.connect("http://prefect.example/api")


def test_a_server_without_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert PrefectServer(tmp_path / "not" / "yet").no_home() == ""
    monkeypatch.setenv("PREFECT_HOME", "/proc/none")
    monkeypatch.setattr("os.access", lambda path, _: Path("/proc") not in (path, *Path(path).parents))
    assert PrefectServer(None).no_home().endswith("which cannot be written: name another folder with PREFECT_HOME")
