"""Runs that others published, foretold by the planner's own code with their real parameters.

    Llama 3       arXiv 2407.21783, table 4: BF16, MFU of H100's 989; interleaved, a layer a stage, none in the first
                  and the last (126 layers in 16 x 8 stages), no recomputation
    torchtitan    benchmarks/llama3_h100_202412_torchtitan.md: FP8, full recomputation; H100 of 500 W with HBM2e of
                  2.4 TB/s; microbatches: that release's default, as many as stages (tables 4, 5 and 6)
    Megatron      Megatron-Bridge docs/performance-summary.md (release 25.11) and its archive (26.02): FP8 current
                  scaling ("FP8") or MXFP8, BF16 elsewhere; recomputation is not told, none is assumed

What a row publishes is brought to one measure, TFLOP/s of a GPU with causal attention, as Megatron and this project
count it (torchtitan's from its tokens a second; Llama 3 does not say how it counts: taken as it stands).

Fitted: three numbers, ``times.SUSTAINED``, one a kind of device, each the geometric mean over rows marked ``fitted``
(``fit`` computes them again; a test compares). Nothing else was chosen by looking at these rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import log

from trainer.planner.cluster import ClusterSpec, parse_cluster
from trainer.planner.costs import ModelCosts, Sizes, model_costs
from trainer.planner.estimate import Estimate, Planner
from trainer.planner.layouts import Arrangement, Recompute
from trainer.planner.times import LIKE, SUSTAINED, DeviceTimes
from trainer.spec import ModelSpec


def _llama(layers: int, width: int, heads: int, hidden: int) -> ModelSpec:
    return ModelSpec(
        family="llama", layers=layers, width=width, heads=heads, kv_heads=8, hidden=hidden, vocab=128_256,
        context=1 << 18, tied=False,
    )  # fmt: skip


MODELS = {
    "8B": _llama(32, 4096, 32, 14_336),
    "70B": _llama(80, 8192, 64, 28_672),
    "405B": _llama(126, 16_384, 128, 53_248),
}
CLUSTERS: Mapping[str, Mapping[str, object]] = {
    "H100": {"device": "H100", "devices_per_node": 8, "nic_gbit_s": 400},
    "B200": {"device": "B200", "devices_per_node": 8, "nic_gbit_s": 400},
    "GB200": {"device": "GB200", "devices_per_node": 4, "rack_nodes": 16, "nic_gbit_s": 400},
    "GB300": {"device": "GB300", "devices_per_node": 4, "rack_nodes": 16, "nic_gbit_s": 800},
}
PIECES = "attention in context pieces: that release lost most of its rate from one piece to four, in its table 2 too"
UNKNOWN = "not known; by a hair, and on the side of all that ran on those machines"
POWER_500W = (500 / 700) ** (1 / 3)
"""A clock goes with about the cube root of power: assumed for torchtitan's H100s of 500 W."""


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """A row of somebody's table."""

    source: str
    model: str
    device: str
    precision: str
    devices: int
    sequence: int
    batch: int
    microbatch: int = 1
    tensor: int = 1
    positions: int = 1
    context: int = 1
    chunks: int = 1
    sharded: bool = False
    recompute: Recompute = "none"
    tflops: float = 0.0
    """Of a GPU, as published."""
    tokens_s: float = 0.0
    """Of a GPU, as published; one of the two."""
    fitted: bool = False
    missed: str = ""
    """Why it is foretold wrong by more than 15 %, as far as we know."""
    slower: float = 1.0
    """Of the device's rates, what is left by a power limit."""
    memory_bytes_s: float | None = None
    """Of the device's memory, where it is not the sheet's."""

    @property
    def layout(self) -> Arrangement:
        """In our words."""
        replicas = self.devices // (self.tensor * self.positions * self.context)
        return Arrangement(
            positions=self.positions,
            chunks=self.chunks,
            replicas=replicas,
            schedule="interleaved-1f1b" if self.chunks > 1 else "1f1b",
            microbatch=self.microbatch,
            microbatches=self.batch // self.microbatch // replicas,
            recompute=self.recompute,
            tensor=self.tensor,
            context=self.context,
            sharded=replicas if self.sharded else 1,
            groups=replicas,
        )

    def cluster(self) -> ClusterSpec:
        """What it ran on."""
        tree = dict(CLUSTERS[self.device])
        nodes = self.devices // int(str(tree["devices_per_node"]))
        return parse_cluster(
            {**tree, "nodes": nodes, "rack_nodes": min(nodes, int(str(tree.get("rack_nodes", 1))))}, ""
        )

    def costs(self) -> ModelCosts:
        """Of its model."""
        rows = self.microbatch * self.sequence  # they hold all logits at once
        return model_costs(Sizes(MODELS[self.model], self.microbatch, self.sequence, rows, self.precision))

    def foretold(self, sustained: float | None = None) -> Estimate:
        """What the planner says of it."""
        cluster = self.cluster()
        of = DeviceTimes.of(cluster.sheet, self.precision)
        share = (of.sustained if sustained is None else sustained) * self.slower
        sheet = cluster.sheet
        if self.memory_bytes_s is not None:
            sheet = replace(sheet, memory_bytes_per_s=self.memory_bytes_s)
        times = DeviceTimes(sheet, self.precision, share)
        return Planner(cluster, times, {self.microbatch: self.costs()}, self._counts()).estimate(self.layout)

    def published_mfu(self) -> float:
        """Of the peak of its precision, attention counted causal."""
        tflops = self.tflops or self.tokens_s * self.costs().flops_token / 1e12
        return 1e12 * tflops / self.cluster().sheet.peak[self.precision]

    def _counts(self) -> tuple[int, ...] | None:
        """Layers of each stage: two fewer in all, one at each end, where that divides; else by cost."""
        stages, layers = self.positions * self.chunks, MODELS[self.model].layers
        if stages < 3 or (layers + 2) % stages:
            return None
        each = (layers + 2) // stages
        return (each - 1, *[each] * (stages - 2), each - 1)

    def words(self) -> str:
        """What runs where, in a line."""
        axes = {"TP": self.tensor, "PP": self.positions, "VP": self.chunks, "CP": self.context}
        told = " ".join(f"{name}{size}" for name, size in axes.items() if size > 1)
        words = [f"{self.devices} {self.device}", self.precision, f"{self.sequence // 1024}k", told]
        return ", ".join(word for word in [*words, "FSDP" if self.sharded else ""] if word)


