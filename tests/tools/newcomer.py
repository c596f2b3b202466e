"""A newcomer's machine: a bare Debian root with what the README asks for and nothing else, in which a fresh clone of
this project's HEAD runs a command as the README says. What an install step forgot is missing in there.

    python3 -m tests.tools.newcomer [--suite bookworm|trixie] [--cold] [--fresh] [COMMAND...]    (`make test`)
    python3 -m tests.tools.newcomer --able        exits 69, saying why, where this machine cannot do it

Needs root, debootstrap (installed where apt can) and the right to mount; the standard library only. The packages are
those of the README's own `apt-get install` line. The root is kept in the user's cache folder, by suite and packages
(``--fresh`` makes it anew); a command gets an overlay of it with an empty home and an empty cache. Downloads of pip and
of Go are kept between commands, because they replace no step that installs; ``--cold`` goes without them. Mounts are
made in a mount namespace of the command: they end with it, and what still runs in there is killed.

Exits with the command's code; 69: this machine cannot do it.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from trainer.folders import cache_folder

ROOT = Path(__file__).resolve().parents[2]
SUITES = ("bookworm", "trixie")
CANNOT = 69
PATIENCE_S = 60.0  # from an interrupt until what is in there is killed
# settings of this machine that name how it reaches package registries
SETTINGS = re.compile(
    r"PIP_(?!FIND_LINKS)|SSL_|REQUESTS_CA|CURL_CA|GIT_SSL|AWS_CA_BUNDLE|GO(PROXY|FLAGS|.*SUM.*)$|(https?|no)_proxy",
    re.I,
)
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
# $1: the bare root, $2: this command's folder, $3: the project, $4: kept downloads or nothing; then the command
SCRIPT = r"""
lower=$1 run=$2 project=$3 downloads=$4; shift 4
new=$run/root
if ! mount -t overlay overlay -o "lowerdir=$lower,upperdir=$run/up,workdir=$run/work" "$new" 2>/dev/null; then
    cp -a "$lower/." "$new/"
fi
for name in proc sys dev; do mount --rbind "/$name" "$new/$name"; done
if [ -n "$downloads" ]; then
    mkdir -p "$new/var/cache/downloads"
    mount --bind "$downloads" "$new/var/cache/downloads"
