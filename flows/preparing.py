"""Pieces of a corpus worked on by Prefect's tasks, mapped: in this process, or on a Dask cluster (``prefect-dask``).

What a task comes to lies in the store that holds the dataset (``flows/data/work.py``), where every worker finds it: a
task that finds its piece done ends as Cached. Prefect's own cache is not asked: a lost database loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prefect import task, unmapped
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows.data.encoding import encode_piece, sample_piece
from flows.data.reading import read_piece
from flows.data.shards import put_shard, sum_shard
from trainer.errors import SpecError

THREADS = 1
"""Encoding, which is nine tenths of the work, uses all cores by itself; a second piece at a time would double the
memory and win nothing that could be measured."""
AT_A_TIME = 256
"""Tasks that are given to the runner before the first of them is waited for."""


def _ended(row: dict[str, Any]) -> dict[str, Any] | State[Any]:
    if row.get("cached"):
        return Completed(name="Cached", message="it lies in the store already", data=row)
    return row


@task(name="read", task_run_name="read-{item.piece.number}", cache_policy=NO_CACHE, persist_result=False)
def read_task(item: Any) -> Any:
    """Read, filter and sum a piece."""
    return _ended(read_piece(item))


@task(name="sample", task_run_name="sample-{item.piece.number}", cache_policy=NO_CACHE, persist_result=False)
def sample_task(item: Any, share: float) -> Any:
    """Choose the text of a piece that the tokenizer is trained on."""
    return _ended(sample_piece(item, share))


@task(name="encode", task_run_name="encode-{item.piece.number}", cache_policy=NO_CACHE, persist_result=False)
def encode_task(item: Any) -> Any:
    """Encode a piece."""
    return _ended(encode_piece(item))


@task(name="sum shard", task_run_name="sum-{item.number}", cache_policy=NO_CACHE, persist_result=False)
def sum_task(item: Any) -> Any:
    """A shard's row of the manifest."""
    return sum_shard(item)


@task(name="put shard", task_run_name="put-{item.number}", cache_policy=NO_CACHE, persist_result=False)
def put_task(item: Any) -> Any:
    """Create a shard of the dataset."""
    return put_shard(item)


_TASKS: dict[Callable[..., Any], Any] = {
    read_piece: read_task,
    sample_piece: sample_task,
    encode_piece: encode_task,
    sum_shard: sum_task,
    put_shard: put_task,
}
_MORE = {sample_piece: ("share",)}


class Mapped:
    """The task runner of the flow that this is called in works on pieces."""

    def __init__(self, remote: bool) -> None:
        self.remote = remote

    def map(self, function: Callable[..., Any], items: Sequence[Any], *more: Any) -> Iterator[dict[str, Any]]:
        named = {name: unmapped(value) for name, value in zip(_MORE.get(function, ()), more, strict=True)}
        for first in range(0, len(items), AT_A_TIME):
            futures = _TASKS[function].map(list(items[first : first + AT_A_TIME]), **named)
            for future in futures:
                yield future.result()


def task_runner(dask: str) -> TaskRunner[Any]:
    """Threads of this process; ``dask``: so many workers of a Dask cluster that is started on this machine, or the
    address of one that is there (its workers need hotstage, the corpus, and the store).
    """
    if not dask:
        return ThreadPoolTaskRunner(max_workers=THREADS)
    try:
        from prefect_dask.task_runners import DaskTaskRunner
    except ImportError as error:
        raise SpecError(f"--dask needs prefect-dask: pip install 'hotstage[dask]' ({error})") from error
    if dask.isdigit() and int(dask):
        kwargs = {"n_workers": int(dask), "threads_per_worker": 1, "processes": True, "dashboard_address": None}
        return DaskTaskRunner(cluster_kwargs={**kwargs, "host": "127.0.0.1"})
    if "://" not in dask:
        raise SpecError(f"dask {dask!r} is neither a number of workers nor an address; write 2, or tcp://host:8786")
    return DaskTaskRunner(address=dask)
