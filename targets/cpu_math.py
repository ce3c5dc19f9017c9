"""exp, tanh and log in vectors, without a library.

exp: x = n ln 2 + r, |r| <= ln 2 / 2, a polynomial of degree 6 in r, times 2^n; within 1.1 units in
the last place. 2^x: x = n + r, a polynomial of degree 5; within 1.4. tanh: an odd polynomial below
0.6, else 1 - 2 / (exp(2|x|) + 1). The coefficients are our own fits, rounded to f32.
"""

from __future__ import annotations

from .cpu_text import Kernel, bits_as, cast, fma, number, pure, rint, splat

EXP = (0.0013934544986113906, 0.008363776840269566, 0.04166645556688309, 0.16666573286056519, 0.5)
EXP2 = (
    0.001326472731307149,
    0.009671512991189957,
    0.05550733581185341,
    0.24022242426872253,
    0.6931470036506653,
    1.0,
)
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
# Powers of two below this one count as zero, so that what is left of n fits the exponent.
EXP2_LEAST = -125.0
# 2^x of less is zero when it is rounded to f32, subnormal numbers included.
EXP2_NOTHING = -152.0
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


def write_exp2(kernel: Kernel, x: str, out: str, lanes: int, *, scalef: bool = False) -> None:
    """Bind `out` to 2^x of the name `x`; x <= 120; -inf gives 0.

    Args:
        kernel: where to write.
        x: f32.
        out: name.
        lanes: of both.
        scalef: whether sixteen lanes are scaled by powers of two in one instruction (AVX-512).
    """
    kernel.let("e_x", f"T.max({x}, {number(EXP2_NOTHING if scalef else EXP2_LEAST, lanes)})")
    kernel.let("e_n", rint("e_x", lanes))
    kernel.let("e_r", "e_x - e_n")
    kernel.let("e_p", _polynomial(EXP2, "e_r", lanes))
    if scalef:
        mask, mode = "T.int16(-1)", "T.int32(4)"  # every lane; rounded as everything is
        arguments = "e_p", "e_n", number(0.0, lanes), mask, mode
        kernel.let(
            out, pure(f"llvm.x86.avx512.mask.scalef.ps.{32 * lanes}", "float32", lanes, *arguments)
        )
        return
    whole = cast("int32", "e_n", lanes)
    kernel.let("e_s", f"T.shift_left({whole}, {splat('T.int32(23)', lanes)})")
    scaled = bits_as("float32", f"{bits_as('int32', 'e_p', lanes)} + e_s", lanes)
    is_zero = f"{x} < {number(EXP2_LEAST, lanes)}"
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
