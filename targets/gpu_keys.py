"""Scores of a whole tile: the operands of the queries, and their products with codes of keys.

With scales of tokens the products are with integers of q, exactly; scale and zero point go on the
score. With scales of channels these go on q, in float16.
"""

from __future__ import annotations

from ..ir.encodings import Int
from ..ir.halves import TILE
from ..ir.plan import AttentionPlan
from ..ir.planes import offset
from .gpu_blocks import Block, Cell, Looked, groups_of, write_block
from .gpu_entries import write_entry_scores
from .gpu_pages import PageReader, block_in
from .gpu_scales import affine, has_zero, per_channel, scale_of, worth_of, zero_of
from .gpu_sequences import STEP, Times
from .gpu_text import (
    LEAST_DOT,
    LOG2_E,
    Kernel,
    across,
    both,
    down,
    load,
    padded,
    write_softcap,
)
from .gpu_tiles import key_tokens


def write_queries(kernel: Kernel, plan: AttentionPlan, k: tuple[Block, ...]) -> None:
    """Bind each cell's operand of the queries, and `factor`, what makes scores powers of two."""
    kernel.note("the queries as matrix units take them, and what one is worth")
    step = load("query_step + bh * rows + row", "exists")
    worth = 1.0 if plan.query_bits is not None else 1.0 / STEP
    worth *= worth_of(k[0].reader) * (1.0 if plan.softcap is not None else LOG2_E)
    kernel.line(f"factor = {step}" + (f" * {worth!r}" if worth != 1.0 else ""))
    for reader, group, cells in groups_of(k):
        for cell in cells:
            is_moved = plan.query_bits is None or isinstance(cell, Looked)
            channels = cell.stored if is_moved else cell.channels
            codes = _query(plan, channels, cell.inside, "query_codes")
            _write_query(kernel, plan, cell, codes)
        if plan.query_bits is not None:
            _write_query_sums(kernel, plan, reader, group, cells)
        elif affine(reader).zero == "float":
            columns, inside = _columns(reader)
            first = f" + {reader.part.first}" if reader.part.first else ""
            kernel.line(
                f"{reader.name}_q = {_query(plan, columns + first, inside, 'query_halves')}"
            )


def _write_query(kernel: Kernel, plan: AttentionPlan, cell: Cell, codes: str) -> None:
    """Bind the operands of one cell: float16, bytes, or two bytes of 16 bits."""
    cast = ".to(tl.float16)" if cell.block.halves else ".to(tl.int8)"
    match plan.query_bits:
        case None:
            kernel.line(f"{cell.name}_q = {codes}")
        case 16:
            kernel.line(f"q = {codes}.to(tl.int32)")
            kernel.line("q_high = (q + 128) >> 8")
            kernel.line(f"{cell.name}_high = q_high{cast}")
            kernel.line(f"{cell.name}_low = (q - (q_high << 8)){cast}")
        case _:
            kernel.line(f"{cell.name}_n = {codes}{cast if cell.block.halves else ''}")


def _query(plan: AttentionPlan, channels: str, inside: str, array: str) -> str:
    """Return the load of the queries of some channels, [channels, R]."""
    at = f"(bh * rows + row)[None, :] * {plan.k.channels} + {down(f'({channels})')}"
    return load(f"{array} + {at}", both("exists[None, :]", down(inside)))


def _write_query_sums(
    kernel: Kernel, plan: AttentionPlan, reader: PageReader, group: int, cells: tuple[Cell, ...]
) -> None:
    """Bind <part>_sum_g, the integers of a group summed for zero points; <part>_start_g, i32 [R].

    The start of a sum of products takes their operands from where they are zero to the middle.
    """
    name = f"{reader.name}_{{}}_{group}"
    for cell in cells:
        sums = [f"tl.sum({cell.name}_{kind}.to(tl.int32), axis=0)" for kind in _kinds(plan)]
        total = f"{sums[0]} * 256 + {sums[1]}" if len(sums) > 1 else sums[0]
        kernel.line(f"{cell.name}_sum = {total}")
    if has_zero(reader):
        total = " + ".join(f"{cell.name}_sum" for cell in cells)
        kernel.line(f"{name.format('sum')} = ({total}).to(tl.float32)")
    terms = [
        f"{cell.name}_sum * {_from_middle(reader, cell)}"
        for cell in cells
        if _from_middle(reader, cell)
    ]
    if terms:
        kernel.line(f"{name.format('start')} = {' + '.join(terms)}")


