"""The table of kernels, as Python sees it: a mirror of ``trainer/engine/wire/kernels.h``, which is the manual.

``tests/trainer/test_wire.py`` compares every field with what ``hotstage-engine wire`` prints. The expand pass takes the
gradients from here, the layout, the simulator and MFU the work, the tests of kernels the operands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

SUMSQ_BLOCK, ATTENTION_HEAD_MAX, QUANTISE_PARTS, VOCAB_BLOCKS = 65536, 512, 1024, 64


class Operand(NamedTuple):
    """An operand of a kernel. ``role``: read, write, update, scratch; ``kind``: dt, acc, f64, byte, tokens, targets,
    control, places. Rows and columns are products of dims and numbers; ``note``: optional, "below V", "may be dy",
    "with db"."""

    role: str
    name: str
    kind: str
    rows: str = ""
    columns: str = ""
    ld: str = ""
    note: str = ""


class Kernel(NamedTuple):
    """A row of the table: its number, the names of its dims and reals, what must hold of dims, the kernels that give
    the gradients of its inputs and of its weights ("": none), the operand that takes over the output's gradient, the
    multiply-adds of its products, of products that are computed again, and its other operations, and its operands."""

    number: int
    dim_names: str
    real_names: str
    holds: str
    input_gradient: str
    weight_gradient: str
    passes: str
    products: str
    again: str
    each: str
    operands: tuple[Operand, ...]

    @property
    def ptrs(self) -> int:
        """How many operands it takes."""
        return len(self.operands)

    @property
    def dims(self) -> int:
        """How many integers it takes."""
        return len(self.dim_names.split())

    @property
    def reals(self) -> int:
        """How many reals it takes."""
        return len(self.real_names.split())

    @property
    def derived(self) -> bool:
        """Whether the table says what its gradients are."""
        return bool(self.input_gradient or self.weight_gradient)

    def named(self, dims: Sequence[int]) -> dict[str, int]:
        """A call's dims by name; those after the last that is given are left out."""
        return dict(zip(self.dim_names.split(), dims, strict=False))


