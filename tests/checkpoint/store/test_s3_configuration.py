"""boto3's ordinary configuration holds: profiles, roles, endpoints, addressing, CA bundles, checksums, encryption."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoint.errors import CredentialsExpired, CredentialsRefused, StoreRefused, StoreUnavailable
from checkpoint.store import open_store
from checkpoint.store.s3 import S3Store
from checkpoint.store.s3_address import open_s3
from checkpoint.store.s3_answers import Retry
from tests.support.certificates import served
from tests.support.hostile_s3 import HostileS3, hostile_s3
from tests.support.token_service import TokenService, token_service

KEY, HINT = "runs/r/spec", "runs/r/live/x"
AT_ONCE = Retry(attempts=2, sleep=lambda _: None, jitter=lambda: 0.0)
ARN = "arn:aws:iam::123456789012:role/trainer"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of this machine's configuration, and files of one's own."""
    import os

    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    return tmp_path


@pytest.fixture
def peer() -> Iterator[HostileS3]:
    with hostile_s3() as running:
        yield running


@pytest.fixture
def tokens() -> Iterator[TokenService]:
    with token_service() as running:
        yield running


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")


def works(store: S3Store) -> None:
    assert store.create(KEY, b"x")
    store.put(HINT, b"y")
    assert store.get(KEY) == b"x"
    assert [info.key for info in store.list("runs/")] == [HINT, KEY]


# --- where it is ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_the_endpoint_of_the_environment(
    peer: HostileS3, keys: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, f"http://127.0.0.1:{peer.port}")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    store = open_s3("s3://bucket/p", AT_ONCE)
    assert store.url == "s3://bucket/p"
    works(store)
    assert "/eu-central-1/s3/" in peer.heads[0]["authorization"]


def test_everything_from_a_profile(peer: HostileS3, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "config").write_text(
        "[profile team]\nregion = ap-south-1\nservices = here\ns3 =\n  addressing_style = path\n"
        "[services here]\ns3 =\n  endpoint_url = http://store.example\n"
    )
    (home / "credentials").write_text("[team]\naws_access_key_id = team-key\naws_secret_access_key = s\n")
    monkeypatch.setenv("AWS_PROFILE", "team")
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{peer.port}")
    assert open_s3("s3://bucket/p", AT_ONCE).create(KEY, b"x")
    assert peer.requests == ["PUT http://store.example/bucket/p/runs/r/spec"]
    assert "Credential=team-key/" in peer.heads[0]["authorization"]
    assert "/ap-south-1/s3/" in peer.heads[0]["authorization"]


@pytest.mark.parametrize(
    ("profile", "login"),
    [
        (
            "sso_session = s\nsso_account_id = 1\nsso_role_name = r\n[sso-session s]\nsso_region = us-east-1\n"
            "sso_start_url = http://127.0.0.1:9/start",
            "aws sso login --profile team",
        ),
        (
            "sso_start_url = http://127.0.0.1:9/start\nsso_region = us-east-1\nsso_account_id = 1\nsso_role_name = r",
            "aws sso login --profile team",
        ),
    ],
)
def test_a_login_that_has_ended_is_told_with_its_command(
    peer: HostileS3, home: Path, monkeypatch: pytest.MonkeyPatch, profile: str, login: str
) -> None:
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("AWS_PROFILE", "team")
    (home / "config").write_text(f"[profile team]\nregion = us-east-1\n{profile}\n")
    with pytest.raises(CredentialsRefused, match=f"the profile's login has ended, or there was none: {login}"):
        open_s3(f"s3://bucket/p?endpoint=http://127.0.0.1:{peer.port}", AT_ONCE).get(KEY)
    assert peer.requests == []


def test_an_empty_profile_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "")
    with pytest.raises(CredentialsRefused, match="AWS_PROFILE is set and empty: name a profile, or unset it"):
        open_store("s3://bucket/p?region=us-east-1")


def test_a_table_of_the_profile_that_is_none(home: Path, keys: None) -> None:
    (home / "config").write_text("[default]\nregion = us-east-1\ns3 = path\n")
    with pytest.raises(StoreRefused, match="the profile's s3 is 'path', and it is a table"):
        open_s3("s3://bucket/p", AT_ONCE)


