"""The whole model once more, in float64 NumPy: forward, backward by hand, AdamW. Shares no code with trainer or engine.

It reads weights under their Hugging Face names (GPT-2, Llama, Qwen3) and works on whole batches, the plain way: logits
whole, no chunks, no stages. The golden cases of transformers check it; it checks the engine.

Letters: B batch, T sequence, C width, H heads, G key/value heads, D head size, F hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Tokens = NDArray[np.int64]
Weights = dict[str, Array]


@dataclass(frozen=True)
class Config:
    """What the mathematics needs of a Hugging Face config.json."""

    family: str
    layers: int
    heads: int
    groups: int
    head_size: int
    eps: float
    rope_base: float
    tied: bool
    window: int = 0
    """Keys that a token reads at most, its own among them; 0: all before it."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Config:
        if config["model_type"] == "gpt2":
            heads = config["n_head"]
            size = config["n_embd"] // heads
            eps, tied = config["layer_norm_epsilon"], config["tie_word_embeddings"]
            return cls("gpt2", config["n_layer"], heads, heads, size, eps, 0.0, tied)
        heads = config["num_attention_heads"]
        return cls(
            config["model_type"],
            config["num_hidden_layers"],
            heads,
            config["num_key_value_heads"],
            config["head_dim"],
            config["rms_norm_eps"],
            config["rope_parameters"]["rope_theta"],
            config["tie_word_embeddings"],
        )

    @property
    def head_name(self) -> str:
        """The tensor that makes the logits."""
        if not self.tied:
            return "lm_head.weight"
        return "transformer.wte.weight" if self.family == "gpt2" else "model.embed_tokens.weight"


# Every piece returns its value and a function from the gradient of that value to the gradients of its inputs.


def layernorm(x: Array, w: Array, b: Array, eps: float) -> tuple[Array, Any]:
    mean = x.mean(-1, keepdims=True)
    inverse = 1.0 / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + eps)
    normed = (x - mean) * inverse

    def back(dy: Array) -> tuple[Array, Array, Array]:
        dn = dy * w
        dx = inverse * (dn - dn.mean(-1, keepdims=True) - normed * (dn * normed).mean(-1, keepdims=True))
        axes = tuple(range(dy.ndim - 1))
        return dx, (dy * normed).sum(axes), dy.sum(axes)

    return normed * w + b, back


def rmsnorm(x: Array, w: Array, eps: float) -> tuple[Array, Any]:
    inverse = 1.0 / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    normed = x * inverse

    def back(dy: Array) -> tuple[Array, Array]:
        dn = dy * w
        dx = inverse * (dn - normed * (dn * normed).mean(-1, keepdims=True))
        return dx, (dy * normed).sum(tuple(range(dy.ndim - 1)))

    return normed * w, back


def rope_table(length: int, size: int, base: float) -> tuple[Array, Array]:
    angle = np.arange(length)[:, None] / base ** (np.arange(0, size, 2) / size)
    return np.cos(angle), np.sin(angle)


def turn(x: Array, cos: Array, sin: Array) -> Array:
    """x [B,T,N,D]: pairs (i, i + D/2) turned by the table's angles."""
    low, high = np.split(x, 2, -1)
    c, s = cos[:, None, :], sin[:, None, :]
    return np.concatenate([low * c - high * s, high * c + low * s], -1)


def attention(q: Array, k: Array, v: Array, window: int = 0) -> tuple[Array, Any]:
    """q [B,T,H,D], k and v [B,T,G,D]; causal, in a window; head h reads key/value head h / (H/G). Value [B,T,H,D]."""
    size, repeat = q.shape[-1], q.shape[2] // k.shape[2]
    kk, vv = np.repeat(k, repeat, 2), np.repeat(v, repeat, 2)
    score = np.einsum("bthd,bshd->bhts", q, kk) / np.sqrt(size)
    back_by = np.subtract.outer(*[np.arange(q.shape[1])] * 2)
    score = np.where((back_by >= 0) & ((back_by < window) | (not window)), score, -np.inf)
    p = np.exp(score - score.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)

    def fold(x: Array) -> Array:
        return np.asarray(x.reshape(*x.shape[:2], k.shape[2], repeat, size).sum(3))

    def back(do: Array) -> tuple[Array, Array, Array]:
        dp = np.einsum("bthd,bshd->bhts", do, vv)
        ds = p * (dp - (dp * p).sum(-1, keepdims=True)) / np.sqrt(size)
        dq = np.einsum("bhts,bshd->bthd", ds, kk)
        dk = np.einsum("bhts,bthd->bshd", ds, q)
        dv = np.einsum("bhts,bthd->bshd", p, do)
        return dq, fold(dk), fold(dv)

    return np.einsum("bhts,bshd->bthd", p, vv), back


