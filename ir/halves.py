"""What matrix products of float16 round: the arithmetic of one query over pages in tiles.

GPUs multiply a stored code u (or the entry of its table) in float16, which holds it exactly, and
add in float32. In whole tiles of TILE tokens, what u is multiplied with becomes float16:

    keys, scales of tokens      nothing: q is already integers of 8 or 16 bits (`round_queries`)
    keys, scales of channels    q^ = 2^-e q, with e the exponent of the largest |q| of the row, then
                                y = q^ s; the score is 2^e (sum y^ u + sum q^ z), and where zero
                                points are codes 2^e sum y^ (u - z)
    values                      w = p s, with p the exponential of the score; the output is
                                (sum w^ u + sum p z) / softmax's denominator

z is what a code of zero stands for. q^, y^ and w^ are nearest in float16, ties to even. Codes with
scales of tokens are counted from their middle where the format is symmetric, a table or of 8 bits,
so that half as much is rounded; z then stands for the middle. Powers of two that kernels take out
of w change nothing as long as float16 is normal; `Halves.slack` bounds what they change below, and
what an exponential that is almost a tie may.

Sparse entries of keys meet q as it is. Those of values meet p in float16, less a power of two that
belongs to the tile: `Halves.slack` bounds what that changes, and the sums here leave p as it is.

Tiles lie one after another from the first encoded token on. Whole is one whose tokens all are
encoded, as keys and as values, and seen by the query. All others are multiplied in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .arrays import Array, from_stored
from .attention import EXACT
from .encodings import Dense, Int, Lut
from .planes import code_bits, low_bits, offset

TILE = 64
"""Tokens of a tile."""
DIGITS = 11
"""Binary digits of a normal float16."""
NORMAL = 14
"""2^-14 is the smallest normal float16."""


def middle(fmt: Dense) -> int:
    """Return the code, or the operand of a table, from which codes are counted."""
    if not isinstance(fmt, Int) or fmt.zero == "none":
        return offset(fmt)
    return 128 if code_bits(fmt) == 8 and fmt.axis == "token" else 0


def whole_tiles(
    length: Array, encoded: Array, sink: int, window: int | None = None
) -> tuple[Array, Array]:
    """Return (begin, end) of what lies in whole tiles, for the newest query of each row.

    Args:
        length: int64[B], tokens of each row.
        encoded: int64[B], end of what is encoded, as keys and as values.
        sink: tokens before the first tile.
        window: keys that the query sees, or None for all.
    """
    first = np.maximum(0, 0 * length if window is None else length - window - sink)
    last = np.maximum(0, np.minimum(length, encoded) - sink)
    return sink + -(-first // TILE) * TILE, sink + last // TILE * TILE


@dataclass(frozen=True, slots=True)
class Units:
    """What one slice of the channels of a row holds in pages, or all channels.

    Attributes:
        first: position of the first token.
        channels: of the head.
        units: f64[H, N, C], codes or entries of tables counted from their middle; with scales of
            channels from their zero points, if these are codes.
        scale: f64[H, N, C], of each number.
        lift: f64[C], what the queries of a channel are divided by before they are rounded, as much
            as its place in a byte multiplies the code by; see `planes.py`.
        per_channel: whether a scale belongs to a channel.
        zero: f64[H, N, C], what a unit of zero stands for, where a scale belongs to a channel.
        entries: f64[H, N, C], sparse entries where they are, or None if there is no room for any.
    """

    first: int
    channels: slice
    units: Array
    scale: Array
    lift: Array
    per_channel: bool
    zero: Array
    entries: Array | None = None


def units_of(fmt: Dense, fields: Mapping[str, Array], first: int, channels: slice) -> Units:
    """Return the units of the fields [H, N, ...] that a format's `encode` gave."""
    codes = fields["codes"]
    if isinstance(fmt, Lut):
        codes = np.asarray(fmt.operands)[codes]
    scale = _each(fmt.scales(fields), codes)
    per_channel = isinstance(fmt, Int) and fmt.axis == "channel"
    units, zero = codes.astype(np.float64) - middle(fmt), np.zeros_like(scale)
    if isinstance(fmt, Int) and per_channel and fmt.zero != "none":
        stored = _each(from_stored(fields["zero"], fmt.params), codes)
        units, zero = (units - stored, zero) if fmt.zero == "int" else (units, stored)
    # Of codes of three bits, planes are those of their low two.
    bits, width = low_bits(fmt), codes.shape[2]
    lift = 2.0 ** (np.arange(width) * (8 // bits) // width * bits)
    return Units(first, channels, units, scale, lift, per_channel, zero)


def _each(parameters: Array, codes: Array) -> Array:
    """Return the scale or zero point of each code, f64[H, N, C]."""
    for axis in (1, 2):
        parameters = np.repeat(parameters, codes.shape[axis] // parameters.shape[axis], axis)
    return parameters


@dataclass(slots=True)
class Halves:
    """Implements `attention.Products`.

    Attributes:
        k: of each row, one for each slice.
        v: of each row.
        whole: (begin, end) of each row, the positions that lie in whole tiles.
        near: how close to a tie a weight may round either way, as a share of it.
        slack: filled by `outputs`: what ties and small weights can change, [B, H, R, Dv].
    """

    k: Sequence[Sequence[Units]]
    v: Sequence[Sequence[Units]]
    whole: Sequence[tuple[int, int]]
    near: float = 0.0
    slack: Array = field(default_factory=lambda: np.zeros(()))

    def row(self, b: int) -> Halves:
        """Return the arithmetic of row b alone."""
        return Halves([self.k[b]], [self.v[b]], [self.whole[b]], self.near)

    def scores(self, rows: Array, k: Array, scale: float) -> Array:
        """See `attention.Products`."""
        scores = EXACT.scores(rows, k, scale)
        for b, (begin, end) in enumerate(self.whole):
            for own in self.k[b]:
                if not own.per_channel or end <= begin:
                    continue
                part = slice(begin - own.first, end - own.first)
                q = (rows[b].astype(np.float64) * scale).astype(np.float32)
                power = _power(q)
                q = q[:, :, own.channels].astype(np.float64)
                for h in range(len(q)):
                    y = half(q[h] / power[h] / own.lift)[:, None] * own.scale[h, part]
                    change = half(y) * own.lift * power[h][:, None]
                    change -= q[h][:, None] * own.scale[h, part]
                    lost = half(q[h] / power[h]) * power[h] - q[h]
                    scores[b, h, :, begin:end] += np.einsum(
                        "rtc,tc->rt", change, own.units[h, part]
                    ) + np.einsum("rc,tc->rt", lost, own.zero[h, part])
        return scores

    def outputs(self, weights: Array, log_total: Array, v: Array) -> Array:
        """See `attention.Products`."""
        out = EXACT.outputs(weights, log_total, v)
        self.slack = np.zeros_like(out)
        for b, (begin, end) in enumerate(self.whole):
            if end <= begin:
                continue
            # What the largest weight of the row may be after kernels took powers of two out of it.
            most = np.max([own.scale.max(initial=0.0) for own in self.v[b]])
            p = weights[b, :, :, begin:end].astype(np.float64)
            floor = 4.0 * weights[b].max(axis=-1, initial=0.0) * most
            for own in self.v[b]:
                part = slice(begin - own.first, end - own.first)
                w = p[..., None] * own.scale[:, None, part]
                total = np.exp(log_total[b].astype(np.float64))[..., None]
                rounded, tied = round_half(w * total, self.near)
                slack = (tied / total) + _lost(w, floor[..., None, None])
                units = own.units[:, part]
                change = np.einsum("hrtc,htc->hrc", rounded / total - w, units)
                out[b][:, :, own.channels] += change
                self.slack[b][:, :, own.channels] = np.einsum("hrtc,htc->hrc", slack, np.abs(units))
                if own.entries is not None:
                    self.slack[b][:, :, own.channels] += _entry_slack(p, own.entries[:, part])
        return out


def _entry_slack(p: Array, entries: Array) -> Array:
    """Return what float16 may change of p [H, R, N] times sparse entries [H, N, C], [H, R, C].

    Kernels round p beside the largest of its tile: by half a step, or as a subnormal by 2^-25.
    """
    off = p * 2.0**-DIGITS + p.max(axis=-1, keepdims=True, initial=0.0) * 2.0**-25
    return np.asarray(np.einsum("hrt,htc->hrc", off, np.abs(entries)))


def half(x: Array) -> Array:
    """Return x as float16, in float64."""
    return np.asarray(x.astype(np.float16).astype(np.float64))


def round_half(w: Array, near: float = 0.0) -> tuple[Array, Array]:
    """Return w >= 0 with the digits of a float16 of any exponent; the step where w nearly ties."""
    mantissa, exponent = np.frexp(w)
    places = mantissa * 2.0**DIGITS
    step = np.ldexp(1.0, exponent - DIGITS)
    distance = np.abs(places - np.floor(places) - 0.5)
    return np.rint(places) * step, np.where(distance <= near * places, step, 0.0)


def _lost(w: Array, largest: Array) -> Array:
    """Return how far a weight that is no normal float16 may be off, beside weights so large."""
    small = largest * 2.0**-NORMAL
    return np.where(w < small, small * 2.0**-DIGITS, 0.0)


def _power(q: Array) -> Array:
    """Return the power of two over the largest |q| of each row [..., C], f32[..., 1]."""
    _, exponent = np.frexp(np.abs(q).max(axis=-1, keepdims=True))
    return np.asarray(np.ldexp(np.float32(1.0), exponent), np.float32)
