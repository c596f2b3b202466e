"""The test cluster for a person: ``python -m tests.cluster up|down|status|kubectl …|build|preflight``."""

from __future__ import annotations

import os
import sys

from tests.cluster.cluster import Cluster, down, given, guard, is_owned, prepare, standing, up
from tests.cluster.host import ClusterError, Ledger, Started
from tests.cluster.preflight import lacks

USAGE = "usage: python -m tests.cluster up | down | status | kubectl ARGS | build | preflight"
CANNOT = 69


def main(args: list[str]) -> int:
    match args:
        case ["up"]:
            there = given() or (standing() if os.geteuid() == 0 and not is_owned() else None) or up()
            print(f"export KUBECONFIG={there.kubeconfig}")
        case ["down"]:
            down()
        case ["status"]:
            return _status()
        case ["kubectl", *rest]:
            there = _there()
            os.execve(there.program[0], [*there.program, *rest], there.environment())
        case ["build"]:
            if given() is None:
                prepare()
        case ["preflight"]:
            return _preflight()
        case ["guard", pid, start]:
            guard(Started(int(pid), int(start)))
        case _:
            print(USAGE, file=sys.stderr)
            return 64
    return 0


def _preflight() -> int:
    """0 where a cluster is given or can be brought up here; CANNOT, with what is missing, where not."""
    missing = [] if os.environ.get("HOTSTAGE_KUBECONFIG") else lacks()
    for line in missing:
        print(f"test cluster: missing here: {line}", file=sys.stderr)
    return CANNOT if missing else 0


def _there() -> Cluster:
    there = given() or standing()
    if there is None:
        raise ClusterError("no test cluster stands here; bring one up with: make cluster-up")
    return there


def _status() -> int:
    there = given()
    ledger = None if there else Ledger.load()
    if there is None and ledger is None:
        print("no test cluster stands here")
        return 1
    for part in ledger.parts.values() if ledger else ():
        print(f"{part.name:22} {part.process.pid:8} {'runs' if part.process.alive() else 'HAS ENDED'}  {part.log}")
    if there is None and (there := standing()) is None:
        print("the cluster does not answer with all its nodes; `make cluster-down` takes it away")
        return 1
    print(there.kubectl("get", "nodes", "-o", "wide"), end="")
    print(f"export KUBECONFIG={there.kubeconfig}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ClusterError as error:
        print(f"test cluster: {error}", file=sys.stderr)
        sys.exit(1)
