"""The SDK's client of one bucket, with the credentials of now.

Credentials come from where boto3 finds them (environment, profile, web identity, instance role), never from the
address; they are not logged and not in any error. Where the server says that they have expired or are unknown they are
looked for again (``renew``): a file, a credential process or a role may have newer ones. The rest of boto3's
configuration (region, endpoint, addressing style, CA bundle, checksums) holds too where the address says nothing else;
time-outs and retries are ours.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable
from typing import Any

import botocore
import botocore.config
import botocore.exceptions

from checkpoint.errors import StoreError, StoreRefused
from checkpoint.store import s3_settings
from checkpoint.store.s3_answers import CREDENTIALS, FOREIGN, translate
from checkpoint.store.s3_bodies import hand_over

logger = logging.getLogger(__name__)


_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN")


class S3Session:
    """``client`` is what asks; another one after a ``renew``. ``url``: the store's, for people. Thread-safe.

    ``path_style``, ``anonymous``, ``requester_pays``: as in ``S3Store``. Raises StoreRefused where boto3's
    configuration does not hold.
    """

    def __init__(
        self,
        url: str,
        *,
        endpoint: str | None,
        region: str | None,
        path_style: bool | None,
        anonymous: bool,
        requester_pays: bool,
        connect_s: float,
        read_s: float,
        renew_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._url, self._path_style, self._pays = url, path_style, requester_pays
        self._options: dict[str, Any] = {"endpoint_url": endpoint, "region_name": region}
        self._config = botocore.config.Config(
            connect_timeout=connect_s,
            read_timeout=read_s,
            retries={"total_max_attempts": 1, "mode": "standard"},
            signature_version=botocore.UNSIGNED if anonymous else "s3v4",
            max_pool_connections=32,
            tcp_keepalive=True,
            user_agent_extra="hotstage",
        )
        self._clock, self._renew_s, self._renewed_at = clock, renew_s, -math.inf
        self._lock = threading.Lock()
        self.client, self._found = self._open()

    def _open(self) -> tuple[Any, Any]:
        """A client with the credentials of now, and the session that found them."""
        try:
            made = s3_settings.session()
            config = self._config.merge(botocore.config.Config(**s3_settings.unless_configured(made, self._path_style)))
            client: Any = made.client("s3", config=config, **self._options)
            s3_settings.check_bundle(made, str(client.meta.endpoint_url))
            client.meta.events.register_last("before-call.s3.PutObject", hand_over)
            if self._pays:
                client.meta.events.register("before-call.s3", _pay)
            return client, made
        except FOREIGN as error:
            if isinstance(error, CREDENTIALS) or _unanswered(error):
                raise translate(error, f"opening {self._url}", self._url) from error
            raise StoreRefused(
                f"opening {self._url}: {error}{s3_settings.mend(error, self._options['region_name'])}"
            ) from error

    def renew(self, failed: Any) -> bool:
        """Look for credentials again after the server refused those of ``failed``; whether there are others now.

        Not more often than every ``renew_s``: a credential process is not started for each call that fails.
        """
        with self._lock:
            if self.client is not failed:
                return True  # another thread has found them
            now = self._clock()
            if now - self._renewed_at < self._renew_s:
                return False
            self._renewed_at = now
            try:
                client, session = self._open()
                found = _frozen(client)
                if not found or found == _frozen(failed):
                    return False
            except (StoreError, *FOREIGN) as error:
                logger.warning("%s: looking for newer credentials: %s: %s", self._url, type(error).__name__, error)
                return False
            self.client, self._found = client, session
            logger.warning("%s: the credentials had expired or changed; going on with those of now", self._url)
            return True

    def source(self) -> str:
        """Where the credentials come from and how they are renewed, for people; never their values."""
        try:
            found = self._found.get_credentials()
            method = "" if found is None else str(found.method)
            profile = self._found.profile_name
        except FOREIGN:
            method, profile = "", "default"
        if method == "env" and (odd := [n for n in _SECRETS if (said := os.environ.get(n, "")) != said.strip()]):
            return (
                f"{odd[0]} in this process's environment begins or ends with a blank or a line's end, which belongs to "
                "no key: take it out (a Secret made with `echo` has one: use `kubectl create secret --from-literal`)"
            )
        if method == "env":
            names = [n for n in ("AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN") if os.environ.get(n)]
            return (
                f"they come from {' and '.join(names)} in this process's environment, which cannot change while it "
                "runs: stop it, set new ones, and start it again (it goes on from what is saved). Credentials of a "
                "profile (AWS_PROFILE, with a file that is rewritten or a credential_process) or of a role are read "
                "again without a restart"
            )
        if method in ("shared-credentials-file", "config-file"):
            name = "AWS_SHARED_CREDENTIALS_FILE" if method.startswith("shared") else "AWS_CONFIG_FILE"
            path = os.environ.get(name) or ("~/.aws/credentials" if method.startswith("shared") else "~/.aws/config")
            return f"they are those of profile {profile!r} in {path}: write new ones there, the file is read again"
        if method == "custom-process":
            return f"they come from the credential_process of profile {profile!r}: it gave the same ones again"
        if method:
            return f"they come from {method} (profile {profile!r}), which gave no newer ones: log in again or mend it"
        return "no others were found: set AWS_PROFILE, or give the pod a role"


def _pay(params: dict[str, Any], **_: Any) -> None:
    """``before-call`` where who asks takes the costs: without this word S3 answers 403."""
    params["headers"]["x-amz-request-payer"] = "requester"


def _unanswered(error: BaseException) -> bool:
    """Whether who gives a pod or a machine its credentials did not, as while both are just starting."""
    metadata = botocore.exceptions.MetadataRetrievalError
    return isinstance(error, metadata) or isinstance(error.__context__, metadata)


def _frozen(client: Any) -> tuple[Any, ...]:
    """What a client signs with now, to compare; nothing where it was made without credentials: it has none for good,
    whatever its session would find later."""
    found = client._get_credentials()
    return () if found is None else tuple(found.get_frozen_credentials())
