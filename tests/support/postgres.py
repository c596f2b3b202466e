"""A real PostgreSQL for tests: Debian's own packages, unpacked into the user's cache folder (nothing is installed), and
a server of it on loopback, as an unprivileged user, its data in a folder that is gone with it.

    python -m tests.support.postgres    # fetch and unpack; exits 69, saying why, where this machine cannot
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from flows.prefect_server import free_port
from tests.support.go import cache
from tests.support.wait import wait_for

CANNOT = 69
NOBODY = 65534
NOT_OURS = re.compile(r"lib(c6|gcc|stdc\+\+|llvm|crypt1)")
"""Libraries that every machine has, or that only compiling queries needs."""

NOT_RUN = ("bitcode", "llvmjit*", "locale", "doc", "man")


class NoPostgres(RuntimeError):
    """It cannot be had here; the text says why."""


def _apt(*args: str) -> str:
    done = subprocess.run(["apt-cache", *args], capture_output=True, text=True)
    if done.returncode:
        raise NoPostgres(f"apt-cache {' '.join(args)} fails: {done.stderr.strip() or 'no such package'}")
    return done.stdout


def _depends(*packages: str) -> list[str]:
    return re.findall(r"^\s*\|?Depends: ([a-z0-9.+-]+)$", _apt("depends", *packages), re.MULTILINE)


def packages() -> list[str]:
    """Debian's version of the server, and the libraries that it stands on."""
    missing = [tool for tool in ("apt-cache", "apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise NoPostgres(f"{', '.join(missing)} is not here: this machine is no Debian")
    server = next((name for name in _depends("postgresql") if re.fullmatch(r"postgresql-\d+", name)), None)
    if server is None:
        raise NoPostgres("apt knows no package postgresql: apt-get update")
    libraries, left = set[str](), {server}
    while left:
        found = {name for name in _depends(*sorted(left)) if name.startswith("lib") and not NOT_OURS.match(name)}
        left = found - libraries
        libraries |= left
    return [server, *sorted(libraries)]


def postgres() -> Path:
    """The folder with ``bin/postgres``: HOTSTAGE_TEST_POSTGRES, or that of Debian's package, unpacked where it is not
    in the cache yet. NoPostgres where it cannot be.
    """
    named = os.environ.get("HOTSTAGE_TEST_POSTGRES")
    if named:
        return Path(named)
    names = packages()
    told = subprocess.run(["apt-get", "download", "--print-uris", *names], capture_output=True, text=True)
    rows = re.findall(r"^'([^']+)' (\S+) \d+ (\S+)$", told.stdout, re.MULTILINE)
    if told.returncode or not rows:
        raise NoPostgres(f"apt-get knows no place to get {names[0]} from: {told.stderr.strip()[-300:]}")
    key = hashlib.sha256("\n".join(sorted(digest for _, _, digest in rows)).encode()).hexdigest()[:12]
    home = cache() / f"{names[0]}-{key}"
    with open(cache() / ".postgres.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not home.exists():
            print(
                f"unpacking Debian's {names[0]} and {len(names) - 1} libraries into the cache (once)", file=sys.stderr
            )
            target = cache() / f".postgres-{os.getpid()}"
            target.mkdir()
            try:
                got = subprocess.run(
                    ["apt-get", "-o", "APT::Sandbox::User=root", "download", *names],
                    cwd=target,
                    capture_output=True,
                    text=True,
                )
                if got.returncode:
                    raise NoPostgres(f"apt-get download fails: {got.stderr.strip()[-300:]}")
                for package in sorted(target.glob("*.deb")):
                    subprocess.run(["dpkg-deb", "-x", str(package), str(target / "root")], check=True)
                    package.unlink()
                os.replace(target / "root", home)
            finally:
                shutil.rmtree(target, ignore_errors=True)
    (folder,) = home.glob("usr/lib/postgresql/*")
    return folder


def _as_nobody(command: list[str]) -> list[str]:
    """PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return command
    return ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *command]


@contextlib.contextmanager
def running(folder: Path | None = None) -> Iterator[str]:
    """The URL of an empty database, as SQLAlchemy takes it, for as long as the block lasts. ``folder``: for its data;
    in memory where none is named, and there is some.
    """
    program = postgres()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="hotstage-postgres-", dir=folder or memory) as home:
        os.chmod(home, 0o755)  # whoever it runs as comes through
        if os.geteuid() == 0:  # nobody else may come into root's own cache
            copy = Path(home) / "root"
            shutil.copytree(program.parents[3], copy, symlinks=True, ignore=shutil.ignore_patterns(*NOT_RUN))
            program = copy / program.relative_to(program.parents[3])
        root = program.parents[3]
        libraries = sorted({str(path.parent) for path in root.glob("**/*.so.*")})
        env = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "LD_LIBRARY_PATH": ":".join(libraries)}
        data, sockets, log = Path(home) / "data", Path(home) / "run", Path(home) / "log"
        for made in (data, sockets):
            made.mkdir(mode=0o700)
            if os.geteuid() == 0:
                os.chown(made, NOBODY, NOBODY)
        # its own paths are Debian's: share is found relative to the program
        init = [str(program / "bin" / "initdb"), "-D", str(data), "-U", "hotstage", "-A", "trust", "-E", "UTF8", "-N",
                "-L", str(root / "usr" / "share" / "postgresql" / program.name)]  # fmt: skip
        done = subprocess.run(_as_nobody(init), env=env, cwd=home, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        port = free_port()
        settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": sockets, "fsync": "off",
                    "synchronous_commit": "off", "full_page_writes": "off", "jit": "off", "timezone": "UTC",
                    "max_connections": 200, "shared_buffers": "32MB", "dynamic_shared_memory_type": "mmap"}  # fmt: skip
        flags = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        with open(log, "ab") as out:
            server = subprocess.Popen(
                _as_nobody([str(program / "bin" / "postgres"), "-D", str(data), *flags]),
                env=env, cwd=home, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            )  # fmt: skip
        try:
            ready = "database system is ready to accept connections"
            wait_for(lambda: ready in log.read_text() or server.poll() is not None, "PostgreSQL to start", 60, 0.05)
            assert server.poll() is None, log.read_text()[-4000:]
            yield f"postgresql+asyncpg://hotstage@127.0.0.1:{port}/postgres"
        finally:
            server.terminate()  # what is connected may end what it does
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.send_signal(3)  # at once
                server.wait(20)


def main() -> int:
    try:
        print(postgres())
    except NoPostgres as error:
        print(f"PostgreSQL cannot be had here: {error}", file=sys.stderr)
        return CANNOT
    return 0


if __name__ == "__main__":
    sys.exit(main())
