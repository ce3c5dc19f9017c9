"""The kernel prepare: online maps, scale and rounding of the queries."""

from __future__ import annotations

from ..ir.plan import AttentionPlan
from .gpu_maps import channel_mask, load_block, write_maps
from .gpu_text import Kernel, both, write_rint
from .kernel_text import constant_arguments

ROWS = 4
"""Rows (query, head of the group) of one program: row = t * G + g."""


def prepare(plan: AttentionPlan, *, codes: bool) -> Kernel:
    """Return the kernel that turns q [B, Hq, T, D] into `query`, rows ordered [B, H, T, G].

    query = scale * maps(q); under compute = int, rounded to steps of max|q| / (2^(bits - 1) - 1).
    `codes`: write those integers as `query_codes` too, and what one is worth as `query_step`.
    Grid: (B H, ceil(T G / ROWS)).
    """
    kernel, width = Kernel("prepare"), plan.k.channels
    kernel.array("q", "float32")
    kernel.array("query", "float32")
    if codes:
        kernel.array("query_codes", f"int{plan.query_bits}")
        kernel.array("query_step", "float32")
    constant_arguments(kernel, plan.q_maps)
    for name in ("queries", "rows"):
        kernel.scalar(name)
    write_rows(kernel, plan)
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
    place = f"(bh * rows + row)[:, None] * {width} + c[None, :]"
    if codes:
        kernel.line(f"tl.store(query_codes + {place}, n.to(tl.int{plan.query_bits}), mask={mask})")
        worth = f"(step * {plan.scale!r}).to(tl.float32)"
        kernel.line(f"tl.store(query_step + bh * rows + row, {worth}, mask=here)")
    target = f"query + {place}"
    kernel.line(f"tl.store({target}, (y * {plan.scale!r}).to(tl.float32), mask={mask})")
    return kernel


def write_rows(kernel: Kernel, plan: AttentionPlan) -> None:
    """Bind the rows of KV head bh, which of them are here, and where they are in [B, Hq, T]."""
    kernel.line("bh = tl.program_id(0).to(tl.int64)")
    kernel.line(f"h = bh % {plan.k.heads}")
    kernel.line(f"row = tl.program_id(1) * {ROWS} + tl.arange(0, {ROWS})")
    kernel.line(f"here = row < queries * {plan.group}")
    # Head h G + g of row b: b Hq + h G + g = bh G + g.
    kernel.line(f"at = (bh * {plan.group} + row % {plan.group}) * queries + row // {plan.group}")
