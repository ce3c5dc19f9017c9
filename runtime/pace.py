"""Appends of one token a row, one after another, while nothing changes but counts.

Most appends of a decoding loop take no page, move no tail and cross no window. How many of them are
to come is found out once, by the rules that hold for every append; then each is one call of a
kernel, and no rule is asked again. What such an append does not take (another shape, a number that
is not finite) it leaves to the ordinary append, which takes or refuses it.
"""

from bisect import bisect_left
from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING

import numpy as np

from .inlet import Inlet
from .stream import Ints, Kernels, Steps, Stream, pages_before

if TYPE_CHECKING:
    from .cache import Layer

SOON = 16
"""Appends for which an ordinary one makes room, so that a pace is not over at once."""
_AHEAD, _FEW = 64, 4  # appends that are looked ahead, at most, and that are worth it, at least


@dataclass(slots=True)
class Pace:
    """The appends of one token that may follow.

    They follow upon one state of a layer: `state` are the objects that it was made of. Whatever
    else happens to the layer (an append of more tokens, a flush, a cut, rows in another order)
    puts another object in the place of one of them, and the pace is over.

    Attributes:
        steps: stores what the inlets hold, and encodes.
        k: where keys come in.
        v: where values come in.
        one: int64[B] ones.
        grows: tokens of k and of v that each append encodes, 0 or 1.
        left: how many appends may follow.
        reserved: `Cache.reserved` for which that holds.
        state: what was there when this was made, or after the last append.
    """

    steps: Steps
    k: Inlet
    v: Inlet
    one: Ints
    grows: tuple[int, int]
    left: int
    reserved: int
    state: tuple[object, ...]

    def append(self, layer: "Layer", k: object, v: object, reserved: int) -> bool:
        """Append one token a row. Return whether it was done; if not, nothing counts of it."""
        if not self.left or self.reserved != reserved:
            return False
        if not all(map(is_, self.state, _state_of(layer))):
            return False
        if not (self.k.take(k) and self.v.take(v)):
            return False
        # Whatever interrupts what follows, the pace is over, and the token does not count.
        left, self.left = self.left, 0
        if not self.steps():
            return False
        keys, values, columns = layer.k, layer.v, layer.columns.one_more(self.one)
        k_end, v_end = (
            stream.encoded + self.one if grow else stream.encoded
            for stream, grow in zip(layer.streams, self.grows, strict=True)
        )
        counts = columns.counts
        # Stores without a call or a loop between them: no signal comes in here.
        keys.encoded, values.encoded = k_end, v_end
        keys.length, values.length, layer.columns = counts, counts, columns
        self.state, self.left = _state_of(layer), left - 1
        return True


def new_pace(kernels: Kernels, index: int, layer: "Layer", reserved: int, room: int) -> Pace | None:
    """Return the appends of one token that may follow upon the present state of a layer.

    Args:
        kernels: of the cache.
        index: of the layer.
        layer: its state.
        reserved: `Cache.reserved`.
        room: columns until the cache is full.

    Returns: none where there are too few, with a window or padding, on a device, or where the
        kernels have no faster way.
    """
    on_host = kernels.memory.device == "cpu"
    if layer.plan.window is not None or not layer.columns.is_even or not on_host:
        return None
    grows, left = [], min(_AHEAD, room)
    for stream in layer.streams:
        grow, appends = _look_ahead(stream, reserved)
        grows.append(grow)
        left = min(left, appends)
    k, v = (Inlet((*s.tail.shape[:2], 1, s.plan.channels)) for s in layer.streams)
    pair = grows[0], grows[1]
    steps = None
    if left >= _FEW:
        steps = kernels.steps(index, layer.streams, pair, (k.array, v.array))
    if steps is None:
        return None
    one = np.ones(len(layer.k.length), np.int64)
    return Pace(steps, k, v, one, pair, left, reserved, _state_of(layer))


def _look_ahead(stream: Stream, reserved: int) -> tuple[int, int]:
    """Return how many tokens of every row the next append encodes, and how many appends do alike.

    Counted are only appends for which the tail and the pages that are there have room.
    """
    tokens = stream.plan.tokens
    pages = stream.sinks + pages_before(stream, stream.encoded) * stream.layout.tokens
    least, found = _AHEAD, set()
    rows = (stream.length, stream.encoded, stream.tail_first, pages)
    for length, encoded, first, last in zip(*(row.tolist() for row in rows), strict=True):

        def grown(appends: int, length: int = length, encoded: int = encoded) -> int:
            """Return how many tokens so many appends encode."""
            end = tokens.encoded_end(max(0, length + appends - 1 - reserved))
            return max(end - encoded, 0)

        grow, room = grown(1), stream.tail.shape[2] - (length - first)
        # Of single tokens, no append encodes two; so all do alike until the sum says otherwise.
        if grow and (grow > 1 or tokens.group_tokens > 1 or tokens.flush == "block"):
            return 0, 0
        least = min(least, room, last - encoded if grow else _AHEAD)
        appends = range(1, max(least, 0) + 1)
        least = bisect_left(appends, True, key=lambda n: grown(n) != n * grow)
        found.add(grow)
    return (found.pop(), least) if len(found) == 1 else (0, 0)


def _state_of(layer: "Layer") -> tuple[object, ...]:
    k, v = layer.k, layer.v
    return (layer.columns, k.length, v.length, k.encoded, v.encoded, k.tail, v.tail)
