"""The names of all objects in a store, in one place.

    data/<dataset digest>/{manifest,tokenizer.json,00000.bin,...}
    data/<dataset digest>/leaves/00000.bin            digests of a shard's leaves (dataset.py)
    data/inputs/<input digest>                        the dataset that these inputs gave; two, with a validation part
    data/seen/<sight>                                 which inputs files of these names, sizes and times were
    data/work/<sight>/<stage>/<piece>...              what the work on a piece came to, while a dataset is made
    index/<run>                                       that there is such a run
    runs/<run>/spec                                   canonical What
    runs/<run>/plans/<plan digest>                    a plan file
    runs/<run>/algorithms/<6 digits>                  which algorithm computes which product (agent/algorithms.py)
    runs/<run>/log/<20 digits>                        records
    runs/<run>/folds/<20 digits>-<token>              folded states that fold records name
    runs/<run>/manifests/<step>-<epoch>/parts/<node>  part manifests, one an agent
    runs/<run>/manifests/<step>-<epoch>/groups/<group>  of groups of nodes, in large gangs (agent/groups.py)
    runs/<run>/manifests/<step>-<epoch>/manifest      what the checkpoint record names
    runs/<run>/manifests/<step>-<epoch>/pages/...     of any of these, where it is large (pages.py)
    runs/<run>/chunks/<step>-<epoch>/<rank>-<incarnation>-<index>
    runs/<run>/live/...                               hints, and two kinds of claims:
    .../beside                                            what lay beside imported weights (flows/drive/hf_beside.py)
    .../fold                                              the log's condensed state (log/run_log.py)
    .../curve                                             the index of metrics (curve.py)
    .../launch/<launch>                                   claim of a launch (claims.py)
    .../drivers/<token>                                   who drives it (flows/drive/driving.py)
    .../nodes/<launch>/<node>                             a node's status (agent/status.py)
    .../<epoch>/node/<node>                               claim of a node (claims.py)
    .../<epoch>/addr/<node>                               where its ranks listen (agent/meet.py)
    .../<epoch>/addresses                                 where all do, put together for the others (agent/meet.py)
    .../<epoch>/upload/last                               the snapshot that all nodes upload (agent/upload.py)
    .../<epoch>/{metrics,logs/<rank>,trace}/...           what people watch (agent/output.py)
    .../collected                                         the collector's last pass (collect/collector.py)
    .../replays                                           what was computed again, and what differed (replay_every)
    .../evaluated                                         what evaluations of checkpoints gave (evaluated.py)
    .../tracked/<name>                                    what a tracker has (flows/tracking/)
    probe/...                                         what probing the store left (probe.py, doctor.py)

``<step>`` has 12 digits, ``<epoch>`` 8, ``<node>`` 5, ``<rank>`` 6, ``<index>`` 6; below ``live/`` as they come.
"""

from __future__ import annotations

import re

from checkpoint.errors import Damaged, StoreRefused

_RUN = re.compile(r"[a-z0-9]([a-z0-9-]{0,98}[a-z0-9])?\Z")
_OF_STORE = re.compile(
    r"(data/([0-9a-f]{64}|inputs|seen|work)|index|runs/[^/]+/(algorithms|chunks|folds|live|log|manifests|plans))/"
    r"|runs/[^/]+/spec\Z|probe/(doctor-|passed-)?[0-9a-f]{16}"
)


def is_of_store(path: str) -> bool:
    """Whether a path below a file store's folder is one of the names above: a corpus may lie beside them."""
    return _OF_STORE.match(path) is not None


def is_run(name: str) -> bool:
    """Whether a run can have this name."""
    return _RUN.match(name) is not None


def check_run(run: str) -> str:
    """The run's name, or StoreRefused where it is not lower-case letters, digits and dashes."""
    if not is_run(run):
        raise StoreRefused(f"run {run[:100]!r}: must be lower-case letters, digits and inner dashes, 100 at most")
    return run


def run_key(run: str, *names: str) -> str:
    """A key under the run: ``run_key("r", "log", "1") == "runs/r/log/1"``."""
    return "/".join(("runs", check_run(run), *names))


