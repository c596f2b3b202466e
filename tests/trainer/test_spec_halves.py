"""What is trained and how: which keys make a run's name, and how records hold the two, of older versions too."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.trainer.test_spec import DATA, refusal, tree
from trainer.errors import SpecError
from trainer.spec import (
    how_map,
    parse_spec,
    run_id,
    what_bytes,
    what_digest,
    what_map,
    with_how,
)
from trainer.spec_layouts import other_hows


def test_only_the_what_half_makes_the_identity() -> None:
    spec = parse_spec(tree())
    assert run_id(spec, DATA) == f"small-{what_digest(spec, DATA).hex()[:6]}"
    for same in ("parallel.stages=4", "checkpoint.every=1", "launch.trace=true", "recovery.backoff_s=2", "threads=2"):
        assert what_bytes(parse_spec(tree(), [same]), DATA) == what_bytes(spec, DATA)
    for other in ("train.steps=11", "train.lr=1e-3", "model.tied=false", "data.shuffled=false", "train.seed=1"):
        assert what_bytes(parse_spec(tree(), [other]), DATA) != what_bytes(spec, DATA)
    assert what_bytes(parse_spec(tree(), ["model.vocab=300"]), DATA) == what_bytes(spec, DATA)
    assert set(how_map(spec)) == {"parallel", "checkpoint", "launch", "recovery"}


def test_what_bytes_are_canonical() -> None:
    turned = dict(reversed(list(tree().items())))
    turned["model"] = dict(reversed(list(tree()["model"].items())))
    assert what_bytes(parse_spec(turned), DATA) == what_bytes(parse_spec(tree()), DATA)


def test_a_how_is_written_as_before_where_a_newer_key_is_not_used() -> None:
    """So that an older version reads it, and that a record's How still equals that of its spec."""
    assert set(how_map(parse_spec(tree()))["checkpoint"]) == {"every", "slots", "deadline_s", "commit_s"}
    used = parse_spec(tree(), ["checkpoint.snapshot_every=10"])
    assert how_map(used)["checkpoint"]["snapshot_every"] == 10
    assert parse_spec(tree() | how_map(used)) == used


def test_what_a_node_keeps_of_the_data_is_no_part_of_a_runs_name_and_follows_a_how() -> None:
    plain, cached = parse_spec(tree()), parse_spec(tree(), ["data.cache_gib=0.5"])
    assert run_id(plain, DATA) == run_id(cached, DATA)
    assert "data" not in how_map(plain)
    assert how_map(cached)["data"] == {"cache_gib": 0.5}
    what = {**plain.model_dump(mode="json"), "data": {"source": "text:x", "cache_gib": 7.0}}
    assert parse_spec(with_how(what, how_map(cached))).data.cache_gib == 0.5
    asked = parse_spec(with_how(what, how_map(plain)))
    assert (asked.data.cache_gib, asked.data.source) == (0.0, "text:x")
    several = parse_spec(tree(recovery={"allowed_stages": [1]}), ["data.cache_gib=0.5", "parallel.stages=2"])
    assert [how["data"] for how in other_hows(how_map(several))] == [{"cache_gib": 0.5}]


def test_a_key_that_is_gone_is_still_read() -> None:
    """Specs, the How of a log's records and Prefect's deployments of an older version hold it; it had no effect."""
    old = parse_spec(tree(recovery__max_rollbacks=3, recovery__backoff_s=2.0))
    assert old == parse_spec(tree(recovery__backoff_s=2.0))
    assert "max_rollbacks" not in how_map(old)["recovery"]
    with pytest.raises(SpecError, match=r"there is no key recovery\.max_rollbacks"):
        parse_spec(tree(), ["recovery.max_rollbacks=1"])


