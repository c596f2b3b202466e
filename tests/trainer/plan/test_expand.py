"""Families as data and the backward programs derived from them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest

from trainer import models, wire
from trainer.errors import PlanError, SpecError
from trainer.models.base import Builder, Call, Given, View, Weight, hf_table, tensor_table
from trainer.plan.expand import StagePrograms, expand_stage
from trainer.plan.flops import call_cost
from trainer.plan.layout import split_layers
from trainer.spec import ModelSpec

FAMILIES = ("gpt2", "llama")


def model(family: str = "gpt2", **over: object) -> ModelSpec:
    more = {"kv_heads": 2} if family == "llama" else {}
    return ModelSpec.model_validate(
        {"family": family, "layers": 3, "width": 24, "heads": 4, "context": 16, "vocab": 50, **more, **over}
    )


def stage(spec: ModelSpec, layers: range, infer: bool = False, split: bool = False) -> StagePrograms:
    family = models.family(spec.family)
    return expand_stage(family, spec, tensor_table(family, spec), layers, 2, 8, 64, 1 / 16, infer, split=split)


def weights(calls: tuple[Call, ...], use: str) -> list[str]:
    return [p.tensor for call in calls for p in call.ptr if isinstance(p, Weight) and p.use == use]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_gets_exactly_one_gradient(family: str, tied: bool) -> None:
    spec = model(family, tied=tied)
    whole = stage(spec, range(3))
    names = [t.name for t in tensor_table(models.family(family), spec)]
    assert sorted(weights(whole.backward, "gradient")) == sorted(names)
    assert len(weights(whole.backward, "head_gradient")) == int(tied)
    parts = [stage(spec, range(n, n + 1)) for n in range(3)]
    assert sorted(name for part in parts for name in weights(part.backward, "gradient")) == sorted(names)


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_join_into_the_whole(family: str) -> None:
    """The calls do not depend on the cut, so the bits do not."""

    def shapes(calls: tuple[Call, ...]) -> list[tuple[object, ...]]:
        return [(c.kernel, c.dim, c.real, c.layer, c.part) for c in calls]

    spec = model(family)
    whole, parts = stage(spec, range(3)), [stage(spec, range(n, n + 1)) for n in range(3)]
    assert shapes(whole.forward) == [one for part in parts for one in shapes(part.forward)]
    assert shapes(whole.backward) == [one for part in parts[::-1] for one in shapes(part.backward)]


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_gradients_follow_their_input_gradients(family: str) -> None:
    """The residual gradient is one buffer, changed in place: what reads it must not be put off."""
    calls = stage(model(family), range(3)).backward
    for before, call in itertools.pairwise(calls):
        if call.part == "W" and call.kernel != "embed_wgrad":
            assert before.part == "I"
            assert before.kernel.rsplit("_", 1)[0] == call.kernel.rsplit("_", 1)[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [range(3), range(1), range(1, 2), range(2, 3)], ids=str)
def test_the_linears_weight_gradients_are_put_off(family: str, layers: range) -> None:
    """And nothing else; both programs together do what the whole backward does, each kind of call in its order."""
    spec = model(family)
    whole, apart = stage(spec, layers), stage(spec, layers, split=True)
    assert whole.weights == ()

    def shapes(calls: tuple[Call, ...]) -> list[tuple[object, ...]]:
        return [(c.kernel, c.dim, c.real, c.layer, c.part, weights((c,), "gradient")) for c in calls]

    linears = [one for one in shapes(whole.backward) if one[0] == "linear_wgrad"]
    assert shapes(apart.weights) == linears
    assert shapes(apart.backward) == [one for one in shapes(whole.backward) if one not in linears]
    assert apart.forward == whole.forward
    assert apart.programs({"F", "B"}) == {"F": apart.forward, "B": apart.backward + apart.weights}


def test_what_no_kernel_can_write_elsewhere_is_not_put_off() -> None:
    """Two linears of one value, no norm between: the second adds to a gradient that the linear before still reads."""

    class Bare(type(models.family("gpt2"))):  # type: ignore[misc]
        name = "bare"

        def layer(self, b: Builder, x: View) -> View:
            x = super().layer(b, x)
            y = b.linear(x, "transformer.h.{layer}.attn.c_proj")
            return b.linear(y, "transformer.h.{layer}.attn.c_proj", residual=x)

    spec, family = model(), Bare()
    apart = expand_stage(family, spec, tensor_table(family, spec), range(1, 2), 2, 8, 64, 1.0, split=True)
    early = [c for c in apart.backward if c.kernel == "linear_wgrad"]
    assert [weights((c,), "gradient")[0] for c in early] == ["transformer.h.1.attn.c_proj.weight"]
    assert early[0].ptr[2] == apart.gradient_received
    changed = apart.backward.index(early[0]) + 1
    assert apart.backward[changed].ptr[0] == apart.gradient_received
    assert len(apart.weights) == 5


def test_layers_that_compute_again_put_nothing_off() -> None:
    """What they made would be kept for W in the slot that it was to leave."""
    spec, built = model(), models.family("gpt2")
    some = expand_stage(
        built, spec, tensor_table(built, spec), range(3), 2, 8, 64, 1.0, split=True, recompute="layer", again=2
    )
    assert {call.layer for call in some.weights} == {2}
    none = stage(spec, range(3), split=True)
    assert len(some.weights) + sum(c.kernel == "linear_wgrad" for c in some.backward) == len(none.weights)
    sizes = [sum(one.buffers[n].elements for n in one.kept) for one in (some, none)]
    assert sizes[0] < 0.5 * sizes[1]


def test_a_gradient_that_only_a_bias_reads_is_given_only_where_there_is_one() -> None:
    """In FP8 a linear's weight gradient takes codes: without a bias nothing in bfloat16 is kept for it."""
    for family, biased in (("gpt2", True), ("llama", False)):
        spec, built = model(family, width=32, hidden=64), models.family(family)
        some = expand_stage(built, spec, tensor_table(built, spec), range(3), 2, 8, 64, 1.0, fp8=True, split=True)
        assert {call.kernel for call in some.weights} == {"linear8_wgrad"}
        assert {call.ptr[6] is not None for call in some.weights} == {biased}
        kept = {some.buffers[name].kind for call in some.weights for name in {v.buffer for v in call.views()}}
        assert ("dt" in kept) == biased