def gelu(x: Array) -> tuple[Array, Any]:
    """The tanh form."""
    root = np.sqrt(2.0 / np.pi)
    t = np.tanh(root * (x + 0.044715 * x**3))

    def back(dy: Array) -> Array:
        return np.asarray(dy * (0.5 * (1.0 + t) + 0.5 * x * (1.0 - t**2) * root * (1.0 + 3 * 0.044715 * x**2)))

    return 0.5 * x * (1.0 + t), back


def swiglu(gate: Array, up: Array) -> tuple[Array, Any]:
    s = 1.0 / (1.0 + np.exp(-gate))

    def back(dy: Array) -> tuple[Array, Array]:
        return dy * up * s * (1.0 + gate * (1.0 - s)), dy * gate * s

    return gate * s * up, back


class Model:
    """One batch through the model: ``loss``, ``logits`` [B,T,V] and, after ``backward``, ``grads`` by weight name.
    ``counts``: which targets [B,T] do; the loss is their mean, and 0 where there are none.
    """

    def __init__(
        self,
        config: Config,
        weights: Weights,
        tokens: Tokens,
        targets: Tokens,
        counts: NDArray[np.bool_] | None = None,
    ) -> None:
        self.config, self.weights = config, weights
        self.counts = np.ones(targets.shape, bool) if counts is None else counts
        self.grads: Weights = {name: np.zeros_like(w) for name, w in weights.items()}
        self.tokens, self.targets = tokens, targets
        self.tape: list[Any] = []
        gpt2 = config.family == "gpt2"
        x = self._embed(gpt2)
        for n in range(config.layers):
            x = self._gpt2_layer(f"transformer.h.{n}", x) if gpt2 else self._llama_layer(f"model.layers.{n}", x)
        x = self._norm(x, "transformer.ln_f" if gpt2 else "model.norm")
        self._final = x
        self.logits = x @ weights[config.head_name].T
        top = self.logits.max(-1, keepdims=True)
        lse = top + np.log(np.exp(self.logits - top).sum(-1, keepdims=True))
        self.losses = (lse - np.take_along_axis(self.logits, targets[..., None], -1))[..., 0]
        self.loss = float(self.losses[self.counts].mean()) if self.counts.any() else 0.0
        self._lse = lse

    def backward(self) -> Weights:
        """Gradients of the mean loss over tokens, by weight name; a tied weight has the sum of both uses."""
        d = np.exp(self.logits - self._lse)
        np.put_along_axis(d, self.targets[..., None], np.take_along_axis(d, self.targets[..., None], -1) - 1.0, -1)
        d *= self.counts[..., None] / max(self.counts.sum(), 1)
        head = self.config.head_name
        self.grads[head] += np.einsum("btv,btc->vc", d, self._final)
        dx = d @ self.weights[head]
        for back in reversed(self.tape):
            dx = back(dx)
        return self.grads

    # Each of these runs forward at once and leaves on the tape what runs backward: gradient of the residual stream
    # after it, to the gradient before it.

    def _embed(self, gpt2: bool) -> Array:
        name = "transformer.wte.weight" if gpt2 else "model.embed_tokens.weight"
        x = self.weights[name][self.tokens]
        length = self.tokens.shape[1]
        if gpt2:
            x = x + self.weights["transformer.wpe.weight"][:length]

        def back(dx: Array) -> Array:
            np.add.at(self.grads[name], self.tokens, dx)
            if gpt2:
                self.grads["transformer.wpe.weight"][:length] += dx.sum(0)
            return dx

        self.tape.append(back)
        return x

    def _norm(self, x: Array, name: str) -> Array:
        y, back = self._norm_only(x, name)
        self.tape.append(back)
        return y

    def _norm_only(self, x: Array, name: str) -> tuple[Array, Any]:
        w = self.weights[f"{name}.weight"]
        if self.config.family == "gpt2":
            y, inner = layernorm(x, w, self.weights[f"{name}.bias"], self.config.eps)

            def back_layer(dy: Array) -> Array:
                dx, dw, db = inner(dy)
                self.grads[f"{name}.weight"] += dw
                self.grads[f"{name}.bias"] += db
                return np.asarray(dx)

            return y, back_layer
        y, inner = rmsnorm(x, w, self.config.eps)

        def back_rms(dy: Array) -> Array:
            dx, dw = inner(dy)
            self.grads[f"{name}.weight"] += dw
            return np.asarray(dx)

        return y, back_rms

    def _linear(self, x: Array, name: str) -> tuple[Array, Any]:
        """[..., in] to [..., out]; GPT-2 keeps [in, out] and a bias, the others [out, in] without."""
        conv = self.config.family == "gpt2"
        w = self.weights[f"{name}.weight"]
        matrix = w if conv else w.T  # [in, out]
        y = x @ matrix
        if conv:
            y = y + self.weights[f"{name}.bias"]

        def back(dy: Array) -> Array:
            dw = np.einsum("bti,bto->io", x, dy)
            self.grads[f"{name}.weight"] += dw if conv else dw.T
            if conv:
                self.grads[f"{name}.bias"] += dy.sum((0, 1))
            return np.asarray(dy @ matrix.T)

        return y, back

    def _gpt2_layer(self, at: str, x: Array) -> Array:
        h, d = self.config.heads, self.config.head_size
        batch, length, width = x.shape

        normed, norm_back = self._norm_only(x, f"{at}.ln_1")
        qkv, qkv_back = self._linear(normed, f"{at}.attn.c_attn")
        q, k, v = (part.reshape(batch, length, h, d) for part in np.split(qkv, 3, -1))
        o, attention_back = attention(q, k, v, self.config.window)
        out, out_back = self._linear(o.reshape(batch, length, width), f"{at}.attn.c_proj")
        middle = x + out

        normed2, norm2_back = self._norm_only(middle, f"{at}.ln_2")
        up, up_back = self._linear(normed2, f"{at}.mlp.c_fc")
        act, act_back = gelu(up)
        down, down_back = self._linear(act, f"{at}.mlp.c_proj")

        def back(dy: Array) -> Array:
            dm = dy + norm2_back(up_back(act_back(down_back(dy))))
            parts = attention_back(out_back(dm).reshape(batch, length, h, d))
            dqkv = np.concatenate([part.reshape(batch, length, width) for part in parts], -1)
            return np.asarray(dm + norm_back(qkv_back(dqkv)))

        self.tape.append(back)
        return np.asarray(middle + down)

    def _llama_layer(self, at: str, x: Array) -> Array:
        c = self.config
        batch, length, _ = x.shape
        cos, sin = rope_table(length, c.head_size, c.rope_base)

        normed, norm_back = self._norm_only(x, f"{at}.input_layernorm")
        values: dict[str, Array] = {}
        backs: dict[str, Any] = {}
        for part, heads in (("q", c.heads), ("k", c.groups), ("v", c.groups)):
            y, linear_back = self._linear(normed, f"{at}.self_attn.{part}_proj")
            y = y.reshape(batch, length, heads, c.head_size)
            part_norm_back = None
            if c.family == "qwen3" and part != "v":
                y, part_norm_back = self._norm_only(y, f"{at}.self_attn.{part}_norm")
            if part != "v":
                y = turn(y, cos, sin)
            values[part], backs[part] = y, (linear_back, part_norm_back)
        o, attention_back = attention(values["q"], values["k"], values["v"], c.window)
        out, out_back = self._linear(o.reshape(batch, length, -1), f"{at}.self_attn.o_proj")
        middle = x + out

        normed2, norm2_back = self._norm_only(middle, f"{at}.post_attention_layernorm")
        gate, gate_back = self._linear(normed2, f"{at}.mlp.gate_proj")
        up, up_back = self._linear(normed2, f"{at}.mlp.up_proj")
        act, act_back = swiglu(gate, up)
        down, down_back = self._linear(act, f"{at}.mlp.down_proj")

        def back(dy: Array) -> Array:
            d_gate, d_up = act_back(down_back(dy))
            dm = dy + norm2_back(gate_back(d_gate) + up_back(d_up))
            grads = attention_back(out_back(dm).reshape(batch, length, c.heads, c.head_size))
            total = np.zeros_like(normed)
            for part, dpart in zip("qkv", grads, strict=True):
                linear_back, part_norm_back = backs[part]
                if part != "v":
                    dpart = turn(dpart, cos, -sin)
                if part_norm_back is not None:
                    dpart = part_norm_back(dpart)
                total += linear_back(dpart.reshape(batch, length, -1))
            return np.asarray(dm + norm_back(total))

        self.tape.append(back)
        return np.asarray(middle + down)


