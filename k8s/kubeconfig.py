"""Which cluster, and who asks: a context of a kubeconfig, or the pod's own account. What is wrong there is told with
the file, the context and the mend.

The Kubernetes client makes the configuration; it does not say which file and context it was at, and goes on without
credentials where the program that gives them fails. Of several files the first that says one has the context, as with
kubectl.
"""

from __future__ import annotations

import base64
import logging
import os
import re
import shutil
import ssl
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from k8s.errors import Unauthenticated
from trainer.errors import LaunchRefused
from trainer.spec_fields import shown

log = logging.getLogger(__name__)

_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
_SET = "set HOTSTAGE_KUBECONFIG or KUBECONFIG to a kubeconfig file"
_ANEW = "fetch the kubeconfig anew from whoever runs the cluster"
_PEM = {"certificate-authority": "CERTIFICATE", "client-certificate": "CERTIFICATE", "client-key": "PRIVATE KEY"}
_BLOCKS = re.MULTILINE | re.DOTALL
_FILES = {"cluster": ("certificate-authority",), "user": ("client-certificate", "client-key")}
_AS = {"as": "Impersonate-User", "as-uid": "Impersonate-Uid", "as-groups": "Impersonate-Group"}
_PROVIDERS = ("gcp", "oidc")
SILENT_S = 5.0
"""So long a program that gives credentials may take until a word is said: it may wait for a browser."""

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Access:
    """How a cluster is asked: the client's ``configuration``, headers beside it, the kubeconfig's proxy, the context's
    name and namespace."""

    configuration: Any
    headers: tuple[tuple[str, str], ...] = ()
    proxy_url: str = ""
    context: str | None = None
    namespace: str | None = None


def load_cluster(given: str | None, context: str | None) -> Access:
    """``given``: a file, or several with colons between them; None: KUBECONFIG, ~/.kube/config, else the pod's service
    account.

    Raises LaunchRefused where there is none, or where it does not hold.
    """
    from kubernetes import config
    from kubernetes.client import Configuration

    configuration = Configuration(proxy="")  # afterwards it is the kubeconfig's own, or none
    file = given or os.environ.get("KUBECONFIG") or "~/.kube/config"
    there = [path for path in map(os.path.expanduser, file.split(os.pathsep)) if path and os.path.exists(path)]
    if not there and given is None and _TOKEN.exists():
        try:
            config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
            return Access(configuration, namespace=_TOKEN.with_name("namespace").read_text().strip())
        except (config.ConfigException, OSError, ValueError) as error:
            raise LaunchRefused(f"no cluster to talk to: the pod's own account: {error}; {_SET}") from error
    if not there:
        raise LaunchRefused(f"no cluster to talk to: {_no_file(file)}")
    chosen = choose_context(file, [(path, _read(path)) for path in there], context)
    _check_files(chosen)
    said: list[str] = []
    try:
        with _overheard(said), _waited_for(chosen):
            config.load_kube_config(  # type: ignore[no-untyped-call]
                config_file=file, context=chosen.name, client_configuration=configuration
            )
    except Exception as error:  # what gives a user's credentials may fail in any way
        empty = f"{', '.join(chosen.empty)} without a value, take that out: " if chosen.empty else ""
        raise LaunchRefused(f"{chosen}: {empty}{' '.join(str(error).split())[:300]}; {_ANEW}") from error
    if chosen.giver and not configuration.api_key and not configuration.cert_file:
        # of a program that only failed the client says something of None; its own words are on the terminal
        words = "" if any("NoneType" in text for text in said) else " ".join(said)[:300]
        why = f": {words}" if words else ""
        raise Unauthenticated(f"{chosen}: {chosen.giver} gave no credentials{why}; log in again, or mend what it says")
    for text in said:
        log.warning("%s: %s", chosen, text)
    return Access(configuration, _as_whom(chosen), configuration.proxy or "", chosen.name, chosen.namespace)


@dataclass(frozen=True)
class Context:
    """What a context names. ``folders``: of the files that hold its cluster and user: paths are taken from there."""

    file: str
    name: str
    namespace: str | None
    cluster: Json
    user: Json
    folders: Mapping[str, Path]

    def __str__(self) -> str:
        """For people."""
        return f"kubeconfig {self.file}, context {self.name!r}"

    @property
    def empty(self) -> list[str]:
        """Keys without a value, which is no text to the client and nothing to kubectl."""
        sides = (("cluster", self.cluster), ("user", self.user))
        return [f"{side}.{key}" for side, tree in sides for key, value in tree.items() if value is None]

    @property
    def program(self) -> str:
        """That gives the credentials; empty where none does."""
        said = self.user.get("exec")
        return str(said.get("command") or "") if isinstance(said, Mapping) else ""

    @property
    def giver(self) -> str:
        """Who gives the credentials, for people; empty where they stand in the file."""
        provider = self.user.get("auth-provider")
        named = f"the auth-provider {provider.get('name')!r}" if isinstance(provider, Mapping) else ""
        return f"the program {self.program!r}" if self.program else named


