"""A model that is only a shape: kernels for an attention layer without any weights."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..ir.encodings import Raw, Tokens
from ..ir.errors import KvantError
from ..ir.rewrite import Builder
from ..ir.text import print_graph
from ..ir.types import TensorType
from .capture import Layer, Model

SINKS = "kvant.sinks"
"""Name of the constant of a shape's learned sinks."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The attention of `layers` equal layers.

    Args:
        heads: query heads.
        kv_heads: key and value heads; divides `heads`.
        head_dim: channels of a query or key head.
        v_head_dim: channels of a value head; `head_dim` if not given.
        layers: number of layers.
        scale: factor of the logits; head_dim ** -0.5 if not given.
        softcap: cap * tanh(logit / cap), or none.
        window: number of newest tokens that a query sees, or none.
        sinks: learned sinks: for each layer a logit per query head, which joins its softmax; True
            for zeros, which is one more in every sum.
        dtype: dtype of the model, "bf16", "f16" or "f32".

    Raises: KvantError if the numbers do not fit together.
    """

    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int | None = None
    layers: int = 1
    scale: float | None = None
    softcap: float | None = None
    window: int | None = None
    sinks: bool | Sequence[Sequence[float]] = False
    dtype: Literal["bf16", "f16", "f32"] = "bf16"

    def __post_init__(self) -> None:
        sizes = (self.heads, self.kv_heads, self.head_dim, self.layers, self.values)
        whole = all(type(size) is int for size in sizes)
        if not whole or min(sizes) < 1 or self.heads % self.kv_heads:
            raise KvantError(
                "shape",
                f"{self.heads} query heads cannot share {self.kv_heads} key heads of "
                f"{self.head_dim} channels in {self.layers} layers",
                where="Shape",
                fix="give positive numbers, with heads a multiple of kv_heads",
            )
        _refuse_option(
            "dtype", self.dtype, self.dtype in ("bf16", "f16", "f32"), "bf16, f16 or f32"
        )
        for name, value in (("scale", self.scale), ("softcap", self.softcap)):
            fits = value is None or 0 < value < math.inf
            _refuse_option(name, value, fits, "a positive number, or None")
        if not isinstance(self.sinks, bool):
            rows = tuple(tuple(map(float, row)) for row in self.sinks)
            object.__setattr__(self, "sinks", rows)
            fits = [len(row) for row in rows] == [self.heads] * self.layers
            fits = fits and all(math.isfinite(logit) for row in rows for logit in row)
            use = f"{self.heads} finite numbers for each of {self.layers} layers, True or False"
            _refuse_option("sinks", rows, fits, use)
        fits = self.window is None or (type(self.window) is int and self.window > 0)
        _refuse_option("window", self.window, fits, "a positive number of tokens, or None")

    @property
    def values(self) -> int:
        """Channels of a value head."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    @property
    def logit_scale(self) -> float:
        """Factor of the logits."""
        return self.head_dim**-0.5 if self.scale is None else self.scale


def shape_sinks(facts: Mapping[str, Any], layer: int) -> dict[str, NDArray[np.float64]]:
    """Return the learned sinks of a layer by the name of their constant; nothing if there are none.

    Args:
        facts: of the model that `shape_model` made.
        layer: its index.
    """
    given = facts.get("sinks") or False
    if given is False:
        return {}
    return {SINKS: np.zeros(facts["heads"]) if given is True else np.array(given[layer])}


def _refuse_option(name: str, value: object, fits: bool, use: str) -> None:
    if not fits:
        raise KvantError(
            "shape", f"{name} is {value!r}", where=f"Shape({name}=...)", fix=f"use {use}"
        )


def parse_shape(text: str) -> Shape:
    """Return the shape written as heads x kv_heads x head_dim, such as "32x8x128"."""
    try:
        heads, kv_heads, head_dim = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise KvantError(
            "shape-syntax",
            f"{text!r} is not a shape",
            where="--shape",
            fix="write heads x kv heads x head size, such as 32x8x128",
        ) from None
    return Shape(heads, kv_heads, head_dim)


def shape_model(shape: Shape) -> Model:
    """Return the model of a shape: its graph takes q, k and v instead of hidden states."""
    b = Builder("attention")
    group = {"q": (shape.heads, shape.head_dim), "k": (shape.kv_heads, shape.head_dim)}
    group["v"] = (shape.kv_heads, shape.values)
    q, k, v = (
        b.input(name, TensorType("f32", ("B", heads, "T", width)))
        for name, (heads, width) in group.items()
    )
    store = Tokens(rest=Raw("f32"))
    past_k = b.emit("cache_read", b.emit("cache_write", k, role="k", store=store, basis=()))
    past_v = b.emit("cache_read", b.emit("cache_write", v, role="v", store=store, basis=()))
    sinks = [b.param(SINKS, TensorType("f32", (shape.heads,)))] if shape.sinks else []
    out = b.emit(
        "attend",
        q,
        past_k,
        past_v,
        *sinks,
        causal=True,
        scale=shape.logit_scale,
        softcap=shape.softcap,
        window=shape.window,
    )
    graph = b.finish((out,))
    name = f"shape-{shape.heads}x{shape.kv_heads}x{shape.head_dim}"
    return Model(
        name=name,
        architecture="shape",
        graphs=(graph,),
        layers=tuple(Layer(i, 0, f"layers.{i}.") for i in range(shape.layers)),
        facts=asdict(shape),
        fingerprint=hashlib.sha256(print_graph(graph).encode()).hexdigest(),
    )
