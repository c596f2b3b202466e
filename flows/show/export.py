"""From a checkpoint to what other libraries open (Hugging Face safetensors, config.json, tokenizer), and to the
engine's own inference: both through the family's mapping, none with a second model in Python.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from checkpoint.collect.pins import pinned
from checkpoint.export import SHARD_BYTES, ExportTensor, Read, export_safetensors
from checkpoint.export_to import TEMPLATE, Buffer, Destination
from checkpoint.log import CheckpointInfo, RunLog
from checkpoint.manifest import Manifest
from checkpoint.read import StateReader, load_manifest
from checkpoint.store import Store
from flows.data import load_tokenizer, tokenizer_json
from flows.data.tokenizer import template_begin
from flows.drive.hf_beside import beside_with_talk, ends_of, generation_of, ids_of, tokenizer_config_of
from flows.drive.run import read_run
from flows.drive.views import some_steps
from flows.show.saved import size_words
from trainer.engine_path import ready_engine
from trainer.errors import LaunchError, SpecError
from trainer.models import family
from trainer.models.base import HfTensor, hf_table
from trainer.plan import compile_plan
from trainer.spec import ModelSpec, RunSpec

_ALIGN = 64
_PIECE = 1 << 20
TILE_BYTES = 256 << 20
"""Of a matrix that is turned over at most so much is in memory; a larger one is read once for each such part of it."""


def usable_at(store: Store, run: str, step: int | None) -> CheckpointInfo:
    """The usable checkpoint of a step (or the newest). SpecError where there is none."""
    state = RunLog(store, run).fold()
    info = state.at_step(step)
    if info is None:
        have = some_steps(sorted({c.step for c in state.restore_candidates()})) or "none"
        wanted = "no usable checkpoint" if step is None else f"no usable checkpoint at step {step}"
        raise SpecError(f"run {run} has {wanted}; it has {have}")
    return info


def checkpoint_at(store: Store, run: str, step: int | None) -> tuple[CheckpointInfo, Manifest]:
    """As `usable_at`, with its verified manifest."""
    info = usable_at(store, run, step)
    return info, load_manifest(store, run, info)


def _hf_data(entry: HfTensor, columns: int, tile_bytes: int = TILE_BYTES) -> Callable[[Read], Iterable[Buffer]]:
    """The function that gives an HF tensor's bytes from ours: rows of it, transposed where HF has [in, out]."""
    elements = entry.rows * columns

    def straight(read: Read) -> Iterator[Buffer]:
        for first in range(0, elements, _PIECE):
            yield read(entry.tensor, entry.first * columns + first, min(_PIECE, elements - first))

    def turned(read: Read) -> Iterator[Buffer]:
        wide = max(1, min(columns, tile_bytes // (4 * entry.rows)))
        high = max(1, _PIECE // columns)
        for left in range(0, columns, wide):
            tile = np.empty((min(wide, columns - left), entry.rows), dtype="<f4")
            for top in range(0, entry.rows, high):
                rows = min(high, entry.rows - top)
                data = read(entry.tensor, (entry.first + top) * columns, rows * columns)
                part = np.frombuffer(data, dtype="<f4").reshape(rows, columns)
                tile[:, top : top + rows] = part[:, left : left + len(tile)].T
            yield tile.data.cast("B")

    return turned if entry.transpose else straight


def export_tensors(spec: RunSpec, manifest: Manifest) -> list[ExportTensor]:
    """The Hugging Face tensors of a run's model, each with the function that reads it from the checkpoint."""
    out = []
    for entry in hf_table(family(spec.model.family), spec.model):
        shape = manifest.tensor(entry.tensor).shape
        columns = int(np.prod(shape[1:], dtype=np.int64)) if len(shape) > 1 else 1
        out.append(ExportTensor(entry.name, entry.shape, _hf_data(entry, columns)))
    return out


def export_hf(store: Store, run: str, step: int | None, target: Destination, shard_bytes: int = SHARD_BYTES) -> str:
    """Write the weights, the configs and the tokenizer of a checkpoint; where the weights begin.

    The checkpoint is pinned meanwhile.
    """
    prepared = read_run(store, run)
    info, manifest = checkpoint_at(store, run, step)
    config = family(prepared.spec.model.family).to_hf_config(prepared.spec.model)
    digest = prepared.dataset.digest
    tokenizer, beside = load_tokenizer(store, prepared.dataset), beside_with_talk(store, run, digest)
    begin = next(iter(opening(prepared.spec.model, tokenizer, prepared.dataset.begin)), None)
    # without these other programs take their own defaults, and those are ordinary tokens of this vocabulary
    ids = ids_of(beside, tokenizer, begin, ends_of(beside, tokenizer, prepared.dataset.eot))
    kind = {"dtype": "float32", "torch_dtype": "float32", "use_cache": True}
    told = _tokenizer_config(tokenizer, ids["bos_token_id"], prepared.dataset.eot, prepared.spec.model.context)
    told |= tokenizer_config_of(beside, tokenizer, begin, prepared.spec.model.context)
    texts: dict[str, str | bytes] = {
        "config.json": _json(config | {key: ids[key] for key in ("bos_token_id", "eos_token_id")} | kind),
        "generation_config.json": _json(generation_of(beside, ids)),
        "tokenizer.json": tokenizer_json(store, prepared.dataset),
        "tokenizer_config.json": _json(told),
    }
    if TEMPLATE in beside:
        texts[TEMPLATE] = beside[TEMPLATE]
    tensors = export_tensors(prepared.spec, manifest)
    with pinned(store, run, info, "export"):
        return export_safetensors(store, manifest, tensors, target, texts=texts, shard_bytes=shard_bytes)


def opening(model: ModelSpec, tokenizer: Tokenizer, begin: int | None = None) -> list[int]:
    """The tokens that a text begins with: the one that began each document (``begin``); else, where weights came with
    their tokenizer, those that its template puts there. What is trained here from nothing has never seen any."""
    if begin is not None:
        return [begin]
    return [] if model.init is None else template_begin(tokenizer)


def _tokenizer_config(tokenizer: Tokenizer, begin: int | None, end: int | None, context: int) -> dict[str, object]:
    """What transformers wants to know beside tokenizer.json."""
    told: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        # without this transformers 4 gives types of tokens too: Llama refuses them, GPT-2 adds an embedding for each
        "model_input_names": ["input_ids", "attention_mask"],
    }
    named = {"bos_token": begin, "eos_token": end}
    return told | {key: tokenizer.id_to_token(token) for key, token in named.items() if token is not None}


def _json(value: object) -> str:
    return json.dumps(value, indent=1) + "\n"


class Masters:
    """The fp32 masters of a checkpoint in a file without a name, as the engine reads them (``infer --weights``): all
    tensors in the table's order, each at a multiple of 64 bytes. Nothing stays of it, however this process ends.
    """

    def __init__(self, store: Store, run: str, step: int | None = None) -> None:
        self.prepared = read_run(store, run)
        _, manifest = checkpoint_at(store, run, step)
        self.step = manifest.step
        reader = StateReader(store, manifest)
        self.file = tempfile.TemporaryFile(prefix="hotstage-weights-")  # noqa: SIM115 (close() is its end)
        try:
            for tensor in manifest.tensors:
                count = 0
                for _, data in reader.stream(tensor.name):
                    count += len(data)
                    self.file.write(data)
                self.file.write(bytes(-count % _ALIGN))
            self.file.flush()
        except BaseException as error:
            with contextlib.suppress(OSError):  # what could not be written is tried once more, and the file closed
                self.file.close()
            if isinstance(error, OSError):
                size = sum(tensor.elements for tensor in manifest.tensors) * 4
                raise LaunchError(
                    f"the weights of {run} do not fit into {tempfile.gettempdir()} ({error.strerror}): they take "
                    f"{size_words(size)}; name another folder with TMPDIR"
                ) from error
            raise

    def close(self) -> None:
        self.file.close()


class Inference:
    """The engine in infer mode: ``logits(tokens)`` for one window of tokens, or ``losses(tokens, targets)`` of one made
    for that. Use as a context manager. ``threads``: 0, the run's or the cores.

    ``window``: its tokens, at most the run's sequence (which it is by default); ``masters``: of the run, where they
    serve several.
    """

    def __init__(
        self,
        store: Store,
        run: str,
        step: int | None = None,
        *,
        losses: bool = False,
        threads: int = 0,
        window: int = 0,
        masters: Masters | None = None,
    ) -> None:
        self._masters = None if masters else Masters(store, run, step)
        given = masters or self._masters
        assert given is not None
        prepared = given.prepared
        self.spec = prepared.spec
        self.context = window or prepared.spec.train.sequence
        self.vocab = prepared.spec.model.vocab
        train = prepared.spec.train.model_copy(update={"sequence": self.context})
        spec = prepared.spec.model_copy(update={"train": train})
        mode: Literal["infer", "losses"] = "losses" if losses else "infer"
        plan = compile_plan(spec, prepared.dataset, prepared.what, mode=mode)
        with tempfile.TemporaryFile(prefix="hotstage-plan-") as file:
            file.write(plan.to_bytes())
            file.flush()
            opened = (file.fileno(), given.file.fileno())
            paths = [f"/proc/self/fd/{number}" for number in opened]
            self._process = subprocess.Popen(
                [str(ready_engine()), "infer", "--plan", paths[0], "--weights", paths[1], "--threads", str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=opened,
                start_new_session=True,  # a terminal's Ctrl-C is for this process alone
            )

    def __enter__(self) -> Inference:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.stdin:
            with contextlib.suppress(BrokenPipeError):  # it died: who asked it was told why
                self._process.stdin.close()
        self._process.wait(30)
        for stream in (self._process.stdout, self._process.stderr):
            if stream:
                stream.close()
        if self._masters is not None:
            self._masters.close()

    def logits(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Logits [T, V] of one window of exactly ``context`` tokens."""
        return self._ask(self.context * self.vocab, tokens).reshape(self.context, self.vocab)

    def losses(self, tokens: npt.NDArray[np.int32], targets: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Losses [T] of one window's tokens against their targets; 0 where a target is -1."""
        return self._ask(self.context, tokens, targets)

    def _ask(self, values: int, *request: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            for part in request:
                self._process.stdin.write(np.ascontiguousarray(part, dtype="<i4").tobytes())
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it died: the read below says why
        data = self._process.stdout.read(4 * values)
        if len(data) != 4 * values:
            words = self._process.stderr.read().decode(errors="replace") if self._process.stderr else ""
            raise LaunchError(f"the engine left during inference with {self._process.wait()}: {words.strip()[-800:]}")
        return np.frombuffer(data, dtype="<f4")


__all__ = ["Inference", "Masters", "checkpoint_at", "export_hf", "opening"]
