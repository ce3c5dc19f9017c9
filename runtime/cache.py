"""The cache of one batch: bookkeeping and checks around the kernels of a target.

Every call is checked whole before anything changes, and `length` moves last. So a call that raises
leaves the cache as it was.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ir.errors import KvantError
from ..ir.layouts import PageLayout
from ..ir.plan import AttentionPlan, StreamPlan
from .columns import Columns, new_columns
from .decode import Decode, open_decode
from .memory import Array, Memory
from .pace import SOON, Pace, new_pace
from .pages import PagePool
from .queries import attend_columns, check_queries
from .rollback import check_cut
from .state_file import write_state
from .stream import (
    Floats,
    Ints,
    Kernels,
    New,
    Pair,
    Span,
    Stream,
    cut,
    drop_pages,
    due,
    held_from,
    new_stream,
    page_limit,
    stream_bytes,
    take_pages,
    take_rows,
)
from .tails import make_room, trim
from .tensors import (
    Kind,
    check_finite,
    check_shape,
    read_integer,
    read_integers,
    wrong_value,
)

if TYPE_CHECKING:
    from .decode_steps import DecodeSteps


@dataclass(slots=True)
class Layer:
    """One layer's state.

    Attributes:
        plan: what is stored and computed.
        k: keys.
        v: values; as long as `k`, but encoded on its own schedule.
        marked: which column of the batch is which position of a row, but for those that came at
            a pace since.
        pace: the appends of one token that may follow, if that is known.
    """

    plan: AttentionPlan
    k: Stream
    v: Stream
    marked: Columns
    pace: Pace | None = None

    @property
    def columns(self) -> Columns:
        """Which column of the batch is which position of a row."""
        # At a pace, a column more is a token more of every row.
        more = self.k.length.item(0) - self.marked.counts.item(0)
        if more > 0:
            self.marked = self.marked.later(more)
        return self.marked

    @property
    def streams(self) -> Pair:
        """Both streams."""
        return self.k, self.v


class Cache:
    """Quantized keys and values of all layers for a batch of rows.

    Args:
        plans: one per layer.
        kernels: what appends, encodes and attends.
        batch: rows, at least 1.
        max_tokens: the most columns; a limit, memory grows by page.
        start: int64[B], first valid column of each row (left padding); None for zeros.
        artifact_id: id of the artifact that the plans come from; a state file fits only its own.

    Raises: KvantError "wrong-type", "wrong-dtype", "wrong-value", "wrong-shape", "out-of-memory".
    """

    def __init__(
        self,
        plans: Sequence[AttentionPlan],
        kernels: Kernels,
        *,
        batch: int = 1,
        max_tokens: int = 32768,
        start: object = None,
        artifact_id: str = "",
    ) -> None:
        self.batch = read_integer("batch", batch, 1)
        self.max_tokens = read_integer("max_tokens", max_tokens, 1)
        first = np.zeros(self.batch, np.int64)
        if start is not None:
            first = read_integers("start", start, self.batch)
        if (first < 0).any():
            raise wrong_value("start", first.tolist(), "no negative index")
        self.artifact_id = artifact_id
        self.kernels = kernels
        self.reserved = 0
        self.memory = kernels.memory
        self.pools = _open_pools(plans, self.batch, self.max_tokens, self.memory)
        self.decode: Decode | None = None
        self.layers = tuple(
            self._new_layer(plan, new_columns(first), kernels.layouts(layer))
            for layer, plan in enumerate(plans)
        )

    def _new_layer(
        self, plan: AttentionPlan, columns: Columns, layouts: tuple[PageLayout, PageLayout]
    ) -> Layer:
        sizes = self.batch, self.max_tokens, plan.window, self.memory
        k, v = (
            new_stream(s, self._pool_of(s), *sizes, layout)
            for s, layout in zip((plan.k, plan.v), layouts, strict=True)
        )
        return Layer(plan, k, v, columns)

    def _pool_of(self, stream: StreamPlan) -> PagePool:
        return self.pools[stream.page_layout().page_bytes]

    @property
    def start(self) -> Ints:
        """int64[B], first column of each row that can hold a token."""
        return self.layers[0].columns.start.copy()

    @property
    def length(self) -> int:
        """Number of columns that every layer has, padding included. On a device it checks."""
        self.check()
        return min(layer.columns.length for layer in self.layers)

    @property
    def lengths(self) -> Ints:
        """int64[B], valid tokens of each row in those columns."""
        return self.layers[0].columns.counts_at(self.length).copy()

    def append(self, layer: int, k: object, v: object, lengths: object = None) -> None:
        """Append T tokens to a layer.

        What became due before this call is encoded now; the new tokens stay as they are until the
        next append or `flush`.

        Args:
            layer: index from 0.
            k: [B, H, T, D], after RoPE; torch (on the CPU) or NumPy; f32, bf16 or f16.
            v: [B, H, T, Dv].
            lengths: int64[B], columns at and past it are right padding of this append; None for T.

        Raises: KvantError "unknown-layer", "wrong-type", "wrong-dtype", "wrong-device",
            "wrong-shape", "wrong-value", "non-finite", "cache-full", "scale-overflow".
        """
        state = self.layer(layer, "append")
        if self.decode is not None and lengths is None:
            if self._append_soon(self.decode, layer, k, v):
                return
            self.decode = None
        pace = state.pace if lengths is None else None
        if pace is not None and pace.append(state, k, v, self.reserved):
            return
        where, tails = f"layer {layer}, append", (state.k.tail, state.v.tail)
        new_k, new_v, padding = self._read_append(state, where, k, v, lengths)
        tokens = new_k.shape[2]
        if tokens == 0:
            return
        first, count = state.columns.valid(tokens, padding)
        length, columns = state.k.length + count, state.columns.grown(tokens, first, count)
        for stream in state.streams:
            make_room(stream, length, SOON if tokens == 1 else 0)
        try:
            spans = self._update(layer, state, New(new_k, new_v, first, count))
        except KvantError:
            # The kernels look for NaN as they store; what was given is searched only after that.
            check_finite("k", self.memory.fetch(new_k), first, count, where)
            check_finite("v", self.memory.fetch(new_v), first, count, where)
            raise
        _settle(state, spans, length, columns)
        _let_go(state, tails)
        if tokens == 1:
            state.pace = new_pace(self.kernels, layer, state, self.reserved, self.max_tokens)
            if layer == len(self.layers) - 1:
                self.decode = open_decode(self.layers, self.kernels, self.max_tokens, self.reserved)

    def _append_soon(self, decode: Decode, layer: int, k: object, v: object) -> bool:
        """Append one token on a device as what was found out before allows; return whether so."""
        new_k, new_v = decode.read(layer, 0, k), decode.read(layer, 1, v)
        if new_k is None or new_v is None or decode.reserved != self.reserved:
            return False
        return decode.append(layer, new_k, new_v)

    def attend(self, layer: int, q: object, return_lse: bool = False) -> Any:
        """Return attention of the last T_q columns over everything appended so far.

        Args:
            layer: index from 0.
            q: [B, Hq, T_q, D], after RoPE; T_q columns at most as appended.
            return_lse: also return the log of the sum of exponentials, f32[B, Hq, T_q].

        Returns: [B, Hq, T_q, Dv], of the library and dtype of q; zeros (and -inf) for padding.
        Raises: KvantError "unknown-layer", "wrong-type", "wrong-dtype", "wrong-device",
            "wrong-shape"; "window-given-back" where a layer with a sliding window is asked for
            queries of an earlier append, or of this one after a flush, beyond one page of tokens.
        """
        state, where = self.layer(layer, "attend"), f"layer {layer}, attend"
        if self.decode is not None:
            soon = self.decode.attend(layer, q, return_lse)
            if soon is not None:
                return soon if return_lse else soon[0]
        x, kind = self.memory.read_floats("q", q)
        plan = state.plan
        check_shape("q", x.shape, (self.batch, plan.q_heads, "T", plan.k.channels), where)
        tokens = x.shape[2]
        if tokens > state.columns.length:
            raise KvantError(
                "wrong-shape",
                f"q has {tokens} columns, but the layer has {state.columns.length}",
                where=where,
                fix="append the keys and values of these columns first",
            )
        if tokens == 0:
            out = self.memory.zeros((self.batch, plan.q_heads, 0, plan.v.channels))
            lse = self.memory.zeros((self.batch, plan.q_heads, 0))
        else:
            check_queries(state.columns, state.streams, tokens, where)
            out, lse = attend_columns(self.kernels, layer, x, state.columns, state.k, state.v)
        result = self.memory.write_floats(out, kind)
        if not return_lse:
            return result
        return result, self.memory.write_floats(lse, Kind(kind.library, "float32"))

    def decode_steps(self, tokens: int) -> "DecodeSteps":
        """Return steps of one token a row whose launches a CUDA graph may replay.

        What is due is encoded now, and memory for `tokens` more columns is made.

        Args:
            tokens: steps that there may be.

        Raises: KvantError "wrong-value", "not-on-a-device", "graph-capture", "steps-ended" where
            layers differ in length, "cache-full", "out-of-memory".
        """
        from .decode_steps import DecodeSteps

        return DecodeSteps(self, read_integer("tokens", tokens, 1))

    def flush(self) -> None:
        """Encode and give back now, in every layer, what the next append would."""
        for layer in range(len(self.layers)):
            self.flush_layer(layer)

    def flush_layer(self, layer: int) -> None:
        """Encode and give back now what the next append to this layer would."""
        state = self.layer(layer, "flush")
        tails = state.k.tail, state.v.tail
        _settle(state, self._update(layer, state, None), state.k.length, state.columns)
        _let_go(state, tails)

    def _update(self, layer: int, state: Layer, new: New | None) -> tuple[Span, Span]:
        """Store new tokens, write the pages of what is due, and return what pages hold from now on.

        What no window sees any more is not even written. All is written past `length` and
        `encoded`: until `_settle` moves these, nothing has happened. On an error the pages are
        given back.
        """
        k, v = ((held_from(s, self.reserved), due(s, self.reserved)) for s in state.streams)
        to_write = _unwritten(state.k, k), _unwritten(state.v, v)
        try:
            for stream, span in zip(state.streams, to_write, strict=True):
                take_pages(stream, *span)
            self.kernels.update(layer, state.streams, new, to_write)
        except BaseException:
            for stream in state.streams:
                drop_pages(stream)
            raise
        return k, v

    def check(self) -> None:
        """Refuse what a device found since the last check; on the CPU append itself refuses.

        Raises: KvantError "non-finite" or "scale-overflow"; the cache must then be reset.
        """
        self.kernels.check([stream for layer in self.layers for stream in layer.streams])

    def truncate(self, n: int) -> None:
        """Forget the columns from n on, in every layer.

        Exact down to the encoded end of every row; below, the cut must fall between two groups of
        every stream. A layer with a sliding window can be cut by as many tokens as a page holds
        after a flush, and as were appended since, at least; more where it is shorter than that.

        Raises: KvantError "wrong-value"; "truncate-inside-group" or "truncate-behind-window", which
            name the nearest legal numbers of columns. Nothing is changed then.
        """
        columns = read_integer("n", n, 0)
        if columns > self.length:
            raise wrong_value("n", columns, f"at most {self.length}, the columns there are")
        check_cut(self.layers, columns, self.length)
        for layer in self.layers:
            length = layer.columns.counts_at(min(columns, layer.columns.length))
            layer.marked = layer.columns.cut(columns)
            for stream in layer.streams:
                cut(stream, length)
            _let_go(layer)

    def reserve(self, n: int) -> None:
        """Keep the n newest tokens raw from now on, so that rolling them back is always exact.

        Layers with a sliding window keep n tokens more.

        Raises: KvantError "wrong-value".
        """
        self.reserved = read_integer("n", n, 0)

    def reorder(self, index: object) -> None:
        """Make row i what row index[i] was, in every layer (beam search).

        Args:
            index: int64[B], torch or NumPy.

        Raises: KvantError "wrong-type", "wrong-dtype", "wrong-shape" or "wrong-value".
        """
        rows = read_integers("index", index, self.batch)
        if ((rows < 0) | (rows >= self.batch)).any():
            raise wrong_value("index", rows.tolist(), f"rows 0 to {self.batch - 1}")
        if (rows == np.arange(self.batch)).all():
            return
        for layer in self.layers:
            layer.marked = layer.columns.rows(rows)
            for stream in layer.streams:
                take_rows(stream, rows)
            _let_go(layer)

    def bytes(self) -> int:
        """Return the bytes in use: raw tokens in the plan's raw dtype, pages, and their tables.

        Memory is more: sinks and tails are float32 always, and tails have room to grow.
        """
        return sum(stream_bytes(stream) for layer in self.layers for stream in layer.streams)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the whole state to a file, mode 0600, there whole or not at all.

        Raises: KvantError "output-not-written"; on a device, what `Kernels.check` raises.
        """
        self.check()
        write_state(self, path)

    def layer(self, layer: int, call: str) -> Layer:
        """Return a layer's state. Raises: KvantError "unknown-layer"."""
        if type(layer) is int and 0 <= layer < len(self.layers):
            return self.layers[layer]
        try:
            index = operator.index(layer)
        except TypeError:
            index = -1
        if not 0 <= index < len(self.layers):
            raise KvantError(
                "unknown-layer",
                f"there is no layer {layer!r}",
                where=call,
                fix=f"use 0 to {len(self.layers) - 1}",
            )
        return self.layers[index]

    def _read_append(
        self, state: Layer, where: str, k: object, v: object, lengths: object
    ) -> tuple[Floats, Floats, Ints | None]:
        """Check everything about an append but its values."""
        plan = state.plan
        new_k, new_v = self.memory.read_tokens("k", k), self.memory.read_tokens("v", v)
        check_shape("k", new_k.shape, (self.batch, plan.k.heads, "T", plan.k.channels), where)
        tokens = new_k.shape[2]
        check_shape("v", new_v.shape, (self.batch, plan.v.heads, tokens, plan.v.channels), where)
        padding = None if lengths is None else read_integers("lengths", lengths, self.batch)
        if padding is not None and ((padding < 0) | (padding > tokens)).any():
            raise wrong_value("lengths", padding.tolist(), f"0 to {tokens}")
        if state.columns.length + tokens > self.max_tokens:
            raise KvantError(
                "cache-full",
                f"{tokens} more columns after {state.columns.length} pass the limit of "
                f"{self.max_tokens}",
                where=where,
                fix="create the cache with a larger max_tokens, or truncate it",
            )
        return new_k, new_v, padding


