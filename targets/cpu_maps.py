"""Online maps of a head's channels, in f64: Hadamard, gather, scale.

They touch each number once a step, so f64 costs little, and what is stored is the exact result
rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, sqrt

from ..ir.maps import Gather, Hadamard, Map, Scale, argument_name
from .cpu_text import Kernel, at, number

F64 = "float64"
LANES = 8
"""Doubles of one step of a loop, at most: two or four vectors of a machine, or one."""


def write_maps(kernel: Kernel, maps: Sequence[Map], width: int, head: str) -> str:
    """Apply maps to the f64 scratch `y`; `z` is a second one. Return the name of the result.

    Args:
        kernel: where to write.
        maps: first one first.
        width: channels of a head.
        head: text of the KV head.
    """
    here, there = "y", "z"
    lanes = gcd(LANES, width)
    for m in maps:
        match m:
            case Hadamard():
                _write_hadamard(kernel, here, width)
            case Gather(order=name):
                order = f"{argument_name(name, 'order')}[{head} * {width} + c]"
                with kernel.block(f"for c in T.serial({width})"):
                    kernel.line(f"{there}[c] = {here}[{order}]")
                here, there = there, here
            case Scale(values=name, inverse=inverse):
                place, values = f"c * {lanes}", argument_name(name, "scale")
                value = at(values, f"{head} * {width} + {place}", lanes)
                with kernel.block(f"for c in T.serial({width // lanes})"):
                    target = at(here, place, lanes)
                    kernel.line(f"{target} = {target} {'/' if inverse else '*'} {value}")
    return here


def _write_hadamard(kernel: Kernel, buffer: str, width: int) -> None:
    """Write the butterflies of the orthonormal Walsh-Hadamard transform, in place.

    Sums of channels `half` apart, for half = 1, 2, 4, ...: a number goes through them in this order
    whatever is computed at once, so the bits are those of `hadamard_transform`. The first three
    happen among neighbours, inside a vector; of the others, two go through memory at once.
    """
    lanes = min(LANES, width)
    with kernel.block(f"for c in T.serial({width // lanes})"):
        place = at(buffer, f"c * {lanes}", lanes)
        value = kernel.fresh("value", place)
        half = 1
        while half < lanes:
            value = kernel.fresh("value", _neighbours(kernel, value, half, lanes))
            half *= 2
        kernel.line(f"{place} = {value}")
    while half < width:
        stages = 2 if 2 * half < width else 1
        _write_stages(kernel, buffer, width, half, stages)
        half <<= stages
    with kernel.block(f"for c in T.serial({width // lanes})"):
        place = at(buffer, f"c * {lanes}", lanes)
        kernel.line(f"{place} = {place} * {number(1.0 / sqrt(width), lanes, F64)}")


def _neighbours(kernel: Kernel, value: str, half: int, lanes: int) -> str:
    """Return sums and differences of the lanes of a vector that are `half` apart."""
    low = [lane & ~half for lane in range(lanes)]
    first = kernel.fresh("first", f"T.Shuffle([{value}], {low})")
    second = kernel.fresh("second", f"T.Shuffle([{value}], {[lane | half for lane in low]})")
    # Of the sums and the differences, each lane takes its own.
    chosen = [lane + lanes * bool(lane & half) for lane in range(lanes)]
    return f"T.Shuffle([{first} + {second}, {first} - {second}], {chosen})"


def _write_stages(kernel: Kernel, buffer: str, width: int, half: int, stages: int) -> None:
    """Write the sums of channels `half` apart, and with two stages those 2 half apart after it."""
    count, block = 2**stages, half * 2**stages
    with (
        kernel.block(f"for i in T.serial({width // block})"),
        kernel.block(f"for j in T.serial({half // LANES})"),
    ):
        places = [
            at(buffer, f"i * {block} + {n * half} + j * {LANES}", LANES) for n in range(count)
        ]
        values = [kernel.fresh("value", place) for place in places]
        for stage in range(stages):
            for n in [n for n in range(count) if not n >> stage & 1]:
                low, high = values[n], values[n | 1 << stage]
                values[n] = kernel.fresh("sum", f"{low} + {high}")
                values[n | 1 << stage] = kernel.fresh("difference", f"{low} - {high}")
        for place, value in zip(places, values, strict=True):
            kernel.line(f"{place} = {value}")
