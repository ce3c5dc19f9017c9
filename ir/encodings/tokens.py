"""Which token is stored how: the first `sink` and the last ones raw, the rest encoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..arrays import Array
from ..errors import KvantError
from .raw import Raw, check_choice, check_integer
from .slices import Slices, Term

Format = Term | Slices
F32 = Raw("f32")


@dataclass(frozen=True, slots=True)
class Tokens:
    """A stream's classes of tokens, by position from the row's first valid token.

    With g = rest.group_tokens and n tokens stored, the tokens [sink, encoded_end(n)) are encoded:

        flush = group   encoded_end = sink + floor(max(0, n - sink - recent) / g) g
        flush = block   encoded_end = sink + floor(max(0, n - sink) / recent) recent

    "group" keeps at least `recent` tokens raw and encodes each group as soon as it is older;
    "block" keeps fewer than `recent`, and encodes all of them at once when they are `recent`
    (KIVI: keys).

    Attributes:
        rest: format of the encoded tokens.
        sink: first tokens that stay raw.
        recent: tokens of the window.
        flush: "group" or "block".
        raw: number type of sinks and of the tail.
    """

    rest: Format
    sink: int = 0
    recent: int = 0
    flush: Literal["group", "block"] = "group"
    raw: Raw = F32

    def __post_init__(self) -> None:
        """Refuse fields out of range, and a block that is not whole groups."""
        check_integer("tokens", "sink", self.sink, 0)
        check_integer("tokens", "recent", self.recent, 0)
        check_choice("tokens", "flush", self.flush, ("group", "block"))
        if not isinstance(self.rest, Format) or not isinstance(self.raw, Raw):
            raise KvantError(
                "bad-encoding",
                f"rest is {self.rest!r}, raw is {self.raw!r}",
                where="tokens",
                fix="use a format (raw, int, bfp, lut, sparse, slices) for rest, a raw one for raw",
            )
        group = self.rest.group_tokens
        if self.flush == "block" and (self.recent < 1 or self.recent % group):
            below = self.recent // group * group
            legal = [str(r) for r in (below, below + group) if r > 0]
            raise KvantError(
                "window-not-whole-groups",
                f"a window of {self.recent} tokens is flushed as a block of groups of {group}",
                where="tokens",
                fix=f"use recent = {' or '.join(legal)}, or flush = group",
            )

    @property
    def quantizes(self) -> bool:
        """Whether any token can be stored in another form than raw."""
        rest = self.rest
        return not (rest.is_raw if isinstance(rest, Slices) else isinstance(rest, Raw))

    @property
    def group_tokens(self) -> int:
        """Tokens that are encoded together."""
        return self.rest.group_tokens

    @property
    def one_by_one(self) -> bool:
        """Whether each token is encoded alone, as soon as it is due."""
        return self.group_tokens == 1 and self.flush == "group"

    def check(self, channels: int, where: str) -> None:
        """Refuse a rest that does not fit the channels."""
        self.rest.check(channels, where)

    def encoded_end(self, length: int) -> int:
        """Return the end of the encoded tokens [sink, end) when `length` tokens are stored.

        It is `sink`, an empty range, also for lengths below `sink`.
        """
        if self.flush == "block":
            return self.sink + max(0, length - self.sink) // self.recent * self.recent
        group = self.group_tokens
        return self.sink + max(0, length - self.sink - self.recent) // group * group

    def as_raw(self, x: Array) -> Array:
        """Return x as append keeps it, after the maps: in float32, then in the raw type; float64.

        This happens once to every token, also to those that are encoded later.
        Raises: KvantError("not-finite" or "scale-overflow") for what the types cannot hold.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            return self.raw.roundtrip(np.asarray(x).astype(np.float32))

    def simulate(self, x: Array) -> Array:
        """Return what attention reads when the tokens of x [..., S, D] are stored; float64.

        Every token is kept `as_raw`; those that are due are encoded from that.
        """
        end, y = self.encoded_end(x.shape[-2]), self.as_raw(x)
        if end > self.sink:
            y[..., self.sink : end, :] = self.rest.roundtrip(y[..., self.sink : end, :])
        return y
