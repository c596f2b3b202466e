"""A run whose tensors are in pieces, two replicas on two nodes; killed, and gone on with by one process."""

from __future__ import annotations

from pathlib import Path

from tests.support.chaos import caught, rank_step
from tests.support.place import SPEC, Place, finish
from tests.support.wait import wait_for

STEPS = 20
WIDE = (
    SPEC.replace("layers = 4\nwidth = 32", "layers = 2\nwidth = 272")  # two blocks in each layer's matrices
    .replace("steps = 60\nbatch = 8\nmicrobatch = 2", f"steps = {STEPS}\nbatch = 4\nmicrobatch = 1")
    .replace("every = 4", "every = 2")
)
ONE = ("parallel.stages=1", "parallel.replicas=1", "launch.nodes=1")
TWO_BY_TWO = ("parallel.stages=2", "parallel.replicas=2", "launch.nodes=2")


def exported(place: Place, run: str) -> bytes:
    place.said("ckpt", "verify", run)
    place.said("ckpt", "export", run, "-o", "model")
    return (place.folder / "model" / "model.safetensors").read_bytes()


def test_what_replicas_saved_in_pieces_goes_on_in_one_process(tmp_path: Path) -> None:
    """The same digest as of a run that nothing stopped, every object verified, the same weights exported."""
    places = [Place(tmp_path / name, WIDE) for name in ("alone", "pieces")]
    alone, pieces = places
    try:
        undisturbed = alone.train(*ONE)
        run = undisturbed["run"]
        first = pieces.start_train(*TWO_BY_TWO)
        manifests = pieces.run_folder(run) / "manifests"
        with caught(pieces.folder, lambda: (rank_step(pieces.folder, 0) or 0) > 2, "a step after a snapshot"):
            wait_for(lambda: any(manifests.glob("*/manifest")), "a checkpoint", 60)
            pieces.stop_all()
        finish(first)
        sets = [item for text in ONE for item in ("--set", text)]
        done = pieces.call("runs", "resume", run, "--no-prefect", "--json", *sets)
        assert done.code == 0, done.err
        result = done.json()
        assert (result["step"], result["attempts"]) == (STEPS, 2)
        assert result["state_digest"] == undisturbed["state_digest"]
        chunks = {path.name.split("-")[0] for path in (pieces.run_folder(run) / "chunks").glob("*-00000001/*")}
        assert chunks == {f"{rank:06d}" for rank in range(4)}  # each rank stored something of its own
        assert exported(pieces, run) == exported(alone, run)
        shown = pieces.said("runs", "show", run)
        assert "2 stages x 2 replicas on 2 nodes" in shown
        assert "1 stage x 1 replica on 1 node" in shown
        assert f"step {STEPS}, attempt 2: " in pieces.said("ckpt", "show", run)  # not the record's number
    finally:
        for place in places:
            place.stop_all()
