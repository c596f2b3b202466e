"""``hotstage init``, ``schema`` and ``plan``: a spec before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from flows.cli.main import json_option, say, set_option, show, store_option, write_out
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


@click.command()
@click.argument("spec", type=click.Path(dir_okay=False))
@set_option
@store_option
@json_option
@click.option(
    "--device", metavar="NAME", help="For a GPU, a rank on each: H100, H200, B200 or GB300. Nothing is looked at here."
)
@click.option(
    "--trace", type=click.Path(dir_okay=False), help="Write the foretold timeline as a Chrome/Perfetto trace."
)
@click.option("--svg", type=click.Path(dir_okay=False), help="Write the foretold timeline as SVG.")
@click.option(
    "--run", metavar="RUN", help="Beside it, in --svg and --trace, a step that this run's ranks traced (launch.trace)."
)
@click.option(
    "--schedule-csv", type=click.Path(dir_okay=False), help="Write the schedule as PyTorch's pipelining reads it."
)
def plan(
    spec: str,
    sets: tuple[str, ...],
    store: str | None,
    as_json: bool,
    device: str | None,
    trace: str | None,
    svg: str | None,
    run: str | None,
    schedule_csv: str | None,
) -> int:
    """Show what SPEC's plan says before the first step: memory by kind and position, the schedule, the step's time.

    Needs no data: where the spec's dataset is not prepared, data.vocab_size stands for its vocabulary.
    """
    from flows.show import foretell
    from trainer.plan.devices import sheet_of
    from trainer.plan.draw import timeline_svg, timeline_text
    from trainer.plan.schedule_file import to_csv
    from trainer.plan.timeline import to_chrome
    from trainer.spec import load_spec

    sheet = sheet_of(device) if device is not None else None
    compiled, resolved, note = foretell.compile_for(load_spec(spec, sets), store)
    if sheet is None:
        simulation = foretell.simulate(compiled)
        told: dict[str, Any] = foretell.facts(compiled, resolved, simulation)
    else:
        simulation = foretell.simulate_on(compiled, resolved, sheet)
        told = foretell.facts_on(compiled, resolved, simulation, sheet)
    steps = [simulation.timeline]
    if run is not None:
        from flows.show.facts import beside

        steps = beside(compiled, run, store, steps)
    if trace:
        write_out(Path(trace), to_chrome(steps))
    if svg:
        write_out(Path(svg), timeline_svg(steps))
    if schedule_csv:
        write_out(Path(schedule_csv), to_csv(compiled.schedule))
    if as_json:
        show(told)
        return 0
    say(f"plan {compiled.digest[:12]}: {told['parameters'] / 1e6:.2f} M parameters, {told['stages']} stage(s), "
        f"{told['microbatches']} microbatch(es) of {resolved.train.microbatch} x {resolved.train.sequence} tokens, "
        f"{resolved.parallel.schedule}, {resolved.train.precision}{note}")  # fmt: skip
    say("")
    say(told["memory_text"])
    say("")
    say(timeline_text(simulation.timeline))
    say("")
    say(
        f"a step: {simulation.step_seconds * 1e3:.1f} ms foretold on {sheet.name if sheet else 'this machine'}, "
        f"{told['tokens_per_step'] / simulation.step_seconds:,.0f} tokens/s, bubble "
        f"{', '.join(f'{b:.0%}' for b in simulation.bubble)} by rank, MFU {simulation.mfu:.0%}"
    )
    if sheet is not None:
        say(told["assumptions"])
    elif resolved.parallel.on_cuda(resolved.launch.kernel_path):
        say("that is of this machine's CPUs; for GPUs: --device H100, H200, B200 or GB300")
    for path in (trace, svg, schedule_csv):
        if path:
            say(f"written: {path}")
    return 0
