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
from .cpu_text import Kernel, at, bits_as, cast, fold, rounded, splat
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
            kernel.let("b", f"T.truncdiv(bh, T.int64({heads}))")
            kernel.let("h", f"T.truncmod(bh, T.int64({heads}))")
            kernel.let("mark", "bh")
            if not store:
                kernel.line("bad[mark] = T.int64(0)")
            count = "T.Select(flag[0] > 0, T.int64(0), count[b])" if store else "count[b]"
            with kernel.block(f"for t in T.serial({count})"):
                kernel.let("source", f"(bh * tokens + first[b] + t) * {stream.channels}")
                kernel.let("position", f"{role}_length[b] + t")
                write_token(kernel, stream, "x", found=None if store else "t + 1", store=store)
    return kernel


def _write_flag(kernel: Kernel, heads: int) -> None:
    kernel.line("flag[0] = T.int64(0)")
    with kernel.block(f"for i in T.serial(batch * {heads})"):
        kernel.line("flag[0] = T.max(flag[0], bad[i])")


def write_token(
    kernel: Kernel, stream: StreamPlan, x: str, *, found: str | None, store: bool
) -> None:
    """Check or store the token at `source` of x as `position` of head h of row b, or both.

    Args:
        kernel: where to write; b, h, bh = b * H + h are bound.
        stream: where the token goes.
        x: f32 array.
        found: what `bad[mark]` becomes, if it is 0, where a number is not finite; None not to look.
        store: whether to store.
    """
    width, lanes = stream.channels, gcd(8, stream.channels)
    value = at(x, f"source + j * {lanes}", lanes)
    if stream.maps:
        for name in ("y", "z"):
            kernel.scratch(name, width, "float64")
        with kernel.block(f"for j in T.serial({width // lanes})"):
            kernel.line(f"{at('y', f'j * {lanes}', lanes)} = {cast('float64', value, lanes)}")
        y = write_maps(kernel, stream.maps, width, "h")
        value = cast("float32", at(y, f"j * {lanes}", lanes), lanes)
    kept = rounded(value, stream.tokens.raw.dtype, lanes)
    if found is not None:
        _write_check(kernel, dict.fromkeys((value, kept)), width, lanes, found)
    if store:
        _write_kept(kernel, stream, kept, lanes)


def _write_kept(kernel: Kernel, stream: StreamPlan, kept: str, lanes: int) -> None:
    """Store what is kept of the token: vectors j of `kept`."""
    role, width, sink = stream.role, stream.channels, stream.tokens.sink
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


def _write_check(kernel: Kernel, values: Iterable[str], width: int, lanes: int, found: str) -> None:
    """Set bad[mark] to `found` if a value of the token is not finite.

    That is so if its bits without the sign are those of Inf or more. Values are looked at before
    and after rounding, which may make Inf, or lose a NaN.
    """
    kernel.scratch("largest", lanes, "int32")
    kernel.line(f"{at('largest', '0', lanes)} = {splat('T.int32(0)', lanes)}")
    with kernel.block(f"for j in T.serial({width // lanes})"):
        mask = splat("T.int32(0x7FFFFFFF)", lanes)
        largest = at("largest", "0", lanes)
        for value in values:
            bits = f"T.bitwise_and({bits_as('int32', value, lanes)}, {mask})"
            kernel.line(f"{largest} = T.max({largest}, {bits})")
    fold(kernel, "largest", lanes, "T.max({}, {})")
    with kernel.block("if largest[0] >= T.int32(0x7F800000)"):
        kernel.line(f"bad[mark] = T.Select(bad[mark] == T.int64(0), {found}, bad[mark])")
