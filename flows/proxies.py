"""This machine is never behind a proxy: what the command and its children take from the environment says so.

Servers on loopback (Prefect's own, a store of this machine) are talked to by clients of several libraries; all of them
read ``NO_PROXY``, and not one leaves loopback out by itself. ``k8s.proxy`` has the rules for API servers: kubectl's.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from urllib.parse import parse_qs, urlsplit

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


_ADDRESSES = ("PREFECT_API_URL", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
"""Servers that the clients here are told by the environment."""


def pass_loopback_by(environment: MutableMapping[str, str]) -> None:
    """Add loopback to the list of what is reached directly, in both of its spellings, where a proxy is named at all;
    and servers that the list names in a way that kubectl knows and other clients do not: by a range of addresses.

    The lower spelling holds for these clients where both are there, even an empty one; afterwards they are the same.
    ``ALL_PROXY``, which a store's client does not read, is named for http and https too, where those have none and it
    speaks HTTP (of SOCKS that client knows nothing, and says so where nobody answers).
    """
    if not _named(environment):
        return
    _name_for_each(environment)
    said = _said(environment)
    entries = [found for entry in re.split(r"[,\s]+", said) if entry and (found := _read_by_all(entry))]
    if "*" in entries:
        entries = ["*"]  # some know it only where it is alone
    else:
        entries += [name for name in (*LOOPBACK, *_within(said, environment)) if name not in entries]
    environment["no_proxy"] = environment["NO_PROXY"] = ",".join(entries)


def reach_directly(server: Callable[[], str | None], environment: MutableMapping[str, str]) -> None:
    """Add the host of a server that was found later (in a profile, an option, a spec), where the list names it by a
    range. ``server``: gives its URL, if there is one. To be called before a client is made.
    """
    said = _said(environment)
    if not _named(environment) or "*" in said.split(","):
        return
    for host in _hosts((server() or "",), said):
        if host not in said.split(","):
            environment["no_proxy"] = environment["NO_PROXY"] = f"{said},{host}"


def _name_for_each(environment: MutableMapping[str, str]) -> None:
    proxy = environment.get("all_proxy", environment.get("ALL_PROXY", "")).strip()
    if not proxy or ("://" in proxy and not re.match("https?://", proxy, re.IGNORECASE)):
        return
    for name in ("http_proxy", "https_proxy"):
        if name not in environment and name.upper() not in environment:
            environment[name] = environment[name.upper()] = proxy


def _named(environment: MutableMapping[str, str]) -> bool:
    """Whether any proxy is."""
    return any(environment.get(name) or environment.get(name.upper()) for name in _PROXIES)


def _said(environment: MutableMapping[str, str]) -> str:
    return environment.get("no_proxy", environment.get("NO_PROXY", ""))


def _endpoints(store: str) -> list[str]:
    return parse_qs(urlsplit(store).query).get("endpoint", []) if store.lower().startswith("s3:") else []


def _within(said: str, environment: MutableMapping[str, str]) -> Iterator[str]:
    """Hosts of servers that lie within what is said."""
    store = environment.get("HOTSTAGE_STORE", "")
    yield from _hosts([*(environment.get(name, "") for name in _ADDRESSES), *_endpoints(store)], said)


def _hosts(urls: Iterable[str], said: str) -> Iterator[str]:
    from k8s.proxy import passes_by

    for url in urls:
        with contextlib.suppress(ValueError):  # whoever uses it says that it is none
            if (host := urlsplit(url).hostname) and passes_by(url, said):
                yield host


def _read_by_all(entry: str) -> str:
    """The entry in a form that no client trips over; empty where there is none. httpx, which is Prefect's, reads a
    colon as the beginning of a port and a name as one of DNS; a pattern of its own (``all://``) it takes as it is.
    """
    bare = re.fullmatch(r"\[([0-9A-Fa-f:.]+)\]", entry)
    if bare is not None:
        return bare[1]
    if re.fullmatch(r"\[[0-9A-Fa-f:.]+\]:\d{1,5}", entry):
        return f"all://{entry}"
    if ":" in entry and "/" in entry and "://" not in entry:
        try:
            net = ipaddress.ip_network(entry, strict=False)
        except ValueError:
            return ""
        return str(net[0]) if net.num_addresses == 1 else f"all://[{net.network_address}]/{net.prefixlen}"
    try:
        return entry if entry.isascii() else entry.encode("idna").decode()
    except UnicodeError:
        return ""
