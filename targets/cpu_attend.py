"""The kernels attend (one query a row) and attend_block (tiles of eight queries).

A work item is (row b, KV head h, split) and, in attend_block, a tile of queries. Inside an item:

    scores    logits[r, position] from sink, pages and tail of K
    softmax   p = exp(s - max), kept in place; max and sum of the split
    values    part_out[r, c] = sum p v from sink, pages and tail of V

The G query heads of a KV head share each unpacked code. attend_block decodes a page to f32 once for
all its rows, so it has no arithmetic of its own for each format. Rows of `query` are ordered
[B, H, T, G], padded to whole tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..ir.arrangements import CHANNEL_QUADS, ROWS, TOKEN_QUADS
from ..ir.encodings import Drop, Raw
from ..ir.plan import AttentionPlan
from .cpu_math import NEGATIVE
from .cpu_pages import PageReader, Readers
from .cpu_quads import integer_queries, layouts
from .cpu_regions import stream_arguments, write_ask, write_regions, write_split
from .cpu_rows import Rows, blocks, row_stride
from .cpu_scores import (
    score_scratch,
    write_page_params,
    write_page_scores,
    write_raw_scores,
)
from .cpu_scores_int import key_dots, score_scratch_int, write_page_scores_int
from .cpu_softmax import write_softmax
from .cpu_text import Kernel, at, fma, number, splat
from .cpu_tiles import write_key_tile, write_tile_scores, write_value_tile
from .cpu_values import value_scratch, write_page_values, write_raw_values
from .cpu_values_int import value_dots, value_scratch_int, write_page_values_int
from .machines import Cpu

# Queries of one item of attend_block.
TILE_QUERIES = 8
MOST_SCORE_ROWS = 8
MOST_VALUE_ROWS = 4
BLOCK_ROWS = 4

RawWriter = Callable[[Kernel, Rows, str, str, str, str], None]
PageWriter = Callable[[Kernel, PageReader, Rows], None]


def attend(plan: AttentionPlan, cpu: Cpu) -> Kernel:
    """Return the kernel for one query a row."""
    kernel, group = Kernel("attend"), plan.group
    readers = _arguments(kernel, plan, decode=True)
    kernel.scalar("batch")
    kernel.scalar("splits")
    with kernel.block(f"for item in T.parallel(batch * {plan.k.heads} * splits)"):
        # Heads are innermost: the blocks of all heads of a page are neighbours in memory.
        kernel.let("h", f"T.truncmod(item, T.int64({plan.k.heads}))")
        kernel.let("bs", f"T.truncdiv(item, T.int64({plan.k.heads}))")
        kernel.let("split", "T.truncmod(bs, splits)")
        kernel.let("b", "T.truncdiv(bs, splits)")
        kernel.let("bh", f"b * {plan.k.heads} + h")
        write_split(kernel, plan)
        kernel.let("row_base", f"bh * {group}")
        kernel.let("part_base", f"(bh * splits + split) * {group}")
        first = "lo" if plan.window is None else f"T.max(lo, length - {plan.window})"
        kernel.let("see0", first)
        kernel.let("see1", "hi")
        _write_bases(kernel, plan)
        with kernel.block("if see1 > see0"):
            _write_decode(kernel, plan, cpu, *readers)
        _write_empty(kernel, group)
    return kernel


def _write_decode(
    kernel: Kernel, plan: AttentionPlan, cpu: Cpu, k_readers: Readers, v_readers: Readers
) -> None:
    group = plan.group
    kernel.scratch("logits", group * row_stride(plan))
    kernel.note("scores")
    k_rows = [_rows(plan, plan.k.channels, *block) for block in blocks(group, MOST_SCORE_ROWS)]
    k_page = _key_pages(kernel, k_readers, group, cpu)
    _each(kernel, plan, "k", k_readers, k_rows, write_raw_scores, k_page)
    kernel.note("softmax; what comes next is asked for before it")
    if v_readers:
        write_ask(kernel, v_readers, plan.v.tokens.sink, "h")
    rows = _rows(plan, plan.v.channels, 0, group)
    write_softmax(kernel, rows, "see0", "see1", plan.softcap, "part_base")
    kernel.note("values")
    _write_zero_outputs(kernel, plan, group)
    v_rows = [_rows(plan, plan.v.channels, *block) for block in blocks(group, MOST_VALUE_ROWS)]
    v_page = _value_pages(kernel, v_readers, group, cpu)
    if k_readers:
        write_ask(
            kernel, k_readers, plan.k.tokens.sink, f"T.min(h + 1, T.int64({plan.k.heads - 1}))"
        )
    _each(kernel, plan, "v", v_readers, v_rows, write_raw_values, v_page)


def _key_pages(kernel: Kernel, readers: Readers, group: int, cpu: Cpu) -> PageWriter:
    """Declare what the scores of an item need, and return what writes those of a page."""
    if readers[0].layout.kind != ROWS:
        keys = key_dots(readers[0], group, cpu)
        score_scratch_int(kernel, keys)
        return lambda kernel, reader, rows: write_page_scores_int(kernel, keys, rows)
    for reader in readers:
        score_scratch(kernel, reader, group)
    return write_page_scores


def _value_pages(kernel: Kernel, readers: Readers, group: int, cpu: Cpu) -> PageWriter:
    """Declare what the values of an item need, and return what adds those of a page."""
    if readers and readers[0].layout.kind != ROWS:
        values = value_dots(readers[0], group, cpu)
        value_scratch_int(kernel, values)
        return lambda kernel, reader, rows: write_page_values_int(kernel, values, rows)
    value_scratch(kernel, readers, group)
    return write_page_values


def _each(
    kernel: Kernel,
    plan: AttentionPlan,
    role: str,
    readers: Readers,
    rows: list[Rows],
    raw: RawWriter,
    page: PageWriter,
) -> None:
    """Walk a stream once and do every block of rows at each region."""

    def on_raw(buffer: str, base: str, first: str, last: str) -> None:
        for block in rows:
            raw(kernel, block, buffer, base, first, last)

    def on_page() -> None:
        for reader in readers:
            if role == "k" and reader.layout.kind == ROWS:
                write_page_params(kernel, reader)
            for block in rows:
                page(kernel, reader, block)

    write_regions(kernel, readers, plan.k if role == "k" else plan.v, on_raw, on_page)


def attend_block(plan: AttentionPlan, cpu: Cpu) -> Kernel:
    """Return the kernel for several queries a row, causal between them."""
    kernel, count = Kernel("attend_block"), plan.group * TILE_QUERIES
    readers = _arguments(kernel, plan, decode=False)
    for name in ("batch", "splits", "rows", "tiles", "queries"):
        kernel.scalar(name)
    with kernel.block(f"for item in T.parallel(batch * {plan.k.heads} * tiles * splits)"):
        kernel.let("split", "T.truncmod(item, splits)")
        kernel.let("bht", "T.truncdiv(item, splits)")
        kernel.let("tile", "T.truncmod(bht, tiles)")
        kernel.let("bh", "T.truncdiv(bht, tiles)")
        kernel.let("h", f"T.truncmod(bh, T.int64({plan.k.heads}))")
        kernel.let("b", f"T.truncdiv(bh, T.int64({plan.k.heads}))")
        write_split(kernel, plan)
        kernel.let("row_base", f"bh * rows + tile * {count}")
        kernel.let("part_base", f"(bh * splits + split) * rows + tile * {count}")
        kernel.let("p0", f"length - queries + tile * {TILE_QUERIES}")
        first = "lo" if plan.window is None else f"T.max(lo, p0 - {plan.window - 1})"
        kernel.let("see0", first)
        kernel.let("see1", f"T.min(hi, p0 + {TILE_QUERIES})")
        _write_bases(kernel, plan)
        with kernel.block("if see1 > see0"):
            _write_tile(kernel, plan, cpu, *readers)
        _write_empty(kernel, count)
    return kernel


def _write_tile(
    kernel: Kernel, plan: AttentionPlan, cpu: Cpu, k_readers: Readers, v_readers: Readers
) -> None:
    count, group = plan.group * TILE_QUERIES, plan.group
    widest = max(plan.k.page_tokens * plan.k.channels, plan.v.page_tokens * plan.v.channels)
    kernel.scratch("logits", count * row_stride(plan))
    kernel.scratch("tile_values", widest)
    kernel.note("scores")
    _tiled(kernel, plan, cpu, "k", k_readers, write_raw_scores)
    kernel.note("softmax")
    position = f'(p0 + T.truncdiv(T.Cast("int64", r), T.int64({group})))'
    see0 = "see0" if plan.window is None else f"T.max(see0, {position} - {plan.window - 1})"
    rows = _rows(plan, plan.v.channels, 0, count)
    write_softmax(kernel, rows, see0, f"T.min(see1, {position} + 1)", plan.softcap, "part_base")
    kernel.note("values")
    _write_zero_outputs(kernel, plan, count)
    _tiled(kernel, plan, cpu, "v", v_readers, write_raw_values)


def _tiled(
    kernel: Kernel, plan: AttentionPlan, cpu: Cpu, role: str, readers: Readers, raw: RawWriter
) -> None:
    """Walk a stream; every page is decoded once, then all rows read it as raw tokens."""
    stream = plan.k if role == "k" else plan.v
    rows = _rows(plan, stream.channels, f"rb * {BLOCK_ROWS}", BLOCK_ROWS)

    def on_raw(buffer: str, base: str, first: str, last: str) -> None:
        with kernel.block(f"for rb in T.serial({plan.group * TILE_QUERIES // BLOCK_ROWS})"):
            raw(kernel, rows, buffer, base, first, last)

    def on_page() -> None:
        if readers and readers[0].layout.kind == CHANNEL_QUADS:
            write_key_tile(kernel, readers[0], cpu)
            with kernel.block(f"for rb in T.serial({plan.group * TILE_QUERIES // BLOCK_ROWS})"):
                write_tile_scores(kernel, readers[0], rows, cpu)
            return
        if readers and readers[0].layout.kind == TOKEN_QUADS:
            write_value_tile(kernel, readers[0], cpu)
        else:
            write_decode_page(kernel, readers)
        kernel.let("tile_base", f"T.int64(0) - {role}_pos * {stream.channels}")
        first, last = f"{role}_pos + {role}_t0", f"{role}_pos + {role}_t1"
        on_raw("tile_values", "tile_base", first, last)

    write_regions(kernel, readers, stream, on_raw, on_page)


def write_decode_page(kernel: Kernel, readers: Readers) -> None:
    """Write the values of the wanted tokens of the present page to tile_values, f32."""
    layout, role = readers[0].layout, readers[0].role
    tokens = f"for t in T.serial({role}_t0, T.max({role}_t0, {role}_t1))"
    for reader in readers:
        with kernel.block(tokens):
            _decode_token(kernel, reader)
        target = f"tile_values[t * {layout.channels} + channel]"
        add = partial(kernel.line, f"{target} = {target} + entry")
        reader.write_entries(kernel, f"{role}_t0", f"{role}_t1", add)
    for part in (part for part in layout.parts if isinstance(part.format, Drop)):
        with kernel.block(tokens), kernel.block(f"for j in T.unroll({part.width // 8})"):
            target = f"t * {layout.channels} + {part.first} + j * 8"
            kernel.line(f"{at('tile_values', target, 8)} = {number(0.0, 8)}")


def _decode_token(kernel: Kernel, reader: PageReader) -> None:
    """Write the values of token t in the channels of one reader."""
    lanes, plane, width = reader.lanes, reader.plane, reader.width
    channels, fmt = reader.layout.channels, reader.format
    if reader.per_channel:
        kernel.let("tg", f"T.truncdiv(t, T.int64({fmt.group_tokens}))")
    group = width if reader.per_channel else reader.group
    with kernel.block(f"for g in T.unroll({width // group})"):
        if not reader.per_channel and not isinstance(fmt, Raw):
            kernel.let("scale", reader.scale("t", "g", 1))
            kernel.let("zero", reader.zero("t", "g", 1, "scale"))
        with kernel.block(f"for j in T.unroll({group // lanes})"):
            c = f"g * {group} + j * {lanes}"
            kernel.let("x", reader.value("t", f"({c}) // {plane}", f"({c}) % {plane}"))
            target = at("tile_values", f"t * {channels} + {reader.channel(c)}", lanes)
            if isinstance(fmt, Raw):
                kernel.line(f"{target} = x")
            elif reader.per_channel:
                kernel.let("s", reader.scale("tg", c, lanes))
                kernel.line(f"{target} = {fma('x', 's', reader.zero('tg', c, lanes, 's'))}")
            else:
                scaled = fma("x", splat("scale", lanes), splat("zero", lanes))
                kernel.line(f"{target} = {scaled}")


def _arguments(kernel: Kernel, plan: AttentionPlan, *, decode: bool) -> tuple[Readers, Readers]:
    """Declare the arrays of an attend kernel; return the readers of K's and V's pages."""
    kernel.array("query", "float32")
    integers = integer_queries(plan)
    if decode and integers is not None:
        kernel.array("q_codes", integers)
        kernel.array("q_step", "float32")
    kernel.array("length_of", "int64")
    k, v = layouts(plan)
    readers = stream_arguments(kernel, plan.k, k), stream_arguments(kernel, plan.v, v)
    for name in ("part_out", "part_max", "part_sum"):
        kernel.array(name, "float32")
    return readers


def _rows(plan: AttentionPlan, channels: int, first: str | int, count: int) -> Rows:
    return Rows(str(first), count, channels, row_stride(plan))


def _write_bases(kernel: Kernel, plan: AttentionPlan) -> None:
    kernel.let("q_base", f"row_base * {plan.k.channels}")
    kernel.let("o_base", f"part_base * {plan.v.channels}")


def _write_zero_outputs(kernel: Kernel, plan: AttentionPlan, rows: int) -> None:
    width = plan.v.channels
    lanes = 8 if width * rows % 8 == 0 else 1
    with kernel.block(f"for i in T.serial({rows * width // lanes})"):
        kernel.line(f"{at('part_out', f'o_base + i * {lanes}', lanes)} = {number(0.0, lanes)}")


def _write_empty(kernel: Kernel, rows: int) -> None:
    """Write the split of an item that sees no key."""
    with kernel.block("else"), kernel.block(f"for r in T.serial({rows})"):
        kernel.line(f"part_max[part_base + r] = {NEGATIVE}")
        kernel.line(f"part_sum[part_base + r] = {number(0.0)}")
