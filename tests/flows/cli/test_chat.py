"""``hotstage chat``: the real command at a terminal (a pty), and without one; a text that grows by the engine."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from checkpoint.store import Store, open_store
from flows.cli.main import exit_code_of
from flows.show.talk import Text, generate
from tests.flows.conftest import Trained
from tests.support.place import ROOT
from tests.support.processes import alive, children
from tests.support.wait import wait_for

PROMPT = "the quick brown"


@pytest.fixture(scope="module")
def store(trained: Trained) -> Store:
    return open_store(f"file://{trained.place.folder / 'store'}")


class Terminal:
    """The command at a terminal of its own; ``read`` gives all that came since the last time."""

    def __init__(self, trained: Trained, temporary: Path, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            trained.place.command("chat", trained.run, *arguments),
            cwd=trained.place.folder,
            env=trained.place.env | {"PYTHONPATH": str(ROOT), "TERM": "dumb", "TMPDIR": str(temporary)},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_own_terminal,
        )
        os.close(slave)
        os.set_blocking(self.master, False)
        self.said = ""

    def write(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until(self, words: str, count: int = 1) -> str:
        """What was said until these words came so often; it is taken away."""

        def there() -> bool:
            with contextlib.suppress(BlockingIOError, OSError):  # EIO: the other side has left
                while data := os.read(self.master, 65536):
                    self.said += data.decode(errors="replace").replace("\r\n", "\n")
            return self.said.count(words) >= count

        wait_for(there, f"{words!r} to be said {count} times", 60)
        end = -1
        for _ in range(count):
            end = self.said.index(words, end + 1)
        taken, self.said = self.said[: end + len(words)], self.said[end + len(words) :]
        return taken

    def waiting(self, words: str) -> str:
        """``until`` of what is at its prompt, and it sleeps there: a signal between the words and that wakes nobody."""
        taken = self.until(words)
        stat = Path(f"/proc/{self.process.pid}/stat")
        wait_for(lambda: stat.read_text().rpartition(")")[2].split()[0] == "S", "the command to sleep at its prompt")
        return taken

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)


def _own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(trained: Trained, tmp_path: Path) -> Iterator[Terminal]:
    # the likeliest tokens go round in a circle that has no end token: an answer lasts until it is stopped
    made = Terminal(trained, tmp_path, "--tokens", "1000000", "--temperature", "0")
    yield made
    made.close()


def test_a_talk_at_a_terminal(terminal: Terminal, tmp_path: Path) -> None:
    """Ctrl-C at the prompt gives the line up, in an answer stops it; Ctrl-D leaves; the history has its bound."""
    terminal.until("of chaos-")
    assert "it sees the newest 64 tokens; /new begins anew, Ctrl-C stops an answer" in terminal.until("Ctrl-D leaves)")
    terminal.waiting("> ")
    terminal.write("half a li")
    terminal.waiting("half a li")
    terminal.write("\x03")
    terminal.until("Ctrl-D leaves")
    terminal.waiting("> ")
    for line in (PROMPT, "and then"):
        terminal.write(f"{line}\n")
        terminal.until(f"{line}\n")
        terminal.until(" ", 8)  # some words of the answer
        terminal.write("\x03")
        terminal.until("(stopped)")
        terminal.waiting("> ")
    terminal.write("/new\n")
    terminal.waiting("> ")
    terminal.write("the fox\n")
    terminal.until("the fox\n")
    terminal.until(" ", 60)  # more than the model sees at a time
    terminal.write("\x03")
    assert "tokens are forgotten from here on" in terminal.waiting("> ")
    terminal.write("\x04")
    assert terminal.process.wait(60) == 0
    assert not list(tmp_path.iterdir()), "of the weights nothing is left"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_talk_that_is_ended_leaves_nothing(terminal: Terminal, tmp_path: Path, number: int) -> None:
    terminal.until("> ")
    terminal.write(f"{PROMPT}\n")
    terminal.until(f"{PROMPT}\n")
    terminal.until(" ", 3)
    # none for a moment, where one with a longer window takes the place of the first
    engines = wait_for(lambda: children(terminal.process.pid), "an engine")
    os.kill(terminal.process.pid, number)
    terminal.process.wait(60)
    wait_for(lambda: not any(alive(pid) for pid in engines), "the engine to leave")
    assert not list(tmp_path.iterdir())


def test_without_a_terminal_each_line_is_answered(trained: Trained, store: Store) -> None:
    words = ("chat", trained.run, "--tokens", "9", "--temperature", "0")
    done = subprocess.run(
        trained.place.command(*words),
        cwd=trained.place.folder,
        env=trained.place.env | {"PYTHONPATH": str(ROOT)},
        input=f"{PROMPT}\n/new\n{PROMPT}\nover\n".encode(),
        capture_output=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    first, second, third, end = done.stdout.decode().split("\n")
    assert PROMPT + first == generate(store, trained.run, PROMPT, tokens=9, temperature=0.0)
    assert (second, end) == (first, ""), "/new forgets"
    history = f"{PROMPT}{first}\nover"
    assert history + third == generate(store, trained.run, history, tokens=9, temperature=0.0), (
        "and without it does not"
    )


def test_a_window_that_grows_changes_no_text(trained: Trained, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def text(shortest: int) -> str:
        monkeypatch.setattr("flows.show.talk.SHORTEST", shortest)
        return generate(store, trained.run, PROMPT, tokens=40, temperature=1.5, seed=3)

    assert text(2) == text(64)


def test_pieces_are_whole_characters(trained: Trained, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A character of several tokens comes when it is whole; together the pieces are the text."""
    wanted = " über 字 \U0001f600, und \u0301 ende"
    with Text(store, trained.run) as text:
        picks = iter(text.tokenizer.encode(wanted, add_special_tokens=False).ids)
        monkeypatch.setattr("flows.show.talk.pick", lambda *_: next(picks, text.ends[0]))
        text.say(PROMPT)
        pieces = list(text.answer(1000))
        assert "".join(pieces) == wanted
        assert not any("\ufffd" in piece for piece in pieces)
        assert len(pieces) > 20
        assert text.ids[-1] == text.ends[0]