def spec_key(run: str) -> str:
    return run_key(run, "spec")


def plan_key(run: str, digest: str) -> str:
    return run_key(run, "plans", digest)


def algorithms_key(run: str, n: int) -> str:
    return run_key(run, "algorithms", f"{n:06d}")


def log_prefix(run: str) -> str:
    return run_key(run, "log") + "/"


def log_key(run: str, n: int) -> str:
    return run_key(run, "log", f"{n:020d}")


def fold_name(n: int, token: str) -> str:
    """Relative to the run."""
    return f"folds/{n:020d}-{token}"


def dataset_key(digest: str, name: str) -> str:
    return f"data/{digest}/{name}"


def dataset_manifest_key(digest: str) -> str:
    return dataset_key(digest, "manifest")


def tokenizer_key(digest: str) -> str:
    """Of a dataset's tokenizer."""
    return dataset_key(digest, "tokenizer.json")


def shard_name(number: int) -> str:
    """Of a dataset's token shard, in the store and in a folder."""
    return f"{number:05d}.bin"


def leaves_key(digest: str, number: int) -> str:
    """Of the digests of a shard's leaves."""
    return dataset_key(digest, f"leaves/{shard_name(number)}")


def inputs_key(inputs: str) -> str:
    """Of the name of the dataset that these inputs gave."""
    return dataset_key("inputs", inputs)


def seen_key(sight: str) -> str:
    """Of the input digest that one look at a corpus stands for."""
    return dataset_key("seen", sight)


def work_key(sight: str, *names: str) -> str:
    """Of what is kept while a dataset is made, and removed when it is."""
    return "/".join(("data/work", sight, *names))


INDEX = "index/"


def index_key(run: str) -> str:
    return INDEX + check_run(run)


def live_key(run: str, *names: object) -> str:
    """Of a hint, or of a claim."""
    return run_key(run, "live", *map(str, names))


def curve_key(run: str) -> str:
    """Of the index of metrics."""
    return live_key(run, "curve")


def beside_key(run: str) -> str:
    """Of what lay beside the weights that the run holds, for its exports."""
    return live_key(run, "beside")


def collected_key(run: str) -> str:
    """Of what the collector's last pass left."""
    return live_key(run, "collected")


def replays_key(run: str) -> str:
    """Of what replays beside the run have come to (``recovery.replay_every``)."""
    return live_key(run, "replays")


def evaluated_key(run: str) -> str:
    """Of what evaluations of the run's checkpoints gave."""
    return live_key(run, "evaluated")


def tracked_key(run: str, name: str) -> str:
    """Of what a tracker of this name has of the run."""
    return live_key(run, "tracked", name.lower().replace("&", "and"))


def launch_key(run: str, launch: str) -> str:
    """Of the claim of a launch."""
    return live_key(run, "launch", launch)


def drivers_prefix(run: str) -> str:
    """Of what every driver of the run said last."""
    return live_key(run, "drivers") + "/"


def driver_key(run: str, token: str) -> str:
    return drivers_prefix(run) + token


def statuses_prefix(run: str) -> str:
    """Of the status of every node of every launch."""
    return live_key(run, "nodes") + "/"


def status_key(run: str, launch: str, node: int) -> str:
    return live_key(run, "nodes", launch, node)


def node_key(run: str, epoch: int, node: int) -> str:
    """Of the claim of a node of an attempt."""
    return live_key(run, epoch, "node", node)


def addresses_prefix(run: str, epoch: int) -> str:
    return live_key(run, epoch, "addr") + "/"


def address_key(run: str, epoch: int, node: int) -> str:
    return addresses_prefix(run, epoch) + str(node)


def together_key(run: str, epoch: int) -> str:
    """Of the addresses of all nodes of an attempt."""
    return live_key(run, epoch, "addresses")


def upload_key(run: str, epoch: int) -> str:
    """Of the snapshot that the nodes of an attempt upload next."""
    return live_key(run, epoch, "upload", "last")


def metrics_prefix(run: str, epoch: int) -> str:
    return live_key(run, epoch, "metrics") + "/"


