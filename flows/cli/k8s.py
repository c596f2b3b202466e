"""``hotstage k8s``: the objects of a launch on Kubernetes."""

from __future__ import annotations

import click

from flows.cli.main import json_option, set_option, show, store_option


@click.group()
def k8s() -> None:
    """Render the Kubernetes objects of a spec."""


@k8s.command()
@click.argument("spec", type=click.Path(dir_okay=False))
@set_option
@store_option
@json_option
def render(spec: str, sets: tuple[str, ...], store: str | None, as_json: bool) -> int:
    """Print the objects that a launch of SPEC makes (YAML; --json for JSON): Job, Service, and the Secret's name."""
    import yaml

    from flows import foretell
    from flows.api import default_store
    from k8s.render import render_launch
    from trainer.spec import load_spec

    plan, resolved, _ = foretell.compile_for(load_spec(spec, sets), store)
    objects = render_launch(
        resolved, plan, run=f"{resolved.name}-{plan.config.what_digest.hex()[:6]}", store_url=store or default_store()
    )
    if as_json:
        show(objects)
    else:
        click.echo(yaml.safe_dump_all(objects, sort_keys=False), nl=False)
    return 0