def test_what_the_model_does_not_see_of_a_prompt_is_told(
    trained: Trained, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with Text(store, trained.run) as text:
        tree = json.loads(text.tokenizer.to_str())
        tree["model"]["vocab"] = {token: n for token, n in tree["model"]["vocab"].items() if token != "\u00c3"}
        text.tokenizer = Tokenizer.from_str(json.dumps(tree))
        text.say("caf\u00e9")
        text.say("th\u00e9")
    (told,) = [record.getMessage() for record in caplog.records]
    assert told == "the model does not see 'é' of the prompt: its tokenizer has nothing for it"


def test_a_temporary_folder_that_is_full_is_named(trained: Trained, store: Store) -> None:
    words = ("generate", trained.run, "--prompt", "x")
    env = trained.place.env | {"PYTHONPATH": str(ROOT), "TMPDIR": "/dev/shm"}
    command = " ".join(["ulimit -f 8;", "exec", *trained.place.command(*words)])  # files of at most 4 or 8 kB
    done = subprocess.run(
        ["bash", "-c", f"trap '' XFSZ; {command}"],
        cwd=trained.place.folder,
        env=env,
        capture_output=True,
        timeout=120,
        text=True,
    )
    assert done.returncode == 75, done.stderr
    assert (
        "do not fit into /dev/shm (File too large): they take 893.4 kB; name another folder with TMPDIR" in done.stderr
    )


def test_ctrl_c_gives_what_was_generated_so_far(
    trained: Trained, store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it was lost, and --tokens may be any number."""
    grow, added = Text.grow, list[int]()

    def grow_and_stop(text: Text) -> int:
        added.append(grow(text))
        if len(added) == 3:
            signal.raise_signal(signal.SIGINT)
        return added[-1]

    monkeypatch.setattr(Text, "grow", grow_and_stop)
    words = ["--prompt", PROMPT, "--tokens", "1000000000", "--temperature", "0", "--store", store.url]
    assert exit_code_of(["generate", trained.run, *words]) == 130
    said = capsys.readouterr()
    assert said.out.startswith(PROMPT)
    assert len(said.out) > len(PROMPT) + 2
    assert len(added) == 3


def test_an_engine_that_is_killed_is_told(
    trained: Trained, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was told nothing, and the command ended with 1: what was not written to it any more came first."""
    engine = tmp_path / "engine"
    engine.write_text("#!/bin/sh\n[ $1 = version ] && echo 1 && exit\nexec <&-\necho no room >&2\nkill -9 $$\n")
    engine.chmod(0o755)
    monkeypatch.setenv("HOTSTAGE_ENGINE", str(engine))
    code = exit_code_of(["generate", trained.run, "--prompt", "x", "--store", store.url])
    assert (code, capsys.readouterr().err) == (75, "hotstage: the engine left during inference with -9: no room\n")
