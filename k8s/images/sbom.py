"""What is in an image, as SPDX 2.3 JSON. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

from k8s.images.static import ZIG

Package = dict[str, Any]


def engine_sbom(version: str, binary: Path, epoch: int) -> str:
    """The engine's binary, the C library in it, and the compiler that made it."""
    digest = hashlib.sha256(binary.read_bytes()).hexdigest()
    engine = _package(
        "hotstage-engine", version, "Apache-2.0", checksums=[{"algorithm": "SHA256", "checksumValue": digest}]
    )
    musl = _package("musl", f"of-ziglang-{ZIG}", "MIT")
    zig = _package("ziglang", ZIG, "MIT", purl=f"pkg:pypi/ziglang@{ZIG}")
    relations = [
        _relation("SPDXRef-DOCUMENT", "DESCRIBES", engine),
        _relation(engine["SPDXID"], "STATIC_LINK", musl),
        _relation(zig["SPDXID"], "BUILD_TOOL_OF", engine),
    ]
    return _document("hotstage-engine", version, [engine, musl, zig], relations, epoch)


def store_sbom(version: str, binary: Path, epoch: int) -> str:
    """The S3 server's binary, by the Go module that it is built from (the binary lists those in it: go version -m)."""
    digest = hashlib.sha256(binary.read_bytes()).hexdigest()
    server = _package(
        "versitygw",
        version,
        "Apache-2.0",
        purl=f"pkg:golang/github.com/versity/versitygw@{version}",
        checksums=[{"algorithm": "SHA256", "checksumValue": digest}],
    )
    return _document("versitygw", version, [server], [_relation("SPDXRef-DOCUMENT", "DESCRIBES", server)], epoch)


def python_sbom(name: str, version: str, base: str, installed: Sequence[Distribution], epoch: int) -> str:
    """An image on a Python base: the project, the base, and each package from the registry."""
    own = _package(name, version, "Apache-2.0")
    below = _package("base-image", base, "NOASSERTION")
    packages, relations = [own, below], [_relation("SPDXRef-DOCUMENT", "DESCRIBES", own)]
    relations.append(_relation(own["SPDXID"], "DEPENDS_ON", below))
    for each in installed:
        meta = each.metadata
        fields = dict(meta.items())  # type: ignore[attr-defined]  # an email.message, by its documentation
        licence = fields.get("License-Expression") or _spdx(fields.get("License", ""))
        packages.append(
            _package(meta["Name"], each.version, licence, purl=f"pkg:pypi/{meta['Name'].lower()}@{each.version}")
        )
        relations.append(_relation(own["SPDXID"], "DEPENDS_ON", packages[-1]))
    return _document(name, version, packages, relations, epoch)


_LICENCES = {
    "mit": "MIT",
    "mit license": "MIT",
    "apache 2.0": "Apache-2.0",
    "apache-2.0": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "bsd": "BSD-3-Clause",
    "bsd-3-clause": "BSD-3-Clause",
    "dual license": "Apache-2.0 OR BSD-3-Clause",
}


def _spdx(words: str) -> str:
    """A free-form licence field as an SPDX expression, where it is one of the usual."""
    return _LICENCES.get(words.strip().lower(), "NOASSERTION")


def _package(
    name: str, version: str, licence: str, *, purl: str = "", checksums: Sequence[Mapping[str, str]] = ()
) -> Package:
    package: Package = {
        "SPDXID": f"SPDXRef-{''.join(c if c.isalnum() or c in '.-' else '-' for c in name)}",
        "name": name,
        "versionInfo": version,
        "downloadLocation": "NOASSERTION",
        "filesAnalyzed": False,
        "licenseConcluded": "NOASSERTION",
        "licenseDeclared": licence,
        "copyrightText": "NOASSERTION",
    }
    if purl:
        package["externalRefs"] = [
            {"referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl", "referenceLocator": purl}
        ]
    if checksums:
        package["checksums"] = [dict(each) for each in checksums]
    return package


def _relation(first: str, kind: str, second: Package) -> dict[str, str]:
    return {"spdxElementId": first, "relationshipType": kind, "relatedSpdxElement": second["SPDXID"]}


def _document(
    name: str, version: str, packages: Sequence[Package], relations: Sequence[Mapping[str, str]], epoch: int
) -> str:
    content = hashlib.sha256(json.dumps([packages, relations], sort_keys=True).encode()).hexdigest()
    created = datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    value = {
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": f"{name}-{version}",
        "documentNamespace": f"https://hotstage.dev/spdx/{name}-{version}-{content[:16]}",
        "creationInfo": {"created": created, "creators": ["Tool: hotstage-k8s.images"]},
        "packages": packages,
        "relationships": relations,
    }
    return json.dumps(value, indent=1, sort_keys=True) + "\n"
