"""What a cluster's API can answer, translated once (``translate``), and what the caller should do about it.

LaunchUnknown 75              (trainer.errors)
├── ApiUnavailable            no answer, 429, 5xx: unknown, never failure; wait ``retry_after_s`` and try again
└── QuotaFull                 403 of a quota that has room for it once others have gone: wait, as pods do
LaunchRefused 78              (trainer.errors)
├── NotAllowed                403: the text names the verb and the Role to apply
│   └── Unauthenticated       401, or credentials that cannot be had: log in again
├── Invalid                   400, 413, 415, 422, admission and quota refusals: the text says what is wrong
└── ForeignObject             an object of the same name that somebody else made: never touched
LaunchError 75                (trainer.errors)
├── Missing                   404
├── Exists                    409: there is such an object, or somebody else owns the field, or its UID is another
└── Expired                   410: the watch's history is gone; list again
"""

from __future__ import annotations

import json
import re
import ssl
from typing import Any

from urllib3.util.ssl_match_hostname import CertificateError

from k8s.refusal import refusal
from trainer.errors import LaunchError, LaunchRefused, LaunchUnknown


class ApiUnavailable(LaunchUnknown):
    """The API server does not answer, or asks to come again later."""

    def __init__(self, text: str, retry_after_s: float | None = None) -> None:
        super().__init__(text)
        self.retry_after_s = retry_after_s


class QuotaFull(LaunchUnknown):
    """A quota has no room for the object now."""


class NotAllowed(LaunchRefused):
    """Rights are missing."""


class Unauthenticated(NotAllowed):
    """Nobody knows who asks: the credentials are unknown or have expired, or there are none to be had."""


class Invalid(LaunchRefused):
    """The API server, its admission or a quota refuses the object."""


class ForeignObject(LaunchRefused):
    """An object of the wanted name belongs to somebody else."""


class Missing(LaunchError):
    """No such object."""


class Exists(LaunchError):
    """The object is there already, or is another one than the caller thought."""


class Expired(LaunchError):
    """The resource version is too old to watch from."""


def translate(status: int, body: bytes, what: str, retry_after: str | None = None) -> LaunchError:
    """An HTTP status of the API server as one of this module's errors; ``what`` names the call."""
    said = _message(body) or f"HTTP {status}"
    text = f"{what}: {said}"
    if status == 401:
        return Unauthenticated(
            f"{text}; the kubeconfig's credentials are unknown or have expired: log in again, or "
            "point HOTSTAGE_KUBECONFIG or KUBECONFIG at a valid file"
        )
    if status == 403:
        refused = refusal(said)
        if refused is not None:
            kind = QuotaFull if refused.waits else Invalid
            return kind(f"{text}; {refused.mend} (`hotstage k8s doctor` shows what the namespace allows)")
        return NotAllowed(f"{text}; apply the Role `hotstage-launcher` of k8s/base/rbac.yaml, or ask for it")
    if status == 407:
        return NotAllowed(f"{text}; the proxy wants a name and a password: write it as http://NAME:PASSWORD@host:port")
    if status == 404:
        space = re.fullmatch(r'namespaces "([^"]+)" not found', said)
        if space is not None and not what.endswith(f"/namespaces/{space[1]}"):
            return Invalid(f"{text}; create it (kubectl create namespace {space[1]}), or correct launch.namespace")
        return Missing(text)
    if status == 409:
        return Exists(text)
    if status == 410:
        return Expired(text)
    if status == 429 or status >= 500:
        mend = refused.mend if status == 500 and (refused := refusal(said)) is not None else ""
        return ApiUnavailable(f"{text}; {mend}" if mend else text, _seconds(retry_after))
    if 400 <= status < 500:
        return Invalid(text)
    if 300 <= status < 400:
        return Invalid(
            f"{what}: the server sends its callers elsewhere (HTTP {status}), as a login page does; correct the "
            "kubeconfig's server, or log in there first"
        )
    return LaunchError(text)


def untrusted(error: BaseException) -> str:
    """Why no connection will be better than this one, with the mend; empty where another may be."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, (ssl.SSLError, CertificateError)):
        inner = next((arg for arg in (*inner.args, inner.__cause__) if isinstance(arg, BaseException)), None)
    if isinstance(inner, ssl.SSLError) and inner.reason == "WRONG_VERSION_NUMBER":
        return "the server speaks no TLS at that port; correct the kubeconfig's server"
    if isinstance(inner, CertificateError) or (
        isinstance(inner, ssl.SSLCertVerificationError) and inner.verify_code in (62, 63, 64)
    ):
        return (
            "the server's certificate is of another name: correct the kubeconfig's server, or name one of the "
            "certificate's by tls-server-name"
        )
    if not isinstance(inner, ssl.SSLCertVerificationError):
        return ""
    if inner.verify_code in (9, 10):
        return "the server's certificate does not hold today: have it renewed, or set this machine's clock"
    return (
        "the kubeconfig's certificate-authority is not that of the server's certificate (or what answers is a proxy "
        "that opens TLS): fetch the kubeconfig anew from whoever runs the cluster"
    )


def _message(body: bytes) -> str:
    try:
        value: Any = json.loads(body)
    except ValueError:
        return body[:300].decode(errors="replace").strip()
    return str(value.get("message", "")) if isinstance(value, dict) else ""


def _seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:
        return None