def _unwritten(stream: Stream, span: Span) -> Span:
    """Return what must be encoded so that pages hold a span."""
    held, end = span
    return np.maximum(stream.encoded, held), end


def _let_go(layer: Layer, tails: tuple[Array, ...] = ()) -> None:
    """Forget what was made for the next calls, unless the layer still has the same tails.

    It would keep the memory of others, which may be as long as a prompt.
    """
    if not tails or layer.k.tail is not tails[0] or layer.v.tail is not tails[1]:
        layer.pace = layer.k.bound = None


def _settle(state: Layer, spans: Sequence[Span], length: Ints, columns: Columns) -> None:
    """Let count what was written; then give back what nobody reads any more."""
    before = [stream.held for stream in state.streams]
    for stream, (held, end) in zip(state.streams, spans, strict=True):
        stream.held, stream.encoded = held, end
    state.k.length, state.v.length, state.marked = length, length, columns
    for stream, held in zip(state.streams, before, strict=True):
        if stream.held is not held:
            drop_pages(stream)
        trim(stream)


def _open_pools(
    plans: Sequence[AttentionPlan], batch: int, max_tokens: int, memory: Memory
) -> dict[int, PagePool]:
    """Return one pool for each size of page, large enough for every stream at its limit."""
    pages: dict[int, int] = {}
    for plan in plans:
        for stream in (plan.k, plan.v):
            size = stream.page_layout().page_bytes
            pages[size] = pages.get(size, 0) + batch * page_limit(stream, max_tokens, plan.window)
    return {size: memory.open_pool(size, count) for size, count in pages.items()}