def _llama3(devices: int, sequence: int, context: int, tflops: float, fitted: bool = False) -> PublishedRun:
    return PublishedRun(
        source="Llama 3", model="405B", device="H100", precision="bf16", devices=devices, sequence=sequence,
        batch=(16 << 20) // sequence, tensor=8, positions=16, chunks=8, context=context, tflops=tflops, fitted=fitted,
    )  # fmt: skip


def _titan(
    model: str, devices: int, batch: int, microbatch: int, positions: int, chunks: int, tokens_s: float,
    sequence: int = 8192, context: int = 1, sharded: bool = False,
) -> PublishedRun:  # fmt: skip
    return PublishedRun(
        source="torchtitan", model=model, device="H100", precision="fp8", devices=devices, sequence=sequence,
        batch=batch, microbatch=microbatch, tensor=8, positions=positions, chunks=chunks, context=context,
        recompute="layer", tokens_s=tokens_s, slower=POWER_500W, sharded=sharded, memory_bytes_s=2.4e12,
        missed=PIECES if context > 1 else UNKNOWN if sharded else "",
    )  # fmt: skip


def _megatron(
    release: str, device: str, model: str, devices: int, batch: int, microbatch: int,
    axes: tuple[int, int, int, int], tflops: float, *, sharded: bool = False, fitted: bool = False, mx: bool = False,
) -> PublishedRun:  # fmt: skip
    tensor, positions, context, chunks = axes
    return PublishedRun(
        source=f"Megatron {release}{' MXFP8' if mx else ''}", model=model, device=device, precision="fp8",
        devices=devices, sequence=8192, batch=batch, microbatch=microbatch, tensor=tensor, positions=positions,
        context=context, chunks=chunks, tflops=tflops, sharded=sharded, fitted=fitted,
    )  # fmt: skip