def _kinds(plan: AttentionPlan) -> tuple[str, ...]:
    """Return the parts of the integers of q: bytes of 16 bits, or all of 8 bits."""
    return ("high", "low") if plan.query_bits == 16 else ("n",)


def _from_middle(reader: PageReader, cell: Cell) -> int:
    """Return what is zero in a cell's operand, counted from the middle of the format."""
    middle = 0 if has_zero(reader) else offset(reader.coded())
    return cell.centre - middle


def _start(reader: PageReader, group: int, cells: tuple[Cell, ...]) -> str:
    """Return the name of the start of a group's sums, or "" if that is zero."""
    is_some = any(_from_middle(reader, cell) for cell in cells)
    return f"{reader.name}_start_{group}" if is_some else ""


def _columns(reader: PageReader) -> tuple[str, str]:
    """Return all channels of a reader, counted from its first, and the mask of those it has."""
    width = reader.part.width
    wide = padded(width, LEAST_DOT)
    columns = f"tl.arange(0, {wide})"
    return columns, "" if wide == width else f"({columns} < {width})"


def write_scores(
    kernel: Kernel, plan: AttentionPlan, rows: int, k: tuple[Block, ...], period: int
) -> None:
    """Bind `score`, f32 [N, R], which `factor` makes powers of two; `period` is the dialect's."""
    n = key_tokens(plan)
    if n == TILE:
        _write_part(kernel, plan, rows, k, "place", {})
    else:
        _write_parts(kernel, plan, rows, k, period)
    if plan.softcap is None:
        return
    kernel.line("score = score * factor[None, :]")
    write_softcap(kernel, plan.softcap)


