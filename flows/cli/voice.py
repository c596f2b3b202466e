"""How a command that trains speaks: a live view at a terminal, plain lines elsewhere, JSON lines where asked for JSON.

With ``--json`` stdout has one line, the result; all else goes to stderr, each line a JSON object.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from flows.cli.main import to_type

if TYPE_CHECKING:
    from flows.drive.events import Event, Sink
    from flows.drive.run import Prepared
    from flows.show.live_view import LiveView


class Voice:
    """May be used from any thread."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._run = ""
        self._view: LiveView | None = None
        self._lock = threading.Lock()

    def say(self, text: str) -> None:
        """A line for whoever started the command."""
        self._out(text, err=False)

    def warn(self, text: str) -> None:
        """The same on stderr, where nothing but a view shows there."""
        self._out(text, err=True)

    def _out(self, text: str, err: bool) -> None:
        text = to_type(text, self._run)
        with self._lock:
            if self.as_json:
                from flows.show.lines import json_line

                if text:
                    click.echo(json_line({"event": "line", "text": text}), err=True)
            elif self._view is not None:
                self._view.say(text)
            else:
                click.echo(text, err=err)
                (sys.stderr if err else sys.stdout).flush()

    def sink(self, prepared: Prepared, every_s: float = 1.0) -> Sink:
        """What the driver tells its events; at a terminal the live view begins now."""
        self._run = prepared.run
        return ToType(self._shown(prepared, every_s), prepared.run)

    def _shown(self, prepared: Prepared, every_s: float) -> Sink:
        from flows.show.lines import JsonLines, Lines, Meter
        from flows.show.live_view import LiveView, wanted
        from flows.show.peak import measured_peak
        from trainer.plan import flops_per_token

        def measure(meter: Meter) -> None:
            with contextlib.suppress(OSError, ValueError):  # no process, or no memory for it: MFU is left out
                meter.peak_flops = measured_peak()

        steps = prepared.spec.train.steps
        if self.as_json:
            return JsonLines(lambda line: click.echo(line, err=True), steps)
        flops = flops_per_token(prepared.spec.model, prepared.spec.train.sequence)
        shown = (
            LiveView(steps, flops)
            if wanted(sys.stdout)
            else Lines(self.say, steps, every_s=every_s, flops_per_token=flops)
        )
        shown.meter.precision = prepared.spec.train.precision
        # the gang begins meanwhile; MFU is shown from when the yardstick is known
        threading.Thread(target=measure, args=(shown.meter,), name="yardstick", daemon=True).start()
        if not isinstance(shown, LiveView):
            return shown
        view = shown.start()
        atexit.register(self.quiet)
        with self._lock:
            self._view = view
        return view

    def quiet(self) -> None:
        """The live view goes; what follows are lines. May be called again."""
        with self._lock:
            view, self._view = self._view, None
        if view is not None:
            view.stop()

    def result(self, value: Mapping[str, Any]) -> None:
        """The result, as the last and only line of stdout."""
        from flows.show.lines import json_line

        said = {key: to_type(item, self._run) if isinstance(item, str) else item for key, item in value.items()}
        click.echo(json_line(said))
        sys.stdout.flush()


@dataclass(frozen=True)
class ToType:
    """The commands in what the driver tells, as a person can type them."""

    sink: Sink
    run: str

    def tell(self, event: Event) -> None:
        if event.kind != "step":
            facts = {k: to_type(v, self.run) if isinstance(v, str) else v for k, v in event.facts.items()}
            event = replace(event, facts=facts)
        self.sink.tell(event)