def segment_key(run: str, epoch: int, number: int) -> str:
    """Of one object of an attempt's metrics lines."""
    return metrics_prefix(run, epoch) + f"{number:010d}"


def outputs_prefix(run: str, epoch: int) -> str:
    """Of the rings of all ranks."""
    return live_key(run, epoch, "logs") + "/"


def output_prefix(run: str, epoch: int, rank: int) -> str:
    """Of the ring that holds the end of a rank's output."""
    return f"{outputs_prefix(run, epoch)}{rank}/"


def traces_prefix(run: str, epoch: int) -> str:
    return live_key(run, epoch, "trace") + "/"


def trace_key(run: str, epoch: int, rank: int) -> str:
    return live_key(run, epoch, "trace", rank)


def point(step: int, epoch: int) -> str:
    """The folder name of a checkpoint: ``000000000050-00000003``."""
    return f"{step:012d}-{epoch:08d}"


def parts_prefix(step: int, epoch: int) -> str:
    """Of all part manifests of a checkpoint, relative to the run; a node's number follows."""
    return f"manifests/{point(step, epoch)}/parts/"


def part_name(step: int, epoch: int, node: int) -> str:
    """Of a node's part manifest, relative to the run."""
    return f"{parts_prefix(step, epoch)}{node:05d}"


def groups_prefix(step: int, epoch: int) -> str:
    """Of the parts of all groups of nodes of a checkpoint, relative to the run; a group's number follows."""
    return f"manifests/{point(step, epoch)}/groups/"


def group_name(step: int, epoch: int, group: int) -> str:
    """Of a group's part manifest, relative to the run."""
    return f"{groups_prefix(step, epoch)}{group:05d}"


def manifest_name(step: int, epoch: int) -> str:
    """Of a merged manifest, relative to the run."""
    return f"manifests/{point(step, epoch)}/manifest"


def page_name(manifest: str, label: str, index: int) -> str:
    """Of a page of this manifest (a part's or a merged one), relative to the run."""
    return f"{'/'.join(manifest.split('/')[:2])}/pages/{label}-{index:05d}"


def chunk_name(step: int, epoch: int, rank: int, incarnation: str, index: int) -> str:
    """Of a chunk, relative to the run; the incarnation (letters and digits) makes an agent's names its own."""
    return f"chunks/{point(step, epoch)}/{rank:06d}-{incarnation}-{index:06d}"


_POINT = r"(\d{12,})-(\d{8,})"
_OF_POINT = re.compile(
    rf"chunks/{_POINT}/\d{{6,}}-[A-Za-z0-9]+-\d{{6,}}\Z"
    rf"|manifests/{_POINT}/(?:manifest|(?:parts|groups)/\d{{5,}}|pages/[A-Za-z0-9-]+-\d{{5,}})\Z"
)


def point_of(name: str) -> tuple[int, int] | None:
    """Step and epoch of the checkpoint to which this object (relative to the run) belongs, by its name alone; None
    where it is no name that `chunk_name`, `part_name`, `group_name`, `manifest_name` or `page_name` gives.

    >>> point_of("chunks/000000000050-00000003/000000-i1-000000"), point_of("chunks/mine")
    ((50, 3), None)
    """
    found = _OF_POINT.match(name)
    if found is None:
        return None
    step, epoch = (int(digits) for digits in found.groups() if digits is not None)
    return (step, epoch) if f"/{point(step, epoch)}/" in name else None


def chunk_prefix(step: int, epoch: int, rank: int) -> str:
    """Of a rank's chunks of a point, whoever wrote them."""
    return f"chunks/{point(step, epoch)}/{rank:06d}-"


_RELATIVE = re.compile(r"(chunks|manifests|folds)(/[A-Za-z0-9_+=@-][A-Za-z0-9._+=@-]{0,199}){1,4}\Z")


def check_relative(name: str, folder: str, what: str) -> str:
    """A name found in a hostile object: relative to the run, in this folder; Damaged otherwise."""
    if _RELATIVE.match(name) is None or not name.startswith(folder + "/"):
        raise Damaged(f"{what}: {name[:120]!r} is not a name under {folder}/ of the run")
    return name
