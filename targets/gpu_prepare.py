"""The kernel prepare: online maps, scale and rounding of the queries."""

from __future__ import annotations

from ..ir.attention import largest_query
from ..ir.encodings import Dense, Lut
from ..ir.plan import AttentionPlan
from ..ir.planes import low_bits
from .gpu_blocks import block_bytes, looked_first, plane_bytes
from .gpu_maps import channel_mask, load_block, write_maps
from .gpu_text import Kernel, both, write_rint
from .kernel_text import constant_arguments

ROWS = 4
"""Rows (query, head of the group) of one program: row = t * G + g."""


def prepare(plan: AttentionPlan, *, codes: bool, looked: bool) -> Kernel:
    """Return the kernel that turns q [B, Hq, T, D] into `query`, rows ordered [B, H, T, G].

    query = scale * maps(q); under compute = int, rounded to steps of max|q| / `largest_query`.
    `codes`: write what matrix units take as `query_codes` too, and what a code of one is worth as
    `query_step`: those integers, or where scales of channels meet them `_write_halves`. `looked`:
    integers that meet tables lie in the order in which `gpu_blocks.Looked` has them.
    Grid: (B H, ceil(T G / ROWS)).
    """
    kernel, width = Kernel("prepare"), plan.k.channels
    kernel.array("q", "float32")
    kernel.array("query", "float32")
    if codes:
        declare_codes(kernel, plan)
    constant_arguments(kernel, plan.q_maps)
    for name in ("queries", "rows"):
        kernel.scalar(name)
    write_rows(kernel, plan)
    load_block(kernel, f"q + at[:, None] * {width} + c[None, :]", width, "here")
    write_maps(kernel, plan.q_maps, width, ROWS, "h")
    if plan.query_bits is not None:
        kernel.note(f"integers of {plan.query_bits} bits, to the last bit those of round_queries")
        steps = largest_query(plan.query_bits)
        kernel.line(f"step = tl.max(tl.abs(y), axis=1) / {float(steps)}")
        kernel.line("safe = tl.where(step > 0.0, step, 1.0)")
        kernel.line("n = y / safe[:, None]")
        write_rint(kernel, "n")
        kernel.line("y = n * step[:, None]")
    kernel.line(f"single = (y * {plan.scale!r}).to(tl.float32)")
    mask = both("here[:, None]", channel_mask(width))
    place = f"(bh * rows + row)[:, None] * {width} + c[None, :]"
    if codes and plan.query_bits is not None:
        if looked:
            _write_looked(kernel, plan)
        own = place.replace("c[", "target[") if looked else place
        kernel.line(f"tl.store(query_codes + {own}, n.to(tl.int{plan.query_bits}), mask={mask})")
        worth = f"(step * {plan.scale!r}).to(tl.float32)"
        kernel.line(f"tl.store(query_step + bh * rows + row, {worth}, mask=here)")
    elif codes:
        _write_halves(kernel, plan, mask)
    kernel.line(f"tl.store(query + {place}, single, mask={mask})")
    return kernel


def _write_looked(kernel: Kernel, plan: AttentionPlan) -> None:
    """Bind `target`, where the queries of each channel go: of a table, by pairs of bytes."""
    kernel.line("target = c")
    for part in plan.k.page_layout().parts:
        if isinstance(part.format, Lut):
            kernel.note("tables: of each word's first two bytes, then of its last two")
            plane, width = plane_bytes(part), block_bytes(part)
            inside = f"(c >= {part.first}) & (c < {part.first + part.width})"
            kernel.line(f"byte = (c - {part.first}) % {plane}")
            kernel.line(f"column = byte % {width}")
            kernel.line(
                f"number = column // 4 * 4 + column % 2 * 2 + (c - {part.first}) // {plane}"
            )
            half = f"column % 4 // 2 * {looked_first(width)}"
            own = f"{part.first} + (byte - column) * 2 + {half} + number"
            kernel.line(f"target = tl.where({inside}, {own}, target)")


def declare_codes(kernel: Kernel, plan: AttentionPlan) -> None:
    """Declare the queries as matrix units take them."""
    bits = plan.query_bits
    kernel.array("query_codes", "float16" if bits is None else f"int{bits}")
    kernel.array("query_step", "float32")
    if bits is None:
        kernel.array("query_halves", "float16")


def _write_halves(kernel: Kernel, plan: AttentionPlan, mask: str) -> None:
    """Store the queries in float16, less the power of two over their largest.

    In `query_codes` they are lowered besides by the place of their channel's code in a byte, which
    multiplies the code; `query_halves` is for zero points. Source: `ir/halves.py`.
    """
    kernel.note("float16, less the power of two over the largest of the row")
    kernel.line("bits = tl.max(tl.abs(single), axis=1).to(tl.int32, bitcast=True)")
    kernel.line("exponent = tl.minimum(tl.maximum((bits >> 23) - 126, -100), 100)")
    kernel.line("worth = ((exponent + 127) << 23).to(tl.float32, bitcast=True)")
    kernel.line("lower = ((127 - exponent) << 23).to(tl.float32, bitcast=True)")
    kernel.line("tl.store(query_step + bh * rows + row, worth, mask=here)")
    kernel.line("single_lowered = single * lower[:, None]")
    row = f"(bh * rows + row)[:, None] * {plan.k.channels}"
    halves = "single_lowered.to(tl.float16)"
    kernel.line(f"tl.store(query_halves + {row} + c[None, :], {halves}, mask={mask})")
    kernel.note("each channel's code lies in a place of its byte; even bytes come before odd ones")
    kernel.line("place = c * 0")
    kernel.line("target = c")
    for part in plan.k.page_layout().parts:
        if isinstance(part.format, Dense):
            plane, width = plane_bytes(part), block_bytes(part)
            inside = f"(c >= {part.first}) & (c < {part.first + part.width})"
            own = f"(c - {part.first}) // {plane} * {low_bits(part.format)}"
            kernel.line(f"place = tl.where({inside}, {own}, place)")
            kernel.line(f"column = (c - {part.first}) % {width}")
            own = f"c - column + column % 2 * {width // 2} + column // 2"
            kernel.line(f"target = tl.where({inside}, {own}, target)")
    kernel.line("lift = ((127 - place) << 23).to(tl.float32, bitcast=True)")
    lowered = "(single_lowered * lift[None, :]).to(tl.float16)"
    kernel.line(f"tl.store(query_codes + {row} + target[None, :], {lowered}, mask={mask})")


def write_rows(kernel: Kernel, plan: AttentionPlan) -> None:
    """Bind the rows of KV head bh, which of them are here, and where they are in [B, Hq, T]."""
    kernel.line("bh = tl.program_id(0).to(tl.int64)")
    kernel.line(f"h = bh % {plan.k.heads}")
    kernel.line(f"row = tl.program_id(1) * {ROWS} + tl.arange(0, {ROWS})")
    kernel.line(f"here = row < queries * {plan.group}")
    # Head h G + g of row b: b Hq + h G + g = bh G + g.
    kernel.line(f"at = (bh * {plan.group} + row % {plan.group}) * queries + row // {plan.group}")
