"""The softmax of one split: logits become exp(s - max), with the maximum and the sum kept."""

from __future__ import annotations

from dataclasses import dataclass

from .cpu_math import NEGATIVE, write_exp, write_softcap
from .cpu_rows import PAD
from .cpu_text import Kernel, at, fold, number, splat


@dataclass(frozen=True, slots=True)
class Softmax:
    """The rows of an item and how they are done.

    Attributes:
        rows: text of their number.
        stride: logits of the scratch for each row.
        softcap: bound of the logits, or None.
        lanes: positions at once, at most PAD.
        alike: whether all rows see what the item sees.
    """

    rows: str
    stride: int
    softcap: float | None
    lanes: int
    alike: bool

    @property
    def masks(self) -> bool:
        """Whether vectors are masked; where all rows see the same, logits beside are, once."""
        return not self.alike or self.softcap is not None

    def place(self, step: str) -> str:
        """Return where step number `step` of row r begins in the scratch."""
        return f"r * {self.stride} + {step} * {self.lanes} + {PAD}"


def write_softmax(kernel: Kernel, of: Softmax, see0: str, see1: str, part: str) -> None:
    """Turn the logits of each row into exp(s - max), 0 outside [see0, see1); keep max and sum.

    Args:
        kernel: where to write; lo, and see0 and see1 of the whole item, are bound.
        of: which rows, and how.
        see0: first position that row r sees.
        see1: end of the positions that row r sees.
        part: where row 0 is in part_max and part_sum.
    """
    lanes = of.lanes
    shift = lanes.bit_length() - 1
    lane = at("lane", "0", lanes)
    kernel.scratch("lane", lanes)
    with kernel.block(f"for r in T.serial({of.rows})"):
        kernel.let("begin", f'T.Cast("int32", {see0} - lo)')
        kernel.let("end", f'T.Cast("int32", {see1} - lo)')
        kernel.let("step0", f'T.shift_right(T.Cast("int32", see0 - lo), {shift})')
        kernel.let("step1", f'T.shift_right(T.Cast("int32", see1 - lo) + {lanes - 1}, {shift})')
        kernel.line(f"{lane} = {splat(NEGATIVE, lanes)}")
        if not of.masks:
            _write_edges(kernel, of)
        _write_largest(kernel, of, lane)
        fold(kernel, "lane", lanes, "T.max({}, {})")
        kernel.let("largest", "lane[0]")
        # A row that sees nothing has -inf; -inf - (-inf) would be NaN.
        kernel.let("top", f"T.Select(largest == {NEGATIVE}, {number(0.0)}, largest)")
        kernel.line(f"{lane} = {number(0.0, lanes)}")
        with kernel.block("for step in T.serial(step0, step1)"):
            target = at("logits", of.place("step"), lanes)
            kernel.let("x", f"{target} - {splat('top', lanes)}")
            write_exp(kernel, "x", "y", lanes)
            kernel.line(f"{target} = y")
            kernel.line(f"{lane} = {lane} + y")
        fold(kernel, "lane", lanes, "({} + {})")
        kernel.line(f"part_max[{part} + r] = largest")
        kernel.line(f"part_sum[{part} + r] = lane[0]")


def _write_edges(kernel: Kernel, of: Softmax) -> None:
    """Mask the logits beside [begin, end) that share a vector with one inside."""
    first, last = f"step0 * {of.lanes}", f"step1 * {of.lanes}"
    for low, high in ((first, "begin"), ("end", last)):
        with kernel.block(f"for i in T.serial({low}, {high})"):
            kernel.line(f"logits[r * {of.stride} + i + {PAD}] = {NEGATIVE}")


def _write_largest(kernel: Kernel, of: Softmax, lane: str) -> None:
    """Find the maximum by lanes; write capped and masked logits back."""
    lanes, value = of.lanes, "s"
    with kernel.block("for step in T.serial(step0, step1)"):
        target = at("logits", of.place("step"), lanes)
        kernel.let("s", target)
        if of.softcap is not None:
            write_softcap(kernel, "s", "capped", of.softcap, lanes)
            value = "capped"
        if of.masks:
            none = splat(NEGATIVE, lanes)
            kernel.let("place", f"T.ramp(step * {lanes}, 1, {lanes})")
            below = f"T.Select(place < {splat('end', lanes)}, {value}, {none})"
            kernel.let("x", f"T.Select(place >= {splat('begin', lanes)}, {below}, {none})")
            kernel.line(f"{target} = x")
            value = "x"
        kernel.line(f"{lane} = T.max({lane}, {value})")
