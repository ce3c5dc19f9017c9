"""The kernels around attend: prepare (maps, scale, rounding of q) and combine (of the splits)."""

from __future__ import annotations

from ..ir.plan import AttentionPlan
from .gpu_maps import channel_mask, load_block, write_maps
from .gpu_text import Kernel, both, load, padded
from .kernel_text import constant_arguments

ROWS = 4
"""Rows (query, head of the group) of one program: row = t * G + g."""
COMBINE_ELEMENTS = 8192
"""Numbers of partial outputs that a program of combine reads at once."""


def prepare(plan: AttentionPlan) -> Kernel:
    """Return the kernel that turns q [B, Hq, T, D] into `query`, rows ordered [B, H, T, G].

    query = scale * maps(q); under compute = int, rounded to steps of max|q| / (2^(bits - 1) - 1).
    Grid: (B H, ceil(T G / ROWS)).
    """
    kernel, width = Kernel("prepare"), plan.k.channels
    kernel.array("q", "float32")
    kernel.array("query", "float32")
    constant_arguments(kernel, plan.q_maps)
    for name in ("queries", "rows"):
        kernel.scalar(name)
    _write_rows(kernel, plan)
    load_block(kernel, f"q + at[:, None] * {width} + c[None, :]", width, "here")
    write_maps(kernel, plan.q_maps, width, ROWS, "h")
    if plan.query_bits is not None:
        kernel.note(f"integers of {plan.query_bits} bits, to the last bit those of round_queries")
        steps = 2 ** (plan.query_bits - 1) - 1
        kernel.line(f"step = tl.max(tl.abs(y), axis=1) / {float(steps)}")
        kernel.line("safe = tl.where(step > 0.0, step, 1.0)")
        kernel.line("n = y / safe[:, None]")
        write_rint(kernel, "n")
        kernel.line("y = n * step[:, None]")
    mask = both("here[:, None]", channel_mask(width))
    target = f"query + (bh * rows + row)[:, None] * {width} + c[None, :]"
    kernel.line(f"tl.store({target}, (y * {plan.scale!r}).to(tl.float32), mask={mask})")
    return kernel


def _write_rows(kernel: Kernel, plan: AttentionPlan) -> None:
    """Bind the rows of KV head bh, which of them are here, and where they are in [B, Hq, T]."""
    kernel.line("bh = tl.program_id(0).to(tl.int64)")
    kernel.line(f"h = bh % {plan.k.heads}")
    kernel.line(f"row = tl.program_id(1) * {ROWS} + tl.arange(0, {ROWS})")
    kernel.line(f"here = row < queries * {plan.group}")
    # Head h G + g of row b: b Hq + h G + g = bh G + g.
    kernel.line(f"at = (bh * {plan.group} + row % {plan.group}) * queries + row // {plan.group}")


def write_rint(kernel: Kernel, name: str) -> None:
    """Round an f64 to the nearest integer, ties to even: adding 1.5 2^52 leaves no place for more.

    Exact for |x| < 2^51.
    """
    kernel.line(f"{name} = ({name} + 6755399441055744.0) - 6755399441055744.0")


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
    for name in ("splits", "rows", "queries"):
        kernel.scalar(name)
    _write_rows(kernel, plan)
    kernel.line(f"c = tl.arange(0, {width})")
    kernel.line(f"i = tl.arange(0, {count})")
    kernel.note("the largest score of all splits")
    kernel.line(f'top = tl.full(({ROWS},), float("-inf"), tl.float32)')
    with kernel.block(f"for split in range(0, splits, {count})"):
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
    with kernel.block(f"for split in range(0, splits, {count})"):
        _write_merge(kernel, channels)
    if plan.sinks is not None:
        kernel.line("total += tl.exp(sink - top).to(tl.float64)")
    kernel.line("y = y / tl.where(seen, total, 1.0)[:, None]")
    write_maps(kernel, plan.out_maps, channels, ROWS, "h")
    _write_result(kernel, channels)
    return kernel


def _write_load(kernel: Kernel) -> None:
    """Bind `most`, the largest score of each row in some splits, -inf where it saw no key."""
    kernel.line("part = (bh * splits + split + i)[None, :] * rows + row[:, None]")
    kernel.line("exists = here[:, None] & (split + i < splits)[None, :]")
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
