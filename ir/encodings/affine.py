"""Integers of 1 to 8 bits with a scale, and a zero point or none, per group.

Per group of values x, with n = 2^bits - 1 and Q = 2^(bits-1) - 1 (all divisions in float64):

    zero = float   s = (max - min) clip / n     z = min clip
                   c = [(x - z) / s]            x^ = c s + z
    zero = int     s as above, with min and max extended to hold 0;  z = [-min clip / s] in 0..n
                   c = [x / s] + z              x^ = (c - z) s
    zero = none    s = max|x| clip / Q
                   c = [x / s] + 2^(bits - 1)   x^ = (c - 2^(bits - 1)) s,    [x / s] in -Q..Q

[.] rounds to nearest, ties to even, then clips to the legal codes. s and z are rounded to `params`
BEFORE codes are made: the codes are then the best ones for what is stored. A scale that rounds to
zero (a constant group, or a range under the smallest number of `params`) is stored as 1; without a
zero point as 2^-14, for there readers subtract 2^(bits - 1) s from sums of codes times s, and what
rounding leaves of that must stay small beside other groups.
Source: KIVI (zero = float), QServe and ZipCache (zero = int); `clip` shrinks min and max, as in
RotateKV.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..arrays import Array, FloatName, from_stored
from ..errors import KvantError
from .raw import FLOAT_NAMES, check_choice, check_divides, check_integer, stored_finite


@dataclass(frozen=True, slots=True)
class Int:
    """Integer codes per group.

    Fields of `encode`: "codes" u8 [..., T, C], one unsigned code a byte; "scale" and, unless zero
    is "none", "zero", both [..., T / gt, C / gc] in the array type of `params` (bf16: its bits).

    Attributes:
        bits: 1..8 (layouts exist for 2, 3, 4, 8).
        axis: "token": groups of `group` channels of one token (gt = 1, gc = group);
            "channel": groups of `group` tokens of one channel (gt = group, gc = 1).
        group: elements of a group.
        zero: "float", "int" or "none".
        params: number type of scale and zero.
        clip: factor on min and max, in (0, 1].
    """

    bits: int
    axis: Literal["token", "channel"]
    group: int
    zero: Literal["none", "int", "float"] = "float"
    params: FloatName = "f16"
    clip: float = 1.0

    def __post_init__(self) -> None:
        """Refuse fields out of range."""
        check_integer("int", "bits", self.bits, 1, 8)
        check_integer("int", "group", self.group, 1)
        check_choice("int", "axis", self.axis, ("token", "channel"))
        check_choice("int", "zero", self.zero, ("none", "int", "float"))
        check_choice("int", "params", self.params, FLOAT_NAMES)
        if not isinstance(self.clip, float) or not 0.0 < self.clip <= 1.0:
            raise KvantError(
                "bad-encoding",
                f"clip is {self.clip!r}",
                where="int",
                fix="use a number in (0, 1]; 1.0 clips nothing",
            )
        if self.zero == "none" and self.bits == 1:
            raise KvantError(
                "bad-encoding",
                "one bit without a zero point has only the code 0",
                where="int",
                fix="use zero = float, or at least 2 bits",
            )

    @property
    def group_tokens(self) -> int:
        """Tokens that are encoded together."""
        return self.group if self.axis == "channel" else 1

    @property
    def group_channels(self) -> int:
        """Channels that share a scale."""
        return self.group if self.axis == "token" else 1

    def check(self, channels: int, where: str) -> None:
        """Refuse groups that do not divide the channels."""
        check_divides(where, self.group_channels, channels, "channels")

    def codes_and_params(self, x: Array) -> tuple[Array, Array, Array | None]:
        """Return codes u8 [..., T, C], stored scale, and stored zero or None. No Python loops.

        Args:
            x: shape [..., T, C], finite; T is whole groups.

        Raises: KvantError: "group-does-not-divide", "not-finite", "scale-overflow".
        """
        grouped = self._grouped(np.asarray(x, dtype=np.float64))
        # over: a range beyond float64 becomes Inf, which stored_finite refuses by name.
        with np.errstate(over="ignore", invalid="ignore"):
            low, high = (
                grouped.min(axis=(-3, -1)) * self.clip,
                grouped.max(axis=(-3, -1)) * self.clip,
            )
            if self.zero == "int":
                low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
            steps = self.steps
            span = np.maximum(-low, high) if self.zero == "none" else high - low
            stored_scale, scale = self._store(span / steps, "scale")
        dead = scale == 0.0
        stored_dead, _ = self._store(np.asarray(self.dead_scale, np.float64), "scale")
        stored_scale = np.where(dead, stored_dead, stored_scale)
        scale = np.where(dead, self.dead_scale, scale)
        wide = scale[..., :, None, :, None]
        if self.zero == "float":
            stored_zero, zero = self._store(low, "zero")
            codes = np.rint((grouped - zero[..., :, None, :, None]) / wide)
            return self._codes(codes, x), stored_scale, stored_zero
        if self.zero == "int":
            # Adding 0 makes 0 of -0.
            places = np.clip(np.rint(-low / scale), 0.0, steps) + 0.0
            stored_zero, zero = self._store(places, "zero")
            codes = np.rint(grouped / wide) + zero[..., :, None, :, None]
            return self._codes(codes, x), stored_scale, stored_zero
        codes = np.clip(np.rint(grouped / wide), -steps, steps) + 2.0 ** (self.bits - 1)
        return self._codes(codes, x), stored_scale, None

    @property
    def steps(self) -> int:
        """Steps between the ends of the range: n, or Q with zero = none."""
        return (1 << self.bits - 1) - 1 if self.zero == "none" else (1 << self.bits) - 1

    @property
    def dead_scale(self) -> float:
        """What is stored for a scale that rounds to zero; exact in every type of `params`."""
        return 2.0**-14 if self.zero == "none" else 1.0

    def encode(self, x: Array) -> dict[str, Array]:
        """Return {"codes", "scale"[, "zero"]} of x [..., T, C]; raises as `codes_and_params`."""
        codes, scale, zero = self.codes_and_params(x)
        fields = {"codes": codes, "scale": scale}
        return fields if zero is None else fields | {"zero": zero}

    def decode(self, fields: Mapping[str, Array]) -> Array:
        """Return the values in float64, [..., T, C]."""
        codes = fields["codes"]
        grouped = self._grouped(codes.astype(np.float64))
        scale = from_stored(fields["scale"], self.params)[..., :, None, :, None]
        if self.zero == "none":
            return ((grouped - 2.0 ** (self.bits - 1)) * scale).reshape(codes.shape)
        zero = from_stored(fields["zero"], self.params)[..., :, None, :, None]
        values = grouped * scale + zero if self.zero == "float" else (grouped - zero) * scale
        return values.reshape(codes.shape)

    def scales(self, fields: Mapping[str, Array]) -> Array:
        """Return the scales in float64, [..., T / gt, C / gc]."""
        return from_stored(fields["scale"], self.params)

    def roundtrip(self, x: Array) -> Array:
        """Return what reading gives after storing x."""
        return self.decode(self.encode(x))

    def _grouped(self, x: Array) -> Array:
        """Return x [..., T, C] as [..., T / gt, gt, C / gc, gc]."""
        tokens, channels = x.shape[-2:]
        gt, gc = self.group_tokens, self.group_channels
        check_divides("int", gt, tokens, "tokens")
        check_divides("int", gc, channels, "channels")
        return x.reshape(*x.shape[:-2], tokens // gt, gt, channels // gc, gc)

    def _codes(self, codes: Array, x: Array) -> Array:
        return np.clip(codes, 0, 2**self.bits - 1).astype(np.uint8).reshape(x.shape)

    def _store(self, x: Array, name: str) -> tuple[Array, Array]:
        return stored_finite(
            x, self.params, name, f"int(bits = {self.bits}, params = {self.params})"
        )