def choose_context(file: str, trees: Sequence[tuple[str, Json]], wanted: str | None) -> Context:
    """The context to use, of files in kubectl's order. LaunchRefused where there is none of that name, or where it
    names what is not there."""
    name = wanted or next((str(tree["current-context"]) for _, tree in trees if tree.get("current-context")), "")
    contexts, clusters, users = (_named(trees, kind) for kind in ("contexts", "clusters", "users"))
    if name not in contexts:
        what = f"its current-context {name!r} is not there" if name else "it says no current-context"
        raise LaunchRefused(
            f"kubeconfig {file}: {what}, {_have('contexts', contexts)}; choose one: kubectl config use-context NAME"
        )
    own = contexts[name][1].get("context") or {}
    found: dict[str, tuple[str, Json]] = {"user": ("", {})}
    for key in ("cluster", "user", "namespace"):
        if not isinstance(own.get(key) or "", str):
            raise LaunchRefused(
                f"kubeconfig {file}, context {name!r}: its {key} {own[key]!r} is no text; write names in quotes"
            )
    for key, rows in (("cluster", clusters), ("user", users)):
        named = own.get(key)
        if named in rows:
            found[key] = rows[named][0], rows[named][1].get(key) or {}
        elif named or key == "cluster":
            raise LaunchRefused(
                f"kubeconfig {file}, context {name!r}: its {key} {named!r} is not there, {_have(f'{key}s', rows)}; "
                f"correct it (kubectl config set-context {name} --{key}=NAME), or {_ANEW}"
            )
    folders = {key: Path(path or file).absolute().parent for key, (path, _) in found.items()}
    return Context(file, name, own.get("namespace"), found["cluster"][1], found["user"][1], folders)


def _named(trees: Sequence[tuple[str, Json]], kind: str) -> dict[str, tuple[str, Json]]:
    """Entries of a kind by name, each with its file; the first of a name holds."""
    found: dict[str, tuple[str, Json]] = {}
    for path, tree in trees:
        rows = tree.get(kind) or []
        if not isinstance(rows, list) or not all(isinstance(row, Mapping) and row.get("name") for row in rows):
            raise LaunchRefused(f"kubeconfig {path}: {kind} is no list of entries with a name each; {_ANEW}")
        for row in rows:
            single = kind.removesuffix("s")
            if not isinstance(row.get(single) or {}, Mapping):
                raise LaunchRefused(f"kubeconfig {path}: {single} {row['name']!r} holds {shown(row[single])}; {_ANEW}")
            found.setdefault(str(row["name"]), (path, row))
    return found


def _have(kind: str, rows: Mapping[str, Any]) -> str:
    names = sorted(rows)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"its {kind} are {', '.join(names[:8])}{more}" if names else f"it has no {kind}"


def _no_file(file: str) -> str:
    if "\n" in file.strip() or re.match(r"\s*(apiVersion|kind|clusters|\{)", file):
        return "HOTSTAGE_KUBECONFIG or KUBECONFIG holds a kubeconfig itself; write that to a file, and name the file"
    named = file[:500] if file == file.strip() else f"{file[:500]!r}, which begins or ends with a blank or a line's end"
    return f"there is no file {named}; {_SET}"


def _read(path: str) -> Json:
    from yaml import YAMLError, safe_load

    try:
        with open(path, encoding="utf-8") as source:
            tree = safe_load(source)
    except YAMLError as error:
        raise LaunchRefused(
            f"no cluster to talk to: {path} is no YAML: {' '.join(str(error).split())}; {_ANEW}"
        ) from error
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise LaunchRefused(f"no cluster to talk to: {path} cannot be read: {why}; {_SET}") from error
    if not isinstance(tree, Mapping):
        raise LaunchRefused(f"no cluster to talk to: {path} is {'empty' if tree is None else 'no kubeconfig'}; {_SET}")
    return tree


def _check_files(chosen: Context) -> None:
    """What the context needs beside the file: LaunchRefused where a certificate or the program is not there."""
    server = str(chosen.cluster.get("server") or "")
    if not re.match(r"(?i:https?)://[^/\s]\S*\Z", server):
        raise LaunchRefused(f"{chosen}: its cluster's server is {server!r}; write it as https://host:port, or {_ANEW}")
    secure = server.lower().startswith("https")
    for side, keys in _FILES.items():
        tree: Json = getattr(chosen, side)
        for key in keys if secure else ():
            _check_data(chosen, tree, key)
            _check_file(chosen, side, tree, key)
    if not chosen.user.get("token"):
        _check_file(chosen, "user", chosen.user, "tokenFile")
    if chosen.program:
        _check_program(chosen)
    elif chosen.user.get("exec"):
        raise LaunchRefused(f"{chosen}: its exec is no table with a command; correct it, or {_ANEW}")
    provider = chosen.user.get("auth-provider")
    if provider and not (isinstance(provider, Mapping) and provider.get("name") in _PROVIDERS):
        raise LaunchRefused(
            f"{chosen}: its auth-provider is none of {', '.join(_PROVIDERS)}, and Kubernetes has ended the others: "
            "take a kubeconfig with exec (for Azure: kubelogin convert-kubeconfig)"
        )


