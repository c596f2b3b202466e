"""Notifications: automations of a real Prefect server, which calls a webhook of this test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from prefect.blocks.webhook import Webhook
from prefect.schedules import Interval
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.deployments import scheduled
from flows.prefect_api import Client, Refused
from flows.recurring.deployments import Deployments
from flows.recurring.notify import OCCASIONS, USUAL, Notice, automation, make_automations
from tests.flows.conftest import Api, registered
from tests.support.place import ROOT
from tests.support.wait import wait_for
from trainer.spec import load_spec

SPEC = load_spec(ROOT / "examples" / "demo.toml", [])


@pytest.fixture
def heard() -> Iterator[tuple[str, list[str]]]:
    """A webhook's address, and the messages that it got."""
    got: list[str] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(self.rfile.read(int(self.headers["content-length"])).decode())
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/hook", got
    server.shutdown()
    thread.join()
    server.server_close()


def test_who_is_named_hears_of_a_run_that_gave_up(prefect: Api, heard: tuple[str, list[str]]) -> None:
    address, got = heard
    name = "heard"
    with temporary_settings({PREFECT_API_URL: prefect.server.api}), Client.open(None, patience_s=30.0) as client:
        hook = Webhook(method="POST", url=address)
        client.call(lambda: hook.save("team", overwrite=True, _sync=True))  # type: ignore[call-arg]
        when = Interval(timedelta(days=300))
        made = registered(client, scheduled(SPEC, "file:///nowhere", "out", when, name, "seldom"))
        with pytest.raises(Refused, match="no block slack-webhook/nobody"):
            make_automations(client, made, name, [Notice("slack-webhook/nobody")])
        assert make_automations(client, made, name, [Notice("webhook/team")]) == len(USUAL)
        asked = prefect.tell(f"deployments/{made}/create_flow_run", {"name": "heard-20260301t020000"})
        client.set_state(asked["id"], "FAILED", "Failed", 'run heard gave up: "nothing" helps')
        wait_for(lambda: got, "the message", 60, 0.1)
        said = "\n".join(got)
        assert "hotstage: heard-20260301t020000 gave up or failed" in said
        assert f"/runs/flow-run/{asked['id']}" in said
        owned = [a for a in prefect.ask("automations/filter", {}) if a["name"].startswith(f"{name}: ")]
        assert {a["name"] for a in owned} == {f"{name}: {on} → webhook/team" for on in USUAL}
        registered(client, scheduled(SPEC, "file:///nowhere", "out", when, name, "seldom"))  # without any now
        assert not [a for a in prefect.ask("automations/filter", {}) if a["name"].startswith(f"{name}: ")]
        Deployments(client).remove(made)


@pytest.mark.parametrize(
    ("notice", "words"),
    [
        (Notice("slack"), "write it as TYPE/NAME"),
        (Notice("a/b/c"), "write it as TYPE/NAME"),
        (Notice("slack-webhook/team", ("fail",)), "'fail' is unknown; take some of failed, crashed"),
    ],
)
def test_what_is_no_notice_is_refused(notice: Notice, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        notice.check()


@pytest.mark.parametrize("name", OCCASIONS)
def test_prefect_takes_every_automation(name: str) -> None:
    """By its own schema, with the templates in it."""
    from uuid import UUID

    from prefect.server.events.schemas.automations import AutomationCreate

    for block in ("webhook/ci", "slack-webhook/team"):
        made = automation(UUID(int=1), "nightly", name, block, str(UUID(int=2)))
        assert AutomationCreate.model_validate(made).name == f"nightly: {name} → {block}"
