"""``python -m checkpoint.agent``: the command line of the checkpoint agent.

Exit codes: 0 the run has ended or the agent was asked to leave; 70 a bug, in any of its threads (the launcher starts
another agent, which takes the ranks over); 75 another launch holds the run, another agent has this node, or the store
was lost for good; 78 the store or the command line is refused.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import json
import logging
import os
import secrets
import signal
import sys
import threading
import time
from pathlib import Path

from checkpoint.agent.gang import Options
from checkpoint.agent.link import Link
from checkpoint.agent.metrics import METRICS_FILE, address_of, serve
from checkpoint.agent.service import Service
from checkpoint.agent.slots import fence
from checkpoint.claims import Place
from checkpoint.errors import CheckpointError
from checkpoint.hashes import UNFIT
from checkpoint.store import open_store
from trainer.wire.boot import boot_id
from trainer.wire.files import write_file

EXIT_BUG = 70
_PR_SET_PDEATHSIG = 1
_EXTRA = ("rank", "epoch", "step")


class _JsonLines(logging.Formatter):
    """The engine's form of a log line, so that one reader serves both."""

    def __init__(self, run: str, node: int) -> None:
        super().__init__()
        self._fixed = {"run": run, "node": node}

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": round(time.time(), 3),
            "level": record.levelname.lower(),
            "event": record.name,
            **self._fixed,
            "text": record.getMessage(),
        }
        line.update({name: value for name in _EXTRA if (value := getattr(record, name, None)) is not None})
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m checkpoint.agent", description="The checkpoint agent of a node.")
    parser.add_argument("--store", required=True, help="file:///abs or s3://bucket/prefix")
    parser.add_argument("--run", required=True)
    parser.add_argument("--launch", required=True)
    parser.add_argument("--node", required=True, type=int)
    parser.add_argument("--nodes", required=True, type=int)
    parser.add_argument(
        "--socket", required=True, type=Path, help="where to listen for the engine; a relative path is short"
    )
    parser.add_argument("--work", required=True, type=Path, help="folder of this node, of nobody else")
    parser.add_argument("--key-file", required=True, type=Path, help="the launch's key, 16 bytes or more")
    parser.add_argument(
        "--host", default="127.0.0.1", help="name or address by which other nodes reach this one's ranks"
    )
    parser.add_argument("--bind", help="address on which the ranks listen; default: --host")
    parser.add_argument(
        "--port-base",
        type=int,
        default=0,
        help="first port of this node's ranks, where its address is its own; default: as the run says",
    )
    parser.add_argument(
        "--log-poll",
        type=float,
        help="seconds between looks at the log while a record is expected; default: the store's",
    )
    parser.add_argument(
        "--metrics",
        type=_address,
        default=("127.0.0.1", 0),
        metavar="HOST:PORT",
        help="where Prometheus finds this agent's metrics; default: a free port of 127.0.0.1, named in agent.metrics",
    )
    parser.add_argument("--with-parent", type=int, metavar="PID", help="leave, as on SIGTERM, when this parent ends")
    args = parser.parse_args(argv)
    if not 0 <= args.node < args.nodes:
        parser.error(f"node {args.node} of {args.nodes} nodes: it must be 0 to {args.nodes - 1}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    if args.with_parent is not None and not _end_with(args.with_parent):
        return 75

    log = _speak(args.run, args.node)
    threading.excepthook = _on_thread_bug
    work = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    lock = os.open(work / "agent.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.error("another agent has %s", work)
        return 75
    write_file(work / "agent.pid", json.dumps(_mark()).encode())

    try:
        key = args.key_file.read_bytes()
        if len(key) < 16:
            log.error("the launch's key %s has %d bytes; it needs 16 or more", args.key_file, len(key))
            return 78
        place = Place.of(work, address=args.host, nodes=args.nodes)
        fence()  # without one, snapshots could be read torn
        store = open_store(args.store, begun=True)
        link = Link(args.socket)
    except (OSError, CheckpointError) as error:
        log.error("the agent cannot start: %s", error)
        return error.exit_code if isinstance(error, CheckpointError) else 78
    if UNFIT:
        log.warning("%s: digests are Python's own, which take longer; build it again: `make setup`", UNFIT)
    options = Options(
        run=args.run,
        launch=args.launch,
        node=args.node,
        nodes=args.nodes,
        socket=args.socket,
        work=work,
        key=key,
        place=place,
        host=args.host,
        bind=args.bind or args.host,
        port_base=args.port_base,
        log_poll_s=args.log_poll or store.pace.look_s,
    )
    try:
        service = Service(options, store, link, secrets.token_hex(8))
        labels = {"run": args.run, "launch": args.launch, "node": str(args.node)}
        serve(args.metrics, work, lambda: service.gauge.text(labels))
        code = service.run()
    except CheckpointError as error:
        log.error("the agent ends: %s", error)
        return error.exit_code
    except Exception:
        log.critical("a bug ends the agent", exc_info=True)
        return EXIT_BUG
    finally:
        link.close()
        (work / METRICS_FILE).unlink(missing_ok=True)
    log.info("the agent leaves with %d", code)
    return code


def _speak(run: str, node: int) -> logging.Logger:
    """This process's lines, as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines(run, node))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for noisy in ("botocore", "boto3", "urllib3", "s3transfer"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return logging.getLogger("checkpoint.agent")


def _address(text: str) -> tuple[str, int]:
    try:
        return address_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _on_thread_bug(args: threading.ExceptHookArgs) -> None:
    """A thread ended by what it did not expect: an agent without it would wait for ever, so it leaves, and says why."""
    name = args.thread.name if args.thread is not None else "?"
    trace = (args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback)
    logging.getLogger("checkpoint.agent").critical("a bug in thread %s ends the agent", name, exc_info=trace)
    os._exit(EXIT_BUG)


def _end_with(parent: int) -> bool:
    """Have the kernel send SIGTERM when the parent ends; False where it has ended already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    return os.getppid() == parent


def _mark() -> dict[str, object]:
    """This process, as the launcher reads it: its start time is in the kernel's ticks since its boot."""
    stat = Path("/proc/self/stat").read_bytes()
    started = int(stat[stat.rindex(b")") + 2 :].split()[19])
    return {"pid": os.getpid(), "started": started, "boot": boot_id()}


if __name__ == "__main__":
    # threads that wait for a store that does not answer must not keep a process that has decided to leave
    sys.stderr.flush()
    os._exit(main())
