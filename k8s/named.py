"""What a pod names and the cluster must have before it starts: volumes' claims, Secrets and ConfigMaps. Pure.

What the API server judges itself when a pod is made (its account, its classes, Pod Security) is not here: a dry run
asks that of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Json = Mapping[str, Any]
Kind = Literal["PersistentVolumeClaim", "Secret", "ConfigMap"]


@dataclass
class Named:
    """``keys``: what must stand in it; ``pulls``: it is for pulling images alone, which may work without it."""

    kind: Kind
    name: str
    keys: set[str] = field(default_factory=set)
    pulls: bool = False


def named_by(pod: Json) -> list[Named]:
    """Each once, without what is optional."""
    found: dict[tuple[Kind, str], Named] = {}
    for one in _all(pod):
        there = found.setdefault((one.kind, one.name), one)
        there.keys |= one.keys
        there.pulls = there.pulls and one.pulls
    return list(found.values())


def _all(pod: Json) -> Iterator[Named]:
    for secret in pod.get("imagePullSecrets") or ():
        yield Named("Secret", str(secret.get("name")), pulls=True)
    for volume in pod.get("volumes") or ():
        if claim := volume.get("persistentVolumeClaim"):
            yield Named("PersistentVolumeClaim", str(claim.get("claimName")))
        for source in (volume, *((volume.get("projected") or {}).get("sources") or ())):
            yield from _source("Secret", source.get("secret"), "secretName" if source is volume else "name")
            yield from _source("ConfigMap", source.get("configMap"), "name")
    for container in (*(pod.get("initContainers") or ()), *(pod.get("containers") or ())):
        for source in container.get("envFrom") or ():
            yield from _source("Secret", source.get("secretRef"), "name")
            yield from _source("ConfigMap", source.get("configMapRef"), "name")
        for variable in container.get("env") or ():
            taken = variable.get("valueFrom") or {}
            yield from _source("Secret", taken.get("secretKeyRef"), "name")
            yield from _source("ConfigMap", taken.get("configMapKeyRef"), "name")


def _source(kind: Kind, said: Json | None, name: str) -> Iterator[Named]:
    if said and not said.get("optional"):
        keys = {said["key"]} if "key" in said else {str(item.get("key")) for item in said.get("items") or ()}
        yield Named(kind, str(said.get(name)), keys)
