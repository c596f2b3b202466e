"""Whether what ``launch`` of a spec names is what the API server takes for objects, labels, taints, images. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from k8s.labels import QUEUE
from trainer.errors import LaunchRefused
from trainer.spec import RunSpec
from trainer.spec_fields import shown

_OBJECT = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?\Z")
_LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?\Z")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?\Z")
_VALUE_RULE = "at most 63 letters, digits and inner - _ ."
_OBJECTS = ("service_account", "store_secret", "queue", "runtime_class", "priority_class")
"""Keys of ``launch`` that name an object of the cluster."""
_OWN = ("hotstage.dev/", "batch.kubernetes.io/")
_OWN_NAMES = ("app.kubernetes.io/name", "app.kubernetes.io/managed-by", "controller-uid", "job-name", QUEUE)
"""Labels and annotations by which a launch is found again, and its Job's own."""
_OPERATORS = ("Exists", "Equal", "Lt", "Gt")
_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
_TOLERATION = ("key", "operator", "value", "effect", "tolerationSeconds")


def check_names(spec: RunSpec) -> None:
    """LaunchRefused where ``launch`` names what the API server takes for no name."""
    launch = spec.launch
    for key in _OBJECTS:
        value = getattr(launch, key)
        if value and _OBJECT.match(value) is None:
            raise LaunchRefused(
                f"launch.{key} = {shown(value)} is no object's name: lower-case letters and digits, dashes and dots "
                "inside; correct it"
            )
    for key in ("image", "agent_image"):
        check_image(key, getattr(launch, key))
    for key, label in (("spread", launch.spread), *(("node_selector", name) for name in launch.node_selector)):
        if label and _LABEL_KEY.match(label) is None:
            raise LaunchRefused(
                f"launch.{key}: {shown(label)} is no label of a machine; write as kubernetes.io/hostname"
            )
    for name, value in launch.node_selector.items():
        if _LABEL_VALUE.match(value) is None:
            raise LaunchRefused(
                f"launch.node_selector.{name} = {shown(value)} is no label's value: {_VALUE_RULE}; correct it"
            )
    for key in ("labels", "annotations"):
        for name, value in getattr(launch, key).items():
            _check_mark(key, name, value)
    for number, toleration in enumerate(launch.tolerations):
        _check_toleration(f"launch.tolerations[{number}]", toleration)


def _check_mark(key: str, name: str, value: str) -> None:
    """LaunchRefused where a label or an annotation of the user's is none, or hotstage's or Kubernetes' own."""
    what = "label" if key == "labels" else "annotation"
    # the API server looks at an annotation's key in lower case
    if _LABEL_KEY.match(name if key == "labels" else name.lower()) is None:
        raise LaunchRefused(f"launch.{key}: {shown(name)} is no {what}'s name; write as example.com/team")
    if name == QUEUE:
        raise LaunchRefused(f"launch.{key}: {name} is launch.queue here; write it there")
    if name.startswith(_OWN) or name in _OWN_NAMES:
        raise LaunchRefused(f"launch.{key}: {name} is set by hotstage or Kubernetes itself; take it out")
    if key == "labels" and _LABEL_VALUE.match(value) is None:
        raise LaunchRefused(
            f"launch.labels.{name} = {shown(value)} is no label's value: {_VALUE_RULE}; correct it, or make it an "
            "annotation (launch.annotations), which may be any text"
        )


def check_image(key: str, image: Any) -> None:
    """LaunchRefused where ``launch.<key>`` is no name of an image."""
    if not isinstance(image, str) or re.search(r"\s|://", image):
        raise LaunchRefused(f"launch.{key} = {shown(image)} is no image; write for example registry/name:tag")
    first, slash, rest = image.partition("@")[0].partition("/")
    path = re.sub(r":[^/:]*\Z", "", rest if slash else first)
    if path != path.lower():
        raise LaunchRefused(
            f"launch.{key} = {shown(image)} is no image: {path} is written in lower case, capitals may stand in a tag"
        )


def _check_toleration(where: str, given: Mapping[str, Any]) -> None:
    key, operator, value, effect = (given.get(name) or "" for name in _TOLERATION[:4])
    unknown = sorted(given.keys() - set(_TOLERATION))
    why = ""
    if unknown:
        why = f"has the key {shown(unknown[0])}; there are {', '.join(_TOLERATION)}"
    elif operator and operator not in _OPERATORS:
        why = f"has the operator {shown(operator)}; take one of {', '.join(_OPERATORS)}"
    elif effect and effect not in _EFFECTS:
        why = f"has the effect {shown(effect)}; take one of {', '.join(_EFFECTS)}"
    elif not isinstance(key, str) or (key and _LABEL_KEY.match(key) is None):
        why = f"has the key {shown(key)}, which no taint has; write as nvidia.com/gpu"
    elif not key and operator != "Exists":
        why = 'has no key; name one, or bear all taints by operator = "Exists"'
    elif operator == "Exists" and value:
        why = f'has the value {shown(value)} with operator "Exists"; leave one of them out'
    elif not isinstance(value, str) or _LABEL_VALUE.match(value) is None:
        why = f"has the value {shown(value)}: it is {_VALUE_RULE}, in quotes"
    elif given.get("tolerationSeconds") is not None and effect != "NoExecute":
        why = 'has tolerationSeconds, which goes with effect = "NoExecute" alone; leave one of them out'
    if why:
        raise LaunchRefused(f"{where} {why}")
