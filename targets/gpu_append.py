"""The kernel append of one stream: online maps, one rounding, then sink or tail."""

from __future__ import annotations

from ..ir.plan import StreamPlan
from .gpu_maps import channel_mask, load_block, write_maps
from .gpu_text import LARGEST, Kernel, as_f32, both, write_bf16_bits
from .kernel_text import append_arguments

APPEND_ROWS = 8
"""Tokens of one program of append."""


def append(stream: StreamPlan) -> Kernel:
    """Return the kernel that stores x [B, H, T, D] as the next positions of each row.

    Where a number is not finite, after the maps or after rounding to the raw type, `bad[b * H + h]`
    becomes 1 + a token that has one. Stored is past the row's length, so it is never read.
    Grid: (ceil(T / APPEND_ROWS), B H).
    """
    kernel, role = Kernel(f"append_{stream.role}"), stream.role
    append_arguments(kernel, stream)
    for name in ("tokens", f"{role}_capacity"):
        kernel.scalar(name)
    kernel.line("bh = tl.program_id(1).to(tl.int64)")
    kernel.line(f"b = bh // {stream.heads}")
    if stream.maps:
        kernel.line(f"h = bh % {stream.heads}")
    kernel.line(f"t = tl.program_id(0) * {APPEND_ROWS} + tl.arange(0, {APPEND_ROWS})")
    kernel.line("here = t < tl.load(count + b)")
    source = f"x + (bh * tokens + tl.load(first + b) + t)[:, None] * {stream.channels} + c[None, :]"
    load_block(kernel, source, stream.channels, "here")
    write_maps(kernel, stream.maps, stream.channels, APPEND_ROWS, "h")
    _write_rounding(kernel, stream)
    _write_store(kernel, stream)
    return kernel


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
    kernel.line("most = tl.max(wrong * (t + 1), axis=0)")
    with kernel.block("if most > 0"):
        kernel.line("tl.store(bad + bh, most.to(tl.int64))")


def _write_store(kernel: Kernel, stream: StreamPlan) -> None:
    role, sink, width = stream.role, stream.tokens.sink, stream.channels
    columns = channel_mask(width)
    kernel.line(f"position = tl.load({role}_length + b) + t")
    kernel.line(f"slot = bh * {role}_capacity + position - tl.load({role}_tail_first + b)")
    in_tail = "here"
    if sink:
        in_tail = f"here & (position >= {sink})"
        target = f"{role}_sink + (bh * {sink} + position)[:, None] * {width} + c[None, :]"
        mask = both(f"(here & (position < {sink}))[:, None]", columns)
        kernel.line(f"tl.store({target}, kept, mask={mask})")
    target = f"{role}_tail + slot[:, None] * {width} + c[None, :]"
    kernel.line(f"tl.store({target}, kept, mask={both(f'({in_tail})[:, None]', columns)})")
