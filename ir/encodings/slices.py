"""Slices of channels: a static partition of a head, each slice in a format of its own.

    x = [x_0 | x_1 | ...]    ->    encode_0(x_0), encode_1(x_1), ...

Channels count in storage order, after the maps of the stream: a pass that sorts channels says which
ones meet in a slice. A slice of zero bits stores nothing and is read as zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm

import numpy as np

from ..arrays import Array
from ..errors import KvantError
from .affine import Int
from .bfp import Bfp
from .lut import Lut
from .raw import Raw, check_integer, stored_finite
from .sparse import Sparse

SLICE_CHANNELS = 16


@dataclass(frozen=True, slots=True)
class Drop:
    """Zero bits: nothing is stored, and zeros are read. Only a slice can be dropped."""

    @property
    def group_tokens(self) -> int:
        """Tokens that are encoded together: one."""
        return 1

    def check(self, channels: int, where: str) -> None:
        """Accept any number of channels from one on."""
        check_integer(where, "channels", channels, 1)

    def encode(self, x: Array) -> dict[str, Array]:
        """Return no fields. Raises: KvantError for NaN and Inf, as the other formats."""
        stored_finite(x, "f32", "value", "drop")
        return {}


Term = Raw | Int | Bfp | Lut | Sparse
SliceFormat = Term | Drop


@dataclass(frozen=True, slots=True)
class Slice:
    """Neighbouring channels in one format.

    Attributes:
        width: channels.
        format: how they are stored.
    """

    width: int
    format: SliceFormat

    def __post_init__(self) -> None:
        """Refuse fields out of range."""
        check_integer("slice", "width", self.width, 1)
        if not isinstance(self.format, SliceFormat):
            raise KvantError(
                "bad-encoding",
                f"format is {self.format!r}",
                where="slice",
                fix="use a format (raw, int, bfp, lut, sparse, drop)",
            )


@dataclass(frozen=True, slots=True)
class Slices:
    """A format for each slice of the channels.

    Fields of `encode`: those of each slice, named with its number: "0.codes", "0.scale", "1.codes".

    Attributes:
        slices: from channel 0 on, in storage order.
    """

    slices: tuple[Slice, ...]

    def __post_init__(self) -> None:
        """Refuse what is no slices, and slices that store nothing at all."""
        slices = self.slices
        if not isinstance(slices, tuple) or not all(isinstance(part, Slice) for part in slices):
            raise _bad(f"slices are {slices!r}", "give a tuple of slices")
        if all(isinstance(part.format, Drop) for part in slices):
            raise _bad("every slice is dropped", "store at least one slice in another format")

    @property
    def group_tokens(self) -> int:
        """Tokens that are encoded together: whole groups of every slice."""
        return lcm(*(part.format.group_tokens for part in self.slices))

    @property
    def is_raw(self) -> bool:
        """Whether every slice is kept in a floating-point type."""
        return all(isinstance(part.format, Raw) for part in self.slices)

    def check(self, channels: int, where: str) -> None:
        """Refuse slices that are no partition of the channels, and groups that do not divide one.

        Raises: KvantError("slices-do-not-fit" or "group-does-not-divide").
        """
        widths = [part.width for part in self.slices]
        if sum(widths) != channels or any(width % SLICE_CHANNELS for width in widths):
            raise KvantError(
                "slices-do-not-fit",
                f"slices of {' + '.join(map(str, widths))} channels do not make up a head of "
                f"{channels}",
                where=where,
                fix=f"use multiples of {SLICE_CHANNELS} channels that sum to {channels}",
            )
        for i, part in enumerate(self.slices):
            part.format.check(part.width, f"{where}: slice {i}")

    def encode(self, x: Array) -> dict[str, Array]:
        """Return the fields of every slice of x [..., T, C]; raises as the slices' formats."""
        self.check(x.shape[-1], "slices")
        fields: dict[str, Array] = {}
        first = 0
        for i, part in enumerate(self.slices):
            own = part.format.encode(x[..., first : first + part.width])
            fields |= {f"{i}.{name}": array for name, array in own.items()}
            first += part.width
        return fields

    def decode(self, fields: Mapping[str, Array]) -> Array:
        """Return the values in float64, [..., T, C]."""
        values = [
            None if isinstance(fmt, Drop) else fmt.decode(with_prefix(f"{i}.", fields))
            for i, fmt in enumerate(part.format for part in self.slices)
        ]
        rows = next(value.shape[:-1] for value in values if value is not None)
        return np.concatenate(
            [
                np.zeros((*rows, part.width)) if value is None else value
                for part, value in zip(self.slices, values, strict=True)
            ],
            axis=-1,
        )

    def roundtrip(self, x: Array) -> Array:
        """Return what reading gives after storing x."""
        return self.decode(self.encode(x))


def with_prefix(prefix: str, fields: Mapping[str, Array]) -> dict[str, Array]:
    """Return the fields whose names begin with a prefix, without it."""
    return {n.removeprefix(prefix): a for n, a in fields.items() if n.startswith(prefix)}


def _bad(what: str, fix: str) -> KvantError:
    return KvantError("bad-encoding", what, where="slices", fix=fix)
