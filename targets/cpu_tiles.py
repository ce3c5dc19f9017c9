"""Pages in quads decoded to f32 once for many query rows; a lane takes its four codes one by one.

keys     tile_values[channel, token], so that scores of neighbouring tokens are one vector
values   tile_values[token, channel], as raw tokens lie
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..ir.arrangements import QUAD
from ..ir.encodings import Drop
from ..ir.layouts import PageLayout
from ..ir.planes import code_bits
from .cpu_pages import PageReader
from .cpu_quads import lanes_of, value_lanes
from .cpu_rows import Rows
from .cpu_text import Kernel, at, bits_as, fma, number, splat
from .machines import Cpu

# Vectors of tokens at once in scores of a tile; with four rows they are eight sums.
SIDE = 2

Words = Callable[[str, int], str]


def write_key_tile(kernel: Kernel, reader: PageReader, cpu: Cpu) -> None:
    """Decode the first k_t1 tokens of the present page, in whole vectors."""
    lanes, tokens = lanes_of(cpu), reader.layout.tokens
    with kernel.block(f"for v in T.serial(T.truncdiv(k_t1 + {lanes - 1}, T.int64({lanes})))"):
        kernel.let("t", f"v * {lanes}")
        if reader.per_channel:
            kernel.let("tg", f"T.truncdiv(t, T.int64({reader.format.group_tokens}))")
        with kernel.block(f"for w in T.serial(T.int64({reader.plane // QUAD}))"):
            bytes_of = _words(reader, "t", f"w * {QUAD}", lanes)
            for i in range(reader.planes):
                for k in range(QUAD):
                    own = f"({i * reader.plane + k} + w * {QUAD})"
                    if reader.per_channel:
                        params = _params(kernel, reader, "tg", own, 1, lanes)
                    else:
                        params = _params(kernel, reader, "t", _group(reader, own), lanes, lanes)
                    value = fma(_code(reader, bytes_of, i, k, lanes), *params)
                    target = f"({reader.channel(own)}) * {tokens} + t"
                    kernel.line(f"{at('tile_values', target, lanes)} = {value}")
    write_tile_entries(kernel, reader, "T.int64(0)", f"channel * {tokens} + t")


def write_value_tile(kernel: Kernel, reader: PageReader, cpu: Cpu) -> None:
    """Decode the tokens [v_t0, v_t1) of the present page, in whole quads."""
    lanes, channels = value_lanes(reader.coded(), reader.width, cpu), reader.layout.channels
    first = kernel.fresh("quad", "T.shift_right(v_t0, T.int64(2))")
    last = kernel.fresh("quad", f"T.max({first}, T.shift_right(v_t1 + 3, T.int64(2)))")
    with (
        kernel.block(f"for quad in T.serial({first}, {last})"),
        kernel.block(f"for u in T.serial(T.int64({reader.plane // lanes}))"),
    ):
        bytes_of = _words(reader, f"(quad * {QUAD})", f"u * {lanes}", lanes)
        for i in range(reader.planes):
            for k in range(QUAD):
                t, channel = f"(quad * {QUAD} + {k})", f"({i * reader.plane} + u * {lanes})"
                if reader.per_channel:
                    row = f"T.truncdiv({t}, T.int64({reader.format.group_tokens}))"
                    params = _params(kernel, reader, row, channel, lanes, lanes)
                else:
                    params = _params(kernel, reader, t, _group(reader, channel), 1, lanes)
                value = fma(_code(reader, bytes_of, i, k, lanes), *params)
                target = f"{t} * {channels} + {reader.channel(channel)}"
                kernel.line(f"{at('tile_values', target, lanes)} = {value}")
    write_tile_entries(kernel, reader, "v_t0", f"t * {channels} + channel")


def write_dropped_keys(kernel: Kernel, layout: PageLayout) -> None:
    """Write zeros for the channels of keys that are not stored."""
    for part in (part for part in layout.parts if isinstance(part.format, Drop)):
        with kernel.block(f"for j in T.serial(T.int64({part.width * layout.tokens // 8}))"):
            target = at("tile_values", f"{part.first * layout.tokens} + j * 8", 8)
            kernel.line(f"{target} = {number(0.0, 8)}")


def write_dropped_values(kernel: Kernel, layout: PageLayout, tokens: str) -> None:
    """Write zeros for the channels of values that are not stored, in a loop over t."""
    for part in (part for part in layout.parts if isinstance(part.format, Drop)):
        with kernel.block(tokens), kernel.block(f"for j in T.unroll({part.width // 8})"):
            target = at("tile_values", f"t * {layout.channels} + {part.first} + j * 8", 8)
            kernel.line(f"{target} = {number(0.0, 8)}")


def write_tile_scores(kernel: Kernel, reader: PageReader, rows: Rows, cpu: Cpu) -> None:
    """Write the scores of the decoded tokens for a block of rows, in whole vectors."""
    lanes, tokens, n = lanes_of(cpu), reader.layout.tokens, rows.count
    size = SIDE * lanes
    with kernel.block(f"for v in T.serial(T.truncdiv(k_t1 + {size - 1}, T.int64({size})))"):
        kernel.let("t", f"v * {size}")
        kernel.scratch("acc", n * size)
        with kernel.block(f"for i in T.unroll({n * SIDE})"):
            kernel.line(f"{at('acc', f'i * {lanes}', lanes)} = {number(0.0, lanes)}")
        with kernel.block(f"for c in T.serial(T.int64({rows.channels}))"):
            for j in range(SIDE):
                kernel.let(f"x{j}", at("tile_values", f"c * {tokens} + t + {j * lanes}", lanes))
            for r in range(n):
                query = splat(f"query[{rows.query(str(r), 'c')}]", lanes)
                for j in range(SIDE):
                    acc = at("acc", str((r * SIDE + j) * lanes), lanes)
                    kernel.line(f"{acc} = {fma(query, f'x{j}', acc)}")
        for r in range(n):
            for j in range(SIDE):
                target = at("logits", rows.logit(str(r), f"k_pos + t + {j * lanes}"), lanes)
                kernel.line(f"{target} = {at('acc', str((r * SIDE + j) * lanes), lanes)}")


def write_tile_entries(kernel: Kernel, reader: PageReader, first: str, place: str) -> None:
    """Add the sparse entries of tokens from `first` on to what was decoded."""
    target = f"tile_values[{place}]"
    add = partial(kernel.line, f"{target} = {target} + entry")
    reader.write_entries(kernel, first, f"{reader.role}_t1", add)


def _group(reader: PageReader, channel: str) -> str:
    return "0" if reader.groups == 1 else f"T.truncdiv({channel}, T.int64({reader.group}))"


def _params(
    kernel: Kernel, reader: PageReader, row: str, column: str, own: int, lanes: int
) -> tuple[str, str]:
    """Bind `own` neighbouring scales and zero points, one for all lanes or one for each."""
    scale = kernel.fresh("scale", reader.scale(row, column, own))
    zero = kernel.fresh("zero", reader.zero(row, column, own, scale))
    return (scale, zero) if own == lanes else (splat(scale, lanes), splat(zero, lanes))


def _words(reader: PageReader, row: str, column: str, lanes: int) -> Words:
    """Return (field, behind) -> its quads at a place, as 32-bit words."""

    def words(field: str, behind: int) -> str:
        place = f"{column} + {reader.plane}" if behind else column
        return bits_as("int32", reader.quads(field, row, place, lanes), lanes)

    return words


def _code(reader: PageReader, words: Words, i: int, k: int, lanes: int) -> str:
    """Return code k of the quads of plane i, f32."""
    bits = code_bits(reader.coded())
    if bits != 3:
        return reader.number(_field(words("codes", 0), 8 * k + (bits * i) % 8, bits, lanes), lanes)
    low = _field(words("codes", i % 2), 8 * k + i // 2 * 2, 2, lanes)
    high = _field(words("high", 0), 8 * k + i, 1, lanes)
    return reader.number(f"({low} + {high} * {splat('T.int32(4)', lanes)})", lanes)


def _field(words: str, shift: int, bits: int, lanes: int) -> str:
    moved = f"T.shift_right({words}, {splat(f'T.int32({shift})', lanes)})" if shift else words
    return f"T.bitwise_and({moved}, {splat(f'T.int32({2**bits - 1})', lanes)})"
