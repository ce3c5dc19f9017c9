"""The softmax of one split: logits become exp(s - max), with the maximum and the sum kept."""

from __future__ import annotations

from dataclasses import dataclass

from .cpu_math import LOG2_E, NEGATIVE, write_exp2, write_softcap
from .cpu_rows import PAD
from .cpu_text import Kernel, at, fma, fold_rows, number, splat


@dataclass(frozen=True, slots=True)
class Softmax:
    """The rows of an item and how they are done.

    Attributes:
        rows: text of their number.
        at_once: rows that see the same and are done together: 1, 2 or 4.
        stride: logits of the scratch for each row.
        softcap: bound of the logits, or None.
        lanes: positions at once, at most PAD.
        alike: whether all rows see what the item sees.
        scalef: see `write_exp2`.
    """

    rows: str
    at_once: int
    stride: int
    softcap: float | None
    lanes: int
    alike: bool
    scalef: bool

    @property
    def masks(self) -> bool:
        """Whether vectors are masked; where all rows see the same, logits beside are, once."""
        return not self.alike or self.softcap is not None

    @property
    def target(self) -> str:
        """The vector of logits `step` of row r + i."""
        return at("logits", f"(r + i) * {self.stride} + step * {self.lanes} + {PAD}", self.lanes)

    @property
    def lane(self) -> str:
        """The vector in which row i of those at once is combined."""
        return at("lane", f"i * {self.lanes}", self.lanes)

    @property
    def each(self) -> str:
        """The head of a loop over the rows at once."""
        return f"for i in T.unroll({self.at_once})"


def write_softmax(kernel: Kernel, of: Softmax, see0: str, see1: str, part: str) -> None:
    """Turn the logits of each row into exp(s - max), 0 outside [see0, see1); keep max and sum.

    A few rows go at once: they wait together.

    Args:
        kernel: where to write; lo, and see0 and see1 of the whole item, are bound.
        of: which rows, and how.
        see0: first position that row r sees.
        see1: end of the positions that row r sees.
        part: where row 0 is in part_max and part_sum.
    """
    lanes, count = of.lanes, of.at_once
    shift = lanes.bit_length() - 1
    kernel.scratch("lane", count * lanes)
    for name in ("largest", "shift", "total"):
        kernel.scratch(name, 4)
    rows = [at("lane", str(i * lanes), lanes) for i in range(count)]
    with kernel.block(f"for rows in T.serial(T.truncdiv({of.rows}, {count}))"):
        kernel.let("r", f"rows * {count}")
        kernel.let("begin", f'T.Cast("int32", {see0} - lo)')
        kernel.let("end", f'T.Cast("int32", {see1} - lo)')
        kernel.let("step0", f'T.shift_right(T.Cast("int32", see0 - lo), {shift})')
        kernel.let("step1", f'T.shift_right(T.Cast("int32", see1 - lo) + {lanes - 1}, {shift})')
        if not of.masks:
            _write_edges(kernel, of)
        _write_largest(kernel, of)
        fold_rows(kernel, rows, lanes, "T.max({}, {})", "largest")
        largest = at("largest", "0", count)
        kernel.line(f"{at('part_max', f'{part} + r', count)} = {largest}")
        # A row that sees nothing has -inf; -inf - (-inf) would be NaN.
        none = splat(NEGATIVE, count)
        kernel.let("top", f"T.Select({largest} == {none}, {number(0.0, count)}, {largest})")
        kernel.line(f"{at('shift', '0', count)} = top * {number(-LOG2_E, count)}")
        _write_powers(kernel, of)
        fold_rows(kernel, rows, lanes, "({} + {})", "total")
        kernel.line(f"{at('part_sum', f'{part} + r', count)} = {at('total', '0', count)}")


def _write_powers(kernel: Kernel, of: Softmax) -> None:
    """Turn logits into exp(s - max) = 2^(s log2(e) - max log2(e)); sum them by lanes."""
    lanes = of.lanes
    with kernel.block(of.each):
        kernel.line(f"{of.lane} = {number(0.0, lanes)}")
    with kernel.block("for step in T.serial(step0, step1)"), kernel.block(of.each):
        kernel.let("x", fma(of.target, number(LOG2_E, lanes), splat("shift[i]", lanes)))
        write_exp2(kernel, "x", "y", lanes, scalef=of.scalef)
        kernel.line(f"{of.target} = y")
        kernel.line(f"{of.lane} = {of.lane} + y")


def _write_edges(kernel: Kernel, of: Softmax) -> None:
    """Mask the logits beside [begin, end) that share a vector with one inside."""
    first, last = f"step0 * {of.lanes}", f"step1 * {of.lanes}"
    for low, high in ((first, "begin"), ("end", last)):
        with kernel.block(f"for j in T.serial({low}, {high})"), kernel.block(of.each):
            kernel.line(f"logits[(r + i) * {of.stride} + j + {PAD}] = {NEGATIVE}")


def _write_largest(kernel: Kernel, of: Softmax) -> None:
    """Find the maxima by lanes; write capped and masked logits back."""
    lanes, value = of.lanes, "s"
    with kernel.block(of.each):
        kernel.line(f"{of.lane} = {splat(NEGATIVE, lanes)}")
    with kernel.block("for step in T.serial(step0, step1)"), kernel.block(of.each):
        kernel.let("s", of.target)
        if of.softcap is not None:
            write_softcap(kernel, "s", "capped", of.softcap, lanes)
            value = "capped"
        if of.masks:
            none = splat(NEGATIVE, lanes)
            kernel.let("place", f"T.ramp(step * {lanes}, 1, {lanes})")
            below = f"T.Select(place < {splat('end', lanes)}, {value}, {none})"
            kernel.let("x", f"T.Select(place >= {splat('begin', lanes)}, {below}, {none})")
            kernel.line(f"{of.target} = x")
            value = "x"
        kernel.line(f"{of.lane} = T.max({of.lane}, {value})")
