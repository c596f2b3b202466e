"""Terminals, pipes and files as they are: fewer characters than ours, closed, full, narrow."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.cli import terminal
from flows.cli.main import cli, exit_code_of, keep_own_rights
from flows.cli.shadow import shadow
from flows.cli.signals import Signals
from tests.support.calls import signals_kept
from tests.support.place import ROOT

HOTSTAGE = [sys.executable, "-m", "flows.cli"]


def run(*arguments: str, env: dict[str, str] | None = None, **more: Any) -> subprocess.CompletedProcess[bytes]:
    base = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONIO", "LC_", "LANG", "PYTHONUTF8"))}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL} | more
    return subprocess.run([*HOTSTAGE, *arguments], cwd=ROOT, env=base | (env or {}), check=False, timeout=120, **pipes)


@pytest.mark.parametrize(
    ("env", "encoding", "dots"),
    [
        ({"PYTHONIOENCODING": "latin-1"}, "latin-1", "..."),
        ({"PYTHONIOENCODING": "ascii"}, "ascii", "..."),
        ({"PYTHONIOENCODING": "utf-16"}, "utf-16", "…"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "ascii", "..."),
        ({"LC_ALL": "C"}, "utf-8", "…"),
        ({"LC_ALL": "none_NONE.nothing"}, "ascii", None),
    ],
    ids=lambda value: "+".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_help_is_printed_with_what_the_terminal_can_show(env: dict[str, str], encoding: str, dots: str | None) -> None:
    done = run("--help", env=env)
    assert (done.returncode, done.stderr) == (0, b"")
    if dots is not None:
        text = done.stdout.decode(encoding)
        assert f"file:///{dots}" in text
        assert "?endpoint=" in text


def test_keys_of_tls_that_cannot_be_written_are_left_out_and_no_other_setting_is_blamed(tmp_path: Path) -> None:
    nobody = {"PREFECT_API_URL": "https://127.0.0.1:1/api", "PREFECT_HOME": str(tmp_path)}
    for name, told in (
        (tmp_path / "none" / "keys", "No such file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "k", ""),
    ):
        done = run("schedules", "ls", env={**nobody, "SSLKEYLOGFILE": str(name)})
        said = done.stderr.decode()
        assert (done.returncode, done.stdout) == (78, b"")
        assert "no answer at https://127.0.0.1:1/api" in said
        assert ("SSLKEYLOGFILE is " in said) == bool(told)
        assert told in said
        assert "SSL_CERT_FILE" not in said


def test_refusals_too() -> None:
    done = run("plan", "caf\udce9 …\u5b57.toml", env={"PYTHONIOENCODING": "latin-1", "LC_ALL": "C.UTF-8"})
    assert done.returncode == 78, done.stderr
    assert done.stderr.startswith(b"hotstage: caf\xe9 ...?.toml: there is no such file")


@pytest.mark.parametrize("arguments", [["schema"], ["--help"]], ids=" ".join)
def test_a_reader_that_has_gone(arguments: list[str]) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    try:
        done = run(*arguments, stdout=theirs)
    finally:
        os.close(theirs)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_terminal_that_closes_ends_as_its_signal_says_also_where_a_write_meets_that_first() -> None:
    ours, theirs = os.openpty()
    os.close(ours)
    try:
        done = run("schema", stdout=theirs)
    finally:
        os.close(theirs)
    assert (done.returncode, done.stderr) == (128 + signal.SIGHUP, b"")


def test_controls_of_a_terminal_are_written_out() -> None:
    done = run("plan", "a\x1b[2Jb\x9bc.toml")
    assert done.stderr.startswith(b"hotstage: a\\x1b[2Jb\\x9bc.toml: there is no such file")


@pytest.mark.parametrize("arguments", [["schema"], ["--help"]], ids=" ".join)
def test_a_full_disk_is_named(arguments: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = run(*arguments, stdout=full)
    assert done.returncode == 78
    assert done.stderr.startswith(b"hotstage: standard output cannot be written: No space left on device; free space")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_streams_that_are_closed(closed: str, tmp_path: Path) -> None:
    """The exit code stays, and no file that is opened later becomes standard output."""
    command = f"cd {ROOT} && {sys.executable} -m flows.cli plan {tmp_path}/none.toml {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, check=False, timeout=120)
    assert done.returncode == 78, done.stderr
    assert (b"there is no such file" in done.stderr) is ("2>" not in closed)


@pytest.mark.parametrize("columns", ["1", "-5", "abc"])
def test_widths_that_are_none(columns: str) -> None:
    done = run("init", "--help", env={"COLUMNS": columns, "LINES": columns, "TERM": "dumb"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"--from" in done.stdout


IN_RUST = """
import atexit, threading, time
from tokenizers import Tokenizer, models, trainers
from flows.cli import main
begun = threading.Event()

