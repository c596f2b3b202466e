"""``hotstage k8s``: a launch on Kubernetes before, while and after it runs; and ``hotstage debug-dump``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from flows.cli import terminal
from flows.cli.doctor import tell_checks
from flows.cli.main import Number, SpecFile, json_option, of_spec, say, set_option, show, store_option, with_store

_namespace = click.option("--namespace", "-n", help="Default: launch.namespace of the spec or the run.")


@click.group()
def k8s() -> None:
    """Render, make and look at the Kubernetes objects of a run; say what a cluster lacks."""


def _objects(spec: str, sets: tuple[str, ...], store: str | None) -> tuple[Any, list[dict[str, Any]], str]:
    from flows.drive.train import store_url
    from flows.show import foretell
    from k8s.render import render_launch
    from trainer.spec import load_spec

    url = store_url(store)
    if url.lower().startswith("s3:"):
        from checkpoint.store.s3_address import read_address

        read_address(url)  # what is no address is refused here, not by pods; credentials in it would be in each of them
    plan, resolved, _ = foretell.compile_for(load_spec(spec, sets), store)
    run = f"{resolved.name}-{plan.config.what_digest.hex()[:6]}"
    return resolved, render_launch(resolved, plan, run=run, store_url=url), url


@k8s.command()
@click.argument("spec", type=SpecFile())
@set_option
@store_option
@json_option
def render(spec: str, sets: tuple[str, ...], store: str | None, as_json: bool) -> int:
    """Print the objects that a launch of SPEC makes (YAML; --json for JSON): Job, Service, Secret without its key."""
    import yaml

    from k8s.render import FABRIC_MEND, uses_fabric

    resolved, objects, _ = _objects(spec, sets, store)
    if not uses_fabric(resolved):
        text = f"launch.fabric = {resolved.launch.fabric!r} is rendered, not run: `k8s apply` and `train` refuse it"
        terminal.tell(f"hotstage: {text}; {FABRIC_MEND.partition(';')[0]}")
    if as_json:
        show(objects)
    else:
        click.echo(yaml.safe_dump_all(objects, sort_keys=False), nl=False)
    return 0


@k8s.command()
@click.argument("spec", type=SpecFile())
@set_option
@store_option
@click.option("--dry-run", is_flag=True, help="Only have the API server check the objects; create nothing.")
def apply(spec: str, sets: tuple[str, ...], store: str | None, dry_run: bool) -> int:
    """Create the objects of SPEC's run now: its pods are scheduled, pull their images, and wait.

    `hotstage train SPEC` with the same --set adopts them and starts training; until then nothing is trained.
    """
    from checkpoint.log import RunLog
    from flows.drive.begin import prepare_run
    from flows.drive.launches import launch_of
    from flows.drive.train import make_driver, store_at
    from k8s.api import JOBS, SECRETS, SERVICES, Api
    from k8s.render import check_fabric
    from trainer.errors import SpecError
    from trainer.spec import load_spec

    if dry_run:
        resolved, objects, _ = _objects(spec, sets, store)
        check_fabric(resolved)
        api = Api.load()
        for resource, item in zip((JOBS, SERVICES, SECRETS), objects, strict=True):
            name = item["metadata"]["name"]
            api.apply(resource.path(resolved.launch.namespace, name), item, dry_run=True)
            say(f"{resource.kind} {name}: the API server accepts it")
        return 0
    opened = store_at(store)
    loaded = load_spec(spec, sets)
    if loaded.launch.target != "kubernetes":
        raise SpecError("launch.target is local; add --set launch.target=kubernetes")
    driver = make_driver(prepare_run(loaded, opened, say=say), opened)
    name = launch_of(RunLog(opened, driver.prepared.run).fold(), driver.prepared, driver.launcher)
    driver.launcher.ensure(driver.make_launch(driver.prepared, name, ()))
    say(f"launch {name} is created; start training with: hotstage train {of_spec(spec, sets, store)}")
    return 0


@k8s.command()
@click.argument("spec", type=SpecFile(), required=False)
@set_option
@store_option
@_namespace
@json_option
def doctor(spec: str | None, sets: tuple[str, ...], store: str | None, namespace: str | None, as_json: bool) -> int:
    """Say within ten seconds what the cluster lacks (for SPEC, where given), and how to mend it.

    Exits 0 where nothing is bad, else 78.
    """
    from k8s.api import Api
    from k8s.doctor import RunNeeds, examine

    wanted = RunNeeds(namespace or "default")
    api = Api.load()
    if spec is not None:
        resolved, objects, url = _objects(spec, sets, store)
        space = namespace or resolved.launch.namespace
        launch, on_gpus = resolved.launch, resolved.parallel.device == "cuda"
        wanted = RunNeeds(space, objects[0], url, launch.store_secret, launch.queue, launch.fabric, on_gpus)
    elif namespace is None and api.namespace:
        wanted = RunNeeds(api.namespace)
    return tell_checks(examine(api, wanted), as_json)


@k8s.command()
@click.argument("run")
@click.option("--node", type=int, help="Only this pod's (its index).")
@click.option(
    "--container", type=click.Choice(["engine", "agent"]), default="engine", show_default=True, help="Of each pod."
)
@click.option("--tail", type=click.IntRange(min=0), default=200, show_default=True, help="Lines of each.")
@store_option
@_namespace
def logs(run: str, node: int | None, container: str, tail: int, store: str | None, namespace: str | None) -> int:
    """What the containers of RUN's pods print; before they start, what they wait for.

    What the ranks printed is in the store also when the pods are gone: `hotstage logs RUN`.
    """
    from flows.drive.run import find_run
    from flows.drive.train import store_at
    from k8s.api import PODS, Api
    from k8s.labels import RUN, label_value
    from k8s.launcher import KubernetesLauncher
    from k8s.views import pod_view
    from trainer.errors import LaunchError

    opened = store_at(store)
    name = find_run(opened, run)
    state, space = _where(opened, name, namespace)
    api = Api.load()
    items = api.get(PODS.path(space), {"labelSelector": f"{RUN}={label_value(name)}"}).get("items") or []
    pods = sorted((pod_view(item) for item in items), key=lambda p: (p.created, p.name))
    shown = False
    for pod in (p for p in pods if node is None or p.index == node):
        try:
            text = api.text(PODS.path(space, pod.name, "log"), {"container": container, "tailLines": str(tail)})
        except LaunchError as error:
            click.echo(f"--- {pod.name}: {error}", err=True)
            continue
        if not text:
            continue
        click.echo(f"--- {pod.name} ({container})", err=True)
        click.echo(text, nl=False)
        shown = True
    if not shown:
        newest = state.newest_attempt
        if newest is None:
            say(f"{name} has no attempt yet")
            return 0
        launcher = KubernetesLauncher(api, space)
        view = launcher.observe(newest.launch)
        launcher.close()
        say(f"launch {newest.launch} is {view.state}: {view.detail or 'nothing more is known'}")
        say(f"what its ranks printed is kept in the store: hotstage logs {name}{with_store(store)}")
    return 0


@k8s.command()
@store_option
@click.option(
    "--every", type=Number(min=1), default=3.0, show_default=True, help="Seconds between looks for open runs."
)
def serve(store: str | None, every: float) -> int:
    """What the manifests run: serve Prefect's deployment `train`, and drive every open run that nobody drives.

    Killed at any time, nothing is lost: gangs train on, and the next one goes on from the log in the store. While
    Prefect is away runs are driven all the same, and the deployment is served again when it is back.
    """
    from flows.care import Care
    from flows.cli.schedule import serve_until_signal
    from flows.drive.train import OUT, store_at
    from flows.prefect_api import PrefectSettingsError, answers, configured

    opened = store_at(store)
    Care(opened, OUT, say, every).start()
    try:
        found = configured()
    except PrefectSettingsError as error:
        say(f"{error}: open runs are driven, nothing is served")
        found = None
    if found is None:
        say("Prefect's settings name no server (PREFECT_API_URL is not set): open runs are driven, nothing is served")
        serve_until_signal(None)
        return 0
    if not answers():
        say(f"waiting for Prefect at {found.shown}")
    from flows.deployments import on_demand
    from flows.serve import Server

    serve_until_signal(Server(lambda: on_demand(opened.url), say))
    return 0


def _where(opened: Any, name: str, namespace: str | None) -> tuple[Any, str]:
    """A run's folded log, and the namespace of its newest attempt."""
    from checkpoint.log import RunLog

    state = RunLog(opened, name).fold()
    newest = state.newest_attempt
    how = newest.body.get("how") if newest is not None else None
    known = (how or {}).get("launch", {}).get("namespace", "default")
    return state, namespace or str(known)


@click.command("debug-dump")
@click.argument("run")
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="The file to write (default: RUN.debug.tar.gz).")
@store_option
@_namespace
def debug_dump(run: str, output: str | None, store: str | None, namespace: str | None) -> int:
    """Everything that explains RUN in one tar.gz, without secrets: for a bug report, or for a colleague."""
    from flows.drive.run import find_run
    from flows.drive.train import store_at
    from flows.show.dump import cluster_files, dump

    opened = store_at(store)
    name = find_run(opened, run)
    path = Path(output or f"{name}.debug.tar.gz")

    def cluster(state: Any) -> Any:
        newest = state.newest_attempt
        how = (newest.body.get("how") or {}) if newest is not None else {}
        if how.get("launch", {}).get("target") != "kubernetes":
            return iter(())
        from k8s.api import Api

        return cluster_files(Api.load(), namespace or how["launch"]["namespace"], name)

    size = dump(opened, name, path, cluster=cluster)
    say(f"written: {path} ({size >> 10} KiB)")
    return 0
