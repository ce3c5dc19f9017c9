"""The kernel combine: the splits of a query merged by their log-sum-exp, then the online maps."""

from __future__ import annotations

from ..ir.halves import TILE
from ..ir.plan import AttentionPlan
from .gpu_attend import write_ends
from .gpu_maps import channel_mask, write_maps
from .gpu_prepare import ROWS, write_rows
from .gpu_rest import PART
from .gpu_text import Kernel, both, load, padded
from .gpu_whole import write_bounds, write_tiles
from .kernel_text import constant_arguments

COMBINE_ELEMENTS = 8192
"""Numbers of partial outputs that a program of combine reads at once."""


def combine(plan: AttentionPlan, *, tiles: bool) -> Kernel:
    """Return the kernel that merges the splits: out [B, Hq, T, Dv], lse [B, Hq, T].

    `tiles`: attend is that of `gpu_whole.py`. Where it ran, `alone` = 1, a row's own parts are
    merged, so the order of sums depends on the row and on no other of the batch.

    out = sum_i w_i part_out_i / total,  total = sum_i w_i part_sum_i,  w_i = exp(max_i - max),
    lse = max + log(total). Grid: (B H, ceil(T G / ROWS)).
    """
    kernel, channels = Kernel("combine"), plan.v.channels
    width = padded(channels)
    count = max(1, COMBINE_ELEMENTS // (ROWS * width))
    for name in ("part_out", "part_max", "part_sum", "out", "lse"):
        kernel.array(name, "float32")
    if plan.sinks is not None:
        kernel.array("sinks", "float32")
    constant_arguments(kernel, plan.out_maps)
    for name in ("parts", "rows", "queries"):
        kernel.scalar(name)
    write_rows(kernel, plan)
    if tiles:
        _write_own(kernel, plan)
    kernel.line(f"c = tl.arange(0, {width})")
    kernel.line(f"i = tl.arange(0, {count})")
    kernel.note("the largest score of all splits")
    kernel.line(f'top = tl.full(({ROWS},), float("-inf"), tl.float32)')
    loop = f"for split in range(0, {'used' if tiles else 'parts'}, {count})"
    with kernel.block(loop):
        _write_load(kernel, tiles)
        kernel.line("top = tl.maximum(top, tl.max(most, axis=1))")
    kernel.line('seen = top > float("-inf")')
    if plan.sinks is not None:
        kernel.note("the head's learned sink joins the softmax of a query that saw a key")
        head = f"h * {plan.group} + row % {plan.group}"
        kernel.line(f"sink = {load(f'sinks + {head}')}")
        kernel.line("top = tl.maximum(top, sink)")
    kernel.line("top = tl.where(seen, top, 0.0)")
    kernel.note("the weighted sum of the splits; one that saw no key weighs nothing")
    kernel.line(f"total = tl.zeros(({ROWS},), tl.float64)")
    kernel.line(f"y = tl.zeros(({ROWS}, {width}), tl.float64)")
    with kernel.block(loop):
        _write_merge(kernel, channels, tiles)
    if plan.sinks is not None:
        kernel.line("total += tl.exp(sink - top).to(tl.float64)")
    kernel.line("y = y / tl.where(seen, total, 1.0)[:, None]")
    write_maps(kernel, plan.out_maps, channels, ROWS, "h")
    _write_result(kernel, channels)
    return kernel


def _write_own(kernel: Kernel, plan: AttentionPlan) -> None:
    """Bind `own`, the splits of the row, and `used`, its parts: those, then what they leave."""
    for name in ("length_of", "k_encoded", "v_encoded"):
        kernel.array(name, "int64")
    kernel.line(f"b = bh // {plan.k.heads}")
    write_ends(kernel)
    write_bounds(kernel, plan)
    write_tiles(kernel)
    kernel.note("the parts of this row: its splits, and what they leave, behind the splits of all")
    for name in ("splits", "alone"):
        kernel.scalar(name)
    kernel.line("own = tl.where(alone > 0, ((many + tiles - 1) // tiles).to(tl.int64), splits)")
    kernel.line(f"left = length - oldest - many.to(tl.int64) * {TILE}")
    kernel.line(f"used = tl.where(alone > 0, own + (left + {PART - 1}) // {PART}, parts)")


def _write_load(kernel: Kernel, tiles: bool) -> None:
    """Bind `most`, the largest score of each row in some splits, -inf where it saw no key."""
    kernel.line("index = split + i")
    place = "tl.where(index < own, index, index - own + splits)" if tiles else "index"
    kernel.line(f"part = (bh * parts + {place})[None, :] * rows + row[:, None]")
    kernel.line(f"exists = here[:, None] & (index < {'used' if tiles else 'parts'})[None, :]")
    kernel.line('most = tl.load(part_max + part, mask=exists, other=float("-inf"))')


def _write_merge(kernel: Kernel, channels: int, tiles: bool) -> None:
    _write_load(kernel, tiles)
    kernel.line('kept = most > float("-inf")')
    kernel.line("w = tl.where(kept, tl.exp(most - top[:, None]), 0.0)")
    kernel.line(f"sums = {load('part_sum + part', 'kept')}")
    kernel.line("total += tl.sum((w * sums).to(tl.float64), axis=1)")
    columns = "" if padded(channels) == channels else f"(c < {channels})[None, None, :]"
    pointer = f"part_out + part[:, :, None] * {channels} + c[None, None, :]"
    kernel.line(f"x = {load(pointer, both('kept[:, :, None]', columns))}")
    kernel.line("y += tl.sum((x * w[:, :, None]).to(tl.float64), axis=1)")


def _write_result(kernel: Kernel, channels: int) -> None:
    kernel.line("log = top + tl.log(tl.where(seen, total, 1.0)).to(tl.float32)")
    kernel.line('tl.store(lse + at, tl.where(seen, log, float("-inf")), mask=here)')
    kernel.line("y = tl.where(seen[:, None], y, 0.0)")
    target = f"out + at[:, None] * {channels} + c[None, :]"
    mask = both("here[:, None]", channel_mask(channels))
    kernel.line(f"tl.store({target}, y.to(tl.float32), mask={mask})")
