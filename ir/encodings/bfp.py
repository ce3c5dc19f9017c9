"""Block floating point: a signed mantissa per value, one exponent per block of channels.

    e = floor(log2 max|x|),   step = 2^(e - (p - 2)),   m = round(x / step) in +-(2^(p-1) - 1)

BFP12 is p = 4, BFP16 is p = 8. Rounding is to nearest, ties to even. The exponent is kept as the
byte e + 127, the exponent byte of max|x| in f32. Byte 0 says that the block is all zeros; a
block whose maximum is under 2^-126 is stored so.
Source: d-Matrix's BFP[p|8]{n}(SN), as used by "Accurate Block Quantization in LLMs with Outliers".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..arrays import Array
from ..errors import KvantError
from .raw import check_divides, check_integer

BIAS = 127


@dataclass(frozen=True, slots=True)
class Bfp:
    """Mantissas with a shared exponent.

    Fields of `encode`: "codes" u8 [..., T, C] = m + 2^(mantissa - 1); "exponent" u8
    [..., T, C / block].

    Attributes:
        mantissa: bits with the sign, 2..8 (BFP12: 4, BFP16: 8).
        block: channels that share an exponent.
    """

    mantissa: int
    block: int

    def __post_init__(self) -> None:
        """Refuse fields out of range."""
        check_integer("bfp", "mantissa", self.mantissa, 2, 8)
        check_integer("bfp", "block", self.block, 1)

    @property
    def group_tokens(self) -> int:
        """Tokens that are encoded together: one."""
        return 1

    @property
    def group_channels(self) -> int:
        """Channels that share a scale: a block."""
        return self.block

    def check(self, channels: int, where: str) -> None:
        """Refuse blocks that do not divide the channels."""
        check_divides(where, self.block, channels, "channels")

    def encode(self, x: Array) -> dict[str, Array]:
        """Return {"codes", "exponent"} of x [..., T, C].

        Raises: KvantError: "group-does-not-divide", "not-finite", "scale-overflow" (from 2^128 on).
        """
        blocks = self._blocks(np.asarray(x, dtype=np.float64))
        largest = np.abs(blocks).max(axis=-1)
        self._check_range(largest)
        # frexp gives largest = f 2^k with f in [1/2, 1), so floor(log2 largest) = k - 1, exactly.
        exponent = np.frexp(largest)[1] - 1
        is_zero = (largest == 0.0) | (exponent < 1 - BIAS)
        exponent = np.where(is_zero, 0, exponent)
        limit = 2 ** (self.mantissa - 1) - 1
        # ldexp scales by a power of two, so the quotient is exact.
        scaled = np.ldexp(blocks, (self.mantissa - 2 - exponent)[..., None])
        m = np.clip(np.rint(scaled), -limit, limit)
        m = np.where(is_zero[..., None], 0.0, m)
        codes = (m + 2 ** (self.mantissa - 1)).astype(np.uint8).reshape(x.shape)
        stored = np.where(is_zero, 0, exponent + BIAS).astype(np.uint8)
        return {"codes": codes, "exponent": stored}

    def decode(self, fields: Mapping[str, Array]) -> Array:
        """Return the values in float64, [..., T, C]."""
        codes, stored = fields["codes"], fields["exponent"]
        m = self._blocks(codes.astype(np.float64) - 2 ** (self.mantissa - 1))
        shift = stored.astype(np.int32) - BIAS - (self.mantissa - 2)
        values = np.ldexp(m, shift[..., None])
        return np.where((stored == 0)[..., None], 0.0, values).reshape(codes.shape)

    def scales(self, fields: Mapping[str, Array]) -> Array:
        """Return the steps in float64, [..., T, C / block]; 0 of a block of zeros."""
        stored = fields["exponent"]
        step = np.ldexp(1.0, stored.astype(np.int32) - BIAS - (self.mantissa - 2))
        return np.where(stored == 0, 0.0, step)

    def roundtrip(self, x: Array) -> Array:
        """Return what reading gives after storing x."""
        return self.decode(self.encode(x))

    def _blocks(self, x: Array) -> Array:
        """Return x [..., T, C] as [..., T, C / block, block]."""
        channels = x.shape[-1]
        check_divides("bfp", self.block, channels, "channels")
        return x.reshape(*x.shape[:-1], channels // self.block, self.block)

    def _check_range(self, largest: Array) -> None:
        if np.isfinite(largest).all() and not (largest >= 2.0**128).any():
            return
        is_nan = bool(np.isnan(largest).any())
        raise KvantError(
            "not-finite" if is_nan else "scale-overflow",
            "the values to encode contain NaN" if is_nan else "a value of 2^128 or more",
            where=f"bfp(mantissa = {self.mantissa}, block = {self.block})",
            fix="find where the model makes it; nothing was stored",
        )
