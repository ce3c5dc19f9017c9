"""Dense plus sparse: the few largest channels of each token are stored beside the others.

Of one token's channels x, with n entries:

    m = max(limit, the (n + 1)-th largest |x|)     y = clip(x, -m, m)     y^ = dense(y)
    for each |x_c| > m, largest first (equal ones by channel):  index c, value x_c - y^_c
    x^_c = y^_c + the value of the entry c, if there is one

At most n channels are above m, so every token has room for all of its entries; the rest of the room
holds index 0 and value 0. What is dense sees outliers cut to m, and they come back exactly but for
the rounding of `values`: the entry also undoes the dense rounding of its channel.

limit = 0 takes the top n of every token. A limit above 0 is a static threshold, the same for all
channels; thresholds of channels are a scale before it, see `passes/thresholds.py`.
Source: KVQuant (Hooper et al., 2024), capped outliers whose entry is added to the dense end point.
Differs from it in: the cap is for a head, not for all heads together; by |x|, not half from above
and half from below; the value is of f16 and the index of 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..arrays import Array, FloatName, from_stored
from ..errors import KvantError
from .affine import Int
from .bfp import Bfp
from .lut import Lut
from .raw import FLOAT_NAMES, check_choice, check_integer, stored_finite

Dense = Int | Bfp | Lut
MOST_CHANNELS = 256  # an index has one byte
LARGEST_F32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class Sparse:
    """A dense format, and room for the outliers of each token.

    Fields of `encode`: those of `dense`; "index" u8 [..., T, count] and "value" [..., T, count] in
    the array type of `values`.

    Attributes:
        dense: how all channels are stored, once the outliers are cut to m.
        count: entries of a token.
        limit: threshold, at least 0; it is rounded to float32.
        values: number type of the entries.
    """

    dense: Dense
    count: int
    limit: float = 0.0
    values: FloatName = "f16"

    def __post_init__(self) -> None:
        """Refuse fields out of range."""
        if not isinstance(self.dense, Dense):
            raise KvantError(
                "bad-encoding",
                f"dense is {self.dense!r}",
                where="sparse",
                fix="use int, bfp or lut; the other formats have no outliers to spare",
            )
        check_integer("sparse", "count", self.count, 1)
        check_choice("sparse", "values", self.values, FLOAT_NAMES)
        if not isinstance(self.limit, float) or not 0.0 <= self.limit <= LARGEST_F32:
            raise KvantError(
                "bad-encoding",
                f"limit is {self.limit!r}",
                where="sparse",
                fix="use a number from 0.0 to 3.4e38; 0.0 takes the largest of every token",
            )

    @property
    def group_tokens(self) -> int:
        """Tokens that are encoded together: those of the dense format."""
        return self.dense.group_tokens

    def check(self, channels: int, where: str) -> None:
        """Refuse more entries than channels, more channels than an index names, and as `dense`."""
        if not self.count < channels <= MOST_CHANNELS:
            raise KvantError(
                "entries-do-not-fit",
                f"{self.count} entries of {channels} channels",
                where=where,
                fix=f"use fewer entries than channels, and at most {MOST_CHANNELS} channels",
            )
        self.dense.check(channels, where)

    def encode(self, x: Array) -> dict[str, Array]:
        """Return the dense fields, "index" and "value" of x [..., T, C].

        Raises: KvantError as the dense format; "scale-overflow" for a value beyond `values`.
        """
        x = np.asarray(x, dtype=np.float64)
        self.check(x.shape[-1], "sparse")
        size = np.abs(x)
        order = np.argsort(-size, axis=-1, kind="stable")[..., : self.count + 1]
        largest = np.take_along_axis(size, order, axis=-1)
        m = np.maximum(largest[..., -1:], np.float64(np.float32(self.limit)))
        fields = self.dense.encode(np.clip(x, -m, m))
        index, used = order[..., :-1], largest[..., :-1] > m
        rest = np.take_along_axis(x - self.dense.decode(fields), index, axis=-1)
        value, _ = stored_finite(
            np.where(used, rest, 0.0), self.values, "value", f"sparse(values = {self.values})"
        )
        return fields | {"index": np.where(used, index, 0).astype(np.uint8), "value": value}

    def decode(self, fields: Mapping[str, Array]) -> Array:
        """Return the values in float64, [..., T, C]."""
        x = self.dense.decode(fields)
        self.add(x, fields)
        return x

    def add(self, x: Array, fields: Mapping[str, Array]) -> None:
        """Add the entries to what the codes say, x [..., T, C]."""
        index = fields["index"].astype(np.int64)
        value = from_stored(fields["value"], self.values).astype(x.dtype)
        for entry in range(self.count):  # one by one: unused entries name channel 0 again
            at = index[..., entry : entry + 1]
            added = np.take_along_axis(x, at, axis=-1) + value[..., entry : entry + 1]
            np.put_along_axis(x, at, added, axis=-1)

    def roundtrip(self, x: Array) -> Array:
        """Return what reading gives after storing x."""
        return self.decode(self.encode(x))


def dense_of(fmt: object) -> Dense | None:
    """Return the format of the codes of a whole head, or None for raw and sliced ones."""
    dense = fmt.dense if isinstance(fmt, Sparse) else fmt
    return dense if isinstance(dense, Dense) else None
