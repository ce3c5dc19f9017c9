"""The kernel prepare: online maps, scale and rounding of the queries."""

from __future__ import annotations

from ..ir.attention import largest_query
from ..ir.plan import AttentionPlan
from .cpu_maps import write_maps
from .cpu_quads import integer_queries
from .cpu_text import Kernel, number, rint
from .kernel_text import constant_arguments


def prepare(plan: AttentionPlan) -> Kernel:
    """Return the kernel that turns q [B, Hq, T, D] into `query`, rows ordered [B, H, T, G].

    query = scale * maps(q); under compute = int, rounded to steps of max|q| / `largest_query`,
    with the integers and the steps besides.
    """
    kernel, width, group = Kernel("prepare"), plan.k.channels, plan.group
    heads, bits = plan.q_heads, plan.query_bits
    integers = integer_queries(plan)
    kernel.array("q", "float32")
    kernel.array("query", "float32")
    if integers:
        kernel.array("q_codes", integers)
        kernel.array("q_step", "float32")
    constant_arguments(kernel, plan.q_maps)
    for name in ("batch", "queries", "rows"):
        kernel.scalar(name)
    with kernel.block(f"for bhq in T.parallel(batch * {heads})"):
        kernel.let("b", f"T.truncdiv(bhq, T.int64({heads}))")
        kernel.let("hq", f"T.truncmod(bhq, T.int64({heads}))")
        kernel.let("h", f"T.truncdiv(hq, T.int64({group}))")
        for name, count in (("y", width), ("z", width), ("step", 1)):
            kernel.scratch(name, count, "float64")
        with kernel.block("for t in T.serial(queries)"):
            place = f"t * {group} + T.truncmod(hq, T.int64({group}))"
            kernel.let("row", f"(b * {plan.k.heads} + h) * rows + {place}")
            with kernel.block(f"for c in T.serial({width})"):
                kernel.line(f'y[c] = T.Cast("float64", q[(bhq * queries + t) * {width} + c])')
            y = write_maps(kernel, plan.q_maps, width, "h")
            if bits is None:
                scaled = f"{y}[c] * {number(plan.scale, 1, 'float64')}"
                with kernel.block(f"for c in T.serial({width})"):
                    kernel.line(f'query[row * {width} + c] = T.Cast("float32", {scaled})')
            else:
                _write_rounding(kernel, plan, y, bits, integers)
    return kernel


def _write_rounding(
    kernel: Kernel, plan: AttentionPlan, y: str, bits: int, integers: str | None
) -> None:
    width, scale = plan.k.channels, number(plan.scale, 1, "float64")
    kernel.line(f"step[0] = {number(0.0, 1, 'float64')}")
    with kernel.block(f"for c in T.serial({width})"):
        kernel.line(f"step[0] = T.max(step[0], T.abs({y}[c]))")
    kernel.let("s", f"step[0] / {number(float(largest_query(bits)), 1, 'float64')}")
    positive = f"s > {number(0.0, 1, 'float64')}"
    kernel.let("safe", f"T.Select({positive}, s, {number(1.0, 1, 'float64')})")
    with kernel.block(f"for c in T.serial({width})"):
        kernel.let("n", rint(f"{y}[c] / safe", 1, "float64"))
        kernel.line(f'query[row * {width} + c] = T.Cast("float32", n * s * {scale})')
        if integers:
            kernel.line(f'q_codes[row * {width} + c] = T.Cast("{integers}", n)')
    if integers:
        kernel.line(f'q_step[row] = T.Cast("float32", s * {scale})')
