"""Maps of a head's channels: Walsh-Hadamard, permutation, scale; their duals and inverses.

    <k, q>  =  <M k, M^-T q>        for every invertible M

A stream's maps are applied to what is stored; the dual M^-T of K's maps is applied to q, and the
inverse M^-1 of V's maps to the output. Hadamard and Gather are orthogonal, so each is its own dual.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from .arrays import Array
from .errors import KvantError


@dataclass(frozen=True, slots=True)
class Hadamard:
    """y = H x with the orthonormal Sylvester Walsh-Hadamard matrix; H is its own inverse.

    Attributes:
        size: width of the transform in channels, a power of two; equals the head width.
    """

    size: int

    def __post_init__(self) -> None:
        """Refuse a size that is not a power of two."""
        if type(self.size) is not int or self.size < 1 or self.size & (self.size - 1):
            raise KvantError(
                "hadamard-size",
                f"a Hadamard transform of size {self.size} does not exist here",
                where=f"hadamard({self.size})",
                fix="use a power of two, or leave the rotation out for this head size",
            )

    def check(self, channels: int, where: str) -> None:
        """Refuse a head whose width is not `size`."""
        if channels != self.size:
            raise KvantError(
                "hadamard-size",
                f"hadamard({self.size}) does not fit heads of {channels} channels",
                where=where,
                fix="use the head width as size (a power of two), or leave the rotation out",
            )


@dataclass(frozen=True, slots=True)
class Gather:
    """y[h, c] = x[h, order[h, c]]: storage order of the channels.

    Attributes:
        order: name of an i64[H, D] constant; every row is a permutation of 0..D-1.
    """

    order: str

    def __post_init__(self) -> None:
        """Refuse an empty name."""
        _check_name(self.order, "gather")

    def check(self, channels: int, where: str) -> None:
        """Accept any head width: the constant itself is checked when it is applied."""
        _check_channels(channels, where)


@dataclass(frozen=True, slots=True)
class Scale:
    """y[h, c] = x[h, c] * values[h, c], or divided by it with `inverse`.

    Attributes:
        values: name of a float [H, D] constant, all of it finite and above zero.
        inverse: divide instead of multiply.
    """

    values: str
    inverse: bool = False

    def __post_init__(self) -> None:
        """Refuse an empty name."""
        _check_name(self.values, "scale")
        if not isinstance(self.inverse, bool):
            raise KvantError(
                "map-constant",
                f"inverse is {self.inverse!r}",
                where="scale",
                fix="use true or false",
            )

    def check(self, channels: int, where: str) -> None:
        """Accept any head width: the constant itself is checked when it is applied."""
        _check_channels(channels, where)


Map: TypeAlias = Hadamard | Gather | Scale
Constants: TypeAlias = Mapping[str, Array]

ONLINE = ("hadamard", "gather", "scale")  # the ops that apply a map online


def _check_name(name: str, kind: str) -> None:
    if not isinstance(name, str) or not name:
        raise KvantError(
            "map-constant",
            f"the constant of a {kind} map has the name {name!r}",
            where=kind,
            fix="name a constant, for example 'kvant.k_order'",
        )


def _check_channels(channels: int, where: str) -> None:
    if channels < 1:
        raise KvantError(
            "map-constant", f"a head of {channels} channels", where=where, fix="use at least one"
        )


def hadamard_transform(x: Array) -> Array:
    """Return the orthonormal Walsh-Hadamard transform of x over its last axis, in float64.

    Args:
        x: shape [..., D], D a power of two. Sylvester's order: H[i, j] = (-1)^popcount(i & j).

    Raises: KvantError("hadamard-size") if D is not a power of two.
    """
    channels = x.shape[-1]
    Hadamard(channels)
    y = np.array(x, dtype=np.float64)
    half = 1
    while half < channels:
        pairs = y.reshape(*x.shape[:-1], channels // (2 * half), 2, half)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        y = np.stack((low + high, low - high), axis=-2).reshape(x.shape)
        half *= 2
    # A product, as kernels have it: queries under compute = int round alike to the last bit.
    return np.asarray(y * (1.0 / np.sqrt(channels)))


def constant_problem(kind: str, constant: Array) -> str | None:
    """Return why an array cannot be the constant of a map, or None if it can.

    Args:
        kind: "gather" or "scale".
        constant: [H, D].
    """
    if kind == "scale":
        is_positive = np.isfinite(constant).all() and (constant > 0.0).all()
        return None if is_positive else "a scale is not a positive number"
    if not np.issubdtype(constant.dtype, np.integer):
        return f"its type is {constant.dtype}"
    channels = np.arange(constant.shape[-1])
    for head, row in enumerate(constant):
        if not np.array_equal(np.sort(row), channels):
            return f"the row of head {head} is no permutation of 0..{len(channels) - 1}"
    return None


def dual(m: Map) -> Map:
    """Return M^-T of a map: what q needs when k got M."""
    return Scale(m.values, not m.inverse) if isinstance(m, Scale) else m


def apply(maps: Sequence[Map], x: Array, constants: Constants, repeat: int = 1) -> Array:
    """Apply maps in order.

    Args:
        maps: first one first.
        x: shape [..., H, T, D].
        constants: order and scale arrays by name, each [H / repeat, D].
        repeat: heads of x that share one row of a constant; head h uses row h // repeat.

    Returns: float64, the shape of x.
    Raises: KvantError if a constant is missing or has another shape, or a map does not fit D.
    """
    y = np.asarray(x, dtype=np.float64)
    for m in maps:
        m.check(y.shape[-1], "apply")
        if isinstance(m, Hadamard):
            y = hadamard_transform(y)
        elif isinstance(m, Gather):
            y = _take(y, _constant(m.order, y, constants, repeat))
        else:
            values = _constant(m.values, y, constants, repeat)
            y = y / values if m.inverse else y * values
    return y


def apply_inverse(maps: Sequence[Map], x: Array, constants: Constants, repeat: int = 1) -> Array:
    """Undo `apply(maps, ...)`: the inverses, last map first. Arguments as in `apply`."""
    y = np.asarray(x, dtype=np.float64)
    for m in reversed(maps):
        if isinstance(m, Gather):
            m.check(y.shape[-1], "apply_inverse")
            order = _constant(m.order, y, constants, repeat)
            y = _take(y, np.argsort(order, axis=-1))
        else:
            # Hadamard is its own inverse; the inverse of a diagonal is its dual.
            y = apply([dual(m)], y, constants, repeat)
    return y


def map_heads(
    kind: str, x: Array, constant: Array | None = None, *, repeat: int = 1, inverse: bool = False
) -> Array:
    """Return one map of x [..., H, T, D], in x's type: what the op of its name does.

    Args:
        kind: one of ONLINE.
        x: any float type.
        constant: order or scale [H / repeat, D]; none for a Hadamard.
        repeat: heads that share one row of the constant.
        inverse: divide by the scale.
    """
    m: Map = Hadamard(x.shape[-1]) if kind == "hadamard" else Gather("constant")
    m = Scale("constant", inverse) if kind == "scale" else m
    constants = {} if constant is None else {"constant": constant}
    return apply((m,), x, constants, repeat).astype(x.dtype)


def map_rows(
    kind: str, w: Array, constant: Array | None = None, *, heads: int, **options: Any
) -> Array:
    """Return one map of the output channels of a weight [H*D, n], a bias, a norm weight [(H,) D].

    Args:
        kind: one of ONLINE.
        w: its rows lie head by head; a norm weight [D] is that of every head.
        constant: as in `map_heads`.
        heads: H.
        options: as in `map_heads`.
    """
    width = w.shape[0] // heads if constant is None else constant.shape[1]
    w = w if w.shape[0] == heads * width else np.broadcast_to(w, (heads, width))
    blocks = w.reshape(heads, width, -1).swapaxes(1, 2)  # channels last
    return map_heads(kind, blocks, constant, **options).swapaxes(1, 2).reshape(w.shape)


def map_cols(kind: str, w: Array, constant: Array | None = None, **options: Any) -> Array:
    """Return one map of the input channels of a weight [n, H*D]; arguments as in `map_rows`."""
    return map_rows(kind, w.T, constant, **options).T


def _take(x: Array, order: Array) -> Array:
    """Return x[..., h, t, order[h, 0, c]]."""
    return np.take_along_axis(x, np.broadcast_to(order, x.shape), axis=-1)


def _constant(name: str, x: Array, constants: Constants, repeat: int) -> Array:
    """Return a [H / repeat, D] constant as [H, 1, D]."""
    if name not in constants:
        raise KvantError(
            "map-constant",
            f"no constant {name!r}",
            where="maps",
            fix=f"pass one of shape [heads, channels]; there are: {', '.join(sorted(constants))}",
        )
    value = np.asarray(constants[name])
    heads, channels = x.shape[-3], x.shape[-1]
    if value.ndim != 2 or value.shape[0] * repeat != heads or value.shape[1] != channels:
        raise KvantError(
            "map-constant",
            f"constant {name!r} has shape {value.shape} for {heads} heads of {channels} channels",
            where="maps",
            fix=f"pass shape ({heads // repeat}, {channels}): one row for {repeat} heads",
        )
    return np.repeat(value, repeat, axis=0)[:, None, :]


def argument_name(constant: str, kind: str) -> str:
    """Return how kernels and launchers call a constant; `kind` is "order" or "scale"."""
    return f"{kind}_{''.join(c if c.isalnum() else '_' for c in constant)}"
