"""Outputs of a whole tile: weights in float16 and their products with codes of values."""

from __future__ import annotations

from ..ir.arrangements import TILES
from ..ir.encodings import Int
from ..ir.halves import TILE
from ..ir.plan import AttentionPlan
from .gpu_blocks import Block, groups_of, write_block
from .gpu_entries import write_entry_weights
from .gpu_pages import PageReader
from .gpu_scales import affine, has_zero, middle_of, scale_of, worth_of, zero_of
from .gpu_sources import pieces_of
from .gpu_text import LEAST_DOT, LN_2, LOG2_E, Kernel, both, down

MANY_SUMS = 4
"""Sums of zero points that take registers which the loop needs."""
LARGEST_LIFT = 40
"""Exponents of scales are taken out of weights up to here: float16 holds the rest of any f16."""


def rows_of_sums(kernel: Kernel, v: tuple[Block, ...], period: int) -> int:
    """Return the rows of sums over tokens: each is over tokens so far apart, within a thread.

    Fewer are fewer registers, and fewer exchanges between warps; `period` is the dialect's.
    """
    sums = sum(has_zero(reader) for reader, _, _ in groups_of(v))
    return period if sums >= MANY_SUMS or kernel.warps > 1 else LEAST_DOT


def write_sums(kernel: Kernel, v: tuple[Block, ...], rows: int, apart: int) -> None:
    """Bind the outputs, and what the loop adds up beside them.

    `apart`: rows of sums over tokens, see `rows_of_sums`.
    """
    for reader, group, cells in groups_of(v):
        for cell in cells:
            kernel.line(f"{cell.out} = tl.zeros(({cell.block.wide}, {rows}), tl.float32)")
        if has_zero(reader):
            kernel.line(f"{reader.name}_zeros_{group} = tl.zeros(({apart}, {rows}), tl.float32)")
        if middle_of(reader):
            own = f"tl.zeros(({LEAST_DOT}, {rows}), tl.float32)"
            kernel.line(f"{reader.name}_weights_{group} = {own}")


def write_weights(
    kernel: Kernel,
    plan: AttentionPlan,
    v: tuple[Block, ...],
    rows: int,
    apart: int,
    *,
    floats: bool,
) -> None:
    """Bind `weight`, the exponentials, and <part>_w_g, times the scales of group g, in float16.

    `floats`: whether the largest of floats is found as soon as that of integers.
    """
    groups = groups_of(v)
    for reader, group, _ in groups:
        kernel.line(f"{reader.name}_scale_{group} = {scale_of(reader, group)}")
    kernel.note("the largest score, less the exponent of the largest scale, as a whole number")
    names = [f"{reader.name}_scale_{group}" for reader, group, _ in groups]
    kernel.line(f"bits = {_bits_of_largest(names, floats=floats)}")
    lift = "(bits >> 23) - 126"
    if not all(_is_f16(reader) for reader, _, _ in groups):
        lift = f"tl.minimum(tl.maximum({lift}, -{LARGEST_LIFT}), {LARGEST_LIFT})"
    kernel.line(f"lift = ({lift}).to(tl.float32)")
    factor = str(LOG2_E) if plan.softcap is not None else "factor"
    across = factor if plan.softcap is not None else "factor[None, :]"
    kernel.line(f"most = tl.maximum(best, tl.ceil(tl.max(score, axis=0) * {factor}) + lift)")
    kernel.line(f"weight = tl.exp2(score * {across} - most[None, :])")
    write_entry_weights(kernel, plan, v)
    kernel.line("shrink = tl.exp2(best - most)[None, :]")
    kernel.line("best = most")
    kernel.line(f"total = total * shrink + {_summed('weight', rows, apart)}")
    for reader, group, _ in groups:
        name, own = f"{reader.name}_w_{group}", f"{reader.name}_scale_{group}"
        kernel.line(f"{name} = (weight * {own}[:, None]).to(tl.float16)")
        if has_zero(reader):
            kernel.line(f"zero = {_zero_of_middle(reader, group)}")
            zeros = f"{reader.name}_zeros_{group}"
            own = _summed("weight * zero[:, None]", rows, apart)
            kernel.line(f"{zeros} = {zeros} * shrink + {own}")


