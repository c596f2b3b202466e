"""``hotstage reconcile``: drivers for open runs that nobody drives."""

from __future__ import annotations

from pathlib import Path

import click

from flows.cli.main import Number, out_option, say, store_option


@click.command()
@store_option
@out_option
@click.option(
    "--every", type=Number(min=0.1), default=3.0, show_default=True, help="Seconds between looks for such runs."
)
@click.option("--once", is_flag=True, help="One look; leave when what it took over has ended.")
def reconcile(store: str | None, out: str, every: float, once: bool) -> int:
    """Drive every open run of the store whose driver has died, until Ctrl-C; what is driven then trains on.

    A run of local processes is driven on the machine on which it works, one on a cluster wherever its API answers. A
    run that a person stopped (Ctrl-C) is left alone. `hotstage schedule` and `hotstage k8s serve` do the same beside
    their own work. Run it where runs should outlive their terminals: as a service of the machine, or in a screen.
    """
    import threading

    from flows.care import Care
    from flows.cli.signals import stopped_by_signals
    from flows.drive.train import store_at

    stop = threading.Event()
    stopped_by_signals(stop)
    care = Care(store_at(store), Path(out).absolute(), say=say, every_s=every, stop=stop)
    care.run(once=once)
    if care.driven:
        say(f"{care.driven} run(s) train on")
    return 0
