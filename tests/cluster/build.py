"""The binary that the test cluster runs, built from Go modules alone, once, into the user's cache folder.

``kube/`` holds one Go program that is etcd, the API server, the controller manager, the scheduler, the kubelet,
kube-proxy, kubectl and CoreDNS, by its first argument. A cold build takes 8 minutes of CPU; the result is keyed by
the module's sums and the source. HOTSTAGE_KUBE names a binary that is used instead.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.support.go import cache, go

SOURCE = Path(__file__).resolve().parent / "kube"
KUBERNETES = "1.35.4"
SAY_EVERY_S = 15.0


def key() -> str:
    """What the binary is made of, as 16 hex digits."""
    digest = hashlib.sha256(KUBERNETES.encode())
    for name in ("go.mod", "go.sum", "main.go"):
        digest.update((SOURCE / name).read_bytes())
    return digest.hexdigest()[:16]


def is_built() -> bool:
    """Whether ``binary`` has nothing to build."""
    return bool(os.environ.get("HOTSTAGE_KUBE")) or (cache() / "kube" / key() / "kube").exists()


def binary() -> Path:
    """The binary; built where the cache lacks it, by one process at a time, with its progress on stderr."""
    named = os.environ.get("HOTSTAGE_KUBE")
    if named:
        return Path(named)
    folder = cache() / "kube" / key()
    found = folder / "kube"
    if found.exists():
        return found
    folder.mkdir(parents=True, exist_ok=True)
    with open(cache() / "kube" / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process builds the cluster's binary: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.exists():
            _build(found)
    return found


def say(text: str) -> None:
    print(f"test cluster: {text}", file=sys.stderr, flush=True)


def _build(target: Path) -> None:
    program = go()
    # nothing of the user's own Go settings but where modules come from and where they are kept
    env = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "", "GOWORK": "off"}
    say(f"building Kubernetes {KUBERNETES}, etcd and CoreDNS from Go modules into {target}")
    say("(about 8 minutes of CPU from an empty cache, once; modules are fetched first)")
    subprocess.run([program, "mod", "download"], cwd=SOURCE, env=env, check=True)
    listed = subprocess.run([program, "list", "-deps", "."], cwd=SOURCE, env=env, check=True, stdout=subprocess.PIPE)
    packages = listed.stdout.count(b"\n")
    version = "k8s.io/component-base/version"
    major, minor, _ = KUBERNETES.split(".")
    stamps = {"gitVersion": f"v{KUBERNETES}", "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
    flags = " ".join(["-s", "-w", *(f"-X {version}.{name}={value}" for name, value in stamps.items())])
    partial = target.with_name(f".kube-{os.getpid()}")
    began = said = time.monotonic()
    done, last = 0, b""
    build = subprocess.Popen(
        [program, "build", "-v", "-trimpath", "-buildvcs=false", "-ldflags", flags, "-o", str(partial), "."],
        cwd=SOURCE,
        env=env,
        stderr=subprocess.PIPE,
        preexec_fn=_background,
    )
    try:
        assert build.stderr is not None
        words: list[bytes] = []
        for line in build.stderr:  # a package a line, as it is compiled; errors among them
            words = [*words[-40:], line]
            done, last = done + 1, line.strip()
            if time.monotonic() - said >= SAY_EVERY_S:
                said = time.monotonic()
                say(f"{done} of at most {packages} packages, {said - began:.0f} s: {last.decode(errors='replace')}")
        if build.wait() != 0:
            raise RuntimeError(f"the cluster's binary does not build:\n{b''.join(words).decode(errors='replace')}")
        os.replace(partial, target)
    finally:
        if build.poll() is None:
            build.terminate()
            build.wait()
        partial.unlink(missing_ok=True)
    say(f"built in {time.monotonic() - began:.0f} s, {target.stat().st_size / 1e6:.0f} MB")


def _background() -> None:
    os.nice(19)
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: a killed test run leaves no build behind


if __name__ == "__main__":
    print(binary())
