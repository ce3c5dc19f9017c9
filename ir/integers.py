"""What integer dot products round: the arithmetic of one query over pages in quads.

Codes, or the entries of a table that they name, are multiplied as they are stored. What they are
multiplied with becomes integers of -n..n, n = 127 for codes of up to 4 bits and 32,767 for 8 bits:

    keys, scales of tokens      q, once for all keys: `round_queries`, a matter of the plan
    keys, scales of channels    u = q s for each group of tokens that shares s,  u^ = a [u / a] with
                                a = max|u| / n;  the score is <u^ / s, x^>
    values                      w = p s for each token and group of channels (w = p with scales of
                                channels), in blocks of 32 positions from the first page on,
                                w^ = a [w / a] with a = max w / n;  the output is sum (w^ / s) x^

Entries of a sparse format are added in floats, to what the codes say: they meet q as it is for all
keys, and the exact probabilities.

So the integers stand for other queries and other probabilities, and zero points see the same ones
as codes do. u is a product of two float32, rounded to float32, and so are u / a and a: every target
gets the same integers. p comes from an exponential, so a w that is almost a tie may round either
way: `Integers.slack` is what such ties can change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .arrays import Array
from .attention import EXACT
from .encodings import Dense, Int
from .planes import code_bits

BLOCK = 32


def most_integer(bits: int) -> int:
    """Return n, the largest integer that codes of so many bits are multiplied with."""
    return 127 if bits <= 4 else 32767


@dataclass(frozen=True, slots=True)
class Coded:
    """What integer dot products read of one row's pages in quads: all channels, or a slice.

    Attributes:
        first: position of the first one.
        format: of the codes.
        scale: f64[H, tokens / gt, C / gc].
        values: f64[H, tokens, C], what the codes alone say; None where that is all of the stream.
        channels: those of the stream that the codes say.
    """

    first: int
    format: Dense
    scale: Array
    values: Array | None = None
    channels: slice = field(default_factory=lambda: slice(None))

    @property
    def per_channel(self) -> bool:
        """Whether scales belong to channels."""
        return isinstance(self.format, Int) and self.format.axis == "channel"

    @property
    def tokens(self) -> int:
        """Tokens in pages, those of the last group that are not there yet included."""
        return int(self.scale.shape[1]) * self.format.group_tokens

    def of_codes(self, h: int, x: Array, part: slice) -> Array:
        """Return what the codes of head h say of the positions `part` of x [H, S, C], [n, C]."""
        whole = x[h, part]
        if self.values is None:
            return whole
        begin = part.start - self.first
        return self.values[h, begin : begin + len(whole)].astype(x.dtype)

    @property
    def most(self) -> int:
        """Largest integer that the codes are multiplied with."""
        return most_integer(code_bits(self.format))


@dataclass(slots=True)
class Integers:
    """Implements `attention.Products`.

    Attributes:
        k: of each row, one for each slice; none where all keys are multiplied exactly.
        v: of each row.
        near: how close to a tie a weight over its step may round either way, as a share of it.
        slack: filled by `outputs`: what ties can change of the outputs, [B, H, R, Dv].
    """

    k: Sequence[Sequence[Coded]]
    v: Sequence[Sequence[Coded]]
    near: float = 0.0
    slack: Array = field(default_factory=lambda: np.zeros(()))

    def row(self, b: int) -> Integers:
        """Return the arithmetic of row b alone."""
        return Integers([self.k[b]], [self.v[b]], self.near)

    def scores(self, rows: Array, k: Array, scale: float) -> Array:
        """See `attention.Products`."""
        scores = EXACT.scores(rows, k, scale)
        for b, coded in _each(self.k):
            if not coded.per_channel:
                continue
            size = coded.format.group_tokens
            for h, group in np.ndindex(coded.scale.shape[:2]):
                part = slice(coded.first + group * size, coded.first + (group + 1) * size)
                own = coded.scale[h, group]
                exact = rows[b, h][:, coded.channels] * scale
                change = rounded_products(exact, own, coded.most) / own - exact
                codes = coded.of_codes(h, k[b], part)
                scores[b, h, :, part] += change.astype(k.dtype) @ codes.T
        return scores

    def outputs(self, weights: Array, log_total: Array, v: Array) -> Array:
        """See `attention.Products`."""
        out = EXACT.outputs(weights, log_total, v)
        self.slack = np.zeros_like(out)
        for b, coded in _each(self.v):
            for h in range(v.shape[1]):
                end = min(coded.first + coded.tokens, v.shape[2])
                own = slice(coded.first, end)
                change, slack = self._rounding(
                    coded, h, weights[b, h, :, own], coded.of_codes(h, v[b], own)
                )
                out[b, h][:, coded.channels] += change
                self.slack[b, h][:, coded.channels] = slack
        return out

    def _rounding(self, coded: Coded, h: int, weights: Array, v: Array) -> tuple[Array, Array]:
        """Return what rounding the weights [R, n] of coded tokens v [n, Dv] adds, and the slack."""
        change, slack = (np.zeros((len(weights), v.shape[1]), v.dtype) for _ in range(2))
        scale = np.ones((v.shape[0], 1)) if coded.per_channel else coded.scale[h, : len(v)]
        width = v.shape[1] // scale.shape[1]
        for group in range(scale.shape[1]):
            channels = slice(group * width, (group + 1) * width)
            s = scale[:, group].astype(v.dtype)
            units = _by_scale(v[:, channels], s)
            rounded, tied = round_weights(weights * s, coded.most, self.near)
            change[:, channels] = (rounded - weights * s) @ units
            slack[:, channels] = tied @ np.abs(units)
        return change, slack


def _each(rows: Sequence[Sequence[Coded]]) -> list[tuple[int, Coded]]:
    return [(b, coded) for b, row in enumerate(rows) for coded in row]


def _by_scale(v: Array, scale: Array) -> Array:
    """Return v [n, C] over its scale [n]; a block of zeros has scale 0."""
    return np.asarray(v / np.where(scale == 0.0, 1.0, scale)[:, None])


def rounded_products(q: Array, scale: Array, most: int) -> Array:
    """Return u^, q times scale as integer times step; float64 of float32 arithmetic.

    Args:
        q: [..., C].
        scale: [C], each exact in float32.
        most: largest integer.
    """
    u = q.astype(np.float32) * scale.astype(np.float32)
    largest = np.abs(u).max(axis=-1, keepdims=True)
    safe = np.where(largest > 0.0, largest, np.float32(1.0))
    integers = np.rint(u * (np.float32(most) / safe))
    step = largest / np.float32(most)
    return np.asarray(integers.astype(np.float64) * step.astype(np.float64))


def round_weights(w: Array, most: int, near: float = 0.0) -> tuple[Array, Array]:
    """Return w^ of weights w [R, n] >= 0, and the step where w is near a tie, 0 elsewhere."""
    rows, tokens = w.shape
    blocks = np.zeros((rows, -(-tokens // BLOCK), BLOCK), w.dtype)
    blocks.reshape(rows, -1)[:, :tokens] = w
    step = blocks.max(axis=-1, keepdims=True, initial=0.0) / most
    places = blocks / np.where(step > 0.0, step, 1.0)
    distance = np.abs(places - np.floor(places) - 0.5)
    tied = np.where(distance <= near * np.maximum(places, 1.0), step, 0.0)
    rounded = np.rint(places) * step
    return rounded.reshape(rows, -1)[:, :tokens], tied.reshape(rows, -1)[:, :tokens]
