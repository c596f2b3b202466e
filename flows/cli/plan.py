"""``hotstage plan``: what a spec's plan says before the first step, and which plan a cluster wants."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flows.cli.main import SpecFile, json_option, of_spec, say, set_option, show, store_option, write_out

if TYPE_CHECKING:
    from trainer.planner.cluster import ClusterSpec
    from trainer.planner.search import Choices
    from trainer.spec import RunSpec

CLUSTER_SET = "cluster."


@click.command()
@click.argument("spec", type=SpecFile())
@set_option
@store_option
@json_option
@click.option("--cluster", type=click.Path(dir_okay=False), help="Sheet of a cluster: search the best layout on it.")
@click.option("--top", type=click.IntRange(1, 50), default=5, show_default=True, help="Layouts shown, with a cluster.")
@click.option(
    "--keep-bits", is_flag=True, help="With a cluster: only layouts that keep batch, microbatch and reduction groups."
)
@click.option("--no-fp8", is_flag=True, help="With a cluster: modelled layouts keep the spec's precision.")
@click.option(
    "--plan-out", type=click.Path(dir_okay=False), help="With a cluster: write the best plan's description (JSON)."
)
@click.option(
    "--device", metavar="NAME", help="For a GPU, a rank on each: H100, H200, B200, GB200 or GB300. Looks at none."
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
    cluster: str | None,
    top: int,
    keep_bits: bool,
    no_fp8: bool,
    plan_out: str | None,
    device: str | None,
    trace: str | None,
    svg: str | None,
    run: str | None,
    schedule_csv: str | None,
) -> int:
    """Show what SPEC's plan says before the first step: memory by kind and position, the schedule, the step's time.

    Needs no data: where the spec's dataset is not prepared, data.vocab_size stands for its vocabulary.

    With a cluster (--cluster, or `cluster` in SPEC; `--set cluster.nodes=4` changes it) it searches the layouts that
    the model, the batch and the cluster allow, and says which is best, what it costs, and why the others lost.
    """
    from trainer.planner.cluster import cluster_of
    from trainer.planner.search import Choices
    from trainer.spec import load_spec

    own = [text for text in sets if text.startswith(CLUSTER_SET)]
    rest = [text for text in sets if text not in own]
    loaded = load_spec(spec, rest)
    sheet = None if device is not None else cluster_of(spec, cluster, own)
    files = {"trace": trace, "svg": svg, "schedule_csv": schedule_csv}
    if device is not None and (cluster is not None or own):
        raise click.UsageError("--device plans the spec's own layout on GPUs, --cluster searches one; give one of them")
    if sheet is None:
        for name, given in (("--keep-bits", keep_bits), ("--no-fp8", no_fp8), ("--plan-out", plan_out)):
            if given:
                raise click.UsageError(f"{name} needs a cluster: --cluster FILE, or a table [cluster] in the spec")
        return _as_written(loaded, store, as_json, device, run, files)
    if run is not None:
        raise click.UsageError("--run is laid beside the spec's own layout, --cluster searches one; give one of them")
    choices = Choices(keep_numerics=keep_bits, fp8=not no_fp8, max_batch_tokens=loaded.train.max_batch_tokens)
    return _searched(loaded, of_spec(spec, rest, store), sheet, choices, as_json, top, plan_out, files)


def _searched(
    spec: RunSpec, named: str, cluster: ClusterSpec, choices: Choices, as_json: bool, top: int,
    plan_out: str | None, files: dict[str, str | None],
) -> int:  # fmt: skip
    from trainer.errors import PlanError
    from trainer.plan.draw import timeline_svg
    from trainer.plan.schedule_file import to_csv
    from trainer.plan.schedules import pipeline_for, rows_for
    from trainer.plan.timeline import to_chrome
    from trainer.planner import describe
    from trainer.planner.search import planner_for, search

    found = search(spec, cluster, choices)
    best = found.runnable[0] if found.runnable else found.modelled[0] if found.modelled else None
    if as_json:
        show(describe.to_json(found, spec, cluster))
    if best is None:
        raise PlanError(describe.nothing_fits(found, cluster))
    if not as_json:
        say(describe.text(found, spec, cluster, top, named))
    written = dict(files)
    if plan_out:
        write_out(Path(plan_out), describe.plan_file(best, spec).decode())
        written["plan_out"] = plan_out
    a = best.layout
    if files["schedule_csv"]:
        rows = rows_for(a.schedule, pipeline_for(a.schedule, a.stages, a.positions), a.microbatches)
        write_out(Path(files["schedule_csv"]), to_csv(rows))
    if files["trace"] or files["svg"]:
        timeline = planner_for(spec, cluster, choices).at(a).timeline(a)
        if files["trace"]:
            write_out(Path(files["trace"]), to_chrome([timeline]))
        if files["svg"]:
            write_out(Path(files["svg"]), timeline_svg([timeline]))
    if not as_json:
        for file in filter(None, written.values()):
            say(f"written: {file}")
    return 0


def _as_written(
    spec: RunSpec, store: str | None, as_json: bool, device: str | None, run: str | None,
    files: dict[str, str | None],
) -> int:  # fmt: skip
    from flows.show import foretell, mixture
    from trainer.plan.devices import sheet_of
    from trainer.plan.draw import timeline_svg, timeline_text
    from trainer.plan.schedule_file import to_csv
    from trainer.plan.timeline import to_chrome

    if run is not None and not (files["trace"] or files["svg"]):
        raise click.UsageError("--run is drawn in --svg and --trace; give one of them a file")
    sheet = sheet_of(device) if device is not None else None
    compiled, resolved, note = foretell.compile_for(spec, store)
    if sheet is None:
        simulation = foretell.simulate(compiled)
        told: dict[str, Any] = foretell.facts(compiled, resolved, simulation)
    else:
        simulation = foretell.simulate_on(compiled, resolved, sheet)
        told = foretell.facts_on(compiled, resolved, simulation, sheet)
    steps = [simulation.timeline]
    if run is not None:
        from flows.show.facts import beside

        steps = beside(compiled, resolved, run, store, steps)
    if files["trace"]:
        write_out(Path(files["trace"]), to_chrome(steps))
    if files["svg"]:
        write_out(Path(files["svg"]), timeline_svg(steps))
    if files["schedule_csv"]:
        write_out(Path(files["schedule_csv"]), to_csv(compiled.schedule))
    if as_json:
        show(told)
        return 0
    say(foretell.headline(compiled, resolved) + note)
    for line in mixture.foretold(resolved):
        say(line)
    say("")
    say(told["memory_text"])
    say(timeline_text(simulation.timeline, replicas=resolved.parallel.replicas))
    say(foretell.foretold_line(compiled, resolved, simulation, sheet.name if sheet else "this machine"))
    if sheet is not None:
        say(told["assumptions"])
        if told["classifier_chunk"]:
            say(told["classifier_chunk"])
    elif resolved.parallel.on_cuda(resolved.launch.kernel_path):
        say("that is of this machine's CPUs; for GPUs: --device H100, H200, B200, GB200 or GB300")
    for path in filter(None, files.values()):
        say(f"written: {path}")
    return 0
