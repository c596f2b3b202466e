"""What a model family is made of, and the builder with which it writes down its kernel calls.

Owns the vocabulary of the expand pass (views, weights, calls) and of Hugging Face import and export. A family states
its tensors and, in forward terms, the calls of its embedding, of one layer and of its head; gradients, memory and
messages are derived elsewhere. Nothing here knows stages, precision or the engine's addresses.

Letters: B microbatch, T sequence, R = B*T rows, C width, H query heads, G key/value heads, D head size, F hidden, V
vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from trainer.errors import PlanError
from trainer.wire.kernels import QUANTISE_PARTS

if TYPE_CHECKING:
    from trainer.spec import ModelSpec

Part = Literal["embed", "layer", "head"]


@dataclass(frozen=True, slots=True)
class Normal:
    """Initial values from a normal distribution of mean 0."""

    std: float


@dataclass(frozen=True, slots=True)
class Const:
    """The same initial value everywhere."""

    value: float


@dataclass(frozen=True, slots=True)
class Tensor:
    """A state tensor. ``name`` may hold ``{layer}``; matrices of linear layers are [out, in]."""

    name: str
    shape: tuple[int, ...]
    init: Normal | Const
    part: Part
    layer: int | None = None
    stacked: tuple[int, ...] = ()
    """Rows of the matrices that it is made of, one below the other, such as queries, keys and values; (): it is one."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def decay(self) -> bool:
        """Weight decay applies to tensors of two and more dimensions."""
        return len(self.shape) >= 2

    @property
    def hidden(self) -> bool:
        """Whether it is a matrix inside the model's layers, or several: what Muon takes."""
        return self.part == "layer" and len(self.shape) == 2

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """The first row and the rows of each matrix that it is made of.

        >>> Tensor("qkv", (12, 8), Const(0.0), "layer", stacked=(8, 2, 2)).matrices
        ((0, 8), (8, 2), (10, 2))
        """
        rows = self.stacked or self.shape[:1]
        if sum(rows) != self.shape[0]:
            raise PlanError(f"{self.name}: matrices of {rows} rows do not add up to its {self.shape[0]}")
        return tuple((sum(rows[:number]), count) for number, count in enumerate(rows))


@dataclass(frozen=True, slots=True)
class HfTensor:
    """A Hugging Face tensor as rows ``first .. first+rows-1`` of one of ours, transposed where HF has [in, out]."""

    name: str
    tensor: str
    first: int
    rows: int
    transpose: bool
    shape: tuple[int, ...]


# --- operands and calls -------------------------------------------------------------------------------------

BufferKind = Literal["dt", "acc", "byte", "places"]


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory for a value of one microbatch. ``kind``: "dt" (precision of activations), "acc" (always f32), "byte", or
    "places" (i32)."""

    name: str
    elements: int
    kind: BufferKind


@dataclass(frozen=True, slots=True)
class View:
    """``rows`` rows of ``cols`` elements of a buffer, ``ld`` elements apart, from element ``first``."""

    buffer: str
    first: int
    rows: int
    cols: int
    ld: int

    def split(self, *widths: int) -> tuple[View, ...]:
        """Columns side by side: ``qkv.split(H*D, G*D, G*D)``."""
        if sum(widths) != self.cols:
            raise PlanError(f"{self.buffer}: widths {widths} do not add up to its {self.cols} columns")
        parts, first = [], self.first
        for width in widths:
            parts.append(replace(self, first=first, cols=width))
            first += width
        return tuple(parts)

    @property
    def extent(self) -> int:
        """Elements from ``first`` to the end of the last row."""
        return (self.rows - 1) * self.ld + self.cols


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor, or its gradient. The head's use of a tied embedding has a gradient (and perhaps a copy) of its own.
    ``fp8``, ``fp8_turned`` and ``fp8_scale``: its codes, their transpose and their scale."""

    tensor: str
    use: Literal["weight", "gradient", "head", "head_gradient", "fp8", "fp8_turned", "fp8_scale"] = "weight"


@dataclass(frozen=True, slots=True)
class Given:
    """What the engine reads and writes for a microbatch beside activations."""

    name: Literal["tokens", "targets", "loss", "logits"]


@dataclass(frozen=True, slots=True)
class RopeTable:
    """cos and sin of every position; made once at load."""

    rows: int
    size: int
    base: float


Operand = View | Weight | Given | RopeTable | None


@dataclass(frozen=True, slots=True)
class Call:
    """A kernel call with symbolic operands, in the order of ``wire/kernels.h``. ``part``: F, I or W; R: F once more."""

    kernel: str
    ptr: tuple[Operand, ...]
    dim: tuple[int, ...]
    real: tuple[float, ...] = ()
    layer: int | None = None
    part: Literal["F", "I", "W", "R"] = "F"

    def views(self) -> tuple[View, ...]:
        """The operands that lie in buffers."""
        return tuple(p for p in self.ptr if isinstance(p, View))


