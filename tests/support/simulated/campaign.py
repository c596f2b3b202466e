"""Run after run through seeded faults, for so many simulated hours: ``make simulate-faults HOURS=1000 SEED=1``.

Each world is one run of some days on a cluster. What is found is printed with the seed of its world; its last line is
the one that others read.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from checkpoint.store.memory import MemoryStore
from flows.drive.begin import prepare_run
from flows.drive.run import Prepared
from tests.support.protocol.hub import quiet
from tests.support.simulated import model
from tests.support.simulated.faults import Faults
from tests.support.simulated.model import Account
from tests.support.simulated.world import KINDS, World
from trainer.spec import parse_spec

HOURS_A_RUN = 40.0
LEAST_GOODPUT = 0.97


@dataclass
class Campaign:
    """What came of it."""

    seed: int
    account: Account = field(default_factory=Account)
    worlds: int = 0
    attempts: int = 0
    looks: int = 0
    cpu_s: float = 0.0
    struck: Counter[str] = field(default_factory=Counter)
    disturbed: Counter[str] = field(default_factory=Counter)
    give_ups: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    found: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    @property
    def good(self) -> bool:
        return not any(self.found.values()) and self.account.goodput >= LEAST_GOODPUT

    def line(self) -> str:
        found = self.found
        return (
            f"goodput {100 * self.account.goodput:.2f} %, healthy killed {len(found['killed'])}, "
            f"wrong give-ups {len(found['wrong'])}"
        )


def specs(work: Path, hours: float = HOURS_A_RUN) -> list[tuple[MemoryStore, Prepared]]:
    """Runs that skip what diverges or stop there, with and without a smaller layout to fall back to."""
    (work / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    out = []
    for divergence, layouts in (("stop", [1]), ("skip", [1]), ("skip", [])):
        spec = parse_spec(
            {
                "name": "simulated",
                "model": {"family": "gpt2", "layers": 4, "width": 32, "heads": 4, "context": 16},
                "train": {"steps": int(hours * 3600 / model.STEP_S), "batch": 4, "microbatch": 2, "sequence": 16},
                "data": {"vocab_size": 300, "source": f"text:{work}/a.txt"},
                "parallel": {"stages": model.RANKS},
                "checkpoint": {"every": model.SNAPSHOT_STEPS},
                "launch": {"target": "kubernetes", "nodes": model.RANKS, "stall_s": model.STALL_S},
                "recovery": {
                    "on_divergence": divergence,
                    "layouts": [{"stages": n, "nodes": n} for n in layouts],
                    "capacity_s": 600.0,
                },
            }
        )
        store = MemoryStore()
        out.append((store, prepare_run(spec, store)))
    return out


def run(
    hours: float, seed: int, work: Path, *, until_found: bool = False, hours_a_run: float = HOURS_A_RUN
) -> Campaign:
    """So many simulated hours; ``until_found``: fewer, where something is found."""
    campaign, began = Campaign(seed), time.process_time()
    bases = specs(work, hours_a_run)
    with quiet():
        while campaign.account.total_s < hours * 3600 and (not until_found or not any(campaign.found.values())):
            at = seed * 1_000_000 + campaign.worlds
            rng = random.Random(f"world {at}")
            store, prepared = rng.choice(bases)
            world = World(at, store, prepared, two=rng.random() < 0.2)
            faults = Faults(world, random.Random(f"faults {at}"))
            _live(world, until_found)
            _take(campaign, world, faults, at)
    campaign.cpu_s = time.process_time() - began
    return campaign


def _live(world: World, until_found: bool) -> None:
    """To its end, and what is left after that."""
    found = world.found.values()
    world.hub.run(lambda: bool(world.outcome) or (until_found and any(found)), 10 * HOURS_A_RUN * 3600)
    world.finish()
    world.hub.run(lambda: until_found and any(found), world.hub.now + 600.0)


def _take(campaign: Campaign, world: World, faults: Faults, seed: int) -> None:
    campaign.worlds += 1
    campaign.account.add(world.account)
    campaign.attempts += len(world.state.attempts)
    campaign.struck.update({str(cls): n for cls, n in world.struck.items()})
    campaign.disturbed.update(faults.disturbed)
    campaign.give_ups.update(world.give_ups)
    campaign.outcomes[world.outcome or "not ended"] += 1
    for kind, why in world.found.items():
        campaign.found[kind] += [f"world {seed}: {text}" for text in dict.fromkeys(why)]


def report(campaign: Campaign) -> str:
    """For people; the last line is the one that others read."""

    def counts(counter: Counter[str]) -> str:
        return ", ".join(f"{n} {name}" for name, n in sorted(counter.items())) or "none"

    account = campaign.account
    hours = [f"{s / 3600:.0f} hours" for s in (account.total_s, account.person_s, account.no_machines_s)]
    lines = [
        f"seed {campaign.seed}: {campaign.worlds} runs ({counts(campaign.outcomes)}), {campaign.attempts} attempts, "
        f"{hours[0]} ({hours[1]} of them a person's, {hours[2]} without machines), {campaign.cpu_s:.0f} CPU-seconds",
        f"failures: {counts(campaign.struck)}",
        f"disturbances: {counts(campaign.disturbed)}",
        f"give-ups: {counts(campaign.give_ups)}",
    ]
    for kind, found in campaign.found.items():
        lines += [f"{kind}: {text}" for text in found[:20]]
    found = campaign.found
    lines.append(f"orphans {len(found['orphans'])}, duplicates {len(found['duplicates'])}")
    return "\n".join([*lines, campaign.line()])


def main() -> int:
    parser = argparse.ArgumentParser(prog="make simulate-faults", description=__doc__.partition("\n")[0])
    parser.add_argument("--hours", type=float, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        campaign = run(asked.hours, asked.seed, Path(folder))
    print(report(campaign))
    return 0 if campaign.good else 1


if __name__ == "__main__":
    sys.exit(main())
