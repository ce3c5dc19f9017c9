"""Tails: where the newest tokens of a stream lie, and how room is made behind them.

A tail is memory of some slots for each row; its live tokens lie anywhere in it, one after another.
Room is made by copying them to the front, or to the front of a larger tail.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .memory import Array

if TYPE_CHECKING:
    from .stream import Ints, Stream

TAIL_MIN = 64  # tokens; a smaller tail would be moved often
_SLIDE = 256  # tokens that are better copied within a tail, which then has room for them twice


def make_room(stream: "Stream", new_length: "Ints", ahead: int = 0) -> None:
    """Make the tail large enough for positions up to `new_length`; the content does not change.

    Args:
        stream: the stream.
        new_length: int64[B].
        ahead: tokens that are likely to follow; at most those for which a new tail has room.
    """
    slots = zip(new_length.tolist(), stream.tail_first.tolist(), strict=True)
    if max(last - first for last, first in slots) + ahead <= stream.tail.shape[2]:
        return
    need = max(0, int((new_length - stream.encoded).max()))
    if need + TAIL_MIN // 2 > stream.tail.shape[2] or not _slide_tail(stream):
        _move_tail(stream, _room_for(need))


def fix_tail(stream: "Stream", live: int) -> None:
    """Make the tail so large that `slide_tail` alone makes room, seldom, for `live` tokens."""
    if stream.tail.shape[2] < 3 * live + TAIL_MIN:
        _move_tail(stream, 3 * live + TAIL_MIN)


def slide_tail(stream: "Stream") -> None:
    """Copy what is live to the front of a tail of torch, whatever it lies over."""
    _to_front(stream, lambda tokens: tokens.clone())


def trim(stream: "Stream") -> None:
    """Give memory back where the tail is far larger than what is in it."""
    live = max(0, int((stream.length - stream.encoded).max()))
    if stream.tail.shape[2] > 4 * _room_for(live):
        _move_tail(stream, _room_for(live))


def _room_for(live: int) -> int:
    """Return a capacity with a quarter free, so that each token is moved a few times at most."""
    return live + max(TAIL_MIN, live // 4, min(live, _SLIDE) + TAIL_MIN // 4)


def _slide_tail(stream: "Stream") -> bool:
    """Copy what is live to the front of the tail, unless that lies over itself; return whether."""
    live, at = _live(stream)
    if any(begin < count for count, begin in zip(live, at, strict=True)):
        return False
    _to_front(stream, lambda tokens: tokens)
    return True


def _to_front(stream: "Stream", copied: Callable[[Array], Array]) -> None:
    """Copy what is live to the front of the tail, by way of what `copied` returns of it."""
    live, at = _live(stream)
    if len({*zip(live, at, strict=True)}) == 1:  # rows alike: one copy
        stream.tail[:, :, : live[0]] = copied(stream.tail[:, :, at[0] : at[0] + live[0]])
    else:
        for row, (count, begin) in enumerate(zip(live, at, strict=True)):
            stream.tail[row, :, :count] = copied(stream.tail[row, :, begin : begin + count])
    stream.tail_first = stream.encoded.copy()  # the old place was right until here


def _live(stream: "Stream") -> tuple[list[int], list[int]]:
    """Return how many slots of the tail of each row are in use, and from which on."""
    live = np.maximum(stream.length - stream.encoded, 0)
    return live.tolist(), (stream.encoded - stream.tail_first).tolist()


def _move_tail(stream: "Stream", capacity: int) -> None:
    """Copy what is live to the front of a new tail."""
    batch, heads, _, channels = stream.tail.shape
    tail = stream.memory.zeros((batch, heads, capacity, channels))
    for row, (live, at) in enumerate(zip(*_live(stream), strict=True)):
        tail[row, :, :live] = stream.tail[row, :, at : at + live]
    first = stream.encoded.copy()
    stream.tail, stream.tail_first = tail, first
