"""The kernel combine: the splits of a query merged by their log-sum-exp, then the online maps."""

from __future__ import annotations

from math import gcd

from ..ir.plan import AttentionPlan
from .cpu_maps import write_maps
from .cpu_math import NEGATIVE, write_exp, write_log
from .cpu_text import Kernel, at, cast, number, splat
from .kernel_text import constant_arguments


def combine(plan: AttentionPlan) -> Kernel:
    """Return the kernel that merges the splits: out [B, Hq, T, Dv], lse [B, Hq, T].

    out = sum_i w_i part_out_i / total,  total = sum_i w_i part_sum_i,  w_i = exp(max_i - max),
    lse = max + log(total).

    A learned sink of query head h adds exp(sinks[h] - max) to the total of a query that sees keys.
    """
    kernel, width, group, heads = Kernel("combine"), plan.v.channels, plan.group, plan.q_heads
    for name in ("part_out", "part_max", "part_sum", "out", "lse"):
        kernel.array(name, "float32")
    if plan.sinks is not None:
        kernel.array("sinks", "float32")
    constant_arguments(kernel, plan.out_maps)
    for name in ("batch", "splits", "rows", "queries"):
        kernel.scalar(name)
    with kernel.block(f"for bhq in T.parallel(batch * {heads})"):
        kernel.let("bh", f"T.truncdiv(bhq, T.int64({group}))")
        kernel.let("h", f"T.truncmod(bh, T.int64({plan.v.heads}))")
        kernel.let("b", f"T.truncdiv(bh, T.int64({plan.v.heads}))")
        kernel.scratch("y", width, "float64")
        kernel.scratch("z", width, "float64")
        kernel.scratch("sums", 2)
        with kernel.block("for t in T.serial(queries)"):
            kernel.let("row", f"t * {group} + T.truncmod(bhq, T.int64({group}))")
            part = f"((b * splits + i) * {plan.v.heads} + h) * rows + row"
            kernel.let("o", "bhq * queries + t")
            kernel.line(f"sums[0] = {NEGATIVE}")
            kernel.line(f"sums[1] = {number(0.0)}")
            with kernel.block("for i in T.serial(splits)"):
                kernel.line(f"sums[0] = T.max(sums[0], part_max[{part}])")
            if plan.sinks is not None:
                _write_sink(kernel, f"sinks[T.truncmod(bhq, T.int64({heads}))]")
            kernel.let("top", "sums[0]")
            _write_merge(kernel, width, part)
            _write_result(kernel, plan)
    return kernel


def _write_sink(kernel: Kernel, sink: str) -> None:
    """Begin the sum of a query that saw a key with its head's learned sink."""
    with kernel.block(f"if sums[0] > {NEGATIVE}"):
        kernel.line(f"sums[0] = T.max(sums[0], {sink})")
        kernel.let("x", f"{sink} - sums[0]")
        write_exp(kernel, "x", "w", 1)
        kernel.line("sums[1] = w")


def _write_result(kernel: Kernel, plan: AttentionPlan) -> None:
    """Store output and lse of one query; zeros and -inf where it saw no key."""
    width = plan.v.channels
    with kernel.block("if sums[1] > T.float32(0.0)"):
        kernel.let("total", 'T.Cast("float64", sums[1])')
        write_log(kernel, "total", "log")
        kernel.line('lse[o] = T.Cast("float32", T.Cast("float64", top) + log)')
        with kernel.block(f"for c in T.serial({width})"):
            kernel.line("y[c] = y[c] / total")
        y = write_maps(kernel, plan.out_maps, width, "h")
        with kernel.block(f"for c in T.serial({width})"):
            kernel.line(f'out[o * {width} + c] = T.Cast("float32", {y}[c])')
    with kernel.block("else"):
        kernel.line(f"lse[o] = {NEGATIVE}")
        with kernel.block(f"for c in T.serial({width})"):
            kernel.line(f"out[o * {width} + c] = {number(0.0)}")


def _write_merge(kernel: Kernel, width: int, part: str) -> None:
    """Add every split i that saw a key, its row is `part`; part_out of others was never written."""
    lanes = gcd(8, width)
    with kernel.block(f"for j in T.serial({width // lanes})"):
        kernel.line(f"{at('y', f'j * {lanes}', lanes)} = {number(0.0, lanes, 'float64')}")
    with kernel.block("for i in T.serial(splits)"):
        kernel.let("part", part)
        with kernel.block(f"if part_max[part] > {NEGATIVE}"):
            kernel.let("x", "part_max[part] - top")
            write_exp(kernel, "x", "w", 1)
            kernel.line("sums[1] = sums[1] + w * part_sum[part]")
            with kernel.block(f"for j in T.unroll({width // lanes})"):
                own = at("part_out", f"part * {width} + j * {lanes}", lanes)
                total = at("y", f"j * {lanes}", lanes)
                more = cast("float64", f"{splat('w', lanes)} * {own}", lanes)
                kernel.line(f"{total} = {total} + {more}")