NewBuffer = Callable[[str, int, Literal["acc", "byte"]], View]
"""Makes a buffer of a name, so many elements and a kind."""


def quantise(
    new: NewBuffer, x: View, turned: bool, layer: int | None, e5m2: bool = False, part: Literal["F", "I"] = "F"
) -> tuple[Call, tuple[View, View | None, View]]:
    """The call that makes ``x`` FP8, and what it makes: codes, their transpose if ``turned``, scale."""
    size = x.rows * x.cols
    codes, transpose = new("fp8", size, "byte"), new("fp8_turned", size, "byte") if turned else None
    scale, parts = new("fp8_scale", 1, "acc"), new("fp8_parts", QUANTISE_PARTS, "acc")
    ptr = (codes, transpose, scale, x, parts)
    return Call("quantise", ptr, (x.rows, x.cols, x.ld, int(e5m2)), (), layer, part), (codes, transpose, scale)


Tensors = Sequence[Tensor] | Mapping[str, Tensor]
"""A model's tensors, in order or by name."""


class Builder:
    """Writes down forward calls. Names of tensors may hold ``{layer}``, which stands for the layer being built.

    Every method appends one call and returns the value that it computes, a ``View``. With ``fp8`` the linear layers of
    the model's layers take FP8; "forward": and no backward will follow.
    """

    def __init__(
        self,
        model: ModelSpec,
        tensors: Tensors,
        microbatch: int,
        sequence: int,
        fp8: Literal["", "forward", "train"] = "",
    ) -> None:
        self.model, self.fp8 = model, fp8
        self.tensors = tensors if isinstance(tensors, Mapping) else {tensor.name: tensor for tensor in tensors}
        self.batch, self.sequence, self.rows = microbatch, sequence, microbatch * sequence
        self.layer: int | None = None
        self.calls: list[Call] = []
        self.buffers: dict[str, Buffer] = {}
        self.codes: dict[View, tuple[View, View | None, View]] = {}
        """By value, what it is in FP8 now: codes, their transpose (for backward), scale."""
        self.sources: dict[View, tuple[View, View | None]] = {}
        """By codes, the value that they are of, and their transpose."""
        self.first: View | None = None
        """By row, where its document begins; None: a sequence is one."""

    # values and weights

    def value(self, name: str, cols: int) -> View:
        """A new activation of R rows and ``cols`` columns."""
        unique = self._buffer(name, self.rows * cols, "dt")
        return View(unique, 0, self.rows, cols, cols)

    def statistic(self, name: str, elements: int) -> View:
        """A new f32 vector (means, inverse deviations, log-sums)."""
        return View(self._buffer(name, elements, "acc"), 0, 1, elements, elements)

    def weight(self, name: str) -> Weight:
        """The tensor of that name; PlanError where the family does not state it."""
        return Weight(self._tensor(name).name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor of that name."""
        return self._tensor(name).shape

    def _resolve(self, name: str) -> str:
        return name.replace("{layer}", str(self.layer))

    def _tensor(self, name: str) -> Tensor:
        found = self.tensors.get(self._resolve(name))
        if found is None:
            raise PlanError(f"the family has no tensor {self._resolve(name)!r}; add it to tensors()")
        return found

    def _buffer(self, name: str, elements: int, kind: BufferKind) -> str:
        place = "" if self.layer is None else f"{self.layer}."
        unique = f"{place}{name}.{len(self.buffers)}"
        self.buffers[unique] = Buffer(unique, elements, kind)
        return unique

    def _call(self, kernel: str, ptr: tuple[Operand, ...], dim: tuple[int, ...], real: tuple[float, ...] = ()) -> None:
        self.calls.append(Call(kernel, ptr, dim, real, self.layer))

    # kernels

    def borders(self, end: int) -> None:
        """From here on documents are apart, each ending with token ``end``: attention stays within one, positions count
        from its beginning."""
        self.first = View(self._buffer("first", self.rows, "places"), 0, 1, self.rows, self.rows)
        dim = (self.batch, self.sequence, self.model.vocab, end)
        self._call("borders", (self.first, Given("tokens")), dim)

    def embed(self, tokens: str, positions: str | None = None) -> View:
        """Rows of the token embedding, plus those of the position embedding."""
        vocab, width = self.shape(tokens)
        y = self.value("embed", width)
        wpe = None if positions is None else self.weight(positions)
        first = None if wpe is None else self.first
        dim = (self.rows, width, vocab, self.sequence)
        self._call("embed_fwd", (y, Given("tokens"), self.weight(tokens), wpe, first), dim)
        return y

    def layernorm(self, x: View, name: str) -> View:
        """LayerNorm with ``name.weight`` and ``name.bias``."""
        y, mean, rstd = (
            self.value("norm", x.cols),
            self.statistic("mean", self.rows),
            self.statistic("rstd", self.rows),
        )
        _whole(x)
        ptr = (y, mean, rstd, x, self.weight(f"{name}.weight"), self.weight(f"{name}.bias"))
        self._call("layernorm_fwd", ptr, (self.rows, x.cols), (self.model.norm_eps,))
        return y

    def rmsnorm(self, x: View, name: str, groups: int = 1) -> View:
        """RMSNorm with ``name.weight``; with ``groups``, each group of columns apart with the same weights."""
        y, rstd = self.value("norm", x.cols), self.statistic("rstd", self.rows * groups)
        dim = (self.rows, groups, x.cols // groups, x.ld, y.ld)
        self._call("rmsnorm_fwd", (y, rstd, x, self.weight(f"{name}.weight")), dim, (self.model.norm_eps,))
        return y

    def linear(self, x: View, name: str, residual: View | None = None) -> View:
        """x times ``name.weight`` [out, in], plus ``name.bias`` where the family states it, plus ``residual``."""
        out, inner = self.shape(f"{name}.weight")
        if inner != x.cols:
            raise PlanError(f"{self._resolve(name)}.weight takes {inner} inputs, {x.buffer} has {x.cols}")
        y = self.value(name.rsplit(".", 1)[-1], out)
        bias = self.weight(f"{name}.bias") if self._resolve(f"{name}.bias") in self.tensors else None
        ld = 0 if residual is None else residual.ld
        if self.fp8 and self.layer is not None:
            codes, _, scale = self.quantised(x)
            w, ws = (Weight(self.weight(f"{name}.weight").tensor, use) for use in ("fp8", "fp8_scale"))
            self._call("linear8_fwd", (y, codes, scale, w, ws, bias, residual), (self.rows, out, inner, y.ld, ld))
            return y
        dim = (self.rows, out, inner, y.ld, x.ld, ld)
        self._call("linear_fwd", (y, x, self.weight(f"{name}.weight"), bias, residual), dim)
        return y

    def quantised(self, x: View) -> tuple[View, View | None, View]:
        """A value in E4M3: codes, their transpose, scale; made once for all that read it."""
        if x not in self.codes:
            call, made = quantise(self._codes, x, self.fp8 == "train", self.layer)
            self.calls.append(call)
            self.codes[x], self.sources[made[0]] = made, (x, made[1])
        return self.codes[x]

    def _codes(self, name: str, elements: int, kind: Literal["acc", "byte"]) -> View:
        return View(self._buffer(name, elements, kind), 0, 1, elements, elements)

    def attention(self, q: View, k: View, v: View, heads: int, groups: int, size: int) -> View:
        """Causal attention within a document, and the model's window; query head h reads key/value head
        h / (heads / groups). Scale 1 / sqrt(size)."""
        o = self.value("attention", heads * size)
        lse = self.statistic("lse", self.batch * heads * self.sequence)
        dim = (self.batch, self.sequence, heads, groups, size, o.ld, q.ld, k.ld, v.ld, self.model.window)
        self._call("attention_fwd", (o, lse, q, k, v, self.first), dim, (size**-0.5,))
        return o

    def rope(self, x: View, heads: int) -> View:
        """Turns x in place: pairs (i, i + D/2) of every head by the angle of their position."""
        size = x.cols // heads
        self.codes = {value: made for value, made in self.codes.items() if value.buffer != x.buffer}
        table = RopeTable(self.sequence, size, self.model.rope_base)
        self._call("rope_fwd", (x, table, self.first), (self.rows, self.sequence, heads, size, x.ld))
        return x

    def gelu(self, x: View) -> View:
        """GELU, tanh form."""
        y = self.value("gelu", x.cols)
        self._call("gelu_fwd", (y, _whole(x)), (self.rows * x.cols,))
        return y

    def swiglu(self, x: View) -> View:
        """silu(first half of the columns) times the second half."""
        y = self.value("swiglu", x.cols // 2)
        self._call("swiglu_fwd", (y, _whole(x)), (self.rows, x.cols // 2))
        return y

    def classify(self, x: View, name: str, tied: bool) -> None:
        """The head: losses of every row against its target, from the logits x times ``name`` [V, C]."""
        vocab, width = self.shape(name)
        weight = Weight(self.weight(name).tensor, "head" if tied else "weight")
        self._call(
            "classifier_fwd", (Given("loss"), _whole(x), weight, Given("targets"), None), (self.rows, width, vocab)
        )


def _whole(x: View) -> View:
    if x.first or x.ld != x.cols:
        raise PlanError(f"{x.buffer}: this kernel takes whole rows, not columns {x.first}..{x.first + x.cols}")
    return x


# --- families -----------------------------------------------------------------------------------------------


class Family(ABC):
    """A model family. Implementations hold no state: everything comes from the ModelSpec."""

    name: str
    windows: bool = False
    """Whether ``model.window`` may be above 0: files in Hugging Face's form say it."""

    @abstractmethod
    def tensors(self, model: ModelSpec) -> tuple[Tensor, ...]:
        """All tensors in the table's order; those of part "layer" with ``{layer}``, once, between embed and head."""

    @abstractmethod
    def embed(self, b: Builder) -> View:
        """Tokens to the residual stream."""

    @abstractmethod
    def layer(self, b: Builder, x: View) -> View:
        """One layer, from residual stream to residual stream."""

    @abstractmethod
    def head(self, b: Builder, x: View) -> None:
        """Residual stream to losses; ends with ``b.classify``."""

    @abstractmethod
    def hf_tensors(self, model: ModelSpec) -> tuple[HfTensor, ...]:
        """How Hugging Face cuts and names the tensors; those of layers with ``{layer}``."""

    @abstractmethod
    def to_hf_config(self, model: ModelSpec) -> dict[str, Any]:
        """The model's config.json."""

    @abstractmethod
    def from_hf_config(self, config: Mapping[str, Any]) -> ModelSpec:
        """The ModelSpec of a config.json; SpecError for what this family cannot express."""

    def check(self, model: ModelSpec) -> None:  # noqa: B027 (a family without limits of its own overrides nothing)
        """Refuses sizes that this family cannot have, by ValueError with value, limit and mend."""


def tensor_table(family: Family, model: ModelSpec) -> tuple[Tensor, ...]:
    """Every tensor with its layer's number put in: embed, layers, head. The order of digests and checkpoints."""
    stated = family.tensors(model)
    embed = [t for t in stated if t.part == "embed"]
    layer = [t for t in stated if t.part == "layer"]
    head = [t for t in stated if t.part == "head"]
    if list(stated) != embed + layer + head:
        raise PlanError(f"family {family.name}: tensors() must list embed, then layer, then head")
    layers = [replace(t, name=t.name.replace("{layer}", str(n)), layer=n) for n in range(model.layers) for t in layer]
    table = (*embed, *layers, *head)
    if len({t.name for t in table}) != len(table):
        raise PlanError(f"family {family.name}: two tensors have one name; layer tensors need {{layer}} in theirs")
    return table


def hf_table(family: Family, model: ModelSpec) -> tuple[HfTensor, ...]:
    """Every Hugging Face tensor with its layer's number put in; together they cover each of ours exactly once."""
    table: list[HfTensor] = []
    stated = family.hf_tensors(model)
    for entry in (e for e in stated if "{layer}" not in e.name):
        table.append(entry)
    for n in range(model.layers):
        for entry in (e for e in stated if "{layer}" in e.name):
            name, tensor = (text.replace("{layer}", str(n)) for text in (entry.name, entry.tensor))
            table.append(replace(entry, name=name, tensor=tensor))
    rows: dict[str, int] = {}
    for entry in sorted(table, key=lambda e: (e.tensor, e.first)):
        if entry.first != rows.get(entry.tensor, 0):
            raise PlanError(f"family {family.name}: hf_tensors() leaves a gap in {entry.tensor} before {entry.name}")
        rows[entry.tensor] = entry.first + entry.rows
    wanted = {t.name: t.shape[0] for t in tensor_table(family, model)}
    if rows != wanted:
        wrong = sorted(name for name in {*rows, *wanted} if rows.get(name) != wanted.get(name))
        raise PlanError(f"family {family.name}: hf_tensors() does not cover {wrong[0]} exactly")
    return tuple(table)


def hf_whole(tensors: Sequence[Tensor], name: str, hf_name: str | None = None, transpose: bool = False) -> HfTensor:
    """The entry for a tensor that Hugging Face keeps whole."""
    shape = next(t.shape for t in tensors if t.name == name)
    return HfTensor(hf_name or name, name, 0, shape[0], transpose, shape[::-1] if transpose else shape)


def hf_rows(tensors: Sequence[Tensor], name: str, parts: Mapping[str, int]) -> tuple[HfTensor, ...]:
    """The entries for a tensor that Hugging Face keeps as several, one below the other: HF name to rows."""
    shape, first, entries = next(t.shape for t in tensors if t.name == name), 0, []
    for hf_name, rows in parts.items():
        entries.append(HfTensor(hf_name, name, first, rows, False, (rows, *shape[1:])))
        first += rows
    return tuple(entries)
