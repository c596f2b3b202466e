"""Which proxy the way to an API server takes: the kubeconfig's ``proxy-url``, else the environment's. Pure.

The rules are kubectl's, so that what reaches the cluster there reaches it here:

- ``HTTPS_PROXY`` for https servers, ``HTTP_PROXY`` for http ones, else ``ALL_PROXY``; a name in lower case wins over
  the same in upper case, as for the store's and Prefect's clients.
- ``NO_PROXY`` lists, with commas or spaces between them, names (``example.com`` and what ends in ``.example.com``, also
  written ``.example.com`` and ``*.example.com``), addresses, ranges (``10.0.0.0/8``), each with or without a port, or
  ``*`` for everything.
- ``localhost`` and loopback addresses never go through a proxy of the environment: it would look for them on itself.
- A ``proxy-url`` of the kubeconfig holds for its cluster, whatever ``NO_PROXY`` says.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from trainer.errors import LaunchRefused

_PORTS = {"http": 80, "https": 443}
_SCHEMES = ("http", "https", "socks5", "socks5h")


@dataclass(frozen=True)
class Proxy:
    """``url`` with its password, if it has one; ``said_by`` is what a person would have to change."""

    url: str
    said_by: str

    def __str__(self) -> str:
        """For people: without the password."""
        at = urlsplit(self.url)
        return f"the proxy {at.scheme}://{at.netloc.rpartition('@')[2]} ({self.said_by})"


def proxy_for(server: str, environment: Mapping[str, str], given: str = "") -> Proxy | None:
    """The proxy for this API server's URL; ``given`` is the kubeconfig's. Raises LaunchRefused for one that is none.

    >>> proxy_for("https://10.1.2.3:6443", {"HTTPS_PROXY": "proxy:3128", "NO_PROXY": "10.0.0.0/8"})
    >>> proxy_for("https://k8s.example:6443", {"HTTPS_PROXY": "proxy:3128", "NO_PROXY": ".svc"}).url
    'http://proxy:3128'
    """
    if given:
        return _checked(given, "the kubeconfig's proxy-url")
    scheme = urlsplit(server).scheme.lower()
    for name in (f"{scheme}_proxy", "all_proxy"):
        value, said_by = _said(environment, name)
        if value:
            return None if passes_by(server, _said(environment, "no_proxy")[0]) else _checked(value, said_by)
    return None


def passes_by(server: str, no_proxy: str) -> bool:
    """Whether this server is reached without a proxy of the environment."""
    at = urlsplit(server)
    host, port = _host(at.hostname or ""), at.port or _PORTS.get(at.scheme.lower())
    address = _address(host)
    if host == "localhost" or (address is not None and address.is_loopback):
        return True
    return any(_fits(entry, host, address, port) for entry in re.split(r"[,\s]+", no_proxy) if entry)


_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _fits(entry: str, host: str, address: _Address | None, port: int | None) -> bool:
    if entry == "*":
        return True
    entry = entry.removeprefix("all://")  # as ``flows.proxies`` writes what other clients trip over
    if "/" in entry:
        try:
            return address is not None and address in ipaddress.ip_network(re.sub(r"[\[\]]", "", entry), strict=False)
        except ValueError:
            return False
    match = re.fullmatch(r"\[(?P<six>[^\]]+)\](?::(?P<a>\d+))?|(?P<name>[^:]+)(?::(?P<b>\d+))?|(?P<bare>.+)", entry)
    if match is None:
        return False
    wanted = match["a"] or match["b"]
    if wanted and int(wanted) != port:
        return False
    name = match["six"] or match["name"] or match["bare"]
    if address is not None:
        return _address(_host(name)) == address
    name = _host(name.removeprefix("*").removeprefix("."))
    return bool(name) and (host == name or host.endswith(f".{name}"))


def _host(name: str) -> str:
    return name.lower().rstrip(".")


def _address(name: str) -> _Address | None:
    try:
        found = ipaddress.ip_address(name)
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def _said(environment: Mapping[str, str], name: str) -> tuple[str, str]:
    """The value of a variable in either spelling, and the spelling; lower case wins, even where it is empty."""
    for spelling in (name, name.upper()):
        if spelling in environment:
            return environment[spelling].strip(), spelling
    return "", name


def _checked(url: str, said_by: str) -> Proxy:
    full = url if "://" in url else f"http://{url}"
    try:
        at = urlsplit(full)
        good = at.scheme.lower() in _SCHEMES and bool(at.hostname) and at.port != 0
    except ValueError:
        good = False
    if not good:
        shown = url.rpartition("@")[2]
        raise LaunchRefused(
            f"{said_by} = {shown!r} is no proxy; write it as http://host:port (or https, socks5), or unset it"
        )
    return Proxy(full, said_by)