def product(factors: str, dims: Mapping[str, int]) -> int:
    """What a product of the table stands for: dims by name and numbers; "BLOCKS n" and "BAND n w" as the header says.

    >>> product("2 B BAND T W", {"B": 3, "T": 4, "W": 2})
    42
    """
    value, words = 1, iter(factors.split())
    for word in words:
        how = word if word in ("BLOCKS", "BAND") else ""
        name = next(words) if how else word
        x = int(name) if name.isdigit() else dims[name]
        if how == "BLOCKS":
            x = -(-x // SUMSQ_BLOCK)
        elif how == "BAND":
            width = dims[next(words)]
            unseen = x - width if 0 < width < x else 0
            x = (x * (x + 1) - unseen * (unseen + 1)) // 2
        value *= x
    return value


def _kernel(
    number: int,
    dims: str,
    reals: str,
    operands: str,
    *,
    holds: str = "",
    input_gradient: str = "",
    weight_gradient: str = "",
    passes: str = "",
    products: str = "0",
    again: str = "0",
    each: str = "0",
) -> Kernel:
    """``operands``: fields of :class:`Operand` with ``:`` between, operands with ``,``."""
    taken = tuple(Operand(*text.split(":")) for text in operands.split(", "))
    return Kernel(number, dims, reals, holds, input_gradient, weight_gradient, passes, products, again, each, taken)


KERNELS: dict[str, Kernel] = {
    "embed_fwd": _kernel(
        1,
        "R C V T",
        "",
        "write:y:dt:R:C, read:tok:tokens::R::below V, read:wte:dt:V:C, read:wpe:dt:T:C::optional, "
        "read:first:places::R::optional",
        holds="T|R V<=2147483647",
        weight_gradient="embed_wgrad",
        each="R C",
    ),
    "embed_wgrad": _kernel(
        2,
        "R C V T",
        "",
        "update:dwte:acc:V:C, update:dwpe:acc:T:C::optional, read:dy:dt:R:C, read:tok:tokens::R::below V, "
        "read:first:places::R::optional",
        holds="T|R V<=2147483647",
        each="2 R C",
    ),
    "layernorm_fwd": _kernel(
        3,
        "R C",
        "eps",
        "write:y:dt:R:C, write:mean:acc::R, write:rstd:acc::R, read:x:dt:R:C, read:w:acc::C, read:b:acc::C",
        input_gradient="layernorm_igrad",
        weight_gradient="layernorm_wgrad",
        each="8 R C",
    ),
    "layernorm_igrad": _kernel(
        4,
        "R C ACCUM",
        "",
        "update:dx:dt:R:C, read:dy:dt:R:C, read:x:dt:R:C, read:w:acc::C, read:mean:acc::R, read:rstd:acc::R, "
        "read:old:dt:R:C::optional",
        each="11 R C",
    ),
    "layernorm_wgrad": _kernel(
        5,
        "R C",
        "",
        "update:dw:acc::C, update:db:acc::C, read:dy:dt:R:C, read:x:dt:R:C, read:mean:acc::R, read:rstd:acc::R",
        each="4 R C",
    ),
    "rmsnorm_fwd": _kernel(
        6,
        "R N C ldx ldy",
        "eps",
        "write:y:dt:R:N C:ldy, write:rstd:acc:R:N, read:x:dt:R:N C:ldx, read:w:acc::C",
        input_gradient="rmsnorm_igrad",
        weight_gradient="rmsnorm_wgrad",
        each="4 R N C",
    ),
    "rmsnorm_igrad": _kernel(
        7,
        "R N C lddx lddy ldx ACCUM",
        "",
        "update:dx:dt:R:N C:lddx, read:dy:dt:R:N C:lddy, read:x:dt:R:N C:ldx, read:w:acc::C, read:rstd:acc:R:N, "
        "read:old:dt:R:N C:lddx:optional",
        each="7 R N C",
    ),
    "rmsnorm_wgrad": _kernel(
        8,
        "R N C lddy ldx",
        "",
        "update:dw:acc::C, read:dy:dt:R:N C:lddy, read:x:dt:R:N C:ldx, read:rstd:acc:R:N",
        each="3 R N C",
    ),
    "linear_fwd": _kernel(
        9,
        "R N K ldy ldx ldres",
        "",
        "write:y:dt:R:N:ldy, read:x:dt:R:K:ldx, read:w:dt:N:K, read:b:acc::N::optional, read:res:dt:R:N:ldres:optional",
        input_gradient="linear_igrad",
        weight_gradient="linear_wgrad",
        passes="res",
        products="R N K",
    ),
    "linear_igrad": _kernel(
        10,
        "R N K lddx lddy ACCUM",
        "",
        "update:dx:dt:R:K:lddx, read:dy:dt:R:N:lddy, read:w:dt:N:K",
        products="R N K",
    ),
    "linear_wgrad": _kernel(
        11,
        "R N K lddy ldx ACCUM",
        "",
        "update:dw:acc:N:K, update:db:acc::N::optional, read:dy:dt:R:N:lddy, read:x:dt:R:K:ldx",
        products="R N K",
    ),
    "attention_fwd": _kernel(
        12,
        "B T H G D ldy ldq ldk ldv WINDOW",
        "scale",
        "write:y:dt:B T:H D:ldy, write:lse:acc:B H:T, read:q:dt:B T:H D:ldq, read:k:dt:B T:G D:ldk, "
        "read:v:dt:B T:G D:ldv, read:first:places:B:T::optional",
        holds="G|H D<=512 0<=WINDOW",
        input_gradient="attention_igrad",
        products="2 B H D BAND T WINDOW",
    ),
    "attention_igrad": _kernel(
        13,
        "B T H G D lddq lddk lddv lddy ldy ldq ldk ldv WINDOW",
        "scale",
        "write:dq:dt:B T:H D:lddq, write:dk:dt:B T:G D:lddk, write:dv:dt:B T:G D:lddv, "
        "read:dy:dt:B T:H D:lddy, read:y:dt:B T:H D:ldy, read:q:dt:B T:H D:ldq, read:k:dt:B T:G D:ldk, "
        "read:v:dt:B T:G D:ldv, read:lse:acc:B H:T, scratch:delta:acc:B H:T, "
        "read:first:places:B:T::optional",
        holds="G|H D<=512 0<=WINDOW",
        products="4 B H D BAND T WINDOW",
        again="B H D BAND T WINDOW",
    ),
    "rope_table": _kernel(
        14,
        "T D",
        "base",
        "write:tab:acc:T:D",
        holds="2|D T<=1073741824",
        each="20 T D",
    ),
    "rope_fwd": _kernel(
        15,
        "R T N D ldx",
        "",
        "update:x:dt:R:N D:ldx, read:tab:acc:T:D, read:first:places::R::optional",
        holds="T|R 2|D",
        input_gradient="rope_igrad",
        each="3 R N D",
    ),
    "rope_igrad": _kernel(
        16,
        "R T N D ldx",
        "",
        "update:x:dt:R:N D:ldx, read:tab:acc:T:D, read:first:places::R::optional",
        holds="T|R 2|D",
        each="3 R N D",
    ),
    "gelu_fwd": _kernel(
        17,
        "n",
        "",
        "write:y:dt::n, read:x:dt::n",
        input_gradient="gelu_igrad",
        each="20 n",
    ),
    "gelu_igrad": _kernel(
        18,
        "n",
        "",
        "write:dx:dt::n::may be dy, read:dy:dt::n, read:x:dt::n",
        each="30 n",
    ),
    "swiglu_fwd": _kernel(
        19,
        "R F",
        "",
        "write:y:dt:R:F, read:gu:dt:R:2 F",
        input_gradient="swiglu_igrad",
        each="20 R F",
    ),
    "swiglu_igrad": _kernel(
        20,
        "R F",
        "",
        "write:dgu:dt:R:2 F::may be gu, read:dy:dt:R:F, read:gu:dt:R:2 F",
        each="30 R F",
    ),
    "classifier_fwd": _kernel(
        21,
        "R C V CHUNK",
        "",
        "write:loss:acc::R, read:x:dt:R:C, read:w:dt:V:C, read:target:targets::R::below V, scratch:logits:acc:CHUNK:V",
        holds="V<=2147483647",
        input_gradient="classifier_grad",
        weight_gradient="classifier_grad",
        products="R C V",
        each="20 R V",
    ),
    "classifier_grad": _kernel(
        22,
        "R C V CHUNK ACCUM",
        "scale",
        "write:loss:acc::R, write:dx:dt:R:C, update:dw:acc:V:C, read:x:dt:R:C, read:w:dt:V:C, "
        "read:target:targets::R::below V, scratch:logits:acc:CHUNK:V, "
        "scratch:dlogits:dt:CHUNK:V::may be logits",
        holds="V<=2147483647",
        products="3 R C V",
        each="20 R V",
    ),
    "logits": _kernel(
        23,
        "R C V",
        "",
        "write:logits:acc:R:V, read:x:dt:R:C, read:w:dt:V:C",
        products="R C V",
    ),
    "add_acc": _kernel(
        24,
        "n",
        "",
        "update:dst:acc::n, read:src:acc::n",
        each="n",
    ),
    "sumsq": _kernel(
        25,
        "n",
        "",
        "write:out:f64, read:x:acc::n, scratch:part:f64::BLOCKS n",
        each="2 n",
    ),
    "adamw": _kernel(
        26,
        "n ZERO_G",
        "beta1 beta2 eps decay",
        "update:w:acc::n, update:m:acc::n, update:v:acc::n, update:g:acc::n, write:wc:dt::n::optional, "
        "read:ctl:control",
        each="14 n",
    ),
    "zero": _kernel(
        27,
        "bytes",
        "",
        "write:dst:byte::bytes",
    ),
    "init_normal": _kernel(
        28,
        "n TENSOR SEED",
        "mean std",
        "write:w:acc::n",
        holds="0<=TENSOR TENSOR<=4294967295",
        each="60 n",
    ),
    "init_const": _kernel(
        29,
        "n",
        "value",
        "write:w:acc::n",
    ),
    "cast": _kernel(
        30,
        "n",
        "",
        "write:dst:dt::n, read:src:acc::n",
        each="n",
    ),
    "quantise": _kernel(
        31,
        "R C ldx E5M2",
        "",
        "write:q:byte:R:C, write:qt:byte:C:R::optional, write:s:acc, read:x:dt:R:C:ldx, scratch:part:acc::1024",
        each="4 R C",
    ),
    "linear8_fwd": _kernel(
        32,
        "R N K ldy ldres",
        "",
        "write:y:dt:R:N:ldy, read:x8:byte:R:K, read:xs:acc, read:w8:byte:N:K, read:ws:acc, read:b:acc::N::optional, "
        "read:res:dt:R:N:ldres:optional",
        input_gradient="linear8_igrad",
        weight_gradient="linear8_wgrad",
        passes="res",
        products="R N K",
    ),
    "linear8_igrad": _kernel(
        33,
        "R N K lddx ACCUM",
        "",
        "update:dx:dt:R:K:lddx, read:dy8:byte:R:N, read:dys:acc, read:w8t:byte:K:N, read:ws:acc",
        products="R N K",
    ),
    "linear8_wgrad": _kernel(
        34,
        "R N K lddy",
        "",
        "update:dw:acc:N:K, update:db:acc::N::optional, read:dy8t:byte:N:R, read:dys:acc, read:x8t:byte:K:R, "
        "read:xs:acc, read:dy:dt:R:N:lddy:with db",
        products="R N K",
    ),
    "adamw_copy": _kernel(
        35,
        "n",
        "beta1 beta2 eps decay",
        "write:wc:dt::n, read:w:acc::n, read:m:acc::n, read:v:acc::n, read:g:acc::n, read:ctl:control",
        each="14 n",
    ),
    "fold": _kernel(
        36,
        "n",
        "",
        "update:dst:acc::n, update:src:acc::n",
        each="n",
    ),
    "sumsq_parts": _kernel(
        37,
        "n",
        "",
        "write:part:f64::BLOCKS n, read:x:acc::n",
        each="2 n",
    ),
    "sum": _kernel(
        38,
        "n",
        "",
        "write:out:f64, read:part:f64::n, scratch:tree:f64::n",
        each="n",
    ),
    "delay": _kernel(
        39,
        "NS",
        "",
        "read:behind:byte::::optional",
        holds="NS<=10000000000",
    ),
    "vocab_head": _kernel(
        40,
        "R C V CHUNK N BLOCK ACCUM",
        "scale",
        "write:loss:acc::R, write:dx:dt:R:C, update:dw:acc:V:C, read:x:dt:R:C, read:w:dt:V:C, "
        "read:target:targets::R::below V, scratch:logits:acc:CHUNK:V, scratch:dlogits:dt:CHUNK:V, "
        "scratch:parts:acc:N CHUNK:C",
        holds="V<=2147483647 N<=64",
        products="3 R C V",
        each="20 R V",
    ),
    "vocab_sums": _kernel(
        41,
        "R C V N BLOCK FIRST ALL",
        "",
        "write:e:acc:R:V, write:tops:acc:N:R, write:sums:acc:3:R, read:x:dt:R:C, read:w:dt:V:C, "
        "read:target:targets::R::below ALL",
        holds="0<=FIRST FIRST<=ALL ALL<=2147483647 N<=64",
        products="R C V",
        each="15 R V",
    ),
    "vocab_part": _kernel(
        42,
        "R C V CHUNK N BLOCK P FIRST ALL ACCUM",
        "scale",
        "write:loss:acc::R::optional, write:dx:acc:R:C, update:dw:acc:V:C, read:x:dt:R:C, read:w:dt:V:C, "
        "read:target:targets::R::below ALL, read:e:acc:R:V, read:tops:acc:N:R, read:sums:acc:3 P:R, "
        "scratch:dlogits:dt:CHUNK:V, scratch:parts:acc:N CHUNK:C",
        holds="0<=FIRST FIRST<=ALL ALL<=2147483647 N<=64 P<=64",
        products="2 R C V",
        each="5 R V",
    ),
    "borders": _kernel(
        43,
        "B T V END",
        "",
        "write:first:places:B:T, read:tok:tokens::B T::below V",
        holds="0<=END END<=V V<=2147483647",
        each="B T",
    ),
    "muon_momentum": _kernel(
        44,
        "n",
        "momentum",
        "write:u:acc::n, read:m:acc::n, read:g:acc::n, read:ctl:control",
        each="5 n",
    ),
    "muon_scale": _kernel(
        45,
        "n",
        "eps",
        "update:x:acc::n, read:sumsq:f64",
        each="n",
    ),
    "muon_poly": _kernel(
        46,
        "S",
        "a b c",
        "update:q:acc:S:S, read:p:acc:S:S",
        each="3 S S",
    ),
    "muon": _kernel(
        47,
        "n",
        "momentum scale decay",
        "update:w:acc::n, update:m:acc::n, update:g:acc::n, read:o:acc::n, write:wc:dt::n::optional, read:ctl:control",
        each="8 n",
    ),
    "muon_copy": _kernel(
        48,
        "n",
        "scale decay",
        "write:wc:dt::n, read:w:acc::n, read:o:acc::n, read:ctl:control",
        each="4 n",
    ),
    "embed_wgrad_tied": _kernel(
        49,
        "R C V T",
        "",
        "update:dwte:acc:V:C, update:dwpe:acc:T:C::optional, read:dy:dt:R:C, read:tok:tokens::R::below V, "
        "read:first:places::R::optional, scratch:top:places::V, scratch:next:places::R",
        holds="T|R R<=2147483647 V<=2147483647",
        each="2 R C",
    ),
}