def test_credentials_that_are_past_their_end_when_they_come(peer: HostileS3, home: Path) -> None:
    """A program that gives what it has kept: it will have newer ones once its person has logged in."""
    (home / "said").write_text(
        '{"Version": 1, "AccessKeyId": "k", "SecretAccessKey": "geheim", "Expiration": "2020-01-01T00:00:00Z"}'
    )
    (home / "config").write_text(f"[default]\nregion = us-east-1\ncredential_process = cat {home / 'said'}\n")
    store = open_s3(f"s3://bucket/p?endpoint=http://127.0.0.1:{peer.port}", AT_ONCE)
    with pytest.raises(CredentialsExpired, match=r"still expired.*credential_process of profile 'default'"):
        store.get(KEY)
    assert peer.requests == []


def test_who_gives_a_pod_its_credentials_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """EKS Pod Identity's agent may start after the pod."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        there = f"http://127.0.0.1:{taken.getsockname()[1]}/v1/credentials"
    monkeypatch.setattr("botocore.utils.ContainerMetadataFetcher.SLEEP_TIME", 0)
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", there)
    with pytest.raises(StoreUnavailable, match="container-role"):
        open_s3("s3://bucket/p?region=us-east-1", AT_ONCE).get(KEY)


def test_a_profile_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(CredentialsRefused, match="nobody"):
        open_store("s3://bucket/p?region=us-east-1")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            "role_arn = arn:aws:iam::1:role/r\nsource_profile = plain\nmfa_serial = arn:aws:iam::1:mfa/me",
            r"asks for a code \(Enter MFA code for arn:aws:iam::1:mfa/me\), and a run can ask nobody: log in before",
        ),
        ("credential_process = /bin/false --key geheim", "credential_process is '/bin/false': call it by hand"),
        ("credential_process = /bin/echo hi", "credential_process is '/bin/echo': .* print credentials as JSON"),
        ("credential_process = /no/such", "No such file .*credential_process is '/no/such': call it by hand"),
    ],
)
def test_a_profile_that_gives_no_credentials(
    home: Path, monkeypatch: pytest.MonkeyPatch, lines: str, words: str
) -> None:
    (home / "config").write_text(
        f"[profile mine]\n{lines}\n[profile plain]\naws_access_key_id = a\naws_secret_access_key = b"
    )
    monkeypatch.setenv("AWS_PROFILE", "mine")
    with pytest.raises(StoreRefused, match=words) as caught:
        list(open_s3("s3://bucket/p?endpoint=http://127.0.0.1:1", AT_ONCE).list("runs/"))
    assert "geheim" not in str(caught.value)


def test_a_proxy_that_does_not_answer_is_named(keys: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with pytest.raises(StoreUnavailable, match=r"look at HTTP_PROXY and HTTPS_PROXY .* or name the server in NO_PROXY"):
        open_s3("s3://bucket/p?endpoint=http://192.0.2.1:9000", AT_ONCE).head(KEY)


def test_which_region_is_taken(peer: HostileS3, keys: None, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address's, else the environment's or the profile's; boto3 itself does not know AWS_REGION."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{peer.port}")
    monkeypatch.setenv("AWS_REGION", "in-pods")
    for number, address in enumerate(["s3://bucket/p", "s3://bucket/p", "s3://bucket/p?region=own", "s3://bucket/p"]):
        if number == 1:
            (home / "config").write_text("[default]\nregion = profile\n")
        if number == 3:
            monkeypatch.setenv("AWS_DEFAULT_REGION", "environment")
        open_s3(address, AT_ONCE).put(HINT, b"x")
    taken = [head["authorization"].split("/")[2] for head in peer.heads]
    assert taken == ["in-pods", "profile", "own", "environment"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"AWS_ENDPOINT_URL": "localhost:9000"}, "localhost:9000; write AWS_ENDPOINT_URL as http://host:port"),
        ({"AWS_ENDPOINT_URL_S3": "http:/a"}, "http:/a; write AWS_ENDPOINT_URL_S3 as http://host:port"),
        ({"AWS_REGION": "eu-west-1\n"}, r"the region is 'eu-west-1\\n' .* without a blank or a line's end"),
        ({"AWS_REGION": "eu west"}, "'eu west' .*; write AWS_REGION as eu-west-1"),
        ({"AWS_CONFIG_FILE": "{bad}"}, "Unable to parse config file: .*; mend that file"),
        ({"AWS_REQUEST_CHECKSUM_CALCULATION": "never"}, "never.*; correct it where it is said"),
        ({"AWS_CA_BUNDLE": "/none.pem"}, "AWS_CA_BUNDLE names '/none.pem', .* No such file"),
        ({"REQUESTS_CA_BUNDLE": "{bad}"}, "REQUESTS_CA_BUNDLE names .* no certificates in PEM"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_that_cannot_be_is_told_with_its_mend(
    keys: None, home: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], words: str
) -> None:
    (home / "bad").write_text("garbage\n")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    for name, value in settings.items():
        monkeypatch.setenv(name, value.format(bad=home / "bad"))
    with pytest.raises(StoreRefused, match=words):
        open_store("s3://bucket/p")


def test_what_no_header_can_hold_is_not_asked_and_not_told(keys: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "hush\n")
    with pytest.raises(CredentialsRefused, match="such as a line's end: take it out of AWS_ACCESS_KEY_ID") as caught:
        open_store("s3://bucket/p?endpoint=http://127.0.0.1:1&region=us-east-1").head(KEY)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["socks5", "socks5h", "SOCKS4"])
def test_a_socks_proxy_is_none_for_a_store(keys: None, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    """It never heals by itself, and what a proxy is told is nobody else's."""
    monkeypatch.setenv("HTTP_PROXY", f"{scheme}://ann:hush@127.0.0.1:1")
    with pytest.raises(StoreRefused, match="names a SOCKS proxy: write it as http://host:port") as caught:
        open_s3("s3://bucket/p?endpoint=http://there.invalid&region=r", AT_ONCE).get(KEY)
    assert "hush" not in str(caught.value)


