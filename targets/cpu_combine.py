"""The kernel combine: the splits of a query merged by their log-sum-exp, then the online maps."""

from __future__ import annotations

from math import gcd

from ..ir.plan import AttentionPlan
from .cpu_maps import write_maps
from .cpu_math import NEGATIVE, write_exp, write_log
from .cpu_text import Kernel, at, cast, fma, number, splat
from .kernel_text import constant_arguments

# Channels that are merged at once: their sums stay in registers.
PIECE = 64
# Splits before they are read, rows are asked for.
AHEAD = 4
FLOATS_OF_A_LINE = 16


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
            _write_merge(kernel, plan.v.heads, width, part)
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


def _write_merge(kernel: Kernel, heads: int, width: int, part: str) -> None:
    """Add every split i that saw a key, its row is `part`; part_out of others was never written.

    Rows of one query lie a split apart, which no processor foresees: they are asked for.
    """
    with kernel.block("for i in T.serial(splits)"):
        kernel.let("part", part)
        # A maximum becomes the weight of its split.
        with kernel.block(f"if part_max[part] > {NEGATIVE}"):
            kernel.let("x", "part_max[part] - top")
            write_exp(kernel, "x", "w", 1)
            kernel.line("sums[1] = sums[1] + w * part_sum[part]")
            kernel.line("part_max[part] = w")
        with kernel.block("else"):
            kernel.line(f"part_max[part] = {number(0.0)}")
    lanes = gcd(8, width)
    piece = next(n for n in range(min(PIECE, width), 0, -1) if width % n == 0 and n % lanes == 0)
    kernel.scratch("merged", piece, "float64")
    with kernel.block(f"for p in T.serial(T.int64({width // piece}))"):
        for j in range(0, piece, lanes):
            kernel.line(f"{at('merged', str(j), lanes)} = {number(0.0, lanes, 'float64')}")
        with kernel.block("for i in T.serial(splits)"):
            kernel.let("part", part)
            kernel.let("place", f"part * {width} + p * {piece}")
            for line in range(0, piece, FLOATS_OF_A_LINE):
                later = f"place + rows * {AHEAD * heads * width} + {line}"
                kernel.prefetch("part_out", later)
            with kernel.block("if part_max[part] > T.float32(0.0)"):
                kernel.let("w", 'T.Cast("float64", part_max[part])')
                for j in range(0, piece, lanes):
                    own = cast("float64", at("part_out", f"place + {j}", lanes), lanes)
                    total = at("merged", str(j), lanes)
                    kernel.line(f"{total} = {fma(splat('w', lanes), own, total)}")
        for j in range(0, piece, lanes):
            target = at("y", f"p * {piece} + {j}", lanes)
            kernel.line(f"{target} = {at('merged', str(j), lanes)}")
