"""Codes that name the entries of a table: codebooks such as NF4, and those of Lloyd and Max.

Per group of channels x of one token, with entries t_0 < t_1 < ... and t = max|t_i|, in float64:

    sigmas = none   s = max|x| / t
    sigmas = a      s = rms(x) a / t              a standard deviations are at the largest entry
    c = how many of the thresholds s (t_i + t_i+1) / 2 are below x              x^ = s t_c

So c is the nearest entry, and of two as near the lower one; what is beyond the last entries becomes
them. s is rounded to `params` before codes are made. A threshold is exact in float64 (11 to 24 bits
times 8), so no code depends on rounding; a scale of 0 is stored as it is, and every code reads 0.

    rms(x) = max|x| / 2^16 sqrt(sum u^2 / n),    u = [x / (max|x| / 2^16)]      [.]: ties to even

The sum is one of whole numbers below 2^53: every order of adding gives the same bits.

Entries are integers, so that integer dot products are exact, and within -63..63: kernels multiply
t_c + 64 as an unsigned byte, and two products of it with a signed byte must fit 16 bits.
Source: Lloyd, 1982, and Max, 1960 (tables for a given distribution); Dettmers et al., QLoRA, 2023
(NF4); KVQuant (Hooper et al., 2024) and TurboQuant (Zandieh et al., 2025) store caches so. Differs
from them in: entries are integers of 7 bits, which costs at most 0.3 % of the mean square error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..arrays import Array, FloatName, from_stored
from ..errors import KvantError
from .raw import FLOAT_NAMES, check_choice, check_divides, check_integer, stored_finite

LARGEST = 63
# What kernels add to an entry: an unsigned byte then holds it.
OFFSET = 64
# rms(x) counts in these parts of the largest value.
PARTS = 2.0**16
MOST_SIGMAS = 64.0

# bitsandbytes' values times 61, where rounding costs least.
NF4 = (-61, -42, -32, -24, -17, -11, -6, 0, 5, 10, 15, 21, 27, 34, 44, 61)
# By bits: the quantizer of least mean square error for a normal distribution, times what makes
# rounding cost least; and the standard deviations at its largest entry.
LLOYD = {
    2: ((-60, -18, 18, 60), 1.5104),
    3: ((-62, -39, -22, -7, 7, 22, 39, 62), 2.1519),
    4: ((-61, -46, -36, -28, -21, -15, -9, -3, 3, 9, 15, 21, 28, 36, 46, 61), 2.7326),
}


@dataclass(frozen=True, slots=True)
class Lut:
    """Codes into a table of integers, with a scale for each group of channels of a token.

    Fields of `encode`: "codes" u8 [..., T, C], one code a byte; "scale" [..., T, C / group] in the
    array type of `params` (bf16: its bits).

    Attributes:
        bits: 2, 3 or 4.
        group: channels that share a scale.
        table: 2^bits integers in ascending order, -63..63.
        sigmas: standard deviations that the largest entry stands for; None: the largest entry is
            the group's largest value.
        params: number type of the scale.
    """

    bits: int
    group: int
    table: tuple[int, ...]
    sigmas: float | None = None
    params: FloatName = "f16"

    def __post_init__(self) -> None:
        """Refuse fields out of range."""
        check_integer("lut", "bits", self.bits, 2, 4)
        check_integer("lut", "group", self.group, 1)
        check_choice("lut", "params", self.params, FLOAT_NAMES)
        _check_table(self.table, 1 << self.bits)
        if self.sigmas is None:
            return
        if not isinstance(self.sigmas, float) or not 0.0 < self.sigmas <= MOST_SIGMAS:
            raise KvantError(
                "bad-encoding",
                f"sigmas is {self.sigmas!r}",
                where="lut",
                fix=f"use a number over 0.0, up to {MOST_SIGMAS}, or none",
            )

    @property
    def group_tokens(self) -> int:
        """Tokens that are encoded together: one."""
        return 1

    @property
    def group_channels(self) -> int:
        """Channels that share a scale."""
        return self.group

    @property
    def most(self) -> int:
        """The largest entry by size."""
        return max(map(abs, self.table))

    @property
    def middles(self) -> tuple[float, ...]:
        """The middle of each entry and the next one; exact."""
        return tuple((low + high) / 2 for low, high in pairwise(self.table))

    @property
    def operands(self) -> tuple[int, ...]:
        """What kernels multiply for each code: its entry plus OFFSET, an unsigned byte."""
        return tuple(entry + OFFSET for entry in self.table)

    def check(self, channels: int, where: str) -> None:
        """Refuse groups that do not divide the channels."""
        check_divides(where, self.group, channels, "channels")

    def encode(self, x: Array) -> dict[str, Array]:
        """Return {"codes", "scale"} of x [..., T, C].

        Raises: KvantError: "group-does-not-divide", "not-finite", "scale-overflow".
        """
        groups = self._groups(np.asarray(x, dtype=np.float64))
        where = f"lut(bits = {self.bits}, params = {self.params})"
        stored, scale = stored_finite(self._wanted(groups), self.params, "scale", where)
        codes = np.zeros(groups.shape, np.uint8)
        for middle in self.middles:
            codes += groups > (scale * middle)[..., None]
        return {"codes": codes.reshape(x.shape), "scale": stored}

    def decode(self, fields: Mapping[str, Array]) -> Array:
        """Return the values in float64, [..., T, C]."""
        entries = np.asarray(self.table, np.float64)[fields["codes"]]
        return (self._groups(entries) * self.scales(fields)[..., None]).reshape(entries.shape)

    def scales(self, fields: Mapping[str, Array]) -> Array:
        """Return the scales in float64, [..., T, C / group]."""
        return from_stored(fields["scale"], self.params)

    def roundtrip(self, x: Array) -> Array:
        """Return what reading gives after storing x."""
        return self.decode(self.encode(x))

    def _wanted(self, groups: Array) -> Array:
        """Return the scales before they are rounded."""
        largest = np.abs(groups).max(axis=-1)
        if self.sigmas is None:
            return np.asarray(largest / self.most)
        part = largest / PARTS
        # NaN and Inf stay what they are: stored_finite refuses them by name.
        with np.errstate(invalid="ignore"):
            units = np.rint(groups / np.where(part > 0.0, part, 1.0)[..., None])
            mean = (units * units).sum(axis=-1) / self.group
        scale = part * np.sqrt(mean) * (self.sigmas / self.most)
        return np.asarray(np.where(np.isfinite(largest), scale, largest))

    def _groups(self, x: Array) -> Array:
        """Return x [..., T, C] as [..., T, C / group, group]."""
        channels = x.shape[-1]
        check_divides("lut", self.group, channels, "channels")
        return x.reshape(*x.shape[:-1], channels // self.group, self.group)


def _check_table(table: object, entries: int) -> None:
    """Refuse what is no table of so many entries."""
    if not isinstance(table, tuple) or not all(type(entry) is int for entry in table):
        raise _bad_table(f"table is {table!r}", "give integers")
    if len(table) != entries:
        raise _bad_table(f"a table of {len(table)} entries", f"give {entries} of them")
    if any(low >= high for low, high in pairwise(table)):
        raise _bad_table(f"table is {table!r}", "sort the entries, each one once")
    if max(map(abs, table)) > LARGEST:
        raise _bad_table(
            f"table is {table!r}", f"use integers of {-LARGEST}..{LARGEST}; the scale does the rest"
        )


def _bad_table(what: str, fix: str) -> KvantError:
    return KvantError("bad-encoding", what, where="lut", fix=fix)
