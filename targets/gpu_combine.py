"""The kernel combine: the splits of a query merged by their log-sum-exp, then the online maps."""

from __future__ import annotations

from ..ir.plan import AttentionPlan
from .gpu_maps import channel_mask, write_maps
from .gpu_prepare import ROWS, write_rows
from .gpu_text import Kernel, both, load, padded
from .kernel_text import constant_arguments

COMBINE_ELEMENTS = 8192
"""Numbers of partial outputs that a program of combine reads at once."""


def combine(plan: AttentionPlan) -> Kernel:
    """Return the kernel that merges the splits: out [B, Hq, T, Dv], lse [B, Hq, T].

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
    kernel.line(f"c = tl.arange(0, {width})")
    kernel.line(f"i = tl.arange(0, {count})")
    kernel.note("the largest score of all splits")
    kernel.line(f'top = tl.full(({ROWS},), float("-inf"), tl.float32)')
    with kernel.block(f"for split in range(0, parts, {count})"):
        _write_load(kernel)
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
    with kernel.block(f"for split in range(0, parts, {count})"):
        _write_merge(kernel, channels)
    if plan.sinks is not None:
        kernel.line("total += tl.exp(sink - top).to(tl.float64)")
    kernel.line("y = y / tl.where(seen, total, 1.0)[:, None]")
    write_maps(kernel, plan.out_maps, channels, ROWS, "h")
    _write_result(kernel, channels)
    return kernel


def _write_load(kernel: Kernel) -> None:
    """Bind `most`, the largest score of each row in some splits, -inf where it saw no key."""
    kernel.line("part = (bh * parts + split + i)[None, :] * rows + row[:, None]")
    kernel.line("exists = here[:, None] & (split + i < parts)[None, :]")
    kernel.line('most = tl.load(part_max + part, mask=exists, other=float("-inf"))')


def _write_merge(kernel: Kernel, channels: int) -> None:
    _write_load(kernel)
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
