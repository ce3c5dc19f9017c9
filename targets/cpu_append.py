"""The kernel append of one stream: online maps, then sink or tail. Refuses before it stores.

It runs in two passes over the same numbers: the first one only looks for what is not finite (after
the maps, and after rounding to the raw type), the second one stores. With a bad number nothing is
stored.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import gcd

from ..ir.plan import StreamPlan
from .cpu_maps import write_maps
from .cpu_text import Kernel, at, bits_as, cast, rounded, splat
from .kernel_text import append_arguments


def append(stream: StreamPlan) -> Kernel:
    """Return the kernel that stores x [B, H, T, D] as the next positions of each row.

    `bad[b * H + h]` becomes 1 + the first token that is not finite, or stays 0.
    """
    kernel, role, heads = Kernel(f"append_{stream.role}"), stream.role, stream.heads
    append_arguments(kernel, stream)
    for name in ("batch", "tokens", f"{role}_capacity"):
        kernel.scalar(name)
    kernel.scratch("flag", 1, "int64")
    for store in (False, True):
        if store:
            _write_flag(kernel, heads)
        with kernel.block(f"for bh in T.parallel(batch * {heads})"):
            kernel.let("mark", "bh")
            guard = "T.Select(flag[0] > 0, T.int64(0), count[b])" if store else "count[b]"
            write_tokens(kernel, stream, "x", guard, check=not store, store=store)
    return kernel


def write_tokens(
    kernel: Kernel, stream: StreamPlan, x: str, count: str, *, check: bool, store: bool
) -> None:
    """Check or store the first `count` new tokens of head bh; `bad[mark]` takes what is found."""
    heads = stream.heads
    kernel.let("b", f"T.truncdiv(bh, T.int64({heads}))")
    kernel.let("h", f"T.truncmod(bh, T.int64({heads}))")
    kernel.scratch("y", stream.channels, "float64")
    kernel.scratch("z", stream.channels, "float64")
    kernel.scratch("largest", 8, "int32")
    if check:
        kernel.line("bad[mark] = T.int64(0)")
    with kernel.block(f"for t in T.serial({count})"):
        _write_token(kernel, stream, x, check=check, store=store)


def _write_flag(kernel: Kernel, heads: int) -> None:
    kernel.line("flag[0] = T.int64(0)")
    with kernel.block(f"for i in T.serial(batch * {heads})"):
        kernel.line("flag[0] = T.max(flag[0], bad[i])")


def _write_token(kernel: Kernel, stream: StreamPlan, x: str, *, check: bool, store: bool) -> None:
    """Check or store token t of head bh, or both."""
    role, width, sink = stream.role, stream.channels, stream.tokens.sink
    lanes = gcd(8, width)
    kernel.let("source", f"(bh * tokens + first[b] + t) * {width}")
    value = at(x, f"source + j * {lanes}", lanes)
    if stream.maps:
        with kernel.block(f"for j in T.serial({width // lanes})"):
            kernel.line(f"{at('y', f'j * {lanes}', lanes)} = {cast('float64', value, lanes)}")
        y = write_maps(kernel, stream.maps, width, "h")
        value = cast("float32", at(y, f"j * {lanes}", lanes), lanes)
    kept = rounded(value, stream.tokens.raw.dtype, lanes)
    if check:
        _write_check(kernel, dict.fromkeys((value, kept)), width, lanes)
    if not store:
        return
    kernel.let("position", f"{role}_length[b] + t")
    kernel.let("slot", f"bh * {role}_capacity + position - {role}_tail_first[b]")

    def copy(buffer: str, base: str) -> None:
        with kernel.block(f"for j in T.serial({width // lanes})"):
            kernel.line(f"{at(buffer, f'{base} + j * {lanes}', lanes)} = {kept}")

    if not sink:
        copy(f"{role}_tail", f"slot * {width}")
        return
    with kernel.block(f"if position < {sink}"):
        copy(f"{role}_sink", f"(bh * {sink} + position) * {width}")
    with kernel.block("else"):
        copy(f"{role}_tail", f"slot * {width}")


def _write_check(kernel: Kernel, values: Iterable[str], width: int, lanes: int) -> None:
    """Set bad[mark] if a value of the token is not finite.

    That is so if its bits without the sign are those of Inf or more. Values are looked at before
    and after rounding, which may make Inf, or lose a NaN.
    """
    kernel.line(f"{at('largest', '0', lanes)} = {splat('T.int32(0)', lanes)}")
    with kernel.block(f"for j in T.serial({width // lanes})"):
        mask = splat("T.int32(0x7FFFFFFF)", lanes)
        largest = at("largest", "0", lanes)
        for value in values:
            bits = f"T.bitwise_and({bits_as('int32', value, lanes)}, {mask})"
            kernel.line(f"{largest} = T.max({largest}, {bits})")
    for i in range(1, lanes):
        kernel.line(f"largest[0] = T.max(largest[0], largest[{i}])")
    with kernel.block("if largest[0] >= T.int32(0x7F800000)"):
        kernel.line("bad[mark] = T.Select(bad[mark] == T.int64(0), t + 1, bad[mark])")
