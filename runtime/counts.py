"""What one new token a row changes in what the host counts, for layers that are counted alike.

Layers with the same windows and groups that were given the same appends have the same lengths and
the same ends of what is encoded. So the host counts for one of them, once a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ..ir.encodings import Tokens
from .columns import Columns
from .pace import SOON
from .stream import (
    Ints,
    Stream,
    drop_pages,
    due,
    held_from,
    pages_before,
)
from .tails import make_room, slide_tail

if TYPE_CHECKING:
    from .cache import Layer

Taken = tuple[int, int, int, int]
"""A page that was taken: number of the stream among those given, row, column of its table, page."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What layers count, once one more column is there.

    Attributes:
        columns: which column is which position of a row.
        first: int64[B], 0 where the new column holds a token of the row.
        count: int64[B], 1 where it does, else 0.
        before: int64[B], tokens of each row without the new one.
        length: int64[B], with it.
        held: begin of what the pages hold, of k and of v, int64[B] each.
        begin: from where on tokens are to be encoded.
        end: end of what the pages hold.
    """

    columns: Columns
    first: Ints
    count: Ints
    before: Ints
    length: Ints
    held: tuple[Ints, Ints]
    begin: tuple[Ints, Ints]
    end: tuple[Ints, Ints]


def next_counts(layer: "Layer", reserved: int) -> Counts:
    """Return what a layer counts after one more column, by the rules of `Cache.append`.

    Args:
        layer: its present state, which does not change.
        reserved: `Cache.reserved`.
    """
    now = layer.columns
    first, count = now.valid(1, None)
    before = layer.k.length
    k, v = layer.streams
    held = held_from(k, reserved), held_from(v, reserved)
    begin = np.maximum(k.encoded, held[0]), np.maximum(v.encoded, held[1])
    end = due(k, reserved), due(v, reserved)
    columns = now.grown(1, first, count)
    return Counts(columns, first, count, before, before + count, held, begin, end)


def counted_alike(layers: Sequence["Layer"], keys: Sequence[object]) -> tuple[tuple[int, ...], ...]:
    """Return the layers in groups, whose members count the same from now on by the same kernels.

    Args:
        layers: of a cache.
        keys: which kernels each has.
    """
    groups: dict[object, list[int]] = {}
    for index, (layer, key) in enumerate(zip(layers, keys, strict=True)):
        groups.setdefault((key, _state(layer)), []).append(index)
    return tuple(tuple(group) for group in groups.values())


def _state(layer: "Layer") -> object:
    """Return all that decides how a layer counts on."""
    columns = layer.columns
    marks = tuple((column, counts.tobytes()) for column, counts in columns.marks)
    return (
        marks,
        columns.start.tobytes(),
        columns.is_dense,
        *(_stream_state(stream) for stream in layer.streams),
    )


def _stream_state(stream: Stream) -> object:
    counts = stream.length, stream.encoded, stream.held, stream.tail_first
    plan = stream.plan
    rule = plan.tokens, plan.page_tokens, stream.window, stream.tail.shape[2]
    return *rule, *(x.tobytes() for x in counts)


def make_tails(streams: Sequence[Stream], length: Ints, *, stay: bool) -> None:
    """Make room in the tails of streams that are counted alike; see `tails.make_room`.

    `stay`: at the addresses where they are; they must be large enough for `fix_tail`.
    """
    lead = streams[0]
    ahead = 0 if stay else SOON
    if int((length - lead.tail_first).max()) + ahead <= lead.tail.shape[2]:
        return
    for stream in streams:
        if stay:
            slide_tail(stream)
        else:
            make_room(stream, length, ahead)
        # What was computed for each of them is the same, and stays so.
        stream.tail_first = lead.tail_first


def take_pages_alike(streams: Sequence[Stream], begin: Ints, end: Ints) -> list[Taken]:
    """Give pages for positions [begin, end) of each row to streams that are counted alike.

    Raises: KvantError "cache-full".
    """
    lead = streams[0]
    have, need = pages_before(lead, begin), pages_before(lead, end)
    if (need == have).all():
        return []
    wanted = [
        (row, i)
        for row, (low, high) in enumerate(zip(have.tolist(), need.tolist(), strict=True))
        for i in range(low, high)
    ]
    taken = []
    for number, stream in enumerate(streams):
        for row, i in wanted:
            if stream.table[row, i] < 0:
                stream.table[row, i] = stream.pool.take()
                taken.append((number, row, i, int(stream.table[row, i])))
    return taken


def settle(layer: "Layer", counts: Counts) -> None:
    """Let count what was counted; see `cache.Cache.append`."""
    for stream, held, end in zip(layer.streams, counts.held, counts.end, strict=True):
        before, stream.held, stream.encoded, stream.length = stream.held, held, end, counts.length
        if held is not before:
            drop_pages(stream)
    layer.marked = counts.columns


def most_encoded(tokens: Tokens) -> int:
    """Return how many tokens of a row one more token can make due."""
    ends = _ends(tokens)
    return max(b - a for a, b in pairwise(ends))


def most_waiting(stream: Stream, reserved: int) -> int:
    """Return how many tokens of a row can be in the tail, all that is due being encoded.

    Args:
        stream: any.
        reserved: `Cache.reserved`.
    """
    tokens = stream.plan.tokens
    # What an append makes due is encoded by the next one, which brings a token more.
    return 2 + reserved + max(n - end for n, end in enumerate(_ends(tokens), tokens.sink))


def _ends(tokens: Tokens) -> list[int]:
    """Return the encoded ends of lengths from the sink on, for more than a period of them."""
    period = max(tokens.recent, 1) + tokens.group_tokens
    return [tokens.encoded_end(tokens.sink + n) for n in range(3 * period)]