def _check_file(chosen: Context, side: str, tree: Json, key: str) -> None:
    if key not in tree or tree.get(f"{key}-data"):
        return
    if not tree[key]:
        raise LaunchRefused(f"{chosen}: {key} is there and empty; take that line out, or {_ANEW}")
    path = chosen.folders[side] / str(tree[key])
    if not path.is_file() or not os.access(path, os.R_OK):
        why = "cannot be read by this user" if path.is_file() else "is not there"
        raise LaunchRefused(f"{chosen}: {key} is the file {path}, which {why}; bring it there, or {_ANEW}")
    if key in _PEM:
        _check_pem(chosen, key, f"the file {path}", path.read_bytes())


def _check_data(chosen: Context, tree: Json, key: str) -> None:
    said = str(tree.get(f"{key}-data") or "")
    try:
        data = base64.standard_b64decode(said)
    except ValueError as error:
        raise LaunchRefused(f"{chosen}: {key}-data is no base64 ({error}); {_ANEW}") from error
    if said:
        _check_pem(chosen, key, f"{key}-data", data)


def _check_pem(chosen: Context, key: str, where: str, data: bytes) -> None:
    """What TLS takes: anything else ends each connection as if no server were there. What stands between the blocks is
    for people, in whatever encoding."""
    what = _PEM[key]
    try:
        blocks = re.findall(rf"^-----BEGIN [A-Z ]*{what}-----$.*?^-----END [A-Z ]*{what}-----$", _lines(data), _BLOCKS)
        if not blocks:
            raise ValueError(f"it has no lines -----BEGIN {what}----- and -----END {what}-----")
        if key == "certificate-authority":
            ssl.create_default_context(cadata="\n".join(blocks))
    except (ValueError, ssl.SSLError) as error:
        raise LaunchRefused(f"{chosen}: {where} holds no {what.lower()} in PEM ({error}); {_ANEW}") from error


def _lines(data: bytes) -> str:
    """As OpenSSL reads them: blanks and a carriage return at a line's end do not count, nor does a byte-order mark."""
    text = data.removeprefix(b"\xef\xbb\xbf").decode("ascii", errors="replace")
    return "\n".join(line.rstrip() for line in text.split("\n"))


def _check_program(chosen: Context) -> None:
    said, name = chosen.user["exec"], chosen.program
    own = {str(row.get("name")): str(row.get("value")) for row in said.get("env") or () if isinstance(row, Mapping)}
    path = own.get("PATH", os.environ.get("PATH"))
    here = str(chosen.folders["cluster"] / name) if "/" in name else name
    if shutil.which(here, path=path) is None:
        hint = " ".join(str(said.get("installHint") or "").split())[:300]
        raise LaunchRefused(
            f"{chosen}: credentials come from the program {name!r}, and that is not "
            + ("there" if "/" in name else "in PATH")
            + f"; install it{f' ({hint})' if hint else ''}, or take a kubeconfig with a token of its own"
        )


def _as_whom(chosen: Context) -> tuple[tuple[str, str], ...]:
    """The headers of a user who acts as another one, which kubectl sends and the client leaves out."""
    said = {header: chosen.user.get(key) for key, header in _AS.items()}
    extra = chosen.user.get("as-user-extra") or {}
    if not isinstance(extra, Mapping):
        raise LaunchRefused(f"{chosen}: its as-user-extra holds {shown(extra)}; write it as a table, or {_ANEW}")
    for key, values in extra.items():
        said[f"Impersonate-Extra-{quote(str(key).lower(), safe='')}"] = values
    several = {header: values if isinstance(values, list) else [values] for header, values in said.items() if values}
    return tuple((header, str(value)) for header, values in several.items() for value in values)


@contextmanager
def _waited_for(chosen: Context) -> Iterator[None]:
    """A word where the program that gives the credentials takes its time."""
    text = "%s: still waiting for %s, which gives the credentials: does it wait for a login?"
    timer = threading.Timer(SILENT_S, log.warning, (text, chosen, chosen.giver))
    timer.daemon = True
    if chosen.giver:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _overheard(said: list[str]) -> Iterator[None]:
    """What the client says by itself, to the root logger, of a program that gave no credentials."""

    def hear(record: logging.LogRecord) -> bool:
        said.append(record.getMessage())
        return False

    root = logging.getLogger()
    root.addFilter(hear)
    try:
        yield
    finally:
        root.removeFilter(hear)
