"""The kernel step: what an append of one token a row does to a layer, in one call on one thread.

Calling a kernel takes longer than storing a token. So one call does the work of four, takes new
tokens where and as they are, and counts them itself; and what stays the same from call to call it
finds in a block of memory: an int64 for each of its `arguments`, the address of an array or a
number.
"""

from __future__ import annotations

from math import gcd

from ..ir.layouts import PageLayout
from ..ir.plan import AttentionPlan, StreamPlan
from .cpu_append import write_token
from .cpu_encode import page_arguments, write_group
from .cpu_text import Kernel, as_f32, at
from .kernel_text import constant_arguments, store_arguments

# Types of new tokens, in the order of their numbers.
TYPES = {"f32": "float32", "bf16": "uint16"}


def step(plan: AttentionPlan, layouts: tuple[PageLayout, PageLayout]) -> Kernel:
    """Return the kernel that stores one token a row of k and v, [B, H, D], as position `length`.

    `k_at` and `v_at` are addresses, `k_type` and `v_type` numbers of TYPES. Where `k_grow` or
    `v_grow` is 1, the token at `encoded` is encoded, of streams that encode tokens one by one. Then
    `length` and `encoded` move on; but not if a number is not finite, or does not fit its type.
    Returns 0, or 1 if they stay as they are.
    """
    numbers = [f"{s.role}_{name}" for s in (plan.k, plan.v) for name in ("at", "type", "grow")]
    kernel = Kernel("step", numbers=("block", *numbers))
    streams = tuple(zip((plan.k, plan.v), layouts, strict=True))
    for stream, layout in streams:
        _declare(kernel, stream, layout)
    kernel.scalar("batch")
    _write_views(kernel)
    kernel.scratch("bad", 1, "int64")
    kernel.line("bad[0] = T.int64(0)")
    kernel.let("mark", "T.int64(0)")
    with kernel.block("for b in T.serial(batch)"):
        for stream, layout in streams:
            with kernel.block(f"for h in T.serial({stream.heads})"):
                _write_head(kernel, stream, layout)
    with (
        kernel.block("if bad[0] == T.int64(0)"),
        kernel.block("for b in T.serial(batch)"),
    ):
        for stream, _ in streams:
            role = stream.role
            kernel.line(f"{role}_length[b] = {role}_length[b] + T.int64(1)")
            kernel.line(f"{role}_encoded[b] = {role}_encoded[b] + {role}_grow")
    kernel.line("return bad[0]")
    return kernel


def _declare(kernel: Kernel, stream: StreamPlan, layout: PageLayout) -> None:
    """Declare what step finds in its block of one stream."""
    store_arguments(kernel, stream)
    constant_arguments(kernel, stream.maps)
    kernel.array(f"{stream.role}_encoded", "int64")
    kernel.scalar(f"{stream.role}_capacity")
    if stream.tokens.one_by_one:
        page_arguments(kernel, stream, layout)


def _write_views(kernel: Kernel) -> None:
    """Bind what lies in the block, in the order of `arguments`."""
    # TVM learns from arrays among the arguments of a function where it runs; here are none.
    for name, value in (("device_id", 0), ("device_type", 1)):
        kernel.line(f'T.attr("default", "{name}", {value})')
    kernel.view("given", "int64", "block")
    for i, argument in enumerate(kernel.arguments()):
        name, _, dtype = argument.partition(":")
        if dtype:
            kernel.view(name, dtype, f"given[{i}]")
        else:
            kernel.let(name, f"given[{i}]")


def _write_head(kernel: Kernel, stream: StreamPlan, layout: PageLayout) -> None:
    """Store the new token of head h of row b, and encode the one that is due."""
    role, width = stream.role, stream.channels
    kernel.let("bh", f"b * {stream.heads} + h")
    lanes = gcd(8, width)
    kernel.scratch("x", width)
    for i, (stored, dtype) in enumerate(TYPES.items()):
        with kernel.block(f"if {role}_type == T.int64({i})"):
            kernel.view("new", dtype, f"{role}_at")
            with kernel.block(f"for j in T.serial({width // lanes})"):
                value = as_f32(at("new", f"bh * {width} + j * {lanes}", lanes), stored, lanes)
                kernel.line(f"{at('x', f'j * {lanes}', lanes)} = {value}")
    kernel.let("source", "T.int64(0)")
    kernel.let("position", f"{role}_length[b]")
    write_token(kernel, stream, "x", found="T.int64(1)", store=True)
    if stream.tokens.one_by_one:
        with kernel.block(f"if {role}_grow > T.int64(0)"):
            write_group(kernel, stream, layout, f"{role}_encoded[b]")
