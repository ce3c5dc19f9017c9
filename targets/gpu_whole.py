"""The kernel attend where pages are tiles: products of what they hold, as they hold it.

A split is some whole tiles of a row, as many as `write_tiles` says of its length alone, and
`gpu_rest.py` takes what is left of the row. Programs that a row has no tiles for do nothing. In
whole tiles nothing is masked, nothing is converted but to what matrix units take, and no scale
meets a code:

    keys        with scales of tokens, products with integers of q, exactly; scale and zero point
                go on the score. With scales of channels these go on q, in float16
    values      scale goes on the weight, in float16; zero points and middles are summed beside
    units       powers of two that unpacking leaves in a product are taken out once, at the end

The loop is pipelined: blocks of the next tiles are copied to shared memory behind the products.
"""

from __future__ import annotations

from ..ir.arrangements import TILES, TURNED
from ..ir.encodings import Bfp
from ..ir.halves import TILE
from ..ir.plan import AttentionPlan, StreamPlan
from .gpu_attend import declare, decode_rows, write_row
from .gpu_blocks import Block, blocks_of
from .gpu_entries import (
    entries_of,
    write_entry_factor,
    write_entry_values,
    write_places,
)
from .gpu_keys import write_queries, write_scores
from .gpu_lane_attend import declare_lanes, write_wide_split
from .gpu_lookups import Entries, EntriesApart, Held, Unpacker, words_of
from .gpu_pages import declare_pages
from .gpu_prepare import declare_codes
from .gpu_rest import write_rest
from .gpu_scales import in_words
from .gpu_sequences import Named, Times, Triples
from .gpu_text import LEAST_DOT, Dialect, Kernel
from .gpu_tiles import key_tokens, kinds
from .gpu_values import rows_of_sums, write_partials, write_sums, write_values, write_weights

MOST_REGISTERS = 255
WORD = 4
"""Bytes that a thread copies to shared memory at least."""
LEAST_TILES, MOST_SPLITS = 8, 128
"""Of a split and of a row, where no machine is known; see `splits.py`."""


def attend_tiles(plan: AttentionPlan, dialect: Dialect) -> Kernel:
    """Return the kernel attend of a plan whose pages are tiles: one query a row, all of its heads.

    Programs [0, splits) of a KV head take whole tiles; those behind take a part of the rest each
    (`gpu_rest.py`). Grid: (B H, parts).
    """
    # NOTE: left to itself, the assembler gives one warp 64 registers, and spills.
    is_wide = kinds(plan, dialect)[1] == TURNED
    warps = 1 if is_wide else warps_of(plan)
    kernel = Kernel("attend", warps=warps, registers=MOST_REGISTERS)
    rows = decode_rows(plan, dialect)
    k, v = key_blocks(plan, dialect), value_blocks(plan, dialect)
    declare(kernel, plan)
    if is_wide:
        declare_lanes(kernel, plan)
    else:
        _declare(kernel, plan, k, v)
    write_row(kernel, plan)
    write_bounds(kernel, plan)
    write_tiles(kernel)
    with kernel.block("if split < splits"):
        kernel.line("first = first_tile + split * tiles")
        kernel.line("last = tl.minimum(first_tile + split * tiles + tiles, last_tile)")
        with kernel.block("if first < last"):
            if is_wide:
                write_wide_split(kernel, plan)
            else:
                _write_split(kernel, plan, rows, k, v, dialect)
    with kernel.block("else"):
        write_rest(kernel, plan, rows, dialect)
    return kernel


def _write_split(
    kernel: Kernel,
    plan: AttentionPlan,
    rows: int,
    k: tuple[Block, ...],
    v: tuple[Block, ...],
    dialect: Dialect,
) -> None:
    """Attend to the whole tiles of one split."""
    kernel.line(f"row = tl.arange(0, {rows})")
    kernel.line(f"exists = row < {plan.group}")
    write_queries(kernel, plan, k)
    for block in (*k, *v):
        if isinstance(block.unpacker, Triples):
            block.write_factors(kernel, plan)
    if any(isinstance(x, Held) for x in sequences_of(plan, dialect)):
        kernel.line(f"first = {Held(()).name}(first)")
    write_entry_factor(kernel, plan, k)
    write_places(kernel, plan, v)
    kernel.note("sums: the largest score in powers of two, the denominator, the outputs")
    kernel.line(f'best = tl.full(({rows},), float("-inf"), tl.float32)')
    apart = rows_of_sums(kernel, v, dialect.period)
    kernel.line(f"total = tl.zeros(({apart}, {rows}), tl.float32)")
    write_sums(kernel, v, rows, apart)
    with kernel.block(f"for tile in tl.range(first, last, num_stages={dialect.stages})"):
        kernel.line(f"place = tile * {TILE}")
        kernel.note("keys")
        _write_place(kernel, plan.k)
        write_scores(kernel, plan, rows, k, dialect.period)
        kernel.note("values")
        _write_place(kernel, plan.v)
        write_weights(kernel, plan, v, rows, apart, floats=dialect.float_max)
        write_values(kernel, v)
        write_entry_values(kernel, v)
    write_partials(kernel, plan, v)


def key_blocks(plan: AttentionPlan, dialect: Dialect) -> tuple[Block, ...]:
    """Return the blocks of the keys: bytes where the products are exact in i8."""
    is_bytes = dialect.has_bytes and plan.query_bits is not None
    return _blocks(plan, plan.k, dialect, halves=not is_bytes)


