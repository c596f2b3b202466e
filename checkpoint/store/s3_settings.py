"""boto3's own configuration, as a store takes it: what holds where it says nothing, and what it says wrong.

What is wrong there is found when a store is opened and told with where it was said, its value and the mend. No value of
a credential is told.
"""

from __future__ import annotations

import os
import ssl
from typing import Any

import boto3
import botocore.exceptions
from botocore.configprovider import ConfiguredEndpointProvider

from checkpoint.errors import CredentialsRefused, StoreRefused

_FILES = "the profiles are in AWS_CONFIG_FILE (~/.aws/config) and AWS_SHARED_CREDENTIALS_FILE (~/.aws/credentials)"


def session() -> boto3.session.Session:
    """A session with the credentials of now. ``AWS_REGION`` counts: every SDK but boto3 knows it, and pods are given
    it."""
    if (named := os.environ.get("AWS_PROFILE")) is not None and not named.strip():
        raise CredentialsRefused("AWS_PROFILE is set and empty: name a profile, or unset it")
    made = _prepared(boto3.session.Session())
    region = made.region_name or os.environ.get("AWS_REGION")
    if made.region_name == "" and not region:
        raise StoreRefused(
            "the region is set and empty (AWS_DEFAULT_REGION, or the profile's region): write it as eu-west-1, or "
            "leave it out"
        )
    if region and region != region.strip():
        raise StoreRefused(
            f"the region is {region!r} (AWS_DEFAULT_REGION, AWS_REGION, or the profile's region): write it as "
            "eu-west-1, without a blank or a line's end"
        )
    return made if made.region_name else _prepared(boto3.session.Session(region_name=region))


_read: dict[tuple[str, ...], dict[Any, Any]] = {}


def _prepared(made: boto3.session.Session) -> boto3.session.Session:
    """boto3's description of S3, a megabyte of JSON, is read and parsed once a process, not for each session: by the
    folders that it is looked for in. Clients of one session share it so."""
    loader = made._session.get_component("data_loader")
    loader._cache = _read.setdefault(tuple(loader.search_paths), {})
    return _asking_nobody(made)


def _asking_nobody(made: boto3.session.Session) -> boto3.session.Session:
    """It would ask whoever sits at the terminal for a device's code, again for each client, and a run has nobody."""

    def refuse(question: str) -> str:
        raise CredentialsRefused(
            f"the profile asks for a code ({question.strip().rstrip(':')}), and a run can ask nobody: log in before, "
            "and give what that brought (aws sts get-session-token, AWS_SESSION_TOKEN; aws sso login)"
        )

    made._session.get_component("credential_provider").get_provider("assume-role")._prompter = refuse
    return made


def endpoint() -> str | None:
    """Of S3, where the environment or the profile names one: what a client takes whose address says nothing."""
    try:
        made = boto3.session.Session()._session
        found = ConfiguredEndpointProvider(made.full_config, made.get_scoped_config(), "s3").provide()
    except botocore.exceptions.BotoCoreError:  # opening the store says what is wrong
        return None
    return str(found) if found else None


def unless_configured(made: boto3.session.Session, path_style: bool | None) -> dict[str, Any]:
    """What a client gets where neither the environment nor the profile says otherwise.

    Checksums beside the SHA-256 of a create only where they must be: many servers choke on them.
    """
    profile = _profile(made)
    found: dict[str, Any] = {
        name: "when_required"
        for name in ("request_checksum_calculation", "response_checksum_validation")
        if not os.environ.get(f"AWS_{name.upper()}") and name not in profile
    }
    if not isinstance(profile.get("s3") or {}, dict):
        raise StoreRefused(
            f"the profile's s3 is {str(profile['s3'])[:40]!r}, and it is a table: write `s3 =` and below it, indented, "
            f"for example `addressing_style = path`; {_FILES}"
        )
    if path_style is not None:
        found["s3"] = {"addressing_style": "path" if path_style else "virtual"}
    return found


def check_bundle(made: boto3.session.Session, endpoint: str) -> None:
    """StoreRefused where an https server would be asked by certificates of authorities that cannot be read."""
    said = {
        "AWS_CA_BUNDLE": os.environ.get("AWS_CA_BUNDLE"),
        "the profile's ca_bundle": _profile(made).get("ca_bundle"),
        "REQUESTS_CA_BUNDLE": os.environ.get("REQUESTS_CA_BUNDLE"),
    }
    by, path = next(((by, path) for by, path in said.items() if path), ("", ""))
    if not path or os.path.isdir(path) or not endpoint.lower().startswith("https"):
        return
    try:
        ssl.create_default_context(cafile=path)
    except (OSError, ValueError) as error:
        why = (
            "it holds no certificates in PEM" if isinstance(error, ssl.SSLError) else getattr(error, "strerror", error)
        )
        raise StoreRefused(
            f"{by} names {path!r}, which cannot be used: {why}; name a file with the certificates of your authority, "
            "or unset it"
        ) from error


def mend(error: BaseException, region: str | None) -> str:
    """Where the setting stands that a client could not be made with, and how it is written; begins with "; ".
    ``region``: the address's."""
    if isinstance(error, botocore.exceptions.NoRegionError):
        return "; name the region with ?region=… or AWS_REGION"
    if isinstance(error, botocore.exceptions.ConfigParseError):
        return f"; mend that file (lines of key = value below [default] or [profile NAME]); {_FILES}"
    if isinstance(error, botocore.exceptions.InvalidRegionError):
        named = [name for name in ("AWS_DEFAULT_REGION", "AWS_REGION") if os.environ.get(name)]
        by = "the address's ?region=" if region else named[0] if named else "the profile's region"
        return f"; write {by} as eu-west-1"
    if str(error).startswith("Invalid endpoint: "):
        named = [name for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") if os.environ.get(name)]
        return f"; write {named[0] if named else 'the endpoint_url of the profile'} as http://host:port or https://host:port"
    program = _profile(boto3.session.Session()).get("credential_process")
    if program and isinstance(error, (ValueError, OSError, botocore.exceptions.CredentialRetrievalError)):
        return (
            f"; the profile's credential_process is {program.split()[0]!r}: call it by hand, it has to end with 0 and "
            f"print credentials as JSON; {_FILES}"
        )
    return f"; correct it where it is said: AWS_… in the environment, or the profile; {_FILES}"


def _profile(made: boto3.session.Session) -> dict[str, Any]:
    try:
        return dict(made._session.get_scoped_config())
    except botocore.exceptions.ProfileNotFound:
        return {}  # making the client says so
