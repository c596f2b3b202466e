"""``hotstage init`` and ``schema``: a spec before anything runs."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import click

from flows.cli.main import show
from trainer.presets import PRESETS, for_cuda


@click.command(epilog=f"Presets: {', '.join(sorted(PRESETS))}.")
@click.argument("preset", required=False)
@click.option("--from", "config", metavar="PATH", help="A Hugging Face config.json, or its folder, instead of PRESET.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="What its sizes are for.  [default: cpu]"
)
def init(preset: str | None, config: str | None, device: str) -> int:
    """Write the commented spec of PRESET to stdout: `hotstage init gpt2-124m > my.toml`.

    With --from the model is that of a config.json, without its weights; what this version does not compute is refused.
    """
    if config is not None:
        if preset is not None:
            raise click.UsageError("give a PRESET or --from PATH, not both")
        if not config:
            raise click.UsageError("--from is empty; give a config.json, or the folder that it lies in")
        from flows.cli.from_config import spec_text

        click.echo(_for(device, spec_text(Path(config))), nl=False)
        return 0
    if preset is None or preset not in PRESETS:
        names = ", ".join(sorted(PRESETS))
        if preset is None:
            click.echo(f"presets: {names}")
            return 0
        path = f"; the model of a config.json: --from {shlex.quote(preset)}" if os.path.exists(preset) else ""
        raise click.UsageError(f"there is no preset {preset!r}; there are {names}{path}")
    click.echo(_for(device, PRESETS[preset]), nl=False)
    return 0


def _for(device: str, text: str) -> str:
    return for_cuda(text) if device == "cuda" else text


@click.command()
def schema() -> int:
    """Print the JSON schema of a spec: every key, its type, range and meaning."""
    from trainer.spec import RunSpec

    show(RunSpec.model_json_schema())
    return 0
