"""``hotstage init`` and ``schema``: a spec before anything runs."""

from __future__ import annotations

from pathlib import Path

import click

from flows.cli.main import show
from trainer.presets import PRESETS


@click.command(epilog=f"Presets: {', '.join(sorted(PRESETS))}.")
@click.argument("preset", required=False)
@click.option("--from", "config", metavar="PATH", help="A Hugging Face config.json, or its folder, instead of PRESET.")
def init(preset: str | None, config: str | None) -> int:
    """Write the commented spec of PRESET to stdout: `hotstage init gpt2-124m > my.toml`.

    With --from the model is that of a config.json, without its weights; what this version does not compute is refused.
    """
    if config is not None:
        if preset is not None:
            raise click.UsageError("give a PRESET or --from PATH, not both")
        from flows.cli.from_config import spec_text

        click.echo(spec_text(Path(config)), nl=False)
        return 0
    if preset is None or preset not in PRESETS:
        names = ", ".join(sorted(PRESETS))
        if preset is None:
            click.echo(f"presets: {names}")
            return 0
        raise click.UsageError(f"there is no preset {preset!r}; there are {names}")
    click.echo(PRESETS[preset], nl=False)
    return 0


@click.command()
def schema() -> int:
    """Print the JSON schema of a spec: every key, its type, range and meaning."""
    from trainer.spec import RunSpec

    show(RunSpec.model_json_schema())
    return 0
