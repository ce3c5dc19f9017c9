"""Online maps of a block of heads' channels, f64 [rows, channels]: Hadamard, gather, scale.

They touch each number once a step, so f64 costs little, and what is stored is the exact result
rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

from ..ir.maps import Gather, Hadamard, Map, Scale, argument_name
from .gpu_text import Kernel, both, down, load, padded


def write_maps(kernel: Kernel, maps: Sequence[Map], channels: int, rows: int, head: str) -> None:
    """Apply maps to `y`, f64 [rows, padded(channels)], with the channels in `c`.

    Args:
        kernel: where to write.
        maps: first one first.
        channels: of a head.
        rows: of the block, a power of two.
        head: text of the KV head, one for the block.
    """
    width = padded(channels)
    mask = "" if width == channels else f"(c < {channels})"
    for m in maps:
        match m:
            case Hadamard():
                _write_hadamard(kernel, width, rows)
            case Gather(order=name):
                kernel.note("storage order of the channels")
                order = load(f"{argument_name(name, 'order')} + {head} * {channels} + c", mask)
                kernel.line(f"order = tl.broadcast_to({order}[None, :], ({rows}, {width}))")
                kernel.line("y = tl.gather(y, order, axis=1)")
            case Scale(values=name, inverse=inverse):
                pointer = f"{argument_name(name, 'scale')} + {head} * {channels} + c"
                value = f"tl.load({pointer}, mask={mask}, other=1.0)" if mask else load(pointer)
                kernel.line(f"y = y {'/' if inverse else '*'} {value}[None, :]")


def _write_hadamard(kernel: Kernel, width: int, rows: int) -> None:
    """Write the butterflies of the orthonormal Walsh-Hadamard transform.

    Each adds neighbours and puts the sums before the differences: the lowest bit of the channel
    becomes the highest. After all bits had their turn, each is back in its place.
    """
    if width == 1:
        return
    kernel.note(f"Walsh-Hadamard transform of {width} channels")
    with kernel.block(f"for _ in tl.static_range({width.bit_length() - 1})"):
        kernel.line(f"even, odd = tl.split(tl.reshape(y, ({rows}, {width // 2}, 2)))")
        kernel.line("y = tl.permute(tl.join(even + odd, even - odd), (0, 2, 1))")
        kernel.line(f"y = tl.reshape(y, ({rows}, {width}))")
    kernel.line(f"y = y * {1.0 / sqrt(width)!r}")


def load_block(kernel: Kernel, pointer: str, channels: int, here: str) -> None:
    """Bind c, the channels, and `y` to rows of `pointer`, f32 as f64."""
    width = padded(channels)
    kernel.line(f"c = tl.arange(0, {width})")
    mask = both(down(here), "" if width == channels else f"(c < {channels})[None, :]")
    kernel.line(f"y = {load(pointer, mask)}.to(tl.float64)")


def channel_mask(channels: int) -> str:
    """Return the mask of the columns c that are channels, or "" if all are."""
    return "" if padded(channels) == channels else f"(c < {channels})[None, :]"