def words():
    while True:
        begun.set()
        time.sleep(0.005)
        yield "a b"

def learn():
    Tokenizer(models.BPE()).train_from_iterator(words(), trainers.BpeTrainer())

def print_late():
    threading.main_thread().join()
    print("the other thread")

threading.Thread(target=learn, daemon=True).start()
begun.wait()
threading.Thread(target=print_late).start()
atexit.register(print, "at exit")
main()
"""


def test_a_thread_that_still_works_does_not_change_the_exit_code() -> None:
    """Python throws it out of Rust at its end, and that aborts; the other threads and what is left for the end come."""
    command = [sys.executable, "-c", IN_RUST, "schema"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.endswith(b"}\nthe other thread\nat exit\n")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "gets no more memory: raise the limit"),
        (RuntimeError("can't start new thread"), "no more threads"),
    ],
    ids=str,
)
def test_what_a_machine_does_not_give_is_no_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, words: str
) -> None:
    def lacks(*_args: Any, **_kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "main", lacks)
    assert exit_code_of(["plan"]) == 78
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["queue", "dataclasses"])  # met by a subcommand; before the command has begun
def test_a_file_that_hides_a_module_of_python_is_named(tmp_path: Path, name: str) -> None:
    hides = tmp_path / f"{name}.py"
    hides.write_text("")
    done = run("runs", "ls", env={"PYTHONPATH": str(tmp_path), "HOTSTAGE_STORE": str(tmp_path / "store")})
    assert (done.returncode, done.stdout) == (78, b"")
    said = done.stderr.decode()
    assert said.startswith(f"hotstage: {hides} is taken for Python's own module {name!r}")
    assert "out of PYTHONPATH" in said
    assert said.count("\n") == 1


def test_modules_where_python_keeps_them_hide_nothing() -> None:
    assert shadow(ValueError("a bug")) is None


QUITS = """
import os, signal, threading
from flows.cli.signals import Signals
signal.signal(signal.SIGQUIT, signal.SIG_DFL)  # tests that run in a shell's background have it ignored
signals = Signals()

def work():
    if {driving}:
        signals.driving(detaches=False)
    os.kill(os.getpid(), signal.SIGQUIT)
    threading.Event().wait()

signals.run(work)
"""


@pytest.mark.parametrize(("driving", "told"), [(True, "the run goes on by itself"), (False, "nothing is lost")])
def test_ctrl_backslash_leaves_and_says_what_goes_on(driving: bool, told: str) -> None:
    """It ended the command without a word, as SIGKILL does."""
    command = [sys.executable, "-c", QUITS.format(driving=driving)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 128 + signal.SIGQUIT, done.stderr
    assert done.stderr.startswith("left by Ctrl-\\ (SIGQUIT): ")
    assert told in done.stderr


TWICE = """
import os, signal, threading
from flows.cli import signals as of
from flows.drive.events import Event
of.BURST_S = {burst}
of.ASKED_S = {asked_s}
signals = of.Signals(sweep={sweep})

def work():
    signals.driving(detaches=False)
    with signals.drives("one-1"), signals.drives("two-2") as two:
        with signals.drives("over-3"):
            os.kill(os.getpid(), signal.SIGTERM)
            signals.stop.wait()
            os.kill(os.getpid(), signal.SIGTERM)
        signals.asked("one-1")
        threading.Event().wait(0.5)  # the command looks five times
        if not {sweep} or {asked_s} > 1:
            print("asked", flush=True)
            two.tell(Event("phase", {{"phase": "stopping"}}))
        threading.Event().wait({saving})

