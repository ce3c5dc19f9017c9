"""Scores of a whole tile: the operands of the queries, and their products with codes of keys.

With scales of tokens the products are with integers of q, exactly; scale and zero point go on the
score. With scales of channels these go on q, in float16.
"""

from __future__ import annotations

from ..ir.encodings import Int
from ..ir.plan import AttentionPlan
from ..ir.planes import code_bits, offset
from .gpu_pages import PageReader
from .gpu_text import LOG2_E, Kernel, both, down, load, padded, write_softcap
from .gpu_tiles import (
    Block,
    Cell,
    affine,
    groups_of,
    has_zero,
    per_channel,
    scale_of,
    write_block,
    zero_of,
)


def write_queries(kernel: Kernel, plan: AttentionPlan, k: tuple[Block, ...]) -> None:
    """Bind each cell's operand of the queries, and `factor`, what makes scores powers of two."""
    if plan.query_bits is None:
        _write_float_queries(kernel, plan, k)
        return
    kernel.note("the queries: integers, what one is worth, and sums for zero points")
    step = load("query_step + bh * rows + row", "exists")
    kernel.line(f"factor = {step}" + ("" if plan.softcap is not None else f" * {LOG2_E}"))
    for reader, group, cells in groups_of(k):
        for cell in cells:
            codes = _query(plan, cell, "query_codes")
            if plan.query_bits == 16:
                kernel.line(f"q = {codes}.to(tl.int32)")
                kernel.line("q_high = (q + 128) >> 8")
                kernel.line(f"{cell.name}_high = q_high.to(tl.float16)")
                kernel.line(f"{cell.name}_low = (q - (q_high << 8)).to(tl.float16)")
            else:
                cast = ".to(tl.float16)" if cell.block.halves else ""
                kernel.line(f"{cell.name}_n = {codes}{cast}")
        _write_query_sums(kernel, plan, reader, group, cells)


def _query(plan: AttentionPlan, cell: Cell, array: str) -> str:
    """Return the load of the queries of a cell's channels, [channels, R]."""
    at = f"(bh * rows + row)[None, :] * {plan.k.channels} + {down(f'({cell.channels})')}"
    return load(f"{array} + {at}", both("exists[None, :]", down(cell.inside)))


def _write_query_sums(
    kernel: Kernel, plan: AttentionPlan, reader: PageReader, group: int, cells: tuple[Cell, ...]
) -> None:
    """Bind <part>_sum_g, the sum of the integers of a group's channels, as its users take it."""
    name = f"{reader.name}_sum_{group}"
    kinds = ("high", "low") if plan.query_bits == 16 else ("n",)
    for kind in kinds:
        terms = [f"tl.sum({cell.name}_{kind}.to(tl.int32), axis=0)" for cell in cells]
        own = name if kind == "n" else f"{name}_{kind}"
        kernel.line(f"{own} = {' + '.join(terms)}")


def _write_float_queries(kernel: Kernel, plan: AttentionPlan, k: tuple[Block, ...]) -> None:
    """Bind each cell's queries in float32, less a power of two."""
    kernel.note("the queries, less the power of two over their largest")
    width = plan.k.channels
    channels = f"tl.arange(0, {padded(width)})"
    inside = "" if padded(width) == width else f"({channels} < {width})"
    at = f"(bh * rows + row)[None, :] * {width} + {down(channels)}"
    kernel.line(f"q = {load(f'query + {at}', both('exists[None, :]', down(inside)))}")
    kernel.line("q_bits = tl.max(tl.abs(q), axis=0).to(tl.int32, bitcast=True)")
    kernel.line("exponent = tl.minimum(tl.maximum((q_bits >> 23) - 126, -100), 100)")
    kernel.line("factor = ((exponent + 127) << 23).to(tl.float32, bitcast=True)")
    kernel.line("lower = ((127 - exponent) << 23).to(tl.float32, bitcast=True)")
    if plan.softcap is None:
        kernel.line(f"factor = factor * {LOG2_E}")
    for block in k:
        for cell in block.cells:
            kernel.line(f"{cell.name}_q = {_query(plan, cell, 'query')} * lower[None, :]")


def write_scores(kernel: Kernel, plan: AttentionPlan, k: tuple[Block, ...]) -> None:
    """Bind `score`, f32 [N, R], which `factor` makes powers of two."""
    for block in k:
        write_block(kernel, block, down=True)
    for number, (reader, group, cells) in enumerate(groups_of(k)):
        if per_channel(reader):
            _write_channel_scores(kernel, reader, cells)
        else:
            _write_token_scores(kernel, plan, reader, group, cells)
        kernel.line(f"score {'+=' if number else '='} part")
    if plan.softcap is None:
        return
    kernel.line("score = score * factor[None, :]")
    write_softcap(kernel, plan.softcap)


