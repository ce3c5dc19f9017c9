"""Where a cache may be cut: `Cache.truncate` is exact or refused, and the refusal names what works.

A cut is refused inside a group of tokens that were encoded together, and where the window of the
next token was given back already (see `StreamPlan.held_from`).
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..ir.errors import KvantError
from .columns import Ints
from .stream import can_cut, holds_window

if TYPE_CHECKING:
    from .cache import Layer


def check_cut(layers: Sequence["Layer"], columns: int, length: int) -> None:
    """Refuse a cut to `columns` of the `length` columns that every layer has.

    Raises: KvantError "truncate-inside-group" or "truncate-behind-window".
    """
    if _can_cut(layers, columns):
        return
    # From `lowest` on no window is gone: the search for a number that works can be short.
    lowest = bisect_left(range(length), True, key=lambda c: _holds_windows(layers, c))
    after, before = range(max(columns + 1, lowest), length + 1), range(columns - 1, lowest - 1, -1)
    above, below = (next((c for c in r if _can_cut(layers, c)), 0) for r in (after, before))
    if columns < lowest:
        raise KvantError(
            "truncate-behind-window",
            f"{columns} columns would need tokens that a sliding window has given back",
            where="truncate",
            fix=f"truncate to {above}, or reserve(n) before speculative tokens",
        )
    raise KvantError(
        "truncate-inside-group",
        f"{columns} columns would cut a group of encoded tokens in two",
        where="truncate",
        fix=f"truncate to {below} or {above}, or reserve(n) before speculative tokens",
    )


def _can_cut(layers: Sequence["Layer"], columns: int) -> bool:
    return all(
        can_cut(stream, _tokens(layer, columns)) for layer in layers for stream in layer.streams
    )


def _holds_windows(layers: Sequence["Layer"], columns: int) -> bool:
    """Return whether no window is gone after a cut to `columns`; true from some number on."""
    return all(
        bool(holds_window(stream, _tokens(layer, columns)).all())
        for layer in layers
        for stream in layer.streams
    )


def _tokens(layer: "Layer", columns: int) -> Ints:
    """Return int64[B], the tokens of each row in the first columns of a layer."""
    return layer.columns.counts_at(min(columns, layer.columns.length))
