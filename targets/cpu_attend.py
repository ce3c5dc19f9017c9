"""The kernels attend (one query a row) and attend_block (tiles of eight queries).

A work item of attend is (row b, split, KV heads [h0, h1)), one of attend_block (row b, KV head h,
split, tile of queries). Inside an item:

    scores    logits[r, position] from sink, pages and tail of K
    softmax   p = exp(s - max), kept in place; max and sum of the split
    values    part_out[r, c] = sum p v from sink, pages and tail of V

Scores and values go page by page, heads innermost, and what heads keep meanwhile lies in scratch.
How many of them an item takes is the caller's choice and changes no bit. The G query heads of a KV
head share each unpacked code. attend_block decodes a page to f32 once for all its rows, so it has
no arithmetic of its own for each format. Rows of `query` are ordered
[B, H, T, G], padded to whole tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from math import gcd

from ..ir.arrangements import CHANNEL_QUADS, ROWS, TOKEN_QUADS
from ..ir.encodings import Raw
from ..ir.plan import AttentionPlan
from .cpu_math import NEGATIVE
from .cpu_pages import PageReader, Readers
from .cpu_quads import integer_queries, lanes_of, layouts
from .cpu_regions import (
    asks_ahead,
    stream_arguments,
    write_first_asks,
    write_regions,
    write_split,
)
from .cpu_rows import PAD, Rows, blocks, item_heads, row_stride
from .cpu_scores import (
    score_scratch,
    write_entry_scores,
    write_page_params,
    write_page_scores,
    write_raw_scores,
)
from .cpu_scores_int import (
    key_dots,
    score_scratch_int,
    write_page_queries_int,
    write_page_scores_int,
)
from .cpu_softmax import Softmax, write_softmax
from .cpu_text import Kernel, at, fma, number, splat
from .cpu_tiles import (
    write_dropped_keys,
    write_dropped_values,
    write_key_tile,
    write_tile_entries,
    write_tile_scores,
    write_value_tile,
)
from .cpu_values import (
    value_scratch,
    write_entry_values,
    write_page_values,
    write_raw_values,
)
from .cpu_values_int import write_page_values_int
from .cpu_weights_int import (
    value_dots,
    value_scratch_int,
    write_page_steps_int,
    write_page_weights_int,
    write_value_zeros,
)
from .machines import Cpu

# Queries of one item of attend_block.
TILE_QUERIES = 8
MOST_SCORE_ROWS = 8
MOST_VALUE_ROWS = 4
SOFTMAX_ROWS = 4
BLOCK_ROWS = 4

RawWriter = Callable[[Kernel, Rows, str, str, str, str], None]
PageWriter = Callable[[Kernel, PageReader, Rows], None]


def attend(plan: AttentionPlan, cpu: Cpu) -> Kernel:
    """Return the kernel for one query a row."""
    kernel, group, heads = Kernel("attend"), plan.group, plan.k.heads
    readers = _arguments(kernel, plan, decode=True)
    for name in ("batch", "splits", "chunks"):
        kernel.scalar(name)
    with kernel.block("for item in T.parallel(batch * splits * chunks)"):
        kernel.let("chunk", "T.truncmod(item, chunks)")
        kernel.let("bs", "T.truncdiv(item, chunks)")
        kernel.let("split", "T.truncmod(bs, splits)")
        kernel.let("b", "T.truncdiv(bs, splits)")
        kernel.let("h0", f"T.truncdiv(chunk * {heads}, chunks)")
        kernel.let("h1", f"T.truncdiv((chunk + 1) * {heads}, chunks)")
        write_split(kernel, plan)
        kernel.let("item_row", f"(b * {heads} + h0) * {group}")
        kernel.let("item_part", f"(bs * {heads} + h0) * {group}")
        kernel.let("item_rows", f"(h1 - h0) * {group}")
        first = "lo" if plan.window is None else f"T.max(lo, length - {plan.window})"
        kernel.let("see0", first)
        kernel.let("see1", "hi")
        with kernel.block("if see1 > see0"):
            _write_decode(kernel, plan, cpu, *readers)
        _write_empty(kernel, "item_part", "item_rows")
    return kernel


@contextmanager
def _heads(kernel: Kernel, plan: AttentionPlan) -> Iterator[None]:
    """Write a loop over the heads of the item, with where the rows of each one begin."""
    with kernel.block("for h in T.serial(h0, h1)"):
        kernel.let("head_row", f"(h - h0) * {plan.group}")
        kernel.let("q_base", f"(item_row + head_row) * {plan.k.channels}")
        kernel.let("o_base", f"(item_part + head_row) * {plan.v.channels}")
        kernel.let("logit_base", f"head_row * {row_stride(plan)} + {PAD} - lo")
        yield


def _write_decode(
    kernel: Kernel, plan: AttentionPlan, cpu: Cpu, k_readers: Readers, v_readers: Readers
) -> None:
    group = plan.group
    kernel.scratch("logits", item_heads(plan) * group * row_stride(plan))
    kernel.note("scores")
    k_rows = [_rows(plan, plan.k.channels, *block) for block in blocks(group, MOST_SCORE_ROWS)]
    k_page, k_before = _key_pages(kernel, k_readers, plan, cpu)
    _each(kernel, plan, "k", k_readers, k_rows, write_raw_scores, k_page, k_before)
    kernel.note("softmax; what comes next is asked for before it")
    if asks_ahead(v_readers):
        write_first_asks(kernel, v_readers, plan.v.tokens.sink)
    write_softmax(kernel, _softmax(plan, "item_rows", cpu, alike=True), "see0", "see1", "item_part")
    kernel.note("values")
    _write_zero_outputs(kernel, plan, "item_part", "item_rows")
    v_rows = [_rows(plan, plan.v.channels, *block) for block in blocks(group, MOST_VALUE_ROWS)]
    v_page, v_before, v_end = _value_pages(kernel, v_readers, plan, cpu)
    _each(kernel, plan, "v", v_readers, v_rows, write_raw_values, v_page, v_before)
    v_end()


def _softmax(plan: AttentionPlan, rows: str, cpu: Cpu, *, alike: bool) -> Softmax:
    count, lanes = f'T.Cast("int32", {rows})', lanes_of(cpu)
    at_once, scalef = gcd(plan.group, SOFTMAX_ROWS), cpu.vector == 64
    return Softmax(count, at_once, row_stride(plan), plan.softcap, lanes, alike, scalef)


def _key_pages(
    kernel: Kernel, readers: Readers, plan: AttentionPlan, cpu: Cpu
) -> tuple[PageWriter, tuple[PageWriter, ...]]:
    """Declare what the scores of an item need.

    Returns: what writes those of a page, and what is done before for all heads of a page, one after
        another.
    """
    group, heads = plan.group, item_heads(plan)
    if readers[0].layout.kind == ROWS:
        for reader in readers:
            score_scratch(kernel, reader, group, heads)
        return write_page_scores, ()
    dots = [key_dots(reader, group, heads, cpu) for reader in readers]
    all_first = any(own.heads > 1 and own.reader.per_channel for own in dots)
    keys = {own.reader: replace(own, early=all_first) for own in dots}
    for own in keys.values():
        score_scratch_int(kernel, own)

    def write_scores(kernel: Kernel, reader: PageReader, rows: Rows) -> None:
        write_page_scores_int(kernel, keys[reader], rows)
        write_entry_scores(kernel, reader, rows)

    def write_queries(kernel: Kernel, reader: PageReader, rows: Rows) -> None:
        if reader.per_channel and keys[reader].heads > 1:
            write_page_queries_int(kernel, keys[reader], rows)

    return write_scores, (write_queries,) if all_first else ()


def _value_pages(
    kernel: Kernel, readers: Readers, plan: AttentionPlan, cpu: Cpu
) -> tuple[PageWriter, tuple[PageWriter, ...], Callable[[], None]]:
    """Declare what the values of an item need.

    Returns: what adds a page, what is done before for all heads of a page, what ends the last page.
    """
    if readers[0].layout.kind == ROWS:
        value_scratch(kernel, readers, plan.group)
        return write_page_values, (), lambda: None
    heads = item_heads(plan)
    dots = [value_dots(reader, plan.group, heads, cpu) for reader in readers]
    all_first = any(own.heads > 1 for own in dots)
    values = {own.reader: replace(own, early=all_first) for own in dots}
    for own in values.values():
        value_scratch_int(kernel, own, heads)

    def write_values(kernel: Kernel, reader: PageReader, rows: Rows) -> None:
        write_page_values_int(kernel, values[reader], rows)
        write_entry_values(kernel, reader, rows)

    def write_steps(kernel: Kernel, reader: PageReader, rows: Rows) -> None:
        if values[reader].heads > 1:
            write_page_steps_int(kernel, values[reader], rows)

    def write_weights(kernel: Kernel, reader: PageReader, rows: Rows) -> None:
        if values[reader].heads > 1:
            write_page_weights_int(kernel, values[reader], rows)

    def write_end() -> None:
        for own in values.values():
            write_value_zeros(kernel, own)

    before = (write_steps, write_weights) if any(own.apart for own in dots) else (write_weights,)
    return write_values, before if all_first else (), write_end


def _each(
    kernel: Kernel,
    plan: AttentionPlan,
    role: str,
    readers: Readers,
    rows: list[Rows],
    raw: RawWriter,
    page: PageWriter,
    before: tuple[PageWriter, ...] = (),
) -> None:
    """Walk a stream once and do every block of rows at each region.

    Args:
        kernel: where to write.
        plan: what is computed.
        role: of the stream.
        readers: of its pages.
        rows: the blocks of rows.
        raw: writes a raw region.
        page: writes a page of a head.
        before: the same before `page` begins, each for all heads of a page.
    """

    def on_raw(buffer: str, base: str, first: str, last: str) -> None:
        for block in rows:
            raw(kernel, block, buffer, base, first, last)

    def on_page() -> None:
        for reader in readers:
            if role == "k" and reader.layout.kind == ROWS:
                write_page_params(kernel, reader)
            for block in rows:
                page(kernel, reader, block)

    def on_before(write: PageWriter) -> None:
        for reader, block in product(readers, rows):
            write(kernel, reader, block)

    stream, heads = plan.k if role == "k" else plan.v, partial(_heads, kernel, plan)
    all_first = tuple(partial(on_before, write) for write in before)
    write_regions(kernel, readers, stream, on_raw, on_page, heads, all_first)


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
        part = f"((b * splits + split) * {plan.k.heads} + h) * rows + tile * {count}"
        kernel.let("part_base", part)
        kernel.let("p0", f"length - queries + tile * {TILE_QUERIES}")
        first = "lo" if plan.window is None else f"T.max(lo, p0 - {plan.window - 1})"
        kernel.let("see0", first)
        kernel.let("see1", f"T.min(hi, p0 + {TILE_QUERIES})")
        kernel.let("q_base", f"row_base * {plan.k.channels}")
        kernel.let("o_base", f"part_base * {plan.v.channels}")
        kernel.let("logit_base", f"{PAD} - lo")
        with kernel.block("if see1 > see0"):
            _write_tile(kernel, plan, cpu, *readers)
        _write_empty(kernel, "part_base", str(count))
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
    see1 = f"T.min(see1, {position} + 1)"
    softmax = _softmax(plan, str(count), cpu, alike=False)
    write_softmax(kernel, softmax, see0, see1, "part_base")
    kernel.note("values")
    _write_zero_outputs(kernel, plan, "part_base", str(count))
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
        if readers[0].layout.kind == CHANNEL_QUADS:
            write_dropped_keys(kernel, readers[0].layout)
            for reader in readers:
                write_key_tile(kernel, reader, cpu)
            with kernel.block(f"for rb in T.serial({plan.group * TILE_QUERIES // BLOCK_ROWS})"):
                write_tile_scores(kernel, readers[0], rows, cpu)
            return
        if readers[0].layout.kind == TOKEN_QUADS:
            tokens = "for t in T.serial(v_t0, T.max(v_t0, v_t1))"
            write_dropped_values(kernel, readers[0].layout, tokens)
            for reader in readers:
                write_value_tile(kernel, reader, cpu)
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
        write_tile_entries(kernel, reader, f"{role}_t0", f"t * {layout.channels} + channel")
    write_dropped_values(kernel, layout, tokens)


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


def _write_zero_outputs(kernel: Kernel, plan: AttentionPlan, part: str, rows: str) -> None:
    """Write zeros to `rows` rows of part_out from row `part` on."""
    width = plan.v.channels
    lanes = gcd(8, width)
    with kernel.block(f"for i in T.serial({rows} * T.int64({width // lanes}))"):
        target = at("part_out", f"{part} * {width} + i * {lanes}", lanes)
        kernel.line(f"{target} = {number(0.0, lanes)}")


def _write_empty(kernel: Kernel, part: str, rows: str) -> None:
    """Write the split of an item that sees no key: `rows` rows from row `part` on."""
    with kernel.block("else"), kernel.block(f"for r in T.serial({rows})"):
        kernel.line(f"part_max[{part} + r] = {NEGATIVE}")
        kernel.line(f"part_sum[{part} + r] = {number(0.0)}")
