"""Online maps of a head's channels, in f64: Hadamard, gather, scale.

They touch each number once a step, so f64 costs little, and what is stored is the exact result
rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

from ..ir.maps import Gather, Hadamard, Map, Scale, argument_name
from .cpu_text import Kernel, at, number


def write_maps(kernel: Kernel, maps: Sequence[Map], width: int, head: str) -> str:
    """Apply maps to the f64 scratch `y`; `z` is a second one. Return the name of the result.

    Args:
        kernel: where to write.
        maps: first one first.
        width: channels of a head.
        head: text of the KV head.
    """
    here, there = "y", "z"
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
                value = f"{argument_name(name, 'scale')}[{head} * {width} + c]"
                with kernel.block(f"for c in T.serial({width})"):
                    kernel.line(f"{here}[c] = {here}[c] {'/' if inverse else '*'} {value}")
    return here


def _write_hadamard(kernel: Kernel, buffer: str, width: int) -> None:
    """Write the butterflies of the orthonormal Walsh-Hadamard transform, in place."""
    half = 1
    while half < width:
        lanes = min(half, 4)
        with (
            kernel.block(f"for i in T.serial({width // (2 * half)})"),
            kernel.block(f"for j in T.serial({half // lanes})"),
        ):
            low = at(buffer, f"i * {2 * half} + j * {lanes}", lanes)
            high = at(buffer, f"i * {2 * half} + {half} + j * {lanes}", lanes)
            kernel.let("low", low)
            kernel.let("high", high)
            kernel.line(f"{low} = low + high")
            kernel.line(f"{high} = low - high")
        half *= 2
    with kernel.block(f"for c in T.serial({width})"):
        kernel.line(f"{buffer}[c] = {buffer}[c] * {number(1.0 / sqrt(width), 1, 'float64')}")
