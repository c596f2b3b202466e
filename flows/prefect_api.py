"""Prefect as hotstage meets it: its settings, and a client that sorts what goes wrong.

Nothing here is called by a driver: `flows/page/` calls it from a thread of its own.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urljoin, urlsplit, urlunsplit
from uuid import UUID, uuid4

from flows.proxies import reach_directly

if TYPE_CHECKING:
    import httpx
    from prefect.client.orchestration import SyncPrefectClient

T = TypeVar("T")

TIMEOUT_S = 5.0
LEASE_S = 300.0
BUSY_S, BUSY_PAUSE_S = 15.0, 0.2
"""How long a command asks a server again that is busy, as one is that begins; and how often."""
OPEN_STATES = ("PENDING", "RUNNING", "CANCELLING")
"""Of a flow run that was taken and has not ended."""
TRAIN_FLOW = "train"
"""Name of the flow on the server, of runs that Prefect starts (flows/flow.py) and of those that a command hosts."""
SWEEP_FLOW = "sweep"


AFTER_MOST_S = 120.0
"""So long a server may ask not to be asked again."""


class Gone(Exception):
    """Prefect does not answer, or not as a server that is well does: later, perhaps; not before ``after_s``, where it
    says so.
    """

    after_s = 0.0


class NoPrefect(Exception):
    """This process goes on without Prefect, and has said so."""


class Busy(Gone):
    """It is there, and its database is locked: in a moment."""


class Slow(Gone):
    """It has taken a request and does not answer in time."""


class Refused(Exception):
    """Prefect answers and refuses: credentials, or a request that it does not take."""


class Lost(Gone):
    """Prefect does not know what it had been told before."""


def _hosted() -> None:
    """Never called: a command's flow run is run by the command."""


def artifact_key(text: str) -> str:
    """Prefect takes lower-case letters, digits and dashes in an artifact's key."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


# --- settings -------------------------------------------------------------------------------------------------


class PrefectSettingsError(Exception):
    """Prefect cannot read its own settings."""


@dataclass(frozen=True)
class Configured:
    """Where Prefect's API is, as Prefect itself resolves it, and which setting says so."""

    url: str
    source: str

    @property
    def shown(self) -> str:
        """The URL as it may be printed."""
        return without_login(self.url)


def without_login(url: str) -> str:
    """A URL without the user and password that it may hold: what is printed, and what is kept.

    >>> without_login("https://ann:secret@prefect.example/api")
    'https://prefect.example/api'
    """
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def configured() -> Configured | None:
    """The API that Prefect's own settings name: environment, .env, prefect.toml, pyproject.toml or the profile in use.

    None where none names one. Raises PrefectSettingsError where Prefect cannot read them.
    """
    from pydantic import ValidationError

    try:
        Path.home()
    except RuntimeError as error:  # Prefect would say it in a line of its own as well
        raise PrefectSettingsError(
            f"Prefect keeps its settings in the user's home folder, and the user {os.getuid()} has none: set HOME"
        ) from error
    try:
        from prefect.context import get_settings_context
        from prefect.settings import PREFECT_API_URL

        context = get_settings_context()
        url = context.settings.api.url
    except Exception as error:  # whatever Prefect raises over a file of its settings
        text = str(error).strip().splitlines()
        why = f"{type(error).__name__}: {text[0] if text else ''}"
        if isinstance(error, ValidationError):  # what was set is left out: it may be a key
            wrong = [f for f in error.errors(include_input=False) if f["type"] != "default_factory_not_called"]
            why = "; ".join(": ".join(filter(None, (".".join(map(str, f["loc"])), f["msg"]))) for f in wrong[:3]) or why
        raise PrefectSettingsError(
            f"Prefect cannot read its settings ({why}); see `prefect config view` and PREFECT_PROFILES_PATH"
        ) from error
    if not url:
        return None
    found = Configured(url, _source(PREFECT_API_URL in context.profile.settings, context.profile.name))
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or re.search(r"[\s\"']", url):
        raise PrefectSettingsError(
            f"Prefect's API is {found.shown!r} ({found.source}), which is no address; write it as "
            "http://host:4200/api, without quotes or blanks"
        )
    reach_directly(lambda: url, os.environ)
    return found


