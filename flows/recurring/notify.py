"""Who hears of a schedule's runs: Prefect automations, made with the deployment that they belong to.

They are the deployment's own: registering it again replaces them, removing it takes them away. Where a message goes is
a block of the Prefect server (``slack-webhook/team``, ``email…``, ``webhook/…``): no address is kept here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from flows.prefect_api import Client, Lost, Refused


@dataclass(frozen=True)
class Occasion:
    """What a person may want to hear of: Prefect's event, and words for the message's subject."""

    event: str
    words: str


OCCASIONS: Mapping[str, Occasion] = {
    "failed": Occasion("prefect.flow-run.Failed", "gave up or failed"),
    "crashed": Occasion("prefect.flow-run.Crashed", "lost its process"),
    "cancelled": Occasion("prefect.flow-run.Cancelled", "was cancelled or skipped"),
    "late": Occasion("prefect.flow-run.Late", "is late: nothing has started it"),
    "completed": Occasion("prefect.flow-run.Completed", "has completed"),
    "unserved": Occasion("prefect.deployment.not-ready", "is served by nobody"),
}
USUAL = ("failed", "crashed", "late", "unserved")
WEBHOOK = "webhook"
_RUN_BODY = """\
{{ flow_run.name }} of {{ deployment.name }}: {{ flow_run.state.name }}
{{ flow_run.state.message }}
"""
_DEPLOYMENT_BODY = """\
No process has asked for firings of {{ deployment.name }} for a minute: start `hotstage schedule` again.
"""


@dataclass(frozen=True)
class Notice:
    """``block``: type and name of a block of Prefect's, ``slack-webhook/team``; ``on``: names of `OCCASIONS`."""

    block: str
    on: tuple[str, ...] = USUAL

    def check(self) -> None:
        """ValueError where it is none."""
        if self.block.count("/") != 1 or not all(self.block.split("/")):
            raise ValueError(
                f"--notify {self.block!r} is no block of Prefect's; write it as TYPE/NAME, slack-webhook/team"
            )
        for name in self.on:
            if name not in OCCASIONS:
                raise ValueError(f"--notify-on {name!r} is unknown; take some of {', '.join(OCCASIONS)}")


def make_automations(client: Client, deployment: UUID, title: str, notices: Iterable[Notice]) -> int:
    """Make the automations of a deployment that was just registered, without any yet; how many. Refused where a block
    is not there.
    """
    made, placeholder = 0, str(UUID(int=0))
    page = client.page_of(placeholder).replace(placeholder, "{{ flow_run.id }}")
    for notice in notices:
        block = _block(client, notice.block)
        for name in notice.on:
            body = automation(deployment, title, name, notice.block, block, page)
            client.send("POST", "/automations/", body)
            made += 1
    return made


def _block(client: Client, name: str) -> str:
    kind, _, own = name.partition("/")
    try:
        found = client.send("GET", f"/block_types/slug/{kind}/block_documents/name/{own}", None)
    except Lost:
        raise Refused(
            f"it has no block {name}: make one on its page under Blocks, or in Python (prefect.blocks.notifications), "
            "and name it as TYPE/NAME"
        ) from None
    return str(found.json()["id"])


def automation(deployment: UUID, title: str, name: str, block_name: str, block: str, page: str = "") -> dict[str, Any]:
    """An automation as Prefect's API takes it. ``page``: where a browser finds the flow run."""
    occasion, of = OCCASIONS[name], f"prefect.deployment.{deployment}"
    of_runs = occasion.event.startswith("prefect.flow-run.")
    match: dict[str, Any] = {"match": {"prefect.resource.id": "prefect.flow-run.*" if of_runs else of}}
    if of_runs:
        match["match_related"] = {"prefect.resource.role": "deployment", "prefect.resource.id": of}
    subject = f"hotstage: {'{{ flow_run.name }}' if of_runs else title} {occasion.words}"
    text = _RUN_BODY + page if of_runs else _DEPLOYMENT_BODY
    told = {"block_document_id": block}
    if block_name.startswith(f"{WEBHOOK}/"):
        action = {"type": "call-webhook", **told, "payload": f"{subject}\n{text}"}
    else:
        action = {"type": "send-notification", **told, "subject": subject, "body": text}
    return {
        "name": f"{title}: {name} → {block_name}",
        "description": f"Tells {block_name} when {'a run of ' if of_runs else ''}{title} {occasion.words}.",
        "enabled": True,
        "trigger": {
            "type": "event",
            **match,
            "expect": [occasion.event],
            "for_each": ["prefect.resource.id"],
            "posture": "Reactive",
            "threshold": 1,
            "within": 0,
        },
        "actions": [action],
        "owner_resource": of,
    }
