"""What the kernels of a GPU round where several queries a row are attended under compute = int.

Tokens are first written in float16 (`targets/gpu_unpack.py`), and all products are of float16 with
sums in float32, as flash attention has them:

    q^      the query times the scale, in float32, nearest of DIGITS binary digits
    k^, v^  what is stored, decoded in float32 as `single` has it, nearest of DIGITS digits
    p^      the exponential of the score less a whole number of powers of two, nearest of DIGITS
    output  sum p^ v^ / (sum p + the learned sink)

Kernels take powers of two out of each query, of the keys and values of each tile and of the
exponentials, so that float16 is normal over 2^28: what is smaller than that beside the largest is
lost and is not modelled, for it is less than 2^-38 of it. So every rounding depends on the number
alone, and the bound of `ir/tolerance.py` stays as tight as for float32. What exponentials that are
almost ties may change is `Narrow.slack`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .arrays import Array, from_stored
from .encodings import Dense, Int
from .halves import DIGITS, round_half


def single(fmt: Dense, fields: Mapping[str, Array]) -> Array:
    """Return what a format's fields [..., T, C] stand for as kernels compute it, float32.

    Only a zero point that is no integer can make it differ from the nearest float32, and only where
    scales are float32: products of a code and a shorter scale are exact.
    """
    if not isinstance(fmt, Int) or fmt.zero != "float" or fmt.params != "f32":
        with np.errstate(over="ignore"):  # what no token uses may be anything
            return np.asarray(fmt.decode(fields), np.float32)
    codes = fields["codes"].astype(np.float32)
    scale, zero = (from_stored(fields[name], fmt.params) for name in ("scale", "zero"))
    for axis in (-2, -1):
        scale, zero = (
            np.repeat(x, codes.shape[axis] // x.shape[axis], axis).astype(np.float32)
            for x in (scale, zero)
        )
    return np.asarray(codes * scale + zero)


@dataclass(slots=True)
class Narrow:
    """Implements `attention.Products` for several queries a row.

    Attributes:
        k: f32[H, N, C] of each row, what kernels read before they round it.
        v: of each row.
        near: how close to a tie an exponential may round either way, as a share of it.
        slack: filled by `outputs`: what such ties can change, [B, H, R, Dv].
    """

    k: Sequence[Array]
    v: Sequence[Array]
    near: float = 0.0
    slack: Array = field(default_factory=lambda: np.zeros(()))

    def row(self, b: int) -> Narrow:
        """Return the arithmetic of row b alone."""
        return Narrow([self.k[b]], [self.v[b]], self.near)

    def scores(self, rows: Array, k: Array, scale: float) -> Array:
        """See `attention.Products`."""
        q = digits((rows.astype(np.float64) * scale).astype(np.float32))
        return np.asarray(q.astype(k.dtype) @ _filled(k, self.k).swapaxes(-1, -2))

    def outputs(self, weights: Array, log_total: Array, v: Array) -> Array:
        """See `attention.Products`."""
        # Only the mantissas of exponentials matter, so whole powers of two of the total may go.
        powers = np.where(np.isneginf(log_total), 0.0, log_total.astype(np.float64) / np.log(2.0))
        total = np.exp2(powers - np.floor(powers))
        rounded, tied = round_half(weights * total, self.near)
        values = _filled(v, self.v)
        self.slack = np.asarray((tied / total) @ np.abs(values))
        return np.asarray((rounded / total).astype(v.dtype) @ values)


def digits(x: Array) -> Array:
    """Return x with the digits of a float16 of any exponent, ties to even, in float64."""
    mantissa, exponent = np.frexp(x.astype(np.float64))
    return np.asarray(np.ldexp(np.rint(mantissa * 2.0**DIGITS), exponent - DIGITS))


def _filled(like: Array, rows: Sequence[Array]) -> Array:
    """Return the tokens of all rows, rounded, in the shape and type of `like`; the rest zero."""
    x = np.zeros_like(like)
    for b, row in enumerate(rows):
        x[b, :, : row.shape[1]] = digits(row)
    return x
