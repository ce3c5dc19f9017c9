"""exp, tanh and log without a library, and the softmax of one split.

exp: x = n ln 2 + r, |r| <= ln 2 / 2, a polynomial of degree 6 in r, times 2^n; within 1.1 units in
the last place. tanh: an odd polynomial below 0.6, else 1 - 2 / (exp(2|x|) + 1). The coefficients
are our own Chebyshev fits, rounded to f32.
"""

from __future__ import annotations

from .cpu_regions import PAD
from .cpu_scores import Rows
from .cpu_text import Kernel, at, bits_as, cast, fma, number, pure, rint, splat

EXP = (0.0013934544986113906, 0.008363776840269566, 0.04166645556688309, 0.16666573286056519, 0.5)
TANH = (
    -0.006053697317838669,
    0.020968187600374222,
    -0.053844988346099854,
    0.13332733511924744,
    -0.333333283662796,
)
LOG2_E = 1.4426950408889634
# ln 2 in two parts; the first has few bits, so that n times it is exact.
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
# exp of less is below the smallest normal f32 and counts as zero.
EXP_LEAST = -87.0
NEGATIVE = number(float("-inf"))


def _polynomial(coefficients: tuple[float, ...], x: str, lanes: int) -> str:
    text = number(coefficients[0], lanes)
    for value in coefficients[1:]:
        text = fma(text, x, number(value, lanes))
    return text


def write_exp(kernel: Kernel, x: str, out: str, lanes: int) -> None:
    """Bind `out` to exp of the name `x`; x <= 88; -inf gives 0."""
    kernel.let("e_x", f"T.max({x}, {number(EXP_LEAST, lanes)})")
    kernel.let("e_n", rint(f"e_x * {number(LOG2_E, lanes)}", lanes))
    kernel.let("e_h", fma("e_n", number(-LN2_HIGH, lanes), "e_x"))
    kernel.let("e_r", fma("e_n", number(-LN2_LOW, lanes), "e_h"))
    kernel.let("e_q", _polynomial(EXP, "e_r", lanes))
    kernel.let("e_p", f"{fma('e_q', 'e_r * e_r', 'e_r')} + {number(1.0, lanes)}")
    exponent = f"{cast('int32', 'e_n', lanes)} + {splat('T.int32(127)', lanes)}"
    kernel.let("e_s", f"T.shift_left({exponent}, {splat('T.int32(23)', lanes)})")
    scaled = f"e_p * {bits_as('float32', 'e_s', lanes)}"
    is_zero = f"{x} < {number(EXP_LEAST, lanes)}"
    kernel.let(out, f"T.Select({is_zero}, {number(0.0, lanes)}, {scaled})")


def write_softcap(kernel: Kernel, x: str, out: str, cap: float, lanes: int) -> None:
    """Bind `out` to cap tanh(x / cap) of the name `x`."""
    kernel.let("t_x", f"{x} * {number(1.0 / cap, lanes)}")
    kernel.let("t_a", pure("llvm.fabs", "float32", lanes, "t_x"))
    kernel.let("t_z", "t_x * t_x")
    kernel.let("t_q", _polynomial(TANH, "t_z", lanes))
    kernel.let("t_small", fma("t_q * t_z", "t_x", "t_x"))
    # Beyond 20 the result is 1 in f32; the bound keeps exp finite.
    kernel.let("t_2", f"T.min(t_a, {number(20.0, lanes)}) * {number(2.0, lanes)}")
    write_exp(kernel, "t_2", "t_e", lanes)
    one, two = number(1.0, lanes), number(2.0, lanes)
    kernel.let("t_large", f"{one} - {two} / (t_e + {one})")
    sign = f"T.Select(t_x < {number(0.0, lanes)}, {number(-1.0, lanes)} * t_large, t_large)"
    kernel.let("t_y", f"T.Select(t_a < {number(0.6, lanes)}, t_small, {sign})")
    kernel.let(out, f"t_y * {number(cap, lanes)}")


def write_log(kernel: Kernel, x: str, out: str) -> None:
    """Bind `out` to the natural logarithm, f64, of the f64 scalar name `x` >= 1.

    x = 2^n m with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh(f), f = (m - 1) / (m + 1).
    """
    bits = bits_as("int64", x, 1)
    # Adding the distance from sqrt(1/2) to 1 carries into the exponent exactly where m >= sqrt(2).
    kernel.let("l_b", f"{bits} + T.int64({0x3FF0000000000000 - 0x3FE6A09E667F3BCD})")
    kernel.let("l_n", "T.shift_right(l_b, T.int64(52)) - T.int64(1023)")
    kernel.let("l_m", bits_as("float64", f"{bits} - T.shift_left(l_n, T.int64(52))", 1))
    kernel.let("l_f", "(l_m - T.float64(1.0)) / (l_m + T.float64(1.0))")
    kernel.let("l_z", "l_f * l_f")
    series = number(2.0 / 15.0, 1, "float64")
    for odd in (13, 11, 9, 7, 5, 3, 1):
        series = f"({series} * l_z + {number(2.0 / odd, 1, 'float64')})"
    log2 = number(0.6931471805599453, 1, "float64")
    kernel.let(out, f'T.Cast("float64", l_n) * {log2} + l_f * {series}')


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
