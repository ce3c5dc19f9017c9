"""Outputs of integer dot products, for values in token quads: a lane of a vector is a channel.

    n[r, t], a     integers of a block of 32 tokens, and their step: see `cpu_weights_int.py`
    o[r, c] += a sum_t n code  (+ zero points: a sum_t n z_t / s_t)            scales of tokens
    o[r, c] += a (s_c sum_t n code + z_c sum_t n)                              scales of channels

Weights of tokens that are not wanted are zero, and codes are finite whatever the bytes, so nothing
that lies past the end gets into a sum. What is rounded: `ir/integers.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from ..ir.arrangements import QUAD
from ..ir.integers import BLOCK
from .cpu_dots import Add
from .cpu_regions import Asks
from .cpu_rows import Rows
from .cpu_scores_int import write_plane, write_quads
from .cpu_text import (
    Kernel,
    at,
    cast,
    fma,
    splat,
)
from .cpu_weights_int import (
    MOST_OUTPUTS,
    ValueDots,
    each_block,
    first_integer,
    step_of,
    write_page_steps_int,
    write_page_weights_int,
    zero_sum_of,
)


@dataclass(frozen=True, slots=True)
class Sum:
    """One of the sums at once: of which row, and of which vector of channels in which plane."""

    row: int
    plane: int
    vector: int


def write_page_values_int(kernel: Kernel, values: ValueDots, rows: Rows) -> None:
    """Add the values of the present page to a block of rows."""
    reader = values.reader
    if values.heads == 1:
        write_page_steps_int(kernel, values, rows)
        write_page_weights_int(kernel, values, rows)
    most = values.planes_at_once(rows.count)
    for plane in range(0, reader.planes, most):
        planes = range(plane, min(plane + most, reader.planes))
        side = values.side(rows.count)
        tiles = reader.plane // values.dots.lanes // side
        each_place = f"for u in T.serial(T.int64({tiles}))"
        sums = [Sum(r, i, j) for i in planes for j in range(side) for r in range(rows.count)]
        if len(sums) > MOST_OUTPUTS:
            with kernel.block(each_block()), kernel.block(each_place):
                outputs = [_output(values, rows, own) for own in sums]
                _write_tile(kernel, values, rows, sums, outputs, f"(block * {tiles} + u)")
            continue
        with kernel.block(each_place):
            lanes = values.dots.lanes
            kept = [at("out", str(n * lanes), lanes) for n in range(len(sums))]
            kernel.scratch("out", len(sums) * lanes)
            for own, out in zip(sums, kept, strict=True):
                kernel.line(f"{out} = {_output(values, rows, own)}")
            with kernel.block(each_block()):
                _write_tile(kernel, values, rows, sums, kept, f"(u * {values.blocks} + block)")
            for own, out in zip(sums, kept, strict=True):
                kernel.line(f"{_output(values, rows, own)} = {out}")


def _write_tile(
    kernel: Kernel, values: ValueDots, rows: Rows, sums: list[Sum], outputs: list[str], tile: str
) -> None:
    """Add a block to outputs.

    Args:
        kernel: where to write.
        values: of what.
        rows: of the outputs.
        sums: what is summed, the rows of one vector one after another.
        outputs: where each of the sums goes.
        tile: text of the number of this block and place among all.
    """
    reader, dots, side = values.reader, values.dots, values.side(rows.count)
    planes = sorted({own.plane for own in sums})
    for i, j in product(planes, range(side)):
        kernel.let(f"group{i}_{j}", _group(values, i, j, side))
    tiles = reader.plane // dots.lanes // side
    asks = Asks(reader, tiles * values.blocks, BLOCK // QUAD, not values.early)
    first_time = 0 in planes and rows.first == "0"
    if first_time:
        asks.write_tile(kernel, tile)
    dots.declare_sums(kernel, len(sums))
    dots.write_zeros(kernel, len(sums))

    def step(s: str, add: Add) -> None:
        if first_time:
            asks.write_step(kernel, tile, s)
        row = f"(block * {BLOCK} + {s} * {QUAD})"
        operands = {}
        for j in range(side):
            bytes_of = write_quads(kernel, reader, row, _place(values, j, side), dots.lanes)
            for i in planes:
                operands[i, j] = write_plane(
                    kernel, reader, bytes_of, i, dots, in_place=values.in_place
                )
        for n, own in enumerate(sums):
            group = f"group{own.plane}_{own.vector}"
            first = f"T.truncdiv({first_integer(values, rows, own.row, group)}, {QUAD})"
            for half, operand in enumerate(operands[own.plane, own.vector]):
                add(n, half, operand, first)

    dots.write_sums(kernel, values.integers, len(sums), BLOCK // QUAD, 1, step)
    for first in range(0, len(sums), rows.count):
        own = outputs[first : first + rows.count]
        _write_scaled(kernel, values, rows, sums[first], first, own)


def _output(values: ValueDots, rows: Rows, own: Sum) -> str:
    """Return the outputs that a sum is added to."""
    place = _channel(values, own, values.side(rows.count))
    row = f"o_base + ({rows.first} + {own.row}) * {rows.channels}"
    return at("part_out", f"{row} + {values.reader.channel(place)}", values.dots.lanes)


def _channel(values: ValueDots, own: Sum, side: int) -> str:
    """Return the first channel of a sum."""
    return f"{own.plane * values.reader.plane} + {_place(values, own.vector, side)}"


def _place(values: ValueDots, j: int, side: int) -> str:
    """Return the first channel in its plane of vector j of those at once."""
    lanes = values.dots.lanes
    return f"u * {lanes}" if side == 1 else f"(u * {side * lanes} + {j * lanes})"


def _group(values: ValueDots, i: int, j: int, side: int) -> str:
    """Return the group of scales of the channels of vector j in plane i."""
    if values.groups == 1:
        return "T.int64(0)"
    reader = values.reader
    if reader.group % (side * values.dots.lanes) == 0:
        j = 0  # and so it is seen that weights are shared
    return f"T.truncdiv({i * reader.plane} + {_place(values, j, side)}, T.int64({reader.group}))"


def _write_scaled(
    kernel: Kernel, values: ValueDots, rows: Rows, own: Sum, first: int, outputs: list[str]
) -> None:
    """Add the sums of one block and vector to the outputs, scaled; with zero points of channels.

    Args:
        kernel: where to write.
        values: of what.
        rows: whose sums these are, one after another.
        own: the first of them.
        first: its number.
        outputs: those of each row.
    """
    reader, lanes, i = values.reader, values.dots.lanes, own.plane
    place = _channel(values, own, values.side(rows.count))
    scale = zero = ""
    if reader.per_channel:
        group = f"T.truncdiv(block * {BLOCK}, T.int64({reader.format.group_tokens}))"
        scale = kernel.fresh("scale", reader.scale(group, place, lanes))
        zero = kernel.fresh("zero", reader.zero(group, place, lanes, scale))
    for r, out in enumerate(outputs):
        total = cast("float32", values.dots.sum(first + r), lanes)
        index = step_of(values, rows, r, f"group{i}_{own.vector}", i)
        step = splat(f"{values.steps}[{index}]", lanes)
        if reader.per_channel:
            zeros = splat(f"{values.zeros}[{zero_sum_of(values, rows, r)}]", lanes)
            kernel.line(f"{out} = {fma(f'{total} * {step}', scale, fma(zeros, zero, out))}")
        else:
            kernel.line(f"{out} = {fma(total, step, out)}")
