"""The kernels in NumPy: float64, slow, and the measure of all others.

They compute what the plan says on what the pages hold, with the records of `ir` alone: maps from
`ir.maps`, codes from `ir.encodings`, bytes from `ir.layouts`, attention from `ir.attention`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..ir.arrangements import ROWS, TILES, TURNED
from ..ir.attention import EXACT, attend, round_queries
from ..ir.encodings import Dense
from ..ir.encodings.slices import with_prefix
from ..ir.errors import KvantError
from ..ir.halves import Halves, Units, units_of, whole_tiles
from ..ir.halves_block import Narrow, single
from ..ir.integers import Coded, Integers
from ..ir.layouts import PageLayout, Part
from ..ir.maps import apply
from ..ir.plan import AttentionPlan, StreamPlan
from ..ir.tolerance import score_rounding
from .memory import HOST, Memory
from .stream import Floats, Ints, New, Pair, Span, Steps, Stream, update_in_turn

Array = NDArray[Any]


class Kernels:
    """Implements `stream.Kernels`. Streams to read may be anywhere; those to write are on the host.

    Args:
        plans: one per layer.
        constants: one mapping per layer, arrays by the names that the plan's maps use.
    """

    memory: Memory = HOST

    def __init__(
        self, plans: Sequence[AttentionPlan], constants: Sequence[Mapping[str, Array]]
    ) -> None:
        self._plans = tuple(plans)
        self._constants = tuple(constants)

    def layouts(self, layer: int) -> tuple[PageLayout, PageLayout]:
        """Return the plan's own layouts; streams of other targets are read as they are."""
        plan = self._plans[layer]
        return plan.k.page_layout(), plan.v.page_layout()

    def update(self, layer: int, streams: Pair, new: New | None, due: tuple[Span, Span]) -> None:
        """Store and encode; see `stream.Kernels`."""
        update_in_turn(self, layer, streams, new, due)

    def append(self, layer: int, stream: Stream, x: Floats, first: Ints, count: Ints) -> None:
        """Map and store new tokens as they came."""
        tokens = [x[row, :, first[row] : first[row] + count[row]] for row in range(len(x))]
        mapped = []
        for row, part in enumerate(tokens):
            try:
                mapped.append(_as_stored(stream.plan, part, self._constants[layer]))
            except KvantError as error:
                raise _non_finite(layer, stream, row) from error
        for row, part in enumerate(mapped):
            _store(stream, row, part)

    def steps(self, layer: int, streams: Pair) -> Steps | None:
        """Return None: nothing is faster here than `update`."""
        return None

    def encode(self, layer: int, stream: Stream, begin: Ints, end: Ints) -> None:
        """Encode positions [begin, end) of the tail."""
        layout, rest = stream.layout, stream.plan.tokens.rest
        for row in range(len(begin)):
            at, stop = int(begin[row]), int(end[row])
            while at < stop:
                page, inside = divmod(at - stream.sinks, layout.tokens)
                part = min(stop, at - inside + layout.tokens)
                slot = at - int(stream.tail_first[row])
                x = stream.tail[row, :, slot : slot + part - at]
                target = stream.pages[stream.table[row, page]]
                layout.write(target, inside, rest.encode(x.astype(np.float64)))
                at = part

    def attend(self, layer: int, q: Floats, k: Stream, v: Stream) -> tuple[Floats, Floats]:
        """Return output and log-sum-exp; see `stream.Kernels`."""
        out, lse = self.attend_in(np.float64, layer, q, k, v)
        return out.astype(np.float32), lse.astype(np.float32)

    def check(self, streams: Sequence[Stream]) -> None:
        """Do nothing: append and encode refuse at once."""

    def attend_in(
        self, dtype: type[np.floating[Any]], layer: int, q: Floats, k: Stream, v: Stream
    ) -> tuple[Array, Array]:
        """Return output and log-sum-exp with all sums in `dtype`, not rounded afterwards."""
        return self.attend_and_slack(dtype, layer, q, k, v)[:2]

    def attend_and_slack(
        self, dtype: type[np.floating[Any]], layer: int, q: Floats, k: Stream, v: Stream
    ) -> tuple[Array, Array, float]:
        """Return output, log-sum-exp, and what ties of rounded probabilities may change of outputs.

        One query over streams in quads is computed as `ir/integers.py` says, over streams in tiles
        as `ir/halves.py` says; several on a device as `ir/halves_block.py` says.
        """
        plan = self._plans[layer]
        rounding = rounding_of(plan, k, v, q.shape[2])
        if rounding is not None:
            rounding.near = 4 * score_rounding(self.queries(layer, q), read_stream(k), plan.scale)
        out, lse = attend(
            self.queries(layer, q),
            read_stream(k),
            read_stream(v),
            lengths=k.length,
            scale=plan.scale,
            softcap=plan.softcap,
            window=plan.window,
            sinks=None if plan.sinks is None else self._constants[layer][plan.sinks],
            dtype=dtype,
            products=rounding or EXACT,
        )
        # A map of outputs is at most a sum of all channels.
        spread = 1.0 if not plan.out_maps else float(plan.v.channels)
        slack = 0.0 if rounding is None else spread * float(rounding.slack.max(initial=0.0))
        return apply(plan.out_maps, out, self._constants[layer], plan.group), lse, slack

    def queries(self, layer: int, q: Floats) -> Array:
        """Return q as attend reads it: after the maps, rounded if the plan says so; float64."""
        plan = self._plans[layer]
        queries = apply(plan.q_maps, q, self._constants[layer], plan.group)
        return queries if plan.query_bits is None else round_queries(queries, plan.query_bits)


