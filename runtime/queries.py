"""What attend may ask of a layer with a sliding window, and its rows with right padding.

A layer without a window holds every position. With one, pages that no query to come can see are
given back, so a call must not ask for queries so old that their window is gone. Kernels give a
right-padded row made-up queries in front of its own; those would reach behind the window, so here
such rows are attended in groups of as many queries each.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..ir.errors import KvantError
from .columns import Columns, from_end, to_end
from .stream import Floats, Kernels, Pair, Stream, holds_window, rows_of


def check_queries(columns: Columns, streams: Pair, tokens: int, where: str) -> None:
    """Refuse queries that see what was given back.

    Args:
        columns: of the layer.
        streams: k and v.
        tokens: number of last columns that are queries; at most those there are.
        where: for the message.

    Raises: KvantError "window-given-back".
    """
    if all(stream.window is None for stream in streams):
        return
    first = columns.counts_at(columns.length - tokens)
    if all(holds_window(stream, first).all() for stream in streams):
        return
    raise KvantError(
        "window-given-back",
        f"the first of {tokens} queries sees tokens that were given back: only the newest "
        f"{streams[0].window} are sure to be there",
        where=where,
        fix="attend with the columns of an append before the next append or flush, or "
        "reserve(n) before it",
    )


def attend_columns(
    kernels: Kernels, layer: int, q: Floats, columns: Columns, k: Stream, v: Stream
) -> tuple[Floats, Floats]:
    """Return out [B, Hq, T, Dv] and lse [B, Hq, T] of queries q [B, Hq, T, D] by column.

    The queries of right-padded rows are moved to where the kernels expect them; padding gives zeros
    and -inf.
    """
    valid = columns.is_valid(q.shape[2])
    if valid is None:
        return kernels.attend(layer, q, k, v)
    memory = kernels.memory
    x = memory.fetch(q)
    if k.window is not None:
        out, lse = _attend_in_groups(kernels, layer, x, valid, k, v)
    else:
        out, lse = _attend_on_host(kernels, layer, to_end(x, valid), k, v)
        out, lse = from_end(out, valid, 0.0), from_end(lse, valid, -np.inf)
    return memory.place(out), memory.place(lse)


def _attend_on_host(
    kernels: Kernels, layer: int, q: Floats, k: Stream, v: Stream
) -> tuple[Floats, Floats]:
    """Attend with queries and results on the host."""
    memory = kernels.memory
    out, lse = kernels.attend(layer, memory.place(q), k, v)
    return memory.fetch(out), memory.fetch(lse)


def _attend_in_groups(
    kernels: Kernels, layer: int, q: Floats, valid: NDArray[np.bool_], k: Stream, v: Stream
) -> tuple[Floats, Floats]:
    """Attend for all rows with as many valid columns at once."""
    out: Any = np.zeros((*q.shape[:3], v.plan.channels), np.float32)
    lse: Any = np.full(q.shape[:3], -np.inf, np.float32)
    counts = valid.sum(axis=1)
    for count in np.unique(counts[counts > 0]):
        rows = np.flatnonzero(counts == count)
        own = np.stack([q[row][:, valid[row]] for row in rows])
        found = _attend_on_host(kernels, layer, own, rows_of(k, rows), rows_of(v, rows))
        for row, one_out, one_lse in zip(rows, *found, strict=True):
            out[row][:, valid[row]], lse[row][:, valid[row]] = one_out, one_lse
    return out, lse
