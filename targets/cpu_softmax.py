"""The softmax of one split: logits become exp(s - max), with the maximum and the sum kept."""

from __future__ import annotations

from .cpu_math import NEGATIVE, write_exp, write_softcap
from .cpu_rows import PAD, Rows
from .cpu_text import Kernel, at, number, splat


def write_softmax(
    kernel: Kernel, rows: Rows, see0: str, see1: str, softcap: float | None, part: str
) -> None:
    """Turn the logits of each row into exp(s - max), 0 outside [see0, see1); keep max and sum.

    Args:
        kernel: where to write; lo, and see0 and see1 of the whole item, are bound.
        rows: all rows.
        see0: first position that row r sees.
        see1: end of the positions that row r sees.
        softcap: bound of the logits, or None.
        part: where row 0 is in part_max and part_sum.
    """
    kernel.scratch("lane", 16)
    with kernel.block(f"for r in T.serial({rows.count})"):
        kernel.let("begin", f'T.Cast("int32", {see0} - lo)')
        kernel.let("end", f'T.Cast("int32", {see1} - lo)')
        kernel.let("step0", 'T.shift_right(T.Cast("int32", see0 - lo), 3)')
        kernel.let("step1", 'T.shift_right(T.Cast("int32", see1 - lo) + 7, 3)')
        kernel.line(f"{at('lane', '0', 8)} = {splat(NEGATIVE, 8)}")
        _write_largest(kernel, rows, softcap)
        _fold(kernel, "T.max({}, {})")
        kernel.let("largest", "lane[0]")
        # A row that sees nothing has -inf; -inf - (-inf) would be NaN.
        kernel.let("top", f"T.Select(largest == {NEGATIVE}, {number(0.0)}, largest)")
        kernel.line(f"{at('lane', '0', 8)} = {number(0.0, 8)}")
        with kernel.block("for step in T.serial(step0, step1)"):
            target = at("logits", f"r * {rows.stride} + step * 8 + {PAD}", 8)
            kernel.let("x", f"{target} - {splat('top', 8)}")
            write_exp(kernel, "x", "y", 8)
            kernel.line(f"{target} = y")
            kernel.line(f"{at('lane', '0', 8)} = {at('lane', '0', 8)} + y")
        _fold(kernel, "({} + {})")
        kernel.line(f"part_max[{part} + r] = largest")
        kernel.line(f"part_sum[{part} + r] = lane[0]")


def _write_largest(kernel: Kernel, rows: Rows, softcap: float | None) -> None:
    """Write the masked (and capped) logits back, and their maximum by lanes."""
    with kernel.block("for step in T.serial(step0, step1)"):
        target = at("logits", f"r * {rows.stride} + step * 8 + {PAD}", 8)
        kernel.let("s", target)
        if softcap is not None:
            write_softcap(kernel, "s", "capped", softcap, 8)
        kernel.let("place", "T.ramp(step * 8, 1, 8)")
        value, none = "s" if softcap is None else "capped", splat(NEGATIVE, 8)
        below = f"T.Select(place < {splat('end', 8)}, {value}, {none})"
        kernel.let("x", f"T.Select(place >= {splat('begin', 8)}, {below}, {none})")
        kernel.line(f"{target} = x")
        kernel.line(f"{at('lane', '0', 8)} = T.max({at('lane', '0', 8)}, x)")


def _fold(kernel: Kernel, combine: str) -> None:
    """Reduce the eight lanes of `lane` into lane[0]."""
    for half in (4, 2, 1):
        for i in range(half):
            kernel.line(f"lane[{i}] = {combine.format(f'lane[{i}]', f'lane[{i + half}]')}")
