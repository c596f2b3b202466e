"""A proxy of the environment is not asked for what is on this machine, by any client that the command uses."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import httpx
import pytest
from botocore.utils import get_environ_proxies

from flows.drive.train import store_url
from flows.proxies import pass_loopback_by, reach_directly
from k8s.proxy import passes_by, proxy_for
from tests.flows.conftest import Api
from tests.k8s.recording_proxy import RecordingProxy
from tests.support.place import Place, finish

URLS = ["http://127.0.0.1:9000", "http://localhost:9000", "http://[::1]:9000"]
LISTS = ["", "x.example", " 10.0.0.0/8 , .svc", "*", "a,*", "localhost"]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http", "https", "all", "no"):
        for spelled in (f"{name}_proxy", f"{name}_PROXY".upper()):
            monkeypatch.setenv(spelled, "")  # put back afterwards
            monkeypatch.delenv(spelled)


@pytest.mark.parametrize("spelling", ["NO_PROXY", "no_proxy"])
@pytest.mark.parametrize("listed", LISTS)
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_every_client_reaches_this_machine_directly(
    monkeypatch: pytest.MonkeyPatch, variable: str, listed: str, spelling: str
) -> None:
    monkeypatch.setenv(variable, "http://proxy.example:3128")
    monkeypatch.setenv(spelling, listed)
    pass_loopback_by(os.environ)
    with httpx.Client() as client:  # what Prefect's client is made of
        for url in URLS:
            assert client._transport_for_url(httpx.URL(url)) is client._transport, url
    for url in URLS[:2]:  # those of a store are names or addresses of version 4
        assert get_environ_proxies(url) == {}
    for url in URLS:
        assert proxy_for(url, os.environ) is None
    assert urllib.request.proxy_bypass("127.0.0.1:4200")


FORMS = [
    "[::1]",
    "::1/128",
    "fe80::/10",
    "[fd00::1]:80",
    "fe80::/999",
    "\u00fc.example",
    "10.0.0.0/8",
    "a:80",
    ".x:8080",
]


@pytest.mark.parametrize("listed", FORMS)
def test_a_list_that_a_client_trips_over_is_read_by_all(monkeypatch: pytest.MonkeyPatch, listed: str) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", listed)
    pass_loopback_by(os.environ)
    pass_loopback_by(os.environ)  # as a command that a command starts
    with httpx.Client() as client:
        assert client._transport_for_url(httpx.URL(URLS[2])) is client._transport
    for server in ("http://[fe80::7]:6443", "http://[fd00::1]:80", "http://10.1.2.3", "http://a:80", "http://b.x:8080"):
        assert passes_by(server, os.environ["NO_PROXY"]) == passes_by(server, listed), server


def test_servers_within_a_range_are_reached_directly_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "10.0.0.0/8,.svc:9000")
    monkeypatch.setenv("PREFECT_API_URL", "http://10.1.2.3:4200/api")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio.svc:9000")
    monkeypatch.setenv("HOTSTAGE_STORE", "s3://b/p?endpoint=http://10.7.7.7:9000")
    pass_loopback_by(os.environ)
    for url in ("http://10.1.2.3:4200", "http://minio.svc:9000", "http://10.7.7.7:9000"):
        assert get_environ_proxies(url) == {}
    with httpx.Client() as client:
        assert client._transport_for_url(httpx.URL("http://10.1.2.3:4200/api")) is client._transport
        assert client._transport_for_url(httpx.URL("http://10.1.2.4")) is not client._transport


@pytest.mark.parametrize(
    ("url", "reached"),
    [
        ("http://10.1.2.3:4200/api", ["http://10.1.2.3:4200"]),  # of a profile of Prefect's
        ("http://192.0.2.1/api", []),
        ("", []),
    ],
)
def test_servers_that_are_found_later_too(monkeypatch: pytest.MonkeyPatch, url: str, reached: list[str]) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "10.0.0.0/8")
    pass_loopback_by(os.environ)
    before = os.environ["NO_PROXY"]
    reach_directly(lambda: url, os.environ)
    reach_directly(lambda: url, os.environ)
    assert len(os.environ["NO_PROXY"].split(",")) == len(before.split(",")) + len(reached)
    for server in reached:
        assert get_environ_proxies(server) == {}


def test_a_profile_s_server_and_a_store_s_are_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "10.0.0.0/8")
    (tmp_path / "profiles.toml").write_text(
        'active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "http://10.1.2.3:4200/api"\n'
    )
    code = (
        "import os; from flows.prefect_api import configured; from flows.drive.train import store_url; configured(); "
        "store_url('s3://bkt/p?endpoint=http://10.7.7.7:9000'); print(os.environ['NO_PROXY'])"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT")}
    env |= {"PREFECT_PROFILES_PATH": str(tmp_path / "profiles.toml")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "10.0.0.0/8,10.1.2.3,10.7.7.7"


def test_what_is_elsewhere_still_goes_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "minio.svc")
    pass_loopback_by(os.environ)
    assert get_environ_proxies("http://s3.example")["http"] == "http://proxy.example:3128"
    assert get_environ_proxies("http://minio.svc") == {}
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "minio.svc,localhost,127.0.0.1,::1"


@pytest.mark.parametrize(
    ("named", "through"),
    [
        ({"ALL_PROXY": "http://all.example:3128"}, "http://all.example:3128"),
        ({"all_proxy": "all.example:3128"}, "all.example:3128"),
        ({"ALL_PROXY": "http://all.example:3128", "https_proxy": "http://own.example:1"}, "http://own.example:1"),
        ({"ALL_PROXY": "http://all.example:3128", "HTTPS_PROXY": ""}, None),
        ({"ALL_PROXY": "socks5://all.example:1080"}, None),
    ],
    ids=str,
)
def test_a_proxy_for_everything_is_a_store_s_too(
    monkeypatch: pytest.MonkeyPatch, named: dict[str, str], through: str | None
) -> None:
    for name, value in named.items():
        monkeypatch.setenv(name, value)
    pass_loopback_by(os.environ)
    assert get_environ_proxies("https://s3.example").get("https") == through
    assert get_environ_proxies("https://127.0.0.1") == {}


def test_the_endpoint_of_a_profile_is_reached_directly_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    (tmp_path / "config").write_text(
        "[profile mine]\nservices = x\nendpoint_url = http://10.1.1.1\n"
        "[services x]\ns3 =\n  endpoint_url = http://10.8.8.8:9000\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "10.0.0.0/8")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    store_url("s3://b/p")  # opening the store says what is wrong
    assert os.environ["NO_PROXY"] == "10.0.0.0/8"
    monkeypatch.setenv("AWS_PROFILE", "mine")
    store_url("s3://b/p")
    store_url("s3://b/p?endpoint=http://10.7.7.7:9000")
    store_url("/data/runs?endpoint=http://10.9.9.9")
    assert os.environ["NO_PROXY"] == "10.0.0.0/8,10.8.8.8,10.7.7.7"


def test_without_a_proxy_nothing_is_touched() -> None:
    environment = {"NO_PROXY": "a"}
    pass_loopback_by(environment)
    assert environment == {"NO_PROXY": "a"}


def test_a_run_is_hosted_by_prefect_on_this_machine_whatever_proxy_is_named(hosted: Place, prefect: Api) -> None:
    with RecordingProxy(f"http://127.0.0.1:{prefect.server.port}") as proxy:
        hosted.env["HTTP_PROXY"] = f"http://{proxy.address}"
        done = finish(hosted.start("train", "spec.toml", "--json", "--set", "train.steps=4"))
        assert done.code == 0, done.err
        assert proxy.seen == []
    (flow_run,) = prefect.named(done.json()["run"])
    assert flow_run["state_type"] == "COMPLETED"
