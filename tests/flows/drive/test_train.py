"""``flows.train`` takes what people have in their hands in Python."""

from __future__ import annotations

import atexit
import contextlib
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import flows
from tests.flows.conftest import Trained
from trainer.errors import SpecError
from trainer.spec import RunSpec, load_spec


@pytest.mark.parametrize(
    "form",
    [str, Path, lambda path: tomllib.loads(Path(path).read_text()), load_spec],
    ids=["name", "path", "dict", "spec"],
)
def test_a_spec_and_a_store_in_every_form(
    trained: Trained, form: Callable[[str], RunSpec | Mapping[str, Any] | str | Path]
) -> None:
    """The run has ended: each form is the same run, and nothing is trained."""
    with contextlib.chdir(trained.place.folder):
        store = Path(trained.place.env["HOTSTAGE_STORE"])
        seed = load_spec("spec.toml").train.seed
        for place in (store, str(store)):
            run = flows.train(form("spec.toml"), store=place, sets=f"train.seed={seed}", out="out")
            assert (run.name, run.result().state_digest) == (trained.run, trained.digest)
        with pytest.raises(SpecError, match="no_such"):
            flows.train(form("spec.toml"), store=store, sets=["no_such=1"])


def test_a_program_that_ends_before_its_run_is_told_so(trained: Trained, caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.chdir(trained.place.folder):
        before = atexit._ncallbacks()
        run = flows.train("spec.toml", store=trained.place.env["HOTSTAGE_STORE"], out="out")
        assert run.wait(60)
    assert atexit._ncallbacks() == before + 1
    run.left()
    assert not caplog.messages
    flows.Run(run.prepared, run.store, run.driver).left()  # as long as it has not ended
    assert f"run {trained.run} has not: nobody drives it from here on. Call wait()" in caplog.text