def value_blocks(plan: AttentionPlan, dialect: Dialect) -> tuple[Block, ...]:
    """Return the blocks of the values."""
    return _blocks(plan, plan.v, dialect, halves=True)


def _blocks(
    plan: AttentionPlan, stream: StreamPlan, dialect: Dialect, *, halves: bool
) -> tuple[Block, ...]:
    """Return the blocks of a stream."""
    whole = key_tokens(plan) == TILE
    near = whole and all(len(one.page_layout().parts) == 1 for one in (plan.k, plan.v))
    words = has_words(plan, dialect)
    return blocks_of(stream, TILES, halves=halves, words=words, near=near)


def has_words(plan: AttentionPlan, dialect: Dialect) -> bool:
    """Return whether a tile has fewer numbers of two bytes than a block has threads for words."""
    return TILE * 2 < dialect.threads * warps_of(plan) * WORD


def sequences_of(plan: AttentionPlan, dialect: Dialect) -> set[Unpacker]:
    """Return the sequences that the kernels of a plan call."""
    if kinds(plan, dialect) != (TILES, TILES):
        return set()
    blocks = (*key_blocks(plan, dialect), *value_blocks(plan, dialect))
    others: set[Unpacker] = {Times()} if plan.query_bits is None else set()
    if any(entries_of(block.reader) for block in value_blocks(plan, dialect)):
        others.add(Named())
    found = others | {cell.sequence for block in blocks for cell in block.cells}
    tables = {x.operands for x in found if isinstance(x, Entries | EntriesApart)}
    words = sorted({word for operands in tables for word in words_of(operands)})
    return found | ({Held(tuple(words))} if words else set())


def warps_of(plan: AttentionPlan) -> int:
    """Return the warps of a block of attend.

    One, as long as it can hold the outputs: warps that share a tile repeat what belongs to tokens
    and to queries, and wait for one another. Two share the rows of a product of values; where it
    has no more than one warp takes, both would do all of it. docs/gpu.md has the counts.
    """
    if plan.v.channels <= 128:
        return 1
    least = min(block.wide for block in blocks_of(plan.v, TILES, halves=True))
    return 1 if least <= LEAST_DOT else 2


def _declare(
    kernel: Kernel, plan: AttentionPlan, k: tuple[Block, ...], v: tuple[Block, ...]
) -> None:
    for stream, blocks in ((plan.k, k), (plan.v, v)):
        declare_pages(kernel, stream)
        kind = "int16" if blocks[0].halves else "int8"
        kernel.array(f"{stream.role}_{kind}", kind)
    kernel.scalar("splits")
    declare_codes(kernel, plan)
    for stream in (plan.k, plan.v):
        parts = stream.page_layout().parts
        takes_words = any(isinstance(part.format, Bfp) or part.sparse for part in parts) or any(
            in_words(block.reader, field.name)
            for block in blocks
            for field in block.reader.part.fields
        )
        if takes_words or (stream.role == "k" and plan.query_bits is None):
            kernel.array(f"{stream.role}_int32", "int32")


def write_tiles(kernel: Kernel) -> None:
    """Bind the tiles of a split: the row's length and two numbers of the machine say how many."""
    kernel.scalar("least_tiles")
    kernel.scalar("most_splits")
    kernel.note("tiles of a split")
    kernel.line("many = tl.maximum(last_tile - first_tile, 0)")
    kernel.line("at_most = most_splits.to(tl.int32)")
    kernel.line("tiles = tl.maximum((many + at_most - 1) // at_most, least_tiles.to(tl.int32))")


def write_bounds(kernel: Kernel, plan: AttentionPlan) -> None:
    """Bind the whole tiles of the row, [first_tile, last_tile), and their positions."""
    sink = f" - {plan.k.tokens.sink}" if plan.k.tokens.sink else ""
    kernel.note("whole tiles, counted from the sink: all tokens are encoded, and seen")
    encoded = f"tl.maximum(tl.minimum(k_end, v_end){sink}, 0)"
    kernel.line(f"last_tile = ({encoded} // {TILE}).to(tl.int32)")
    if plan.window is None:
        kernel.line("oldest = length * 0")
        kernel.line("first_tile = last_tile * 0")
    else:
        kernel.line(f"oldest = tl.maximum(length - {plan.window}, 0)")
        behind = f"tl.maximum(oldest{sink}, 0)"
        kernel.line(f"first_tile = (({behind} + {TILE - 1}) // {TILE}).to(tl.int32)")
    for name in ("first", "last"):
        end = "begin" if name == "first" else "end"
        more = f" + {plan.k.tokens.sink}" if plan.k.tokens.sink else ""
        kernel.line(f"whole_{end} = {name}_tile.to(tl.int64) * {TILE}{more}")


def _write_place(kernel: Kernel, stream: StreamPlan) -> None:
    """Bind the first byte of the page, and the tokens of the tile in it."""
    role, layout, size = stream.role, stream.page_layout(), stream.page_tokens
    kernel.line(f"{role}_page = tl.load({role}_table + b * {role}_max_pages + place // {size})")
    kernel.line(f"{role}_block = {role}_page * {layout.page_bytes} + h * {layout.head_bytes}")
    inside = "" if size == TILE else f"place % {size} + "
    kernel.line(f"{role}_t = {inside}tl.arange(0, {TILE})")
