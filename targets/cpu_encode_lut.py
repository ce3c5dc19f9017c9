"""Encoding into a table: scales and codes of `Lut`, with the bits of `ir/encodings/lut.py`.

Scales are made in float64. A threshold of a scale in f16 or bf16 has at most 19 bits, so there f32
compares as exactly, twice as many numbers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

from ..ir.encodings import Lut
from ..ir.encodings.lut import PARTS
from .cpu_pages import PageReader
from .cpu_text import Kernel, at, cast, fold, number, pure, rint, splat

F64 = "float64"


def write_lut(
    kernel: Kernel,
    reader: PageReader,
    fmt: Lut,
    tail: Callable[[str, int], str],
    write_scale: Callable[[str, str], str],
) -> None:
    """Write scale and codes of each group of the token at t.

    Args:
        kernel: where to write.
        reader: of the channels.
        fmt: how they are stored.
        tail: (offset, lanes) -> their values, f32.
        write_scale: (column, f64) -> the name of the scale that it stored, f32.
    """
    lanes = gcd(8, fmt.group)
    steps = f"for e in T.serial({fmt.group // lanes})"
    if fmt.sigmas is not None:
        kernel.scratch("squares", lanes, F64)
    with kernel.block(f"for g in T.serial({reader.groups})"):
        place = f"g * {fmt.group} + e * {lanes}"
        most = at("limits", "0", lanes)
        kernel.line(f"{most} = {number(0.0, lanes)}")
        with kernel.block(steps):
            size = pure("llvm.fabs", "float32", lanes, tail(place, lanes))
            kernel.line(f"{most} = T.max({most}, {size})")
        fold(kernel, "limits", lanes, "T.max({}, {})")
        kernel.let("largest", cast(F64, "limits[0]", 1))
        if fmt.sigmas is None:
            wanted = f"largest / T.float64({fmt.most})"
        else:
            wanted = _write_mean(kernel, fmt, fmt.sigmas, steps, lambda n: tail(place, n))
        exact = F64 if fmt.params == "f32" else "float32"
        kernel.let("scale", cast(exact, write_scale("g", wanted), 1))
        for i, middle in enumerate(fmt.middles):
            kernel.let(f"above{i}", f"scale * {number(middle, 1, exact)}")
        with kernel.block(steps):
            kernel.let("value", cast(exact, tail(place, lanes), lanes))
            kernel.line(f"{at('codes', place, lanes)} = {_code(fmt, lanes)}")


def _write_mean(
    kernel: Kernel, fmt: Lut, sigmas: float, steps: str, values: Callable[[int], str]
) -> str:
    """Sum the squares of a group in parts of its largest value; return the wanted scale."""
    lanes = gcd(8, fmt.group)
    squares = at("squares", "0", lanes)
    kernel.let("part", f"largest / {number(PARTS, 1, F64)}")
    zero, one = number(0.0, 1, F64), number(1.0, 1, F64)
    kernel.let("unit", f"T.Select(part > {zero}, part, {one})")
    kernel.line(f"{squares} = {number(0.0, lanes, F64)}")
    with kernel.block(steps):
        whole = rint(f"{cast(F64, values(lanes), lanes)} / {splat('unit', lanes)}", lanes, F64)
        kernel.let("whole", whole)
        kernel.line(f"{squares} = {squares} + whole * whole")
    fold(kernel, "squares", lanes, "({} + {})")
    mean = f"squares[0] / {number(float(fmt.group), 1, F64)}"
    return f"part * {pure('llvm.sqrt', F64, 1, mean)} * {number(sigmas / fmt.most, 1, F64)}"


def _code(fmt: Lut, lanes: int) -> str:
    """Return how many thresholds are below each lane of `value`."""
    one, none = (splat(f"T.int32({n})", lanes) for n in (1, 0))
    counts = [
        f"T.Select(value > {splat(f'above{i}', lanes)}, {one}, {none})"
        for i in range(len(fmt.middles))
    ]
    return cast("uint8", f"({' + '.join(counts)})", lanes)
