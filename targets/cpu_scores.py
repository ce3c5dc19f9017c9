"""Scores of float arithmetic: s[r, t] = <q_r, x^_t> for one block of query rows.

    one scale a token        <q, c> s + (sum q) z               after the dot, eight tokens at once
    several scales a token   sum_g <q, c>_g s_g + (sum q)_g z_g  after the dot of each group
    scales of channels       <q s, c> + <q, z>                   q s and <q, z> once for each group
    sparse entries           + q_c value                         after all of the part's scores

A dot is kept in 8 lanes of channels and summed over the lanes by a tree. A token past the end may
be computed where that stays inside its page; the caller overwrites or masks what it gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd

from ..ir.encodings import Raw
from .cpu_pages import PageReader
from .cpu_rows import Rows
from .cpu_text import Kernel, at, fma, horizontal, number, splat

# Tokens of one step by query rows: four to eight sums hide the latency of an fma.
TOKENS = {1: 8, 2: 4, 3: 2, 4: 2}


@dataclass(frozen=True, slots=True)
class Dot:
    """What is multiplied: texts of a value and of a query vector.

    Attributes:
        lanes: channels at once.
        channels: of a token.
        value: (token, channel) -> f32 vector.
        query: (row, channel) -> f32 vector.
        start: row -> f32 vector that the sum begins with.
        adds: whether the logits hold the scores of other channels already.
    """

    lanes: int
    channels: int
    value: Callable[[str, str], str]
    query: Callable[[str, str], str]
    start: Callable[[str], str]
    adds: bool = False


def write_dots(kernel: Kernel, rows: Rows, dot: Dot, t: str, tokens: int, position: str) -> None:
    """Write the dots of tokens t, t + 1, ... with every row, from logit `position` on."""
    n, lanes = rows.count, dot.lanes
    kernel.scratch("acc", n * tokens * lanes)
    with kernel.block(f"for r in T.unroll({n})"), kernel.block(f"for s in T.unroll({tokens})"):
        kernel.line(f"{at('acc', f'(r * {tokens} + s) * {lanes}', lanes)} = {dot.start('r')}")
    with (
        kernel.block(f"for j in T.unroll({dot.channels // lanes})"),
        kernel.block(f"for s in T.unroll({tokens})"),
    ):
        kernel.let("x", dot.value(f"{t} + s", f"j * {lanes}"))
        with kernel.block(f"for r in T.unroll({n})"):
            acc = at("acc", f"(r * {tokens} + s) * {lanes}", lanes)
            kernel.line(f"{acc} = {fma(dot.query('r', f'j * {lanes}'), 'x', acc)}")
    store_sums(kernel, rows, tokens, lanes, position, dot.adds)


def store_sums(
    kernel: Kernel, rows: Rows, tokens: int, lanes: int, position: str, adds: bool = False
) -> None:
    """Sum the lanes of `acc` (row by row, then token by token); store the sums, or add them."""
    total = rows.count * tokens
    kernel.scratch("sums", -(-total // 4) * 4)
    horizontal(kernel, [("acc", str(i * lanes)) for i in range(total)], lanes, "sums")
    step = gcd(tokens, 4)
    for r in range(rows.count):
        for s in range(0, tokens, step):
            target = at("logits", rows.logit(str(r), f"{position} + {s}"), step)
            sums = at("sums", str(r * tokens + s), step)
            kernel.line(f"{target} = {target} + {sums}" if adds else f"{target} = {sums}")


def write_raw_scores(
    kernel: Kernel, rows: Rows, buffer: str, base: str, first: str, last: str
) -> None:
    """Write the scores of raw f32 keys at positions [first, last), never reading another."""
    lanes = gcd(8, rows.channels)
    dot = Dot(
        lanes,
        rows.channels,
        lambda t, c: at(buffer, f"{base} + ({t}) * {rows.channels} + {c}", lanes),
        lambda r, c: at("query", rows.query(r, c), lanes),
        lambda r: number(0.0, lanes),
    )
    tokens = TOKENS.get(rows.count, 1)
    begin = kernel.fresh("first", first)
    count = kernel.fresh("count", f"T.max({last} - {begin}, T.int64(0))")
    whole = kernel.fresh("whole", f"T.truncdiv({count}, T.int64({tokens}))")
    with kernel.block(f"for step in T.serial({whole})"):
        kernel.let("t", f"{begin} + step * {tokens}")
        write_dots(kernel, rows, dot, "t", tokens, "t")
    if tokens > 1:
        with kernel.block(f"for rest in T.serial({count} - {whole} * {tokens})"):
            kernel.let("t", f"{begin} + {whole} * {tokens} + rest")
            write_dots(kernel, rows, dot, "t", 1, "t")


def score_scratch(kernel: Kernel, reader: PageReader, group: int, heads: int) -> None:
    """Declare and fill what the scores of one item of at most `heads` heads need for every page."""
    layout, lanes, own = reader.layout, reader.lanes, reader.own
    if isinstance(reader.format, Raw):
        return
    if reader.per_channel:
        kernel.scratch(own("query_scaled"), group * reader.width)
        kernel.scratch(own("query_zero"), group * lanes)
        return
    rows = group * heads
    # Sums of q by group, kept by lanes: their sum over the lanes is the group's.
    kernel.scratch(own("query_sums"), rows * reader.groups * lanes)
    with kernel.block(f"for g in T.serial(item_rows * {reader.groups})"):
        target = at(own("query_sums"), f"g * {lanes}", lanes)
        kernel.line(f"{target} = {number(0.0, lanes)}")
        begin = f"item_row * {layout.channels}"
        with kernel.block(f"for j in T.serial({reader.group // lanes})"):
            part = at("query", f"{begin} + {_group_start(reader)} + j * {lanes}", lanes)
            kernel.line(f"{target} = {target} + {part}")
    if reader.one_scale:
        kernel.scratch("query_sum", rows)
        with kernel.block("for r in T.serial(item_rows)"):
            terms = [f"query_sums[r * {lanes} + {i}]" for i in range(lanes)]
            kernel.line(f"query_sum[r] = {' + '.join(terms)}")
        return
    kernel.scratch(own("k_scales"), layout.tokens * reader.groups)
    kernel.scratch(own("k_zeros"), layout.tokens * reader.groups)


def _group_start(reader: PageReader) -> str:
    """Return where group g begins in the queries; g counts the groups of all rows."""
    if reader.alone:
        return f"g * {reader.group}"
    row, group = (f"T.trunc{way}(g, T.int64({reader.groups}))" for way in ("div", "mod"))
    return reader.channel(f"{row} * {reader.layout.channels} + {group} * {reader.group}")


def write_page_scores(kernel: Kernel, reader: PageReader, rows: Rows) -> None:
    """Write the scores of the present page for a block of rows."""
    if reader.per_channel:
        _channel_scales(kernel, reader, rows)
    elif reader.one_scale:
        _one_scale(kernel, reader, rows)
    else:
        _group_scales(kernel, reader, rows)
    write_entry_scores(kernel, reader, rows)


def write_entry_scores(kernel: Kernel, reader: PageReader, rows: Rows) -> None:
    """Add the sparse entries of the present page, if any, to the scores of a block of rows."""

    def add() -> None:
        with kernel.block(f"for r in T.unroll({rows.count})"):
            logit, query = rows.logit("r", "k_pos + t"), rows.query("r", "channel")
            score = fma(f"query[{query}]", "entry", f"logits[{logit}]")
            kernel.line(f"logits[{logit}] = {score}")

    reader.write_entries(kernel, "T.int64(0)", "k_t1", add)


def _plain(reader: PageReader, rows: Rows) -> Dot:
    lanes, plane = reader.lanes, reader.plane
    return Dot(
        lanes,
        reader.width,
        lambda t, c: reader.value(t, f"({c}) // {plane}", f"({c}) % {plane}"),
        lambda r, c: at("query", rows.query(r, reader.channel(c)), lanes),
        lambda r: number(0.0, lanes),
        reader.adds,
    )


def _one_scale(kernel: Kernel, reader: PageReader, rows: Rows) -> None:
    """Dots of the codes alone; then scale and zero, eight tokens at once."""
    tokens = TOKENS.get(rows.count, 1)
    with kernel.block(f"for step in T.serial(T.truncdiv(k_t1 + {tokens - 1}, T.int64({tokens})))"):
        kernel.let("t", f"step * {tokens}")
        write_dots(kernel, rows, _plain(reader, rows), "t", tokens, "k_pos + t")
    if not isinstance(reader.format, Raw):
        _scales_of_tokens(kernel, reader, rows)


def _scales_of_tokens(kernel: Kernel, reader: PageReader, rows: Rows) -> None:
    """Turn dots with codes into scores: dot s + (sum q) z, eight tokens at once."""
    with kernel.block("for eight in T.serial(T.shift_right(k_t1 + 7, T.int64(3)))"):
        kernel.let("scale", reader.scale("eight * 8", "0", 8))
        kernel.let("zero", reader.zero("eight * 8", "0", 8, "scale"))
        with kernel.block(f"for r in T.unroll({rows.count})"):
            logits = at("logits", rows.logit("r", "k_pos + eight * 8"), 8)
            row = rows.of_item("r")
            shift = f"{splat(f'query_sum[{row}]', 8)} * zero"
            kernel.line(f"{logits} = {fma(logits, 'scale', shift)}")


def write_page_params(kernel: Kernel, reader: PageReader) -> None:
    """Copy the scales and zeros of the present page to f32 scratch, token by token.

    Only for several scales a token: the others are read where they are used.
    """
    if reader.per_channel or reader.one_scale:
        return
    count = reader.layout.tokens * reader.groups
    lanes = gcd(8, reader.groups * reader.layout.tokens)
    with kernel.block(f"for i in T.serial(T.int64({count // lanes}))"):
        kernel.let("scale", reader.scale("0", f"i * {lanes}", lanes))
        kernel.line(f"{at(reader.own('k_scales'), f'i * {lanes}', lanes)} = scale")
        zero = reader.zero("0", f"i * {lanes}", lanes, "scale")
        kernel.line(f"{at(reader.own('k_zeros'), f'i * {lanes}', lanes)} = {zero}")


def _group_scales(kernel: Kernel, reader: PageReader, rows: Rows) -> None:
    """A dot for each group of channels: acc = sum_g part_g s_g + (sum q)_g z_g."""
    tokens, dot = TOKENS.get(rows.count, 1), _plain(reader, rows)
    n, lanes, groups, own = rows.count, reader.lanes, reader.groups, reader.own
    with kernel.block(f"for step in T.serial(T.truncdiv(k_t1 + {tokens - 1}, T.int64({tokens})))"):
        kernel.let("t", f"step * {tokens}")
        kernel.scratch("acc", n * tokens * lanes)
        kernel.scratch("part", n * lanes)
        with kernel.block(f"for i in T.unroll({n * tokens})"):
            kernel.line(f"{at('acc', f'i * {lanes}', lanes)} = {number(0.0, lanes)}")
        with kernel.block(f"for s in T.unroll({tokens})"):
            for g in range(groups):
                _write_part(kernel, rows, dot, g * reader.group, reader.group)
                with kernel.block(f"for r in T.unroll({n})"):
                    acc = at("acc", f"(r * {tokens} + s) * {lanes}", lanes)
                    scale = splat(f"{own('k_scales')}[(t + s) * {groups} + {g}]", lanes)
                    zero = splat(f"{own('k_zeros')}[(t + s) * {groups} + {g}]", lanes)
                    place = f"({rows.of_item('r')} * {groups} + {g}) * {lanes}"
                    sums = at(own("query_sums"), place, lanes)
                    part = at("part", f"r * {lanes}", lanes)
                    kernel.line(f"{acc} = {fma(part, scale, fma(sums, zero, acc))}")
        store_sums(kernel, rows, tokens, lanes, "k_pos + t", dot.adds)


def _write_part(kernel: Kernel, rows: Rows, dot: Dot, first: int, width: int) -> None:
    """Write `part`, the dots of token t + s with every row over some channels, by lanes."""
    with kernel.block(f"for r in T.unroll({rows.count})"):
        part = at("part", f"r * {dot.lanes}", dot.lanes)
        kernel.line(f"{part} = {number(0.0, dot.lanes)}")
    with kernel.block(f"for j in T.unroll({width // dot.lanes})"):
        channel = f"{first} + j * {dot.lanes}"
        kernel.let("x", dot.value("t + s", channel))
        with kernel.block(f"for r in T.unroll({rows.count})"):
            part = at("part", f"r * {dot.lanes}", dot.lanes)
            kernel.line(f"{part} = {fma(dot.query('r', channel), 'x', part)}")


def _channel_scales(kernel: Kernel, reader: PageReader, rows: Rows) -> None:
    """For each group of tokens: q times the scales, and <q, zero>; then dots of the codes."""
    size = reader.format.group_tokens
    lanes, plane, width, own = reader.lanes, reader.plane, reader.width, reader.own
    tokens = gcd(TOKENS.get(rows.count, 1), size)
    whole = f"T.truncdiv(k_t1 + {size - 1}, T.int64({size}))"
    with kernel.block(f"for g in T.serial({whole})"):
        _scale_queries(kernel, reader, rows)
        dot = Dot(
            lanes,
            width,
            lambda t, c: reader.value(t, f"({c}) // {plane}", f"({c}) % {plane}"),
            lambda r, c: at(own("query_scaled"), f"({rows.first} + {r}) * {width} + {c}", lanes),
            lambda r: at(own("query_zero"), f"({rows.first} + {r}) * {lanes}", lanes),
            reader.adds,
        )
        count = f"T.min(k_t1 - g * {size}, T.int64({size}))"
        steps = f"T.truncdiv({count} + {tokens - 1}, T.int64({tokens}))"
        with kernel.block(f"for step in T.serial({steps})"):
            kernel.let("t", f"g * {size} + step * {tokens}")
            write_dots(kernel, rows, dot, "t", tokens, "k_pos + t")


def _scale_queries(kernel: Kernel, reader: PageReader, rows: Rows) -> None:
    """Fill query_scaled and query_zero for token group g."""
    lanes, width, own = reader.lanes, reader.width, reader.own
    with kernel.block(f"for r in T.unroll({rows.count})"):
        target = at(own("query_zero"), f"({rows.first} + r) * {lanes}", lanes)
        kernel.line(f"{target} = {number(0.0, lanes)}")
    with kernel.block(f"for j in T.serial({width // lanes})"):
        kernel.let("scale", reader.scale("g", f"j * {lanes}", lanes))
        kernel.let("zero", reader.zero("g", f"j * {lanes}", lanes, "scale"))
        with kernel.block(f"for r in T.unroll({rows.count})"):
            query = at("query", rows.query("r", reader.channel(f"j * {lanes}")), lanes)
            scaled = at(own("query_scaled"), f"({rows.first} + r) * {width} + j * {lanes}", lanes)
            target = at(own("query_zero"), f"({rows.first} + r) * {lanes}", lanes)
            kernel.line(f"{scaled} = {query} * scale")
            kernel.line(f"{target} = {fma(query, 'zero', target)}")
