"""A run that an older version began, whose default for packing was another, is found by the same spec and goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoint.codec import pack, unpack
from checkpoint.errors import Damaged
from checkpoint.keys import chunk_name, index_key, run_key, spec_key
from checkpoint.log import RunLog
from checkpoint.store import Store
from checkpoint.verify import verify_run
from flows.data import prepare
from flows.drive.begin import prepare_run
from flows.drive.run import INDEX_CAP, ask_run, load_run, load_what, run_names
from flows.drive.train import cancel
from flows.recurring.chain import heir
from tests.checkpoint.samples import point_body
from tests.support.small_checkpoints import begin
from trainer.errors import DatasetError, LaunchRefused, PlanError, SpecError
from trainer.spec import RunSpec, parse_spec


def named(ground: tuple[Store, RunSpec], name: str, packing: str | None = None) -> RunSpec:
    tree = ground[1].model_dump(mode="json")
    return parse_spec({**tree, "name": name, "data": {**tree["data"], "packing": packing}})


def by_older(store: Store, run: str, *, first: bool) -> None:
    """Make the run's entry in the list of runs what a version gave it that had no other default yet, or no entries."""
    key = index_key(run)
    entry = unpack(store.get(key, max_bytes=INDEX_CAP), "entry", max_bytes=INDEX_CAP)
    assert isinstance(entry, dict)
    assert entry.pop("packing") == "across"
    store.delete(key)
    store.create(key, b"" if first else pack(entry))


@pytest.mark.parametrize("suffix", ["", "20260101t000000"])
def test_a_run_of_an_older_version_is_found_and_goes_on(ground: tuple[Store, RunSpec], suffix: str) -> None:
    store, said = ground[0], list[str]()
    old = prepare_run(named(ground, "olden", "across"), store, suffix=suffix)
    by_older(store, old.run, first=bool(suffix))
    again = prepare_run(named(ground, "olden"), store, suffix=suffix, say=said.append)
    assert (again.run, again.what, again.plan.digest) == (old.run, old.what, old.plan.digest)
    assert load_run(store, again.run).spec.data.packing == "across"
    assert [line for line in said if "begun by an older version" in line and 'packing = "within"' in line]
    asked = prepare_run(named(ground, "olden", "within"), store, suffix=suffix)
    assert asked.run != old.run
    assert asked.spec.data.packing == "within"
    assert prepare_run(named(ground, "olden"), store, suffix=suffix).run == old.run


def test_what_a_person_chose_since_is_no_run_of_an_older_version(ground: tuple[Store, RunSpec]) -> None:
    store = ground[0]
    chosen = prepare_run(named(ground, "chosen", "across"), store)
    new = prepare_run(named(ground, "chosen"), store)
    assert load_what(store, new.run)["data"]["packing"] == "within"
    assert {chosen.run, new.run} == {run for run in run_names(store) if run.startswith("chosen-")}
    assert len({chosen.run, new.run}) == 2


def test_a_chain_goes_on_as_it_began(ground: tuple[Store, RunSpec]) -> None:
    what = {"model": {"vocab": 300}, "data": {"packing": "across"}}
    assert heir(named(ground, "chain"), what).data.packing == "across"
    assert heir(named(ground, "chain", "within"), what).data.packing == "within"


