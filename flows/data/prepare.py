"""From a spec's data to a dataset: a look, then passes over the pieces of the corpus, each in bounded memory.

1. look        names, sizes and times: where they are as before, the dataset is found without reading a byte
2. read        every document is read, filtered and summed
3. duplicates  which of all were there before; which are of the validation part; the digest of the inputs
4. tokenizer   given, or trained on a sample of the text (all of it where it is not much)
5. encode      tokens of each piece
6. shards      tokens cut into shards, summed, created under the digest of the whole

What a piece comes to is kept in the store (``work.py``): whoever is killed goes on with the piece that he was at, and
who works on a piece, where, and in which order changes no bit.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np

from checkpoint import keys
from checkpoint.errors import StoreRefused
from checkpoint.store import Store, open_store
from checkpoint.store.address import folder_of
from flows.data import duplicates, encoding
from flows.data import pieces as pieces_of
from flows.data.chat_form import form_of
from flows.data.encoding import COUNTS, HELD, TRAIN, encode_piece, encoder_of, sample_piece, sampled
from flows.data.filters import REASONS, filter_of
from flows.data.job import DataJob, Task, hold_store, release_store
from flows.data.mixture import prepare_mixture
from flows.data.pieces import cut
from flows.data.reading import read_piece
from flows.data.runners import InTurn, Runner
from flows.data.shards import (
    PreparedData,
    Shard,
    commit_datasets,
    known_dataset,
    load_dataset,
    manifest_bytes,
    put,
    put_shard,
    spread,
    sum_shard,
)
from flows.data.sources import Borne, Entry, open_source
from flows.data.sources.talk import TODAY
from flows.data.tokenizer import EOT, cut_long_words, given_tokenizer, may_end, template_begin, train_tokenizer
from flows.data.work import WorkGone, piece_name
from trainer.dataset import DatasetRef, token_bytes_for
from trainer.errors import DatasetError, SpecError
from trainer.spec import DataSpec, too_short
from trainer.spec_fields import shown

log = logging.getLogger(__name__)

_MANY_UNKNOWN = 0.01  # share of unknown tokens that is worth a word
_PREPARATIONS = itertools.count()  # of this process: what is kept of one is never taken for another's
_SETTLED_S = 2.0
"""A file that changed less than that ago may change again without another time: it is not known by its looks."""
_NO_INPUT = ("tokenizer", "chat_template", "piece_mib", "shuffled", "block", "window", "packing", "cache_gib", "mix")
"""Keys that say nothing of what is made, or of which a digest says more."""
Say = Callable[[str], None]


def prepare(
    spec: DataSpec,
    store: Store,
    *,
    say: Say = log.info,
    again: bool = False,
    sequence: int | None = None,
    vocab: int = 0,
    runner: Runner | None = None,
    room: bool = False,
    clock: Callable[[], float] = time.time,
) -> DatasetRef:
    """Make the spec's dataset in the store, or find it there; ``validation_of`` gives the part that was split off.

    ``again`` makes it anew, looks at every byte, checks every object and replaces those that are not what they should
    be. ``sequence``, ``vocab``: what the run needs a shard to hold, and what its model can (0: any); nothing is written
    where that cannot be. ``runner``: who works on pieces. ``room``: tokens are stored with room for a mask, as those of
    a corpus with prompts always are: it is mixed with one.

    Raises DatasetError for an empty corpus, a damaged dataset, or a tokenizer that does not fit; SpecError where no
    sample can be had, the model cannot hold the vocabulary, or a library or predicate is missing; StoreError from the
    store.
    """
    _tell_unread(spec)
    if spec.mix:
        one = partial(
            prepare, store=store, say=say, again=again, sequence=sequence, vocab=vocab, runner=runner, clock=clock
        )
        return prepare_mixture(spec, store, lambda part, room: one(part, room=room), say=say, mend=again)
    if spec.source.startswith("dataset:"):
        return load_dataset(store, spec.source.removeprefix("dataset:"))
    wanted = _Wanted(sequence, vocab)
    for _ in range(3):
        try:
            return _Preparation(spec, store, say, again, wanted, runner or InTurn(), room, clock).run().train
        except WorkGone as error:
            gone = error  # another preparation of the same has finished: the next look finds what it made
    raise gone


@dataclass(frozen=True)
class _Wanted:
    """What a run needs of a dataset."""

    sequence: int | None
    vocab: int

    def check(self, shards: Sequence[int], what: str = "") -> None:
        problem = None if self.sequence is None else too_short(shards, self.sequence)
        if problem is not None:
            raise SpecError(what + problem)

    def check_vocab(self, vocab: int, what: str) -> None:
        if self.vocab and vocab > self.vocab:
            raise SpecError(
                f"model.vocab {self.vocab} is smaller than the vocabulary of {what}, {vocab}; set it to 0 (the "
                f"dataset's) or to at least {vocab}"
            )


@dataclass
class _Corpus:
    """What the first pass came to."""

    reads: list[dict[str, Any]]
    parts: list[duplicates.CorpusPart] = field(default_factory=list)
    documents: dict[int, int] = field(default_factory=lambda: {TRAIN: 0, HELD: 0})
    letters: dict[int, int] = field(default_factory=lambda: {TRAIN: 0, HELD: 0})
    inputs: str = ""


class _Preparation:
    def __init__(
        self,
        spec: DataSpec,
        store: Store,
        say: Say,
        again: bool,
        wanted: _Wanted,
        runner: Runner,
        room: bool,
        clock: Callable[[], float],
    ) -> None:
        self.spec, self.store, self.say, self.again, self.wanted = spec, store, say, again, wanted
        self.runner, self.clock = runner, clock
        self.given = given_tokenizer(spec)
        self.form = form_of(spec, self.given)
        if self.form is not None and "strftime_now" in self.form.template:
            say(
                f"data: {self.form.what} asks for today's date, and data are the same every day: where it writes one, "
                f"it is {TODAY:%d %b %Y}; for another one name a copy in which that stands (data.chat_template)"
            )
        self.filter = filter_of(spec)
        entries = spec.vocab_size if self.given is None else self.given.vocab
        self.wide = room and token_bytes_for(entries, True) != token_bytes_for(entries)
        """A token is stored larger than it need be, since other parts of a mixture have masks."""

    def run(self) -> PreparedData:
        if self.given is not None:
            self.wanted.check_vocab(self.given.vocab, self.given.what)
        source, begin = open_source(self.spec, self.form), self.clock()
        entries = self._without_store(source.look())
        seen, fresh = self._sight(entries), any(entry.changed > begin - _SETTLED_S for entry in entries)
        if not self.again and (inputs := self._seen(seen)) is not None:
            known = self._known(inputs)
            if known is not None:
                return known
        pieces = cut(entries, source.divides, self.spec.piece_mib * pieces_of.MIB)
        sight = hashlib.sha256(f"{seen} {self.spec.piece_mib}".encode()).hexdigest()
        # a kill loses one piece at most: where there is one alone, nothing need be kept
        store = self.store if len(pieces) > 1 else open_store("memory:")
        runner: Runner = self.runner if len(pieces) > 1 else InTurn()
        mine = next(_PREPARATIONS)
        url = store.url if runner.remote else f"{store.url} {mine} work"
        self.into = self.store.url if runner.remote else f"{self.store.url} {mine} into"
        hold_store(store, url)
        hold_store(self.store, self.into)
        try:
            room = self.wide or self.spec.masks
            self.job, self.run_on = DataJob(self.spec, url, sight, room, self.form), runner
            if self.again:
                self.job.work.forget()
            self.tasks = [Task(self.job, piece, tuple(entries[piece.begin : piece.end])) for piece in pieces]
            made = self._made()
            if not fresh:
                self._remember(seen)
            self.job.work.remove()
            return made
        finally:
            release_store(url)
            release_store(self.into)

    def _without_store(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        """Of a corpus in whose folder the store lies too: the next look would see what this one makes."""
        if not self.store.url.startswith("file:"):
            return entries
        root = f"{folder_of(self.store.url)}{os.sep}"
        paths = [os.path.abspath(entry.name) for entry in entries]
        own = [path.startswith(root) and keys.is_of_store(path.removeprefix(root)) for path in paths]
        if not any(own):
            return entries
        self.say(f"data: {sum(own):,} files below {root} are left out: they are this store's own")
        left = [entry for entry, out in zip(entries, own, strict=True) if not out]
        if not left:
            raise DatasetError(
                f"data.source {self.spec.source!r} matches files of this store alone ({root}); name those of the corpus"
            )
        return left

    def _made(self) -> PreparedData:
        corpus = self._read()
        self._decide(corpus)
        self.inputs = corpus.inputs
        known = None if self.again else self._known(corpus.inputs)
        return known if known is not None else self._make(corpus)

    # --- what was there before --------------------------------------------------------------------------------

    def _sight(self, entries: Sequence[Entry]) -> str:
        h = hashlib.sha256(b"hotstage sight v1\n")
        settings = self.spec.model_dump(mode="json", exclude=set(_NO_INPUT))
        settings["tokenizers"] = version("tokenizers")
        if self.spec.prompt_field is None:
            del settings["prompt_field"]  # keys that came when corpora were known already
        if not self.spec.begin_token:
            del settings["begin_token"]
        if self.form is None:
            del settings["messages"]
        else:
            settings["jinja2"] = version("jinja2")
        settings |= self._mask_settings()
        h.update(json.dumps(settings, sort_keys=True).encode())
        h.update(self.given.digest if self.given else b"train")
        h.update(self.filter.source)
        for entry in entries:
            h.update(json.dumps([entry.name, entry.size, entry.mark]).encode())
        return h.hexdigest()

    def _seen(self, sight: str) -> str | None:
        key = keys.seen_key(sight)
        return None if self.store.head(key) is None else self.store.get(key, max_bytes=64).decode(errors="replace")

    def _remember(self, sight: str) -> None:
        with contextlib.suppress(StoreRefused):  # who may not replace it reads the corpus again the next time
            put(self.store, keys.seen_key(sight), self.inputs.encode(), True)

    def _known(self, inputs: str) -> PreparedData | None:
        known = known_dataset(self.store, inputs)
        if known is not None:
            self.say(f"data: {known.train.digest[:12]} is already there ({known.train.size_words})")
            self.wanted.check(known.train.shards)
            self.wanted.check_vocab(known.train.vocab, "the dataset")
        return known

    # --- what the corpus is -----------------------------------------------------------------------------------

    def _read(self) -> _Corpus:
        reads: list[dict[str, Any]] = []
        borne = Borne()
        with telling(self.say, lambda: f"data: reading: {len(reads)} of {len(self.tasks)} pieces"):
            for row in self.run_on.map(read_piece, self.tasks):
                reads.append(row)
                borne.join(row["borne"])
        borne.tell()
        if borne.rewritten.count and self.spec.dedupe is not None and self.spec.dedupe.near is not None:
            self.say(
                f"data: data.dedupe.near {self.spec.dedupe.near}: several documents of one conversation begin alike, "
                "and one that is so much like another is left out with its answer; leave near out, or take a template "
                "that writes a conversation once"
            )
        out = np.sum([row["out"] for row in reads], axis=0).tolist()
        if any(out[1:]):
            self.say(f"data: data.filter leaves {out[0]:,} of {sum(out):,} documents ({_reasons(out)})")
        if not any(row["text"] for row in reads):
            if any(out[1:]):
                raise DatasetError(
                    f"data.filter leaves no text of data.source {self.spec.source!r}: {sum(out):,} documents, of them "
                    f"{_reasons(out)}; loosen it"
                )
            raise DatasetError(f"data.source {self.spec.source!r} has no text in it; the corpus is empty")
        return _Corpus(reads)

    def _decide(self, corpus: _Corpus) -> None:
        """What becomes of each document, and the digest of the inputs."""
        work = self.job.work
        corpus.parts = duplicates.parts_of(work, corpus.reads)
        alive = np.zeros(sum(part.documents for part in corpus.parts), bool)
        for part in corpus.parts:
            codes = np.frombuffer(work.get_map("read", part.name)["codes"], np.uint8)
            alive[part.base : part.base + part.documents] = codes == 0
        self._dedupe(corpus, alive)
        h = hashlib.sha256(b"hotstage dataset inputs v1\n")
        h.update(json.dumps(self._settings(), sort_keys=True).encode())
        h.update(self.given.digest if self.given else b"train")
        at = 0
        for number, row in enumerate(corpus.reads):
            held = []
            for _ in range(row["parts"]):
                part, at = corpus.parts[at], at + 1
                kept = work.get_map("read", part.name)
                here = alive[part.base : part.base + part.documents]
                held.append(self._verdicts(kept["sums"], here))
                for verdict in (TRAIN, HELD):
                    corpus.documents[verdict] += int((held[-1] == verdict).sum())
                    sizes = np.frombuffer(kept["sizes"], "<u8")
                    corpus.letters[verdict] += int(sizes[held[-1] == verdict].sum())
                # not names: where a corpus lies changes nothing
                h.update(np.frombuffer(kept["sums"], "V32")[here].tobytes())
            verdicts = np.concatenate(held)
            if (verdicts != TRAIN).any():
                work.put(verdicts.tobytes(), "keep", piece_name(number))
        corpus.inputs = h.hexdigest()
        for verdict, name in ((TRAIN, "training"), (HELD, "validation")):
            if (verdict == TRAIN or self.spec.validation) and not corpus.documents[verdict]:
                raise DatasetError(
                    f"data.validation {self.spec.validation} leaves no document for {name}: there are "
                    f"{sum(corpus.documents.values()):,}, and their content decides; change the share or add documents"
                )

    def _dedupe(self, corpus: _Corpus, alive: duplicates.Flags) -> None:
        wanted = self.spec.dedupe
        if wanted is None:
            return
        before = int(alive.sum())
        with telling(self.say, lambda: "data: looking for duplicates"):
            if wanted.exact:
                duplicates.exact(self.job.work, corpus.parts, alive)
            exact = int(alive.sum())
            if wanted.near is not None:
                duplicates.near(self.job.work, corpus.parts, alive, wanted.near)
        near = exact - int(alive.sum())
        self.say(f"data: {before - exact:,} of {before:,} documents were there before, {near:,} nearly so")

    def _settings(self) -> dict[str, Any]:
        given = self.given
        # without data.end_token a tokenizer that lacks EOT ended documents with nothing: that is end_token "" now
        end = EOT if given is None or (given.end is None and given.tokenizer.token_to_id(EOT) is None) else given.end
        settings = {"vocab_size": self.spec.vocab_size, "shard_tokens": self.spec.shard_tokens, "eot": end}
        if given is not None and given.begin is not None:
            settings["begin"] = given.begin
        settings |= self._mask_settings()
        return {**settings, "validation": self.spec.validation} if self.spec.validation else settings

    def _mask_settings(self) -> dict[str, Any]:
        """What a mask makes of the shards; nothing where there is none."""
        if self.form is not None:
            return {"masked": True, "talk": self.form.digest}
        if self.spec.prompt_field is not None:
            return {"masked": True}
        return {"room": True} if self.wide else {}

    def _verdicts(self, sums: bytes, alive: duplicates.Flags) -> Any:
        found = np.where(alive, TRAIN, 0).astype(np.uint8)
        if self.spec.validation:
            limit = np.uint64(int(self.spec.validation * (1 << 64)))
            found[alive & (np.frombuffer(sums, ">u8").reshape(-1, 4)[:, 0] < limit)] = HELD
        return found

    # --- what is made of it -----------------------------------------------------------------------------------

    def _make(self, corpus: _Corpus) -> PreparedData:
        letters, many = sum(corpus.letters.values()), sum(corpus.documents.values())
        size = f"{letters / 1e6:,.1f} MB" if letters >= 1e6 else f"{letters / 1e3:.1f} kB"
        self.say(f"data: {many:,} document{'s' * (many != 1)}, {size} of text from {self.spec.source}")
        tokenizer = self._tokenizer(corpus)
        encoder = encoder_of(self.job)
        rows: list[dict[str, Any]] = []
        with telling(self.say, lambda: f"data: encoding: {len(rows)} of {len(self.tasks)} pieces"):
            for row in self.run_on.map(encode_piece, self.tasks):
                rows.append(row)
        self._known_enough(rows, letters)
        made, manifests = [], []
        for stage, key, verdict in (("tokens", "tokens", TRAIN), ("held", "held", HELD)):
            if verdict == HELD and not self.spec.validation:
                continue
            counts = [(piece_name(n, part), c) for n, row in enumerate(rows) for part, c in enumerate(row[key])]
            spans = spread(counts, self.spec.shard_tokens)
            shards = [Shard(self.job, number, stage, held, encoder.vocab) for number, held in enumerate(spans)]
            what = "" if verdict == TRAIN else f"the validation part (data.validation {self.spec.validation}): "
            self.wanted.check([shard.tokens for shard in shards], what)
            sums = list(self.run_on.map(sum_shard, shards))
            if self.job.masked and not any(row["counted"] for row in sums):
                raise DatasetError(
                    f"{what}no token of data.source {self.spec.source!r} counts: nothing would be learned; give "
                    "answers that are not empty, and a chat template that marks them"
                )
            manifest = manifest_bytes(
                sums,
                tokenizer=tokenizer,
                vocab=encoder.vocab,
                token_bytes=encoder.kind.itemsize,
                eot=encoder.eot,
                begin=encoder.begin,
                documents=corpus.documents[verdict],
                inputs=corpus.inputs,
                talk=None if self.form is None else self.form.to_map(),
            )
            made.append(shards)
            manifests.append(manifest)
        for shards, manifest in zip(made, manifests, strict=True):
            self._put(shards, hashlib.sha256(manifest).hexdigest())
        prepared = PreparedData(*commit_datasets(self.store, manifests, tokenizer, corpus.inputs, self.again))
        for what, dataset in (("dataset", prepared.train), ("validation dataset", prepared.validation)):
            if dataset is not None:
                self.say(f"data: {dataset.size_words} in {len(dataset.shards)} shard(s), {what} {dataset.digest[:12]}")
        return prepared

    def _put(self, shards: Sequence[Shard], digest: str) -> None:
        target = [replace(shard, digest=digest, into=self.into, mend=self.again) for shard in shards]
        for _ in self.run_on.map(put_shard, target):
            pass

    def _tokenizer(self, corpus: _Corpus) -> bytes:
        """The tokenizer.json of the dataset, which every worker finds beside the pieces."""
        work = self.job.work
        if self.given is not None:
            changes = self.given.tokenizer.normalizer
            if changes is not None:
                self.say(f"data: {self.given.what} changes the text before it encodes it ({type(changes).__name__})")
            end = self.given.end
            if end is not None and not may_end(self.given.tokenizer, end):
                self.say(
                    f"data: data.end_token {end!r} is an ordinary token of {self.given.what}: wherever texts hold it, "
                    "a document ends"
                )
            if lacks := self.given.undecoded:
                self.say(
                    f"data: {self.given.what} has no decoder: what the model writes will be shown as its tokens are "
                    f'written (Ġthe, ▁the), here and by others; write "decoder": {lacks} there'
                )
            if self.spec.begin_token is None and (puts := template_begin(self.given.tokenizer)):
                first = str(self.given.tokenizer.id_to_token(puts[0]))
                template = "" if self.form is None else self.form.template
                if first not in template and "bos_token" not in template:
                    self.say(
                        f"data: {self.given.what} puts {first} before a text, and documents begin without it here: "
                        f'data.begin_token = "{first}" puts it there, "" says that none is meant'
                    )
            work.put(self.given.data, "tokenizer.json")
            return self.given.tokenizer.to_str().encode()
        if not work.there("tokenizer.json"):
            work.put(self._train(corpus).to_str().encode(), "tokenizer.json")
        return work.get("tokenizer.json")

    def _train(self, corpus: _Corpus) -> Any:
        self.say(f"data: training a byte-level BPE tokenizer of {self.spec.vocab_size:,} entries")
        letters = corpus.letters[TRAIN]
        share = min(1.0, encoding.SAMPLE_LETTERS / max(letters, 1))
        if share < 1:
            self.say(f"data: on {share:.1%} of the text, chosen by its content")
        read, pieces, done = 0, 0, False

        def texts() -> Iterator[str]:
            nonlocal read, done
            for block in sampled(self.job, len(self.tasks)):
                yield from cut_long_words(block)
                read += len(block)
            done = True

        def where() -> str:
            if not read:
                return f"{pieces} of {len(self.tasks)} pieces read"
            merging = "the text is read, pairs are merged"
            return merging if done else f"{read / max(letters * share, 1):.0%} of the text read"

        with telling(self.say, lambda: f"data: training the tokenizer: {where()}"):
            for _ in self.run_on.map(sample_piece, self.tasks, share):
                pieces += 1
            trained = train_tokenizer(texts(), self.spec.vocab_size)
        give_memory_back()  # of the words that were counted: what follows needs it
        if trained.get_vocab_size() < self.spec.vocab_size:
            self.say(
                f"data: the text has pairs for {trained.get_vocab_size():,} entries only: the vocabulary is smaller "
                "than data.vocab_size"
            )
        self.wanted.check_vocab(trained.get_vocab_size(), "the tokenizer that was trained (data.vocab_size)")
        return trained

    def _known_enough(self, rows: Sequence[dict[str, Any]], letters: int) -> None:
        """Refuse a tokenizer that knows nothing of the text, and say where it knows little."""
        given = self.given
        texts, count, lost, twice = (sum(row.get(key, 0) for row in rows) for key in COUNTS)
        if twice:
            log.warning(
                "%d text(s) of %s end with the token that ends a document already, and another one is put behind each: "
                "leave it out of the texts",
                twice,
                self.spec.source,
            )
        if texts == 0:
            raise DatasetError(
                f"{given.what if given else 'the tokenizer'} cannot encode this corpus: {letters:,} characters give no "
                "token; give a tokenizer that was made for such text"
            )
        if given is None or given.unknown is None:
            return
        if count >= texts:
            raise DatasetError(
                f"{given.what} cannot encode this corpus: every token of it is the unknown one; give a tokenizer that "
                "was made for such text"
            )
        if count > _MANY_UNKNOWN * texts or lost > _MANY_UNKNOWN * letters:
            log.warning(
                "%s: %.1f %% of the tokens are unknown to it (token %d), which stand for %.1f %% of the text",
                given.what,
                100 * count / texts,
                given.unknown,
                100 * lost / max(letters, 1),
            )


def _tell_unread(spec: DataSpec) -> None:
    """A key that was set and that nothing looks at. No refusal: it is in the names of runs that are there."""
    if spec.field == type(spec).model_fields["field"].default:
        return
    if spec.mix:
        why = "with data.mix the key or column is named in the tables of its parts"
    elif spec.source.partition(":")[0] not in ("jsonl", "parquet", "hf"):
        why = f"data.source {shown(spec.source)} has no keys; leave it out, or take jsonl:, parquet: or hf:"
    else:
        return
    log.warning("data.field %s is not looked at: %s", shown(spec.field), why)


def give_memory_back() -> None:
    """To the system, what the C library holds for the next allocation; other libraries have no such call."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reasons(out: Sequence[int]) -> str:
    return ", ".join(f"{count:,} {reason}" for count, reason in zip(out[1:], REASONS[1:], strict=True) if count)


@contextlib.contextmanager
def telling(say: Say, text: Callable[[], str], every_s: float = 10.0) -> Iterator[None]:
    """Say where a long call stands every ``every_s`` seconds, from a thread: the call may be one of a library."""
    done, begin = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(every_s):
            say(f"{text()} ({time.monotonic() - begin:.0f} s)")

    thread = threading.Thread(target=tell, name="telling", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def interpreter_note() -> str:
    """What the default corpus is, for reports: it differs between versions of Python."""
    return f"the standard library of Python {sys.version.split()[0]}"
