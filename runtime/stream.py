"""A stream: everything one layer holds of one role, and the moves between its parts.

    positions   [0, n_sink)      sink     float32, kept for good
                [n_sink, held)   nowhere  older than the layer's window; empty without one
                [held, e)        pages    encoded, in whole groups
                [e, length)      tail     float32, not encoded yet

With a window the pages are a ring: those that `StreamPlan.held_from` lets go are given back to the
pool, and their entries of the table are -1. No query may ask for them: `queries.py` sees to that.

Whatever lies at or past a row's `length`, in the tail or in a page, is unfinished business that no
kernel may read. An append writes there first and moves `length` and `encoded` last, so a refusal
on the way leaves the stream as it was.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..ir.layouts import PageLayout
from ..ir.plan import TABLE_BYTES, StreamPlan
from .memory import HOST, Array, Memory
from .pages import PagePool
from .tails import TAIL_MIN, trim

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(slots=True)
class Stream:
    """One role of one layer. Positions count from a row's first valid token.

    Attributes:
        plan: what is stored, and how.
        layout: the bytes of a page; page i of a row holds positions n_sink + [i P, (i + 1) P).
        pool: where pages come from, shared with other streams of the same page size.
        window: of the layer, or None for none.
        memory: where sink, tail and pages are; all else is on the host.
        sink: f32[B, H, n_sink, D].
        tail: f32[B, H, capacity, D]; slot = position - tail_first[row].
        tail_first: int64[B], position of slot 0; tail_first <= encoded.
        table: int64[B, max_pages], index of each page in the pool, -1 where there is none.
        held: int64[B], begin of what the pages hold: n_sink plus whole pages; held <= encoded.
        encoded: int64[B], end of what the pages hold.
        length: int64[B], valid tokens.
        bad: int64[2, B H]; what append and encode of a device could not store, for `check`.
        bound: what the kernels keep of this stream between two calls; see `bound.py`.
    """

    plan: StreamPlan
    layout: PageLayout
    pool: PagePool
    window: int | None
    memory: Memory
    sink: Array
    tail: Array
    tail_first: Ints
    table: Ints
    held: Ints
    encoded: Ints
    length: Ints
    bad: Array
    bound: object = field(default=None, init=False, repr=False, compare=False)

    @property
    def pages(self) -> Array:
        """uint8[n_pages, page_bytes] of the pool, 64-byte aligned."""
        return self.pool.pages

    @property
    def sinks(self) -> int:
        """n_sink, the number of positions kept in `sink`."""
        return self.plan.tokens.sink


Pair = tuple[Stream, Stream]
"""k and v of a layer."""


@dataclass(frozen=True, slots=True)
class Steps:
    """What appends one token a row, again and again.

    Attributes:
        call: stores one more token a row of k and v, and encodes; `length` and `encoded` of both
            streams move on within the arrays that they are. Arguments: for k, then for v, where the
            token is, [B, H, 1, D] without gaps, as an address; its type, a number of TYPES; and how
            many tokens are encoded, 0 or 1, the latter where `Tokens.one_by_one`. Returns 0; else
            nothing counts, for `append` or `encode` would refuse.
        kept: memory that the call reads and writes.
    """

    call: Callable[[int, int, int, int, int, int], int]
    kept: tuple[Array, ...]


Span = tuple[Ints, Ints]
"""Positions [begin, end) of each row, int64[B] each."""


@dataclass(frozen=True, slots=True)
class New:
    """New tokens of a layer; row b's are x[b, :, first[b] : first[b] + count[b]].

    Attributes:
        k: f32[B, H, T, D].
        v: f32[B, H, T, Dv].
        first: int64[B].
        count: int64[B].
    """

    k: Floats
    v: Floats
    first: Ints
    count: Ints


TYPES = ("float32", "bfloat16")
"""Number types of new tokens that `Steps` take."""


class InTurn(Protocol):
    """Kernels of the host, which store and encode one stream at a time."""

    def append(self, layer: int, stream: Stream, x: Floats, first: Ints, count: Ints) -> None:
        """Store new tokens of a stream; see `Kernels.update`."""

    def encode(self, layer: int, stream: Stream, begin: Ints, end: Ints) -> None:
        """Encode tokens of a stream; see `Kernels.update`."""


def update_in_turn(
    kernels: InTurn, layer: int, streams: Pair, new: New | None, due: tuple[Span, Span]
) -> None:
    """Do what `Kernels.update` does, one stream after the other."""
    if new is not None:
        for stream, x in zip(streams, (new.k, new.v), strict=True):
            kernels.append(layer, stream, x, new.first, new.count)
    for stream, (begin, end) in zip(streams, due, strict=True):
        if (end > begin).any():
            kernels.encode(layer, stream, begin, end)


class Kernels(Protocol):
    """What a target must be able to do. Bookkeeping and checks are the cache's.

    Rows of int64[B] arguments may differ; a row for which there is nothing to do has count 0 or
    begin = end.

    The arrays of streams, and x, q, out and lse, are in `memory`.
    """

    @property
    def memory(self) -> Memory:
        """Where arrays must be."""

    def layouts(self, layer: int) -> tuple[PageLayout, PageLayout]:
        """Return the bytes of a page of k and of v that these kernels read and write."""

    def update(self, layer: int, streams: Pair, new: New | None, due: tuple[Span, Span]) -> None:
        """Store new tokens of k and v, if any, and encode those that are due of each.

        New tokens are mapped, rounded once and for all to the plan's raw type (`Tokens.as_raw`),
        and stored as positions length, length + 1, ...; the tail is large enough. Those of [begin,
        end) are encoded from the tail into pages that the table already names. `begin` is
        `encoded`, or past it where a window already hides what is between; `end` is at most
        `length`, so nothing new is due.

        Raises: KvantError "non-finite" before anything of that stream is stored, or
            "scale-overflow".
        """

    def steps(self, layer: int, streams: Pair) -> Steps | None:
        """Return what appends one token a row and encodes, again and again.

        It is for the arrays that the streams have now, which must have room. No two streams share
        `length` or `encoded`. None: that would not be faster than `update`.
        """

    def attend(self, layer: int, q: Floats, k: Stream, v: Stream) -> tuple[Floats, Floats]:
        """Return out f32[B, Hq, Tq, Dv] and lse f32[B, Hq, Tq] of q f32[B, Hq, Tq, D].

        The queries are the last Tq positions of each row. A query before position 0 gives zeros
        and -inf. Where the plan rounds q to integers, they are those of `round_queries` without
        exception; how far outputs may be off, `ir/tolerance.py` says.
        """

    def check(self, streams: Sequence[Stream]) -> None:
        """Refuse now what append or encode of a device found, without waiting, and could not say.

        Args:
            streams: k and v of each layer of one cache, in order.

        Raises: KvantError "non-finite" or "scale-overflow"; the cache must then be reset.
        """


def page_limit(plan: StreamPlan, max_tokens: int, window: int | None = None) -> int:
    """Return the most pages a row of this stream can hold at once."""
    pages = -(-max(0, max_tokens - plan.tokens.sink) // plan.page_tokens)
    if window is None:
        return pages
    # The positions of a ring are fewer than its window and two pages; and what comes is written
    # before what goes is given back.
    return min(pages, 2 * (-(-window // plan.page_tokens) + 2))


def new_stream(
    plan: StreamPlan,
    pool: PagePool,
    batch: int,
    max_tokens: int,
    window: int | None = None,
    memory: Memory = HOST,
    layout: PageLayout | None = None,
) -> Stream:
    """Return an empty stream of a layer with this window, in the memory of its pool.

    The layout is the plan's own, rows, if none is given.
    """
    sinks = plan.tokens.sink
    return Stream(
        plan=plan,
        layout=plan.page_layout() if layout is None else layout,
        pool=pool,
        window=window,
        memory=memory,
        sink=memory.zeros((batch, plan.heads, sinks, plan.channels)),
        tail=memory.zeros((batch, plan.heads, TAIL_MIN, plan.channels)),
        tail_first=np.full(batch, sinks, np.int64),
        table=np.full((batch, max(1, page_limit(plan, max_tokens))), -1, np.int64),
        held=np.full(batch, sinks, np.int64),
        encoded=np.full(batch, sinks, np.int64),
        length=np.zeros(batch, np.int64),
        bad=memory.place(np.zeros((2, batch * plan.heads), np.int64)),
    )


def due(stream: Stream, reserve: int) -> Ints:
    """Return int64[B], how far each row must be encoded before the next token comes.

    Args:
        stream: the stream; its present length counts.
        reserve: number of newest tokens that are kept as they came, beyond the plan's own.
    """
    tokens = stream.plan.tokens
    ends = [tokens.encoded_end(max(0, length - reserve)) for length in stream.length.tolist()]
    return np.maximum(np.asarray(ends, np.int64), stream.encoded)


def held_from(stream: Stream, reserve: int) -> Ints:
    """Return int64[B], where the pages of each row may begin from now on.

    Args:
        stream: the stream; its present length counts.
        reserve: number of newest tokens that may be taken back.

    Returns: `stream.held` itself where nothing can be given back.
    """
    if stream.window is None:
        return stream.held
    lengths = np.maximum(stream.length - reserve, 0).tolist()
    begin = [stream.plan.held_from(length, stream.window) for length in lengths]
    held = np.maximum(np.asarray(begin, np.int64), stream.held)
    return stream.held if (held == stream.held).all() else held


def pages_before(stream: Stream, position: Ints) -> Ints:
    """Return int64[B], how many pages of each row begin before `position`; that is >= n_sink."""
    return -(-(position - stream.sinks) // stream.layout.tokens)


def take_pages(stream: Stream, begin: Ints, end: Ints) -> None:
    """Extend the table so that every row has pages for positions [begin, end).

    A page of which positions before `begin` are used is there already; others may be.

    Raises: KvantError "cache-full"; `drop_pages` gives back what was taken until then.
    """
    have, need = pages_before(stream, begin), pages_before(stream, end)
    if (need == have).all():
        return
    for row in range(len(have)):
        for i in range(int(have[row]), int(need[row])):
            if stream.table[row, i] < 0:
                stream.table[row, i] = stream.pool.take()


def drop_pages(stream: Stream) -> None:
    """Give back every page of the table that holds no position of [held, encoded)."""
    first, last = pages_before(stream, stream.held), pages_before(stream, stream.encoded)
    page = np.arange(stream.table.shape[1])
    outside = (page < first[:, None]) | (page >= last[:, None])
    dropped = stream.table[outside]
    stream.table[outside] = -1  # first, so that an interruption loses pages, and shares none
    stream.pool.give_back(dropped[dropped >= 0].tolist())


def can_cut(stream: Stream, length: Ints) -> bool:
    """Return whether every row can be cut to `length`.

    That is where the tail begins or after it, between two groups, or in the sink; and the window
    of the next token must still be held.
    """
    if not (holds_window(stream, length) | (length <= stream.sinks)).all():
        return False
    group = stream.plan.tokens.rest.group_tokens
    inside = (length < stream.encoded) & (length > stream.sinks)
    return not (inside & ((length - stream.sinks) % group != 0)).any()


def holds_window(stream: Stream, length: Ints) -> NDArray[np.bool_]:
    """Return bool[B], whether all that a query at position `length` of a row may see is held."""
    if stream.window is None:
        return np.ones(len(length), np.bool_)
    seen = length - stream.window + 1
    return np.asarray((stream.held == stream.sinks) | (seen >= stream.held))


def cut(stream: Stream, length: Ints) -> None:
    """Forget positions at and past `length`, where `can_cut` allows it."""
    encoded = np.minimum(stream.encoded, np.maximum(length, stream.sinks))
    first = np.where(encoded < stream.encoded, encoded, stream.tail_first)
    stream.length, stream.tail_first = np.minimum(length, stream.length), first
    stream.held, stream.encoded = np.minimum(stream.held, encoded), encoded
    drop_pages(stream)
    trim(stream)


def take_rows(stream: Stream, index: Ints) -> None:
    """Make row i what row index[i] was. A page stays with the first row that wants it."""
    owner: dict[int, int] = {}
    for row, source in enumerate(index.tolist()):
        owner.setdefault(source, row)
    old, table = stream.table, np.full_like(stream.table, -1)
    for row in range(len(index)):
        if row not in owner:
            stream.pool.give_back(old[row, old[row] >= 0].tolist())
    for row, source in enumerate(index.tolist()):
        for i in np.flatnonzero(old[source] >= 0).tolist():
            page = int(old[source, i])
            if owner[source] != row:
                copy = stream.pool.take()
                stream.pages[copy] = stream.pages[page]
                page = copy
            table[row, i] = page
    moved = rows_of(stream, index)
    stream.sink, stream.tail, stream.tail_first = moved.sink, moved.tail, moved.tail_first
    stream.held, stream.encoded = moved.held, moved.encoded
    stream.length, stream.table = moved.length, table


def rows_of(stream: Stream, index: Ints) -> Stream:
    """Return a stream to read from, whose row i is row index[i]; its pages are the same."""
    return replace(
        stream,
        sink=stream.memory.rows(stream.sink, index),
        tail=stream.memory.rows(stream.tail, index),
        tail_first=stream.tail_first[index],
        table=stream.table[index],
        held=stream.held[index],
        encoded=stream.encoded[index],
        length=stream.length[index],
    )


def stream_bytes(stream: Stream) -> int:
    """Return the bytes in use: raw tokens in the plan's raw dtype, pages, and table entries."""
    pages = int((pages_before(stream, stream.encoded) - pages_before(stream, stream.held)).sum())
    raw = np.minimum(stream.length, stream.sinks) + np.maximum(stream.length - stream.encoded, 0)
    token = stream.plan.elements_per_token * stream.plan.tokens.raw.itemsize
    return int(raw.sum()) * token + pages * (stream.layout.page_bytes + TABLE_BYTES)
