"""New tokens of a stream, stored raw: online maps, one rounding, then sink or tail."""

from __future__ import annotations

from ..ir.plan import StreamPlan
from .gpu_maps import channel_mask, write_maps
from .gpu_text import LARGEST, Kernel, as_f32, both, load, padded, write_bf16_bits
from .kernel_text import constant_arguments

TYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
"""Number types of new tokens; launch.json has them."""


def declare_store(kernel: Kernel, stream: StreamPlan) -> None:
    """Declare the new tokens of a stream, where they go, and the constants of the maps."""
    role = stream.role
    kernel.array(f"{role}_x", "uint16")  # float32 too: see `_write_load`
    kernel.scalar(f"{role}_type")
    if stream.tokens.sink:
        kernel.array(f"{role}_sink", "float32")
    constant_arguments(kernel, stream.maps)


def write_store(kernel: Kernel, stream: StreamPlan, program: str, rows: int) -> None:
    """Store some of the new tokens x [B, H, T, D] as the next positions of row b, head h.

    Where a number is not finite, after the maps or after rounding to the raw type, the stream's
    `bad[0, b H + h]` becomes 1 + a token that has one. Stored is past the row's length, so it is
    never read.

    Args:
        kernel: where to write.
        stream: the plan.
        program: number among those that store the stream.
        rows: tokens of a program.
    """
    role, width = stream.role, stream.channels
    kernel.line(f"t = ({program}) * {rows} + tl.arange(0, {rows})")
    kernel.line("here = t < tl.load(count + b)")
    kernel.line("position = tl.load(before + b) + t")
    kernel.line(f"slot = bh * {role}_capacity - tl.load({role}_tail_first + b) + position")
    kernel.line("source = bh * tokens + tl.load(first + b) + t")
    _write_load(kernel, stream)
    write_maps(kernel, stream.maps, width, rows, "h")
    _write_rounding(kernel, stream)
    _write_place(kernel, stream)


def _write_load(kernel: Kernel, stream: StreamPlan) -> None:
    """Bind c, the channels, and y to the new tokens of any type, f64."""
    role, width = stream.role, stream.channels
    kernel.line(f"c = tl.arange(0, {padded(width)})")
    kernel.line(f"at = source[:, None] * {width} + c[None, :]")
    mask = both("here[:, None]", channel_mask(width))
    with kernel.block(f"if {role}_type == {TYPES['float32']}"):
        pointer = f"{role}_x.to(tl.pointer_type(tl.float32), bitcast=True) + at"
        kernel.line(f"y = {load(pointer, mask)}.to(tl.float64)")
    with kernel.block("else"):
        kernel.line(f"half = {load(f'{role}_x + at', mask)}")
        with kernel.block(f"if {role}_type == {TYPES['bfloat16']}"):
            kernel.line(f"y = {as_f32('half', 'bf16')}.to(tl.float64)")
        with kernel.block("else"):
            kernel.line("y = half.to(tl.float16, bitcast=True).to(tl.float64)")


def _write_rounding(kernel: Kernel, stream: StreamPlan) -> None:
    """Bind `kept` to y as the raw type holds it, and flag what is not finite."""
    kernel.note(f"round once to {stream.tokens.raw.dtype}, and flag what is not finite")
    kernel.line("single = y.to(tl.float32)")
    match stream.tokens.raw.dtype:
        case "f32":
            kernel.line("kept = single")
        case "f16":
            kernel.line("kept = single.to(tl.float16).to(tl.float32)")
        case "bf16":
            write_bf16_bits(kernel, "single")
            kernel.line(f"kept = {as_f32('bits', 'bf16')}")
    # Rounding may make Inf, and may lose a NaN.
    kernel.line(f"finite = (tl.abs(single) <= {LARGEST}) & (tl.abs(kept) <= {LARGEST})")
    mask = both("here[:, None]", channel_mask(stream.channels))
    kernel.line(f"wrong = tl.max(tl.where(finite, 0, 1) * ({mask}), axis=1)")
    kernel.line(f"tl.store({stream.role}_bad + bh + 0 * wrong, t + 1, mask=wrong > 0)")


def _write_place(kernel: Kernel, stream: StreamPlan) -> None:
    """Store `kept` in the sink or in the tail, by the position of each token."""
    role, sink, width = stream.role, stream.tokens.sink, stream.channels
    columns = channel_mask(width)
    in_tail = "here"
    if sink:
        in_tail = f"here & (position >= {sink})"
        target = f"{role}_sink + (bh * {sink} + position)[:, None] * {width} + c[None, :]"
        mask = both(f"(here & (position < {sink}))[:, None]", columns)
        kernel.line(f"tl.store({target}, kept, mask={mask})")
    target = f"{role}_tail + slot[:, None] * {width} + c[None, :]"
    kernel.line(f"tl.store({target}, kept, mask={both(f'({in_tail})[:, None]', columns)})")
