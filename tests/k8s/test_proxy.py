"""Proxies between this machine and an API server: which way is taken, by kubectl's rules, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from k8s.api import Api
from k8s.errors import ApiUnavailable, NotAllowed
from k8s.proxy import passes_by, proxy_for
from tests.k8s.api_server import ApiServer
from tests.k8s.recording_proxy import RecordingProxy
from tests.support.place import Place
from trainer.errors import LaunchRefused

NAMES = [f"{which}_PROXY" for which in ("HTTP", "HTTPS", "ALL", "NO")]


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def test_a_kubeconfig_that_is_no_yaml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config").write_text("apiVersion: v1\n  bad: [\n")
    with pytest.raises(LaunchRefused, match=r"config is no YAML: .* line 2"):
        Api.load(str(tmp_path / "config"))


@pytest.mark.parametrize(
    ("server", "no_proxy", "past"),
    [
        ("https://10.1.2.3:6443", "10.0.0.0/8", True),
        ("https://10.1.2.3:6443", " 192.168.0.0/16 , 10.1.2.3 ", True),
        ("https://10.1.2.3:6443", "192.168.0.0/16 10.1.2.3", True),
        ("https://10.1.2.3:6443", "10.1.2.3:6443", True),
        ("https://10.1.2.3:6443", "10.1.2.3:443", False),
        ("https://10.1.2.3", "10.1.2.3:443", True),
        ("https://10.1.2.3:6443", "10.1.2.33, 0.1.2.3, .2.3", False),
        ("https://10.1.2.3:6443", "10.1.2.0/24/8, 10.1.0.0/99, /", False),
        ("https://10.1.2.3:6443", "10.9.9.9/8", True),
        ("https://10.1.2.3:6443", "", False),
        ("https://10.1.2.3:6443", "a.example,*", True),
        ("https://kubernetes.default.svc", ".svc", True),
        ("https://kubernetes.default.svc", "svc", True),
        ("https://kubernetes.default.svc", "*.svc", True),
        ("https://kubernetes.default.SVC.", ".svc", True),
        ("https://kubernetes.default.svc", ".SVC.", True),
        ("https://kubernetes.default.svc.cluster.local", ".svc", False),
        ("https://kubernetes.default.svc.cluster.local", ".svc,.cluster.local", True),
        ("https://kubernetes.default.svc:6443", ".svc:6443", True),
        ("https://kubernetes.default.svc:6443", ".svc:443", False),
        ("https://notexample.com", "example.com", False),
        ("https://api.example.com", "example.com", True),
        ("https://example.com", ".example.com", True),
        ("https://k8s.example", ".,,:,*.", False),
        ("https://[fd00::12]:6443", "fd00::/8", True),
        ("https://[fd00::12]:6443", "FD00:0::12", True),
        ("https://[fd00::12]:6443", "[fd00::12]", True),
        ("https://[fd00::12]:6443", "[fd00::12]:6443", True),
        ("https://[fd00::12]:6443", "[fd00::12]:443", False),
        ("https://[fd00::12]:6443", "10.0.0.0/8", False),
        ("https://[::ffff:10.1.2.3]:6443", "10.0.0.0/8", True),
        # a proxy would look for these on itself
        ("https://127.0.0.1:6443", "", True),
        ("https://127.8.8.8:6443", "elsewhere", True),
        ("https://[::1]:6443", "", True),
        ("https://LOCALHOST:6443", "", True),
        ("https://localhost.example", "", False),
    ],
)
def test_what_no_proxy_names_is_reached_directly(server: str, no_proxy: str, past: bool) -> None:
    assert passes_by(server, no_proxy) is past
    proxy = proxy_for(server, {"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": no_proxy})
    assert (proxy is None) is past


@pytest.mark.parametrize(
    ("server", "environment", "url"),
    [
        ("https://k8s.example", {"HTTPS_PROXY": "http://p:1"}, "http://p:1"),
        ("https://k8s.example", {"https_proxy": "http://p:1"}, "http://p:1"),
        ("https://k8s.example", {"https_proxy": "http://p:1", "HTTPS_PROXY": "http://q:2"}, "http://p:1"),
        ("https://k8s.example", {"https_proxy": "", "HTTPS_PROXY": "http://q:2"}, ""),
        ("https://k8s.example", {"HTTPS_PROXY": ""}, ""),
        ("https://k8s.example", {"HTTP_PROXY": "http://p:1"}, ""),
        ("http://k8s.example", {"HTTP_PROXY": "http://p:1"}, "http://p:1"),
        ("http://k8s.example", {"HTTPS_PROXY": "http://p:1"}, ""),
        ("https://k8s.example", {"ALL_PROXY": "socks5://p:1"}, "socks5://p:1"),
        ("https://k8s.example", {"all_proxy": "p:1", "HTTPS_PROXY": "q:2"}, "http://q:2"),
        ("https://k8s.example", {"HTTPS_PROXY": " p:1 "}, "http://p:1"),
        ("https://k8s.example", {"ALL_PROXY": "p:1", "no_proxy": "example"}, ""),
        ("https://k8s.example", {"ALL_PROXY": "p:1", "no_proxy": "", "NO_PROXY": "*"}, "http://p:1"),
        ("https://k8s.example", {}, ""),
    ],
)
def test_which_variable_holds(server: str, environment: dict[str, str], url: str) -> None:
    proxy = proxy_for(server, environment)
    assert (proxy.url if proxy else "") == url


def test_a_kubeconfigs_own_proxy_holds_whatever_the_environment_says() -> None:
    proxy = proxy_for("https://127.0.0.1:6443", {"HTTPS_PROXY": "q:2", "NO_PROXY": "*"}, "http://p:1")
    assert proxy is not None
    assert (proxy.url, proxy.said_by) == ("http://p:1", "the kubeconfig's proxy-url")


@pytest.mark.parametrize(
    "url", ["ftp://p:1", "http://", "http://p:port", "http://p:0", "http://p:99999", "://", "http://[1"]
)
def test_what_is_no_proxy_is_refused_by_the_name_of_its_variable(url: str) -> None:
    with pytest.raises(LaunchRefused, match=r"HTTPS_PROXY = .* is no proxy; write it as http://host:port"):
        proxy_for("https://k8s.example", {"HTTPS_PROXY": url})
    with pytest.raises(LaunchRefused) as caught:
        proxy_for("https://k8s.example", {"HTTPS_PROXY": f"me:hush@{url}"}, "")
    assert "hush" not in str(caught.value)


# --- real requests --------------------------------------------------------------------------------------------


def kubeconfig(folder: Path, server: str, **cluster: str) -> str:
    value = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": server, **cluster}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    file = folder / "kubeconfig"
    file.write_text(json.dumps(value))
    return str(file)


@pytest.fixture
def there() -> Iterator[ApiServer]:
    with ApiServer() as made:
        made.documents["/version"] = {"gitVersion": "v1.35.4"}
        yield made


@pytest.fixture
def proxy(there: ApiServer) -> Iterator[RecordingProxy]:
    with RecordingProxy(there.url) as made:
        yield made


def version(config: str) -> str:
    return str(Api.load(config).get("/version")["gitVersion"])


NEAR = [
    {"HTTP_PROXY": "{}", "NO_PROXY": "127.0.0.1"},
    {"http_proxy": "http://{}", "no_proxy": " 10.0.0.0/8, 127.0.0.0/8 "},
    {"ALL_PROXY": "{}", "NO_PROXY": "*"},
    {"all_proxy": "http://{}"},
]


@pytest.mark.parametrize("environment", NEAR, ids=str)
def test_a_server_beside_us_is_reached_directly(
    there: ApiServer,
    proxy: RecordingProxy,
    tmp_path: Path,
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(proxy.address))
    assert version(kubeconfig(tmp_path, there.url)) == "v1.35.4"
    assert proxy.seen == []


def test_the_doctor_goes_to_the_server_and_not_to_the_proxy(
    place: Place, server: ApiServer, proxy: RecordingProxy
) -> None:
    place.env |= {"HTTP_PROXY": f"http://{proxy.address}", "NO_PROXY": "127.0.0.1"}
    server.documents["/version"] = {"gitVersion": "v1.35.4"}
    done = place.call("k8s", "doctor")
    assert "Kubernetes v1.35.4" in done.out, done.err
    assert proxy.seen == []


def test_a_server_elsewhere_is_reached_through_the_proxy(
    proxy: RecordingProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy.address)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,.svc")
    assert version(kubeconfig(tmp_path, "http://k8s.example:6443")) == "v1.35.4"
    assert proxy.seen == [("GET", "http://k8s.example:6443/version")]


def test_the_kubeconfigs_proxy_holds_for_its_server(
    there: ApiServer, proxy: RecordingProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HTTP_PROXY", "127.0.0.1:9")
    config = kubeconfig(tmp_path, there.url, **{"proxy-url": f"http://{proxy.address}"})
    assert version(config) == "v1.35.4"
    assert proxy.seen == [("GET", f"{there.url}/version")]


def test_a_proxys_name_and_password(there: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = kubeconfig(tmp_path, "http://k8s.example")
    with RecordingProxy(there.url, login="me:h@sh") as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://me:h%40sh@{proxy.address}")
        assert version(config) == "v1.35.4"
        monkeypatch.setenv("HTTP_PROXY", f"http://{proxy.address}")
        with pytest.raises(NotAllowed, match="the proxy wants a name and a password"):
            version(config)


def test_a_proxy_that_does_not_help_is_named_without_its_password(
    proxy: RecordingProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for address in ("127.0.0.1:9", proxy.address):
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:hush@{address}")
        with pytest.raises(ApiUnavailable) as caught:
            version(kubeconfig(tmp_path, "https://k8s.example"))
        assert f"does not answer through the proxy http://{address} (HTTPS_PROXY)" in str(caught.value)
        assert "hush" not in str(caught.value)
    assert proxy.seen == [("CONNECT", "k8s.example:443")]