@dataclass(frozen=True)
class AdamW:
    """The optimizer: decay on tensors of two or more dimensions, gradients clipped at a global norm."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip: float

    def step(self, number: int, weights: Weights, grads: Weights, m: Weights, v: Weights) -> float:
        """Updates weights and moments in place, ``number`` from 1; returns the gradient norm before clipping."""
        norm = float(np.sqrt(sum(float((g**2).sum()) for g in grads.values())))
        # torch's clip_grad_norm_ divides by norm + 1e-6
        scale = min(1.0, self.clip / (norm + 1e-6)) if self.clip > 0 else 1.0
        b1, b2 = self.betas
        for name, w in weights.items():
            g = grads[name] * scale
            if w.ndim >= 2:
                w *= 1.0 - self.lr * self.weight_decay
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g * g
            w -= self.lr / (1 - b1**number) * m[name] / (np.sqrt(v[name] / (1 - b2**number)) + self.eps)
        return norm


def orthogonal(u: Array) -> Array:
    """Newton-Schulz, as Muon has it: five steps of x = a x + b (x x') x + c (x x')^2 x from u over its norm."""
    x = u / (np.linalg.norm(u) + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x - 4.775 * square @ x + 2.0315 * square @ square @ x
    return np.asarray(x)


@dataclass(frozen=True)
class Muon(AdamW):
    """Matrices inside the layers by their orthogonal momentum, each of those that GPT-2 keeps side by side; all else by
    AdamW."""

    momentum: float = 0.95

    def step(self, number: int, weights: Weights, grads: Weights, m: Weights, v: Weights) -> float:
        hidden = {name for name, w in weights.items() if w.ndim == 2 and (".h." in name or ".layers." in name)}
        rest = {name: w for name, w in weights.items() if name not in hidden}
        norm = float(np.sqrt(sum(float((g**2).sum()) for g in grads.values())))
        scale = min(1.0, self.clip / norm) if self.clip > 0 else 1.0
        plain = AdamW(self.lr, self.betas, self.eps, self.weight_decay, 0.0)
        plain.step(number, rest, {name: grads[name] * scale for name in rest}, m, v)
        for name in hidden:
            g = grads[name] * scale
            m[name] = self.momentum * m[name] + g
            u = g + self.momentum * m[name]
            parts = np.split(u, 3, axis=1) if name.endswith("attn.c_attn.weight") else [u]
            step = np.concatenate([0.2 * max(part.shape) ** 0.5 * orthogonal(part) for part in parts], axis=1)
            weights[name] *= 1.0 - self.lr * self.weight_decay
            weights[name] -= self.lr * step
        return norm


def train(
    config: Config, weights: Weights, batches: Tokens, optimizer: AdamW, counts: NDArray[np.bool_] | None = None
) -> tuple[list[float], list[float]]:
    """One step a batch [steps, B, T+1]; updates ``weights``; losses and gradient norms. ``counts``: of which tokens the
    prediction does; a step of which none counts moves no weight.
    """
    counts = np.ones(batches.shape, bool) if counts is None else counts
    m = {name: np.zeros_like(w) for name, w in weights.items()}
    v = {name: np.zeros_like(w) for name, w in weights.items()}
    losses, norms = [], []
    for number, (batch, count) in enumerate(zip(batches, counts, strict=True), 1):
        model = Model(config, weights, batch[:, :-1], batch[:, 1:], count[:, 1:])
        losses.append(model.loss)
        by = optimizer if count[:, 1:].any() else replace(optimizer, lr=0.0)
        norms.append(by.step(number, weights, model.backward(), m, v))
    return losses, norms