fi
cp /etc/resolv.conf /etc/hosts "$new/etc/" 2>/dev/null || true
for file in "$run"/settings/*; do [ -e "$file" ] && cp "$file" "$new/etc/"; done
[ -e "$run/certificates" ] && cp "$run/certificates" "$new/etc/ssl/certs/ca-certificates.crt"
git -c safe.directory='*' clone -q "$project" "$new/project"
exec chroot "$new" /bin/sh -c 'cd /project && exec "$@"' sh "$@"
"""


class Cannot(Exception):
    """What this machine lacks."""


def packages(readme: str) -> list[str]:
    """What the README tells a newcomer to install."""
    found = re.findall(r"^(?:sudo )?apt-get install (.+)$", readme, re.M)
    if len(found) != 1:
        raise Cannot(f"README.md has {len(found)} lines that begin with 'apt-get install'; one must name the packages")
    return [word for word in found[0].split() if not word.startswith("-")]


def cache() -> Path:
    folder = cache_folder() / "newcomer"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def look() -> None:
    """Raise Cannot where something is missing."""
    if os.geteuid() != 0:
        raise Cannot("a root of another system is made and entered by root only; run it as root")
    if shutil.which("debootstrap") is None:
        if shutil.which("apt-get") is None:
            raise Cannot("debootstrap is not installed, and there is no apt-get to install it; install debootstrap")
        say("installing debootstrap")
        for words in (["update", "-qq"], ["install", "-y", "-qq", "debootstrap"]):
            subprocess.run(["apt-get", *words], capture_output=True)
        if shutil.which("debootstrap") is None:
            raise Cannot("debootstrap is not installed, and apt-get does not install it; install debootstrap")
    if shutil.which("unshare") is None:
        raise Cannot("there is no unshare, which comes with util-linux; install it")
    with tempfile.TemporaryDirectory(dir=cache()) as folder:
        tried = subprocess.run(
            ["unshare", "--mount", "mount", "-t", "tmpfs", "none", folder], capture_output=True, text=True
        )
    if tried.returncode != 0:
        raise Cannot(f"root may not mount here ({tried.stderr.strip()}); use a machine or container that allows it")


def bare_root(suite: str, names: list[str], fresh: bool) -> Path:
    """A root with these packages, made where it is not kept yet."""
    digest = hashlib.sha256(" ".join(names).encode()).hexdigest()[:8]
    home = cache() / f"{suite}-{digest}"
    with (cache() / f".{home.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for half in cache().glob(f".{home.name}-*"):  # of one that was killed
            shutil.rmtree(half)
        if fresh and home.exists():
            shutil.rmtree(home)
        if not home.exists():
            say(f"making a bare {suite} with {' '.join(names)} (about 90 s, once)")
            made = Path(tempfile.mkdtemp(dir=cache(), prefix=f".{home.name}-"))
            try:
                log = cache() / f"{home.name}.log"
                with log.open("w") as out:
                    done = subprocess.run(
                        [
                            "unshare",
                            "--mount",
                            "debootstrap",
                            "--variant=minbase",
                            f"--include={','.join(names)}",
                            suite,
                            str(made),
                        ],
                        stdout=out,
                        stderr=out,
                    )
                if done.returncode != 0:
                    tail = "\n".join(log.read_text().splitlines()[-5:])
                    raise Cannot(f"debootstrap does not make a bare {suite} (all it said: {log}):\n{tail}")
                made.chmod(0o755)
                made.rename(home)
            finally:
                if made.exists():
                    shutil.rmtree(made)
    return home


@contextlib.contextmanager
def folder_of_a_command() -> Iterator[Path]:
    """Ended and removed in any case; what a killed one has left goes first."""
    with (cache() / ".runs.lock").open("w") as runs:
        fcntl.flock(runs, fcntl.LOCK_EX)
        for earlier in cache().glob("run-*"):
            with (earlier / "lock").open("w") as lock, contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(earlier)
        run = Path(tempfile.mkdtemp(dir=cache(), prefix="run-"))
        mine = (run / "lock").open("w")
        fcntl.flock(mine, fcntl.LOCK_EX)
    with mine:
        try:
            for name in ("root", "up", "work", "settings"):
                (run / name).mkdir()
            for file in (Path("/etc/pip.conf"), Path.home() / ".config/pip/pip.conf", Path.home() / ".pip/pip.conf"):
                if file.exists() and not (run / "settings" / "pip.conf").exists():
                    shutil.copy(file, run / "settings" / "pip.conf")
            if CERTIFICATES.exists():
                shutil.copy(CERTIFICATES, run / "certificates")
            yield run
        finally:
            remove(run)


def remove(run: Path) -> None:
    end_all_below(run)
    shutil.rmtree(run)


def end_all_below(run: Path) -> None:
    """Kill what has its root in the command's: the mounts go with the last of them."""
    told: set[int] = set()
    while pids := [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _inside(pid, run)]:
        for pid in pids:
            if pid not in told:
                told.add(pid)
                say(f"still running in there, killed: {pid} {_command(pid)}")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _inside(pid: int, run: Path) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/root").startswith(f"{run}/")
    except OSError:
        return False


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
    except OSError:
        return ""


def enter(suite: str, command: list[str], *, cold: bool, fresh: bool) -> int:
    """The command's exit code."""
    lower = bare_root(suite, packages((ROOT / "README.md").read_text()), fresh)
    downloads = cache() / "downloads"
    environment = {name: value for name, value in os.environ.items() if SETTINGS.match(name)} | {
        "HOME": "/root",
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "TERM": os.environ.get("TERM", "dumb"),
    }
    if not cold:
        for name, kind in (("PIP_CACHE_DIR", "pip"), ("GOMODCACHE", "go-modules"), ("GOCACHE", "go-build")):
            (downloads / kind).mkdir(parents=True, exist_ok=True)
            environment[name] = f"/var/cache/downloads/{kind}"
    changed = subprocess.run(
        ["git", "-c", "safe.directory=*", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    if changed:
        say("what is not committed here is not in there: a clone has HEAD only")
    with folder_of_a_command() as run:
        say(f"{shlex.join(command)} in a bare {suite}")
        told = [str(lower), str(run), str(ROOT), "" if cold else str(downloads)]
        script = ["unshare", "--mount", "sh", "-euc", SCRIPT, "sh", *told, *command]
        process = subprocess.Popen(["env", "-i", *(f"{k}={v}" for k, v in environment.items()), *script])
        try:
            code = process.wait()
        except KeyboardInterrupt:  # it has reached the command too, which ends by itself
            code = process.wait(PATIENCE_S)
        return code if code >= 0 else 128 - code


def say(text: str) -> None:
    print(f"newcomer: {text}", file=sys.stderr, flush=True)


def _leave(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def main(args: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tests.tools.newcomer", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, default=SUITES[0])
    parser.add_argument("--cold", action="store_true", help="no downloads of an earlier command")
    parser.add_argument("--fresh", action="store_true", help="make the bare root anew")
    parser.add_argument("--able", action="store_true", help="only say whether this machine can do it")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    told = parser.parse_args(args)
    try:
        look()
        return 0 if told.able else enter(told.suite, told.command or ["make", "test"], cold=told.cold, fresh=told.fresh)
    except Cannot as error:
        say(str(error))
        return CANNOT
    except subprocess.TimeoutExpired:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGHUP, _leave)
    sys.exit(main(sys.argv[1:]))