signals.run(work)
"""


def test_one_signal_that_comes_twice_is_one() -> None:
    """timeout(1) sends its own to the command, then to its group: the command left at once, and its gang trained on."""
    command = [sys.executable, "-c", TWICE.format(burst=60, saving=0.5, sweep=False, asked_s=60)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr.count("leaving at once")) == (0, "asked\n", 0), done.stderr


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        (False, "leaving at once: the gang saves its state and ends by itself"),
        (True, "leaving at once: the gangs save their states and end by themselves"),
    ],
)
def test_a_command_that_leaves_at_once_has_had_its_gangs_asked(sweep: bool, words: str) -> None:
    """It said that the gang saves and ends, and had not asked it yet: the gang trained on with nobody to drive it."""
    command = [sys.executable, "-c", TWICE.format(burst=0, saving=None, sweep=sweep, asked_s=60)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "asked\n"), done.stderr
    assert words in done.stderr


def test_a_sweep_names_the_runs_that_it_could_not_ask() -> None:
    command = [sys.executable, "-c", TWICE.format(burst=0, saving=None, sweep=True, asked_s=1)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, ""), done.stderr
    assert "two-2 could not be asked to stop and goes on by itself; the others save and end" in done.stderr


PAUSES = """
import os, signal, threading
from flows.cli.signals import Signals
signal.signal(signal.SIGQUIT, signal.SIG_DFL)  # tests that run in a shell's background have it ignored
signals = Signals()

def work():
    signals.driving(detaches=False)
    os.kill(os.getpid(), signal.SIGTSTP)
    threading.Event().wait()

signals.run(work)
"""


def test_ctrl_z_gives_the_shell_its_cursor() -> None:
    ours, theirs = os.openpty()
    process = subprocess.Popen([sys.executable, "-c", PAUSES], cwd=ROOT, stdout=theirs, process_group=0)
    try:
        os.close(theirs)
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        assert os.read(ours, 100) == b"\x1b[?25h"
        process.send_signal(signal.SIGQUIT)
        process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 128 + signal.SIGQUIT
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_a_program_that_leaves_is_no_reader_that_has_gone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """click ends with 1 then, without a word."""

    def asks(_value: Any) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("flows.cli.spec.show", asks)
    assert exit_code_of(["schema"]) == 70
    assert "left in the middle" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["runs", "ls", "--json", "--nonsense"], 2, "No such option"),
        (["runs", "ls", "--json", "--store"], 2, "requires an argument"),
        (["runs", "ls", "--state", "nonsense", "--json"], 2, "is not one of"),
        (["ckpt", "digest", "--json"], 2, "Missing argument"),
        (["runs", "ls", "--json", "--store", "s3://"], 78, "bucket"),
        (["data", "prepare", "--json", "n\udcff\x7f\x9b.toml"], 78, "n\udcff\x7f\x9b.toml"),
    ],
)
def test_what_goes_wrong_is_a_line_of_json_where_that_was_asked_for(
    args: list[str], code: int, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert exit_code_of(args) == code
    out, err = capfd.readouterr()
    told = json.loads(err)
    assert (out, err.count("\n"), err.removesuffix("\n").isprintable()) == ("", 1, True)
    assert (told["event"], told["exit_code"]) == ("error", code)
    assert words in told["text"]


def test_a_bug_and_an_interrupt_are_lines_of_json_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ends(error: BaseException) -> Any:
        def raises(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr("flows.drive.train.store_at", raises)
        code = exit_code_of(["ckpt", "ls", "x", "--json"])
        return code, [json.loads(line) for line in capsys.readouterr().err.splitlines()]

    code, lines = ends(ValueError("a bug"))
    assert (code, [line["event"] for line in lines]) == (70, ["trace", "error"])
    assert "ValueError: a bug" in lines[0]["text"]
    assert ends(KeyboardInterrupt()) == (130, [{"event": "error", "text": "interrupted", "exit_code": 130}])


def test_a_umask_keeps_from_others_and_not_from_oneself() -> None:
    before = os.umask(0o727)
    try:
        keep_own_rights()
        assert os.umask(0) == 0o027
    finally:
        os.umask(before)


def test_a_full_disk_ends_nothing_that_is_driven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lines are lost, and the exit code says so. A reader that has gone is news."""
    monkeypatch.setattr(terminal, "_work", terminal._Work())

    reader, writer = os.pipe()
    os.close(reader)
    with terminal._Out("/dev/full", "wb") as full, terminal._Out(writer, "wb") as closed:
        with pytest.raises(terminal.OutputLost, match="No space left"):
            full.write(b"a line\n")
        with signals_kept():
            Signals(lambda _: None).driving(detaches=False)
        assert terminal.finish(0) == 0
        for _ in range(2):
            assert full.write(b"a line\n") == 7
        assert (terminal.finish(0), terminal.finish(85)) == (78, 85)
        with pytest.raises(terminal.OutputLost):
            closed.write(b"a line\n")
