"""The kernel append of one stream: online maps, then sink or tail. Refuses before it stores.

It runs in two passes over the same numbers: the first one only looks for what is not finite (after
the maps, and after rounding to the raw type), the second one stores. With a bad number nothing is
stored.
"""

from __future__ import annotations

from ..ir.plan import StreamPlan
from .cpu_maps import constant_arguments, write_maps
from .cpu_text import Kernel, bits_as, number


def append(stream: StreamPlan) -> Kernel:
    """Return the kernel that stores x [B, H, T, D] as the next positions of each row.

    `bad[b * H + h]` becomes 1 + the first token that is not finite, or stays 0.
    """
    kernel, role, heads = Kernel(f"append_{stream.role}"), stream.role, stream.heads
    kernel.array("x", "float32")
    for name in ("first", "count", f"{role}_length"):
        kernel.array(name, "int64")
    if stream.tokens.sink:
        kernel.array(f"{role}_sink", "float32")
    kernel.array(f"{role}_tail", "float32")
    kernel.array(f"{role}_tail_first", "int64")
    kernel.array("bad", "int64")
    constant_arguments(kernel, stream.maps)
    for name in ("batch", "tokens", f"{role}_capacity"):
        kernel.scalar(name)
    kernel.scratch("flag", 1, "int64")
    for store in (False, True):
        if store:
            _write_flag(kernel, heads)
        with kernel.block(f"for bh in T.parallel(batch * {heads})"):
            kernel.let("b", f"T.truncdiv(bh, T.int64({heads}))")
            kernel.let("h", f"T.truncmod(bh, T.int64({heads}))")
            kernel.scratch("y", stream.channels, "float64")
            kernel.scratch("z", stream.channels, "float64")
            if not store:
                kernel.line("bad[bh] = T.int64(0)")
            guard = "T.Select(flag[0] > 0, T.int64(0), count[b])" if store else "count[b]"
            with kernel.block(f"for t in T.serial({guard})"):
                _write_token(kernel, stream, store=store)
    return kernel


def _write_flag(kernel: Kernel, heads: int) -> None:
    kernel.line("flag[0] = T.int64(0)")
    with kernel.block(f"for i in T.serial(batch * {heads})"):
        kernel.line("flag[0] = T.max(flag[0], bad[i])")


def _write_token(kernel: Kernel, stream: StreamPlan, *, store: bool) -> None:
    role, width, sink = stream.role, stream.channels, stream.tokens.sink
    with kernel.block(f"for c in T.serial({width})"):
        kernel.line(f'y[c] = T.Cast("float64", x[(bh * tokens + first[b] + t) * {width} + c])')
    y = write_maps(kernel, stream.maps, width, "h")
    stored = rounded(f'T.Cast("float32", {y}[c])', stream.tokens.raw.dtype)
    if not store:
        with kernel.block(f"for c in T.serial({width})"):
            kernel.let("value", stored)
            # False for NaN too.
            finite = f"T.abs(value) <= {number(3.4028234663852886e38)}"
            first = "T.Select(bad[bh] == T.int64(0), t + 1, bad[bh])"
            kernel.line(f"bad[bh] = T.Select({finite}, bad[bh], {first})")
        return
    kernel.let("position", f"{role}_length[b] + t")
    slot = f"(bh * {role}_capacity + position - {role}_tail_first[b]) * {width} + c"
    if not sink:
        with kernel.block(f"for c in T.serial({width})"):
            kernel.line(f"{role}_tail[{slot}] = {stored}")
        return
    with kernel.block(f"if position < {sink}"), kernel.block(f"for c in T.serial({width})"):
        kernel.line(f"{role}_sink[(bh * {sink} + position) * {width} + c] = {stored}")
    with kernel.block("else"), kernel.block(f"for c in T.serial({width})"):
        kernel.line(f"{role}_tail[{slot}] = {stored}")


def rounded(value: str, dtype: str) -> str:
    """Return an f32 scalar rounded to f16 or bf16, to nearest even, as f32."""
    if dtype == "f16":
        return f'T.Cast("float32", T.Cast("float16", {value}))'
    if dtype == "bf16":
        return bits_as("float32", f"T.shift_left({bf16_bits(value)}, T.uint32(16))", 1)
    return value


def bf16_bits(value: str) -> str:
    """Return the bfloat16 bits of an f32 scalar, as u32; NaN is not looked after."""
    bits = bits_as("uint32", value, 1)
    odd = f"T.bitwise_and(T.shift_right({bits}, T.uint32(16)), T.uint32(1))"
    return f"T.shift_right({bits} + T.uint32(32767) + {odd}, T.uint32(16))"
