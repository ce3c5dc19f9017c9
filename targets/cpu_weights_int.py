"""Weights of a page as integers, for values in token quads; `cpu_values_int.py` multiplies them.

    w[r, t] = p[r, t] s_t for scales of tokens, p[r, t] for scales of channels
    n[r, t] = [w / a],  a = max w / n_max  for each row and block of 32 tokens

Weights of tokens that are not wanted are zero. What is rounded: `ir/integers.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd
from typing import Protocol

from ..ir.arrangements import QUAD
from ..ir.integers import BLOCK, most_integer
from .cpu_dots import Dots, dots_of
from .cpu_pages import PageReader
from .cpu_quads import lanes_of, value_lanes
from .cpu_rows import Rows
from .cpu_scores_int import MOST_AT_ONCE, inverse_of
from .cpu_text import (
    Kernel,
    at,
    bits_as,
    fma,
    fold,
    fold_rows,
    number,
    rint,
    row_blocks,
    splat,
)
from .machines import Cpu

# Outputs that stay in registers from block to block, beside as many sums; more are read and written
# for each block, which is done for all channels before the next one begins.
MOST_OUTPUTS = 8


class WriteBlock(Protocol):
    """What is written for one block of tokens and one group of channels."""

    def __call__(self, kernel: Kernel, values: ValueDots, rows: Rows, *, whole: bool) -> None:
        """Write it; `whole`: all tokens of the block are wanted."""


@dataclass(frozen=True, slots=True)
class ValueDots:
    """What the values of one stream need.

    Attributes:
        reader: of the pages.
        dots: of the machine, in lanes of channels.
        lanes: tokens at once where weights are rounded.
        rows: query rows of a head.
        heads: those of an item if weights of all of them are rounded before the first product of a
            page, and 1 if they take turns.
        early: whether parameters are asked for before the first product of a page.
    """

    reader: PageReader
    dots: Dots
    lanes: int
    rows: int
    heads: int
    early: bool = False

    @property
    def integers(self) -> str:
        """Name of the rounded weights."""
        return self.reader.own("w_integers")

    @property
    def steps(self) -> str:
        """Name of the steps of blocks."""
        return self.reader.own("w_steps")

    @property
    def units(self) -> str:
        """Name of what one of the rounded weights is worth, before codes' places change it."""
        return self.reader.own("w_units") if self.apart else "unit"

    @property
    def inverses(self) -> str:
        """Name of the inverses of units."""
        return self.reader.own("w_inverses") if self.apart else "inverse"

    @property
    def zeros(self) -> str:
        """Name of the sums of rounded weights times zero points, or with scales of channels alone.

        Those times zero points are kept by lanes for all pages of an item.
        """
        return self.reader.own("w_zeros")

    @property
    def groups(self) -> int:
        """Weights of one token: one for each of its scales."""
        return 1 if self.reader.per_channel else self.reader.groups

    @property
    def blocks(self) -> int:
        """Blocks of weights of a page."""
        return self.reader.layout.tokens // BLOCK

    @property
    def in_place(self) -> bool:
        """Whether codes are multiplied where they lie, and steps make up for it."""
        return self.dots.in_place and (
            self.groups == 1 or self.reader.plane % self.reader.group == 0
        )

    @property
    def apart(self) -> bool:
        """Whether steps of all heads are found before the first weight is rounded.

        Both are chains of instructions that wait for each other. One behind the other they fill
        what the processor looks ahead; of two loops, each begins its next chain meanwhile. A single
        chain of one row is short enough.
        """
        return self.rows * self.groups > 1

    @property
    def copies(self) -> int:
        """Steps of a row, a block and a group: one for each plane, if codes lie differently."""
        return self.reader.planes if self.in_place and self.groups == 1 else 1

    @property
    def integers_at_once(self) -> int:
        """Integers of a page."""
        return self.rows * self.heads * self.groups * self.blocks * BLOCK

    def row(self, rows: Rows, r: int) -> str:
        """Return the number of row r among those whose weights are there at once."""
        return rows.of_item(str(r)) if self.heads > 1 else f"({rows.first} + {r})"

    def planes_at_once(self, rows: int) -> int:
        """Return the planes of channels that are summed together."""
        return max(1, min(self.reader.planes, self.dots.most_sums // rows))

    def side(self, rows: int) -> int:
        """Return the vectors of channels in each plane that are summed together.

        Products of few rows and planes would wait for each other; eight sums do not. Codes of 8
        bits have two words each, and the words of more vectors would fill the registers.
        """
        most = 0 if self.dots.wide_codes else min(MOST_OUTPUTS, self.dots.most_sums)
        size, vectors = rows * self.planes_at_once(rows), self.reader.plane // self.dots.lanes
        return next(s for s in (4, 2, 1) if vectors % s == 0 and (s == 1 or s * size <= most))


def value_dots(reader: PageReader, rows: int, heads: int, cpu: Cpu) -> ValueDots:
    """Return what the values of a stream need, for items of at most so many heads."""
    lanes = value_lanes(reader.coded(), reader.width, cpu)
    dots = dots_of(reader.coded(), cpu, lanes, signed=False)
    values = ValueDots(reader, dots, lanes_of(cpu), rows, heads)
    dots = replace(dots, shared=values.side(rows))
    values = replace(values, dots=dots)
    size = dots.bytes_of(values.integers_at_once // QUAD)
    return values if size <= MOST_AT_ONCE else replace(values, heads=1)


def value_scratch_int(kernel: Kernel, values: ValueDots, heads: int) -> None:
    """Declare what the values of an item of at most so many heads need."""
    lanes, groups = values.lanes, values.groups
    blocks = values.rows * values.heads * groups * values.blocks
    kernel.scratch(values.integers, values.integers_at_once, values.dots.integers)
    values.dots.declare(kernel, values.integers, values.integers_at_once // QUAD)
    kernel.scratch(values.steps, blocks * values.copies)
    if values.apart:
        for name in (values.units, values.inverses):
            kernel.scratch(name, blocks)
    if values.reader.per_channel:
        kernel.scratch(values.zeros, blocks)
        return
    kernel.scratch(values.zeros, heads * values.rows * groups * lanes)
    with kernel.block(f"for i in T.serial(item_rows * T.int64({groups}))"):
        kernel.line(f"{at(values.zeros, f'i * {lanes}', lanes)} = {number(0.0, lanes)}")


def write_value_zeros(kernel: Kernel, values: ValueDots) -> None:
    """Add to the outputs of an item what its zero points make, after the last page."""
    reader, lanes = values.reader, values.lanes
    if reader.per_channel:
        return
    at_once, width = gcd(lanes, reader.group), reader.layout.channels
    name = reader.own("zero_sum")
    kernel.scratch(name, lanes)
    with kernel.block(f"for i in T.serial(item_rows * T.int64({values.groups}))"):
        kernel.line(f"{at(name, '0', lanes)} = {at(values.zeros, f'i * {lanes}', lanes)}")
        fold(kernel, name, lanes, "({} + {})")
        kernel.let("row", f"item_part + T.truncdiv(i, T.int64({values.groups}))")
        kernel.let("group", f"T.truncmod(i, T.int64({values.groups}))")
        with kernel.block(f"for j in T.serial(T.int64({reader.group // at_once}))"):
            channel = reader.channel(f"group * {reader.group} + j * {at_once}")
            target = at("part_out", f"row * {width} + {channel}", at_once)
            kernel.line(f"{target} = {target} + {splat(f'{name}[0]', at_once)}")


def write_page_steps_int(kernel: Kernel, values: ValueDots, rows: Rows) -> None:
    """Find what one of the rounded weights of the present page is worth, for a block of rows.

    Writes nothing where `write_page_weights_int` finds it, and nothing is `apart`.
    """
    if values.apart:
        _write_each_block(kernel, values, rows, (_write_block_steps,))


def write_page_weights_int(kernel: Kernel, values: ValueDots, rows: Rows) -> None:
    """Round the weights of the present page for a block of rows; see `write_page_steps_int`."""
    steps = () if values.apart else (_write_block_steps,)
    _write_each_block(kernel, values, rows, (*steps, _write_block_integers))


def _write_each_block(
    kernel: Kernel, values: ValueDots, rows: Rows, writes: tuple[WriteBlock, ...]
) -> None:
    """Write a loop over the blocks of the present page and the groups of channels."""
    with kernel.block(f"for group in T.serial(T.int64({values.groups}))"):
        # Most pages are wanted whole: then there is nothing to mask.
        with kernel.block(f"if v_t1 - v_t0 == {values.reader.layout.tokens}"):
            with kernel.block(each_block()):
                for write in writes:
                    write(kernel, values, rows, whole=True)
        with kernel.block("else"), kernel.block(each_block()):
            for name, edge in (("place0", "v_t0"), ("place1", "v_t1")):
                kernel.let(name, splat(f'T.Cast("int32", {edge})', values.lanes))
            for write in writes:
                write(kernel, values, rows, whole=False)


def each_block() -> str:
    """Return the head of a loop over the blocks of the present page that hold wanted tokens."""
    shift = BLOCK.bit_length() - 1
    first = f"T.shift_right(v_t0, T.int64({shift}))"
    last = f"T.shift_right(v_t1 + {BLOCK - 1}, T.int64({shift}))"
    return f"for block in T.serial({first}, T.max({first}, {last}))"


def _write_block_steps(kernel: Kernel, values: ValueDots, rows: Rows, *, whole: bool) -> None:
    """Fill the steps, units and inverses of a block of tokens, some unwanted if not `whole`."""
    lanes = values.lanes
    kernel.scratch("most", rows.count * lanes)
    kernel.scratch("largest", rows.count + 4)
    if not values.apart:
        for name in (values.units, values.inverses):
            kernel.scratch(name, rows.count + 4)
    for i in range(BLOCK // lanes):
        weights = _weights(kernel, values, rows, str(i * lanes), whole=whole)
        for r, weight in enumerate(weights):
            largest = at("most", str(r * lanes), lanes)
            kernel.line(f"{largest} = {f'T.max({largest}, {weight})' if i else weight}")
    for first, count in row_blocks(rows.count):
        own = [at("most", str((first + i) * lanes), lanes) for i in range(count)]
        fold_rows(kernel, own, lanes, "T.max({}, {})", "largest", first)
        _write_steps(kernel, values, rows, first, count)


def _write_block_integers(kernel: Kernel, values: ValueDots, rows: Rows, *, whole: bool) -> None:
    """Fill the integers and zero sums of a block of tokens, some unwanted if not `whole`."""
    kernel.scratch("total", rows.count * values.lanes)
    _write_integers(kernel, values, rows, whole=whole)
    _write_zero_sums(kernel, values, rows)
    for r in range(rows.count):
        place = f"T.truncdiv({first_integer(values, rows, r, 'group')}, {QUAD})"
        values.dots.write_layout(kernel, values.integers, place, f"T.int64({BLOCK // QUAD})")


def _write_steps(kernel: Kernel, values: ValueDots, rows: Rows, first: int, count: int) -> None:
    """Write steps of some rows of the block, and their inverses, from what is largest."""
    most, bits = most_integer(values.dots.bits), values.dots.bits
    largest = at("largest", str(first), count)
    step, inverse = (
        at(name, unit_of(values, rows, first), count) for name in (values.units, values.inverses)
    )
    kernel.line(f"{step} = {largest} * {number(1.0 / most, count)}")
    kernel.line(f"{inverse} = {inverse_of(largest, most, count)}")
    for i in range(values.copies):
        power = number(2.0 ** -(bits * i), count)
        if values.in_place and values.groups > 1:
            plane = f"T.truncdiv(group, T.int64({values.reader.plane // values.reader.group}))"
            exponent = f'T.Cast("int32", 127 - {plane} * {bits})'
            power = splat(bits_as("float32", f"T.shift_left({exponent}, T.int32(23))", 1), count)
        target = at(values.steps, step_of(values, rows, first, "group", i), count)
        kernel.line(f"{target} = {step} * {power}" if values.in_place else f"{target} = {step}")


def _weights(
    kernel: Kernel, values: ValueDots, rows: Rows, first: str, *, whole: bool
) -> list[str]:
    """Bind the weights of each row from token `first` of the block on, a vector of them."""
    lanes, reader = values.lanes, values.reader
    t, place = _place(kernel, first, lanes, whole=whole)
    scale = "" if reader.per_channel else kernel.fresh("scale", reader.scale(t, "group", lanes))
    found = []
    for r in range(rows.count):
        p = at("logits", rows.logit(str(r), f"v_pos + {t}"), lanes)
        weight = f"({p} * {scale})" if scale else p
        found.append(kernel.fresh("weight", _inside(weight, number(0.0, lanes), place)))
    return found


def _place(kernel: Kernel, first: str, lanes: int, *, whole: bool) -> tuple[str, str | None]:
    """Bind token `first` of the block, and where masks need it, all of a vector; return both."""
    t = kernel.fresh("t", f"block * {BLOCK} + {first}")
    if whole:
        return t, None
    return t, kernel.fresh("place", f'T.ramp(T.Cast("int32", {t}), 1, {lanes})')


def _write_integers(kernel: Kernel, values: ValueDots, rows: Rows, *, whole: bool) -> None:
    """Round the block of weights `w`; sum it times zero points to `total`, by lanes."""
    lanes = values.lanes
    for r in range(rows.count):
        kernel.line(f"{at('total', str(r * lanes), lanes)} = {number(0.0, lanes)}")
    count = values.dots.stored_at_once(BLOCK // lanes)
    with kernel.block(f"for part in T.unroll({BLOCK // lanes // count})"):
        vectors = [f"part * {count * lanes} + {i * lanes}" for i in range(count)]
        zeros = [_zero(kernel, values, first, whole=whole) for first in vectors]
        weights = [_weights(kernel, values, rows, first, whole=whole) for first in vectors]
        for r in range(rows.count):
            total, numbers = at("total", str(r * lanes), lanes), []
            inverse = splat(f"{values.inverses}[{unit_of(values, rows, r)}]", lanes)
            for own, zero in zip(weights, zeros, strict=True):
                n = kernel.fresh("n", rint(f"{own[r]} * {inverse}", lanes))
                kernel.line(f"{total} = {fma(n, zero, total)}")
                numbers.append(n)
            target = f"{first_integer(values, rows, r, 'group')} + part * {count * lanes}"
            values.dots.store(kernel, values.integers, target, numbers, lanes)


def _zero(kernel: Kernel, values: ValueDots, first: str, *, whole: bool) -> str:
    """Bind what the rounded weights of a vector of tokens meet: zero points in codes, or ones."""
    lanes, reader = values.lanes, values.reader
    t, place = _place(kernel, first, lanes, whole=whole)
    ratio = number(1.0, lanes)
    if not reader.per_channel:
        scale = kernel.fresh("scale", reader.scale(t, "group", lanes))
        ratio = reader.zero_by_scale(t, "group", lanes, scale)
    return kernel.fresh("zero", _inside(ratio, number(0.0, lanes), place))


def _write_zero_sums(kernel: Kernel, values: ValueDots, rows: Rows) -> None:
    """Keep the sums `total` of the block, scaled."""
    lanes = values.lanes
    if values.reader.per_channel:
        kernel.scratch("largest", rows.count + 4)
        for first, count in row_blocks(rows.count):
            own = [at("total", str((first + i) * lanes), lanes) for i in range(count)]
            fold_rows(kernel, own, lanes, "({} + {})", "largest", first)
            zeros = at(values.zeros, zero_sum_of(values, rows, first), count)
            total, step = at("largest", str(first), count), unit_of(values, rows, first)
            kernel.line(f"{zeros} = {total} * {at(values.units, step, count)}")
        return
    for r in range(rows.count):
        place = f"({rows.of_item(str(r))} * {values.groups} + group) * {lanes}"
        zeros, total = at(values.zeros, place, lanes), at("total", str(r * lanes), lanes)
        step = splat(f"{values.units}[{unit_of(values, rows, r)}]", lanes)
        kernel.line(f"{zeros} = {fma(total, step, zeros)}")


def _inside(value: str, other: str, place: str | None) -> str:
    """Return value in the lanes of wanted tokens, other elsewhere; without places in all."""
    if place is None:
        return value
    return f"T.Select({place} >= place0, T.Select({place} < place1, {value}, {other}), {other})"


def step_of(values: ValueDots, rows: Rows, r: int, group: str, i: int) -> str:
    """Return where the step of the present block is, for a group, plane and row; rows are last."""
    copy = i if values.copies > 1 else 0
    place = f"({group} * {values.blocks} + block) * {values.copies} + {copy}"
    return f"({place}) * {values.rows * values.heads} + {values.row(rows, r)}"


def unit_of(values: ValueDots, rows: Rows, r: int) -> str:
    """Return where the unit of the present block and group is, and its inverse; rows are last."""
    if not values.apart:
        return str(r)
    place = f"(group * {values.blocks} + block)"
    return f"{place} * {values.rows * values.heads} + {values.row(rows, r)}"


def zero_sum_of(values: ValueDots, rows: Rows, r: int) -> str:
    """Return where the sum of the present block's rounded weights is; rows are last."""
    return f"block * {values.rows * values.heads} + {values.row(rows, r)}"


def first_integer(values: ValueDots, rows: Rows, r: int, group: str) -> str:
    """Return where the integers of the present block are, for a row and a group."""
    place = f"({values.row(rows, r)} * {values.groups} + {group}) * {values.blocks} + block"
    return f"({place}) * {BLOCK}"
