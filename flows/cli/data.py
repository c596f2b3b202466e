"""``hotstage data``: datasets without a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from flows.cli.main import SpecFile, json_option, say, set_option, show, store_option
from flows.cli.signals import Signals

if TYPE_CHECKING:
    from trainer.dataset import DatasetRef


@click.group()
def data() -> None:
    """Prepare datasets."""


@data.command()
@click.argument("spec", type=SpecFile())
@click.option("--again", is_flag=True, help="Make it again even where it exists; damaged objects are replaced.")
@click.option(
    "--dask",
    default="",
    metavar="N|ADDRESS",
    help="Have a Dask cluster work on pieces, as tasks of Prefect: N workers here, or one at an address.",
)
@set_option
@store_option
@json_option
def prepare(spec: str, again: bool, dask: str, sets: tuple[str, ...], store: str | None, as_json: bool) -> int:
    """Make SPEC's dataset in the store (tokenizer, token shards, manifest), or find that it exists already."""
    from flows.data import prepare as make
    from flows.drive.begin import data_of
    from flows.drive.run import ready_store
    from flows.drive.train import store_at
    from trainer.spec import load_spec

    opened = store_at(store)
    wanted = load_spec(spec, sets)
    if dask:
        from flows.cli.schedule import prefect_for

        if prefect_for("--dask") is None:
            return 78

    def work() -> DatasetRef:
        ready_store(opened)
        tell = (lambda _: None) if as_json else say
        if dask:
            from flows.data import load_dataset
            from flows.flow import prepare_flow

            return load_dataset(opened, prepare_flow(wanted, opened.url, dask, again)["digest"])
        with data_of(wanted, opened) as source:
            made = make(source, opened, say=tell, again=again, sequence=wanted.train.sequence, vocab=wanted.model.vocab)
        wanted.resolve(made)  # what would be refused at `train` is refused here
        return made

    dataset = Signals().run(work)
    if as_json:
        show({**dataset.to_map(), "tokens": dataset.tokens})
    else:
        say(f"dataset {dataset.digest}")
    return 0
