"""``hotstage schedules``: the deployments of this program on a Prefect server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any
from uuid import UUID

import click

from flows.cli.main import complain, json_option, say, show

if TYPE_CHECKING:
    from flows.prefect_api import Client
    from flows.recurring.deployments import Deployments


@click.group()
def schedules() -> None:
    """List, pause, resume and remove the schedules of a Prefect server."""


class NoSuchSchedule(Exception):
    """No deployment of that name, or several; the text says which there are."""


@contextmanager
def _server() -> Iterator[Client]:
    from flows.prefect_api import BUSY_S, Client, Refused, configured

    if configured() is None:
        raise Refused(
            "Prefect's settings name no server (PREFECT_API_URL is not set): set it, or a profile (`prefect config set "
            "PREFECT_API_URL=http://HOST:4200/api`); `prefect server start` starts one"
        )
    with Client.open(None, patience_s=BUSY_S) as client:
        yield client


def _on_server(command: Callable[..., int]) -> Callable[..., int]:
    """With the deployments of the configured server as first argument; what goes wrong there as exit code 78."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> int:
        from flows.prefect_api import Gone, PrefectSettingsError, Refused
        from flows.recurring.deployments import Deployments

        try:
            with _server() as client:
                return command(Deployments(client), *args, **kwargs)
        except (Gone, Refused, PrefectSettingsError, NoSuchSchedule) as error:
            complain(f"hotstage: {error}", exit_code=78)
            return 78

    return run


def _find(served: Deployments, name: str) -> dict[str, Any]:
    """The deployment of that name; ``train/NAME`` where several flows have one."""
    rows = served.ours()
    flow, _, own = name.rpartition("/")
    found = [row for row in rows if row["name"] == own and (not flow or flow == _flow(row))]
    if len(found) == 1:
        return found[0]
    if found:
        raise NoSuchSchedule(
            f"{len(found)} schedules are named {name}: {', '.join(sorted(map(_full, found)))}; name one so"
        )
    known = ", ".join(sorted(_full(row) for row in rows)) or "none"
    raise NoSuchSchedule(f"there is no schedule {name!r} of hotstage on that server; it has {known}")


def _flow(row: dict[str, Any]) -> str:
    """The name of its flow, out of its entrypoint: flows.flow.train_flow."""
    return str(row["entrypoint"]).rpartition(".")[2].removesuffix("_flow")


def _full(row: dict[str, Any]) -> str:
    return f"{_flow(row)}/{row['name']}"


@schedules.command("ls")
@json_option
@_on_server
def list_schedules(served: Deployments, as_json: bool) -> int:
    """Every schedule, whether somebody serves it, and when it fires next."""
    from flows.recurring.state import schedule_row

    rows = [schedule_row(served, row, _full(row)) for row in served.ours()]
    if as_json:
        show(rows)
        return 0
    if not rows:
        say("no schedules of hotstage on that server")
    for row in rows:
        say(f"{row['name']}: {row['state']}; {row['when']}; {row['mode']}, a firing that overlaps {row['overlap']}")
        if row["next"]:
            say(f"  fires next {row['next']}")
        for lack in row["lacks"]:
            say(f"  {lack}")
        if row["going_on"]:
            say(f"  {row['going_on']} run(s) go on")
        if row["late"]:
            say(f"  {row['late']} firing(s) are late: the next start passes them over, `schedules rm` removes them")
    return 0


@schedules.command("pause")
@click.argument("name")
@_on_server
def pause_schedule(served: Deployments, name: str) -> int:
    """Nothing fires until `hotstage schedules resume NAME`; a run that goes on is left alone."""
    row = _find(served, name)
    served.pause(UUID(row["id"]))
    say(f"{_full(row)} is paused: nothing fires until hotstage schedules resume {name}")
    return 0


@schedules.command("resume")
@click.argument("name")
@_on_server
def resume_schedule(served: Deployments, name: str) -> int:
    """NAME fires again as it did before it was paused."""
    from flows.recurring.state import served_s

    row = _find(served, name)
    served.resume(UUID(row["id"]))
    say(f"{_full(row)} is paused no more")
    if served_s(row) is None and not row.get("work_pool_name"):
        say("  nobody serves it: it fires once `hotstage schedule` has been started again")
    return 0


@schedules.command("rm")
@click.argument("name")
@_on_server
def remove_schedule(served: Deployments, name: str) -> int:
    """Take NAME away from the server, with the firings that it had planned.

    The process that serves it ends by itself. Runs, also one that goes on, stay as they are.
    """
    from flows.recurring.state import served_s

    row = _find(served, name)
    gone = served.remove(UUID(row["id"]))
    say(f"{_full(row)} is gone" + (f", and {gone} firing(s) that were planned or late" if gone else ""))
    if served_s(row) is not None and not row.get("work_pool_name"):
        say("  the process that served it ends within some seconds")
    return 0
