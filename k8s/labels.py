"""The labels and names of every object, in one place."""

from __future__ import annotations

import hashlib
import re

from trainer.errors import LaunchRefused

RUN = "hotstage.dev/run"
LAUNCH = "hotstage.dev/launch"
SPEC_DIGEST = "hotstage.dev/spec-digest"
MANAGED_BY = "app.kubernetes.io/managed-by"
NAME = "app.kubernetes.io/name"
MANAGER = "hotstage"
INDEX = "batch.kubernetes.io/job-completion-index"
ENGINE, AGENT = "engine", "agent"
QUEUE = "kueue.x-k8s.io/queue-name"

MAX_LABEL = 63
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\Z")


def object_name(launch: str, nodes: int) -> str:
    """The Job's name: a pod is ``<name>-<index>`` and must stay a DNS label, so longer ones end in a digest."""
    room = MAX_LABEL - 1 - len(str(max(nodes - 1, 0)))
    if len(launch) > room:
        launch = f"{launch[: room - 9].rstrip('-')}-{hashlib.sha256(launch.encode()).hexdigest()[:8]}"
    if not _LABEL.match(launch):
        raise LaunchRefused(
            f"launch name {launch!r} is no DNS label: lower-case letters, digits, inner dashes; change the spec's name"
        )
    return launch


def labels(run: str, launch: str) -> dict[str, str]:
    """The labels that all objects of a launch carry."""
    return {
        NAME: "hotstage-trainer",
        MANAGED_BY: MANAGER,
        RUN: label_value(run),
        LAUNCH: label_value(launch),
    }


def label_value(text: str) -> str:
    """A name as a label's value: at most 63 characters, a longer one ends in a digest."""
    if len(text) <= MAX_LABEL:
        return text
    return f"{text[: MAX_LABEL - 9].rstrip('-')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