def _source(of_profile: bool, profile: str) -> str:
    """Which setting names the API."""
    if os.environ.get("PREFECT_API_URL"):
        return "PREFECT_API_URL"
    for name in (".env", "prefect.toml", "pyproject.toml"):
        if _names_url(Path(name)):
            return name
    return f"the Prefect profile {profile!r}" if of_profile else "Prefect's settings"


def _names_url(path: Path) -> bool:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".toml":
            return bool(re.search(r"^\s*(?:export\s+)?PREFECT_API_URL\s*=", text, re.MULTILINE | re.IGNORECASE))
        tree: Any = tomllib.loads(text)
    except (OSError, ValueError):
        return False
    if path.name == "pyproject.toml":
        tree = tree.get("tool", {}).get("prefect", {})
    return isinstance(tree, dict) and isinstance(tree.get("api"), dict) and bool(tree["api"].get("url"))


def why_not(found: Configured) -> str:
    """Why work that needs Prefect cannot be done there, with the mend; empty where it can."""
    url = found.shown.rstrip("/")
    try:
        with Client.open(url=None, patience_s=BUSY_S) as client:
            client.check()
    except Refused as error:
        return f"Prefect at {url} ({found.source}) refuses: {error}"
    except Gone as error:
        return f"nothing answers at {url} ({found.source})" + (without_api(found) or f": {error}")
    return ""


def without_api(found: Configured) -> str:
    """What to say of an address that lacks its end, where a server answers at the whole one; empty otherwise."""
    if found.url.rstrip("/").endswith("/api") or not answers(f"{found.url.rstrip('/')}/api"):
        return ""
    return f", but a server does at {found.shown.rstrip('/')}/api: set that"


def answers(url: str | None = None, timeout_s: float = 2.0) -> bool:
    """True where a Prefect API answers at this URL (…/api; None: the one that Prefect's settings name), asked as
    Prefect's own client asks: with what its settings say of authorities and headers.
    """
    try:
        with Client.open(url) as client:
            client.call(lambda: client.inner._client.get("/health", timeout=timeout_s).raise_for_status())
    except (Gone, Refused):
        return False
    return True


def _login_form() -> str:
    """What PREFECT_API_AUTH_STRING should look like, where it does not; never its value."""
    said = os.environ.get("PREFECT_API_AUTH_STRING", "")
    if not said or (":" in said and said.strip(" \t\r\n\"'") == said):
        return ""
    return " (PREFECT_API_AUTH_STRING is user:password as the server has it, without quotes, blanks or a line's end)"


_NO_HEADER = (
    "the API key, the login or a header holds what no header can, such as a line's end: take it out of "
    "PREFECT_API_KEY, PREFECT_API_AUTH_STRING or PREFECT_CLIENT_CUSTOM_HEADERS"
)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def _tls(what: str) -> str:
    """What to do where no connection by TLS comes about; empty where it is another thing."""
    if "CERTIFICATE_VERIFY_FAILED" in what:
        return "; a server with a certificate of your own authority needs its file in PREFECT_API_SSL_CERT_FILE"
    if "WRONG_VERSION_NUMBER" in what:
        return "; the server speaks no TLS at that port: write http://"
    return ""


# --- the client -----------------------------------------------------------------------------------------------