def test_a_socks_proxy_for_everything_is_named_where_nobody_answers(
    keys: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    with pytest.raises(StoreUnavailable, match="ALL_PROXY names a SOCKS proxy, which is not used here"):
        open_s3("s3://bucket/p?endpoint=http://127.0.0.1:1&region=r", AT_ONCE).get(KEY)


def test_a_proxy_that_is_none(keys: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "foo:bar")
    with pytest.raises(StoreRefused, match=r"foo:bar.*; look at HTTP_PROXY"):
        open_store("s3://bucket/p?endpoint=http://store.example&region=us-east-1").head(KEY)


@pytest.mark.parametrize(
    ("option", "asked"),
    [
        ("endpoint=http://store.example", "http://store.example/bucket/p/"),
        ("endpoint=http://store.example&path_style=0", "http://bucket.store.example/p/"),
        ("path_style=1", "https://s3.eu-west-1.amazonaws.com/bucket/p/"),
        ("", "https://bucket.s3.amazonaws.com/p/"),
    ],
)
def test_the_bucket_in_the_path_or_in_the_host_name(
    peer: HostileS3, keys: None, monkeypatch: pytest.MonkeyPatch, option: str, asked: str
) -> None:
    """A proxy sees what is asked; of AWS's own addresses, which are https, the signed address is looked at."""
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{peer.port}")
    store = open_s3(f"s3://bucket/p?region=eu-west-1&{option}", AT_ONCE)
    if asked.startswith("http:"):
        assert store.create(KEY, b"x")
        assert peer.requests == [f"PUT {asked}{KEY}"]
    else:
        signed = store.client.generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": f"p/{KEY}"})
        assert signed.startswith(asked + KEY)


# --- https ------------------------------------------------------------------------------------------------


@pytest.fixture
def secure(home: Path) -> Iterator[HostileS3]:
    with hostile_s3(served(home)) as running:
        yield running


def https(peer: HostileS3) -> S3Store:
    return open_s3(f"s3://bucket/p?endpoint=https://127.0.0.1:{peer.port}&region=us-east-1", AT_ONCE)


@pytest.mark.parametrize("how", ["environment", "profile"])
def test_a_bundle_of_authorities(
    secure: HostileS3, keys: None, home: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "environment":
        monkeypatch.setenv("AWS_CA_BUNDLE", str(home / "ca.pem"))
    else:
        (home / "config").write_text(f"[default]\nca_bundle = {home / 'ca.pem'}\n")
    works(https(secure))


def test_a_certificate_of_an_unknown_authority_is_refused_with_the_mend(secure: HostileS3, keys: None) -> None:
    with pytest.raises(StoreRefused, match="AWS_CA_BUNDLE"):
        https(secure).create(KEY, b"x")
    assert secure.objects == {}


@pytest.mark.parametrize(
    ("certificate", "says"),
    [
        ({"address": "10.1.2.3"}, "is of another name: correct the endpoint; .*path_style=1"),
        ({"days": -1}, "does not hold today: have it renewed, or set this machine's clock"),
    ],
)
def test_a_certificate_that_does_not_fit_is_told(
    home: Path, keys: None, monkeypatch: pytest.MonkeyPatch, certificate: dict[str, Any], says: str
) -> None:
    with hostile_s3(served(home, **certificate)) as running:
        monkeypatch.setenv("AWS_CA_BUNDLE", str(home / "ca.pem"))
        with pytest.raises(StoreRefused, match=says):
            https(running).create(KEY, b"x")


def test_a_server_without_tls_is_told(peer: HostileS3, keys: None) -> None:
    with pytest.raises(StoreRefused, match=r"speaks no TLS at that port: is the endpoint to begin with http://"):
        https(peer).create(KEY, b"x")


def test_a_connection_that_ends_within_its_handshake_is_tried_again(keys: None) -> None:
    """As a server that is started again, or a load balancer, ends it: no question of certificates."""
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def end() -> None:
            while len(asked) < AT_ONCE.attempts:
                connection, _ = listening.accept()
                asked.append(connection.recv(1 << 14))
                connection.close()

        thread = threading.Thread(target=end, daemon=True)
        thread.start()
        there = f"https://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(StoreUnavailable, match=r"EOF|reset|closed"):
            open_s3(f"s3://bucket/p?endpoint={there}&region=us-east-1", AT_ONCE).get(KEY)
        thread.join(60)
    assert len(asked) == AT_ONCE.attempts


def test_a_bundle_that_is_not_there_is_refused(
    secure: HostileS3, keys: None, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(home / "none.pem"))
    with pytest.raises(StoreRefused, match=r"none\.pem"):
        https(secure).create(KEY, b"x")


# --- who asks ---------------------------------------------------------------------------------------------


@pytest.fixture
def pod(peer: HostileS3, tokens: TokenService, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As in a pod whose service account has a role (IRSA): the file of its token."""
    token = home / "token"
    token.write_text(tokens.identity)
    monkeypatch.setenv("AWS_ROLE_ARN", ARN)
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(token))
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", tokens.url)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    peer.tokens = {"session-1"}
    return token


def in_pod(peer: HostileS3) -> S3Store:
    return S3Store("bucket", "p", endpoint=f"http://127.0.0.1:{peer.port}", path_style=True, retry=AT_ONCE, renew_s=0)


def test_a_service_accounts_role(peer: HostileS3, tokens: TokenService, pod: Path) -> None:
    works(in_pod(peer))
    assert tokens.asked == ["AssumeRoleWithWebIdentity"]
    assert all(head["x-amz-security-token"] == "session-1" for head in peer.heads)


def test_a_role_whose_session_ends_soon_is_taken_again_before_it_does(
    peer: HostileS3, tokens: TokenService, pod: Path
) -> None:
    tokens.lives_s = 30.0
    store = in_pod(peer)
    assert store.create(KEY, b"x")
    peer.tokens, tokens.gives = {"session-2"}, "session-2"
    pod.write_text("rotated")
    tokens.identity = "rotated"  # the kubelet writes a new token into the file
    peer.requests.clear()
    assert store.get(KEY) == b"x"
    assert len(peer.requests) == 1  # no request with a session that has ended


def test_a_role_that_is_revoked_is_looked_for_again(peer: HostileS3, tokens: TokenService, pod: Path) -> None:
    store = in_pod(peer)
    assert store.create(KEY, b"x")
    peer.tokens, tokens.gives = {"session-2"}, "session-2"
    assert store.get(KEY) == b"x"


def test_a_role_that_does_not_trust_this_account_is_named(peer: HostileS3, tokens: TokenService, pod: Path) -> None:
    for refusal, kind in (
        (None, CredentialsRefused),
        ((403, "AccessDenied"), CredentialsRefused),
        ((400, "ExpiredTokenException"), CredentialsExpired),
    ):
        tokens.refuses = refusal
        pod.write_text("somebody else")
        with pytest.raises(kind, match=r"look at the role .*AWS_WEB_IDENTITY_TOKEN_FILE") as caught:
            in_pod(peer).create(KEY, b"x")
        assert "somebody else" not in str(caught.value)
    assert peer.requests == []


def test_a_token_service_that_does_not_answer_is_waited_for(
    peer: HostileS3, tokens: TokenService, pod: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens.refuses = (503, "ServiceUnavailable")
    with pytest.raises(StoreUnavailable, match="503"):
        in_pod(peer).create(KEY, b"x")


def test_a_pod_without_its_token_is_refused(peer: HostileS3, pod: Path) -> None:
    pod.unlink()
    with pytest.raises(CredentialsRefused, match=r"AWS_WEB_IDENTITY_TOKEN_FILE,.*cannot read one of them"):
        in_pod(peer).create(KEY, b"x")


def test_a_profiles_role(peer: HostileS3, tokens: TokenService, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "config").write_text(
        f"[profile job]\nrole_arn = {ARN}\nsource_profile = me\nregion = us-east-1\n[profile me]\nregion = us-east-1\n"
    )
    (home / "credentials").write_text("[me]\naws_access_key_id = k\naws_secret_access_key = s\n")
    monkeypatch.setenv("AWS_PROFILE", "job")
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", tokens.url)
    peer.tokens = {"session-1"}
    works(in_pod(peer))
    assert tokens.asked == ["AssumeRole"]


# --- how it is kept ---------------------------------------------------------------------------------------


def test_encryption_is_asked_for_with_each_object(peer: HostileS3, keys: None) -> None:
    store = open_s3(peer.url() + "&sse=aws:kms&kms_key=alias/team", AT_ONCE)
    assert open_s3(store.url).url == store.url
    assert "sse=aws:kms&kms_key=alias/team" in store.url
    works(store)
    for request, head in zip(peer.requests, peer.heads, strict=True):
        told = (head.get("x-amz-server-side-encryption"), head.get("x-amz-server-side-encryption-aws-kms-key-id"))
        assert told == (("aws:kms", "alias/team") if request.startswith("PUT") else (None, None))
    plain = open_s3(peer.url("q"), AT_ONCE)
    assert plain.create(KEY, b"x")
    assert "x-amz-server-side-encryption" not in peer.heads[-1]


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("sse=rot13", "sse is AES256, aws:kms or aws:kms:dsse, not 'rot13'"),
        ("kms_key=alias/team", "needs sse=aws:kms"),
        ("sse=AES256&kms_key=alias/team", "needs sse=aws:kms"),
        ("sse=aws:kms&kms_key=a%20b", "kms_key is the id, the alias or the ARN"),
    ],
)
def test_encryption_that_cannot_be_is_refused(option: str, says: str) -> None:
    with pytest.raises(StoreRefused, match=says):
        open_store(f"s3://bucket/p?region=us-east-1&{option}")


@pytest.mark.parametrize("setting", ["", "when_required", "when_supported"])
def test_every_object_comes_with_its_sha256_whatever_the_settings(
    peer: HostileS3, keys: None, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    """Also hints: a bucket with object lock refuses what comes without a checksum."""
    if setting:
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", setting)
        monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", setting)
    store = open_s3(peer.url(), AT_ONCE)
    works(store)
    assert store.create("runs/r/chunks/a", bytes(1 << 20))
    for request, head in zip(peer.requests, peer.heads, strict=True):
        checksums = sorted(name for name in head if name.startswith("x-amz-checksum-") and "mode" not in name)
        assert checksums == (["x-amz-checksum-sha256"] if request.startswith("PUT") else [])
        validates = setting == "when_supported" and request.startswith("GET") and "list-type" not in request
        assert ("x-amz-checksum-mode" in head) == validates