def _write_token_scores(
    kernel: Kernel, plan: AttentionPlan, reader: PageReader, group: int, cells: tuple[Cell, ...]
) -> None:
    """Bind `part`, the share of a group of channels in the scores."""
    fmt, name = reader.coded(), f"{reader.name}_sum_{group}"
    kernel.line(f"scale = {scale_of(reader, group)}")
    middle = offset(fmt) if not has_zero(reader) else 0
    if plan.query_bits == 16:
        for kind in ("high", "low"):
            _write_products(kernel, cells, kind, kind)
            if middle:
                kernel.line(f"{kind} = {kind} - {middle}.0 * {name}_{kind}.to(tl.float32)[None, :]")
        kernel.line("n = high * 256.0 + low")
        total = f"({name}_high * 256 + {name}_low).to(tl.float32)"
    else:
        _write_products(kernel, cells, "n", "n")
        total = f"{name}.to(tl.float32)"
        if middle:
            kernel.line(f"n = n - ({middle}.0 * {total})[None, :]")
    if not has_zero(reader):
        kernel.line("part = n * scale[:, None]")
        return
    kernel.line(f"zero = {zero_of(reader, group)}")
    if affine(reader).zero == "int":
        kernel.line(f"part = (n - zero[:, None] * {total}[None, :]) * scale[:, None]")
    else:
        kernel.line(f"part = n * scale[:, None] + zero[:, None] * {total}[None, :]")


def _write_products(kernel: Kernel, cells: tuple[Cell, ...], out: str, queries: str) -> None:
    """Bind `out`, f32 [N, R], to the products of some cells with their queries."""
    if not cells[0].block.halves:
        kernel.line(f"{out} = {_dots(cells, queries)}.to(tl.float32)")
        return
    # Cells whose operands have the same unit share a sum.
    units = dict.fromkeys(cell.unit for cell in cells)
    for number, unit in enumerate(units):
        own = tuple(cell for cell in cells if cell.unit == unit)
        kernel.line(f"{out} {'+=' if number else '='} {_dots(own, queries)} * {1.0 / unit!r}")


def _dots(cells: tuple[Cell, ...], queries: str) -> str:
    text = ""
    kind = "tl.float32" if cells[0].block.halves else "tl.int32"
    for cell in cells:
        more = f", {text}" if text else ""
        text = f"tl.dot({cell.operand}, {cell.name}_{queries}{more}, out_dtype={kind})"
    return text


def _write_channel_scores(kernel: Kernel, reader: PageReader, cells: tuple[Cell, ...]) -> None:
    """Bind `part`: scales and zero points of channels go on the queries, once a tile."""
    fmt, count = affine(reader), 0
    kernel.note("scales of channels, two neighbours in a word, go on the queries")
    for block in dict.fromkeys(cell.block for cell in cells):
        for i in range(reader.part.planes):
            for name in ("scale", "zero") if has_zero(reader) else ("scale",):
                kernel.line(f"{name}s = {_pairs(reader, block, name, i)}")
                for parity, bits in ((0, f"{name}s"), (1, f"({name}s >> 16)")):
                    cast = f"{bits}.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)"
                    kernel.line(f"{name}_{parity} = {cast}")
            for cell in (c for c in block.cells if c.plane == i):
                q = f"{cell.name}_q"
                lowered = f" * {2.0 ** -_lift(cell)!r}" if _lift(cell) else ""
                scaled = f"{q} * scale_{cell.parity}[:, None]"
                kernel.line(f"{cell.name}_y = ({scaled}{lowered}).to(tl.float16)")
                kernel.line(f"beside {'+=' if count else '='} {_zero_term(fmt, q, cell.parity)}")
                count += 1
    kernel.line(f"part = {_dots(cells, 'y')} * {2.0**24!r} + tl.sum(beside, axis=0)[None, :]")


def _lift(cell: Cell) -> int:
    """Return the power of two that the queries give to the unit of a cell."""
    return cell.plane * code_bits(cell.block.reader.coded())


def _zero_term(fmt: Int, q: str, parity: int) -> str:
    """Return what a code of zero stands for, times the queries, [channels, R]."""
    if fmt.zero == "float":
        return f"{q} * zero_{parity}[:, None]"
    if fmt.zero == "int":
        return f"{q} * (-scale_{parity} * zero_{parity})[:, None]"
    return f"{q} * (-{float(offset(fmt))} * scale_{parity})[:, None]"


def _pairs(reader: PageReader, block: Block, name: str, plane: int) -> str:
    """Return the load of a block's scales or zero points, two f16 in a word, i32 [channels / 2]."""
    field, role, layout = reader.part.field(name), reader.role, reader.layout
    first = (plane * reader.part.plane + block.first) // 2
    group = layout.tokens // field.shape[0]
    row = f"{role}_block // 4 + {field.offset // 4 + first}"
    if group < layout.tokens:
        row += f" + place % {layout.tokens} // {group} * {field.shape[1] // 2}"
    # A word has both parities of a cell, so it is masked as a cell is.
    return load(f"{role}_int32 + {row} + tl.arange(0, {block.wide})", block.cells[0].inside)