AGAIN = {
    "elementwise": {
        "gpt2": ["layernorm_fwd", "layernorm_fwd", "gelu_fwd"],
        "llama": ["rmsnorm_fwd", "rmsnorm_fwd", "swiglu_fwd"],
    },
    "attention": {
        "gpt2": ["layernorm_fwd", "attention_fwd", "layernorm_fwd", "gelu_fwd"],
        "llama": ["rmsnorm_fwd", "attention_fwd", "rmsnorm_fwd", "swiglu_fwd"],
    },
}


@pytest.mark.parametrize("kind", ["elementwise", "attention", "layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_layer_computes_again(family: str, kind: Any) -> None:
    """The first two layers, before their backward; without the last linear, which nobody needs."""
    spec, built = model(family), models.family(family)
    table = tensor_table(built, spec)
    whole = stage(spec, range(3))
    again = expand_stage(built, spec, table, range(3), 2, 8, 64, 1 / 16, recompute=kind, again=2)

    def shapes(calls: Sequence[Call]) -> list[tuple[object, ...]]:
        return [(c.kernel, c.dim, c.real, c.layer) for c in calls]

    assert shapes(again.forward) == shapes(whole.forward)
    assert shapes([c for c in again.backward if c.part != "R"]) == shapes(whole.backward)
    for layer in range(3):
        ahead = [c for c in whole.forward if c.layer == layer]
        more = [c for c in again.backward if c.layer == layer and c.part == "R"]
        wanted = AGAIN[kind][family] if kind in AGAIN else [c.kernel for c in ahead[:-1]]
        assert [c.kernel for c in more] == (wanted if layer < 2 else [])
        first = next(i for i, c in enumerate(again.backward) if c.layer == layer)
        assert list(again.backward[first : first + len(more)]) == more
    assert sum(again.buffers[n].elements for n in again.kept) < sum(whole.buffers[n].elements for n in whole.kept)
    if kind == "layer":
        kept = [name for name in again.kept if name.startswith(("0.", "1."))]
        assert sorted(name.split(".")[0] for name in kept) == ["0", "1"]  # a layer's output is the input of the next


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_have_the_operands_of_the_table(family: str) -> None:
    whole = stage(model(family), range(3))
    for call in (*whole.forward, *whole.backward, *stage(model(family), range(3), infer=True).forward):
        table = wire.KERNELS[call.kernel]
        assert (len(call.ptr), len(call.dim), len(call.real)) == (table.ptrs, table.dims, table.reals), call


def test_what_is_kept_and_what_is_sent() -> None:
    first, middle, last = (stage(model(), range(n, n + 1)) for n in range(3))
    assert first.received is None
    assert first.gradient_sent is None
    assert first.sent is not None
    assert first.gradient_received == first.sent  # the gradient comes back into the memory of what was sent
    assert middle.received is not None
    assert middle.gradient_sent is not None
    assert middle.gradient_sent.buffer in middle.kept
    assert last.sent is None
    assert last.gradient_sent is not None
    assert last.gradient_sent.buffer not in last.kept
    for part in (first, middle, last):
        read_back = {v.buffer for c in part.backward for v in c.views()}
        assert part.kept <= read_back | {v.buffer for v in (part.received, part.sent) if v}


def test_inference_has_no_backward_and_ends_with_logits() -> None:
    whole = stage(model(), range(3), infer=True)
    assert whole.backward == ()
    assert whole.kept == frozenset()
    assert whole.forward[-1].kernel == "logits"
    assert whole.forward[-1].ptr[0] == Given("logits")


def test_a_value_that_nothing_uses_is_refused() -> None:
    class Waste(type(models.family("gpt2"))):  # type: ignore[misc]
        name = "waste"

        def layer(self, b: Builder, x: View) -> View:
            b.gelu(x)
            return super().layer(b, x)  # type: ignore[no-any-return]

    spec = model()
    with pytest.raises(PlanError, match="no gradient"):
        expand_stage(Waste(), spec, tensor_table(Waste(), spec), range(3), 2, 8, 64, 1.0)


def test_unknown_families_and_tensors_are_refused() -> None:
    with pytest.raises(SpecError, match="'bert' is unknown"):
        models.family("bert")
    b = Builder(model(), tensor_table(models.family("gpt2"), model()), 1, 8)
    with pytest.raises(PlanError, match=r"no tensor 'nope\.weight'"):
        b.layernorm(b.value("x", 24), "nope")
    with pytest.raises(PlanError, match="takes 24 inputs"):
        b.linear(b.value("x", 25), "transformer.h.0.attn.c_attn")
    with pytest.raises(PlanError, match="do not add up"):
        b.value("x", 24).split(20, 5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_hugging_face_config_goes_both_ways(family: str, tied: bool) -> None:
    f, spec = models.family(family), model(family, tied=tied)
    again = f.from_hf_config(f.to_hf_config(spec))
    full = {"hidden": spec.size_of_hidden}
    if family == "llama":
        full |= {"head_size": spec.size_of_head, "kv_heads": spec.groups}
    assert again == spec.model_copy(update=full)
    assert f.to_hf_config(again) == f.to_hf_config(spec)
    assert sum(t.elements for t in tensor_table(f, spec)) == sum(
        int(e.shape[0]) * (int(e.shape[1]) if len(e.shape) > 1 else 1) for e in hf_table(f, spec)
    )


def test_configs_that_compute_something_else_are_refused() -> None:
    gpt2, llama = models.family("gpt2"), models.family("llama")
    with pytest.raises(SpecError, match="activation_function is 'relu'"):
        gpt2.from_hf_config(gpt2.to_hf_config(model()) | {"activation_function": "relu"})
    with pytest.raises(SpecError, match=r"rope_parameters is .*'yarn'"):
        llama.from_hf_config(llama.to_hf_config(model("llama")) | {"rope_parameters": {"rope_type": "yarn"}})
    with pytest.raises(SpecError, match="attention_bias is True"):
        llama.from_hf_config(llama.to_hf_config(model("llama")) | {"attention_bias": True})
    with pytest.raises(SpecError, match="n_layer is missing"):
        gpt2.from_hf_config({"n_embd": 24})


def test_layers_split_by_cost() -> None:
    assert split_layers([1] * 12, 6, 2) == (range(9), range(9, 12))
    assert split_layers([5, 1, 1, 1], 0, 2) == (range(1), range(1, 4))
    assert split_layers([1, 1, 1], 100, 3) == (range(1), range(1, 2), range(2, 3))
    assert [len(r) for r in split_layers([1] * 9, 5, 4)] == [2, 3, 3, 1]  # the head decides; the others share alike
    with pytest.raises(PlanError, match="4 stages cannot share 3 layers"):
        split_layers([1, 1, 1], 0, 4)


def test_the_split_is_the_best_there_is() -> None:
    source = random.Random(1)
    for _ in range(60):
        costs = [source.randint(1, 9) for _ in range(source.randint(1, 8))]
        head, stages = source.randint(0, 20), source.randint(1, len(costs))

        def heaviest(cuts: tuple[int, ...], costs: list[int] = costs, head: int = head) -> int:
            ends = [0, *cuts, len(costs)]
            sums = [sum(costs[a:b]) for a, b in itertools.pairwise(ends)]
            sums[-1] += head
            return max(sums)

        best = min(heaviest(cuts) for cuts in itertools.combinations(range(1, len(costs)), stages - 1))
        ranges = split_layers(costs, head, stages)
        assert heaviest(tuple(r.stop for r in ranges[:-1])) == best
        assert [n for r in ranges for n in r] == list(range(len(costs)))


def test_costs_count_products() -> None:
    whole = stage(model(), range(3), infer=True)
    one = sum(call_cost(c) for c in whole.forward if c.layer == 0)
    linear = 3 * 16 * 12 * 24 * 24
    assert linear < one < 2 * linear