RUNS: tuple[PublishedRun, ...] = (
    _llama3(8192, 8192, 1, 430, fitted=True),
    _llama3(16_384, 8192, 1, 400),
    _llama3(16_384, 131_072, 16, 380),
    _titan("405B", 512, 256, 4, 8, 1, 100),
    _titan("405B", 512, 256, 4, 8, 2, 128),
    _titan("405B", 512, 64, 1, 8, 1, 76, sequence=32_768),
    _titan("405B", 512, 32, 1, 8, 1, 47, sequence=65_536, context=2),
    _titan("405B", 512, 16, 1, 8, 1, 31, sequence=131_072, context=4),
    _titan("405B", 512, 8, 1, 8, 1, 16, sequence=262_144, context=8),
    _titan("70B", 256, 512, 16, 1, 1, 876, sharded=True),
    _megatron("25.11", "H100", "8B", 8, 128, 1, (1, 1, 1, 1), 744, sharded=True),
    _megatron("25.11", "H100", "70B", 64, 128, 1, (4, 8, 1, 5), 719),
    _megatron("25.11", "H100", "405B", 1024, 512, 1, (8, 8, 2, 8), 737, fitted=True),
    _megatron("26.02", "H100", "70B", 64, 256, 1, (4, 8, 1, 5), 728),
    _megatron("26.02", "H100", "405B", 1024, 1536, 1, (8, 8, 2, 8), 784),
    _megatron("25.11", "B200", "8B", 8, 128, 2, (1, 1, 1, 1), 1576),
    _megatron("25.11", "B200", "405B", 128, 64, 1, (4, 8, 2, 8), 1667),
    _megatron("25.11", "GB200", "8B", 8, 128, 2, (1, 1, 1, 1), 1622, fitted=True),
    _megatron("25.11", "GB200", "70B", 64, 256, 2, (1, 1, 1, 1), 1937, sharded=True, fitted=True),
    _megatron("25.11", "GB200", "405B", 256, 1536, 1, (4, 16, 1, 4), 2053, fitted=True),
    _megatron("26.02", "GB200", "70B", 64, 256, 2, (1, 1, 1, 1), 1815, sharded=True),
    _megatron("26.02", "GB200", "70B", 64, 256, 1, (2, 4, 1, 5), 1623, mx=True),
    _megatron("26.02", "GB200", "405B", 256, 1536, 1, (4, 16, 1, 4), 2004),
    _megatron("26.02", "GB200", "405B", 256, 1536, 1, (4, 16, 1, 8), 1983, mx=True),
    _megatron("25.11", "GB300", "8B", 8, 128, 2, (1, 1, 1, 1), 1933, fitted=True),
    _megatron("25.11", "GB300", "70B", 64, 256, 2, (1, 1, 1, 1), 2030, sharded=True, fitted=True),
    _megatron("25.11", "GB300", "405B", 256, 1536, 1, (2, 8, 2, 4), 2522, fitted=True),
    _megatron("26.02", "GB300", "70B", 64, 256, 2, (1, 1, 1, 1), 2248, sharded=True),
    _megatron("26.02", "GB300", "70B", 64, 256, 1, (1, 4, 1, 5), 2064, mx=True),
    _megatron("26.02", "GB300", "405B", 256, 1536, 1, (4, 8, 1, 4), 2495),
    _megatron("26.02", "GB300", "405B", 256, 1536, 1, (2, 8, 2, 4), 2349, mx=True),
)


def fit(runs: Iterable[PublishedRun] = RUNS) -> dict[str, float]:
    """By kind of device, the share with which the fitted rows are foretold right on (geometric) average."""
    found = {}
    chosen = [run for run in runs if run.fitted]
    for name in SUSTAINED:
        mine = [run for run in chosen if LIKE.get(run.device, run.device) == name]
        low, high = 0.1, 1.5
        for _ in range(30):
            middle = (low + high) / 2
            over = sum(log(run.foretold(middle).mfu / run.published_mfu()) for run in mine)
            low, high = (low, middle) if over > 0 else (middle, high)
        found[name] = low
    return found


def table(runs: Iterable[PublishedRun] = RUNS) -> str:
    """Published against foretold, in Markdown."""
    lines = [
        "| source | model | what ran | published MFU | foretold | error | |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        published, found = run.published_mfu(), run.foretold()
        lines.append(
            f"| {run.source} | {run.model} | {run.words()} | {published:.1%} | {found.mfu:.1%} | "
            f"{found.mfu / published - 1:+.0%} | {'fitted' if run.fitted else 'missed' if run.missed else ''} |"
        )
    return "\n".join(lines) + "\n"
