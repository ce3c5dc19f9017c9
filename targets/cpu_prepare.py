"""The kernels around attend: prepare (maps, scale, rounding of q) and combine (of the splits)."""

from __future__ import annotations

from ..ir.plan import AttentionPlan
from .cpu_codes import readers_of
from .cpu_maps import write_maps
from .cpu_scores_int import chunk, uses_integers
from .cpu_softmax import NEGATIVE, write_exp, write_log
from .cpu_text import Kernel, number, rint
from .kernel_text import constant_arguments


def prepare(plan: AttentionPlan) -> Kernel:
    """Return the kernel that turns q [B, Hq, T, D] into `query`, rows ordered [B, H, T, G].

    query = scale * maps(q); under compute = int, rounded to steps of max|q| / (2^(bits - 1) - 1),
    with the integers and the steps besides.
    """
    kernel, width, group = Kernel("prepare"), plan.k.channels, plan.group
    heads, bits = plan.q_heads, plan.query_bits
    reader = readers_of(plan.k)[0]
    integers = uses_integers(plan, reader)
    kernel.array("q", "float32")
    kernel.array("query", "float32")
    if integers:
        kernel.array("q_codes", chunk(reader)[1])
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


def _write_rounding(kernel: Kernel, plan: AttentionPlan, y: str, bits: int, integers: bool) -> None:
    width, scale = plan.k.channels, number(plan.scale, 1, "float64")
    kernel.line(f"step[0] = {number(0.0, 1, 'float64')}")
    with kernel.block(f"for c in T.serial({width})"):
        kernel.line(f"step[0] = T.max(step[0], T.abs({y}[c]))")
    kernel.let("s", f"step[0] / {number(float(2 ** (bits - 1) - 1), 1, 'float64')}")
    positive = f"s > {number(0.0, 1, 'float64')}"
    kernel.let("safe", f"T.Select({positive}, s, {number(1.0, 1, 'float64')})")
    with kernel.block(f"for c in T.serial({width})"):
        kernel.let("n", rint(f"{y}[c] / safe", 1, "float64"))
        kernel.line(f'query[row * {width} + c] = T.Cast("float32", n * s * {scale})')
        if integers:
            reader = readers_of(plan.k)[0]
            kernel.line(f'q_codes[row * {width} + c] = T.Cast("{chunk(reader)[1]}", n)')
    if integers:
        kernel.line(f'q_step[row] = T.Cast("float32", s * {scale})')


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
        kernel.scratch("y", width, "float64")
        kernel.scratch("z", width, "float64")
        kernel.scratch("sums", 2)
        with kernel.block("for t in T.serial(queries)"):
            kernel.let("row", f"t * {group} + T.truncmod(bhq, T.int64({group}))")
            kernel.let("o", "bhq * queries + t")
            kernel.line(f"sums[0] = {NEGATIVE}")
            kernel.line(f"sums[1] = {number(0.0)}")
            with kernel.block("for i in T.serial(splits)"):
                kernel.line("sums[0] = T.max(sums[0], part_max[(bh * splits + i) * rows + row])")
            if plan.sinks is not None:
                _write_sink(kernel, f"sinks[T.truncmod(bhq, T.int64({heads}))]")
            kernel.let("top", "sums[0]")
            with kernel.block(f"for c in T.serial({width})"):
                kernel.line(f"y[c] = {number(0.0, 1, 'float64')}")
            _write_merge(kernel, width)
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


def _write_merge(kernel: Kernel, width: int) -> None:
    """Add every split that saw a key; part_out of the others was never written."""
    with kernel.block("for i in T.serial(splits)"):
        kernel.let("part", "(bh * splits + i) * rows + row")
        with kernel.block(f"if part_max[part] > {NEGATIVE}"):
            kernel.let("x", "part_max[part] - top")
            write_exp(kernel, "x", "w", 1)
            kernel.line("sums[1] = sums[1] + w * part_sum[part]")
            with kernel.block(f"for c in T.serial({width})"):
                kernel.line(f'y[c] = y[c] + T.Cast("float64", w * part_out[part * {width} + c])')
