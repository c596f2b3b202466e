"""``hotstage reconcile``: drivers for open runs that nobody drives."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from flows.cli import terminal
from flows.cli.main import Number, out_option, say, store_option

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment
    from prefect.schedules import Schedule


@click.command()
@store_option
@out_option
@click.option(
    "--every", type=Number(min=0.1), default=3.0, show_default=True, help="Seconds between looks for such runs."
)
@click.option("--once", is_flag=True, help="One look; leave when what it took over has ended.")
@click.option(
    "--interval",
    type=Number(min=10),
    metavar="SECONDS",
    help="Serve a Prefect deployment whose flow runs do this, one after the other, for so long each.",
)
def reconcile(store: str | None, out: str, every: float, once: bool, interval: float | None) -> int:
    """Drive every open run of the store whose driver has died, until Ctrl-C; what is driven then trains on.

    A run of local processes is driven on the machine on which it works, one on a cluster wherever its API answers. A
    run that a person stopped (Ctrl-C) is left alone. `hotstage schedule` and `hotstage k8s serve` do the same beside
    their own work. Run it where runs should outlive their terminals: as a service of the machine, or in a screen.
    """
    import threading

    from flows.care import Care
    from flows.cli.signals import stopped_by_signals
    from flows.drive.train import store_at

    if interval is not None:
        if once:
            raise click.UsageError("--interval goes on by itself: leave --once out")
        return _serve(store_at(store).url, str(Path(out).absolute()), interval)
    stop = threading.Event()
    stopped_by_signals(stop)
    terminal.go_on()
    care = Care(store_at(store), Path(out).absolute(), say=say, every_s=every, stop=stop)
    care.run(0.0 if once else None)
    if care.driven:
        say(f"{care.driven} run(s) train on")
    return 0


def _serve(store_url: str, out: str, interval: float) -> int:
    from flows.cli.schedule import Firing, serve_fired
    from flows.serve import RECONCILE

    def make(when: Schedule, told: str) -> RunnerDeployment:
        from flows.deployments import reconciling

        return reconciling(store_url, out, when, told, interval)

    return serve_fired(make, "reconcile", Firing(None, interval), entrypoint=RECONCILE)
