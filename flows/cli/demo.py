"""``hotstage demo``."""

from __future__ import annotations

from pathlib import Path

import click

from flows.cli.main import EXIT_CODES, json_option, set_option
from flows.cli.voice import Voice


@click.command(epilog=EXIT_CODES)
@set_option
@click.option("--out", default="out/demo", show_default=True, help="Folder for all that the demo writes.")
@click.option("--no-prefect", is_flag=True, help="Without Prefect's server and page.")
@json_option
def demo(sets: tuple[str, ...], out: str, no_prefect: bool, as_json: bool) -> int:
    """The main job end to end: prepare real text, train a small GPT on two stages, kill a rank with SIGKILL,
    recover, prove that the bits are those of an undisturbed run on one stage, export, sample, report. Two minutes."""
    import signal
    import tomllib

    from flows.cli.signals import heard
    from flows.demo import demo as run_demo
    from trainer.presets import PRESETS
    from trainer.spec import parse_spec

    spec = parse_spec(tomllib.loads(PRESETS["gpt2-demo"]), sets, origin="demo")
    for number in heard():
        signal.signal(number, signal.default_int_handler)  # ends what it started, as Ctrl-C does
    voice = Voice(as_json)
    result = run_demo(spec, Path(out), voice, use_prefect=not no_prefect)
    if as_json:
        voice.result(result.__dict__)
    return 0