@dataclass
class Client:
    """Prefect's own client with a deadline for each request and no retries of its own: who calls comes again.

    Every method raises Gone, Lost or Refused, and nothing else of Prefect's. ``patience_s``: for who does not come
    again, how long a server that is busy is asked again.
    """

    inner: SyncPrefectClient
    url: str
    """As it may be printed."""
    _close: Callable[[], None]
    patience_s: float = 0.0
    heard: Callable[[], None] = lambda: None
    """Called at each answer, also that it is busy."""
    _moved: tuple[str, str] | None = None
    """Of the request that is made: as it was asked, and where the server sent it on to at last."""

    @classmethod
    @contextlib.contextmanager
    def open(cls, url: str | None, *, patience_s: float = 0.0) -> Iterator[Client]:
        """A client for one block, in this thread."""
        client = cls.connect(url)
        client.patience_s = patience_s
        try:
            yield client
        finally:
            client.close()

    @classmethod
    def connect(cls, url: str | None) -> Client:
        """A client of the server at a URL, or (None) of the one that Prefect's settings name. Sends nothing."""
        import httpx
        from prefect.client.orchestration import SyncPrefectClient, get_client
        from prefect.context import SettingsContext, get_settings_context
        from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES

        known = get_settings_context()
        updates: Any = {PREFECT_CLIENT_MAX_RETRIES: 0, **({PREFECT_API_URL: url} if url else {})}
        quick = known.settings.copy_with_update(updates=updates)
        context = SettingsContext(profile=known.profile, settings=quick)
        context.__enter__()  # of this thread alone
        settings: dict[str, Any] = {"timeout": httpx.Timeout(TIMEOUT_S)}
        try:
            inner = SyncPrefectClient(url, httpx_settings=settings) if url else get_client(settings, sync_client=True)
        except (UnicodeEncodeError, OSError, httpx.InvalidURL) as error:
            context.__exit__(None, None, None)
            if isinstance(error, UnicodeEncodeError):
                mend = _NO_HEADER
            elif isinstance(error, OSError):
                path = known.settings.api.ssl_cert_file
                named = bool(os.environ.get("PREFECT_API_SSL_CERT_FILE")) or path != os.environ.get("SSL_CERT_FILE")
                mend = (
                    f"{'PREFECT_API_' if named else ''}SSL_CERT_FILE is {path!r}, which cannot be used "
                    f"({error.strerror or error}): name a file with the certificates of your authority, or unset it"
                )
            else:  # its own address is one: `configured`
                mend = (
                    f"a proxy is no address ({error}): write HTTP_PROXY, HTTPS_PROXY and ALL_PROXY as http://host:port"
                )
            raise Refused(mend) from error
        made = cls(inner, without_login(str(inner.api_url)).rstrip("/"), lambda: context.__exit__(None, None, None))
        hooks = inner._client.event_hooks
        inner._client.event_hooks = {**hooks, "response": [*hooks["response"], made._see_moved]}
        return made

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.inner._client.close()
        self._close()

    def call(self, work: Callable[[], T]) -> T:
        """What Prefect's own client gives; what it raises, sorted."""
        deadline = time.monotonic() + self.patience_s
        while True:
            try:
                found = self._sorted(work)
                self.heard()
                return found
            except (Busy, Slow) as error:
                if isinstance(error, Busy):
                    self.heard()
                if time.monotonic() >= deadline:
                    raise
                time.sleep(BUSY_PAUSE_S)

    def _sorted(self, work: Callable[[], T]) -> T:
        import httpx
        from prefect.exceptions import ObjectNotFound

        self._moved = None
        try:
            return work()
        except ObjectNotFound as error:
            raise self._unknown(getattr(error.http_exc, "response", None)) from error
        except httpx.HTTPStatusError as error:
            code = error.response.status_code
            if code in (401, 403):
                raise Refused(
                    f"{code}: the API key or password is not accepted; see PREFECT_API_KEY, PREFECT_API_AUTH_STRING "
                    f"and `prefect cloud login`{_login_form()}{self._moved_to()}"
                ) from error
            if code in (404, 410):
                raise self._unknown(error.response) from error
            if code == 503:
                raise Busy(f"{self.url} answers {code}") from error
            if code >= 500 or code in (408, 429):
                gone = Gone(f"{self.url} answers {code}{' (too many requests)' if code == 429 else ''}")
                with contextlib.suppress(KeyError, ValueError):  # it may be a date
                    gone.after_s = min(max(float(error.response.headers["Retry-After"]), 0.0), AFTER_MOST_S)
                raise gone from error
            older = self._older() if code == 422 else ""
            raise Refused(f"{code}: {error.response.text[:300]}{older}{self._moved_to()}") from error
        except httpx.ReadTimeout as error:
            raise Slow(f"no answer at {self.url} within {TIMEOUT_S:.0f} s") from error
        except httpx.LocalProtocolError:  # what is sent does not hold; its words show the key
            raise Refused(_NO_HEADER) from None
        except (httpx.RequestError, httpx.InvalidURL) as error:  # also a loop of addresses, and one that is none
            what = str(error) or type(error).__name__
            raise Gone(f"no answer at {self.url}: {what}{_tls(what)}{self._moved_to()}") from error
        except ValueError as error:  # a gateway's page of HTML where JSON should be
            raise Gone(f"{self.url} does not answer as Prefect does: {str(error)[:120]}{self._moved_to()}") from error

    def _unknown(self, reply: httpx.Response | None) -> Gone:
        """What a 404 stands for: Prefect says what it does not know, a proxy that has no server has words of its own,
        of which some are JSON (Kong's).
        """
        said: Any = None
        with contextlib.suppress(ValueError, AttributeError):
            said = reply.json()  # type: ignore[union-attr]
        if reply is None or (isinstance(said, dict) and said.keys() & {"detail", "exception_message"}):
            code = "" if reply is None else f"{reply.status_code}: "
            return Lost(f"{code}it does not know what it was told before{self._moved_to()}")
        return Gone(
            f"{self.url} answers {reply.status_code} as Prefect does not: {reply.text.strip()[:80]!r}{self._moved_to()}"
        )

    def _see_moved(self, reply: httpx.Response) -> None:
        if reply.has_redirect_location:
            asked = str(reply.request.url)
            first = self._moved[0] if self._moved and self._moved[1] == asked else asked
            self._moved = first, urljoin(asked, reply.headers["location"])

    def _moved_to(self) -> str:
        """The mend where requests are sent on to another address, which is followed: what is created there is only
        asked for then; empty where they are not."""
        if self._moved is None:
            return ""
        asked, told = (without_login(url).partition("?")[0] for url in self._moved)
        end = asked.removeprefix(self.url)
        if told == asked:
            return "; requests are sent on to the same address again: look at the proxy's rules for http and https"
        if told.endswith(end):
            return f"; requests are sent on to {told.removesuffix(end)}: set that as PREFECT_API_URL"
        return (
            f"; requests are sent on to {told[:200]}, as for people who have to log in: name an address for programs, "
            "or what lets them pass in PREFECT_CLIENT_CUSTOM_HEADERS"
        )

    def _older(self) -> str:
        """What to say where the server is of an older version than this client, and so does not know all that it
        sends; empty where it is not, or does not tell.
        """
        from importlib.metadata import version

        ours, theirs = version("prefect"), ""
        with contextlib.suppress(Exception):
            theirs = str(self.inner._client.get("/admin/version", timeout=2.0).json())
        if not re.match(r"\d+\.\d+\.\d+", theirs) or _numbers(theirs) >= _numbers(ours):
            return ""
        return (
            f"; the server is Prefect {theirs} and this is {ours}, which says what older ones do not know: upgrade it"
        )

    def check(self) -> None:
        """An answer that needs the credentials. Gone, not Lost, where there is no such API."""
        with self._no_api():
            self.send("POST", "/flows/count", {})

    @contextlib.contextmanager
    def _no_api(self) -> Iterator[None]:
        """Where nothing was told before: 404 says that the address is another one's."""
        try:
            yield
        except Lost as error:
            raise Gone(
                f"{self.url} answers 404, so Prefect's API is not there: it is below what the server's "
                "PREFECT_SERVER_API_BASE_PATH and a proxy's rules say, /api by itself"
            ) from error

    def page_of(self, flow_run: str) -> str:
        """Where a browser finds the flow run."""
        from prefect.utilities.urls import url_for

        known = without_login(url_for("flow-run", obj_id=flow_run) or "")
        base = self.url.removesuffix("/api")
        if known and not known.startswith(base):
            return known  # Cloud, or PREFECT_UI_URL
        below = urlsplit(base).path  # where the server serves its pages, what a proxy takes away, or the API's alone
        for root in dict.fromkeys((base, base.removesuffix(below))):
            with contextlib.suppress(Exception):  # an older server has one page only
                told = self.inner._client.get(f"{root}/ui-settings", timeout=2.0).json()
                prefix = told["v2_base_url" if told["default_ui"] == "v2" else "v1_base_url"].rstrip("/")
                if root == base and below and f"{prefix}/".startswith(f"{below}/"):
                    prefix = prefix.removeprefix(below)
                return f"{root}{prefix}/runs/flow-run/{flow_run}"
        return f"{base}/runs/flow-run/{flow_run}"

    def has_flow_run(self, flow_run: str) -> bool:
        try:
            self.call(lambda: self.inner.read_flow_run(UUID(flow_run)))
        except Lost:
            return False
        return True

    def state_of(self, flow_run: str) -> str:
        """The type of the flow run's state, such as RUNNING or CANCELLING; empty where it has none."""
        state = self.call(lambda: self.inner.read_flow_run(UUID(flow_run))).state
        return str(state.type.value) if state is not None else ""

    def open_flow_runs(self, states: Sequence[str], name: str = "") -> list[tuple[str, str, str]]:
        """(id, name, mark) of runs of the flows that train, in these states, the newest 200; with this name alone."""
        of_name = {"name": {"any_": [name]}} if name else {}
        body = {
            "flows": {"name": {"any_": [TRAIN_FLOW, SWEEP_FLOW]}},
            "flow_runs": {"state": {"type": {"any_": list(states)}}, **of_name},
            "sort": "EXPECTED_START_TIME_DESC",
            "limit": 200,
        }
        rows = self.send("POST", "/flow_runs/filter", body).json()
        return [(str(row["id"]), str(row["name"]), str(row.get("infrastructure_pid") or "")) for row in rows]

    def mark(self, flow_run: str, text: str) -> None:
        """Say which process is behind a flow run, in Prefect's field for that."""
        self.call(lambda: self.inner.update_flow_run(UUID(flow_run), infrastructure_pid=text))

    def mark_of(self, flow_run: str) -> str:
        """What was said of that; empty where nothing was."""
        found = self.call(lambda: self.inner.read_flow_run(UUID(flow_run))).infrastructure_pid
        return str(found or "")

    def create_flow_run(self, name: str, parameters: dict[str, Any]) -> str:
        """A flow run of the flow `train` that this process hosts: the server knows a flow by its name alone.

        It is Running from its first moment: set later, that state could undo a cancel that came before.
        """
        from prefect import Flow
        from prefect.states import Running

        flow = Flow(_hosted, name=TRAIN_FLOW)
        make = partial(self.inner.create_flow_run, flow, parameters=parameters, name=name, state=Running())
        with self._no_api():
            return str(self.call(make).id)

    def rename_flow_run(self, flow_run: str, name: str, parameters: dict[str, Any]) -> None:
        self.call(lambda: self.inner.update_flow_run(UUID(flow_run), name=name, parameters=parameters))

    def set_state(self, flow_run: str, kind: str, name: str, message: str) -> None:
        from prefect.client.schemas.objects import State, StateType

        state: Any = State(type=StateType(kind), name=name, message=message)
        self.call(lambda: self.inner.set_flow_run_state(UUID(flow_run), state, force=True))

    def renew_lease(self, flow_run: str) -> None:
        """Keep the flow run's place in its deployment's concurrency limit; nothing where it has none, or lost it."""
        found = self.call(lambda: self.inner.read_flow_run(UUID(flow_run)))
        lease = found.state.state_details.deployment_concurrency_lease_id if found.state is not None else None
        if lease is not None:
            with contextlib.suppress(Lost):
                self.call(lambda: self.inner.renew_concurrency_lease(lease_id=lease, lease_duration=LEASE_S))

    # --- what the page shows ------------------------------------------------------------------------------

    def send(self, method: str, path: str, body: Any = None) -> Any:
        """A request of Prefect's API that its client has no verb for, or one that hides the answer; the answer."""

        def send() -> Any:
            reply = self.inner._client.request(method, path, json=body).raise_for_status()
            if "html" in reply.headers.get("content-type", ""):
                raise ValueError("a page of HTML where Prefect's answer should be")
            return reply

        return self.call(send)

    def create_logs(self, flow_run: str, lines: Sequence[tuple[float, int, str]]) -> None:
        """Lines of (Unix seconds, level, text) for the flow run's log."""
        body = [
            {
                "name": "hotstage",
                "level": level,
                "message": text[:20000] or " ",
                "timestamp": _stamp(at),
                "flow_run_id": flow_run,
            }
            for at, level, text in lines
        ]
        self.send("POST", "/logs/", body)

    def create_artifact(self, flow_run: str, key: str, kind: str, data: Any, text: str) -> str:
        body = {"key": key, "type": kind, "data": data, "description": text, "flow_run_id": flow_run}
        return str(self.send("POST", "/artifacts/", body).json()["id"])

    def update_artifact(self, artifact: str, data: Any, text: str) -> None:
        body = {"data": data, "description": text}
        self.send("PATCH", f"/artifacts/{artifact}", body)

    def task_events(
        self,
        flow_run: str,
        task: UUID,
        key: str,
        name: str,
        states: Sequence[tuple[str, str, str, float]],
        told: int,
    ) -> list[dict[str, Any]]:
        """The events that Prefect's own tasks send at each new state (type, name, message, Unix seconds).

        Unlike a request, an event says when it was, so that a page that is brought up later has true times.
        """
        began = states[0][3]
        out = []
        for kind, word, message, at in states[told:]:
            row: dict[str, Any] = {
                "name": name,
                "task_key": key,
                "dynamic_key": "0",
                "run_count": 1,
                "flow_run_run_count": 1,
                "tags": [],
                "task_inputs": {},
                "expected_start_time": _stamp(began),
                "start_time": _stamp(began),
            }
            if kind != "RUNNING":
                row |= {"end_time": _stamp(at), "total_run_time": max(at - began, 0.0)}
            out.append(
                {
                    "id": str(uuid4()),
                    "occurred": _stamp(at),
                    "event": f"prefect.task-run.{word}",
                    "resource": {
                        "prefect.resource.id": f"prefect.task-run.{task}",
                        "prefect.resource.name": name,
                        "prefect.run-count": "1",
                        "prefect.state-message": message,
                        "prefect.state-name": word,
                        "prefect.state-timestamp": _stamp(at),
                        "prefect.state-type": kind,
                        "prefect.orchestration": "client",
                    },
                    "related": [
                        {"prefect.resource.id": f"prefect.flow-run.{flow_run}", "prefect.resource.role": "flow-run"}
                    ],
                    "payload": {
                        "intended": {"from": None, "to": kind},
                        "initial_state": None,
                        "validated_state": {
                            "type": kind,
                            "name": word,
                            "message": message,
                            "state_details": {},
                            "data": None,
                        },
                        "task_run": row,
                    },
                }
            )
        return out

    def post_events(self, events: list[dict[str, Any]]) -> None:
        self.send("POST", "/events", events)


def _time(at: float) -> datetime:
    return datetime.fromtimestamp(at, UTC)


def _stamp(at: float) -> str:
    return _time(at).isoformat()