def _bits_of_largest(names: list[str], *, floats: bool) -> str:
    """Return the bits of the largest scale of all, i32: of integers in the order of the scales."""
    largest, bits = names[0], ".to(tl.int32, bitcast=True)"
    for name in names[1:]:
        largest = f"tl.maximum({largest}, {name})"
    return f"tl.max({largest}, axis=0){bits}" if floats else f"tl.max({largest}{bits}, axis=0)"


def _is_f16(reader: PageReader) -> bool:
    """Return whether scales are float16 of integers: their exponents are few, and none is zero."""
    fmt = reader.coded()
    return isinstance(fmt, Int) and fmt.params == "f16"


def _summed(terms: str, rows: int, apart: int) -> str:
    """Return the sums [apart, R] over every apart-th token of a tile."""
    return f"tl.sum(tl.reshape({terms}, ({TILE // apart}, {apart}, {rows})), axis=0)"


def _zero_of_middle(reader: PageReader, group: int) -> str:
    """Return what the middle code of a tile's tokens stands for, f32 [N]."""
    fmt, scale = affine(reader), f"{reader.name}_scale_{group}"
    middle = middle_of(reader)
    if fmt.zero == "int":
        return f"({float(middle)} - {zero_of(reader, group)}) * {scale}"
    return zero_of(reader, group) + (f" + {float(middle)} * {scale}" if middle else "")


def write_values(kernel: Kernel, v: tuple[Block, ...]) -> None:
    """Add the products of weights and codes to the outputs of each cell."""
    for block in v:
        write_block(kernel, block, down=False)
    for reader, group, cells in groups_of(v):
        weights = f"{reader.name}_w_{group}"
        for cell in cells:
            kernel.line(f"{cell.out} = tl.dot({cell.operand}, {weights}, {cell.out} * shrink)")
        if middle_of(reader):
            ones = f"tl.full(({LEAST_DOT}, {TILE}), 1.0, tl.float16)"
            own = f"{reader.name}_weights_{group}"
            kernel.line(f"{own} = tl.dot({ones}, {weights}, {own} * shrink)")


def write_partials(kernel: Kernel, plan: AttentionPlan, v: tuple[Block, ...]) -> None:
    """Store the split's share of the result."""
    kernel.note("the split's share of the result; zero points are the same for all of a scale")
    kernel.line("part = (bh * parts + split) * rows + row")
    kernel.line(f"tl.store(part_max + part, best * {LN_2}, mask=exists)")
    kernel.line("tl.store(part_sum + part, tl.sum(total, axis=0), mask=exists)")
    for reader, group, cells in groups_of(v):
        terms = []
        if has_zero(reader):
            terms.append(f"tl.sum({reader.name}_zeros_{group}, axis=0)")
        if middle_of(reader):
            # All sixteen rows are the same sum.
            sums = f"tl.max({reader.name}_weights_{group}, axis=0)"
            terms.append(f"- {float(middle_of(reader)) * worth_of(reader)} * {sums}")
        if terms:
            kernel.line(f"more = ({' '.join(terms)})[None, :]")
        for cell in cells:
            at = f"part[None, :] * {plan.v.channels} + {down(f'({cell.channels})')}"
            own = " - ".join(x.out for x in (cell, *cell.below))
            own = f"({own})" if cell.below else own
            worth = worth_of(reader)
            out = f"{own} * {worth / cell.unit!r}" + (" + more" if terms else "")
            mask = both("exists[None, :]", down(cell.inside))
            kernel.line(f"tl.store(part_out + {at}, {out}, mask={mask})")
    for piece in pieces_of(plan.v, TILES):
        if not piece.reader.is_stored:
            piece.reader.write_columns(kernel)
            at = f"part[None, :] * {plan.v.channels} + {down(piece.channels)}"
            mask = both("exists[None, :]", down(piece.reader.columns))
            kernel.line(f"tl.store(part_out + {at}, 0.0, mask={mask})")