def _write_parts(
    kernel: Kernel, plan: AttentionPlan, rows: int, k: tuple[Block, ...], period: int
) -> None:
    """Bind `score`, n tokens after the other: each n has scales of channels of its own."""
    n = key_tokens(plan)
    readers = dict.fromkeys(block.reader for block in k)
    joined = [x for x in readers if _has_joined_zeros(x, n, period)]
    for reader in joined:
        _write_joined_zeros(kernel, rows, reader)
    for number in range(TILE // n):
        kernel.note(f"tokens {number * n} to {number * n + n - 1}")
        inside = "" if plan.k.page_tokens == TILE else f"place % {plan.k.page_tokens} + "
        kernel.line(f"k_t = {inside}tl.arange(0, {n})" + (f" + {number * n}" if number else ""))
        at = f"(place + {number * n})" if number else "place"
        beside = {reader.name: f"{reader.name}_beside_{number}" for reader in joined}
        _write_part(kernel, plan, rows, k, at, beside)
        kernel.line(f"score_{number} = score")
    # They are rows of registers, and stay where they are.
    kernel.line("score = tl.permute(tl.join(score_0, score_1), (2, 0, 1))")
    kernel.line(f"score = tl.reshape(score, ({TILE}, {rows}))")


def _write_part(
    kernel: Kernel,
    plan: AttentionPlan,
    rows: int,
    k: tuple[Block, ...],
    place: str,
    beside: dict[str, str],
) -> None:
    """Bind `score` of the tokens from `place` on, as many as share scales of channels.

    `beside`: for readers by their name, products of zero points that are there already.
    """
    for block in k:
        write_block(kernel, block, down=True)
    for number, (reader, group, cells) in enumerate(groups_of(k)):
        if per_channel(reader):
            own = beside.get(reader.name, "")
            _write_channel_scores(kernel, plan, rows, reader, cells, place, own)
        else:
            _write_token_scores(kernel, plan, reader, group, cells)
        kernel.line(f"score {'+=' if number else '='} part")
    write_entry_scores(kernel, plan, k)


def _write_token_scores(
    kernel: Kernel, plan: AttentionPlan, reader: PageReader, group: int, cells: tuple[Cell, ...]
) -> None:
    """Bind `part`, the share of a group of channels in the scores."""
    kernel.line(f"scale = {scale_of(reader, group)}")
    start = _start(reader, group, cells)
    if cells[0].block.halves:
        _write_half_products(kernel, plan, cells, start)
    else:
        _write_byte_products(kernel, plan, cells, start)
    if not has_zero(reader):
        kernel.line("part = n * scale[:, None]")
        return
    total = f"{reader.name}_sum_{group}[None, :]"
    kernel.line(f"zero = {zero_of(reader, group)}")
    if affine(reader).zero == "int":
        kernel.line(f"part = (n - zero[:, None] * {total}) * scale[:, None]")
    else:
        kernel.line(f"part = n * scale[:, None] + zero[:, None] * {total}")


def _write_byte_products(
    kernel: Kernel, plan: AttentionPlan, cells: tuple[Cell, ...], start: str
) -> None:
    """Bind `n`, f32 [N, R]: products of bytes, exactly.

    Sums of larger units come first and are brought down to the next: they are multiples of it.
    """
    if plan.query_bits == 16:
        kernel.line(f"n = {_dots(cells, 'high')}")
        kernel.line("n = n * 256" + (f" + {start}[None, :]" if start else ""))
        kernel.line(f"n = {_dots(cells, 'low', 'n')}.to(tl.float32)")
        return
    units = sorted({int(cell.unit) for cell in cells}, reverse=True)
    if start:
        zeros = f"tl.zeros(({TILE}, 1), tl.int32)"
        kernel.line(f"n = ({start} * {units[0]})[None, :] + {zeros}")
    for i, unit in enumerate(units):
        if i:
            kernel.line(f"n = n >> {(units[i - 1] // unit).bit_length() - 1}")
        own = tuple(cell for cell in cells if cell.unit == unit)
        kernel.line(f"n = {_dots(own, 'n', 'n' if i or start else '')}")
    if units[-1] > 1:
        kernel.line(f"n = n >> {units[-1].bit_length() - 1}")
    kernel.line("n = n.to(tl.float32)")


def _write_half_products(
    kernel: Kernel, plan: AttentionPlan, cells: tuple[Cell, ...], start: str
) -> None:
    """Bind `n`, f32 [N, R]: products of half-words; cells of the same unit share a sum."""
    for kind in _kinds(plan):
        for number, unit in enumerate(dict.fromkeys(cell.unit for cell in cells)):
            own = tuple(cell for cell in cells if cell.unit == unit)
            kernel.line(f"{kind} {'+=' if number else '='} {_dots(own, kind)} * {1.0 / unit!r}")
    if len(_kinds(plan)) > 1:
        kernel.line("n = high * 256.0 + low")
    if start:
        kernel.line(f"n += {start}.to(tl.float32)[None, :]")


def _dots(cells: tuple[Cell, ...], queries: str, text: str = "") -> str:
    """Return the products of some cells with their queries, added to a sum if one is named."""
    kind = "tl.float32" if cells[0].block.halves else "tl.int32"
    for cell in cells:
        for operand in cell.operands:
            more = f", {text}" if text else ""
            text = f"tl.dot({operand}, {cell.name}_{queries}{more}, out_dtype={kind})"
    return text


def _write_channel_scores(
    kernel: Kernel,
    plan: AttentionPlan,
    rows: int,
    reader: PageReader,
    cells: tuple[Cell, ...],
    place: str,
    joined: str,
) -> None:
    """Bind `part`, in steps of 2^-24: scales of channels go on the queries once a tile.

    Zero points are one more row of codes: their product with the queries begins the sums. A matrix
    product has sixteen rows, and all are that one. `joined` names the product if it is there.
    """
    fmt = affine(reader)
    kernel.note("scales of channels, two neighbours in a word, go on the queries")
    beside = ""
    for block in dict.fromkeys(cell.block for cell in cells):
        for i in range(8 // block.bits):
            own = [cell for cell in block.cells if cell.plane == i]
            for name in ("scale", "zero") if fmt.zero == "int" else ("scale",):
                kernel.line(f"{name}s = {_pairs(reader, block, name, i, place)}")
                for cell in own:
                    bits = f"({name}s >> 16)" if cell.parity else f"{name}s"
                    half = f"{bits}.to(tl.int16).to(tl.float16, bitcast=True)"
                    kernel.line(f"{cell.name}_{name} = {half}")
            for cell in own:
                scale = down(f"{cell.name}_scale")
                kernel.line(f"{cell.name}_y = {Times().name}({cell.name}_q, {scale})")
                more = f", {beside}" if beside else ""
                beside = f"tl.dot({_zero_row(fmt, cell)}, {cell.name}_y{more})"
    if fmt.zero == "float" and not joined:
        kernel.line(f"zeros = {_zeros(reader, place)}")
        row = f"tl.broadcast_to(zeros[None, :], (16, {padded(reader.part.width, LEAST_DOT)}))"
        beside = f"tl.dot({row}, {reader.name}_q) * {STEP!r}"
    kernel.line(f"beside = {joined or beside}")
    n, same = key_tokens(plan), LEAST_DOT // 2 if joined else LEAST_DOT
    kernel.line(f"beside = tl.reshape(beside, (1, {same}, {rows}))")
    kernel.line(f"beside = tl.broadcast_to(beside, ({n // same}, {same}, {rows}))")
    kernel.line(f"beside = tl.reshape(beside, ({n}, {rows}))")
    kernel.line(f"part = {_dots(cells, 'y', 'beside')}")


def _has_joined_zeros(reader: PageReader, n: int, period: int) -> bool:
    """Return whether one product takes the zero points of both parts of n tokens of a tile.

    Half of its rows are those of a part, and a thread has rows of both.
    """
    if not per_channel(reader) or affine(reader).zero != "float":
        return False
    return affine(reader).group_tokens == n == TILE // 2 and period <= LEAST_DOT // 2


def _write_joined_zeros(kernel: Kernel, rows: int, reader: PageReader) -> None:
    """Bind <part>_beside_0 and _1, the products of zero points of both parts, eight times each."""
    columns, inside = _columns(reader)
    wide, half = padded(reader.part.width, LEAST_DOT), LEAST_DOT // 2
    first = f"{reader.role}_float16 + {_group_row(reader, 'zero', 2, 'place')}"
    groups = f"(tl.arange(0, 2) * {reader.part.field('zero').shape[1]})[:, None]"
    at = f"{first} + {groups} + {columns}[None, :]"
    kernel.note("zero points of both halves of the tile: eight rows each")
    kernel.line(f"zeros = {load(at, across(inside))}")
    kernel.line(f"zeros = tl.broadcast_to(zeros[:, None, :], (2, {half}, {wide}))")
    kernel.line(f"zeros = tl.reshape(zeros, ({LEAST_DOT}, {wide}))")
    kernel.line(f"beside = tl.dot(zeros, {reader.name}_q) * {STEP!r}")
    kernel.line(f"beside = tl.permute(tl.reshape(beside, (2, {half}, {rows})), (1, 2, 0))")
    kernel.line(f"{reader.name}_beside_0, {reader.name}_beside_1 = tl.split(beside)")


def _zero_row(fmt: Int, cell: Cell) -> str:
    """Return what is taken from the codes of a cell, sixteen times, as an operand of f16."""
    shape = f"(16, {cell.block.wide})"
    if fmt.zero == "int":
        return f"tl.broadcast_to(({cell.name}_zero * {-cell.unit!r})[None, :], {shape})"
    return f"tl.full({shape}, {-offset(fmt) * cell.unit!r}, tl.float16)"


def _zeros(reader: PageReader, place: str) -> str:
    """Return the load of the zero points of all channels, f16 [C]."""
    columns, inside = _columns(reader)
    return load(
        f"{reader.role}_float16 + {_group_row(reader, 'zero', 2, place)} + {columns}", inside
    )


def _group_row(reader: PageReader, name: str, size: int, place: str) -> str:
    """Return where the group begins in a field of f16, counted in numbers of `size` bytes."""
    field, layout = reader.part.field(name), reader.layout
    row, group = block_in(reader.role, size), layout.tokens // field.shape[0]
    if group < layout.tokens:
        row += f" + {place} % {layout.tokens} // {group} * {field.shape[1] * 2 // size}"
    return row + (f" + {field.offset // size}" if field.offset else "")


def _pairs(reader: PageReader, block: Block, name: str, plane: int, place: str) -> str:
    """Return the load of a block's scales or zero points, two f16 in a word, i32 [channels / 2]."""
    first = (plane * block.plane + block.first) // 2
    at = f"{reader.role}_int32 + {_group_row(reader, name, 4, place)} + {first}"
    # A word has both parities of a cell, so it is masked as a cell is.
    return load(f"{at} + tl.arange(0, {block.wide})", block.cells[0].inside)
