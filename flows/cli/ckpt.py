"""``hotstage ckpt`` and ``generate``: what a run has saved, and what can be made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from flows.cli.collect import collect_garbage, pin_checkpoint, unpin_checkpoint
from flows.cli.main import Number, json_option, of_spec, say, set_option, show, step_option, store_option

SHARD_GB = 5.0  # as transformers cuts


@click.group()
def ckpt() -> None:
    """List, show, verify, digest, compare, export, import, pin and collect checkpoints."""


for command in (pin_checkpoint, unpin_checkpoint, collect_garbage):
    ckpt.add_command(command)


@ckpt.command("ls")
@click.argument("run")
@store_option
@json_option
def list_checkpoints(run: str, store: str | None, as_json: bool) -> int:
    """The checkpoints of RUN, newest last: attempt, age, state digest, what holds or spoils them."""
    import time

    from flows.drive.run import find_run
    from flows.drive.train import store_at
    from flows.show.facts import details
    from flows.show.saved import checkpoint_lines

    opened = store_at(store)
    rows = details(opened, find_run(opened, run))["checkpoints"]
    if as_json:
        show(rows)
        return 0
    if not rows:
        say(f"{run} has no checkpoint yet")
    for line in checkpoint_lines(rows, time.time()):
        say(line)
    return 0


@ckpt.command("show")
@click.argument("run")
@step_option
@store_option
@json_option
def show_checkpoint(run: str, step: int | None, store: str | None, as_json: bool) -> int:
    """A checkpoint's tensors, chunks and digests.

    From its manifest alone: no chunk is read.
    """
    import time

    from checkpoint.log import RunLog
    from flows.drive.run import find_run
    from flows.drive.train import store_at
    from flows.show.export import checkpoint_at
    from flows.show.facts import skipped_samples
    from flows.show.saved import age_words, size_words

    opened = store_at(store)
    name = find_run(opened, run)
    info, manifest = checkpoint_at(opened, name, step)
    state = RunLog(opened, name).fold(quick=True)
    epochs = [attempt.epoch for attempt in state.attempts]
    skipped = skipped_samples(state, info)
    pins = sorted(pin for pin, n in state.pins.items() if n == info.n)
    told = {
        "run": name,
        "step": info.step,
        "attempt": epochs.index(info.epoch) + 1 if info.epoch in epochs else None,
        "epoch": info.epoch,
        "samples": info.data_position - skipped,
        "samples_skipped": skipped,
        "state_digest": info.state_digest,
        "time": info.time,
        "pins": pins,
        "bytes": manifest.total_bytes,
        "parts": info.parts,
        "chunks": [{"name": c.name, "bytes": c.bytes, "sha256": c.sha256.hex()} for c in manifest.chunks],
        "tensors": [{"name": t.name, "shape": list(t.shape)} for t in manifest.tensors],
    }
    if as_json:
        show(told)
        return 0
    say(
        f"{name} step {info.step}, attempt {told['attempt'] or '–'}: "
        f"{size_words(manifest.total_bytes)} in {len(manifest.chunks)} chunk(s) of {info.parts} node(s), "
        f"{age_words(time.time() - info.time)}" + (f", pinned: {', '.join(pins)}" if pins else "")
    )
    passed = f", {skipped:,} skipped" if skipped else ""
    say(f"state digest {info.state_digest}, {info.data_position - skipped:,} samples read{passed}")
    for tensor in manifest.tensors:
        say(f"  {tensor.name:<48} {' x '.join(map(str, tensor.shape))}")
    return 0


@ckpt.command()
@click.argument("run")
@click.option(
    "--quick/--full",
    help="Check names and sizes only, or read and hash every byte again (default: --full).",
)
@store_option
@json_option
def verify(run: str, quick: bool, store: str | None, as_json: bool) -> int:
    """Check everything that RUN has written.

    Exits 76 where an object is damaged or missing, and names it.
    """
    from checkpoint.verify import verify_run
    from flows.drive.run import find_run
    from flows.drive.train import store_at

    opened = store_at(store)
    name = find_run(opened, run)
    report = verify_run(opened, name, "quick" if quick else "full")
    if as_json:
        show(
            {
                "run": name,
                "ok": report.ok,
                "records": report.records,
                "checkpoints": report.checkpoints,
                "objects": report.objects,
                "bytes": report.bytes,
                "problems": [{"key": p.key, "reason": p.reason, "checkpoint": p.checkpoint} for p in report.problems],
            }
        )
        return 0 if report.ok else 76
    for problem in report.problems:
        say(f"DAMAGED  {problem.key}: {problem.reason}")
    say(
        f"{name}: {report.records} records, {report.checkpoints} checkpoints, {report.objects} objects, "
        f"{report.bytes / 1e6:.1f} MB {'read' if not quick else 'listed'}: "
        + ("all as written" if report.ok else f"{len(report.problems)} damaged")
    )
    return 0 if report.ok else 76


@ckpt.command()
@click.argument("run")
@step_option
@store_option
@json_option
def digest(run: str, step: int | None, store: str | None, as_json: bool) -> int:
    """The state digest of RUN's checkpoint.

    Equal digests are equal weights, moments, step and data position.
    """
    from flows.drive.run import find_run
    from flows.drive.train import store_at
    from flows.show.export import checkpoint_at

    opened = store_at(store)
    name = find_run(opened, run)
    info, manifest = checkpoint_at(opened, name, step)
    if as_json:
        show({"run": name, "step": info.step, "state_digest": manifest.state_digest.hex()})
    else:
        say(manifest.state_digest.hex())
    return 0


@ckpt.command()
@click.argument("a", metavar="RUN[@STEP]")
@click.argument("b", metavar="RUN[@STEP]")
@store_option
@json_option
def diff(a: str, b: str, store: str | None, as_json: bool) -> int:
    """Compare two checkpoints, tensor by tensor.

    Of each tensor that differs: how many elements, the largest difference, also in units of the last place, and the
    first element. RUN@STEP names a step, RUN alone its newest checkpoint. Blocks of equal digests are not read. Exits
    1 where the two differ.
    """
    from flows.drive.train import store_at
    from flows.show.differ import compare, diff_lines

    told = compare(store_at(store), a, b)
    if as_json:
        show(told)
    else:
        for line in diff_lines(told):
            say(line)
    return 0 if told["equal"] else 1


@ckpt.command()
@click.argument("run")
@click.option("-o", "--output", required=True, metavar="WHERE", help="Folder to write into, or s3://bucket/prefix.")
@click.option(
    "--shard-gb",
    type=Number(min=0.001),
    default=SHARD_GB,
    show_default=True,
    help="Weights of more are cut into several files.",
)
@step_option
@store_option
def export(run: str, output: str, shard_gb: float, step: int | None, store: str | None) -> int:
    """Write Hugging Face files of RUN's checkpoint.

    \b
    model.safetensors (above --shard-gb several files and their index), config.json, generation_config.json and
    tokenizer.json: what transformers opens. Memory does not grow with the model.
    """
    from checkpoint.export_to import target
    from flows.drive.run import find_run
    from flows.drive.train import store_at
    from flows.show.export import export_hf

    opened = store_at(store)
    where = export_hf(opened, find_run(opened, run), step, target(output), round(shard_gb * 1e9))
    say(f"written: {where} (with config.json, generation_config.json and tokenizer.json beside it)")
    return 0


@ckpt.command()
@click.argument("store_url", metavar="STORE_URL", required=False)
@click.option("--mb", type=click.IntRange(8, 4096), default=64, show_default=True, help="Written to find the speed.")
@json_option
def doctor(store_url: str | None, mb: int, as_json: bool) -> int:
    """Ask a store what it is good for: STORE_URL, else HOTSTAGE_STORE.

    \b
    It is asked as whoever calls: what races of writers, conditions, listings, ranges, checksums and its clock are like,
    which rights there are, how fast it is. Its probe objects are removed again where these rights allow.
    Exits 78 where something is bad, 75 where it did not answer (or is full), else 0.
    """
    from dataclasses import asdict

    from checkpoint.doctor import Effort, examine_store
    from flows.cli.doctor import tell_checks
    from flows.drive.train import store_at

    found = examine_store(store_at(store_url), Effort(data_bytes=mb << 20))
    if as_json:
        show({**asdict(found), "ok": found.ok})
        return found.exit_code
    tell_checks(found.findings, as_json)
    for mark, uses in (("good for", found.good_for), ("not for", found.bad_for)):
        for use in uses:
            say(f"{mark:>8}  {use}")
    if found.left:
        say(f"{found.left} probe objects stay (under probe/ or runs/doctor-…): this identity cannot delete them")
    return found.exit_code


@ckpt.command("import")
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@click.argument("spec", type=click.Path(exists=True, dir_okay=False))
@set_option
@store_option
@json_option
def import_weights(folder: str, spec: str, sets: tuple[str, ...], store: str | None, as_json: bool) -> int:
    """Let the run of SPEC begin from the weights in FOLDER, in Hugging Face's form.

    \b
    FOLDER: model.safetensors (or several files and their index) and config.json, as `ckpt export` writes them.
    The weights become step 0 of a run of their own, from which that of SPEC is a fork. `hotstage train SPEC` trains it.
    """
    from flows.drive.begin_from import import_run
    from flows.drive.train import store_at
    from trainer.spec import load_spec

    def tell(text: str) -> None:
        if not as_json:
            say(text)

    made = import_run(store_at(store), Path(folder), load_spec(spec, sets), say=tell)
    if as_json:
        show({"run": made.run, "parent": made.parent, "weights_digest": made.digest})
        return 0
    train = f"hotstage train {of_spec(spec, sets, store)}"
    say(f"{made.run} begins from these weights (step 0 of {made.parent}): {train}")
    return 0


def sampling(command: Any) -> Any:
    """The options that say how the next token is taken."""
    options = (
        click.option(
            "--temperature",
            type=Number(min=0),
            default=0.8,
            show_default=True,
            help="0: always the likeliest token.",
        ),
        click.option(
            "--top-k",
            type=click.IntRange(min=1),
            default=40,
            show_default=True,
            help="Choose among so many of the likeliest.",
        ),
        click.option(
            "--seed",
            type=click.IntRange(min=0),
            default=0,
            show_default=True,
            help="The same seed gives the same text.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument("run")
@click.option("--prompt", required=True, help="The text to continue.")
@click.option("--tokens", type=click.IntRange(min=1), default=120, show_default=True, help="Number of tokens to add.")
@sampling
@step_option
@store_option
def generate(
    run: str, prompt: str, tokens: int, temperature: float, top_k: int, seed: int, step: int | None, store: str | None
) -> int:
    """Continue a text with RUN's newest checkpoint, by the engine that trained it. Ctrl-C prints what there is so far
    (exit code 130)."""
    from flows.cli.signals import first_ctrl_c
    from flows.drive.run import find_run
    from flows.drive.train import store_at
    from flows.show.talk import generate as continue_text

    opened = store_at(store)
    name = find_run(opened, run)
    with first_ctrl_c() as stopped:
        text = continue_text(
            opened, name, prompt, tokens=tokens, temperature=temperature, top_k=top_k, seed=seed, step=step,
            stopped=stopped,
        )  # fmt: skip
    say(text)
    return 130 if stopped else 0
