"""Appends of one token a row, one after another, while nothing changes but counts.

Most appends of a decoding loop take no page, move no tail and encode as many tokens as the one
before. How many of them are to come is found out once, by the rules that hold for every append;
then each is one call of a kernel, and no rule is asked again. What such an append does not take
(another shape, a number that is not finite) it leaves to the ordinary append, which takes or
refuses it.
"""

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .bound import are_still, arrays_of
from .inlet import Inlet
from .stream import Ints, Kernels, Pair, Steps, Stream, take_pages
from .tails import make_room

if TYPE_CHECKING:
    from .cache import Layer

SOON = 16
"""Appends for which an ordinary one makes room, so that a pace is not over at once."""
_AHEAD = 64  # appends that are looked ahead, at most

Counts = tuple[Ints, Ints, Ints]


@dataclass(frozen=True, slots=True)
class Way:
    """How tokens are stored in the arrays that two streams have.

    Attributes:
        steps: stores, encodes and counts.
        made_of: the arrays, but for those of `counts`.
        counts: length, encoded and tail_first of k, then of v, for `steps` alone to move.
    """

    steps: Steps
    made_of: tuple[object, ...]
    counts: tuple[Counts, Counts]

    def lead_on(self, streams: Pair) -> None:
        """Make the counts those of the streams, in place."""
        for stream, (length, encoded, first) in zip(streams, self.counts, strict=True):
            length[:], encoded[:], first[:] = stream.length, stream.encoded, stream.tail_first
            stream.length, stream.encoded, stream.tail_first = length, encoded, first


@dataclass(slots=True)
class Pace:
    """The appends of one token that follow upon one state of a layer, by those before it.

    Attributes:
        kernels: of the cache.
        index: of the layer.
        most: columns of the cache.
        reserved: `Cache.reserved`.
        made_of: what the state was made of. Whatever else happens to the layer (an append of more
            tokens, a flush, a cut, rows in another order) puts another object in the place of one
            of these; then the pace is over.
        k: where keys come in.
        v: where values come in.
        way: how tokens are stored; none before the first append.
        grows: tokens of k and of v that each append encodes, 0 or 1.
        left: how many appends may follow without looking ahead again.
    """

    kernels: Kernels
    index: int
    most: int
    reserved: int
    made_of: tuple[object, ...]
    k: Inlet
    v: Inlet
    way: Way | None = None
    grows: tuple[int, int] = (0, 0)
    left: int = 0

    def append(self, layer: "Layer", k: object, v: object, reserved: int) -> bool:
        """Append one token a row. Return whether it was done; if not, nothing counts of it."""
        if self.reserved != reserved or not are_still(self.made_of, _state_of(layer)):
            return False
        keys, values = self.k, self.v
        k_at, v_at = keys.take(k), values.take(v)
        if not k_at or not v_at or (not self.left and not self._look_ahead(layer)):
            return False
        way = self.way
        if way is None:
            return False
        # The call counts the token, or does not; what interrupts it leaves no more to follow.
        left, self.left = self.left, 0
        k_grow, v_grow = self.grows
        if way.steps.call(k_at, keys.type, k_grow, v_at, values.type, v_grow):
            return False
        self.left = left - 1
        return True

    def _look_ahead(self, layer: "Layer") -> bool:
        """Find out how many appends follow, and make room for them. Return whether any do.

        Room is made where no caller sees it: tails are moved, and pages taken, that hold nothing.
        """
        left = min(_AHEAD, self.most - layer.columns.length)
        if left < 1:
            return False
        for stream in layer.streams:
            make_room(stream, stream.length + 1, SOON)
        way = self.way
        if way is None or not are_still(way.made_of, (*arrays_of(layer.k), *arrays_of(layer.v))):
            way = self.way = new_way(self.kernels, self.index, layer)
            if way is None:
                return False
        way.lead_on(layer.streams)
        self.made_of = _state_of(layer)
        k_grow, left = _alike(layer.k, self.reserved, left)
        v_grow, left = _alike(layer.v, self.reserved, left) if left else (0, 0)
        if not left:
            return False
        for stream, grow in zip(layer.streams, (k_grow, v_grow), strict=True):
            if grow:
                take_pages(stream, stream.encoded, stream.encoded + 1)
        self.grows, self.left = (k_grow, v_grow), left
        return True


def new_way(kernels: Kernels, index: int, layer: "Layer") -> Way | None:
    """Return how tokens are stored in the streams of a layer as they are, or none."""
    # The arguments of attend would keep a tail that was moved.
    layer.k.bound = None
    k_counts, v_counts = (
        (s.length.copy(), s.encoded.copy(), s.tail_first.copy()) for s in layer.streams
    )
    for stream, counts in zip(layer.streams, (k_counts, v_counts), strict=True):
        stream.length, stream.encoded, stream.tail_first = counts
    steps = kernels.steps(index, layer.streams)
    if steps is None:
        return None
    made_of = *arrays_of(layer.k), *arrays_of(layer.v)
    return Way(steps, made_of, (k_counts, v_counts))


def new_pace(kernels: Kernels, index: int, layer: "Layer", reserved: int, most: int) -> Pace | None:
    """Return the appends of one token that may follow upon the present state of a layer.

    Args:
        kernels: of the cache.
        index: of the layer.
        layer: its state.
        reserved: `Cache.reserved`.
        most: columns of the cache.

    Returns: none with a window or padding, or on a device.
    """
    on_host = kernels.memory.device == "cpu"
    if layer.plan.window is not None or not layer.columns.is_even or not on_host:
        return None
    given = kernels, index, most, reserved, _state_of(layer)
    if layer.pace is not None:
        return Pace(*given, layer.pace.k, layer.pace.v, layer.pace.way)
    k, v = (Inlet((*s.tail.shape[:2], 1, s.plan.channels)) for s in layer.streams)
    return Pace(*given, k, v)


def _alike(stream: Stream, reserved: int, most: int) -> tuple[int, int]:
    """Return how many tokens of every row the next append encodes, and how many appends do alike.

    Counted are only appends for which the tail has room, and one page at most is to be taken.
    """
    tokens, sinks, page = stream.plan.tokens, stream.sinks, stream.layout.tokens
    rows, found = (stream.length, stream.encoded, stream.tail_first), set()
    for length, encoded, first in set(zip(*(row.tolist() for row in rows), strict=True)):

        def grown(appends: int, length: int = length, encoded: int = encoded) -> int:
            """Return how many tokens so many appends encode."""
            end = tokens.encoded_end(max(0, length + appends - 1 - reserved))
            return max(end - encoded, 0)

        grow = grown(1)
        if grow and not (grow == 1 and tokens.one_by_one):
            return 0, 0
        most = min(most, stream.tail.shape[2] - (length - first))
        if grow:
            most = min(most, page - (encoded - sinks) % page)
        if most < 1:
            return 0, 0
        if grown(most) != most * grow:
            most = bisect_left(range(1, most + 1), True, key=lambda n: grown(n) != n * grow)
        found.add(grow)
    return (found.pop(), most) if len(found) == 1 else (0, 0)


def _state_of(layer: "Layer") -> tuple[object, ...]:
    k, v = layer.k, layer.v
    counts = k.length, k.encoded, k.tail_first, v.length, v.encoded, v.tail_first
    return *counts, k.tail, v.tail