def rounding_of(
    plan: AttentionPlan, k: Stream, v: Stream, queries: int = 1
) -> Integers | Halves | Narrow | None:
    """Return the arithmetic of queries over two streams, or None where nothing is rounded."""
    if queries > 1:
        is_narrow = plan.compute == "int" and k.memory is not HOST
        return Narrow(_singles(k), _singles(v)) if is_narrow else None
    if k.layout.kind == TILES and v.layout.kind in (TILES, TURNED):
        rows = range(len(k.length))
        k_units, v_units = ([_units(stream, row) for row in rows] for stream in (k, v))
        return Halves(k_units, v_units, whole_tiles_of(plan, k, v))
    k_coded, v_coded = (_coded(stream) for stream in (k, v))
    if not any([*k_coded, *v_coded]):
        return None
    return Integers(k_coded, v_coded)


def whole_tiles_of(plan: AttentionPlan, k: Stream, v: Stream) -> list[tuple[int, int]]:
    """Return the positions of each row that lie in whole tiles, for its newest query."""
    bounds = whole_tiles(k.length, np.minimum(k.encoded, v.encoded), k.sinks, plan.window)
    return list(zip(*(edge.tolist() for edge in bounds), strict=True))


def _units(stream: Stream, row: int) -> list[Units]:
    """Return the codes that a row's pages hold, slice by slice."""
    first, count = int(stream.held[row]), int(stream.encoded[row] - stream.held[row])
    return [
        replace(
            units_of(dense, fields, first, slice(part.first, part.first + part.width)),
            entries=_entries(part, fields, count),
        )
        for part, dense, fields in _stored_parts(stream, row)
    ]


def _entries(part: Part, fields: Mapping[str, Array], count: int) -> Array | None:
    """Return the sparse entries of a part's first tokens where they are, f64[H, N, C], if any."""
    if part.sparse is None:
        return None
    entries = np.zeros(fields["codes"].shape)
    own = {name: fields[name][:, :count] for name in ("index", "value")}
    part.sparse.add(entries[:, :count], own)
    return entries


def _singles(stream: Stream) -> list[Array]:
    """Return what is stored of each row as kernels decode it, f32[H, length, D]."""
    x, found = read_stream(stream).astype(np.float32), []
    for row, own in enumerate(x):
        length = int(stream.length[row])
        begin, end = (min(length, int(at[row])) for at in (stream.held, stream.encoded))
        for part, dense, fields in _stored_parts(stream, row):
            decoded = single(dense, fields)[:, : end - begin]
            if part.sparse is not None:
                entries = {name: fields[name][:, : end - begin] for name in ("index", "value")}
                part.sparse.add(decoded, entries)
            own[:, begin:end, part.first : part.first + part.width] = decoded
        found.append(own[:, :length])
    return found


def _coded(stream: Stream) -> list[list[Coded]]:
    """Return the scales of each row's pages, none for what no integer dot product reads."""
    if stream.layout.kind == ROWS:
        return [[] for _ in stream.held]
    return [
        [_coded_part(stream, row, *one) for one in _stored_parts(stream, row)]
        for row in range(len(stream.held))
    ]