def test_a_key_that_came_later_is_not_written_at_its_default() -> None:
    """So the How of a spec without it has the bytes that an older version gives it."""
    plain, kept = parse_spec(tree()), parse_spec(tree(), ["checkpoint.keep.last=3", "checkpoint.keep.every_steps=1000"])
    assert "keep" not in how_map(plain)["checkpoint"]
    how = how_map(kept)
    assert how["checkpoint"]["keep"] == {"last": 3, "every_steps": 1000, "every_s": 0.0, "best": 0, "grace_s": 3600.0}
    assert parse_spec({**tree(), **how}) == kept
    assert parse_spec({**tree(), **how}, ["checkpoint.keep=all"]) == plain
    assert parse_spec({**tree(), **how}, ["checkpoint.keep=all", "checkpoint.keep.best=1"]).checkpoint.keep is not None
    assert parse_spec(tree(), ["checkpoint.keep={last=4}"]).checkpoint.keep == kept.checkpoint.keep.model_copy(  # type: ignore[union-attr]
        update={"last": 4, "every_steps": 0}
    )


@pytest.mark.parametrize(("batch", "groups"), [(2, 1), (6, 1), (8, 4), (12, 2), (16, 8), (96, 8)])
def test_groups_are_eight_where_the_microbatches_allow(batch: int, groups: int) -> None:
    """And the What says how many, so that a later default changes no run."""
    spec = parse_spec(tree(train__batch=batch))
    assert spec.train.groups == groups
    assert what_map(spec, DATA)["train"]["reduction_groups"] == groups
    explicit = parse_spec(tree(train__batch=batch, train__reduction_groups=groups))
    assert run_id(spec, DATA) == run_id(explicit, DATA)
    assert spec.resolve(DATA).resolve(DATA) == spec.resolve(DATA)


def test_documents_apart_need_a_token_that_ends_them() -> None:
    """Windows and packing are What; where documents have no end, a spec that says nothing has the name of old (the
    digest below)."""
    apart, open_ = parse_spec(tree(data__packing="within")), parse_spec(tree())
    assert what_map(open_, DATA)["data"]["packing"] == "across"
    with pytest.raises(SpecError, match=r"without a token that ends one: .*data\.end_token.*packing = \"across\""):
        apart.resolve(DATA)
    ended = replace(DATA, eot=7)
    assert run_id(apart, ended) == run_id(open_, ended) != run_id(parse_spec(tree(data__packing="across")), ended)
    assert open_.resolve(ended).resolve(ended).data.packing == "within"
    words = refusal(tree(data__packing="within", data__end_token="", data__tokenizer="t.json"))
    assert 'data.packing "within" finds documents by the token' in words
    words = refusal(tree(data__begin_token="<s>", data__end_token="<s>", data__tokenizer="t.json"))
    assert "begin_token and end_token are both '<s>': one stands between" in words
    assert "begin_token '<s>' is for a tokenizer that is given" in refusal(tree(data__begin_token="<s>"))
    assert "'inside' is unknown; take one of 'across' or 'within'" in refusal(tree(data__packing="inside"))
    assert "window 9: family gpt2 reads all that came before" in refusal(tree(model__window=9))
    assert "model.window -1 must be at least 0" in refusal(tree(model__family="mistral", model__window=-1))
    windows = [parse_spec(tree(model__family="mistral", model__window=w)) for w in (0, 9)]
    assert "window" not in what_map(windows[0], DATA)["model"]
    assert what_map(windows[1], DATA)["model"]["window"] == 9


def test_one_group_and_a_limit_of_tokens_keep_the_names_of_old() -> None:
    """Digest of a What as it was before there were groups; the limit refuses, and is no part of what is trained."""
    old = parse_spec(tree(train__reduction_groups=1, train__max_batch_tokens=128))
    assert what_digest(old, DATA).hex() == "d608b1ad4af3daa1afb7423f04a675523b3ba898867fdaf5587d06ed845b40e3"
    assert run_id(parse_spec(tree()), DATA) != run_id(old, DATA)