def test_what_nothing_looks_at_and_a_folder_that_cannot_be_written_are_told_before_the_data(
    ground: tuple[Store, RunSpec], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, tree = ground[0], named(ground, "constant").model_dump(mode="json")
    tree["train"]["schedule"] |= {"kind": "constant", "decay": 2}
    tree["data"]["source"] = "text:none"
    (tmp_path / "out").write_text("")
    with pytest.raises(LaunchRefused, match=r"nothing can be started under .*out/runs: .*choose another with --out"):
        prepare_run(parse_spec(tree), store, out=tmp_path / "out")
    assert 'train.schedule.decay 2 is not looked at: a schedule of kind "constant"' in caplog.text
    tree["launch"]["target"] = "kubernetes"
    with pytest.raises(DatasetError):
        prepare_run(parse_spec(tree), store, out=tmp_path / "out")


def test_a_limit_of_tokens_is_no_part_of_what_is_trained(ground: tuple[Store, RunSpec]) -> None:
    """A resume with it was told that it changes what is trained."""
    store = ground[0]
    run = prepare_run(named(ground, "limited"), store).run
    assert ask_run(store, run, ["train.max_batch_tokens=4096"]).run == run
    with pytest.raises(SpecError, match="tokens a step; max_batch_tokens is 1"):
        ask_run(store, run, ["max_batch_tokens=1"])


def test_a_new_run_that_this_machine_has_no_memory_for_is_refused_before_it_is_there(
    ground: tuple[Store, RunSpec],
) -> None:
    store, before = ground[0], sorted(run_names(ground[0]))
    tree = named(ground, "huge").model_dump(mode="json")
    tree["model"] |= {"width": 1 << 18, "heads": 512, "hidden": None, "layers": 4}
    tree["parallel"] |= {"device": "cpu"}
    with pytest.raises(PlanError, match=r"the plan needs [\d.]+ TiB of memory, and .* are free .* checkpoint.slots=2"):
        prepare_run(parse_spec(tree), store)
    assert sorted(run_names(store)) == before
    there = parse_spec({**tree, "launch": {**tree["launch"], "target": "kubernetes"}})
    assert prepare_run(there, store).run in run_names(store), "a cluster's machines are others"


@pytest.mark.parametrize("held", [b"", pack([1])])
def test_a_damaged_what_is_no_other_run(ground: tuple[Store, RunSpec], held: bytes) -> None:
    store = ground[0]
    run = prepare_run(named(ground, f"cut{len(held)}"), store).run
    store.delete(spec_key(run))
    store.create(spec_key(run), held)
    with pytest.raises(Damaged, match=f"spec of (run )?{run}"):
        prepare_run(named(ground, f"cut{len(held)}"), store)


def test_a_run_whose_log_was_not_copied_is_not_trained_anew(ground: tuple[Store, RunSpec]) -> None:
    store, spec = ground[0], named(ground, "copied")
    run = prepare_run(spec, store).run
    chunk = run_key(run, chunk_name(7, 1, 0, "i1", 0))
    store.create(chunk, b"state")
    ways = (lambda: prepare_run(spec, store), lambda: ask_run(store, run, ()), lambda: load_run(store, run))
    for again in (*ways, lambda: cancel(store, run)):
        with pytest.raises(Damaged, match=rf"such as {chunk}\) and no log: .* Copy runs/{run}/log/ too"):
            again()
    (problem, *_) = verify_run(store, run).problems
    assert problem.reason.startswith("missing, and the run has state")
    log = RunLog(store, run)
    begin(log, log.fold())
    assert prepare_run(spec, store).run == run


def test_who_comes_back_to_a_corpus_that_has_changed_or_for_more_steps_is_told_of_the_run_that_was_left(
    ground: tuple[Store, RunSpec], tmp_path: Path
) -> None:
    store, said = ground[0], list[str]()
    (tmp_path / "b.txt").write_text("the quick brown fox jumps over the lazy cat. " * 200)

    def on(source: str, **train: object) -> str:
        tree = named(ground, "left").model_dump(mode="json")
        more = {"data": {**tree["data"], "source": source}, "train": {**tree["train"], **train}}
        said.clear()
        return prepare_run(parse_spec({**tree, **more}), store, say=said.append).run

    left = on(ground[1].data.source)
    log = RunLog(store, left)
    state = begin(log, log.fold())
    assert on(f"text:{tmp_path}/b.txt", seed=3) != left
    assert not [line for line in said if left in line], "it trains otherwise, and nothing is saved of that one"
    state = log.append("checkpoint", point_body(7, state.epoch), state, epoch=state.epoch)
    new = on(f"text:{tmp_path}/b.txt")
    (told,) = [line for line in said if left in line]
    assert told.startswith(f"run {new} is a new one: {left} (saved at step 7) has not ended")
    assert f"hotstage runs resume {left} --store {store.url}`" in told
    on(f"text:{tmp_path}/b.txt")
    assert not [line for line in said if left in line], "only a run that is new needs it"
    more = on(ground[1].data.source, steps=9)
    (told,) = [line for line in said if left in line]
    assert told.startswith(
        f"run {more} is a new one: {left} (saved at step 7) has the same spec but for train.steps (4)"
    )
    assert f"hotstage runs fork {left} --set train.steps=9 --store {store.url}`" in told, "its rate is 0 at its end"
    flat = {"schedule": {"kind": "constant", "warmup": 0}}
    left = on(ground[1].data.source, **flat)
    log = RunLog(store, left)
    state = begin(log, log.fold())
    log.append("checkpoint", point_body(4, state.epoch), state, epoch=state.epoch)
    on(ground[1].data.source, steps=9, **flat)
    (told,) = [line for line in said if left in line]
    assert f"hotstage runs resume {left} --steps 9 --store {store.url}`" in told
    on(ground[1].data.source, steps=3, **flat)
    assert not [line for line in said if left in line], "it is further already"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({}, r"validation.every is 3, and there is nothing to validate on: .* set validation.source"),
        ({"source": "text:none/*.txt"}, r"validation.source: data.source 'text:none/\*.txt' matches no file"),
    ],
)
def test_what_is_validated_on_is_looked_for_before_the_first_step(
    ground: tuple[Store, RunSpec], more: dict[str, str], says: str
) -> None:
    store, before = ground[0], sorted(run_names(ground[0]))
    tree = named(ground, f"valid{len(more)}").model_dump(mode="json")
    tree["data"] |= {"source": f"dataset:{prepare(ground[1].data, store).digest}"}  # whose parts the spec cannot know
    tree["validation"] |= {"every": 3, **more}
    with pytest.raises((DatasetError, SpecError), match=says):
        prepare_run(parse_spec(tree), store)
    assert sorted(run_names(store)) == before
    tree["validation"] |= {"source": ground[1].data.source}
    tree["eval"] = [{"name": name, "command": [program, "{model}"]} for name, program in (("x", "sh"), ("y", "n/one"))]
    said = list[str]()
    assert prepare_run(parse_spec(tree), store, say=said.append).run in run_names(store)
    assert [line[:40] for line in said if "[[eval]]" in line] == ["[[eval]] y: there is no program 'n/one' "]