def _coded_part(
    stream: Stream, row: int, part: Part, dense: Dense, fields: Mapping[str, Array]
) -> Coded:
    """Return the scales of a slice, or of all channels; what it says if more is stored."""
    begin, end = int(stream.held[row]), int(stream.encoded[row])
    scale = dense.scales(fields)[:, : -(-(end - begin) // dense.group_tokens)]
    if not part.prefix and part.sparse is None:
        return Coded(begin, dense, scale)
    channels = slice(part.first, part.first + part.width)
    return Coded(begin, dense, scale, dense.decode(fields), channels)


def _stored_parts(stream: Stream, row: int) -> list[tuple[Part, Dense, dict[str, Array]]]:
    """Return each slice with codes, its dense format, and the fields of all pages of a row."""
    begin, end = int(stream.held[row]), int(stream.encoded[row])
    if end <= begin:
        return []
    pages = [stream.layout.unpack(page) for page in _pages_of(stream, row, begin, end)]
    whole = {name: np.concatenate([page[name] for page in pages], axis=1) for name in pages[0]}
    return [
        (part, part.format, with_prefix(part.prefix, whole))
        for part in stream.layout.parts
        if isinstance(part.format, Dense)
    ]


def read_stream(stream: Stream) -> Array:
    """Return what is stored, decoded, in the stream's own basis.

    Returns: float64[B, H, max(length), D], zeros past each row's length and where a window gave
        tokens back.
    """
    batch, heads, _, channels = stream.tail.shape
    sink, tail = stream.memory.fetch(stream.sink), stream.memory.fetch(stream.tail)
    x = np.zeros((batch, heads, int(stream.length.max(initial=0)), channels))
    for row in range(batch):
        length = int(stream.length[row])
        encoded = min(length, int(stream.encoded[row]))
        raw = min(length, stream.sinks)
        x[row, :, :raw] = sink[row, :, :raw]
        held = min(length, int(stream.held[row]))
        x[row, :, held:encoded] = _read_pages(stream, row, held, encoded)
        slot = encoded - int(stream.tail_first[row])
        if length > encoded:
            x[row, :, encoded:length] = tail[row, :, slot : slot + length - encoded]
    return x


def _read_pages(stream: Stream, row: int, begin: int, end: int) -> Array:
    """Return the tokens [begin, end) of a row, [H, end - begin, D]; a page begins at `begin`."""
    layout = stream.layout
    whole, rest = divmod(end - begin, layout.tokens)
    decode = stream.plan.tokens.rest.decode
    pages = _pages_of(stream, row, begin, end)
    x = np.moveaxis(decode(layout.unpack(pages[:whole])), 0, 1)
    parts = [x.reshape(layout.heads, whole * layout.tokens, layout.channels)]
    if rest:
        parts.append(decode(layout.read(pages[whole], 0, rest)))
    return np.concatenate(parts, axis=1)


def _pages_of(stream: Stream, row: int, begin: int, end: int) -> Array:
    """Return the pages, on the host, of the tokens [begin, end) of a row; a page begins there."""
    first, last = ((at - stream.sinks) for at in (begin, end))
    size = stream.layout.tokens
    indices = stream.table[row, first // size : -(-last // size)]
    return np.asarray(stream.memory.fetch(stream.memory.rows(stream.pages, indices)))


def _as_stored(plan: StreamPlan, x: Array, constants: Mapping[str, Array]) -> Array:
    """Return x [H, n, D] after the maps, with the precision of the plan's raw type."""
    with np.errstate(over="ignore", invalid="ignore"):
        mapped = apply(plan.maps, x, constants)
    return plan.tokens.as_raw(mapped)


def _store(stream: Stream, row: int, x: Array) -> None:
    """Put x [H, n, D] at positions length, length + 1, ... of sink and tail."""
    begin = int(stream.length[row])
    to_sink = min(max(0, stream.sinks - begin), x.shape[1])
    stream.sink[row, :, begin : begin + to_sink] = x[:, :to_sink]
    slot = begin + to_sink - int(stream.tail_first[row])
    rest = x.shape[1] - to_sink
    if rest:
        stream.tail[row, :, slot : slot + rest] = x[:, to_sink:]


def _non_finite(layer: int, stream: Stream, row: int) -> KvantError:
    role, raw = stream.plan.role, stream.plan.tokens.raw.dtype
    return KvantError(
        "non-finite",
        f"{role} is NaN or infinite in {raw} after its maps, row {row}",
        where=f"layer {layer}, append",
        fix="find out why the model gave such values; nothing was stored",
    )
